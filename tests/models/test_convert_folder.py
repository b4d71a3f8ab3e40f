"""Public weights in training containers become pipeline folders. The oracle is the network that they come from."""

import json

import pytest
import torch
import yaml
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from vgen import VideoGenPipeline
from vgen.cli import app
from vgen.models.convert.files import unwrap
from vgen.models.convert.presets import find_preset, read_presets

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


@pytest.fixture
def preset(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(OWN))
    return path


@pytest.fixture
def wan(wan_folder):
    return WanTransformer3DModel.from_pretrained(wan_folder / "transformer").state_dict()


def convert(file, wan_folder, preset, output, *more):
    words = [file, "--base", wan_folder, "--preset", preset, "-o", output, *more]
    return CliRunner().invoke(app, ["convert", *map(str, words)])


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
    assert done.exit_code == 2 and "must be the folder of a pipeline of Wan 2.1" in " ".join(done.output.split())
    done = convert(tmp_path / "right.pt", wan_folder, "self-forced", tmp_path / "out")
    assert done.exit_code == 2 and "--preset must be one of self-forcing" in " ".join(done.output.split())


def test_names_in_wrappers_must_differ():
    weights = {"model.a": torch.zeros(1), "model._orig_mod.a": torch.zeros(1)}
    with pytest.raises(ValueError, match="several weights of the same name"):
        unwrap(weights, "a.pt")
    assert set(unwrap({"model.a": torch.zeros(1), "b": torch.zeros(1)}, "a.pt")) == {"model.a", "b"}


def test_presets_are_listed_and_complete(tmp_path):
    done = CliRunner().invoke(app, ["presets"])
    assert done.exit_code == 0 and all(name in done.output for name in read_presets())
    for one in read_presets().values():
        window = one.denoiser["window"] + one.denoiser["sink"] + one.denoiser["chunk_size"]
        assert window <= one.denoiser["trained_token_frames"]
    (tmp_path / "a.yaml").write_text("tiny: {about: nothing}")
    with pytest.raises(ValueError, match="tiny must have exactly the entries about, base, .*; see base"):
        find_preset(str(tmp_path / "a.yaml"))
