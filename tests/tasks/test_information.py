"""Tables of `vgen models`."""

import inspect

import torch
from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel
from transformers import UMT5Config, UMT5EncoderModel

from vgen.tasks.information import PUBLIC_CHECKPOINTS

# the layouts that differ from diffusers' defaults, which are those of Wan 2.1 14B
TRANSFORMERS = {"1.3B": {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}, "14B": {}}
UMT5_XXL = {
    "vocab_size": 256384, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
}  # fmt: skip


def test_public_presets_state_the_size_of_their_weights():
    rows = {row[0]: row for row in PUBLIC_CHECKPOINTS}
    assert rows.keys() == {f"Wan-AI/Wan2.1-T2V-{size}-Diffusers" for size in TRANSFORMERS}
    with torch.device("meta"):
        shared = [AutoencoderKLWan(), UMT5EncoderModel(UMT5Config(**UMT5_XXL))]
        for size, settings in TRANSFORMERS.items():
            networks = [WanTransformer3DModel(**settings), *shared]
            num_bytes = 2 * sum(weight.numel() for network in networks for weight in network.parameters())
            assert f"{num_bytes / 1e9:.1f} GB" in rows[f"Wan-AI/Wan2.1-T2V-{size}-Diffusers"]


def test_public_presets_state_the_size_of_their_videos():
    defaults = {name: one.default for name, one in inspect.signature(WanPipeline.__call__).parameters.items()}
    for row in PUBLIC_CHECKPOINTS:
        assert row[1] == "text to video" and row[-1] == str(defaults["num_frames"])
        assert row[-2].startswith(f"{defaults['width']}x{defaults['height']}")
