"""What this machine computes fast: its precision, its peak FLOPS and its number of threads."""

from __future__ import annotations

import os
import platform
import time
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate.utils import is_bf16_available
from diffusers.utils import logging
from torch import Tensor

from vgen.processes import rank_and_world_size

logger = logging.get_logger(__name__)

GIB = 2**30
"""Bytes of a GiB."""
OPERATIONS_PER_THREAD = 1e9
"""Floating-point operations of a forward pass that are worth another thread."""

_SECONDS = 0.08
_BLOCK = 256
_SLOW = 1.2  # smaller differences may be noise
_HALF = {"bf16": torch.bfloat16, "bfloat16": torch.bfloat16, "fp16": torch.float16, "float16": torch.float16}
_ALL_THREADS = torch.get_num_threads()


def processor() -> dict[str, Any]:
    """The processor: its name, its number of logical cores, and the instructions that decide what is fast."""
    fields: dict[str, str] = {}
    if Path("/proc/cpuinfo").exists():
        lines = (line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines())
        fields = {name.strip(): value.strip() for name, _, value in lines}
    flags = fields.get("flags", "").split()
    return {
        "name": fields.get("model name") or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "instructions": [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in flags],
    }


@lru_cache
def matrix_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Peak operations per second of square matrix products, the maximum over increasing sizes.

    It takes about a tenth of a second on the first call, and none later.
    """
    block = torch.randn(_BLOCK, _BLOCK, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    _time_product(block)  # libraries start
    best, size, deadline = 0.0, _BLOCK, time.perf_counter() + _SECONDS
    while True:
        a = block.repeat(size // _BLOCK, size // _BLOCK)
        seconds = min(_time_product(a) for _ in range(3))
        best = max(best, 2 * size**3 / seconds)
        size *= 2
        if size > 8192 or time.perf_counter() + 3 * 8 * seconds > deadline:  # the next size takes 8 times as long
            return best


def _time_product(a: Tensor) -> float:
    _wait(a.device)
    begin = time.perf_counter()
    a @ a
    _wait(a.device)
    return time.perf_counter() - begin


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def fast_precision(device: torch.device) -> Literal["no", "bf16"]:
    """The faster of float32 (`no`) and bfloat16 on a device: measured, except on CUDA devices, which report it."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no"
    if not is_bf16_available():
        return "no"
    return "bf16" if matrix_peak(device, torch.bfloat16) > matrix_peak(device, torch.float32) else "no"


def warn_if_slow(device: torch.device, precision: str, setting: str) -> None:
    """Warns if a half precision is clearly slower than float32 on this processor; only the first process does.

    Args:
        device: The device of the networks.
        precision: The requested precision: `bf16`, `fp16`, or the name of a data type.
        setting: The option that avoids it.
    """
    if device.type != "cpu" or precision not in _HALF or rank_and_world_size()[0] != 0:
        return
    dtype = _HALF[precision]
    ratio = matrix_peak(device, torch.float32) / matrix_peak(device, dtype)
    if ratio > _SLOW:
        name = str(dtype).removeprefix("torch.")
        logger.warning(f"{name} takes {ratio:.1f} times as long as float32 on this processor: pass {setting}")


def has_idle_cores() -> bool:
    """Whether this process may use more cores than PyTorch has threads."""
    affinity = getattr(os, "sched_getaffinity", None)
    return torch.get_num_threads() < (len(affinity(0)) if affinity else os.cpu_count() or 1)


def limit_threads(operations: float) -> int:
    """Chooses PyTorch's number of threads in this process: as many as have enough work, at most one for each core.

    Threads wait for each other at every layer. In a small network, this takes longer than what they save, and much
    longer if other programs use the cores. `OMP_NUM_THREADS` and `MKL_NUM_THREADS` take precedence.

    Args:
        operations: Floating-point operations of a forward pass.

    Returns:
        The number of threads.
    """
    if not {"OMP_NUM_THREADS", "MKL_NUM_THREADS"} & os.environ.keys():
        torch.set_num_threads(max(1, min(_ALL_THREADS, round(operations / OPERATIONS_PER_THREAD))))
    return torch.get_num_threads()
