"""Prediction and interpolation on clips never trained on, beside simple ways to do the same.

    pip install -c constraints.txt -e ".[benchmarks]"
    python benchmarks/known_frames.py --model vgen/shapes-64

PSNR and SSIM over the frames that were not given, for each clip, then mean and median over clips: of a clip in which
hardly anything moves, simple ways reach 50 dB and more, which moves the mean. The ceiling is the VAE's reconstruction
of the whole true clip. Flow interpolation is that of Super SloMo (arXiv 1712.00080, without its
networks) with OpenCV's DIS flow at its finest scale.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from vgen.data.shapes import ShapesWorld, render
from vgen.known_frames import to_frames
from vgen.metrics.reference import psnr, ssim
from vgen.metrics.suites import WORLD_SEED, copy_last, flow_interpolation, linear_blend
from vgen.pipeline import VideoGenPipeline

NUM_FRAMES = 17
TASKS = {
    "prediction, 5 known": list(range(5)),
    "interpolation, every 4th known": list(range(0, NUM_FRAMES, 4)),
    "interpolation, every 8th known": list(range(0, NUM_FRAMES, 8)),
    "interpolation, first and last known": [0, NUM_FRAMES - 1],
}


def main() -> None:
    """Measures one checkpoint and the simple ways."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vgen/shapes-64")
    parser.add_argument("--num-clips", type=int, default=200)
    parser.add_argument("--prompted", action="store_true", help="tell the captions; prompts are left out otherwise")
    parser.add_argument("--guidance", type=float, help="with prompts; the checkpoint's default if not given")
    parser.add_argument("--steps", type=int, help="the checkpoint's default if not given")
    parser.add_argument("--output", type=Path, help="write the numbers here as JSON")
    args = parser.parse_args()

    pipe = VideoGenPipeline.from_pretrained(args.model)
    pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    pipe.set_progress_bar_config(disable=True)
    world = ShapesWorld(split="all", seed=WORLD_SEED)
    clips = [to_frames(render([world.scene(index)], num_frames=NUM_FRAMES))[0] for index in range(args.num_clips)]
    captions = [world.caption(index) if args.prompted else None for index in range(args.num_clips)]
    results = {}
    print(f"{'task':<38}{'by':<26}{'PSNR':>8}{'median':>8}{'SSIM':>8}{'median':>8}")
    for task, known in TASKS.items():
        ways: dict[str, Callable] = {
            "the model": lambda clip, known, index: by_model(pipe, clip, known, captions[index], index, args)
        }
        if task.startswith("prediction"):
            ways["copy of the last frame"] = lambda clip, known, index: simply(copy_last, clip, len(known))
        else:
            ways["linear blend"] = lambda clip, known, index: simply(linear_blend, clip, known)
            ways["optical flow (DIS)"] = lambda clip, known, index: simply(flow_interpolation, clip, known)
        ways["ceiling: VAE alone"] = lambda clip, known, index: reconstruct(pipe, clip)
        others = [index for index in range(NUM_FRAMES) if index not in known]
        for name, make in ways.items():
            scores = []
            for index, clip in enumerate(tqdm(clips, desc=f"{task}, {name}", leave=False)):
                scores.append(measure(make(clip, known, index)[others], clip[others]))
            (psnr, ssim), (middle_psnr, middle_ssim) = np.mean(scores, axis=0), np.median(scores, axis=0)
            results[f"{task}, {name}"] = {
                "psnr": psnr,
                "ssim": ssim,
                "median psnr": middle_psnr,
                "median ssim": middle_ssim,
            }
            print(f"{task:<38}{name:<26}{psnr:>8.2f}{middle_psnr:>8.2f}{ssim:>8.3f}{middle_ssim:>8.3f}", flush=True)
    if args.output:
        args.output.write_text(json.dumps(results, indent=1))


def measure(made: np.ndarray, true: np.ndarray) -> tuple[float, float]:
    """PSNR in dB and SSIM of frames `(f, h, w, 3)`, uint8."""
    a, b = (torch.from_numpy(frames).movedim(-1, 0)[None] / 127.5 - 1 for frames in (made, true))
    return psnr(a, b).item(), ssim(a, b).item()


def by_model(
    pipe: VideoGenPipeline, clip: np.ndarray, known: list[int], prompt: str | None, seed: int, args: argparse.Namespace
) -> np.ndarray:
    """The whole clip from its known frames."""
    generator = torch.Generator().manual_seed(seed)
    options = {
        "num_inference_steps": args.steps,
        "guidance_scale": args.guidance if args.prompted else None,
        "generator": generator,
        "output_type": "np",
    }
    if known == list(range(len(known))):
        new = pipe.predict(clip[known], NUM_FRAMES - len(known), prompt, **options).frames[0]
        return np.concatenate([clip[known], (new * 255).round().astype(np.uint8)])
    factor = known[1]
    rate = pipe.config.frame_rate / factor
    video = pipe.interpolate(clip[known], factor, prompt, frame_rate=rate, **options).frames[0]
    return (video * 255).round().astype(np.uint8)


def simply(way: Callable, clip: np.ndarray, known: Any) -> np.ndarray:
    """The whole clip by a simple way."""
    return to_frames(way(torch.from_numpy(clip).movedim(-1, 0)[None] / 127.5 - 1, known))[0]


@torch.no_grad()
def reconstruct(pipe: VideoGenPipeline, clip: np.ndarray) -> np.ndarray:
    """The clip, encoded and decoded."""
    pixels = torch.from_numpy(clip).movedim(-1, 0)[None].to(pipe.device) / 127.5 - 1
    return to_frames(pipe.vae.decode(pipe.vae.encode(pixels).latent_dist.mode()).sample)[0]


if __name__ == "__main__":
    main()
