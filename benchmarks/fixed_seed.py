"""Hashes of results with fixed seeds: outputs of the shipped checkpoints, and weights after 20 steps of each script.

A change that should not alter results leaves all hashes the same. They depend on the processor and the thread count:

    OMP_NUM_THREADS=1 python benchmarks/fixed_seed.py --output before.json
    OMP_NUM_THREADS=1 python benchmarks/fixed_seed.py --compare before.json
"""

import argparse
import hashlib
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from scripts import launch

from vgen import VideoGenPipeline
from vgen.data.shapes import ShapesWorld, render
from vgen.io.pixels import to_frames

PROMPT = "a red circle bounces"
SHARED = {
    "mixed_precision": "no", "warmup_steps": 1, "batch_size": 4, "max_steps": 20, "log_every": 1, "save_every": 20,
    "sample_every": 100,
}  # fmt: skip
SIZE = {"height": 16, "width": 16}
VAE = {
    "base_dim": 8, "z_dim": 4, "dim_mult": [1, 1, 1], "num_res_blocks": 1, "temperal_downsample": [True, True],
    "patch_size": 2, "in_channels": 12, "out_channels": 12,
}  # fmt: skip
TRANSFORMER = {
    "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "freq_dim": 16,
    "ffn_dim": 32, "num_layers": 1, "group_modes": ["full", "chunk", "causal"], "keyframe_slots": 4, "sink": 1,
}  # fmt: skip
UNET = {
    "in_channels": 4, "out_channels": 4, "block_out_channels": [8, 16], "layers_per_block": 1, "norm_num_groups": 4,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"], "attention_head_dim": 2, "temporal_head_dim": 8,
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"], "group_modes": ["full", "chunk", "causal"],
    "keyframe_slots": 4, "sink": 1,
}  # fmt: skip
MIXTURE = {
    "known": {"none": 1, "leading": 1, "keyframes": 1, "both": 1}, "windows": {"start": 1, "anywhere": 1, "sink": 2},
    "levels": {"shared": 1, "group": 1, "independent": 1},
}  # fmt: skip


def digest(arrays: list[Any]) -> str:
    """The hash of arrays or tensors and their shapes."""
    sha = hashlib.sha256()
    for array in arrays:
        array = np.ascontiguousarray(array)
        sha.update(f"{array.dtype}{array.shape}".encode())
        sha.update(array.tobytes())
    return sha.hexdigest()[:16]


def outputs(name: str) -> dict[str, str]:
    """Of one call of each task of a checkpoint."""
    pipe = VideoGenPipeline.from_pretrained(name)
    pipe.set_progress_bar_config(disable=True)
    clip = render([ShapesWorld(split="held_out").scene(0)], num_frames=17, height=64, width=64)[0]
    frames = to_frames(clip[None])[0]
    steps = {"num_inference_steps": 4}
    calls: dict[str, Callable[..., list[Any]]] = {
        "text": lambda seed: pipe([PROMPT, "a blue square"], generator=seed, output_type="latent", **steps).frames,
        "pixels": lambda seed: pipe(PROMPT, negative_prompt="a star", generator=seed, **steps).frames,
        "causal": lambda seed: pipe(PROMPT, groups="causal", generator=seed, output_type="latent", **steps).frames,
        "known": lambda seed: pipe(
            PROMPT, frames={i: frames[i] for i in (0, 1, 2, 3, 4, 9, 16)}, generator=seed, **steps
        ).frames,
        "predict": lambda seed: pipe.predict(frames[:7], num_frames=14, generator=seed, **steps).frames,
        "interpolate": lambda seed: pipe.interpolate(frames, factor=4, generator=seed, **steps).frames,
        "rollout": lambda seed: list(pipe.rollout(PROMPT, num_frames=40, generator=seed, **steps)),
        "schedule": lambda seed: list(
            pipe.rollout(
                {0: PROMPT, 20: "a blue square"}, num_frames=40, chunk_size=2, window=2, history_noise=0.1,
                generator=seed, **steps,
            )
        ),
        "history guidance": lambda seed: list(
            pipe.rollout(PROMPT, num_frames=30, history_guidance_scale=1.5, generator=seed, **steps)
        ),
        "coarse to fine": lambda seed: list(
            pipe.rollout(PROMPT, num_frames=60, keyframe_interval=4, generator=seed, **steps)
        ),
        "coarse to fine, given": lambda seed: list(
            pipe.rollout(
                [None, PROMPT], [frames, frames[::-1]], num_frames=30, keyframe_interval=2, generator=seed, **steps
            )
        ),
    }  # fmt: skip
    return {f"{name}: {task}": digest(list(call(torch.Generator().manual_seed(1)))) for task, call in calls.items()}


