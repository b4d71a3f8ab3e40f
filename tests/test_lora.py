"""LoRA through the pipeline's methods that users of diffusers know."""

import pytest
import torch
from peft import LoraConfig, get_peft_model_state_dict

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
    from safetensors.torch import save_file

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
