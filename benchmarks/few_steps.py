"""Quality of few-step students and their teacher, by number of denoising steps.

    python benchmarks/few_steps.py --models teacher=vgen/shapes-64 student=runs/shapes-64-distilled/pipeline

Each model is measured with its default settings, and then with each of `--steps`; guidance stays as it is.

- adherence: videos in which every object's color, shape and motion are those of the prompt, for combinations in
  training (seen), not in training (new), and one object with causal groups (causal).
- prediction, interpolation: median PSNR in dB over clips, with captions, as in known_frames.py.
- start, end: rollouts whose object has the right color and shape in the first 17 and the last 8 of 272 frames.
- motion energy: mean absolute difference of neighboring frames, relative to the true clips of the same prompts.
- diversity: mean distance (RMS over pixels) between videos of one prompt with different seeds, relative to that
  between true clips with the same caption.

Every number has its standard error; that of medians is bootstrapped.
"""

import argparse
import itertools
import json
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from known_frames import NUM_FRAMES, TASKS, by_model, measure
from rollout import WINDOW, choose_scenes, is_correct, rolled_out
from scipy.stats import bootstrap
from shapes import generated

from vgen.data.captions import caption
from vgen.data.shapes import ShapesWorld, make_scene, render
from vgen.io.pixels import to_frames
from vgen.metrics.prompt import check
from vgen.metrics.suites import WORLD_SEED
from vgen.pipeline import VideoGenPipeline

Score = dict[str, float]
"""A value and its standard error (`error`)."""
ADHERENCE = {
    "seen": ("train", (1, 2), "full"),
    "new": ("held_out", (1, 2), "full"),
    "causal": ("train", (1,), "causal"),
}
KNOWN = {"prediction": "prediction, 5 known", "interpolation": "interpolation, every 8th known"}
NUM_SEEDS = 8
"""Videos of each prompt of which the diversity is measured."""


