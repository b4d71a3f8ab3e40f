"""How fast a run trains, and what share of the machine's arithmetic that is."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count, sdpa_flop_count

BACKWARD = 2
"""Operations of a backward pass, in forward passes."""


class Throughput:
    """Counts what was trained since it was asked last, and measures the machine's peak at the start.

    Args:
        device: That trains.
        dtype: Of its matrix products.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype):
        self._flops: dict[Hashable, int] = {}
        self._peak = matrix_peak(device, dtype)
        self.restart()

    def restart(self) -> None:
        """Forgets what was counted, such as after something else took time."""
        self._clips = self._tokens = self._operations = 0
        self._begin = time.perf_counter()

    def add(self, clips: int, tokens: int, shape: Hashable, forward: Callable[[], Any]) -> None:
        """Counts a part of a batch.

        Args:
            clips: Of the part.
            tokens: Of the part.
            shape: Parts of equal shape take equally many operations.
            forward: The part's forward pass; called once for each shape, without gradients.
        """
        if shape not in self._flops:
            begin = time.perf_counter()
            self._flops[shape] = count_flops(forward)
            self._begin += time.perf_counter() - begin
        self._clips += clips
        self._tokens += tokens
        self._operations += (1 + BACKWARD) * self._flops[shape]

    def take(self) -> dict[str, float]:
        """Clips and tokens a second, and the share of the peak, since it was asked last; then counts anew."""
        seconds = time.perf_counter() - self._begin
        found = {
            "clips_per_second": self._clips / seconds,
            "tokens_per_second": self._tokens / seconds,
            "flops_utilisation": self._operations / seconds / self._peak,
        }
        self.restart()
        return found


def count_flops(call: Callable[[], Any]) -> int:
    """Floating-point operations of the matrix products, convolutions and attention in a call, which runs eagerly.

    Random states stay as they are.
    """
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    aten = torch.ops.aten
    others = {
        aten.mkldnn_convolution: _convolution_flops,
        aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    }
    counter = FlopCounterMode(display=False, custom_mapping=others)
    with torch.random.fork_rng(devices), torch.no_grad(), torch.compiler.set_stance("force_eager"), counter:
        call()
    return counter.get_total_flops()


def _convolution_flops(input_shape: Any, weight_shape: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    """Of the convolutions that `vgen.temporal.conv` asks oneDNN for."""
    return conv_flop_count(list(input_shape), list(weight_shape), list(out_shape))


def _attention_flops(query_shape: Any, key_shape: Any, value_shape: Any, *_: Any, **__: Any) -> int:
    """Of the attention that PyTorch has for CPUs."""
    return sdpa_flop_count(query_shape, key_shape, value_shape)


def matrix_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of the product of two square matrices: the best over sizes up to one that takes long."""
    best, size, seconds = 0.0, 256, 0.0
    generator = torch.Generator(device).manual_seed(0)
    while size <= 8192 and seconds < 0.02:
        a, b = (torch.randn(size, size, device=device, generator=generator).to(dtype) for _ in range(2))
        seconds = min(_time_product(a, b) for _ in range(5))
        best = max(best, 2 * size**3 / seconds)
        size *= 2
    return best


def _time_product(a: Tensor, b: Tensor) -> float:
    _wait(a.device)
    begin = time.perf_counter()
    a @ b
    _wait(a.device)
    return time.perf_counter() - begin


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
