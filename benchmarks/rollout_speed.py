"""Frames per second of unguided rollouts on a CPU, by number of steps, threads, precision, compilation and decoder.

    python benchmarks/rollout_speed.py --output docs/results/rollout_speed.json

Each variant runs in a new process. Times include decoding, and are medians over chunks once the window is full. The
time to the first frame is that of the first chunk of the first rollout after the pipeline was loaded. `--chunks 1000`
also measures whether time and memory grow in a long rollout with the first variant and the first number of steps.
"""

import argparse
import itertools
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from pairs import forget_peak, in_new_process, machine, peak_mebibytes

from vgen.models.tiny_vae import load_tiny_vae
from vgen.pipeline import VideoGenPipeline

PROMPT = "a red circle bounces"
FILLED, TIMED = 8, 60
"""Chunks until the window is full, and chunks that are timed."""
VARIANTS: dict[str, dict[str, Any]] = {
    "1 thread": {},
    "overlap": {"overlap": True},
    "2 threads": {"threads": 2},
    "bfloat16": {"dtype": torch.bfloat16},
    "compiled": {"compiled": True},
    "tiny decoder": {"tiny": True},
    "overlap, tiny decoder": {"overlap": True, "tiny": True},
    "compiled, tiny decoder": {"compiled": True, "tiny": True},
}


def main() -> None:
    """Measures all variants, then prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vgen/shapes-64")
    parser.add_argument("--steps", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS, metavar="VARIANT")
    parser.add_argument("--chunks", type=int, default=0, help="length of the long rollout; 0 leaves it out")
    parser.add_argument("--output", type=Path, help="write the numbers here as JSON")
    args = parser.parse_args()
    results: dict[str, Any] = {"machine": machine()}
    for name, steps in itertools.product(args.variants, args.steps):
        row = results.setdefault(name, {})[str(steps)] = in_new_process(speed, args.model, steps, name)
        print(
            f"{name:<24}{steps} steps {row['frames/s']:>8.1f} frames/s, first after {row['first']:.2f} s", flush=True
        )
    if args.chunks:
        results["long"] = in_new_process(lasting, args.model, args.steps[0], args.variants[0], args.chunks)
        print(results["long"])
    if args.output:
        args.output.write_text(json.dumps(results, indent=1) + "\n")


def begin(model: str, steps: int, variant: str) -> Any:
    """A rollout of a variant."""
    chosen = VARIANTS[variant]
    torch.set_num_threads(chosen.get("threads", 1))
    pipe = VideoGenPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    if "dtype" in chosen:
        pipe.to(chosen["dtype"])
    if chosen.get("compiled"):
        pipe.denoiser.compile_repeated_blocks(dynamic=False)
    options: dict[str, Any] = {"overlap": chosen.get("overlap", False)}
    if chosen.get("tiny"):
        options["decoder"] = load_tiny_vae(model)
    generator = torch.Generator().manual_seed(0)
    return pipe.rollout(PROMPT, generator=generator, num_inference_steps=steps, guidance_scale=1.0, **options)


def speed(model: str, steps: int, variant: str) -> dict[str, float]:
    """Frames per second, and seconds until the first frame."""
    rollout = begin(model, steps, variant)
    start = time.perf_counter()
    next(rollout)
    first = time.perf_counter() - start
    for _ in range(FILLED):
        next(rollout)
    spent = []
    for _ in range(TIMED):
        start = time.perf_counter()
        frames = next(rollout)
        spent.append((time.perf_counter() - start) / len(frames))
    return {"frames/s": 1 / statistics.median(spent), "first": first}


def lasting(model: str, steps: int, variant: str, chunks: int) -> dict[str, float]:
    """Time and peak memory late in a rollout, relative to those early in one.

    The late chunks take turns with the early ones of another rollout, so that both see the same load of the machine.
    """
    rollout, peaks = begin(model, steps, variant), {}
    forget_peak()
    for number in range(chunks - TIMED):
        next(rollout)
        if number + 1 in (50, chunks - TIMED):
            peaks[number + 1] = peak_mebibytes()
    other = begin(model, steps, variant)
    for _ in range(FILLED):
        next(other)
    late, early = [], []
    for _ in range(TIMED):
        for one, spent in ((rollout, late), (other, early)):
            start = time.perf_counter()
            next(one)
            one.settle()
            spent.append(time.perf_counter() - start)
    ratio = statistics.median(late) / statistics.median(early)
    return {"chunks": chunks, "time": ratio, "memory": peaks[chunks - TIMED] / peaks[50]}


if __name__ == "__main__":
    main()
