"""Tables of `vgen models`."""

import inspect
import json
import runpy
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel
from transformers import UMT5Config, UMT5EncoderModel

from vgen.models.convert.presets import read_presets
from vgen.tasks.information import describe_public
from vgen.tasks.memory import report_memory

ROOT = Path(__file__).parents[2]

# the layouts that differ from diffusers' defaults, which are those of Wan 2.1 14B
TRANSFORMERS = {"1.3B": {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}, "14B": {}}
UMT5_XXL = {
    "vocab_size": 256384, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
}  # fmt: skip


ROWS = {row[0]: row for row in describe_public()}


@pytest.mark.parametrize("size", TRANSFORMERS)
def test_public_pipelines_state_the_size_of_their_weights(size):
    with torch.device("meta"):
        networks = [
            WanTransformer3DModel(**TRANSFORMERS[size]),
            AutoencoderKLWan(),
            UMT5EncoderModel(UMT5Config(**UMT5_XXL)),
        ]
    num_bytes = 2 * sum(weight.numel() for network in networks for weight in network.parameters())
    assert f"{num_bytes / 2**30:.1f} GiB" in ROWS[f"Wan-AI/Wan2.1-T2V-{size}-Diffusers"]


def test_public_pipelines_state_their_tasks_and_the_size_of_their_videos():
    defaults = {name: one.default for name, one in inspect.signature(WanPipeline.__call__).parameters.items()}
    _, tasks, _, videos, length = ROWS["Wan-AI/Wan2.1-T2V-1.3B-Diffusers"]
    assert tasks == "text to video" and length == str(defaults["num_frames"])
    assert videos.startswith(f"{defaults['width']}x{defaults['height']}, ")
    assert ROWS["Wan-AI/Wan2.1-FLF2V-14B-720P-diffusers"][1] == "first and last frame to video"
    assert ROWS["Wan-AI/Wan2.2-I2V-A14B-Diffusers"][1] == "image to video"
    assert ROWS["Wan-AI/Wan2.2-TI2V-5B-Diffusers"][1] == "text or image to video"


def test_presets_state_the_memory_that_the_benchmark_calculates(tmp_path):
    measured = json.loads((ROOT / "docs/results/memory.json").read_text())
    presets = read_presets()
    assert presets.keys() == measured.keys()
    for name, one in presets.items():
        row = measured[name]
        expected = {"weights": row["weights"], "memory": row["resident"], "offloaded": row["model_offloading"]}
        assert one.needs == {key: round(value, 1) for key, value in expected.items()}, name
    benchmark = runpy.run_path(str(ROOT / "benchmarks/memory.py"))
    benchmark["write"](tmp_path, presets["self-forcing"])
    report = report_memory(tmp_path, dtype=torch.bfloat16)
    assert benchmark["numbers"](report) == pytest.approx(measured["self-forcing"])
