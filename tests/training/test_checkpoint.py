"""Runs that are killed, stopped or damaged, and go on."""

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.warm import warm_python
from vgen.io.records import seal

SCRIPT = """
import os, signal
import torch
from torch import nn
from vgen.training.run import Run, RunConfig, generators, parse_config, start

config = parse_config(RunConfig, "")
torch.set_num_threads(int(os.environ.get("THREADS", 1)))
accelerator = start(config)
torch.manual_seed(0)
network = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Dropout(0.1), nn.Linear(8, 4))
run = Run(config, accelerator, network, lambda step: f"the clips of step {step}", os.environ.get("DATA"))
kill = os.environ.get("KILL", "")
if os.environ.get("NO_NORM"):  # as DeepSpeed does
    accelerator.clip_grad_norm_ = lambda *_: None
if kill.startswith("write"):
    def save_state(folder, save=accelerator.save_state):
        if not folder.endswith(f"checkpoint-{kill[5:]}.partial"):
            return save(folder)
        os.makedirs(folder, exist_ok=True)
        with open(f"{folder}/model.safetensors", "wb") as file:
            file.write(bytes(99))
        os.kill(os.getpid(), signal.SIGKILL)
    accelerator.save_state = save_state
if kill.startswith("save"):
    save = accelerator.save_state
    def save_state(folder):
        save(folder)
        if folder.endswith(f"checkpoint-{kill[4:]}.partial"):
            os.kill(os.getpid(), signal.SIGKILL)
    accelerator.save_state = save_state
for step in run.steps():
    total = torch.zeros(())
    for part in run.parts(config.batch_size):
        x = torch.stack([torch.randn(4, generator=one) for one in generators(config.seed, step, part)])
        if os.environ.get("SKIPPED"):  # as a scaler of gradients does where they overflow
            type(accelerator).optimizer_step_was_skipped = True
        if os.environ.get("BAD") == str(step):
            x = x * float("nan")
        loss = (run.network(x) - x).square().mean() * len(x) / config.batch_size
        run.backward(loss)
        total += loss.detach()
    run.update()
    run.log(loss=total)
    run.save()
    if kill == f"int{run.step}":
        os.kill(os.getpid(), signal.SIGINT)
    if kill == f"term{run.step}" and accelerator.is_main_process:
        os.kill(os.getpid(), signal.SIGTERM)
    if kill == f"step{run.step}":
        os.kill(os.getpid(), signal.SIGKILL)
run.end(lambda weights: torch.save(network.state_dict(), config.output_dir / "result.pt"))
"""


def train(folder, check=True, launcher=("-c", SCRIPT), cold=False, **environment):
    options = {"max_steps": 12, "save_every": 4, "log_every": 1, "batch_size": 4, "mixed_precision": "no"}
    words = [f"--{name}={value}" for name, value in (options | {"output_dir": folder}).items()]
    names = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"} | environment
    command = [sys.executable if cold else warm_python(), *launcher, *words]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | names, check=False)
    assert not check or done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    train(folder)
    return folder


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """A run that was killed after its checkpoint of step 4."""
    folder = tmp_path_factory.mktemp("killed")
    train(folder, check=False, KILL="step6")
    return folder


def names(folder):
    return sorted(path.name for path in folder.glob("checkpoint-*"))


def assert_same(folder, whole):
    for name in ("model.safetensors", "ema.safetensors"):
        actual, expected = (load_file(run / "checkpoint-12" / name) for run in (folder, whole))
        assert actual.keys() == expected.keys() and all(torch.equal(actual[key], expected[key]) for key in actual)
    actual, expected = (torch.load(run / "result.pt", weights_only=True) for run in (folder, whole))
    assert all(torch.equal(actual[key], expected[key]) for key in expected)
    logged, wanted = (EventAccumulator(str(run / "logs")).Reload().Scalars("loss") for run in (folder, whole))
    assert [(event.step, event.value) for event in logged] == [(event.step, event.value) for event in wanted]
    assert [event.step for event in logged] == list(range(1, 13))


