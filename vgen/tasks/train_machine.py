"""The machine on which `vgen train` runs, and the presets for machines."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml

from vgen.machine import GIB, fast_precision, processor
from vgen.tasks.train_commands import scripts_folder
from vgen.tasks.train_options import Preset


@dataclass(frozen=True)
class Machine:
    """What a plan needs to know of a machine."""

    device: str
    """Type of the device that trains."""
    count: int
    """Number of such devices; 1 for CPUs."""
    memory: float
    """Bytes of memory of one device."""
    disk: float
    """Free bytes where the run is written."""
    precision: str
    """The faster precision: `no` (float32) or `bf16`."""
    name: str
    started_in: float = 20.0
    """Seconds that this program took to start."""

    @classmethod
    def here(cls, folder: Path) -> Machine:
        """This machine, with the disk of a folder."""
        started_in = time.time() - psutil.Process().create_time()
        existing = next(one for one in (folder.absolute(), *folder.absolute().parents) if one.exists())
        disk = shutil.disk_usage(existing).free
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        if accelerator is None or accelerator.type != "cuda":
            device = torch.device("cpu")
            cpu = processor()
            name = f"{cpu['name']}, {cpu['cores']} cores"
            memory = psutil.virtual_memory().available
            return cls("cpu", 1, memory, disk, fast_precision(device), name, started_in)
        device = torch.device("cuda", 0)
        count = torch.cuda.device_count()
        memory = torch.cuda.mem_get_info(device)[1]
        name = f"{count} x {torch.cuda.get_device_name(0)}"
        return cls("cuda", count, memory, disk, fast_precision(device), name, started_in)


def read_preset(name: Preset) -> dict[str, Any]:
    """The settings of a preset: `device`, `processes`, `minutes`, `vae_share`, `target_clips`, and those of stages."""
    path = scripts_folder() / "train" / "presets" / f"{name}.yaml"
    return {"processes": 1} | yaml.safe_load(path.read_text(encoding="utf-8"))


def choose_preset(machine: Machine) -> Preset:
    """The largest preset for a machine."""
    if machine.device != "cuda":
        return "laptop"
    gib = machine.memory / GIB
    if gib >= 70:
        return "gpu-8x80gb" if machine.count >= 8 else "gpu-80gb"
    return "gpu-24gb" if gib >= 20 else "gpu-8gb"


def check_machine(name: str, preset: Mapping[str, Any], machine: Machine) -> None:
    """Checks that a machine has the devices of a preset.

    Raises:
        ValueError: It has not.
    """
    if preset["device"] != "cpu" and machine.device == "cpu":
        raise ValueError(f"--preset {name} needs a GPU, and PyTorch finds none here: leave it out, or take laptop")
    if preset["processes"] > machine.count:
        raise ValueError(f"--preset {name} needs {preset['processes']} GPUs, and this machine has {machine.count}")


def check_memory(name: str, memory: Mapping[str, float], machine: Machine) -> None:
    """Checks that the stages of a preset fit into the memory.

    Raises:
        ValueError: One does not.
    """
    for stage, needed in memory.items():
        if needed > machine.memory:
            smaller = "VAE or text encoder" if stage == "latents" else "preset"
            raise ValueError(
                f"preset {name}: the stage {stage} needs about {needed / GIB:.1f} GiB of memory, and {machine.name} "
                f"has {machine.memory / GIB:.1f}: choose a smaller {smaller}, or halve {stage}.batch_size with --set"
            )


def check_disk(needed: float, machine: Machine, folder: Path) -> None:
    """Checks that the results of a run fit on the disk.

    Args:
        needed: Bytes that the run will write.
        machine: The machine.
        folder: The folder of the run.

    Raises:
        ValueError: They do not.
    """
    if needed > machine.disk:
        raise ValueError(
            f"the run needs about {needed / GIB:.1f} GiB on disk, and {machine.disk / GIB:.1f} are free at {folder}: "
            "choose another --output"
        )
