"""Videos are prepared by a script, and what it writes is what the next scripts take."""

import json

import numpy as np

from vgen.data.latents import LatentSet
from vgen.data.video_io import write_video

from .scripts import encode, launch, train_vae


def test_prepared_videos_are_trained_on_and_encoded(vae_run, tmp_path):
    (tmp_path / "videos").mkdir()
    for index in range(2):
        frames = np.random.default_rng(index).integers(0, 256, (30, 24, 32, 3), dtype=np.uint8)
        write_video(frames, tmp_path / f"videos/{index}.mp4", frame_rate=8.0)
    (tmp_path / "videos/0.txt").write_text("a red circle")
    settings = {
        "--data": tmp_path / "videos", "--output_dir": tmp_path / "data", "--height": 16, "--width": 16,
        "--num_frames": 5,
    }  # fmt: skip
    done = launch("pipelines/prepare_videos.py", **settings)
    assert done.stdout.startswith("train: 2 videos, 8 clips; held_out: 2 videos, 2 clips (fewer than 5 videos, so")
    assert done.stdout.splitlines()[1] == "captions: 1 of 2 videos"
    assert f"--data {tmp_path}/data/train --score_data {tmp_path}/data/held_out" in done.stdout.splitlines()[-1]
    assert launch("pipelines/prepare_videos.py", **settings).stdout == done.stdout
    rejected = launch("pipelines/prepare_videos.py", check=False, **settings | {"--margin": 2.0})
    assert rejected.returncode == 2 and "different settings (margin): choose another folder" in rejected.stderr
    sources = {"--data": tmp_path / "data/train", "--score_data": tmp_path / "data/held_out"}
    train_vae(tmp_path / "vae", **sources, **{"--init": vae_run / "vae"})
    encode(tmp_path / "vae", tmp_path / "latents", **{"--data": tmp_path / "data/train", "--num_clips": None})
    summary = json.loads((tmp_path / "data/summary.json").read_text())
    assert len(LatentSet(tmp_path / "latents")) == summary["train"]["clips"] == 8