@pytest.mark.parametrize(
    "moment",
    ["step3", pytest.param("step6", marks=pytest.mark.slow), "step8", "write4", "write8", "save4", "save8", "save12"],
)
def test_a_killed_run_ends_with_the_weights_and_logs_of_an_uninterrupted_one(whole, tmp_path, moment):
    killed = train(tmp_path, check=False, KILL=moment)
    assert killed.returncode == -signal.SIGKILL and not (tmp_path / "result.pt").exists()
    train(tmp_path, cold=moment == "step6")  # with another hash seed
    assert_same(tmp_path, whole)
    assert names(tmp_path) == names(whole) == ["checkpoint-12", "checkpoint-8"]


@pytest.mark.parametrize("name", ["term", "int"])
def test_a_run_that_receives_a_stop_signal_saves_and_resumes(whole, tmp_path, name):
    stopped = train(tmp_path, KILL=f"{name}6")
    assert "stopped after 6 steps; the same command resumes from there" in stopped.stdout
    assert names(tmp_path) == ["checkpoint-4", "checkpoint-6"] and not (tmp_path / "result.pt").exists()
    again = train(tmp_path)
    assert "after 6 steps" in again.stdout
    assert_same(tmp_path, whole)


@pytest.mark.slow
def test_a_stop_signal_to_one_process_makes_all_save_and_resume(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    configuration = Path(__file__).parents[2] / "train/accelerate/ddp.yaml"
    options = [f"--config_file={configuration}", "--num_processes=2", "--mixed_precision=no", "--main_process_port=0"]
    launcher = ["-m", "accelerate.commands.launch", *options, str(tmp_path / "script.py")]
    train(tmp_path / "whole", launcher=launcher)
    stopped = train(tmp_path / "again", launcher=launcher, KILL="term6")
    assert "stopped after 6 steps" in stopped.stdout and names(tmp_path / "again") == ["checkpoint-4", "checkpoint-6"]
    assert "after 6 steps" in train(tmp_path / "again", launcher=launcher).stdout
    assert_same(tmp_path / "again", tmp_path / "whole")


@pytest.mark.parametrize("damage", ["truncated", "missing", "changed", "no record"])
def test_the_previous_checkpoint_replaces_a_damaged_one(whole, tmp_path, damage):
    train(tmp_path, check=False, KILL="step10")
    newest = tmp_path / "checkpoint-8"
    path = newest / {"no record": "record.json", "missing": "optimizer.bin"}.get(damage, "model.safetensors")
    content = bytearray(path.read_bytes())
    if damage in ("missing", "no record"):
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(content[: len(content) // 2])
    else:
        content[-1] ^= 1
        path.write_bytes(content)
    again = train(tmp_path)
    assert f"{newest} is damaged" in again.stderr and "after 4 steps" in again.stdout
    assert_same(tmp_path, whole)


def test_a_run_with_damaged_checkpoints_does_not_start_over(tmp_path):
    train(tmp_path, check=False, KILL="step6")
    (tmp_path / "checkpoint-4/model.safetensors").write_bytes(b"")
    for _ in range(2):
        again = train(tmp_path, check=False)
        assert again.returncode != 0 and "every checkpoint" in again.stderr


def test_a_gradient_that_is_not_finite_stops_the_run_and_names_its_batch(tmp_path):
    stopped = train(tmp_path, check=False, BAD="5")
    assert stopped.returncode != 0
    assert "the loss or gradient of step 6 is not finite; its batch: the clips of step 5" in stopped.stderr
    assert names(tmp_path) == ["checkpoint-4"]


def test_a_loss_that_is_not_finite_stops_a_run_whose_steps_are_skipped(tmp_path):
    assert train(tmp_path / "finite", SKIPPED="1").returncode == 0
    for name in ("SKIPPED", "NO_NORM"):
        stopped = train(tmp_path / name, check=False, BAD="5", **{name: "1"})
        assert stopped.returncode != 0 and "the loss or gradient of step 6 is not finite" in stopped.stderr


def test_leftovers_of_a_killed_run_are_removed_and_a_second_damaged_checkpoint_is_moved_aside(tmp_path):
    train(tmp_path, check=False, KILL="save8")
    assert names(tmp_path) == ["checkpoint-4", "checkpoint-8.partial"]
    (tmp_path / "checkpoint-2.partial").mkdir()
    for moment in ("step10", "step11"):
        train(tmp_path, check=False, KILL=moment)
        (tmp_path / "checkpoint-8/model.safetensors").write_bytes(b"")
    train(tmp_path)
    assert names(tmp_path) == ["checkpoint-12", "checkpoint-8", "checkpoint-8.damaged"]


def test_reasons_for_an_inexact_resume_are_named(tmp_path):
    train(tmp_path, check=False, KILL="step6")
    again = train(tmp_path, THREADS="2", DATA="a")
    assert "is not resumed exactly: threads 1 -> 2, data_sha256 None -> a" in again.stderr
    assert "is not resumed exactly" not in train(tmp_path, THREADS="2", DATA="a").stderr


def test_a_resumed_run_uses_the_requested_hyperparameters(tmp_path):
    train(tmp_path, check=False, KILL="step6")
    options = ("--keep_last=9", "--learning_rate=0", "--weight_decay=0.3", "--adam_beta2=0.5")
    again = train(tmp_path, launcher=("-c", SCRIPT, *options))
    assert "learning_rate 0.001 -> 0.0" in again.stderr
    before, after = (load_file(tmp_path / f"checkpoint-{step}/model.safetensors") for step in (4, 12))
    assert all(torch.equal(before[name], after[name]) for name in before)
    saved = torch.load(tmp_path / "checkpoint-12/optimizer.bin")["param_groups"]
    assert [group["weight_decay"] for group in saved] == [0.3, 0.0]
    assert all((group["lr"], group["initial_lr"], group["betas"]) == (0, 0, (0.9, 0.5)) for group in saved)


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("kind", ["pickle", "torch"])
def test_no_file_of_a_checkpoint_runs_code_when_a_run_resumes(killed, tmp_path, kind):
    files = {path.name for path in (killed / "checkpoint-4").iterdir()}
    others = {"custom_checkpoint_0.pkl", "scheduler.bin", "scaler.pt", "sampler.bin"}
    for name in sorted((files | others) - {"record.json"}):
        run, ran = tmp_path / name, tmp_path / f"{name}.ran"
        shutil.copytree(killed, run)
        path = run / "checkpoint-4" / name
        if kind == "pickle":
            path.write_bytes(pickle.dumps({"step": Payload(ran)}))
        else:
            torch.save({"step": Payload(ran)}, path)
        record = path.parent / "record.json"
        content = json.loads(record.read_text())
        record.unlink()
        seal(path.parent, "record.json", {key: content[key] for key in content.keys() - {"files", "sha256"}})
        resumed = train(run, check=False)
        assert not ran.exists()
        if name in files:
            assert resumed.returncode != 0 and f"{path.parent} does not fit this run or is malformed" in resumed.stderr


def test_a_checkpoint_of_an_older_version_is_rejected_with_what_to_do(killed, tmp_path):
    shutil.copytree(killed, tmp_path / "run")
    (tmp_path / "run/checkpoint-4/custom_checkpoint_0.pkl").write_bytes(b"")
    resumed = train(tmp_path / "run", check=False)
    assert (
        resumed.returncode != 0
        and "was written by an older version, with a pickle, which can run code" in resumed.stderr
    )


def test_a_second_run_in_the_same_folder_names_the_process_that_trains_there(tmp_path):
    command = [warm_python(), "-c", SCRIPT, f"--output_dir={tmp_path}", "--max_steps=1000000", "--mixed_precision=no"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    with subprocess.Popen(command, env=environment, start_new_session=True, stderr=subprocess.DEVNULL) as first:
        try:
            while not (tmp_path / "config.yaml").exists():
                assert first.poll() is None
                time.sleep(0.05)
            config = (tmp_path / "config.yaml").read_text()
            second = train(tmp_path, check=False)
        finally:
            first.terminate()
    assert second.returncode != 0 and f"{tmp_path} is in use by process " in second.stderr
    assert (tmp_path / "config.yaml").read_text() == config
    train(tmp_path)
