"""LoRA through the pipeline's methods that users of diffusers know."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file

from vgen.models.unet import UNet3D
from vgen.pipeline import VideoGenPipeline

from .test_pipeline import PROMPT, make_pipeline, seeded
from .test_unet_pipeline import build as make_unet_pipeline

TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


def write_adapter(folder, seed, alpha=4):
    """Saves a random adapter the way training scripts do."""
    transformer = make_pipeline().transformer
    transformer.add_adapter(LoraConfig(r=2, lora_alpha=alpha, target_modules=TARGETS), "trained")
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, weight in transformer.named_parameters():
            if "lora_" in name:
                weight.copy_(0.3 * torch.randn(weight.shape))
    layers = get_peft_model_state_dict(transformer, adapter_name="trained")
    metadata = transformer.peft_config["trained"].to_dict()
    VideoGenPipeline.save_lora_weights(
        folder, transformer_lora_layers=layers, transformer_lora_adapter_metadata=metadata
    )
    return layers


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    folders = {name: tmp_path_factory.mktemp(name) for name in ("first", "second")}
    for seed, folder in enumerate(folders.values()):
        write_adapter(folder, seed)
    return folders


def latents(pipe, **arguments):
    return pipe(PROMPT, generator=seeded(), num_inference_steps=2, output_type="latent", **arguments).frames


def apart(a, b):
    return (a - b).abs().max().item()


def test_loaded_adapters_change_the_video_by_their_scale_and_unloaded_ones_do_not(adapters):
    pipe = make_pipeline()
    plain = latents(pipe)
    pipe.load_lora_weights(adapters["first"])
    changed = latents(pipe)
    assert apart(plain, changed) > 1e-3
    assert apart(plain, latents(pipe, attention_kwargs={"scale": 0.0})) < 1e-5
    half = latents(pipe, attention_kwargs={"scale": 0.5})
    assert apart(half, plain) > 1e-3 and apart(half, changed) > 1e-3
    pipe.disable_lora()
    assert apart(plain, latents(pipe)) < 1e-5
    pipe.enable_lora()
    assert apart(changed, latents(pipe)) < 1e-5
    pipe.unload_lora_weights()
    assert torch.equal(plain, latents(pipe))


def test_an_adapter_adds_its_product_to_the_weight(adapters):
    pipe, merged = make_pipeline(), make_pipeline()
    layers = write_adapter(adapters["first"], 0)
    pipe.load_lora_weights(adapters["first"])
    with torch.no_grad():
        for name, module in merged.transformer.named_modules():
            if f"{name}.lora_A.weight" in layers:
                module.weight += 4 / 2 * layers[f"{name}.lora_B.weight"] @ layers[f"{name}.lora_A.weight"]
    assert apart(latents(pipe), latents(merged)) < 1e-5


@pytest.mark.parametrize("denoiser", ["transformer", "unet"])
def test_adapters_are_swapped_mixed_and_deleted(adapters, denoiser, tmp_path, randomize):
    pipe = make_pipeline() if denoiser == "transformer" else make_unet_pipeline(randomize)
    plain = latents(pipe)
    for seed, (name, folder) in enumerate(adapters.items()):
        if denoiser == "unet":
            folder = tmp_path / name
            unet_adapter(folder, make_unet_pipeline(randomize), seed=seed)
        pipe.load_lora_weights(folder, adapter_name=name)
    alone = {}
    for name in adapters:
        pipe.set_adapters(name)
        alone[name] = latents(pipe)
        assert pipe.get_active_adapters() == [name]
    assert apart(alone["first"], alone["second"]) > 1e-3
    pipe.set_adapters(["first", "second"], adapter_weights=[1.0, 0.0])
    assert apart(latents(pipe), alone["first"]) < 1e-5
    pipe.delete_adapters("first")
    assert pipe.get_list_adapters() == {denoiser: ["second"]}
    pipe.set_adapters("second")
    assert apart(latents(pipe), alone["second"]) < 1e-5
    pipe.delete_adapters("second")
    assert apart(latents(pipe), plain) < 1e-5


def test_fused_weights_give_the_same_and_can_be_unfused(adapters):
    pipe = make_pipeline()
    plain = latents(pipe)
    pipe.load_lora_weights(adapters["first"])
    changed = latents(pipe)
    pipe.fuse_lora()
    assert pipe.num_fused_loras == 1 and apart(latents(pipe), changed) < 1e-5
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    assert apart(latents(pipe), plain) < 1e-5


def test_adapters_in_the_public_format_of_wan_load(tmp_path):
    """Public Wan adapters come with the names of the original code, `diffusion_model.blocks.0.self_attn.q`."""
    layers = write_adapter(tmp_path / "ours", 0, alpha=2)
    names = {"attn1": "self_attn", "attn2": "cross_attn", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "o"}

    def original(name):
        for ours, theirs in names.items():
            name = name.replace(f".{ours}.", f".{theirs}.")
        return "diffusion_model." + name

    (tmp_path / "theirs").mkdir()
    save_file({original(name): value for name, value in layers.items()}, tmp_path / "theirs/adapter.safetensors")
    videos = []
    for folder in ("ours", "theirs"):
        pipe = make_pipeline()
        pipe.load_lora_weights(tmp_path / folder)
        videos.append(latents(pipe))
    assert torch.equal(*videos)


def test_pickled_adapters_raise(tmp_path):
    torch.save({}, tmp_path / "pytorch_lora_weights.bin")
    pipe = make_pipeline()
    with pytest.raises(ValueError, match="pickles"):
        pipe.load_lora_weights(tmp_path, use_safetensors=False)
    for name, source in (("pytorch_lora_weights.bin", tmp_path), (None, tmp_path / "pytorch_lora_weights.bin")):
        with pytest.raises(ValueError, match="pickles"):
            pipe.load_lora_weights(source, weight_name=name)
    with pytest.raises(OSError, match="safetensors"):
        pipe.load_lora_weights(tmp_path)


def unet_adapter(folder, pipe, text=False, seed=0):
    targets = {"unet": TARGETS} | ({"text_encoder": ["q_proj", "v_proj"]} if text else {})
    saved = {}
    torch.manual_seed(seed)
    for name, modules in targets.items():
        network = getattr(pipe, name)
        network.add_adapter(LoraConfig(r=2, lora_alpha=3, target_modules=modules), "trained")
        layers = get_peft_model_state_dict(network, adapter_name="trained")
        saved[f"{name}_lora_layers"] = {key: 0.3 * torch.randn(layer.shape) for key, layer in layers.items()}
        saved[f"{name}_lora_adapter_metadata"] = network.peft_config["trained"].to_dict()
    VideoGenPipeline.save_lora_weights(folder, **saved)


@pytest.mark.parametrize("text", [False, True])
def test_adapters_of_a_unet_are_loaded_scaled_fused_and_unloaded(tmp_path, randomize, stable_diffusion, text):
    def make():
        if not text:
            return make_unet_pipeline(randomize)
        pipe = VideoGenPipeline.from_stable_diffusion(stable_diffusion, num_frames=2)
        randomize(pipe.text_encoder)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    unet_adapter(tmp_path, make(), text)
    pipe = make()
    plain = latents(pipe)
    pipe.load_lora_weights(tmp_path, adapter_name="style")
    changed = latents(pipe)
    assert apart(plain, changed) > 1e-3 and pipe.get_active_adapters() == ["style"]
    assert pipe.get_list_adapters() == {"unet": ["style"]} | ({"text_encoder": ["style"]} if text else {})
    assert apart(plain, latents(pipe, attention_kwargs={"scale": 0.0})) < 1e-5
    scaled = latents(pipe, attention_kwargs={"scale": 0.5})
    assert apart(latents(pipe), changed) < 1e-5
    pipe.set_adapters("style", 0.5)
    half = latents(pipe)
    assert apart(half, plain) > 1e-3 and apart(half, changed) > 1e-3 and apart(half, scaled) < 1e-5
    pipe.set_adapters("style", 1.0)
    pipe.fuse_lora()
    assert pipe.num_fused_loras == 1
    assert apart(latents(pipe), changed) < 1e-4
    assert apart(latents(pipe, attention_kwargs={"scale": 0.0}), changed) < 1e-4  # all of it, the text encoder's too
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    assert apart(plain, latents(pipe)) < 1e-4  # taking out what was added rounds


def test_adapters_of_the_other_denoiser_and_pickles_raise(tmp_path, adapters, randomize):
    pipe = make_unet_pipeline(randomize)
    with pytest.raises(ValueError, match="expected LoRA weights for a U-Net"):
        pipe.load_lora_weights(adapters["first"])
    with pytest.raises(ValueError, match="pickles"):
        pipe.load_lora_weights(adapters["first"], use_safetensors=False)


LAYERS = [
    "blocks.0.attn1.to_q", "blocks.0.attn1.to_out.0", "blocks.0.attn2.to_v", "blocks.0.ffn.net.0.proj",
    "blocks.0.ffn.net.2", "condition_embedder.text_embedder.linear_1", "condition_embedder.time_embedder.linear_2",
    "condition_embedder.time_proj", "patch_embedding", "proj_out",
]  # fmt: skip
WAN = {
    "blocks.0.attn1.to_q": "blocks.0.self_attn.q", "blocks.0.attn1.to_out.0": "blocks.0.self_attn.o",
    "blocks.0.attn2.to_v": "blocks.0.cross_attn.v", "blocks.0.ffn.net.0.proj": "blocks.0.ffn.0",
    "blocks.0.ffn.net.2": "blocks.0.ffn.2", "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.time_proj": "time_projection.1", "patch_embedding": "patch_embedding",
    "proj_out": "head.head", "blocks.0.attn1.norm_q": "blocks.0.self_attn.norm_q", "blocks.0.norm2": "blocks.0.norm3",
}  # fmt: skip
UNET_LAYERS = [
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", "conv_in", "time_embedding.linear_1",
    "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_out.0", "down_blocks.0.resnets.0.conv1",
    "down_blocks.0.attentions.0.transformer_blocks.0.ff.net.0.proj", "down_blocks.0.attentions.0.proj_in",
    "down_blocks.0.downsamplers.0.conv", "down_blocks.0.temporal_attentions.0.attn.to_k", "conv_out",
]  # fmt: skip
T5_LAYERS = ["encoder.block.0.layer.0.SelfAttention.q", "encoder.block.0.layer.1.DenseReluDense.wo"]
CLIP_LAYERS = ["encoder.layers.0.self_attn.q_proj", "encoder.layers.0.self_attn.out_proj", "encoder.layers.1.mlp.fc1"]


def plain(name):
    return name


def underscored(name):
    return name.replace(".", "_")


def wan(name):
    return WAN[name]


AB = ("lora_A.weight", "lora_B.weight")
NAMED_AB = ("lora_A.default.weight", "lora_B.default.weight")
DOWN_UP = ("lora_down.weight", "lora_up.weight")
FORMATS = {
    "diffusers": ("transformer.", plain, AB, False),
    "no prefix": ("", plain, AB, False),
    "no prefix, names of Wan": ("", wan, AB, False),
    "DiffSynth": ("", wan, NAMED_AB, False),
    "DiffSynth, with its own prefix": ("pipe.dit.", wan, NAMED_AB, False),
    "peft": ("base_model.model.", plain, AB, False),
    "peft, names of Wan": ("base_model.model.", wan, AB, False),
    "ComfyUI": ("diffusion_model.", wan, AB, True),
    "ComfyUI, down and up": ("diffusion_model.", wan, DOWN_UP, True),
    "ComfyUI, without alpha": ("diffusion_model.", wan, DOWN_UP, False),
    "musubi": ("lora_unet_", lambda name: underscored(wan(name)), DOWN_UP, True),
    "musubi, names of diffusers": ("lora_unet_", underscored, DOWN_UP, True),
}


def random_adapter(network, layers, file, name, parts, has_alpha, seed=0):
    """Adds `scale * B @ A` to the weights of a network, in place, and returns A, B and alpha in a format."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for index, layer in enumerate(layers):
        weight, rank, alpha = network.get_submodule(layer).weight, 2 + index % 3, 1.5
        down = 0.3 * torch.randn(rank, *weight.shape[1:], generator=generator)
        up = 0.3 * torch.randn(weight.shape[0], rank, generator=generator)
        with torch.no_grad():
            weight += (alpha / rank if has_alpha else 1) * (up @ down.flatten(1)).view_as(weight)
        key = file + name(layer)
        weights[f"{key}.{parts[0]}"], weights[f"{key}.{parts[1]}"] = down, up.view(*up.shape, *[1] * (weight.ndim - 2))
        if has_alpha:
            weights[f"{key}.alpha"] = torch.tensor(alpha)
    return weights


