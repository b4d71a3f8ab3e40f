"""Continuations of a folder of videos; the same command goes on where it stopped.

accelerate launch pipelines/predict.py --videos clips --num_frames 16 --output_dir runs/futures
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vgen.io.settings import parse_settings
from vgen.sampling.options import RolloutOptions
from vgen.tasks.jobs import Job, JobConfig, load_pipeline, run_jobs, run_settings, video_jobs
from vgen.tasks.video_files import predict_file


@dataclass(kw_only=True)
class PredictConfig(RolloutOptions, JobConfig):
    """What to continue."""

    videos: Path
    """Folder of videos: files, or folders of frames."""
    num_frames: int = 16
    """New frames."""
    prompt: str | None = None
    """What happens in all of them; may be left out."""
    with_input: bool = False
    """Whether the given frames are written too."""


def main(config: PredictConfig) -> int:
    """Makes the missing videos; returns how many failed."""
    jobs = video_jobs(config.videos, config)
    pipe = load_pipeline(config)

    def make(job: Job, path: Path) -> dict[str, Any]:
        return predict_file(
            pipe,
            Path(job.inputs["video"]),
            path,
            config.prompt,
            seed=job.inputs["seed"],
            with_input=config.with_input,
            fps=config.fps,
            overwrite=True,
            num_frames=config.num_frames,
            **RolloutOptions.of(config).given(),
        )

    return run_jobs(jobs, config.output_dir, run_settings(config, pipe, "videos"), make)


if __name__ == "__main__":
    sys.exit(min(1, main(parse_settings(PredictConfig, __doc__))))
