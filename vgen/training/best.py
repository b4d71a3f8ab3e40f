"""Early stopping: keeps the weights with the best score, and counts the evaluations without a better one."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from vgen.io.atomic import atomic_file
from vgen.io.records import read_json

Goal = Literal["max", "min"]
"""Whether a higher or a lower score is better."""
_WEIGHTS, _RECORD = "best.safetensors", "best.json"


@dataclass
class Best:
    """The best evaluation of a run so far."""

    name: str
    """Name of the score."""
    score: float
    step: int
    """Number of optimizer steps before the evaluation."""
    num_worse: int = 0
    """Number of later evaluations, none of which was better."""


class BestWeights:
    """The trainable weights at the best evaluation of a run, in a file.

    Checkpoints have a copy of the file and the number of evaluations since, so that a resumed run stops where an
    uninterrupted one would.

    Args:
        network: The network whose weights are kept.
        folder: Folder of the file, `best.safetensors`.
        patience: Number of evaluations without a better score after which training is over; 0 keeps no weights.
        writes: Whether this process writes the file.
    """

    def __init__(self, network: nn.Module, folder: Path, patience: int, writes: bool):
        self._weights = {name: weight for name, weight in network.named_parameters() if weight.requires_grad}
        self._path, self._patience, self._writes = folder / _WEIGHTS, patience, writes
        self.best: Best | None = None

    @property
    def is_over(self) -> bool:
        """Whether training should end."""
        return self._patience > 0 and self.best is not None and self.best.num_worse >= self._patience

    def update(self, name: str, score: float, goal: Goal, step: int) -> None:
        """Counts an evaluation; keeps the present weights of the network if it is the best one.

        A score that is not finite is never the best.
        """
        sign = 1 if goal == "max" else -1
        if math.isfinite(score) and (self.best is None or sign * score > sign * self.best.score):
            self.best = Best(name, score, step)
            if self._writes:
                tensors = {name: weight.detach().cpu().contiguous() for name, weight in self._weights.items()}
                with atomic_file(self._path) as partial:
                    save_file(tensors, partial)
        elif self.best is not None:
            self.best.num_worse += 1

    def save(self, folder: Path) -> None:
        """Copies the state to the folder of a checkpoint."""
        if self.best is not None and self._writes:
            shutil.copyfile(self._path, folder / _WEIGHTS)
            (folder / _RECORD).write_text(json.dumps(asdict(self.best)))

    def load(self, folder: Path) -> None:
        """Restores the state from the folder of a checkpoint, if the run that wrote it kept any."""
        if not self._patience or not (folder / _RECORD).exists():
            return
        self.best = Best(**read_json(folder / _RECORD))
        if self._writes:
            with atomic_file(self._path) as partial:
                shutil.copyfile(folder / _WEIGHTS, partial)

    @torch.no_grad()
    def use(self) -> None:
        """Puts the best weights into the network."""
        saved = load_file(self._path)
        for name, weight in self._weights.items():
            weight.copy_(saved[name])
