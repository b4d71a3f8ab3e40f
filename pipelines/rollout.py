"""Long videos of a file of prompts; the same command goes on where it stopped, in the middle of a video too.

accelerate launch pipelines/rollout.py --prompts prompts.txt --num_frames 1000 --output_dir runs/long
"""

import glob
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vgen.io.settings import parse_settings
from vgen.sampling.options import RolloutOptions
from vgen.tasks.jobs import Job, JobConfig, load_pipeline, prompt_jobs, run_jobs, run_settings
from vgen.tasks.video_files import rollout_in_segments


@dataclass(kw_only=True)
class RolloutConfig(RolloutOptions, JobConfig):
    """What to roll out."""

    prompts: Path
    """A text file with one prompt a line, or a `.jsonl` file of objects with `prompt` (it may be a schedule such as
    `{"0": "...", "64": "..."}`), `name` and `seed`."""
    num_frames: int = 256
    """Frames of each video."""
    segment_frames: int = 256
    """Frames after which a video is safe from being stopped."""


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
            **RolloutOptions.of(config).given(),
        )

    return run_jobs(jobs, config.output_dir, run_settings(config, pipe, "prompts"), make)


if __name__ == "__main__":
    sys.exit(min(1, main(parse_settings(RolloutConfig, __doc__))))
