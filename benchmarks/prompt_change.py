"""How rollouts obey a change of the prompt, and whether the object stays where it is.

    python benchmarks/prompt_change.py --model vgen/shapes-64

Each video shows one object. When the KV cache is full, after 25 frames, the prompt changes to one with another color,
shape and motion on the same background. The 34 frames after the change are judged: color and shape in the last 8,
motion in the last 30, on pixels. Objects that grow or shrink are left out, because they stop after two seconds. The
video before the change is the same for all methods; a method's options apply to everything after it. The first two
rows are clips of the new prompt's scene, rendered, and encoded and decoded.

The jump is the distance in pixels, around the frame's borders, between the object's centers in the last frame before
the change and in the fourth frame after it. The object continues if it is below 8 pixels (an eighth of the frame).
"""

import argparse
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from shapes import reconstructions
from tqdm import tqdm

from vgen.data.captions import BACKGROUNDS, caption
from vgen.data.shapes import Scene, ShapeDescription, combinations, make_scene, render
from vgen.io.pixels import to_frames
from vgen.metrics.prompt import check
from vgen.pipeline import VideoGenPipeline
from vgen.sampling.conditions import Guidance
from vgen.sampling.rollout import Rollout

BEFORE, AFTER = 25, 34
WINDOW, MOTION_WINDOW = 8, 30
CONTINUES = 8.0
MIN_OFFSET = 90
"""Sum over R, G and B of the distance from the background above which a pixel belongs to the object."""
METHODS: dict[str, dict[str, Any]] = {
    "recompute": {"prompt_change": "recompute"},
    "guidance 6": {"prompt_change": "recompute", "guidance_scale": 6.0},
    "window 1, no sink": {"prompt_change": "recompute", "window": 1, "sink": 0},
    "both": {"prompt_change": "recompute", "window": 1, "sink": 0, "guidance_scale": 6.0},
    "history guidance 0": {"prompt_change": "recompute", "history_guidance_scale": 0.0},
    "history guidance -1": {"prompt_change": "recompute", "history_guidance_scale": -1.0},
    "redraw 0.5": {"prompt_change": "redraw", "prompt_change_strength": 0.5},
    "redraw 0.6": {"prompt_change": "redraw", "prompt_change_strength": 0.6},
    "redraw 0.8": {"prompt_change": "redraw", "prompt_change_strength": 0.8},
    "defaults": {},
    "cut": {"prompt_change": "cut"},
}
MAIN_METHODS = ["recompute", "redraw 0.6", "defaults", "cut"]
COLUMNS = ("changes", "color", "shape", "object", "motion", "all", "jump", "continues")


