"""Prompt adherence of generated videos, and reconstruction quality of the VAE.

    python benchmarks/shapes.py --model vgen/shapes-64

Prompts are captions of ShapesWorld; a video is correct if every object's color, shape and motion are. The upper bound
is the same score for the VAE's reconstructions of the true clips. Prints one table.
"""

import argparse
import json
from pathlib import Path

import torch
from tqdm import tqdm

from vgen.data.shapes import ShapesWorld, render
from vgen.io.pixels import from_pt
from vgen.metrics.prompt import adherence
from vgen.metrics.reference import psnr
from vgen.metrics.suites import WORLD_SEED
from vgen.pipeline import VideoGenPipeline


def main() -> None:
    """Measures one checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vgen/shapes-64")
    parser.add_argument("--num-prompts", type=int, default=200)
    parser.add_argument("--num-clips", type=int, default=256)
    parser.add_argument("--groups", nargs="+", default=["full", "causal"])
    parser.add_argument("--batch-size", type=int, default=20)
    parser.add_argument("--guidance", type=float, help="default: the checkpoint's")
    parser.add_argument("--steps", type=int, help="default: the checkpoint's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="write the numbers here as JSON")
    args = parser.parse_args()

    pipe = VideoGenPipeline.from_pretrained(args.model)
    pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    pipe.set_progress_bar_config(disable=True)
    results = {"psnr": vae_psnr(pipe, args.num_clips)}
    print(f"VAE: {results['psnr']:.2f} dB over {args.num_clips} fresh clips")
    print(f"{'combinations':<14}{'objects':<10}{'from':<24}" + "".join(f"{name:>9}" for name in COLUMNS))
    for split in ("train", "held_out"):
        for count in ((1, 2), (1,)):
            world = ShapesWorld(split=split, num_objects=count, seed=WORLD_SEED)
            scenes = [world.scene(index) for index in range(args.num_prompts)]
            captions = [world.caption(index) for index in range(args.num_prompts)]
            rows = {"VAE reconstruction": adherence(reconstructions(pipe, scenes), scenes)}
            for groups in args.groups:
                rows[f"generated, {groups}"] = adherence(generated(pipe, captions, groups, args), scenes)
            for name, row in rows.items():
                results[f"{split}, {len(count)} object(s), {name}"] = row
                objects = "1" if count == (1,) else "1 or 2"
                cells = "".join(f"{100 * row[column]:>8.1f}%" for column in COLUMNS)
                print(f"{split:<14}{objects:<10}{name:<24}{cells}", flush=True)
    if args.output:
        args.output.write_text(json.dumps(results, indent=1))


COLUMNS = ("correct", "color", "shape", "motion")


@torch.no_grad()
def vae_psnr(pipe: VideoGenPipeline, num_clips: int) -> float:
    """Mean PSNR in dB of clamped float32 reconstructions of the posterior's mode."""
    world = ShapesWorld(split="all", seed=WORLD_SEED)
    values = []
    for begin in range(0, num_clips, 8):
        clip = render([world.scene(index) for index in range(begin, begin + 8)], device=pipe.device)
        decoded = pipe.vae.decode(pipe.vae.encode(clip).latent_dist.mode()).sample
        values.append(psnr(decoded, clip))
    return torch.cat(values).mean().item()


@torch.no_grad()
def reconstructions(
    pipe: VideoGenPipeline, scenes: list, num_frames: int = 17, batch_size: int = 8
) -> list[torch.Tensor]:
    """Clips `(c, f, h, w)` of the scenes, encoded and decoded."""
    clips: list[torch.Tensor] = []
    for begin in range(0, len(scenes), batch_size):
        clip = render(scenes[begin : begin + batch_size], num_frames=num_frames, device=pipe.device)
        clips.extend(pipe.vae.decode(pipe.vae.encode(clip).latent_dist.mode()).sample.cpu())
    return clips


def generated(
    pipe: VideoGenPipeline, captions: list[str], groups: str, args: argparse.Namespace
) -> list[torch.Tensor]:
    """Videos `(c, f, h, w)` of the captions, each from its own seed."""
    videos: list[torch.Tensor] = []
    for begin in tqdm(range(0, len(captions), args.batch_size), desc=groups, leave=False):
        batch = captions[begin : begin + args.batch_size]
        seeds = [args.seed * 1_000_003 + begin + index for index in range(len(batch))]
        frames = pipe(
            batch,
            groups=groups,
            guidance_scale=args.guidance,
            num_inference_steps=args.steps,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            output_type="pt",
        ).frames
        videos.extend(from_pt(frames.cpu()))
    return videos


if __name__ == "__main__":
    main()