@pytest.mark.parametrize("some", [False, True])
@pytest.mark.parametrize("file", FORMATS)
def test_every_format_gives_the_video_of_merged_weights(file, some, tmp_path):
    """Also files that cover some layers only."""
    pipe, merged = make_pipeline(), make_pipeline()
    prefix, name, parts, has_alpha = FORMATS[file]
    layers = LAYERS[3:5] if some else LAYERS
    weights = random_adapter(merged.transformer, layers, prefix, name, parts, has_alpha)
    save_file(weights, tmp_path / "adapter.safetensors")
    before = latents(pipe)
    pipe.load_lora_weights(tmp_path / "adapter.safetensors")
    assert apart(latents(pipe), latents(merged)) < 1e-5 < apart(before, latents(merged))
    assert apart(latents(pipe, attention_kwargs={"scale": 0.0}), before) < 1e-5
    pipe.fuse_lora()
    assert apart(latents(pipe), latents(merged)) < 1e-4
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    assert apart(latents(pipe), before) < 1e-4


UNET_FORMATS = {
    "diffusers": ("unet.", plain, AB, False),
    "no prefix": ("", plain, AB, False),
    "peft": ("base_model.model.", plain, AB, False),
    "kohya": ("lora_unet_", underscored, DOWN_UP, True),
    "diffusers, old": ("unet.", plain, ("lora.down.weight", "lora.up.weight"), False),
}


