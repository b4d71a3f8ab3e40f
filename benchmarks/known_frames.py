"""Prediction and interpolation on held-out clips, compared with simple baselines.

    pip install -c constraints.txt -e ".[benchmarks]"
    python benchmarks/known_frames.py --model vgen/shapes-64

PSNR and SSIM over the frames that were not given, for each clip, then mean and median over clips. On clips with
hardly any motion, baselines reach 50 dB and more, which dominates the mean. The upper bound is the VAE's
reconstruction of the whole true clip. Flow interpolation is that of Super SloMo (arXiv 1712.00080), without its
networks, with OpenCV's DIS flow at its finest scale.
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
from vgen.hub import find_packaged
from vgen.io.pixels import from_frames, to_frames
from vgen.metrics.reference import psnr, ssim
from vgen.metrics.suites import WORLD_SEED, copy_last, flow_interpolation, linear_blend
from vgen.models.convlstm import ConvLSTMPredictor
from vgen.pipeline import VideoGenPipeline
from vgen.tasks.evaluation import CONVLSTM

NUM_FRAMES = 17
TASKS = {
    "prediction, 5 known": list(range(5)),
    "interpolation, every 4th known": list(range(0, NUM_FRAMES, 4)),
    "interpolation, every 8th known": list(range(0, NUM_FRAMES, 8)),
    "interpolation, first and last known": [0, NUM_FRAMES - 1],
}


def main() -> None:
    """Measures one checkpoint and the simple baselines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vgen/shapes-64")
    parser.add_argument("--num-clips", type=int, default=200)
    parser.add_argument("--prompted", action="store_true", help="use the captions as prompts; unconditional otherwise")
    parser.add_argument("--guidance", type=float, help="guidance scale with prompts; default: the checkpoint's")
    parser.add_argument("--steps", type=int, help="inference steps; default: the checkpoint's")
    parser.add_argument("--batch-size", type=int, default=10)
    parser.add_argument("--output", type=Path, help="write the numbers here as JSON")
    args = parser.parse_args()

    pipe = VideoGenPipeline.from_pretrained(args.model)
    pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    pipe.set_progress_bar_config(disable=True)
    convlstm = ConvLSTMPredictor.from_pretrained(find_packaged(CONVLSTM)).eval().to(pipe.device)
    world = ShapesWorld(split="all", seed=WORLD_SEED)
    clips = to_frames(render([world.scene(index) for index in range(args.num_clips)], num_frames=NUM_FRAMES))
    results = {}
    print(f"{'task':<38}{'by':<26}{'PSNR':>8}{'median':>8}{'SSIM':>8}{'median':>8}")
    for task, known in TASKS.items():
        methods: dict[str, Callable] = {
            "the model": lambda part, known: by_model(pipe, world, clips, part, known, args)
        }
        if task.startswith("prediction"):
            methods["copy of the last frame"] = lambda part, known: simply(copy_last, clips[part], len(known))
            methods["ConvLSTM"] = lambda part, known: by_convlstm(convlstm, clips[part], len(known))
        else:
            methods["linear blend"] = lambda part, known: simply(linear_blend, clips[part], known)
            methods["optical flow (DIS)"] = lambda part, known: simply(flow_interpolation, clips[part], known)
        methods["VAE only (upper bound)"] = lambda part, known: reconstruct(pipe, clips[part])
        others = [index for index in range(NUM_FRAMES) if index not in known]
        for name, make in methods.items():
            scores = []
            for begin in tqdm(range(0, len(clips), args.batch_size), desc=f"{task}, {name}", leave=False):
                part = slice(begin, min(begin + args.batch_size, len(clips)))
                generated = make(part, known)
                scores += [measure(*pair) for pair in zip(generated[:, others], clips[part, others], strict=True)]
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


def measure(generated: np.ndarray, true: np.ndarray) -> tuple[float, float]:
    """PSNR in dB and SSIM of frames `(f, h, w, 3)`, uint8."""
    a, b = (from_frames(frames[None]) for frames in (generated, true))
    return psnr(a, b).item(), ssim(a, b).item()


def by_model(
    pipe: VideoGenPipeline,
    world: ShapesWorld,
    clips: np.ndarray,
    part: slice,
    known: list[int],
    args: argparse.Namespace,
) -> np.ndarray:
    """Completes clips from their known frames."""
    indices = range(part.start, part.stop)
    generators = [torch.Generator().manual_seed(index) for index in indices]
    given = clips[part][:, known]
    if args.prompted:
        captions = [world.caption(index) for index in indices]
        return _make(pipe, list(given), known, args, prompt=captions, generator=generators)
    pairs = zip(given, generators, strict=True)  # only a single video can do without a prompt
    return np.concatenate([_make(pipe, one, known, args, generator=generator) for one, generator in pairs])


def _make(
    pipe: VideoGenPipeline, given: Any, known: list[int], args: argparse.Namespace, **options: Any
) -> np.ndarray:
    """Completes clips from the frames of one clip, or from a list with the frames of several clips."""
    options |= {"num_inference_steps": args.steps, "output_type": "np"}
    if args.prompted:
        options["guidance_scale"] = args.guidance
    if known == list(range(len(known))):
        new = (pipe.predict(given, NUM_FRAMES - len(known), **options).frames * 255).round().astype(np.uint8)
        return np.concatenate([np.reshape(given, (len(new), len(known), *new.shape[2:])), new], axis=1)
    factor = known[1]
    videos = pipe.interpolate(given, factor, frame_rate=pipe.config.frame_rate / factor, **options).frames
    return (videos * 255).round().astype(np.uint8)


def simply(way: Callable, clips: np.ndarray, known: Any) -> np.ndarray:
    """Completes clips with a simple baseline."""
    return to_frames(way(from_frames(clips), known))


@torch.no_grad()
def by_convlstm(network: ConvLSTMPredictor, clips: np.ndarray, given: int) -> np.ndarray:
    """Predicts clips from their first frames."""
    known = from_frames(clips[:, :given]).to(network.device)
    return to_frames(torch.cat([known, network.predict(known, NUM_FRAMES - given).clamp(-1, 1)], dim=2))


@torch.no_grad()
def reconstruct(pipe: VideoGenPipeline, clips: np.ndarray) -> np.ndarray:
    """Encodes and decodes the clips."""
    return to_frames(pipe.vae.decode(pipe.vae.encode(from_frames(clips).to(pipe.device)).latent_dist.mode()).sample)


if __name__ == "__main__":
    main()
