"""Public weights in training containers become pipeline folders. The oracle is the network that they come from."""

import inspect
import json
from pathlib import Path

import diffusers
import pytest
import torch
import yaml
from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers, convert_wan_vae_to_diffusers
from safetensors.torch import load_file, save_file
from transformers import UMT5Config, UMT5EncoderModel
from typer.testing import CliRunner

from vgen import VideoGenPipeline
from vgen.cli import app
from vgen.data.video_io import read_video
from vgen.diffusion import is_flow
from vgen.models.convert.files import unwrap
from vgen.models.convert.names import from_original, kind_of, to_original
from vgen.models.convert.presets import find_preset, read_presets
from vgen.models.transformer import SpacetimeTransformer
from vgen.sampling.options import RolloutOptions

from .test_single_file import original

OWN = {
    "tiny": {
        "about": "a tiny network", "source": "nowhere", "license": "none", "base": "a folder",
        "network": {"num_layers": 2, "num_attention_heads": 2},
        "scheduler": {"class": "FlowMatchLCMScheduler", "shift": 5.0},
        "denoiser": {"tasks": ["text", "leading"], "group_modes": ["chunk"], "chunk_size": 3, "window": 6, "sink": 0},
        "pipeline": {"sigmas": [1.0, 0.5], "num_inference_steps": 2, "guidance_scale": 1.0, "height": 16, "width": 16},
        "rollout": {"first_chunk_size": 3, "prompt_change": "recompute"},
    }
}  # fmt: skip


WAN_2_2_VAE = {
    "base_dim": 4, "decoder_base_dim": 8, "z_dim": 48, "is_residual": True, "patch_size": 2, "in_channels": 12,
    "out_channels": 12, "scale_factor_spatial": 16,
}  # fmt: skip


@pytest.fixture
def preset(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(OWN))
    return path


@pytest.fixture
def wan(wan_folder):
    return WanTransformer3DModel.from_pretrained(wan_folder / "transformer").state_dict()


def invoke(*words):
    return CliRunner().invoke(app, ["convert", *map(str, words)])


def convert(file, wan_folder, preset, output, *more):
    return invoke(file, "--base", wan_folder, "--preset", preset, "-o", output, *more)


def wrapped(weights, prefix):
    return {prefix + name: value for name, value in original(weights).items()}


@pytest.mark.parametrize(
    ("prefix", "file"),
    [
        ("model.", "a.pt"), ("model._fsdp_wrapped_module.", "a.pth"), ("module.", "a.pt"), ("", "a.pt"),
        ("model.diffusion_model.", "a.safetensors"), ("model.", "a.safetensors"),
    ],
)  # fmt: skip
def test_every_dialect_gives_the_same_pipeline(wan_folder, wan, preset, tmp_path, prefix, file):
    ours = wrapped(wan, prefix)
    if file.endswith(".safetensors"):
        save_file({name: value.contiguous() for name, value in ours.items()}, tmp_path / file)
    else:
        other = {name: torch.zeros_like(value) for name, value in ours.items()}
        torch.save({"generator": other, "generator_ema": ours, "critic": {"x": torch.zeros(1)}}, tmp_path / file)
    done = convert(tmp_path / file, wan_folder, preset, tmp_path / "out")
    assert done.exit_code == 0, done.output
    pipe = VideoGenPipeline.from_pretrained(tmp_path / "out")
    found = pipe.transformer.state_dict()
    assert found.keys() == wan.keys() and all(torch.equal(found[name], value) for name, value in wan.items())
    assert type(pipe.scheduler).__name__ == "FlowMatchLCMScheduler" and pipe.scheduler.config.shift == 5.0
    assert pipe.config.sigmas == [1.0, 0.5] and pipe.transformer.config.attention_head_dim == 12
    rollout = pipe.rollout("a red circle", num_frames=14, generator=torch.Generator().manual_seed(0))
    assert [len(frames) for frames in rollout] == [9, 5]  # 3 latents, then what is left of 3
    words = ["a red circle", "--model", tmp_path / "out", "--num-frames", 9, "-o", tmp_path / "a.gif", "--scale", 1]
    done = CliRunner().invoke(app, ["generate", *map(str, words)])
    assert done.exit_code == 0 and read_video(tmp_path / "a.gif")[0].shape == (9, 16, 16, 3), done.output