@pytest.mark.parametrize("file", UNET_FORMATS)
def test_every_format_for_a_unet_gives_the_video_of_merged_weights(file, randomize):
    pipe, merged = make_unet_pipeline(randomize), make_unet_pipeline(randomize)
    prefix, name, parts, has_alpha = UNET_FORMATS[file]
    weights = random_adapter(merged.unet, UNET_LAYERS, prefix, name, parts, has_alpha)
    pipe.load_lora_weights(weights)
    assert apart(latents(pipe), latents(merged)) < 1e-3 * latents(merged).abs().max()
    assert apart(latents(pipe), latents(make_unet_pipeline(randomize))) > 1e-2


@pytest.mark.parametrize("file", ["text_encoder.", "lora_te_", "lora_te1_"])
@pytest.mark.parametrize("encoder", ["T5", "CLIP", "T5 of a Transformer"])
def test_layers_of_text_encoders_are_applied_exactly(encoder, file, randomize, stable_diffusion):
    def make():
        if encoder == "CLIP":
            pipe = VideoGenPipeline.from_stable_diffusion(stable_diffusion, num_frames=2)
            randomize(pipe.text_encoder)
            pipe.set_progress_bar_config(disable=True)
            return pipe
        return make_unet_pipeline(randomize) if encoder == "T5" else make_pipeline()

    pipe, merged = make(), make()
    name, parts = (plain, AB) if file == "text_encoder." else (underscored, DOWN_UP)
    layers, network = (CLIP_LAYERS if encoder == "CLIP" else T5_LAYERS), merged.text_encoder
    weights = random_adapter(network, layers, file, name, parts, file != "text_encoder.")
    if encoder == "CLIP":
        weights = {key.replace(file, f"{file}text_model{file[-1]}"): weight for key, weight in weights.items()}
    kind = pipe.denoiser_name
    layers = LAYERS if kind == "transformer" else UNET_LAYERS[:1]
    both = weights | random_adapter(merged.denoiser, layers, f"{kind}.", plain, AB, False)
    before, text_only = latents(pipe), pipe.encode_prompt(PROMPT)[0]
    pipe.load_lora_weights(both, adapter_name="style")
    assert torch.allclose(pipe.encode_prompt(PROMPT)[0], merged.encode_prompt(PROMPT)[0], atol=1e-4)
    assert not torch.allclose(pipe.encode_prompt(PROMPT)[0], text_only, atol=1e-3)
    assert apart(latents(pipe), latents(merged)) < 1e-3 * latents(merged).abs().max()
    assert pipe.get_list_adapters() == {kind: ["style"], "text_encoder": ["style"]}
    assert apart(latents(pipe, attention_kwargs={"scale": 0.0}), before) < 1e-4
    pipe.load_lora_weights(weights, adapter_name="text")
    pipe.delete_adapters("style")
    pipe.set_adapters("text")
    assert torch.allclose(pipe.encode_prompt(PROMPT)[0], merged.encode_prompt(PROMPT)[0], atol=1e-4)
    pipe.disable_lora()
    assert apart(latents(pipe), before) < 1e-4
    pipe.unload_lora_weights()
    assert torch.allclose(pipe.encode_prompt(PROMPT)[0], text_only, atol=1e-5)


