"""The allocator of CPU memory in programs that process long videos."""

from __future__ import annotations

import ctypes
import os
import sys

_M_MMAP_THRESHOLD = -3  # of mallopt(3)
_THRESHOLD = 2**20
_added: set[str] = set()  # variables of the environment that are not the user's


def bound_memory() -> None:
    """Makes glibc return every freed block of 1 MiB or more to the system, in this process and those it starts.

    By default, glibc raises this limit as blocks are freed, and keeps more and more of them on a heap that fragments:
    the memory of a process that works on a video slice by slice grows with its length. PyTorch then asks for huge
    pages for large tensors, because new memory in small pages is slow. Settings in the environment take precedence.
    Other systems are left alone.
    """
    _add("THP_MEM_ALLOC_ENABLE", "1")  # read by PyTorch at its first allocation
    chosen = {"MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES", "LD_PRELOAD"} & os.environ.keys()
    if sys.platform == "linux" and not chosen:
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(_M_MMAP_THRESHOLD, _THRESHOLD)
        _add("MALLOC_MMAP_THRESHOLD_", str(_THRESHOLD))


def usual_environment() -> dict[str, str]:
    """The environment for programs that allocate as usual, such as training.

    A training step allocates the same blocks again and again. Getting each of them from the system anew would take a
    third of its time.
    """
    return {name: value for name, value in os.environ.items() if name not in _added}


def _add(name: str, value: str) -> None:
    if name not in os.environ:
        os.environ[name] = value
        _added.add(name)
