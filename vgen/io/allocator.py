"""The allocator of CPU memory in programs that process long videos."""

from __future__ import annotations

import ctypes
import os
import sys

_M_MMAP_THRESHOLD = -3  # of mallopt(3)
_THRESHOLD = 2**20


def bound_memory() -> None:
    """Makes glibc return every freed block of 1 MiB or more to the system, in this process and those it starts.

    By default, glibc raises this limit as blocks are freed, and keeps more and more of them on a heap that fragments:
    the memory of a process that works on a video slice by slice grows with its length. PyTorch then asks for huge
    pages for large tensors, because new memory in small pages is slow. Settings in the environment take precedence.
    Other systems are left alone.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # read by PyTorch at its first allocation
    chosen = {"MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES", "LD_PRELOAD"} & os.environ.keys()
    if sys.platform == "linux" and not chosen:
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(_M_MMAP_THRESHOLD, _THRESHOLD)
        os.environ["MALLOC_MMAP_THRESHOLD_"] = str(_THRESHOLD)