def test_differences_of_weights_and_biases_are_applied_exactly():
    pipe, merged = make_pipeline(), make_pipeline()
    weights = random_adapter(merged.transformer, LAYERS[:1], "diffusion_model.", wan, DOWN_UP, True)
    with torch.no_grad():
        for index, layer in enumerate(LAYERS):
            module = merged.transformer.get_submodule(layer)
            differences = {"diff": module.weight, "diff_b": module.bias}
            if index < 2:  # a layer with other parts, or with a bias only
                del differences["diff"]
            for part, parameter in differences.items():
                difference = 0.2 * torch.randn(parameter.shape, generator=seeded(index))
                parameter += difference
                weights[f"diffusion_model.{wan(layer)}.{part}"] = difference
    for layer in ("blocks.0.attn1.norm_q", "blocks.0.norm2"):  # all zero in extracted files
        weights[f"diffusion_model.{wan(layer)}.diff"] = torch.zeros(24)
    before = latents(pipe)
    pipe.load_lora_weights(weights, adapter_name="distilled")
    assert apart(latents(pipe), latents(merged)) < 1e-5 < apart(before, latents(merged))
    pipe.set_adapters("distilled", 0.0)
    assert apart(latents(pipe), before) < 1e-5
    pipe.set_adapters("distilled", 1.0)
    pipe.fuse_lora()
    assert apart(latents(pipe), latents(merged)) < 1e-4