def trained(folder: Path) -> dict[str, str]:
    """Of the weights that each script gives after 20 steps, and of the latents that it encodes."""

    def run(script: str, output: str, **settings: Any) -> None:
        words = {k: json.dumps(v) if isinstance(v, (dict, list)) else v for k, v in settings.items()}
        launch(script, {"output_dir": folder / output} | words)

    run("train/train_vae.py", "vae", model=VAE, num_frames=5, image_steps=2, num_score_clips=8,
        num_calibration_clips=8, frame_rates=[8.0, 4.0], difference_weight=0.1, **SIZE, **SHARED)  # fmt: skip
    run("train/train_text_encoder.py", "text", dim=32, num_layers=1, num_score_captions=8, **SHARED)
    run("train/train_convlstm.py", "convlstm", num_frames=7, num_score_clips=8, **SIZE, **SHARED,
        model={"channels": [8]})  # fmt: skip
    run("pipelines/encode_latents.py", "latents", vae=folder / "vae/vae", num_frames=21, batch_size=4, shard_size=8,
        num_clips=20, keyframes="true", frame_rates=[8.0, 2.0], flow="dis", **SIZE)  # fmt: skip
    common = SHARED | {
        "vae": folder / "vae/vae", "text_encoder": folder / "text", "latents_dir": folder / "latents",
        "window_lengths": [3, 4], "num_score_prompts": 2, "warping_weight": 0.1,
        "defaults": {"num_frames": 5, "num_inference_steps": 1} | SIZE,
    }  # fmt: skip
    run("train/train_vdm.py", "transformer", model=TRANSFORMER, **common, **MIXTURE)
    run("train/train_vdm.py", "unet", denoiser="unet", model=UNET, optimizer="muon", **common, **MIXTURE)
    run("train/train_vdm.py", "v", model=TRANSFORMER, prediction="v_prediction", snr_gamma=5,
        train_text_encoder="true", **common, **MIXTURE)  # fmt: skip
    result = {}
    for name in ("vae", "text", "convlstm", "transformer", "unet", "v"):
        weights = load_file(folder / name / "checkpoint-20/model.safetensors")
        result[f"train {name}"] = digest([weights[key] for key in sorted(weights)])
    shards = [load_file(path) for path in sorted((folder / "latents").glob("*.safetensors"))]
    result["latents"] = digest([shard[key] for shard in shards for key in sorted(shard)])
    return result


def main() -> None:
    """Prints the hashes, writes them, or names those that differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--compare", type=Path, help="JSON file of an earlier run; the exit code is 1 if any differs")
    parser.add_argument("--skip-training", action="store_true", help="only the outputs of the checkpoints")
    options = parser.parse_args()
    hashes = outputs("vgen/shapes-64") | outputs("vgen/shapes-64-unet")
    if not options.skip_training:
        with tempfile.TemporaryDirectory() as folder:
            hashes |= trained(Path(folder))
    print(json.dumps(hashes, indent=1))
    if options.output:
        options.output.write_text(json.dumps(hashes, indent=1))
    if options.compare:
        before = json.loads(options.compare.read_text())
        differing = [name for name in hashes if hashes[name] != before.get(name)]
        print(
            f"{len(hashes) - len(differing)} of {len(hashes)} as before; differing: {', '.join(differing) or 'none'}"
        )
        raise SystemExit(bool(differing))


if __name__ == "__main__":
    main()
