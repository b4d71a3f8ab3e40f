"""Memory of the presets of `vgen convert`, calculated from their configs on the meta device, without weights.

    python benchmarks/memory.py --output docs/results/memory.json

The videos are those of the models' defaults, in bfloat16. `vgen info MODEL --num-frames 81 --size 480x832 --dtype
bfloat16` shows the same for a model on the disk or on the Hub.
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from transformers import CLIPVisionConfig, UMT5Config

from vgen.models.convert.presets import CheckpointPreset, read_presets
from vgen.models.transformer import SpacetimeTransformer
from vgen.tasks.memory import MemoryReport, report_memory

FFN_DIM = {12: 8960, 24: 14336, 40: 13824}
"""Width of the feed-forward layers, by number of heads."""
UMT5_XXL = UMT5Config(
    vocab_size=256384, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu"
)
CLIP_VIT_H = CLIPVisionConfig(
    hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=16, patch_size=14,
    projection_dim=1024,
)  # fmt: skip
VAE_2_2 = {
    "base_dim": 160, "decoder_base_dim": 256, "z_dim": 48, "is_residual": True, "patch_size": 2, "in_channels": 12,
    "out_channels": 12, "scale_factor_spatial": 16, "latents_mean": [0.0] * 48, "latents_std": [1.0] * 48,
}  # fmt: skip


def main() -> None:
    """Calculates all presets."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="write the numbers here as JSON")
    args = parser.parse_args()
    found, known = {}, {}
    for name, preset in read_presets().items():
        key = json.dumps([preset.network, preset.denoiser, preset.pipeline])
        if key not in known:
            with tempfile.TemporaryDirectory() as folder:
                write(Path(folder), preset)
                known[key] = numbers(report_memory(folder, dtype=torch.bfloat16))
        found[name] = known[key]
        print(name, {one: round(value, 1) for one, value in found[name].items()})
    if args.output:
        args.output.write_text(json.dumps(found, indent=1) + "\n")


def numbers(report: MemoryReport) -> dict[str, float]:
    """A report in GiB."""
    sums = ("resident", "model_offloading", "group_offloading", "smallest", "float8_storage", "cache")
    return {one: getattr(report, one) / 2**30 for one in sums} | {
        "weights": sum(part.weights for part in report.parts.values()) / 2**30,
        "denoiser": report.parts["transformer"].activations / 2**30,
        "decoder": report.parts["vae"].activations / 2**30,
    }


def write(folder: Path, preset: CheckpointPreset) -> None:
    """Writes the configs of a pipeline, without weights."""
    index = {
        "_class_name": "VideoGenPipeline",
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "transformer": ["vgen.models.transformer", "SpacetimeTransformer"],
        "vae": ["vgen.models.vae", "CausalVideoVAE"],
        **preset.pipeline,
    }
    heads, channels = preset.network["num_attention_heads"], preset.network["in_channels"]
    layout = {"ffn_dim": FFN_DIM[heads], "out_channels": 48 if channels == 48 else 16}
    if "image_dim" in preset.network:
        layout["added_kv_proj_dim"] = 128 * heads
    with torch.device("meta"):
        transformer = SpacetimeTransformer(**layout | preset.network | preset.denoiser)
        vae = AutoencoderKLWan(**VAE_2_2 if channels == 48 else {})
    for name in ("transformer", "transformer_2") if "boundary_ratio" in preset.pipeline else ("transformer",):
        transformer.save_config(folder / name)
        index[name] = index["transformer"]
    vae.save_config(folder / "vae")
    UMT5_XXL.save_pretrained(folder / "text_encoder")
    if "image_dim" in preset.network:
        CLIP_VIT_H.save_pretrained(folder / "image_encoder")
        index["image_encoder"] = ["transformers", "CLIPVisionModel"]
    (folder / "model_index.json").write_text(json.dumps(index))


if __name__ == "__main__":
    main()
