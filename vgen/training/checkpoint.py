"""Atomic checkpoints, and the exponential moving average (EMA) of the weights that is saved in them."""

from __future__ import annotations

import json
import re
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from diffusers.utils import logging
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed import checkpoint as sharded_checkpoint
from torch.distributed.tensor import DTensor

from vgen.io.atomic import atomic_directory, partial_path, remove_directory
from vgen.io.fingerprint import file_digest
from vgen.processes import from_main_process

logger = logging.get_logger(__name__)

_RECORD = "record.json"
_NAME = re.compile(r"checkpoint-(\d+)")


class EMAWeights:
    """The exponential moving average (EMA) of a network's weights: diffusers' `EMAModel`.

    Each process averages its part of weights that `fully_shard` divided. Their average is saved by
    `torch.distributed.checkpoint`, and that of whole weights as safetensors by the main process.

    Args:
        network: The network whose parameters are averaged.
        decay: The largest decay. Early steps use less, `(1 + step) / (10 + step)`. With 0, the average equals the
            weights.
    """

    def __init__(self, network: nn.Module, decay: float):
        self._weights = dict(network.named_parameters())
        self._sharded = any(isinstance(weight, DTensor) for weight in self._weights.values())
        self._average = EMAModel(self._parts(), decay=decay, foreach=True)

    def _parts(self) -> list[Tensor]:
        """This process's parts of the weights, as views."""
        return [
            weight.to_local().detach().requires_grad_(weight.requires_grad) if isinstance(weight, DTensor) else weight
            for weight in self._weights.values()
        ]

    def step(self) -> None:
        """Updates the average after an optimizer step."""
        self._average.step(self._parts())

    def __enter__(self) -> None:
        """Puts the average into the network."""
        self._average.store(self._parts())
        self._average.copy_to(self._parts())

    def __exit__(self, *error: object) -> None:
        """Restores the network's own weights."""
        self._average.restore(self._parts())

    def _tensors(self) -> dict[str, Tensor]:
        """The average by name, in tensors that share its memory; divided like the weights."""
        tensors: dict[str, Tensor] = {}
        for (name, weight), average in zip(self._weights.items(), self._average.shadow_params, strict=True):
            tensors[name] = average.detach()
            if isinstance(weight, DTensor):
                tensors[name] = DTensor.from_local(
                    tensors[name], weight.device_mesh, weight.placements, shape=weight.shape, stride=weight.stride()
                )
        return tensors

    def save(self, folder: Path, is_main_process: bool) -> None:
        """Writes the average to a folder; all processes must call it."""
        if self._sharded:
            sharded_checkpoint.save(self._tensors(), checkpoint_id=folder / "ema")
        elif is_main_process:
            tensors = {name: tensor.cpu().contiguous() for name, tensor in self._tensors().items()}
            save_file(tensors, folder / "ema.safetensors")

    def load(self, folder: Path, step: int) -> None:
        """Reads the average of a run after `step` optimizer steps."""
        if self._sharded:
            sharded_checkpoint.load(self._tensors(), checkpoint_id=folder / "ema")
        else:
            saved = load_file(folder / "ema.safetensors")
            for name, weight in self._tensors().items():
                weight.copy_(saved[name])
        self._average.optimization_step = step


class NoEMA:
    """Replaces `EMAWeights` where no average is kept: all methods do nothing, and the last weights are the result."""

    def step(self) -> None:
        """Does nothing."""

    def __enter__(self) -> None:
        """Does nothing: the network keeps its weights."""

    def __exit__(self, *error: object) -> None:
        """Does nothing."""

    def save(self, folder: Path, is_main_process: bool) -> None:
        """Does nothing: the checkpoint holds the weights."""

    def load(self, folder: Path, step: int) -> None:
        """Does nothing."""


def checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """The complete checkpoints in a run's folder as (step, path), oldest first."""
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
    """Saves everything that is needed to resume a run after `step` optimizer steps.

    Args:
        accelerator: Holds the networks, optimizers, schedules and random states.
        folder: The run's folder.
        step: Number of optimizer steps done.
        average: The EMA of the weights.
        keep_last: Number of checkpoints to keep; older ones are deleted.
        settings: The settings that must be equal for a run to be resumed exactly.
    """
    final = folder / f"checkpoint-{step}"
    if accelerator.is_main_process:
        for leftover in folder.glob("checkpoint-*.partial"):  # of a run that was killed
            shutil.rmtree(leftover)
    # all processes write into the folder; the main process creates it and moves it into place
    with atomic_directory(final) if accelerator.is_main_process else nullcontext(partial_path(final)) as partial:
        accelerator.wait_for_everyone()
        accelerator.save_state(str(partial))
        average.save(partial, accelerator.is_main_process)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            record = {
                "files": _digests(partial),
                "settings": settings | _environment(accelerator),
                "strategy": _strategy(accelerator),
            }
            (partial / _RECORD).write_text(json.dumps(record, indent=1))
    if accelerator.is_main_process:
        for _, old in checkpoints(folder)[:-keep_last]:
            remove_directory(old)
    accelerator.wait_for_everyone()


def resume(accelerator: Accelerator, folder: Path, average: EMAWeights | NoEMA, settings: dict[str, Any]) -> int:
    """Restores the newest undamaged checkpoint of a run; returns the number of steps done, 0 for a new run.

    Damaged checkpoints are renamed to `*.damaged` with a warning. If settings, versions, or the numbers of threads and
    processes differ from those of the checkpoint, a warning names them: the resumed run then differs from an
    uninterrupted one.

    Raises:
        ValueError: There are checkpoints, but all of them are damaged, or another strategy wrote the newest one.
    """
    newest, error = from_main_process(_newest(folder) if accelerator.is_main_process else None)
    if error:
        raise ValueError(error)
    if newest is None:
        return 0
    step, path = newest
    record = json.loads((path / _RECORD).read_text())
    if record.get("strategy", _strategy(accelerator)) != _strategy(accelerator):
        raise ValueError(
            f"{path} was written with {record['strategy']} and is resumed with it only, got {_strategy(accelerator)}"
        )
    before = record["settings"]
    now = json.loads(json.dumps(settings | _environment(accelerator)))
    changed = [
        f"{key} {before.get(key)} -> {now.get(key)}" for key in {**before, **now} if before.get(key) != now.get(key)
    ]
    if changed:
        logger.warning(f"{path} is not resumed exactly: {', '.join(changed)}")
    accelerator.load_state(str(path))
    average.load(path, step)
    accelerator.print(f"resumed from {path} after {step} steps")
    return step


def _newest(folder: Path) -> tuple[tuple[int, Path] | None, str | None]:
    """The newest undamaged checkpoint, if any, or why a run cannot start; moves damaged ones aside."""
    for step, path in reversed(checkpoints(folder)):
        reason = _find_damage(path)
        if reason is None:
            return (step, path), None
        logger.warning(f"{path} is damaged ({reason}): it is renamed to *.damaged, and the previous one is used")
        shutil.rmtree(path.with_name(path.name + ".damaged"), ignore_errors=True)
        path.rename(path.with_name(path.name + ".damaged"))
    if damaged := sorted(folder.glob("checkpoint-*.damaged")):
        return None, (
            f"every checkpoint in {folder} is damaged ({', '.join(path.name for path in damaged)}): delete them to "
            "start from step 0"
        )
    return None, None


def _strategy(accelerator: Accelerator) -> str:
    """How a checkpoint divides the weights."""
    name = accelerator.distributed_type.name
    return name if name in ("FSDP", "DEEPSPEED") else "whole weights"


def _environment(accelerator: Accelerator) -> dict[str, Any]:
    """What the rounding of floating-point numbers depends on, in addition to the settings."""
    return {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "processes": accelerator.num_processes,
        "device": accelerator.device.type,
    }


def _digests(folder: Path) -> dict[str, str]:
    """The SHA-256 of each file in a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): file_digest(path) for path in files}


def _find_damage(folder: Path) -> str | None:
    """How a checkpoint is damaged; `None` if it is not."""
    try:
        expected = json.loads((folder / _RECORD).read_text())["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{_RECORD}: {error}"
    found = _digests(folder)
    wrong = [name for name, digest in expected.items() if found.get(name) != digest]
    return f"missing or changed files: {', '.join(wrong)}" if wrong else None
