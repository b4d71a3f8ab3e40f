"""The frames between those of a folder of videos; the same command goes on where it stopped.

accelerate launch pipelines/interpolate.py --videos clips --factor 4 --output_dir runs/slow
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jsonargparse import auto_cli

from vgen.files import interpolate_file
from vgen.jobs import Job, JobConfig, load_pipeline, run_jobs, run_settings, video_jobs


@dataclass(kw_only=True)
class InterpolateConfig(JobConfig):
    """What to interpolate."""

    videos: Path
    """Folder of videos: files, or folders of frames."""
    factor: int = 2
    """Given frames become every `factor`-th."""
    prompt: str | None = None
    """What happens in all of them; may be left out."""


def main(config: InterpolateConfig) -> int:
    """Makes the missing videos; returns how many failed."""
    jobs = video_jobs(config.videos, config)
    pipe = load_pipeline(config)

    def make(job: Job, path: Path) -> dict[str, Any]:
        return interpolate_file(
            pipe,
            Path(job.inputs["video"]),
            path,
            config.factor,
            config.prompt,
            seed=job.inputs["seed"],
            fps=config.fps,
            overwrite=True,
            num_inference_steps=config.num_inference_steps,
            guidance_scale=config.guidance_scale,
        )

    return run_jobs(jobs, config.output_dir, run_settings(config, pipe, "videos"), make)


if __name__ == "__main__":
    sys.exit(min(1, main(auto_cli(InterpolateConfig))))
