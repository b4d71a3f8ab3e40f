"""`vgen train` from end to end, at tiny size."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from typer.testing import CliRunner

from tests.warm import warm_python
from vgen.cli import app
from vgen.data.video_io import video_info, write_video
from vgen.io.records import read_json
from vgen.tasks.planning import LOGGED
from vgen.tasks.project import EXAMPLES, corrected
from vgen.tasks.train_commands import Command
from vgen.training.logs import Logs

ROOT = Path(__file__).parents[2]
TINY = [
    "vae.model={base_dim: 8, dim_mult: [1, 1], z_dim: 4, temperal_downsample: [true], patch_size: 2, in_channels: 12, "
    "out_channels: 12, num_res_blocks: 1}",
    "denoiser.denoiser=transformer",
    "denoiser.model={num_attention_heads: 2, attention_head_dim: 12, freq_dim: 16, ffn_dim: 32, num_layers: 1, "
    "patch_size: [1, 2, 2], group_modes: [full, causal, chunk], frame_rate_embedding: true, chunk_size: 1, window: 1, "
    "sink: 1}",
    "clip.height=32", "clip.width=32", "clip.num_frames=5", "vae.num_frames=5", "vae.max_steps=20",
    "denoiser.max_steps=20", "denoiser.num_inference_steps=2", "text.max_steps=2", "vae.compile=false",
    "denoiser.compile=false", "vae.batch_size=2", "denoiser.batch_size=2", "vae.num_calibration_clips=8",
    "vae.num_score_clips=4", "latents.repeats=1", "latents.hop=4", "evaluation.num_clips=2",
    "evaluation.num_samples=2", "evaluation.given=3", "evaluation.factor=2",
]  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    """Six videos of moving squares, half of them with a caption."""
    folder = tmp_path / "squares"
    folder.mkdir()
    for number in range(6):
        frames = np.zeros((24, 40, 48, 3), np.uint8)
        for index, frame in enumerate(frames):
            frame[10:20, 2 + index + number : 12 + index + number] = (200, 40 * number, 90)
        write_video(frames, folder / f"{number}.mp4", 10.0)
        if number % 2:
            (folder / f"{number}.txt").write_text("a square moves")
    return folder


def words(folder, *more):
    changes = [word for change in TINY for word in ("--set", change)]
    return ["train", str(folder), "-o", str(folder.parent / "run"), "--minutes", "30", *changes, *more]


def test_a_dry_run_prints_the_commands_and_writes_nothing(folder, monkeypatch):
    monkeypatch.setattr("vgen.training.needs._SECONDS", 0.0)
    done = CliRunner().invoke(app, words(folder, "--dry-run"))
    assert done.exit_code == 0, done.output
    for script in ("prepare_videos", "train_vae", "encode_latents", "train_text_encoder", "train_vdm", "evaluate"):
        assert f"{script}.py" in done.stdout
    assert "3 of 6 videos have one" in done.stdout
    assert not (folder.parent / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "pass either a folder of videos"),
        (["nowhere"], "nowhere"),
        (["empty"], "contains no videos"),
        (["short"], "too little video"),
        (["empty", "--data", "empty"], "pass either a folder of videos"),
        (["short", "--set", "vae"], "--set"),
    ],
)
def test_what_cannot_work_is_one_line(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "short").mkdir()
    write_video(np.zeros((10, 32, 32, 3), np.uint8), tmp_path / "short" / "a.mp4", 10.0)
    done = CliRunner().invoke(app, ["train", *arguments])
    assert done.exit_code == 2 and message in done.stderr and len(done.stderr.splitlines()) <= 2, done.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_a_folder_becomes_a_model_and_an_interrupted_run_goes_on(folder):
    command = [warm_python(), "-m", "vgen.cli", *words(folder)]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true"}
    run, log = folder.parent / "run", folder.parent / "log.txt"
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=environment)
        while process.poll() is None and not (run / "vae" / "config.yaml").exists():
            time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        process.wait()
    assert "the same command goes on" in log.read_text(), log.read_text()[-3000:]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "stage 1 of" not in done.stdout  # the copies were there
    record = read_json(run / "plan.json")["stages"]
    assert list(record) == ["data", "vae", "latents", "text", "denoiser", "evaluation", "report"]
    assert all(entry["done"] for entry in record.values())
    html = (run / "report.html").read_text()
    for text in (
        "VAE reconstructs held-out clips",
        "Prediction: ",
        "Interpolation: ",
        "With one denoising step",
        "evaluation/held_out_one_step/report.html",
        "data:image/webp",
        "vgen predict",
    ):
        assert text in html
    results = read_json(run / "evaluation" / "held_out" / "results.json")
    assert json.dumps(results["suite"]["data"]) == json.dumps(str(run / "data" / "held_out"))
    again = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert again.returncode == 0 and "== stage" not in again.stdout
    last = done.stdout.splitlines()[-3:]
    assert last[0].startswith("vgen generate") and last[1].startswith("vgen predict")
    whole, half = (video_info(run / name) for name in EXAMPLES.values())
    assert str(run / EXAMPLES[1]) in last[1] and whole.frame_rate == 2 * half.frame_rate
    assert whole.num_frames == 2 * half.num_frames - 1


def test_a_missing_folder_is_named_at_once(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "vgen.tasks.project", None)  # its import takes seconds
    for words in ([tmp_path / "none"], [tmp_path, "--held-out", tmp_path / "none"]):
        done = CliRunner().invoke(app, ["train", *map(str, words), "-o", str(tmp_path.parent / "run")])
        assert done.exit_code == 2 and "there is no folder" in done.stderr and "measuring" not in done.stdout
    done = CliRunner().invoke(app, ["train", str(tmp_path), "--from", "vgen/none", "-o", str(tmp_path.parent / "run")])
    assert done.exit_code == 2 and "vgen/shapes-64" in done.stderr and "measuring" not in done.stdout


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_command_alone_stops_its_script(tmp_path, number):
    (tmp_path / "waits.py").write_text("import time\nopen('began', 'w').close()\ntime.sleep(600)\n")
    program = f"""
