"""Pointwise parts of a Transformer block, with gradients written out: fewer passes over memory, fewer saved tensors.

Inside, all of them compute in float32 or higher precision. Compiled code uses the formulas, which the compiler fuses.
The gradients cannot be differentiated again.

Axes: `b` batch, `m` noise levels of a video, `p` tokens that share one, `n = m * p` tokens, `d` channels, `h` heads.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.autograd.function import once_differentiable

_GELU = 2 * math.sqrt(2 / math.pi)
_GELU_CUBIC = _GELU * 0.044715
_CACHED = 2**15  # numbers per thread that fit a cache of the first or second level; PyTorch gives a thread no fewer


def _is_traced() -> bool:
    """Whether the formulas are needed: for compilers, and for transforms such as `torch.func.jvp`."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


def wide(x: Tensor) -> Tensor:
    """`x` in float32, or in float64 if that is its type."""
    return x if x.dtype == torch.float64 else x.float()


def gelu_tanh(x: Tensor) -> Tensor:
    """The tanh approximation of GELU. Without gradients it may be written to `x`.

    On CPUs it is computed as `x * sigmoid(2 * sqrt(2 / pi) * (x + 0.044715 * x**3))`, the same function: PyTorch's
    tanh takes three times as long as its sigmoid.

    Source: Gaussian error linear units, arXiv 1606.08415.
    """
    if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.float64) or _is_traced():
        return F.gelu(x, approximate="tanh")
    if torch.is_grad_enabled():
        return _Gelu.apply(x)  # type: ignore[no-untyped-call]
    for part in x.view(-1).split(_CACHED * torch.get_num_threads()):
        part.mul_(_gate(part))
    return x


def _gate(x: Tensor) -> Tensor:
    gate = torch.addcmul(x.new_tensor(_GELU), x, x, value=_GELU_CUBIC)
    return gate.mul_(x).sigmoid_()


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return _gate(x).mul_(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        gate = _gate(x)
        # with the gate's argument a x + b x**3, the derivative is gate * (1 + (1 - gate) * (a x + 3 b x**3))
        inner = torch.addcmul(x.new_tensor(_GELU), x, x, value=3 * _GELU_CUBIC).mul_(x)
        inner.addcmul_(inner, gate, value=-1).add_(1)
        return inner.mul_(gate).mul_(grad)


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """Adaptive layer norm, `norm(x) * (1 + scale) + shift`, in the data type of `x`.

    Args:
        x: Tokens `(b, n, d)`.
        shift: `(b, m, 1, d)`, float32.
        scale: `(b, m, 1, d)`, float32.
        eps: Epsilon of the norm.
    """
    if _is_traced():
        normed = F.layer_norm(wide(x), x.shape[-1:], eps=eps).unflatten(1, (shift.shape[1], -1))
        return (normed * (1 + scale) + shift).flatten(1, 2).type_as(x)
    return _ModulatedNorm.apply(x, shift, scale, eps)  # type: ignore[no-untyped-call]


class _ModulatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
        factor = 1 + scale
        normed, mean, rstd = torch.native_layer_norm(wide(x), x.shape[-1:], None, None, eps)
        ctx.save_for_backward(x, factor, mean, rstd)
        out = normed.unflatten(1, (shift.shape[1], -1))
        return torch.addcmul(shift, out, factor, out=out).flatten(1, 2).type_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, factor, mean, rstd = ctx.saved_tensors
        exact, grad = wide(x), wide(grad).unflatten(1, (factor.shape[1], -1))
        normed = torch.addcmul(-mean * rstd, exact, rstd).view_as(grad)
        d_scale = normed.mul_(grad).sum(2, keepdim=True)
        d_normed = torch.mul(grad, factor, out=normed).view_as(exact)
        d_x = torch.ops.aten.native_layer_norm_backward(
            d_normed, exact, x.shape[-1:], mean, rstd, None, None, [True, False, False]
        )[0]
        return d_x.type_as(x), grad.sum(2, keepdim=True), d_scale, None


def gated_sum(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """`x + y * gate` in the data type of `x`, for tokens `(b, n, d)` and gates `(b, m, 1, d)` in float32.

    It is not written to `y`, the output of a module: step caches and forward hooks keep those.
    """
    if _is_traced():
        gated = (wide(y).unflatten(1, (gate.shape[1], -1)) * gate).flatten(1, 2)
        return (wide(x) + gated).type_as(x)
    if torch.is_grad_enabled():
        return _GatedSum.apply(x, y, gate)  # type: ignore[no-untyped-call]
    return _gated_sum(x, y, gate)


def _gated_sum(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    base, values = (wide(part).unflatten(1, (gate.shape[1], -1)) for part in (x, y))
    return torch.addcmul(base, values, gate).flatten(1, 2).type_as(x)


class _GatedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
        ctx.save_for_backward(y, gate)
        return _gated_sum(x, y, gate)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y, gate = ctx.saved_tensors
        exact, values = (wide(part).unflatten(1, (gate.shape[1], -1)) for part in (grad, y))
        d_y, d_gate = exact * gate, (exact * values).sum(2, keepdim=True)
        return grad, d_y.flatten(1, 2).type_as(y), d_gate


def rotate(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Applies rotary embeddings to queries or keys, in float32 or higher precision.

    Args:
        x: Queries or keys `(b, n, h, d)`. Adjacent channels form the pairs that are rotated.
        rotary: Cosines and sines `(n, d / 2)`.
    """
    cos, sin = (rearrange(part, "n d -> n 1 d") for part in rotary)
    if torch.compiler.is_compiling():  # torch.compile does not support complex numbers
        even, odd = x[..., 0::2], x[..., 1::2]
        return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).type_as(x)
    wide = x if x.dtype == torch.float64 else x.float()
    pairs = torch.view_as_complex(wide.unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * torch.complex(cos, sin)).flatten(-2).type_as(x)


def rms_norm_rotary(x: Tensor, weight: Tensor, eps: float, rotary: tuple[Tensor, Tensor] | None, heads: int) -> Tensor:
    """RMS norm over all heads, then rotary embedding, of queries or keys. Without gradients it may be written to `x`.

    Args:
        x: `(b, n, d)`.
        weight: Weight of the norm, `(d,)`.
        eps: Epsilon of the norm.
        rotary: Cosines and sines `(n, d / h / 2)`; `None` does not rotate.
        heads: Number of heads.

    Returns:
        `(b, n, h, d / h)`.
    """
    if _is_traced():
        out = F.rms_norm(x, x.shape[-1:], weight, eps).unflatten(-1, (heads, -1))
        return out if rotary is None else rotate(out, rotary)
    turn = None if rotary is None else torch.complex(*rotary)[:, None]
    if torch.is_grad_enabled():
        return _RmsNormRotary.apply(x, weight, turn, eps, heads)  # type: ignore[no-untyped-call]
    exact = wide(x)
    return _normalize(exact.mul_(_rms_scale(exact, eps)), weight, turn, heads).type_as(x)


def _rms_scale(x: Tensor, eps: float) -> Tensor:
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return (norm.square() / x.shape[-1]).add_(eps).rsqrt_()


def _normalize(x: Tensor, weight: Tensor, turn: Tensor | None, heads: int) -> Tensor:
    """Multiplies scaled queries or keys by weights and rotates them, in place."""
    x.mul_(weight)
    if turn is not None:
        torch.view_as_complex(x.view(*x.shape[:2], heads, -1, 2)).mul_(turn)
    return x.view(*x.shape[:2], heads, -1)


class _RmsNormRotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, turn: Tensor | None, eps: float, heads: int) -> Tensor:
        exact = wide(x)
        scale = _rms_scale(exact, eps)
        ctx.save_for_backward(x, weight, scale, turn)
        return _normalize(exact * scale, weight, turn, heads).type_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale, turn = ctx.saved_tensors
        exact, grad = wide(x), wide(grad)
        if turn is not None:
            pairs = torch.view_as_complex(grad.unflatten(-1, (-1, 2)).contiguous())
            grad = torch.view_as_real(pairs * turn.conj()).flatten(-2)
        grad = grad.reshape(x.shape)
        product = exact * grad
        d_weight = torch.einsum("bnd,bn->d", product, scale[..., 0])
        along = (product @ wide(weight))[..., None]
        d_x = grad * weight
        d_x.mul_(scale).addcmul_(exact, along * scale**3 / x.shape[-1], value=-1)
        return d_x.type_as(x), d_weight.type_as(weight), None, None, None