def main() -> None:
    """Measures one checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vgen/shapes-64")
    parser.add_argument("--num-changes", type=int, default=100)
    parser.add_argument("--num-inference-steps", type=int, help="by default that of the checkpoint")
    parser.add_argument("--methods", nargs="*", default=MAIN_METHODS, choices=list(METHODS), metavar="NAME")
    parser.add_argument("--batch-size", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0, help="of the scenes; another one gives other pairs")
    parser.add_argument("--output", type=Path, help="write the numbers here as JSON")
    args = parser.parse_args()
    pipe = VideoGenPipeline.from_pretrained(args.model)
    pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    pipe.set_progress_bar_config(disable=True)

    pairs = [choose_pair(args.seed, index) for index in range(args.num_changes)]
    scenes = [after for _, after in pairs]
    results: dict[str, Any] = {}
    print(f"{'':<26}" + "".join(f"{name:>11}" for name in COLUMNS))
    results["true clips"] = judge(list(to_frames(render(scenes, num_frames=AFTER))), scenes)
    show("true clips", results)
    clips = reconstructions(pipe, scenes, num_frames=AFTER + 3, batch_size=1)  # a valid length of the VAE
    results["VAE only (upper bound)"] = judge([to_frames(clip[None])[0, :AFTER] for clip in clips], scenes)
    show("VAE only (upper bound)", results)
    batches = [
        begin_rollout(pipe, pairs[first : first + args.batch_size], first, args.num_inference_steps)
        for first in tqdm(range(0, len(pairs), args.batch_size), leave=False)
    ]
    last_frames = [frame for batch in batches for frame in batch.last_frames]
    for name in args.methods:
        videos = [video for batch in tqdm(batches, leave=False) for video in continued(batch, METHODS[name])]
        results[name] = judge(videos, scenes, last_frames)
        show(name, results)
        if args.output:
            args.output.write_text(json.dumps(results, indent=1))


def choose_pair(seed: int, index: int) -> tuple[Scene, Scene]:
    """Scenes before and after a change, with another color, shape and motion."""
    rng = random.Random(f"{seed} {index}")
    lasting = [one for one in combinations("all") if one[2] not in ("grow", "shrink")]
    before = rng.choice(lasting)
    after = rng.choice([one for one in lasting if all(a != b for a, b in zip(before, one, strict=True))])
    background = rng.choice(BACKGROUNDS)
    first, second = (
        make_scene([ShapeDescription(color=color, shape=shape, motion=motion)], background, rng)
        for color, shape, motion in (before, after)
    )
    return first, second


@dataclass(frozen=True)
class Batch:
    """Rollouts up to the change."""

    rollout: Rollout
    last_frames: np.ndarray
    """`(b, h, w, 3)`."""
    prompts: list[str]
    """The new prompts."""


def begin_rollout(pipe: VideoGenPipeline, pairs: list, first: int, num_inference_steps: int | None) -> Batch:
    """Generates the frames before the change, each video from its own seed."""
    sources = [random.Random(first + index) for index in range(len(pairs))]
    before, after = (
        [caption(pair[part], source) for pair, source in zip(pairs, sources, strict=True)] for part in (0, 1)
    )
    generators = [torch.Generator().manual_seed(first + index) for index in range(len(pairs))]
    rollout = pipe.rollout(before, generator=generators, num_inference_steps=num_inference_steps)
    assert isinstance(rollout, Rollout)
    while rollout.frames_done < BEFORE:
        frames = next(rollout)
    return Batch(rollout, frames[:, -1], after)


def continued(batch: Batch, method: dict[str, Any]) -> np.ndarray:
    """The frames after the change `(b, f, h, w, 3)`."""
    rollout = batch.rollout.fork()
    rollout.state.options = rollout.state.options.updated(**method)
    rollout.sampler.guidance = Guidance.of(rollout.state.options)
    chunks = [to_frames(rollout.step(prompt=batch.prompts))]
    while sum(chunk.shape[1] for chunk in chunks) < AFTER:
        chunks.append(next(rollout))
    return np.concatenate(chunks, axis=1)[:, :AFTER]


def judge(videos: list[np.ndarray], scenes: list[Scene], last_frames: list[np.ndarray] | None = None) -> dict:
    """The columns of the table for one set of videos."""
    rows = []
    for video, scene in zip(videos, scenes, strict=True):
        (end,), (motion,) = check(video[-WINDOW:], scene).objects, check(video[-MOTION_WINDOW:], scene).objects
        right = end.color_correct and end.shape_correct
        rows.append(
            (end.color_correct, end.shape_correct, right, motion.motion_correct, right and motion.motion_correct)
        )
    result = dict(zip(COLUMNS, (len(scenes), *np.mean(rows, axis=0).tolist()), strict=False))
    if last_frames is None:
        return result
    jumps = [
        distance(center(frame), center(video[3]), frame.shape[:2])
        for video, frame in zip(videos, last_frames, strict=True)
    ]
    return result | {"jump": float(np.nanmedian(jumps)), "continues": float(np.mean(np.array(jumps) < CONTINUES))}


def center(frame: np.ndarray) -> np.ndarray:
    """Center `(2,)` of the object in pixels, as a mean of angles, because objects cross the frame's borders."""
    offset = np.abs(frame.astype(float) - np.median(frame, axis=(0, 1))).sum(-1)
    where = np.stack(np.nonzero(offset > MIN_OFFSET))
    size = np.array(frame.shape[:2])
    if not where.size:
        return np.full(2, np.nan)
    angles = np.exp(2j * np.pi * where / size[:, None]).mean(axis=1)
    return np.angle(angles) * size / (2 * np.pi)


def distance(one: np.ndarray, other: np.ndarray, size: tuple[int, ...]) -> float:
    """Distance in pixels around the frame's borders."""
    offset = np.abs(one - other)
    return float(np.linalg.norm(np.minimum(offset, np.array(size) - offset)))


def show(name: str, results: dict[str, Any]) -> None:
    """Prints one line of the table."""
    print(f"{name:<26}" + "".join(f"{value:>11.2f}" for value in results[name].values()), flush=True)


if __name__ == "__main__":
    main()
