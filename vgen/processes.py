"""The processes that `accelerate launch` or `torchrun` started, on GPUs or on CPUs."""

from __future__ import annotations

import atexit
import os
import time
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env


def on_cpus() -> bool:
    """Whether processes compute on CPUs: they were told so, or there is no accelerator."""
    return parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()


def this_process(**options: Any) -> PartialState:
    """This process among the others, with the device that it computes on.

    Args:
        options: Of `torch.distributed.init_process_group`.

    Raises:
        ValueError: See `check_processes`.
    """
    process = PartialState(cpu=on_cpus(), **options)
    check_processes(process.num_processes)
    if process.num_processes > 1:
        atexit.register(let_threads_finish)
    return process


def let_threads_finish() -> None:
    """Comes before processes part: a thread of gloo's needs the interpreter to drop the last work it did.

    A group that is destroyed before waits for that thread, and the thread for the interpreter, for ever (torch 2.13).
    """
    time.sleep(1)


def place_among_processes() -> tuple[int, int]:
    """The number of this process and how many there are; `(0, 1)` before they were made known to each other."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def check_processes(found: int) -> None:
    """Refuses to run where several processes were asked for and do not know of one another.

    Args:
        found: How many do.

    Raises:
        ValueError: It says how many there should be.
    """
    asked = int(os.environ.get("WORLD_SIZE", 1))
    if asked != found:
        raise ValueError(f"{asked} processes were started, but this one knows of {found}")
    # accelerate says where processes meet, and then starts a single one
    if found == 1 and parse_flag_from_env("ACCELERATE_USE_CPU") and "MASTER_PORT" in os.environ:
        raise ValueError(
            "`accelerate launch --cpu` starts one process, whatever --num_processes says; several on CPUs: "
            "ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes N"
        )
