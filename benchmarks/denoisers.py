"""Comparison of two shipped denoisers: parameters, FLOPs per evaluation, seconds per evaluation and per video.

    python benchmarks/denoisers.py

A video has the checkpoint's default settings (17 frames of 64x64, 20 guided steps, decoded); an evaluation is one step
without guidance. Medians of interleaved pairs, in float32. FLOPs are those of matrix products,
convolutions and attention.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pairs import time_ratio

from vgen.pipeline import VideoGenPipeline
from vgen.training.throughput import count_flops

PROMPT = "a red circle moves right"


def main() -> None:
    """Measures both checkpoints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs=2, default=["vgen/shapes-64", "vgen/shapes-64-unet"])
    parser.add_argument("--num-pairs", type=int, default=20)
    parser.add_argument("--output", type=Path, help="write the numbers here as JSON")
    args = parser.parse_args()
    pipes = [load(name) for name in args.models]
    steps = [evaluation(pipe) for pipe in pipes]
    videos = [lambda pipe=pipe: pipe(PROMPT, generator=torch.Generator().manual_seed(0)) for pipe in pipes]
    each_step, each_video = (time_ratio(*calls, args.num_pairs)[:2] for calls in (steps, videos))
    results = {}
    for name, pipe, step, step_seconds, video_seconds in zip(
        args.models, pipes, steps, each_step, each_video, strict=True
    ):
        results[name] = {
            "parameters": sum(weight.numel() for weight in pipe.denoiser.parameters()),
            "flops": count_flops(step),
            "step seconds": step_seconds,
            "video seconds": video_seconds,
        }
        print(f"{name}: {results[name]}", flush=True)
    if args.output:
        args.output.write_text(json.dumps(results, indent=1))


def load(name: str) -> VideoGenPipeline:
    """A pipeline on the fastest device."""
    pipe = VideoGenPipeline.from_pretrained(name)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to("cuda" if torch.cuda.is_available() else "cpu")


def evaluation(pipe: VideoGenPipeline) -> Callable[[], Any]:
    """Evaluates the denoiser once, as in a step of a default video."""
    calls: list[tuple[tuple, dict]] = []
    handle = pipe.denoiser.register_forward_pre_hook(
        lambda _, words, named: calls.append((words, named)), with_kwargs=True
    )
    pipe(PROMPT, num_inference_steps=1, guidance_scale=1.0, output_type="latent")
    handle.remove()
    [(words, named)] = calls
    return torch.no_grad()(lambda: pipe.denoiser(*words, **named))


if __name__ == "__main__":
    main()
