"""Losses between neighboring frames: no change, no change along the optical flow, or the change of the real clip."""

from dataclasses import dataclass

import torch
from torch import Tensor

from vgen.checks import check_number
from vgen.temporal.flow import FlowMethod, Motion


@dataclass(kw_only=True)
class TemporalLossConfig:
    """Settings of the temporal loss; it is off if all weights are 0."""

    difference_weight: float = 0.0
    """Weight of the absolute difference between neighboring frames."""
    warping_weight: float = 0.0
    """Weight of the absolute difference between a frame and the next frame warped to it by the optical flow of the
    real clip, where the flow is reliable."""
    matched_weight: float = 0.0
    """Weight of the absolute difference between the frame-to-frame changes of the output and of the real clip."""
    flow: FlowMethod = "dis"
    """Optical flow method of `vgen.temporal.flow.optical_flow` for `warping_weight`."""

    @property
    def wants_temporal_loss(self) -> bool:
        """Whether any weight is positive."""
        return max(self.difference_weight, self.warping_weight, self.matched_weight) > 0

    def check_temporal_loss(self) -> None:
        """Checks the settings.

        Raises:
            ValueError: A weight is not a number of at least 0.
        """
        for name in ("difference_weight", "warping_weight", "matched_weight"):
            check_number(name, getattr(self, name), minimum=0)


def temporal_loss(
    config: TemporalLossConfig,
    video: Tensor,
    real: Tensor,
    motion: Motion | None = None,
    weight: Tensor | None = None,
) -> Tensor:
    """The weighted sum of the terms, for each clip.

    `a |v[t] - v[t+1]| + b |warp(v[t+1], flow[t -> t+1]) - v[t]| + c |(v[t+1] - v[t]) - (r[t+1] - r[t])|`, each a mean
    over pixels and pairs of frames, the second one over visible pixels.

    Args:
        config: The weights `a`, `b`, `c`.
        video: The output of the network, a reconstruction or an estimate, as pixels or latents `(b, c, f, h, w)`.
        real: The real clip, of the same shape.
        motion: Motion of the real clip; required for `warping_weight`.
        weight: Weight of each pair of neighboring frames, `(b, f - 1)`; `None` means 1. Pairs of weight 0 are
            excluded from the mean.

    Returns:
        The loss of each clip, `(b,)`.
    """
    weight = torch.ones(len(video), video.shape[2] - 1, device=video.device) if weight is None else weight
    change, total = video[:, :, 1:] - video[:, :, :-1], video.new_zeros(len(video), dtype=torch.float32)
    if config.difference_weight:
        total = total + config.difference_weight * _mean(change.abs(), weight)
    if config.warping_weight:
        assert motion is not None
        error = (motion.warp_next(video) - video[:, :, :-1]).abs()
        total = total + config.warping_weight * _mean(error, weight, motion.visible)
    if config.matched_weight:
        total = total + config.matched_weight * _mean((change - (real[:, :, 1:] - real[:, :, :-1])).abs(), weight)
    return total


def _mean(error: Tensor, weight: Tensor, mask: Tensor | None = None) -> Tensor:
    """The mean `(b,)` over pairs with a positive weight and over visible pixels."""
    error = error.float().mean(dim=1)
    counts = (weight > 0).float()[:, :, None, None].expand_as(error)
    if mask is not None:
        counts = counts * mask[:, 0]
    return (error * counts * weight[:, :, None, None]).sum((1, 2, 3)) / counts.sum((1, 2, 3)).clamp_min(1)