BROKEN = {
    "norm": lambda weights: weights.update({"diffusion_model.blocks.0.self_attn.norm_q.diff": torch.ones(24)}),
    "another layer": lambda weights: weights.update({"diffusion_model.blocks.7.ffn.0.lora_up.weight": torch.ones(2)}),
    "image": lambda weights: weights.update({"diffusion_model.blocks.0.cross_attn.k_img.diff_b": torch.ones(24)}),
    "DoRA": lambda weights: weights.update({"diffusion_model.blocks.0.self_attn.q.dora_scale": torch.ones(24)}),
    "LoKr": lambda weights: weights.update({"diffusion_model.blocks.0.ffn.0.lokr_w1": torch.ones(2, 2)}),
    "a matrix alone": lambda weights: weights.pop("diffusion_model.blocks.0.self_attn.q.lora_up.weight"),
    "shape": lambda weights: weights.update(
        {"diffusion_model.blocks.0.self_attn.q.lora_down.weight": torch.ones(2, 25)}
    ),
    "other encoder": lambda weights: weights.update(
        {"lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": torch.ones(2, 2)}
    ),
    "full weight": lambda weights: weights.update({"diffusion_model.blocks.0.ffn.0.weight": torch.ones(32, 24)}),
    "infinite": lambda weights: weights["diffusion_model.blocks.0.self_attn.q.lora_up.weight"].fill_(float("inf")),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_file_that_does_not_fit_completely_is_rejected_with_its_keys_and_changes_nothing(name):
    pipe = make_pipeline()
    weights = random_adapter(make_pipeline().transformer, LAYERS[:5], "diffusion_model.", wan, DOWN_UP, True)
    whole = set(weights)
    BROKEN[name](weights)
    named = next(iter(set(weights) - whole), "diffusion_model.blocks.0.self_attn.q.lora_")
    before, modules = latents(pipe), len(list(pipe.transformer.modules()))
    with pytest.raises(ValueError, match="nothing was loaded") as error:
        pipe.load_lora_weights(weights)
    assert named in str(error.value) and "\n" not in str(error.value)
    assert torch.equal(latents(pipe), before) and len(list(pipe.transformer.modules())) == modules
    assert not pipe.get_list_adapters()


def test_files_without_layers_and_names_in_use_are_rejected(adapters):
    pipe = make_pipeline()
    for weights in ({}, {"something": torch.ones(2)}):
        with pytest.raises(ValueError, match="expected LoRA weights for a Transformer"):
            pipe.load_lora_weights(weights)
    pipe.load_lora_weights(adapters["first"], adapter_name="style")
    with pytest.raises(ValueError, match="already an adapter 'style'"):
        pipe.load_lora_weights(adapters["second"], adapter_name="style")
    with pytest.raises(ValueError, match="no adapter 'other'"):
        pipe.load_lora_weights(adapters["second"], adapter_name="other", hotswap=True)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("saved_by", ["peft", "diffusers"])
def test_an_adapter_that_peft_saved_gives_the_output_of_peft(saved_by, rslora, tmp_path):
    """The scale is in a file of its own, or in the header of the file; it differs between layers."""
    config = LoraConfig(
        r=2, lora_alpha=3, target_modules=["to_q", "to_out.0", "ffn.net.2"], use_rslora=rslora,
        rank_pattern={"to_q": 3}, alpha_pattern={"attn1.to_q": 5}, init_lora_weights=False,
    )  # fmt: skip
    pipe, oracle = make_pipeline(), make_pipeline()
    torch.manual_seed(1)
    wrapped = get_peft_model(oracle.transformer, config)
    if saved_by == "peft":
        wrapped.save_pretrained(tmp_path)
    else:
        VideoGenPipeline.save_lora_weights(
            tmp_path, get_peft_model_state_dict(wrapped, adapter_name="default"),
            transformer_lora_adapter_metadata=config.to_dict(),
        )  # fmt: skip
    pipe.load_lora_weights(tmp_path)
    assert apart(latents(pipe), latents(oracle)) < 1e-5 < apart(latents(pipe), latents(make_pipeline()))


def test_layers_of_a_text_encoder_are_saved_with_those_of_a_transformer(tmp_path):
    pipe = make_pipeline()
    saved = {}
    for name, targets in (("transformer", TARGETS), ("text_encoder", ["q", "v"])):
        network = getattr(pipe, name)
        network.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False), "trained")
        saved[f"{name}_lora_layers"] = get_peft_model_state_dict(network, adapter_name="trained")
        saved[f"{name}_lora_adapter_metadata"] = network.peft_config["trained"].to_dict()
    VideoGenPipeline.save_lora_weights(tmp_path, **saved)
    loaded = make_pipeline()
    loaded.load_lora_weights(tmp_path)
    assert apart(latents(pipe), latents(loaded)) < 1e-5 < apart(latents(pipe), latents(make_pipeline()))
    with pytest.raises(ValueError, match="pass at least one of transformer_lora_layers"):
        VideoGenPipeline.save_lora_weights(tmp_path)


