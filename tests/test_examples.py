"""The examples, run at tiny size."""

import subprocess
import sys

import numpy as np
import pytest

from vgen.data.video_io import write_video

from .train.scripts import ROOT


@pytest.mark.slow
def test_the_example_goes_from_one_video_to_a_model_that_continues_it(tmp_path):
    frames = np.random.default_rng(0).integers(0, 256, (100, 48, 64, 3), dtype=np.uint8)
    write_video(frames, tmp_path / "video.mp4", frame_rate=8.0)
    few = ["--vae-steps=2", "--steps=2", "--caption=noise"]
    command = [sys.executable, "examples/train_your_own.py", tmp_path / "video.mp4", tmp_path / "own", *few]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "after: " in done.stdout and "the VAE alone: " in done.stdout and (tmp_path / "own/strip.png").is_file()
