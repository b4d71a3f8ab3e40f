"""Written-out gradients equal those of the formulas that they replace."""

import pytest
import torch
import torch.nn.functional as F

from vgen.temporal.attention import RotaryPositions
from vgen.temporal.pointwise import gated_sum, gelu_tanh, modulated_norm, rms_norm_rotary, rotate

B, M, P, H, D = 2, 3, 4, 2, 12


def draw(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


X, Y = draw(B, M * P, H * D, seed=1), draw(B, M * P, H * D, seed=2)
SHIFT, SCALE = draw(B, M, 1, H * D, seed=3), draw(B, M, 1, H * D, seed=4)
ROTARY = tuple(part.double() for part in RotaryPositions(D)(torch.arange(M), 2, 2))


def split(x):
    return x.unflatten(1, (M, P))


def plain_norm(x, shift, scale):
    return (split(F.layer_norm(x, x.shape[-1:], eps=1e-5)) * (1 + scale) + shift).flatten(1, 2)


def plain_rms(x, weight, rotary):
    out = F.rms_norm(x, x.shape[-1:], weight, 1e-5).unflatten(-1, (H, D))
    return out if rotary is None else rotate(out, rotary)


CASES = {
    "gelu": (gelu_tanh, lambda x: F.gelu(x, approximate="tanh"), (3 * X,)),
    "norm": (lambda *args: modulated_norm(*args, 1e-5), plain_norm, (X, SHIFT, SCALE)),
    "norm, one level": (lambda *args: modulated_norm(*args, 1e-5),
                        lambda x, shift, scale: F.layer_norm(x, x.shape[-1:]) * (1 + scale[:, 0]) + shift[:, 0],
                        (X, SHIFT[:, :1], SCALE[:, :1])),
    "gated sum": (gated_sum, lambda x, y, gate: (split(x) + split(y) * gate).flatten(1, 2), (X, Y, SCALE)),
    "rms norm": (lambda x, w: rms_norm_rotary(x, w, 1e-5, None, H), lambda x, w: plain_rms(x, w, None),
                 (X, SHIFT[0, 0, 0])),
    "rms norm and rotation": (lambda x, w: rms_norm_rotary(x, w, 1e-5, ROTARY, H),
                              lambda x, w: plain_rms(x, w, ROTARY), (X, SHIFT[0, 0, 0])),
}  # fmt: skip


@pytest.fixture(params=CASES)
def case(request):
    function, plain, inputs = CASES[request.param]
    return function, plain, [x.clone() for x in inputs]


def test_values_and_gradients_equal_those_of_the_formula(case):
    function, plain, inputs = case
    results = []
    for one in (function, plain):
        given = [x.clone().requires_grad_() for x in inputs]
        out = one(*given)
        (out * draw(*out.shape, seed=5)).sum().backward()
        assert all(torch.equal(x, before) for x, before in zip(given, inputs, strict=True))
        results.append([out, *(x.grad for x in given)])
    torch.testing.assert_close(*results, atol=1e-6, rtol=1e-6)


def test_inference_equals_training(case):
    function, _, inputs = case
    expected = function(*(x.clone().requires_grad_() for x in inputs)).detach()
    with torch.no_grad():
        torch.testing.assert_close(function(*inputs), expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(case, dtype):
    function, plain, inputs = case
    first, *rest = (x.to(dtype) if index == 0 or x.ndim == 3 else x.float() for index, x in enumerate(inputs))
    out = function(first.clone(), *(x.clone() for x in rest))
    expected = plain(*(x.double() for x in (first, *rest)))
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), expected, atol=1e-3, rtol=torch.finfo(dtype).eps)


def test_functional_transforms_use_the_formulas(case):
    function, plain, inputs = case
    tangents = tuple(draw(*x.shape, seed=9) for x in inputs)
    ours, theirs = (torch.func.jvp(one, tuple(inputs), tangents) for one in (function, plain))
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)


def test_a_second_derivative_is_an_error():
    x = X.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(gelu_tanh(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
