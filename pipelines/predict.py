"""Continues each video of a folder. The same command resumes an interrupted run.

accelerate launch pipelines/predict.py --videos clips --num_frames 16 --output_dir runs/futures
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
from vgen.sampling.options import RolloutOptions
from vgen.tasks.engine import Worker
from vgen.tasks.jobs import Job, JobConfig, job_worker, load_pipeline, run_jobs, run_settings, video_jobs
from vgen.tasks.loading import metadata_of
from vgen.tasks.video_files import predict_file


@dataclass(kw_only=True)
class PredictConfig(RolloutOptions, JobConfig):
    """Settings of prediction."""

    videos: str | Path
    """Folder of video files or folders of frames, or its URL."""
    num_frames: int = 16
    """Number of new frames."""
    prompt: str | None = None
    """Prompt for all videos; unconditional if not set."""
    with_input: bool = False
    """Whether to write the input frames before the new ones."""


def main(config: PredictConfig) -> int:
    """Generates the videos that are not done yet; returns the number of failures."""
    jobs = video_jobs(config.videos, config)
    return run_jobs(jobs, config, config.output_dir, partial(load, config))


def load(config: PredictConfig) -> Worker:
    """Loads the checkpoint, once per process or Ray actor."""
    pipe = load_pipeline(config)

    def make(job: Job, path: Path) -> dict[str, Any]:
        with local_input(job.inputs["video"]) as video:
            return predict_file(
                pipe,
                video,
                path,
                config.prompt,
                seed=job.inputs["seed"],
                with_input=config.with_input,
                written=config,
                metadata=metadata_of(config.model, config),
                overwrite=True,
                num_frames=config.num_frames,
                **RolloutOptions.of(config).given(),
            )

    return job_worker(make, config.output_dir, run_settings(config, pipe, "videos"))


if __name__ == "__main__":
    with one_line_errors(Path(__file__).name):
        sys.exit(min(1, main(parse_settings(PredictConfig, __doc__))))