def main() -> None:
    """Measures the chosen models, and keeps what the output file has of others."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", required=True, metavar="NAME=MODEL")
    parser.add_argument("--steps", nargs="*", type=int, default=[1, 2, 4, 8])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART")
    parser.add_argument("--num-prompts", type=int, default=200, help="for adherence and known frames")
    parser.add_argument("--num-rollouts", type=int, default=100)
    parser.add_argument("--num-diverse", type=int, default=24, help="prompts of which the diversity is measured")
    parser.add_argument("--batch-size", type=int, default=20)
    parser.add_argument("--output", type=Path, help="write the numbers here as JSON")
    args = parser.parse_args()
    results: dict[str, Any] = {}
    if args.output and args.output.exists():
        results = json.loads(args.output.read_text())
    for name, model in (text.split("=", 1) for text in args.models):
        pipe = VideoGenPipeline.from_pretrained(model)
        pipe.to("cuda" if torch.cuda.is_available() else "cpu")
        pipe.set_progress_bar_config(disable=True)
        for steps in dict.fromkeys([pipe.config.num_inference_steps, *args.steps]):
            row = results.setdefault(f"{name}, {steps} steps", {})
            for part in args.parts:
                row |= PARTS[part](pipe, steps, args)
                if args.output:
                    args.output.write_text(json.dumps(results, indent=1))
            print(f"{name}, {steps} steps: " + ", ".join(map(shown, row.items())), flush=True)


def shown(item: tuple[str, Score]) -> str:
    """A score in words."""
    name, score = item
    return f"{name} {score['value']:.3f} ± {score['error']:.3f}"


def share(correct: list[bool]) -> Score:
    """The share of what is true."""
    mean = float(np.mean(correct))
    return {"value": mean, "error": (mean * (1 - mean) / len(correct)) ** 0.5}


def ratio(values: Any, true: Any) -> Score:
    """The sum of some values relative to that of the true ones, which belong to the same prompts."""
    values, true = np.asarray(values), np.asarray(true)
    found = float(values.sum() / true.sum())
    spread = np.std(values - found * true, ddof=1) / len(values) ** 0.5
    return {"value": found, "error": float(spread / true.mean())}


def median(values: list[float]) -> Score:
    """The median."""
    spread = bootstrap((values,), np.median, n_resamples=1000, rng=0).standard_error
    return {"value": float(np.median(values)), "error": float(spread)}


def measure_adherence(pipe: VideoGenPipeline, steps: int, args: argparse.Namespace) -> dict[str, Score]:
    """How many videos show what was asked for, and how much moves in them."""
    options: Any = SimpleNamespace(batch_size=args.batch_size, guidance=None, steps=steps, seed=0)
    scores = {}
    for name, (split, count, groups) in ADHERENCE.items():
        world = ShapesWorld(split=split, num_objects=count, seed=WORLD_SEED)
        scenes = [world.scene(index) for index in range(args.num_prompts)]
        videos = generated(pipe, [world.caption(index) for index in range(args.num_prompts)], groups, options)
        scores[f"adherence, {name}"] = share(
            [check(video, scene).correct for video, scene in zip(videos, scenes, strict=True)]
        )
        if name == "seen":
            true = motion_energy(render(scenes, num_frames=pipe.config.num_frames))
            scores["motion energy"] = ratio(motion_energy(torch.stack(videos)), true)
    return scores


def motion_energy(clips: torch.Tensor) -> np.ndarray:
    """Mean absolute difference of neighboring frames of clips `(b, c, f, h, w)`."""
    return clips.diff(dim=2).abs().flatten(1).mean(1).numpy()


def measure_known_frames(pipe: VideoGenPipeline, steps: int, args: argparse.Namespace) -> dict[str, Score]:
    """Prediction and interpolation."""
    options: Any = SimpleNamespace(prompted=True, guidance=None, steps=steps)
    world = ShapesWorld(split="all", seed=WORLD_SEED)
    clips = to_frames(render([world.scene(index) for index in range(args.num_prompts)], num_frames=NUM_FRAMES))
    scores = {}
    for name, task in KNOWN.items():
        known = TASKS[task]
        others = [index for index in range(NUM_FRAMES) if index not in known]
        values: list[float] = []
        for begin in range(0, len(clips), 10):
            part = slice(begin, min(begin + 10, len(clips)))
            made = by_model(pipe, world, clips, part, known, options)
            values += [measure(*pair)[0] for pair in zip(made[:, others], clips[part, others], strict=True)]
        scores[name] = median(values)
    return scores


def measure_rollout(pipe: VideoGenPipeline, steps: int, args: argparse.Namespace) -> dict[str, Score]:
    """Whether long videos keep their object."""
    scenes = choose_scenes(args.num_rollouts)
    videos = rolled_out(pipe, scenes, 25, num_inference_steps=steps)
    pairs = list(zip(videos, scenes, strict=True))
    return {
        "start": share([is_correct(check(video[:17], scene).objects) for video, scene in pairs]),
        "end": share([is_correct(check(video[-WINDOW:], scene).objects) for video, scene in pairs]),
    }


def measure_diversity(pipe: VideoGenPipeline, steps: int, args: argparse.Namespace) -> dict[str, Score]:
    """How much videos of one prompt differ."""
    options: Any = SimpleNamespace(batch_size=NUM_SEEDS, guidance=None, steps=steps, seed=1)
    world = ShapesWorld(split="train", seed=WORLD_SEED)
    found, true = [], []
    for index in range(args.num_diverse):
        scene, rng = world.scene(index), random.Random(index)
        others = [make_scene(scene.objects, scene.background, rng) for _ in range(NUM_SEEDS)]
        true.append(distance(render(others, num_frames=pipe.config.num_frames)))
        found.append(distance(torch.stack(generated(pipe, [caption(scene, rng)] * NUM_SEEDS, "full", options))))
    return {"diversity": ratio(found, true)}


def distance(clips: torch.Tensor) -> float:
    """Mean distance between two of the clips `(b, c, f, h, w)`."""
    return float(np.mean([(a - b).square().mean().sqrt().item() for a, b in itertools.combinations(clips, 2)]))


PARTS: dict[str, Callable[[VideoGenPipeline, int, argparse.Namespace], dict[str, Score]]] = {
    "adherence": measure_adherence,
    "known": measure_known_frames,
    "diversity": measure_diversity,
    "rollout": measure_rollout,
}


if __name__ == "__main__":
    main()
