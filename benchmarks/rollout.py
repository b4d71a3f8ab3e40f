"""Quality of long rollouts (object identity, drift, seams), with and without countermeasures; time and memory.

    python benchmarks/rollout.py --model vgen/shapes-64

Each video has 272 frames of one object, generated from a prompt with the checkpoint's defaults. In half of them the
object bounces. An object is correct if its color and shape are. This is judged in the first 17 frames (with the
motion), in the last 8, in the last 8 of the videos that were correct at the start, and in all 34 windows of 8 frames.
A slope is that of a line fitted to a video's mean (brightness) or standard deviation (contrast) over time, in units of
the value range per 100 frames. The seam ratio is the mean difference between neighboring frames at chunk borders over
that at other borders between latents. With chunks of one latent there are no others, and it is over the difference
inside latents. The first two rows are real and reconstructed clips, with the default chunk length.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pairs import forget_peak, peak_mebibytes, seconds
from shapes import reconstructions
from tqdm import tqdm

from vgen.data.captions import caption
from vgen.data.shapes import ShapesWorld, render
from vgen.io.pixels import from_frames, to_frames
from vgen.metrics.prompt import ObjectVerdict, check
from vgen.metrics.suites import WORLD_SEED
from vgen.metrics.temporal import border_differences, drift_slopes
from vgen.pipeline import VideoGenPipeline
from vgen.sampling.options import RolloutOptions
from vgen.temporal.attention import make_groups
from vgen.temporal.state import TemporalState

NUM_FRAMES = 272
WINDOW = 8
MEASURES = {
    "defaults": {},
    "chunks of 2": {"chunk_size": 2},
    "sink off": {"sink": 0},
    "window 2": {"window": 2},
    "history noise 0.1": {"history_noise": 0.1},
    "history noise 0.2": {"history_noise": 0.2},
    "history guidance 1.5": {"history_guidance_scale": 1.5},
    "coarse to fine, 4": {"keyframe_interval": 4},
}
COLUMNS = (
    "prompts",
    "correct at start",
    "motion at start",
    "correct windows",
    "correct at end",
    "retained",
    "brightness",
    "|brightness|",
    "contrast",
    "|contrast|",
    "seam ratio",
)


def main() -> None:
    """Measures one checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vgen/shapes-64")
    parser.add_argument("--num-prompts", type=int, default=100)
    parser.add_argument("--num-prompts-measures", type=int, default=24)
    parser.add_argument("--measures", nargs="*", default=list(MEASURES), choices=list(MEASURES), metavar="NAME")
    parser.add_argument("--batch-size", type=int, default=25)
    parser.add_argument("--output", type=Path, help="write the numbers here as JSON")
    parser.add_argument(
        "--keep", action="store_true", help="keep results in the output file that this call does not measure"
    )
    parser.add_argument("--mmap-threshold", type=int, default=65536, help="of glibc's malloc; 0 leaves it alone")
    parser.add_argument("--quality-only", action="store_true", help="measure neither time nor memory")
    parser.add_argument("--memory-of", type=int, help="only print the peak memory of this number of chunks")
    args = parser.parse_args()
    pipe = VideoGenPipeline.from_pretrained(args.model)
    pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    pipe.set_progress_bar_config(disable=True)
    if args.memory_of:
        print(memory(pipe, args.memory_of))
        return

    scenes = choose_scenes(args.num_prompts)
    defaults, s = (
        RolloutOptions().resolve(pipe.config, pipe.denoiser.config, prompted=True).to_json(),
        pipe.vae_scale_factor_temporal,
    )
    results: dict[str, Any] = {}
    if args.keep and args.output and args.output.exists():
        results = json.loads(args.output.read_text())
    print(f"{'':<24}" + "".join(f"{name:>16}" for name in COLUMNS))
    if "defaults" in args.measures:
        truth = render(scenes, num_frames=NUM_FRAMES)
        results["true clips"] = judge(list(to_frames(truth)), scenes, s, defaults["chunk_size"])
        show("true clips", results)
        # one frame more, as the VAE takes a multiple of its compression and one
        clips = reconstructions(pipe, scenes, num_frames=NUM_FRAMES + 1, batch_size=1)
        decoded = [to_frames(clip[None])[0, :NUM_FRAMES] for clip in clips]
        results["VAE only (upper bound)"] = judge(decoded, scenes, s, defaults["chunk_size"])
        show("VAE only (upper bound)", results)
    for name in args.measures:
        some = scenes if name == "defaults" else scenes[: args.num_prompts_measures]
        videos = rolled_out(pipe, some, args.batch_size, **MEASURES[name])
        chunk_size = (defaults | MEASURES[name])["chunk_size"]
        results[name] = judge(videos, some, s, chunk_size)
        show(name, results)
        if name == "defaults":
            few = slice(args.num_prompts_measures)
            results["defaults, these prompts"] = judge(videos[few], scenes[few], s, chunk_size)
            show("defaults, these prompts", results)
        if args.output:
            args.output.write_text(json.dumps(results, indent=1))
    if args.quality_only:
        return
    results |= timings(pipe)
    # as glibc raises the threshold by itself, the heap of long runs is full of holes: see docs/experiments.md
    environment = os.environ | ({"MALLOC_MMAP_THRESHOLD_": str(args.mmap_threshold)} if args.mmap_threshold else {})
    command = [sys.executable, __file__, "--model", args.model, "--memory-of"]
    results["memory, MiB"] = {
        count: float(subprocess.check_output([*command, str(count)], env=environment)) for count in (50, 1000)
    }
    for name in ("seconds a chunk", "speed-up of the cache", "memory, MiB"):
        print(f"{name}: {results[name]}")
    if args.output:
        args.output.write_text(json.dumps(results, indent=1))


