"""Long videos of a file of prompts; the same command goes on where it stopped, in the middle of a video too.

accelerate launch pipelines/rollout.py --prompts prompts.txt --num_frames 1000 --output_dir runs/long
"""

import glob
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jsonargparse import auto_cli

from vgen.files import rollout_in_segments
from vgen.jobs import Job, JobConfig, load_pipeline, prompt_jobs, run_jobs, run_settings


@dataclass(kw_only=True)
class RolloutConfig(JobConfig):
    """What to roll out."""

    prompts: Path
    """A text file with one prompt a line, or a `.jsonl` file of objects with `prompt` (it may be a schedule such as
    `{"0": "...", "64": "..."}`), `name` and `seed`."""
    num_frames: int = 256
    """Frames of each video."""
    segment_frames: int = 256
    """Frames after which a video is safe from being stopped."""
    stride: int = 1
    """Coarse to fine: only every so many'th frame is rolled out, the others are interpolated."""
    chunk_size: int | None = None
    """Token frames at once; the checkpoint's own by default."""
    window: int | None = None
    """Recent token frames that are remembered; the checkpoint's own by default."""
    sink: int | None = None
    """Token frames from the start that are never forgotten; the checkpoint's own by default."""
    history_noise: float | None = None
    """Noise level that generated frames are told to have; the checkpoint's own by default."""
    history_guidance_scale: float | None = None
    """Weight of what is remembered, off at 1; the checkpoint's own by default."""


def main(config: RolloutConfig) -> int:
    """Makes the missing videos; returns how many failed."""
    if config.suffix != ".mp4":
        raise ValueError(f"suffix={config.suffix!r}: long videos are made in segments, which join in .mp4 files only")
    jobs = prompt_jobs(config.prompts, config, schedules=True)
    pipe = load_pipeline(config)

    def make(job: Job, path: Path) -> dict[str, Any]:
        prompt = job.inputs["prompt"]
        schedule = prompt if isinstance(prompt, str) else {int(frame): text for frame, text in prompt.items()}
        work = config.output_dir / f".{path.stem}.{job.digest}"
        for other in config.output_dir.glob(f".{glob.escape(path.stem)}.????????????"):
            if other != work:  # of another prompt
                shutil.rmtree(other)
        return rollout_in_segments(
            pipe,
            schedule,
            path,
            work,
            seed=job.inputs["seed"],
            segment_frames=config.segment_frames,
            fps=config.fps,
            num_frames=config.num_frames,
            num_inference_steps=config.num_inference_steps,
            guidance_scale=config.guidance_scale,
            stride=config.stride,
            chunk_size=config.chunk_size,
            window=config.window,
            sink=config.sink,
            history_noise=config.history_noise,
            history_guidance_scale=config.history_guidance_scale,
        )

    return run_jobs(jobs, config.output_dir, run_settings(config, pipe, "prompts"), make)


if __name__ == "__main__":
    sys.exit(min(1, main(auto_cli(RolloutConfig))))