@pytest.mark.parametrize("part", ["transformer", "text_encoder"])
def test_a_pipeline_with_adapters_is_not_saved_in_a_form_that_does_not_load(part, tmp_path, hub):
    pipe = make_pipeline()
    targets = TARGETS if part == "transformer" else ["q", "v"]
    network = getattr(pipe, part)
    network.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False), "style")
    saves = [lambda: pipe.save_pretrained(tmp_path / "pipe"), lambda: pipe.push_to_hub("someone/pipe")]
    saves += [lambda: network.save_pretrained(tmp_path / "network")] if part == "transformer" else []
    for save in saves:
        with pytest.raises(ValueError, match=f"({part}|{type(network).__name__}) has LoRA layers"):
            save()
    assert not list(tmp_path.iterdir()) and not hub
    changed = latents(pipe)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    pipe.save_pretrained(tmp_path / "pipe")
    loaded = VideoGenPipeline.from_pretrained(tmp_path / "pipe")
    loaded.set_progress_bar_config(disable=True)
    assert apart(latents(loaded), changed) < 1e-4


SCALES = [0.5, {"mid": 2.0}, {"down": 0.5, "up": {"block_1": [1.0, 3.0]}}, {"up": {"block_1": 2.0}, "mid": 0.0}]


@pytest.mark.parametrize("scale", SCALES, ids=str)
def test_adapters_of_a_unet_are_scaled_by_block_as_in_diffusers(scale, stable_diffusion):
    source = UNet2DConditionModel.from_pretrained(stable_diffusion, subfolder="unet")
    scales = []
    for unet in (source, UNet3D.from_unet2d(source)):
        unet.add_adapter(LoraConfig(r=2, target_modules=TARGETS), "style")
        unet.set_adapters("style", scale)
        layers = {name: module.scaling for name, module in unet.named_modules() if hasattr(module, "scaling")}
        scales.append({name: one["style"] for name, one in layers.items() if "temporal" not in name})
    assert scales[0] == scales[1] and len(scales[0]) > 8


