"""Training throughput and model FLOPs utilization (MFU)."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count, sdpa_flop_count

from vgen.machine import matrix_peak

BACKWARD = 2
"""Operations of a backward pass, relative to a forward pass."""


class Throughput:
    """Measures clips and tokens per second, and the fraction of the peak FLOPS, measured before the first report.

    The peak is that of matrix products in float32 or bfloat16, whichever is faster, whatever precision is used.

    Args:
        device: Training device.
    """

    def __init__(self, device: torch.device):
        self._flops: dict[Hashable, int] = {}
        self._device = device
        self.restart()

    def restart(self) -> None:
        """Resets the counters, for example after an evaluation."""
        self._clips = self._tokens = self._operations = 0
        self._begin = time.perf_counter()

    def add(self, clips: int, tokens: int, shape: Hashable, forward: Callable[[], Any]) -> None:
        """Counts a part of a batch.

        Args:
            clips: Number of clips in the part.
            tokens: Number of tokens in the part.
            shape: Key of the number of operations; parts with equal keys take equally many.
            forward: The forward pass of the part; called once for each key, without gradients.
        """
        if shape not in self._flops:
            begin = time.perf_counter()
            self._flops[shape] = count_flops(forward)
            self._begin += time.perf_counter() - begin
        self._clips += clips
        self._tokens += tokens
        self._operations += (1 + BACKWARD) * self._flops[shape]

    def take(self) -> dict[str, float]:
        """Clips and tokens per second and the fraction of the peak since the last call; resets the counters."""
        seconds = time.perf_counter() - self._begin
        peak = max(matrix_peak(self._device, dtype) for dtype in (torch.float32, torch.bfloat16))
        found = {
            "clips_per_second": self._clips / seconds,
            "tokens_per_second": self._tokens / seconds,
            "flops_utilization": self._operations / seconds / peak,
        }
        self.restart()
        return found


def count_flops(call: Callable[[], Any]) -> int:
    """Floating-point operations of the matrix products, convolutions and attention in an eager call.

    Random states are preserved.
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
    """Operations of oneDNN convolutions, which `vgen.temporal.conv` uses."""
    return conv_flop_count(list(input_shape), list(weight_shape), list(out_shape))


def _attention_flops(query_shape: Any, key_shape: Any, value_shape: Any, *_: Any, **__: Any) -> int:
    """Operations of PyTorch's attention for CPUs."""
    return sdpa_flop_count(query_shape, key_shape, value_shape)