import sys
from pathlib import Path
from unittest import mock
from vgen.tasks.train_commands import Command
with mock.patch("vgen.tasks.train_commands.scripts_folder", lambda: Path({str(tmp_path)!r})):
    sys.exit(7 if Command("waits.py", {{}}, 1).run() is False else 1)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", program], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    while process.poll() is None and not (tmp_path / "began").exists():
        time.sleep(0.1)
    process.send_signal(number)
    assert process.wait(timeout=60) == 7


def test_a_script_that_is_killed_is_named_with_the_signal(tmp_path, monkeypatch):
    (tmp_path / "killed.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n")
    monkeypatch.setattr("vgen.tasks.train_commands.scripts_folder", lambda: tmp_path)
    with pytest.raises(ValueError, match=r"killed.py was stopped by SIGKILL \(the system may have run out of memory"):
        Command("killed.py", {}, 1).run()


def test_the_time_per_step_follows_that_of_the_vae(tmp_path, monkeypatch):
    commands = {name: [Command("", {"batch_size": 8, "compile": True})] for name in ("vae", "denoiser")}
    plan = SimpleNamespace(folder=tmp_path, per_step={"vae": 4.0, "denoiser": 6.0}, commands=commands)
    assert corrected(plan, "vae") == plan.per_step  # nothing was logged
    logs = Logs(tmp_path / "vae" / "logs", 1)
    for step, seconds in ((10, 50), (20, 60), (30, 70), (40, 100), (50, 110)):  # the fourth has an evaluation
        monkeypatch.setattr(time, "time", lambda now=seconds: now)
        logs.write({LOGGED: 8.0}, step)
    monkeypatch.undo()
    del logs
    assert corrected(plan, "vae") == {"vae": 1.0, "denoiser": 1.5}
    assert corrected(plan, "latents") == plan.per_step
    commands["denoiser"][0].settings["compile"] = False  # which says nothing about its speed
    assert corrected(plan, "vae") == {"vae": 1.0, "denoiser": 6.0}
