"""Memory of the public base models, calculated from their configs on the meta device; needs no weights and no network.

    python benchmarks/memory.py --output docs/results/memory.json

The videos are those of the models' defaults, in bfloat16. `vgen info MODEL --num-frames 81 --size 480x832 --dtype
bfloat16` shows the same for a model on the disk or on the Hub.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from transformers import CLIPVisionConfig, UMT5Config

from vgen.tasks.memory import report_memory

SMALL = {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}
TI2V = {"num_attention_heads": 24, "ffn_dim": 14336, "num_layers": 30, "in_channels": 48, "out_channels": 48}
IMAGES = {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120}
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
MODELS: dict[str, dict[str, Any]] = {
    "Wan 2.1 T2V 1.3B": {"transformer": SMALL, "size": (480, 832)},
    "Wan 2.1 T2V 14B": {"transformer": {}, "size": (480, 832)},
    "Wan 2.1 T2V 14B, 720p": {"transformer": {}, "size": (720, 1280)},
    "Wan 2.1 I2V 14B 480P": {"transformer": IMAGES, "size": (480, 832), "image_encoder": True},
    "Wan 2.2 T2V A14B": {"transformer": {}, "size": (480, 832), "boundary_ratio": 0.875},
    "Wan 2.2 I2V A14B": {"transformer": {"in_channels": 36}, "size": (480, 832), "boundary_ratio": 0.9},
    "Wan 2.2 TI2V-5B": {"transformer": TI2V, "vae": VAE_2_2, "size": (704, 1280), "num_frames": 121},
    "Self-Forcing 1.3B, rollout": {"transformer": SMALL, "size": (480, 832), "guidance_scale": 1.0, "causal": True},
}


def main() -> None:
    """Calculates all models."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="write the numbers here as JSON")
    args = parser.parse_args()
    found = {}
    for name, model in MODELS.items():
        with tempfile.TemporaryDirectory() as folder:
            write(Path(folder), model)
            report = report_memory(folder, model.get("num_frames", 81), model["size"], torch.bfloat16)
        sums = ("resident", "model_offloading", "group_offloading", "smallest", "float8_storage", "cache")
        found[name] = {one: getattr(report, one) / 2**30 for one in sums}
        found[name] |= {
            "weights": sum(part.weights for part in report.parts.values()) / 2**30,
            "denoiser": report.parts["transformer"].activations / 2**30,
            "decoder": report.parts["vae"].activations / 2**30,
        }
        print(name, {key: round(value, 1) for key, value in found[name].items()})
    if args.output:
        args.output.write_text(json.dumps(found, indent=1) + "\n")


def write(folder: Path, model: dict[str, Any]) -> None:
    """Writes the configs of a pipeline, without weights."""
    index = {
        "_class_name": "VideoGenPipeline",
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "transformer": ["vgen.models.transformer", "SpacetimeTransformer"],
        "vae": ["vgen.models.vae", "CausalVideoVAE"],
        **{key: model[key] for key in ("boundary_ratio", "guidance_scale") if key in model},
    }
    with torch.device("meta"):
        transformer, vae = WanTransformer3DModel(**model["transformer"]), AutoencoderKLWan(**model.get("vae", {}))
    if model.get("causal"):
        transformer.register_to_config(
            tasks=["text", "leading"], group_modes=["chunk"], chunk_size=3, window=18, sink=0
        )
    for name in ("transformer", "transformer_2") if "boundary_ratio" in model else ("transformer",):
        transformer.save_config(folder / name)
        index[name] = index["transformer"]
    vae.save_config(folder / "vae")
    UMT5_XXL.save_pretrained(folder / "text_encoder")
    if model.get("image_encoder"):
        CLIP_VIT_H.save_pretrained(folder / "image_encoder")
        index["image_encoder"] = ["transformers", "CLIPVisionModel"]
    (folder / "model_index.json").write_text(json.dumps(index))


if __name__ == "__main__":
    main()
