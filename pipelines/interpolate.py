"""Interpolates each video of a folder. The same command resumes an interrupted run.

accelerate launch pipelines/interpolate.py --videos clips --factor 4 --output_dir runs/slow
"""

from vgen.io.spinning import stop_spinning

stop_spinning()  # before torch is imported

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from vgen.io.errors import one_line_errors
from vgen.io.remote import local_input
from vgen.io.settings import parse_settings
from vgen.sampling.options import InterpolationOptions
from vgen.tasks.engine import Worker
from vgen.tasks.jobs import Job, JobConfig, job_worker, load_pipeline, run_jobs, run_settings, video_jobs
from vgen.tasks.loading import metadata_of
from vgen.tasks.video_files import interpolate_file


@dataclass(kw_only=True)
class InterpolateConfig(InterpolationOptions, JobConfig):
    """Settings of interpolation."""

    videos: str | Path
    """Folder of video files or folders of frames, or its URL."""
    prompt: str | None = None
    """Prompt for all videos; unconditional if not set."""


def main(config: InterpolateConfig) -> int:
    """Generates the videos that are not done yet; returns the number of failures."""
    jobs = video_jobs(config.videos, config)
    return run_jobs(jobs, config, config.output_dir, partial(load, config))


def load(config: InterpolateConfig) -> Worker:
    """Loads the checkpoint, once per process or Ray actor."""
    pipe = load_pipeline(config)

    def make(job: Job, path: Path) -> dict[str, Any]:
        with local_input(job.inputs["video"]) as video:
            return interpolate_file(
                pipe,
                video,
                path,
                prompt=config.prompt,
                seed=job.inputs["seed"],
                written=config,
                metadata=metadata_of(config.model, config),
                overwrite=True,
                **InterpolationOptions.of(config).given(),
            )

    return job_worker(make, config.output_dir, run_settings(config, pipe, "videos"))


if __name__ == "__main__":
    with one_line_errors(Path(__file__).name):
        sys.exit(min(1, main(parse_settings(InterpolateConfig, __doc__))))
