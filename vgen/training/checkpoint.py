"""Checkpoints that appear whole or not at all, and the averaged weights that go with them."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from diffusers.utils import logging
from safetensors.torch import load_file, save_file
from torch import nn

logger = logging.get_logger(__name__)

_RECORD = "record.json"
_NAME = re.compile(r"checkpoint-(\d+)")


class EMAWeights:
    """The exponential moving average of a network's weights, by diffusers' `EMAModel`, kept in safetensors.

    Args:
        network: Whose parameters to follow.
        decay: The largest decay; early steps use less, `(1 + step) / (10 + step)`. 0 follows exactly.
    """

    def __init__(self, network: nn.Module, decay: float):
        self._names = [name for name, _ in network.named_parameters()]
        self._network = network
        self._average = EMAModel(network.parameters(), decay=decay, foreach=True)

    def step(self) -> None:
        """Takes over the weights after an optimiser step."""
        self._average.step(self._network.parameters())

    def __enter__(self) -> None:
        """Lends the average to the network."""
        self._average.store(self._network.parameters())
        self._average.copy_to(self._network.parameters())

    def __exit__(self, *error: object) -> None:
        """Gives the network its own weights back."""
        self._average.restore(self._network.parameters())

    def save(self, path: Path) -> None:
        """Writes the average."""
        tensors = dict(zip(self._names, self._average.shadow_params, strict=True))
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(tensors, path)

    def load(self, path: Path, step: int) -> None:
        """Reads the average of a run after `step` optimiser steps."""
        tensors = load_file(path)
        with torch.no_grad():
            for name, weight in zip(self._names, self._average.shadow_params, strict=True):
                weight.copy_(tensors[name])
        self._average.optimization_step = step


class NoEMA:
    """Stands in for `EMAWeights` where nothing is averaged: the result is the last weights."""

    def step(self) -> None:
        """Nothing to do."""

    def __enter__(self) -> None:
        """The network keeps its weights."""

    def __exit__(self, *error: object) -> None:
        """It has kept them."""

    def save(self, path: Path) -> None:
        """They stand in the checkpoint anyway."""

    def load(self, path: Path, step: int) -> None:
        """They stand in the checkpoint anyway."""


def checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """The whole checkpoints in a run's folder as (step, path), oldest first."""
    found = [(int(match[1]), path) for path in folder.glob("checkpoint-*") if (match := _NAME.fullmatch(path.name))]
    return sorted(found)


def save_checkpoint(
    accelerator: Accelerator,
    folder: Path,
    step: int,
    average: EMAWeights | NoEMA,
    keep_last: int,
    settings: dict[str, Any],
) -> None:
    """Saves everything that a run needs to go on after `step` optimiser steps.

    Args:
        accelerator: Holds networks, optimisers, schedules and random states.
        folder: Of the run.
        step: Optimiser steps done.
        average: Of the weights.
        keep_last: Older checkpoints than so many are deleted.
        settings: What an exact continuation has to agree on.
    """
    final = folder / f"checkpoint-{step}"
    partial = folder / f"checkpoint-{step}.partial"
    if accelerator.is_main_process:
        for left in folder.glob("checkpoint-*.partial"):  # by a run that was killed
            shutil.rmtree(left)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(partial))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        average.save(partial / "ema.safetensors")
        record = {"files": _digests(partial), "settings": settings | _surroundings(accelerator)}
        (partial / _RECORD).write_text(json.dumps(record, indent=1))
        partial.replace(final)
        for _, old in checkpoints(folder)[:-keep_last]:
            shutil.rmtree(old.rename(old.with_name(old.name + ".partial")))
    accelerator.wait_for_everyone()


def resume(accelerator: Accelerator, folder: Path, average: EMAWeights | NoEMA, settings: dict[str, Any]) -> int:
    """Restores the newest checkpoint of a run that is as it was written; returns the steps done, 0 for a new run.

    A damaged one is put aside with a warning. Settings, versions and numbers of threads and processes that the
    checkpoint does not share are named in a warning: then the continuation is not that of an uninterrupted run.

    Raises:
        ValueError: There are checkpoints, and all are damaged.
    """
    with accelerator.main_process_first():
        for _, path in reversed(checkpoints(folder)):
            reason = _damage(path)
            if reason is None:
                break
            logger.warning(f"{path} is damaged ({reason}): it is put aside, and the one before is taken")
            shutil.rmtree(path.with_name(path.name + ".damaged"), ignore_errors=True)
            path.rename(path.with_name(path.name + ".damaged"))
    found = checkpoints(folder)
    if not found:
        if damaged := sorted(folder.glob("checkpoint-*.damaged")):
            raise ValueError(
                f"every checkpoint of {folder} is damaged ({', '.join(path.name for path in damaged)}): delete them "
                "to begin anew"
            )
        return 0
    step, path = found[-1]
    before = json.loads((path / _RECORD).read_text())["settings"]
    now = json.loads(json.dumps(settings | _surroundings(accelerator)))
    changed = [
        f"{key} {before.get(key)} -> {now.get(key)}" for key in {**before, **now} if before.get(key) != now.get(key)
    ]
    if changed:
        logger.warning(f"{path} does not go on exactly: {', '.join(changed)}")
    accelerator.load_state(str(path))
    average.load(path / "ema.safetensors", step)
    accelerator.print(f"resumed from {path} after {step} steps")
    return step


def _surroundings(accelerator: Accelerator) -> dict[str, Any]:
    """What rounding depends on, beside the settings."""
    return {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "processes": accelerator.num_processes,
        "device": accelerator.device.type,
    }


def _digests(folder: Path) -> dict[str, str]:
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            digest = hashlib.sha256()
            while block := file.read(2**20):
                digest.update(block)
        found[path.relative_to(folder).as_posix()] = digest.hexdigest()
    return found


def _damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, if anything."""
    try:
        expected = json.loads((folder / _RECORD).read_text())["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{_RECORD}: {error}"
    found = _digests(folder)
    wrong = [name for name, digest in expected.items() if found.get(name) != digest]
    return f"not as written: {', '.join(wrong)}" if wrong else None
