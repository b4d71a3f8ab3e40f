"""The examples, run as they stand at tiny size."""

import os
import runpy
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.warm import warm_python
from vgen import VideoGenPipeline
from vgen.data.video_io import read_video, video_info, write_video

EXAMPLES = Path(__file__).parents[1] / "examples"
# what they are given and write; one that is not named here takes nothing
ARGUMENTS = {
    "gallery": ["gallery.gif"],
    "interactive": ["--num_chunks=10", "--num_inference_steps=1"],
    "own_loop": ["--num_chunks=3", "--num_inference_steps=1"],
    "streamed_decoding": ["clip.mp4", "out.mp4"],
    "strip": ["strip.png"],
    "train_your_own": ["own", "--videos", "clip.mp4", "--dry-run"],
}
WRITTEN = {
    "gallery": "gallery.gif",
    "interactive": "live.mp4",
    "own_loop": "loop.mp4",
    "streamed_decoding": "out.mp4",
    "strip": "strip.png",
    "train_your_own": "own/videos/metadata.jsonl",
}
SAID = {
    "interactive": ["a fork at frame "],
    "train_your_own": ["$ vgen train ", "train/train_vdm.py --"],
}


def names():
    for name in sorted(path.stem for path in EXAMPLES.glob("*.py")):
        yield pytest.param(name, marks=pytest.mark.slow) if name == "gallery" else name


@pytest.mark.parametrize("name", names())
def test_an_example_runs(tmp_path, name):
    frames = np.random.default_rng(0).integers(0, 256, (100, 48, 64, 3), dtype=np.uint8)
    write_video(frames, tmp_path / "clip.mp4", frame_rate=8.0)
    command = [warm_python(), str(EXAMPLES / f"{name}.py"), *ARGUMENTS.get(name, [])]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert all(words in done.stdout for words in SAID.get(name, [])), done.stdout
    if name in WRITTEN:
        assert (tmp_path / WRITTEN[name]).is_file()


@pytest.mark.slow
def test_the_notebook_runs_and_shows_animations(tmp_path):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    notebook = nbformat.read(EXAMPLES / "first_steps.ipynb", as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert notebook.nbformat_minor == 5 and not any(cell.outputs or cell.execution_count for cell in cells)
    nbclient.NotebookClient(notebook, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = {cell.id: cell.outputs for cell in cells}
    for name in ("generate", "predict", "interpolate", "rollout"):
        [shown] = outputs[name]
        assert '<img src="data:image/webp;base64,' in shown["data"]["text/html"]
    assert video_info(tmp_path / "rollout.mp4").num_frames == 48


def test_a_custom_loop_equals_the_rollout(tmp_path):
    runpy.run_path(str(EXAMPLES / "own_loop.py"))["main"]("a red circle bounces", 6, 2, str(tmp_path / "loop"))
    frames, _ = read_video(tmp_path / "loop")  # a folder of frames, without loss
    pipe = VideoGenPipeline.from_pretrained("vgen/shapes-64")
    settings = {"num_frames": 21, "chunk_size": 1, "num_inference_steps": 2}
    rollout = pipe.rollout("a red circle bounces", generator=torch.Generator().manual_seed(0), **settings)
    expected = np.concatenate(list(rollout))
    assert frames.shape == expected.shape and abs(frames.astype(int) - expected).max() <= 1
