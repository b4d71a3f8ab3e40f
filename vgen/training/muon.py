"""Muon for kernels of convolutions, too."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class KernelMuon(torch.optim.Muon):
    """`torch.optim.Muon` for weights of two and more dimensions: each is a matrix of output channels by all the rest.

    The optimiser's own parameters are views of the weights, taken anew at every step, so that weights may be moved to
    another device or replaced in between.

    Args:
        weights: Matrices (out, in) and kernels (out, in, ...).
        settings: Of `torch.optim.Muon`.

    Source: https://kellerjordan.github.io/posts/muon/, which flattens the last three dimensions of kernels.
    """

    def __init__(self, weights: list[nn.Parameter], **settings: Any):
        self._weights = weights
        super().__init__([nn.Parameter(weight.detach().flatten(1)) for weight in weights], **settings)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Changes the weights by their gradients."""
        for weight, matrix in zip(self._weights, self.param_groups[0]["params"], strict=True):
            matrix.data = weight.detach().view(matrix.shape)
            matrix.grad = None if weight.grad is None else weight.grad.reshape(matrix.shape)
        return super().step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forgets the gradients of the weights."""
        super().zero_grad(set_to_none)
        for weight in self._weights:
            weight.grad = None