def choose_scenes(count: int) -> list:
    """Scenes of which every second has only objects that bounce."""
    world = ShapesWorld(split="all", num_objects=(1,), seed=WORLD_SEED)
    every = (world.scene(index) for index in range(100 * count))
    bouncing, others = [], []
    for scene in every:
        (bouncing if scene.objects[0].motion == "bounce" else others).append(scene)
    return [scene for pair in zip(bouncing[: count // 2], others[: count // 2], strict=True) for scene in pair]


def rolled_out(pipe: VideoGenPipeline, scenes: list, batch_size: int, **options: Any) -> list[np.ndarray]:
    """Videos `(f, h, w, 3)` of the scenes' captions, each from its own seed."""
    videos: list[np.ndarray] = []
    for begin in tqdm(range(0, len(scenes), batch_size), leave=False):
        batch = scenes[begin : begin + batch_size]
        prompts = [caption(scene, random.Random(begin + index)) for index, scene in enumerate(batch)]
        generators = [torch.Generator().manual_seed(begin + index) for index in range(len(batch))]
        rollout = pipe.rollout(prompts, num_frames=NUM_FRAMES, generator=generators, **options)
        videos.extend(np.concatenate(list(rollout), axis=1))
    return videos


def judge(videos: list[np.ndarray], scenes: list, s: int, chunk_size: int) -> dict[str, float]:
    """The columns of the table for one set of videos."""
    starts, motions, windows, slopes, seams = [], [], [], [], []
    for video, scene in zip(videos, scenes, strict=True):
        begun = check(video[:17], scene).objects
        starts.append(is_correct(begun))
        motions.append(all(one.motion_correct for one in begun))
        windows.append([is_correct(check(part, scene).objects) for part in np.split(video, len(video) // WINDOW)])
        clip = from_frames(video[None])
        drift = drift_slopes(clip)
        slopes.append([drift[name].item() for name in ("brightness", "contrast")])
        seams.append([one.item() for one in border_differences(clip, chunk_size, s)])
    began, correct, table = np.array(starts), np.array(windows), np.array(slopes)
    ended = correct[:, -1]
    at_chunks, elsewhere = np.mean(seams, axis=0)  # ratio of means, because a still video has no ratio
    measured = (
        len(scenes),
        began.mean(),
        np.mean(motions),
        correct.mean(),
        ended.mean(),
        ended[began].mean(),
        table[:, 0].mean(),
        np.abs(table[:, 0]).mean(),
        table[:, 1].mean(),
        np.abs(table[:, 1]).mean(),
        at_chunks / elsewhere,
    )
    return {name: float(value) for name, value in zip(COLUMNS, measured, strict=True)}


def is_correct(objects: Iterable[ObjectVerdict]) -> bool:
    """Whether all colors and shapes are correct."""
    return all(one.color_correct and one.shape_correct for one in objects)


def timings(pipe: VideoGenPipeline) -> dict[str, Any]:
    """Seconds per chunk once the window is full and 200 chunks later, and the speed-up of the KV cache."""
    defaults = RolloutOptions().resolve(pipe.config, pipe.denoiser.config, prompted=True).to_json()
    window, sink, chunk_size = defaults["window"], defaults["sink"], defaults["chunk_size"]
    filled = 2 + (window + sink) // chunk_size
    rollout = pipe.rollout("a red circle bounces", generator=torch.Generator().manual_seed(0), num_inference_steps=2)
    spent = []
    for _ in range(filled + 50 + 200):
        begin = time.perf_counter()
        next(rollout)
        spent.append(time.perf_counter() - begin)
    early, late = (statistics.median(part) for part in (spent[filled : filled + 50], spent[-50:]))

    n = sink + window + chunk_size
    embeds = torch.cat(list(pipe.encode_prompt("a red circle bounces")))
    channels, height, width = pipe.denoiser.config.in_channels, pipe.config.height, pipe.config.width
    latents = torch.randn(2, channels, n, height // 8, width // 8).to(pipe.device)
    levels = torch.zeros(2, n, device=pipe.device)
    groups = make_groups("chunk", n, n - chunk_size, chunk_size)
    state = TemporalState()
    with torch.no_grad():
        history = n - chunk_size
        pipe.denoiser(latents[:, :, :history], levels[:, :history], embeds, groups=groups[:history], state=state)
        view, part = state.frozen(), slice(history, n)
        cached, whole = [], []
        for _ in range(50):
            call = lambda: pipe.denoiser(latents[:, :, part], levels[:, part], embeds, state=view)  # noqa: E731
            cached.append(seconds(call))
            whole.append(seconds(lambda: pipe.denoiser(latents, levels, embeds, groups=groups)))
    return {
        "seconds a chunk": {"window just filled": early, "200 chunks later": late, "ratio": late / early},
        "speed-up of the cache": statistics.median(whole) / statistics.median(cached),
    }


def memory(pipe: VideoGenPipeline, num_chunks: int) -> float:
    """Peak memory of a rollout in MiB, without that of the loaded pipeline."""
    forget_peak()
    before = peak_mebibytes()
    rollout = pipe.rollout("a red circle bounces", generator=torch.Generator().manual_seed(0), num_inference_steps=2)
    for _ in range(num_chunks):
        next(rollout)
    return peak_mebibytes() - before


def show(name: str, results: dict[str, Any]) -> None:
    """Prints one line of the table."""
    print(f"{name:<24}" + "".join(f"{value:>16.4f}" for value in results[name].values()), flush=True)


if __name__ == "__main__":
    main()
