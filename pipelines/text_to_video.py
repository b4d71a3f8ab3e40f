"""Videos of a file of prompts; the same command goes on where it stopped.

accelerate launch pipelines/text_to_video.py --prompts prompts.txt --output_dir runs/videos
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vgen.io.settings import parse_settings
from vgen.tasks.jobs import Job, JobConfig, load_pipeline, prompt_jobs, run_jobs, run_settings
from vgen.tasks.video_files import generate_file


@dataclass(kw_only=True)
class TextToVideoConfig(JobConfig):
    """What to generate."""

    prompts: Path
    """A text file with one prompt a line, or a `.jsonl` file of objects with `prompt`, `name` and `seed`."""
    negative_prompt: str | None = None
    """What to steer away from."""
    num_frames: int | None = None
    """All frames."""
    height: int | None = None
    """Pixels."""
    width: int | None = None
    """Pixels."""
    groups: str = "full"
    """Which frames see which: full, causal or chunk."""


def main(config: TextToVideoConfig) -> int:
    """Makes the missing videos; returns how many failed."""
    jobs = prompt_jobs(config.prompts, config)
    pipe = load_pipeline(config)

    def make(job: Job, path: Path) -> dict[str, Any]:
        return generate_file(
            pipe,
            job.inputs["prompt"],
            path,
            seed=job.inputs["seed"],
            fps=config.fps,
            overwrite=True,
            negative_prompt=config.negative_prompt,
            num_frames=config.num_frames,
            height=config.height,
            width=config.width,
            groups=config.groups,
            num_inference_steps=config.num_inference_steps,
            guidance_scale=config.guidance_scale,
        )

    return run_jobs(jobs, config.output_dir, run_settings(config, pipe, "prompts"), make)


if __name__ == "__main__":
    sys.exit(min(1, main(parse_settings(TextToVideoConfig, __doc__))))
