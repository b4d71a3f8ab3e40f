"""Noise levels of the token frames of a training sample; level 0 is clean, level 1 is pure noise."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from vgen.checks import check_choice
from vgen.diffusion import shifted

LevelKind = Literal["shared", "group", "independent"]
LevelDistribution = Literal["logit_normal", "uniform"]


def draw_levels(
    kind: LevelKind,
    groups: Tensor,
    generator: torch.Generator,
    mean: float = 0.0,
    std: float = 1.0,
    shift: float = 1.0,
    distribution: LevelDistribution = "logit_normal",
    between: tuple[float, float] = (0.0, 1.0),
) -> Tensor:
    """Draws levels `(n,)` for the token frames of one sample.

    Args:
        kind: `shared`: one level for all; `group`: one for each group; `independent`: one for each frame, as in
            diffusion forcing.
        groups: Group of each token frame, `(n,)`.
        generator: Random numbers of this sample, on the CPU.
        mean: Mean of the logit.
        std: Standard deviation of the logit.
        shift: Timestep shift, `shift * l / (1 + (shift - 1) * l)`; values above 1 favor high noise levels.
        distribution: `logit_normal`, in which hardly any level is close to pure noise; or `uniform` before the shift,
            in (0, 1].
        between: Lowest and highest level: the distribution is limited to this range, and has its shape there.

    Raises:
        ValueError: The kind or the distribution is unknown.

    Source: Scaling rectified flow Transformers, arXiv 2403.03206, sections 3.1 and 5.3.2; Diffusion Forcing,
        arXiv 2407.01392.
    """
    check_choice("the kind of noise levels", kind, LevelKind)
    check_choice("the distribution of noise levels", distribution, LevelDistribution)
    low, high = between
    ends = torch.tensor([low, high], dtype=torch.float64)
    ends = ends / (shift - (shift - 1) * ends)  # without the shift
    if distribution == "uniform":
        draws = ends[1] - (ends[1] - ends[0]) * torch.rand(len(groups), generator=generator)
        draws = shifted(draws, shift).clamp(low, high).float()
    elif (low, high) != (0, 1):
        ends = torch.special.ndtr((ends.logit() - mean) / std)
        shares = ends[0] + (ends[1] - ends[0]) * torch.rand(len(groups), generator=generator, dtype=torch.float64)
        draws = torch.sigmoid(mean + std * torch.special.ndtri(shares))
        draws = shifted(draws, shift).clamp(low, high).float()
    else:
        draws = torch.sigmoid(mean + std * torch.randn(len(groups), generator=generator))
        draws = shifted(draws, shift)
    if kind == "shared":
        return draws[:1].expand(len(groups))
    return draws[groups.unique(return_inverse=True)[1]] if kind == "group" else draws
