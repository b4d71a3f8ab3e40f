"""Generates a long video for each prompt of a file. The same command resumes, even in the middle of a video.

accelerate launch pipelines/rollout.py --prompts prompts.txt --num_frames 1000 --output_dir runs/long
"""

from vgen.io.spinning import stop_spinning

stop_spinning()  # before torch is imported

import glob
import shutil
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from vgen.io.errors import one_line_errors
from vgen.io.settings import parse_settings
from vgen.sampling.options import RolloutOptions
from vgen.tasks.engine import Worker
from vgen.tasks.jobs import Job, JobConfig, job_worker, load_pipeline, prompt_jobs, run_jobs, run_settings
from vgen.tasks.loading import metadata_of
from vgen.tasks.video_files import rollout_in_segments


@dataclass(kw_only=True)
class RolloutConfig(RolloutOptions, JobConfig):
    """Settings of rollouts."""

    prompts: str | Path
    """Path or URL of a text file with one prompt per line, or a `.jsonl` file of objects with `prompt`, `name` and
    `seed`. A prompt may be a schedule such as `{"0": "...", "64": "..."}`."""
    num_frames: int = 256
    """Number of frames per video."""
    segment_frames: int = 256
    """Minimum number of frames between saved states, from which an interrupted video resumes."""


def main(config: RolloutConfig) -> int:
    """Generates the videos that are not done yet; returns the number of failures."""
    if config.suffix != ".mp4":
        raise ValueError(
            f"suffix must be '.mp4', because other formats cannot be joined from segments, got {config.suffix!r}"
        )
    jobs = prompt_jobs(config.prompts, config, schedules=True)
    return run_jobs(jobs, config, config.output_dir, partial(load, config))


def load(config: RolloutConfig) -> Worker:
    """Loads the checkpoint, once per process or Ray actor."""
    pipe = load_pipeline(config)

    def make(job: Job, path: Path) -> dict[str, Any]:
        prompt = job.inputs["prompt"]
        schedule = prompt if isinstance(prompt, str) else {int(frame): text for frame, text in prompt.items()}
        work = path.with_name(f".{path.stem}.{job.digest}")
        for end in ("", ".partial"):  # segments of another prompt, also those whose removal was interrupted
            for other in path.parent.glob(f".{glob.escape(path.stem)}.????????????{end}"):
                if other != work:
                    shutil.rmtree(other)
        return rollout_in_segments(
            pipe,
            schedule,
            path,
            work,
            seed=job.inputs["seed"],
            segment_frames=config.segment_frames,
            written=config,
            metadata=metadata_of(config.model, config),
            num_frames=config.num_frames,
            **RolloutOptions.of(config).given(),
        )

    return job_worker(make, config.output_dir, run_settings(config, pipe, "prompts"))


if __name__ == "__main__":
    with one_line_errors(Path(__file__).name):
        sys.exit(min(1, main(parse_settings(RolloutConfig, __doc__))))