def test_shards_have_an_index_and_a_container_can_be_chosen(wan_folder, wan, preset, tmp_path, monkeypatch):
    monkeypatch.setattr("vgen.models.convert.folder._SHARD", "20KB")
    half = {name: value / 2 for name, value in original(wan).items()}
    torch.save(
        {"generator": half, "generator_ema": original(wan)}, tmp_path / "a.pt", _use_new_zipfile_serialization=False
    )
    done = convert(
        tmp_path / "a.pt", wan_folder, preset, tmp_path / "out", "--container", "generator", "--dtype", "bfloat16"
    )
    assert done.exit_code == 0, done.output
    folder = tmp_path / "out/transformer"
    index = json.loads((folder / "diffusion_pytorch_model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    table = "scale_shift_table"  # stays in float32, as when it is loaded
    assert load_file(folder / index["weight_map"][table])[table].dtype == torch.float32
    name = "proj_out.weight"
    stored = load_file(folder / index["weight_map"][name])[name]
    assert stored.dtype == torch.bfloat16 and torch.equal(stored, (wan[name] / 2).bfloat16())
    again = convert(folder / "diffusion_pytorch_model.safetensors.index.json", wan_folder, preset, tmp_path / "again")
    assert again.exit_code == 0, again.output
    pipes = [VideoGenPipeline.from_pretrained(tmp_path / one) for one in ("out", "again")]
    pairs = zip(*(pipe.transformer.state_dict().values() for pipe in pipes), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def test_the_files_of_the_base_are_shared(wan_folder, wan, preset, tmp_path):
    torch.save({"model": original(wan)}, tmp_path / "a.pt")
    assert convert(tmp_path / "a.pt", wan_folder, preset, tmp_path / "out").exit_code == 0
    for name in ("vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (wan_folder / name).read_bytes()


def test_mistakes_are_one_line(wan_folder, wan, preset, tmp_path):
    ours = original(wan)
    files = {
        "lost": {name: value for name, value in ours.items() if "blocks.1.ffn.2.bias" not in name},
        "extra": ours | {"blocks.0.extra": torch.zeros(1)},
        "shape": ours | {"head.head.bias": torch.zeros(3)},
        "layers": {name: value for name, value in ours.items() if "blocks.1." not in name},
        "other": {"critic": {"x": torch.zeros(1)}},
        "code": {"generator": ours, "run": print},
    }
    for name, content in files.items():
        torch.save(content, tmp_path / f"{name}.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "lost.pt").read_bytes()[:2000])
    messages = {
        "lost": "missing: blocks.1.ffn.net.2.bias",
        "extra": "unexpected: blocks.0.extra",
        "shape": "proj_out.bias (3,)",
        "layers": "num_layers=1, and the preset has 2",
        "other": "must have weights under generator_ema or",
        "code": "contains more than weights",
        "cut": "is malformed",
    }
    for name, message in messages.items():
        done = convert(tmp_path / f"{name}.pt", wan_folder, preset, tmp_path / "out")
        assert done.exit_code == 2 and message in " ".join(done.output.split()), (name, done.output)
        assert len(done.output.strip().splitlines()) == 1 and not (tmp_path / "out").exists()
    torch.save(ours, tmp_path / "right.pt")
    done = convert(tmp_path / "right.pt", wan_folder, "self-forcing", tmp_path / "out")
    assert done.exit_code == 2 and "num_layers=2, and the preset has 30" in " ".join(done.output.split())
    done = convert(tmp_path / "right.pt", tmp_path, preset, tmp_path / "out")
    assert done.exit_code == 2 and "must be the folder of a pipeline: it has no" in " ".join(done.output.split())
    done = convert(tmp_path / "right.pt", wan_folder, "self-forced", tmp_path / "out")
    assert done.exit_code == 2 and "--preset must be one of self-forcing" in " ".join(done.output.split())
    save_file({"decoder.conv1.weight": torch.zeros(1)}, tmp_path / "vae.safetensors")
    right, vae = tmp_path / "right.pt", tmp_path / "vae.safetensors"
    for words, message in (
        ([right], "--base is missing"),
        ([tmp_path / "none.pt"], "there is no file"),
        ([wan_folder, "--to", "original", "--base", wan_folder], "--base is for making a pipeline, not for --to"),
        ([right, "--base", wan_folder, "--component", "vae"], "component must be one of 'transformer'"),
        ([right, "--base", wan_folder, "--component", "transformer_2"], "has no transformer_2 that"),
        ([vae, "--base", wan_folder], "of another shape: decoder.conv_in.weight"),
        ([vae, "--base", wan_folder, "--preset", preset], "has the weights of a vae, and a preset is for those of"),
    ):
        done = invoke(*words, "-o", tmp_path / "out")
        assert done.exit_code == 2 and message in " ".join(done.output.split()), done.output
        assert len(done.output.strip().splitlines()) == 1 and not (tmp_path / "out").exists()


@pytest.mark.parametrize("part", ["vae", "text_encoder", "transformer"])
def test_one_component_is_replaced_and_all_else_stays(wan_folder, tmp_path, part, randomize):
    pipe = VideoGenPipeline.from_pretrained(wan_folder)
    network = randomize(getattr(pipe, part), seed=7)
    weights = dict(network.state_dict())
    weights.pop("encoder.embed_tokens.weight", None)
    torch.save(to_original(part, weights), tmp_path / "a.pth")
    done = invoke(tmp_path / "a.pth", "--base", wan_folder, "-o", tmp_path / "out")
    assert done.exit_code == 0, done.output
    got = VideoGenPipeline.from_pretrained(tmp_path / "out")
    before = VideoGenPipeline.from_pretrained(wan_folder)
    for name in ("vae", "text_encoder", "transformer"):
        expected = (network if name == part else getattr(before, name)).state_dict()
        found = getattr(got, name).state_dict()
        assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)
    assert got.transformer.config.text_dim == before.transformer.config.text_dim


def test_the_text_encoder_equals_the_original_one():
    stored = load_file(Path(__file__).with_name("umt5.safetensors"))
    original = {key.removeprefix("weights."): value for key, value in stored.items() if key.startswith("weights.")}
    network = UMT5EncoderModel(
        UMT5Config(
            vocab_size=10, d_model=8, d_kv=4, d_ff=9, num_layers=2, num_heads=2, is_encoder_decoder=False
        )  # fmt: skip
    ).eval()
    weights = from_original("text_encoder", original)
    assert kind_of(original) == kind_of(weights) == "text_encoder"
    missing, unexpected = network.load_state_dict(weights, strict=False)
    assert missing == ["encoder.embed_tokens.weight"] and not unexpected
    with torch.no_grad():
        got = network(stored["ids"], attention_mask=stored["mask"]).last_hidden_state
    kept = stored["mask"].bool()
    torch.testing.assert_close(got[kept], stored["output"][kept], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("part", "network", "convert"),
    [
        (
            "transformer",
            lambda: WanTransformer3DModel(num_layers=12, image_dim=8, added_kv_proj_dim=5120),
            convert_wan_transformer_to_diffusers,
        ),
        ("vae", AutoencoderKLWan, convert_wan_vae_to_diffusers),
        ("vae", lambda: AutoencoderKLWan(**WAN_2_2_VAE), None),
    ],
)
def test_names_are_those_that_diffusers_converts(part, network, convert):
    with torch.device("meta"):
        weights = dict(network().state_dict())
    original = to_original(part, weights)
    assert kind_of(original) == kind_of(weights) == part
    assert from_original(part, original).keys() == from_original(part, weights).keys() == weights.keys()
    assert not original.keys() & {name for name in weights if not name.startswith("patch_embedding.")}
    if convert is None:  # diffusers has no names for it
        assert {"encoder.downsamples.0.downsamples.2.resample.1.weight", "conv1.bias"} <= original.keys()
        assert "decoder.upsamples.3.upsamples.2.residual.6.weight" in original
    else:
        assert convert(dict(original)).keys() == weights.keys()


@pytest.mark.parametrize("experts", [False, True])
def test_a_pipeline_becomes_files_for_other_programs_and_comes_back(tmp_path, wan_folder, randomize, experts):
    parts = WanPipeline.from_pretrained(wan_folder).components
    config = {name: value for name, value in parts["vae"].config.items() if name[:1] != "_"}
    parts["vae"] = randomize(AutoencoderKLWan(**config | {"num_res_blocks": 2}))
    if experts:
        parts["transformer_2"] = randomize(WanTransformer3DModel.from_config(parts["transformer"].config), seed=9)
    WanPipeline(**parts, boundary_ratio=0.5 if experts else None).save_pretrained(tmp_path / "wan")
    assert invoke(tmp_path / "wan", "--to", "original", "-o", tmp_path / "original").exit_code == 0
    files = {str(path.relative_to(tmp_path / "original")) for path in (tmp_path / "original").rglob("*.safetensors")}
    name = "diffusion_pytorch_model.safetensors"
    networks = {f"high_noise_model/{name}", f"low_noise_model/{name}"} if experts else {name}
    assert files == networks | {"Wan2.1_VAE.safetensors", "models_t5_umt5-xxl-enc.safetensors"}
    for file in files:
        part = {"Wan": "vae", "mod": "text_encoder", "low": "transformer_2"}.get(file[:3], "transformer")
        words = [tmp_path / "original" / file, "--base", tmp_path / "wan", "--component", part]
        assert invoke(*words, "-o", tmp_path / "back", "--overwrite").exit_code == 0
        found = getattr(VideoGenPipeline.from_pretrained(tmp_path / "back"), part).state_dict()
        assert all(torch.equal(found[key], value) for key, value in parts[part].state_dict().items())
    assert invoke(tmp_path / "back", "--to", "diffusers", "-o", tmp_path / "diffusers").exit_code == 0
    again = WanPipeline.from_pretrained(tmp_path / "diffusers")
    assert again.config.boundary_ratio == (0.5 if experts else None)
    assert all(
        torch.equal(again.transformer.state_dict()[key], value)
        for key, value in parts["transformer"].state_dict().items()
    )


def test_networks_without_an_original_layout_are_named(tmp_path, wan_folder):
    for model, message in (
        ("vgen/shapes-64-unet", "only a pipeline with a CausalVideoVAE and a SpacetimeTransformer"),
        (wan_folder, "the original layout of a vae does not have other numbers of blocks than 2 in 4 levels"),
    ):
        done = invoke(model, "--to", "original", "-o", tmp_path / "out")
        assert done.exit_code == 2 and message in " ".join(done.output.split()), done.output
        assert not (tmp_path / "out").exists()


LORA_LAYERS = {
    "blocks.0.attn1.to_q": "blocks.0.self_attn.q", "blocks.1.ffn.net.2": "blocks.1.ffn.2", "proj_out": "head.head",
    "blocks.1.attn2.to_out.0": "blocks.1.cross_attn.o",
}  # fmt: skip


def make_lora(wan, rank=2):
    """Matrices of an adapter by layer."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    return {
        name: (draw(rank, wan[f"{name}.weight"].shape[1]), draw(wan[f"{name}.weight"].shape[0], rank))
        for name in LORA_LAYERS
    }


@pytest.mark.parametrize("kind", ["generator_lora", "ComfyUI", "diffusers with alpha"])
def test_a_lora_is_added_to_the_weights(wan_folder, wan, preset, tmp_path, kind):
    lora, scale = make_lora(wan), 0.5 if "alpha" in kind else 1.0
    torch.save(original(wan), tmp_path / "a.pt")
    file = tmp_path / ("lora.pt" if kind == "generator_lora" else "lora.safetensors")
    if kind == "generator_lora":
        names = {name: f"model.base_model.model.{their}" for name, their in LORA_LAYERS.items()}
        weights = {f"{names[name]}.lora_A.default.weight": down for name, (down, _) in lora.items()}
        weights |= {f"{names[name]}.lora_B.default.weight": up for name, (_, up) in lora.items()}
        torch.save({"generator_lora": weights}, file)
    elif kind == "ComfyUI":
        names = {name: f"diffusion_model.{their}" for name, their in LORA_LAYERS.items()}
        weights = {f"{names[name]}.lora_down.weight": down for name, (down, _) in lora.items()}
        save_file(weights | {f"{names[name]}.lora_up.weight": up for name, (_, up) in lora.items()}, file)
    else:
        layers = {f"{name}.lora_A.weight": down for name, (down, _) in lora.items()}
        layers |= {f"{name}.lora_B.weight": up for name, (_, up) in lora.items()}
        VideoGenPipeline.save_lora_weights(
            tmp_path, layers, weight_name=file.name, transformer_lora_adapter_metadata={"r": 2, "lora_alpha": 1}
        )
    done = convert(tmp_path / "a.pt", wan_folder, preset, tmp_path / "out", "--lora", file)
    assert done.exit_code == 0, done.output
    found = VideoGenPipeline.from_pretrained(tmp_path / "out").transformer.state_dict()
    for name, weight in wan.items():
        layer = name.removesuffix(".weight")
        expected = weight + scale * lora[layer][1] @ lora[layer][0] if layer in lora else weight
        torch.testing.assert_close(found[name], expected, atol=1e-5, rtol=1e-5)


def test_a_lora_in_the_original_format_gives_the_same_video(wan_folder, wan, tmp_path):
    lora = make_lora(wan)
    layers = {f"{name}.lora_A.weight": down for name, (down, _) in lora.items()}
    layers |= {f"{name}.lora_B.weight": up / 10 for name, (_, up) in lora.items()}
    VideoGenPipeline.save_lora_weights(
        tmp_path, layers, weight_name="ours.safetensors", transformer_lora_adapter_metadata={"r": 2, "lora_alpha": 3}
    )
    done = invoke(tmp_path / "ours.safetensors", "--to", "original", "-o", tmp_path / "theirs.safetensors")
    assert done.exit_code == 0, done.output
    theirs = load_file(tmp_path / "theirs.safetensors")
    assert {f"diffusion_model.{name}.lora_A.weight" for name in LORA_LAYERS.values()} <= theirs.keys()
    up = theirs["diffusion_model.head.head.lora_B.weight"]
    torch.testing.assert_close(up, 3 / 2 * layers["proj_out.lora_B.weight"])  # alpha by rank
    videos = []
    for file, loader in (
        (None, VideoGenPipeline), ("ours", VideoGenPipeline), ("theirs", VideoGenPipeline), ("theirs", WanPipeline),
    ):  # fmt: skip
        pipe = loader.from_pretrained(wan_folder)
        pipe.set_progress_bar_config(disable=True)
        if file is not None:
            pipe.load_lora_weights(tmp_path / f"{file}.safetensors")
        settings = {"height": 16, "width": 16, "num_frames": 5, "num_inference_steps": 2, "output_type": "latent"}
        videos.append(pipe("a red circle", generator=torch.Generator().manual_seed(0), **settings).frames)
    assert (videos[0] - videos[1]).abs().max() > 1e-3
    for video in videos[2:]:
        torch.testing.assert_close(video, videos[1], atol=1e-4, rtol=1e-4)
    done = invoke(tmp_path / "theirs.safetensors", "--to", "original", "-o", tmp_path / "again.safetensors")
    assert done.exit_code == 2 and "must be a LoRA for a Transformer with diffusers' names" in done.output


def test_names_in_wrappers_must_differ():
    weights = {"model.a": torch.zeros(1), "model._orig_mod.a": torch.zeros(1)}
    with pytest.raises(ValueError, match="several weights of the same name"):
        unwrap(weights, "a.pt")
    assert set(unwrap({"model.a": torch.zeros(1), "b": torch.zeros(1)}, "a.pt")) == {"model.a", "b"}


def test_presets_are_listed_and_complete(tmp_path):
    done = CliRunner().invoke(app, ["presets"])
    assert done.exit_code == 0 and all(name in done.output for name in read_presets())
    assert "832x480, 81 frames" in done.output
    accepted = inspect.signature(SpacetimeTransformer.__init__).parameters
    defaults = VideoGenPipeline(scheduler=None).defaults.keys()
    for one in read_presets().values():
        assert one.network.keys() | one.denoiser.keys() <= accepted.keys() and one.pipeline.keys() <= defaults
        settings = dict(one.scheduler)
        assert is_flow(getattr(diffusers, settings.pop("class"))(**settings))
        if one.rollout:
            window = one.denoiser["window"] + one.denoiser["sink"] + one.denoiser["chunk_size"]
            assert window <= one.denoiser["trained_token_frames"]
            RolloutOptions.from_json(one.rollout, "rollout")
    (tmp_path / "a.yaml").write_text("tiny: {about: nothing}")
    with pytest.raises(ValueError, match="tiny must have exactly the entries about, base, .*; see base"):
        find_preset(str(tmp_path / "a.yaml"))
