"""Recipes, configurations of accelerate, and the settings they resolve to."""

import inspect
import runpy
from dataclasses import fields

import pytest
import yaml
from accelerate import DeepSpeedPlugin, FullyShardedDataParallelPlugin
from accelerate.commands.config.config_args import load_config_from_file

from vgen.training.run import RunConfig

from .scripts import ROOT, launch


def test_dry_run_prints_the_resolved_settings_and_does_nothing(tmp_path):
    recipe = "train/recipes/shapes-64.yaml"
    done = launch("train/train_vdm.py", "--dry_run", "--config", recipe, **{"--output_dir": tmp_path / "run"})
    assert "num_layers: 8" in done.stdout and f"output_dir: {tmp_path / 'run'}" in done.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "train/recipes").glob("*.yaml")))
def test_recipes_are_settings_of_their_scripts(name):
    kind = next((kind for kind in ("vae", "text", "convlstm") if kind in name), "vdm")
    values = runpy.run_path(str(ROOT / f"train/train_{'text_encoder' if kind == 'text' else kind}.py")).values()
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
