"""Training on several machines: launches that meet over loopback."""

import os
import socket
import subprocess
import time

import pytest
import torch
from safetensors.torch import load_file

from tests.warm import warm_python

from .scripts import ROOT, command_of, logged, train_vdm, trained_alike, vdm_settings

# SGD, whose weights stay as close as the gradients; with PAUSE, machine 1 stops in step 3 and waits to be killed
SCRIPT = """
import os, runpy, signal, sys
from functools import partial
from pathlib import Path
import torch
from torch.optim.lr_scheduler import LambdaLR
from vgen.training import run

def descent(config, network):
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
    return [optimizer], [LambdaLR(optimizer, lambda step: 1.0)]

def update(self, whole=run.Run.update):
    if self.step == 3 and self.accelerator.process_index == 1 and "PAUSE" in os.environ:
        marker = Path(os.environ["PAUSE"] + ".partial")
        marker.write_text(str(os.getpid()))
        marker.rename(os.environ["PAUSE"])
        signal.pause()
    whole(self)

run.make_optimizers, run.Run.update = descent, update
run.check_shared_folder = partial(run.check_shared_folder, wait=1)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def start(runs, folders, **environment):
    """Starts a run by one launch for each folder, as on machines with these output folders."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = folders[0].parent / "script.py"
    script.write_text(SCRIPT)
    launches = []
    for rank, folder in enumerate(folders):
        launcher = ["--config_file=train/accelerate/several_machines.yaml", "--mixed_precision=no"]
        launcher += [f"--num_machines={len(folders)}", f"--machine_rank={rank}", f"--num_processes={len(folders)}"]
        launcher += ["--main_process_ip=127.0.0.1", f"--main_process_port={port}"]
        training = command_of(script, ROOT / "train/train_vdm.py", **vdm_settings(runs, folder))
        variables = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"} | environment
        launches.append(
            subprocess.Popen(
                [warm_python(), "-m", "accelerate.commands.launch", *launcher, *training],
                env=os.environ | variables,
                cwd=ROOT,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )  # fmt: skip
        )
    return launches


def finish(launches):
    """The exit codes and errors of launches."""
    errors = [launch.communicate(timeout=120)[1] for launch in launches]
    return [(launch.returncode, error) for launch, error in zip(launches, errors, strict=True)]


@pytest.mark.slow
def test_two_machines_train_as_one_and_resume_exactly_after_one_is_killed(runs, tmp_path):
    whole, killed, marker = tmp_path / "whole", tmp_path / "killed", tmp_path / "paused"
    done = finish(start(runs, [whole, whole]))
    assert [code for code, _ in done] == [0, 0], done[0][1][-3000:]

    (tmp_path / "script.py").write_text(SCRIPT)
    train_vdm(runs, tmp_path / "one", fresh=True, script=(tmp_path / "script.py", ROOT / "train/train_vdm.py"))
    for file in ("model", "ema"):
        paths = [run / f"checkpoint-4/{file}.safetensors" for run in (whole, tmp_path / "one")]
        weights, wanted = map(load_file, paths)
        for name in wanted:
            torch.testing.assert_close(weights[name], wanted[name], rtol=1e-5, atol=1e-5)

    first, second = start(runs, [killed, killed], PAUSE=str(marker))
    deadline = time.monotonic() + 120
    while not marker.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    second.kill()
    os.kill(int(marker.read_text()), 9)
    (code, error), _ = finish([first, second])
    assert code != 0 and "by peer" in error, error[-3000:]  # its connection was closed or reset
    assert [path.name for path in killed.glob("checkpoint-*")] == ["checkpoint-2"]

    again = start(runs, [killed, killed])
    assert [code for code, _ in finish(again)] == [0, 0]
    assert trained_alike(killed, whole) and logged(killed, "loss") == logged(whole, "loss")


@pytest.mark.slow
def test_machines_that_do_not_share_the_output_folder_stop_at_the_start(runs, tmp_path):
    done = finish(start(runs, [tmp_path / "first", tmp_path / "second"]))
    for code, error in done:
        assert code != 0 and "output_dir must be a folder that all machines share, but processes 1 do not" in error
    assert not list(tmp_path.rglob("*/*"))
