"""The optimizer Muon, extended to the kernels of convolutions."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from vgen.processes import has_bfloat16


class _Float32(TorchFunctionMode):
    """Replaces casts to bfloat16 by copies in float32."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.bfloat16:
            return args[0].to(torch.float32, copy=True)
        return func(*args, **(kwargs or {}))


class KernelMuon(torch.optim.Muon):
    """`torch.optim.Muon` for weights of two and more dimensions, flattened to (output channels, all other dimensions).

    The optimizer's parameters are views of the weights that are renewed in every step, so that weights may be moved to
    another device or replaced between steps. PyTorch orthogonalizes updates in bfloat16. On CPUs that emulate it, this
    is done in float32, which is 25 times as fast there.

    Args:
        weights: Matrices (out, in) and kernels (out, in, ...).
        settings: Arguments of `torch.optim.Muon`.

    Source: https://kellerjordan.github.io/posts/muon/, which flattens the last three dimensions of kernels.
    """

    def __init__(self, weights: list[nn.Parameter], **settings: Any):
        self._weights = weights
        super().__init__([nn.Parameter(weight.detach().flatten(1)) for weight in weights], **settings)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Takes an optimizer step."""
        for weight, matrix in zip(self._weights, self.param_groups[0]["params"], strict=True):
            matrix.data = weight.detach().view(matrix.shape)
            matrix.grad = None if weight.grad is None else weight.grad.reshape(matrix.shape)
        with nullcontext() if has_bfloat16(self._weights[0].device) else _Float32():
            return super().step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears the gradients of the weights."""
        super().zero_grad(set_to_none)
        for weight in self._weights:
            weight.grad = None
