"""Continuations of a folder of videos; the same command goes on where it stopped.

accelerate launch pipelines/predict.py --videos clips --num_frames 16 --output_dir runs/futures
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jsonargparse import auto_cli

from vgen.files import predict_file
from vgen.jobs import Job, JobConfig, load_pipeline, run_jobs, run_settings, video_jobs


@dataclass(kw_only=True)
class PredictConfig(JobConfig):
    """What to continue."""

    videos: Path
    """Folder of videos: files, or folders of frames."""
    num_frames: int = 16
    """New frames."""
    prompt: str | None = None
    """What happens in all of them; may be left out."""
    with_input: bool = False
    """Whether the given frames are written too."""
    history_noise: float | None = None
    """Noise level that generated frames are told to have; the checkpoint's own by default."""


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
            num_inference_steps=config.num_inference_steps,
            guidance_scale=config.guidance_scale,
            history_noise=config.history_noise,
        )

    return run_jobs(jobs, config.output_dir, run_settings(config, pipe, "videos"), make)


if __name__ == "__main__":
    sys.exit(min(1, main(auto_cli(PredictConfig))))
