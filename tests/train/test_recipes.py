"""Recipes, configurations of accelerate, and the settings they resolve to."""

import inspect
import os
import runpy
import subprocess
from dataclasses import fields

import pytest
import yaml
from accelerate import DeepSpeedPlugin, FullyShardedDataParallelPlugin
from accelerate.commands.config.config_args import load_config_from_file
from torch.distributed.run import get_args_parser

from vgen.training.run import RunConfig

from .scripts import ROOT, launch


def test_dry_run_prints_the_resolved_settings_and_does_nothing(tmp_path):
    recipe = "train/recipes/shapes-64.yaml"
    done = launch("train/train_vdm.py", "--dry_run", "--config", recipe, **{"--output_dir": tmp_path / "run"})
    assert "num_layers: 8" in done.stdout and f"output_dir: {tmp_path / 'run'}" in done.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "train/recipes").glob("*.yaml")))
def test_recipes_are_settings_of_their_scripts(name):
    scripts = {"text": "train_text_encoder", "distilled": "distill", "self-forced": "distill"}
    scripts |= {kind: f"train_{kind}" for kind in ("vae", "convlstm", "recognizer")}
    script = next((script for kind, script in scripts.items() if kind in name), "train_vdm")
    values = runpy.run_path(str(ROOT / f"train/{script}.py")).values()
    classes = [value for value in values if isinstance(value, type) and issubclass(value, RunConfig)]
    given = yaml.safe_load((ROOT / "train/recipes" / name).read_text())
    assert any(set(given) <= {field.name for field in fields(config)} for config in classes)
    model = given.get("model", {})
    if name.startswith("moving-mnist") and "window" in model:
        assert model["sink"] + model["window"] + model["chunk_size"] <= model["trained_token_frames"]


@pytest.mark.parametrize("path", sorted((ROOT / "train/accelerate").glob("*.yaml")), ids=lambda path: path.stem)
def test_configurations_of_accelerate_are_what_it_knows(path):
    config = load_config_from_file(str(path))  # unknown keys raise
    kinds = {"ddp": "MULTI_GPU", "several_machines": "MULTI_GPU", "fsdp2": "FSDP"}
    assert config.distributed_type.name == kinds.get(path.stem, "DEEPSPEED")
    assert config.num_processes % config.num_machines == 0
    known = set(inspect.signature(FullyShardedDataParallelPlugin).parameters)
    assert {name.removeprefix("fsdp_") for name in config.fsdp_config} <= known | {
        "version",
        "transformer_layer_cls_to_wrap",
    }
    if config.deepspeed_config:
        launched = {"deepspeed_hostfile", "deepspeed_multinode_launcher", "deepspeed_config_file"}
        renamed = {"offload_optimizer_device", "offload_param_device", "gradient_accumulation_steps", "zero_stage"}
        fields = set(inspect.signature(DeepSpeedPlugin).parameters)
        assert set(config.deepspeed_config) <= fields | launched | renamed
        assert config.deepspeed_config["zero_stage"] == int(path.stem[-1])
        assert path.stem[-1] == "2" or config.deepspeed_config["zero3_save_16bit_model"]


def dry_run(launcher_arguments):
    """The launcher's settings, and what the script prints with `--dry_run`, for the arguments of `torchrun`."""
    launched = get_args_parser().parse_args(launcher_arguments)
    return launched, launch(launched.training_script, *launched.training_script_args, "--dry_run").stdout


@pytest.mark.parametrize("fails", [False, True])
def test_the_slurm_script_launches_on_all_machines_and_queues_a_failed_job_again(tmp_path, fails):
    programs = {
        "srun": 'printf "%s\\n" "$@" > srun.txt; exit "$STATUS"',
        "scontrol": 'if [ "$1" = show ]; then printf "a1\\na2\\n"; else echo "$@" > scontrol.txt; fi',
    }
    for name, code in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{code}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {
        "SLURM_JOB_NODELIST": "a[1-2]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_ID": "7",
        "STATUS": str(int(fails)),
    }
    environment = os.environ | slurm | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    words = ["bash", ROOT / "train/cluster/slurm.sh", "train/train_vdm.py", "--config", "train/recipes/shapes-64.yaml"]
    done = subprocess.run(words, cwd=tmp_path, env=environment, check=False)
    assert done.returncode == int(fails)
    step, program, *arguments = (tmp_path / "srun.txt").read_text().splitlines()
    assert (step, program) == ("--kill-on-bad-exit=1", "torchrun")
    launched, printed = dry_run(arguments)
    assert (launched.nnodes, launched.nproc_per_node, launched.rdzv_endpoint) == ("2", "8", "a1:29500")
    assert "num_layers: 8" in printed
    assert (tmp_path / "scontrol.txt").exists() == fails


def test_the_kubernetes_job_starts_as_many_machines_as_its_launchers_wait_for():
    service, job = yaml.safe_load_all((ROOT / "train/cluster/kubernetes.yaml").read_text())
    pods = job["spec"]["template"]["spec"]
    (container,) = pods["containers"]
    program, *arguments = container["command"]
    launched, printed = dry_run(arguments)
    assert program == "torchrun" and "num_layers: 8" in printed and "output_dir: /runs/shapes-64" in printed
    assert int(launched.nnodes) == job["spec"]["completions"] == job["spec"]["parallelism"]
    assert int(launched.nproc_per_node) == container["resources"]["limits"]["nvidia.com/gpu"]
    name = job["metadata"]["name"]
    assert launched.rdzv_endpoint.split(":")[0] == f"{name}-0.{pods['subdomain']}"
    assert service["metadata"]["name"] == pods["subdomain"] and service["spec"]["selector"] == {"job-name": name}
    volumes = {volume["name"] for volume in pods["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes
