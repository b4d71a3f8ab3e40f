"""Generates a video for each prompt of a file. The same command resumes an interrupted run.

accelerate launch pipelines/text_to_video.py --prompts prompts.txt --output_dir runs/videos
"""

from vgen.io.spinning import stop_spinning

stop_spinning()  # before torch is imported

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from vgen.io.errors import one_line_errors
from vgen.io.settings import parse_settings
from vgen.tasks.engine import Worker
from vgen.tasks.jobs import Job, JobConfig, job_worker, load_pipeline, prompt_jobs, run_jobs, run_settings
from vgen.tasks.loading import metadata_of
from vgen.tasks.video_files import generate_file
from vgen.temporal.attention import GroupMode


@dataclass(kw_only=True)
class TextToVideoConfig(JobConfig):
    """Settings of text to video."""

    prompts: str | Path
    """Path or URL of a text file with one prompt per line, or a `.jsonl` file of objects with `prompt`, `name` and
    `seed`."""
    negative_prompt: str | None = None
    """Prompt to steer away from."""
    num_frames: int | None = None
    """Number of frames; the checkpoint's default if not set."""
    height: int | None = None
    """Height in pixels; the checkpoint's default if not set."""
    width: int | None = None
    """Width in pixels; the checkpoint's default if not set."""
    groups: GroupMode | None = None
    """Attention mask over frames: all frames, causal, or causal between chunks. By default all; checkpoints that were
    not trained for that make a rollout."""


def main(config: TextToVideoConfig) -> int:
    """Generates the videos that are not done yet; returns the number of failures."""
    jobs = prompt_jobs(config.prompts, config)
    return run_jobs(jobs, config, config.output_dir, partial(load, config))


def load(config: TextToVideoConfig) -> Worker:
    """Loads the checkpoint, once per process or Ray actor."""
    pipe = load_pipeline(config)

    def make(job: Job, path: Path) -> dict[str, Any]:
        return generate_file(
            pipe,
            job.inputs["prompt"],
            path,
            seed=job.inputs["seed"],
            written=config,
            metadata=metadata_of(config.model, config),
            overwrite=True,
            negative_prompt=config.negative_prompt,
            num_frames=config.num_frames,
            height=config.height,
            width=config.width,
            groups=config.groups,
            num_inference_steps=config.num_inference_steps,
            guidance_scale=config.guidance_scale,
        )

    return job_worker(make, config.output_dir, run_settings(config, pipe, "prompts"))


if __name__ == "__main__":
    with one_line_errors(Path(__file__).name):
        sys.exit(min(1, main(parse_settings(TextToVideoConfig, __doc__))))