@pytest.fixture
def untraced():
    """Compiled networks run without being traced, which takes most of the time."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.mark.parametrize("denoiser", ["transformer", "unet"])
def test_all_methods_work_on_compiled_networks(denoiser, randomize, untraced):
    def make():
        pipe = make_pipeline() if denoiser == "transformer" else make_unet_pipeline(randomize)
        layers = LAYERS if denoiser == "transformer" else UNET_LAYERS
        weights = random_adapter(pipe.denoiser, layers, f"{denoiser}.", plain, AB, False)
        return pipe, weights | random_adapter(pipe.text_encoder, T5_LAYERS, "text_encoder.", plain, AB, False)

    merged, weights = make()
    pipe = make_pipeline() if denoiser == "transformer" else make_unet_pipeline(randomize)
    before, tolerance = latents(pipe), 1e-3 * latents(merged).abs().max()
    compiled = torch.compile(pipe.denoiser, backend="eager")
    setattr(pipe, denoiser, compiled)
    pipe.text_encoder = torch.compile(pipe.text_encoder, backend="eager")
    pipe.load_lora_weights(weights, adapter_name="style")
    assert getattr(pipe, denoiser) is compiled
    assert apart(latents(pipe), latents(merged)) < tolerance
    assert pipe.get_list_adapters() == {denoiser: ["style"], "text_encoder": ["style"]}
    assert pipe.get_active_adapters() == ["style"]
    half = latents(pipe, attention_kwargs={"scale": 0.5})
    pipe.set_adapters("style", 0.5)
    assert apart(latents(pipe), half) < tolerance
    pipe.set_adapters("style", 1.0)
    pipe.disable_lora()
    assert apart(latents(pipe), before) < tolerance
    pipe.enable_lora()
    pipe.fuse_lora()
    assert pipe.num_fused_loras == 1 and apart(latents(pipe), latents(merged)) < tolerance
    pipe.unfuse_lora()
    pipe.set_lora_device(["style"], "cpu")
    pipe.delete_adapters("style")
    assert pipe.get_list_adapters().get(denoiser, []) == []
    pipe.load_lora_weights(weights, adapter_name="again")
    assert apart(latents(pipe), latents(merged)) < tolerance
    pipe.unload_lora_weights()
    assert apart(latents(pipe), before) < tolerance and getattr(pipe, denoiser) is compiled


@pytest.mark.parametrize("has_alpha", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_hotswapped_adapter_gives_the_video_of_merged_weights(compiled, has_alpha):
    merged, other, pipe = make_pipeline(), make_pipeline(), make_pipeline()
    files = [
        random_adapter(one.transformer, LAYERS[:5], "diffusion_model.", wan, DOWN_UP, has_alpha, seed)
        for seed, one in enumerate((merged, other))
    ]
    pipe.enable_lora_hotswap(target_rank=8)
    if compiled:
        pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    for file, expected, hotswap in ((files[0], merged, False), (files[1], other, True), (files[0], merged, True)):
        pipe.load_lora_weights(file, adapter_name="style", hotswap=hotswap)
        assert apart(latents(pipe), latents(expected)) < 1e-5


@pytest.mark.parametrize("given", ["as they are", "alphas apart"])
def test_layers_of_a_text_encoder_load_on_their_own(given):
    pipe, merged = make_pipeline(), make_pipeline()
    name, parts = (plain, AB) if given == "as they are" else (underscored, DOWN_UP)
    file = "text_encoder." if given == "as they are" else "lora_te_"
    weights = random_adapter(merged.text_encoder, T5_LAYERS, file, name, parts, given != "as they are")
    alphas = {key: weights.pop(key).item() for key in list(weights) if key.endswith(".alpha")}
    renamed = {f"text_encoder.{key.removeprefix(file)}": weight for key, weight in weights.items()}
    alphas = {f"text_encoder.{key.removeprefix(file)}": alpha for key, alpha in alphas.items()}
    others = {"transformer.patch_embedding.lora_A.weight": torch.ones(1)}
    pipe.load_lora_into_text_encoder(renamed | others, alphas, pipe.text_encoder, adapter_name="style")
    expected = merged.encode_prompt(PROMPT)[0]
    assert torch.allclose(pipe.encode_prompt(PROMPT)[0], expected, atol=1e-4)
    assert not torch.allclose(make_pipeline().encode_prompt(PROMPT)[0], expected, atol=1e-3)
    with pytest.raises(ValueError, match="nothing was loaded"):
        pipe.load_lora_into_text_encoder({"text_encoder.nosuch.lora_A.weight": torch.ones(1)}, None, pipe.text_encoder)
