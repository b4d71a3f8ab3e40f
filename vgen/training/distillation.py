"""Causal consistency distillation: a student makes in a few steps what a guided teacher makes in many.

Axes: `b` batch, `c` channels, `t h w` latent frames, rows and columns, `n` token frames.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from einops import repeat
from torch import Tensor

from vgen.checks import check_choice, check_integer
from vgen.diffusion import flow_sample, is_flow, level_to_timestep, shift_of, shifted

Loss = Literal["huber", "squared"]
HUBER = 0.00054
"""Constant of the pseudo-Huber loss, for each square root of a sample's number of elements."""
Predict = Callable[[Tensor, Tensor], Tensor]
"""The velocity `(b, c, t, h, w)` of latents at timesteps `(b, n)`."""


class Pair(NamedTuple):
    """A point on the teacher's path, and what the student should give there."""

    latents: Tensor
    """Noisy latents `(b, c, t, h, w)`."""
    levels: Tensor
    """Noise level of each token frame, `(b, n)`."""
    timestep: Tensor
    """The levels as timesteps, `(b, n)`."""
    target: Tensor
    """Clean latents as the average of the student gives them one level lower, `(b, c, t, h, w)`."""


class ConsistencyObjective:
    """Trains a student to give the same clean latents from two neighboring levels of the teacher's path.

    The levels are those of the teacher's scheduler with `num_levels` steps. Known frames keep their levels, so the
    history of a chunk is as in a rollout. At level 0 the clean latents are the input itself, so no network has to
    learn this boundary condition.

    Args:
        scheduler: The teacher's scheduler, of flow matching.
        num_levels: Number of levels.
        loss: `huber` (pseudo-Huber, less sensitive to outliers) or `squared`.

    Raises:
        ValueError: The scheduler is not one of flow matching, or an argument is invalid.

    Source: Consistency models, arXiv 2303.01469; improved techniques for training consistency models, arXiv
        2310.14189; Causal Forcing, arXiv 2602.02214.
    """

    def __init__(self, scheduler: Any, num_levels: int = 32, loss: Loss = "huber"):
        check_integer("num_levels", num_levels, 2)
        check_choice("loss", loss, Loss)
        if not is_flow(scheduler):
            raise ValueError(f"distillation needs a teacher of flow matching, got a {type(scheduler).__name__}")
        self.scheduler, self.loss_kind = scheduler, loss
        even = torch.linspace(0, 1, num_levels + 1, dtype=torch.float64)
        self.grid = shifted(even, shift_of(scheduler)).float()
        """Levels in ascending order, from 0 to 1."""

    def pair(
        self, latents: Tensor, noise: Tensor, levels: Tensor, generated: Tensor, teacher: Predict, average: Predict
    ) -> Pair:
        """Takes one step of the teacher.

        Args:
            latents: Clean normalized latents `(b, c, t, h, w)`.
            noise: Gaussian noise of the same shape.
            levels: Noise level of each token frame, `(b, n)`; those of generated frames are rounded up to the grid.
            generated: bool `(b, n)`, false for known frames.
            teacher: The teacher, guided.
            average: The moving average of the student.
        """
        grid = self.grid.to(levels.device)
        index = torch.bucketize(levels, grid).clamp(1, len(grid) - 1)
        now = torch.where(generated, grid[index], levels)
        lower = torch.where(generated, grid[index - 1], levels)
        noisy, _ = flow_sample(latents, noise, now)
        timestep = level_to_timestep(self.scheduler, now)
        velocity = teacher(noisy, timestep).float()
        before = noisy + _frames(lower - now, noisy) * velocity
        target = clean_estimate(before, lower, average(before, level_to_timestep(self.scheduler, lower)))
        return Pair(noisy, now, timestep, target)

    def loss(self, pair: Pair, velocity: Tensor, counted: Tensor) -> Tensor:
        """The loss of each sample, `(b,)`.

        Args:
            pair: From `pair`.
            velocity: The student's prediction for `pair.latents`.
            counted: bool `(b, n)`, true for frames that count.
        """
        error = clean_estimate(pair.latents, pair.levels, velocity) - pair.target
        weight = _frames(counted.float(), error)
        per_frame = error.shape[1] * error.shape[3] * error.shape[4]
        number = (weight.flatten(1).sum(1) * per_frame).clamp_min(1)
        squared = (error.square() * weight).flatten(1).sum(1)
        if self.loss_kind == "squared":
            return squared / number
        constant = HUBER * number.sqrt()
        return (squared + constant.square()).sqrt() - constant


def clean_estimate(latents: Tensor, levels: Tensor, velocity: Tensor) -> Tensor:
    """The clean latents that a velocity implies; at level 0 the latents themselves.

    Args:
        latents: Noisy latents `(b, c, t, h, w)`.
        levels: Noise level of each token frame, `(b, n)`.
        velocity: Velocity `(b, c, t, h, w)`.
    """
    return latents - _frames(levels, latents) * velocity.float()


def guided(conditional: Tensor, unconditional: Tensor, scale: float, prompted: Tensor) -> Tensor:
    """Classifier-free guidance of the samples that have a prompt.

    Args:
        conditional: Predictions `(b, c, t, h, w)` with the prompts.
        unconditional: Those with empty prompts.
        scale: Weight of guidance.
        prompted: bool `(b,)`.
    """
    scales = torch.where(prompted, scale, 1.0).to(conditional)[:, None, None, None, None]
    return unconditional + scales * (conditional - unconditional)


def _frames(values: Tensor, like: Tensor) -> Tensor:
    """Values of token frames `(b, n)` for latents `(b, c, t, h, w)`."""
    return repeat(values, "b n -> b 1 (n k) 1 1", k=like.shape[2] // values.shape[1]).to(like)
