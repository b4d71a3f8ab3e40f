"""Checkpoints that appear whole or not at all, and the averaged weights that go with them."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from torch import nn

_NAME = re.compile(r"checkpoint-(\d+)")


class AveragedWeights:
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


def checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """The whole checkpoints in a run's folder as (step, path), oldest first."""
    found = [(int(match[1]), path) for path in folder.glob("checkpoint-*") if (match := _NAME.fullmatch(path.name))]
    return sorted(found)


def save_checkpoint(
    accelerator: Accelerator, folder: Path, step: int, average: AveragedWeights, keep_last: int
) -> None:
    """Saves everything that a run needs to go on after `step` optimiser steps."""
    final = folder / f"checkpoint-{step}"
    partial = folder / f"checkpoint-{step}.partial"
    if accelerator.is_main_process and partial.exists():
        shutil.rmtree(partial)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(partial))
    if accelerator.is_main_process:
        average.save(partial / "ema.safetensors")
        partial.replace(final)
        for _, old in checkpoints(folder)[:-keep_last]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()


def resume(accelerator: Accelerator, folder: Path, average: AveragedWeights) -> int:
    """Restores the newest whole checkpoint of a run; returns the steps done, 0 for a new run."""
    found = checkpoints(folder)
    if not found:
        return 0
    step, path = found[-1]
    accelerator.load_state(str(path))
    average.load(path / "ema.safetensors", step)
    accelerator.print(f"resumed from {path} after {step} steps")
    return step
