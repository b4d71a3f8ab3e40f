"""Processes started by `accelerate launch` or `torchrun`, on GPUs or on CPUs."""

from __future__ import annotations

import atexit
import os
import time
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env


def on_cpus() -> bool:
    """Whether processes compute on CPUs: `ACCELERATE_USE_CPU` is set, or there is no accelerator."""
    return parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()


def this_process(**options: Any) -> PartialState:
    """Returns accelerate's state of this process: its device, its rank and the world size.

    The first call initializes the process group. Later calls return the same state.

    Args:
        options: Arguments of `torch.distributed.init_process_group`.

    Raises:
        ValueError: As in `check_world_size`.
    """
    process = PartialState(cpu=on_cpus(), **options)
    check_world_size(process.num_processes)
    if process.num_processes > 1:
        atexit.register(drain_gloo_threads)
    return process


def drain_gloo_threads() -> None:
    """Sleeps before the process group is destroyed, so that gloo's threads can finish.

    Destroying the group while a gloo thread waits for the GIL deadlocks (torch 2.13): the thread needs the GIL to
    release its last work, and the destructor waits for the thread.
    """
    time.sleep(1)


def rank_and_world_size() -> tuple[int, int]:
    """The rank of this process and the number of processes; `(0, 1)` without an initialized process group."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def check_world_size(world_size: int) -> None:
    """Checks that the process group has as many processes as were launched.

    Args:
        world_size: Number of processes in the process group.

    Raises:
        ValueError: The launcher announced another number (`WORLD_SIZE`), or `accelerate launch --cpu` was used,
            which always starts a single process.
    """
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if launched != world_size:
        raise ValueError(f"the process group must have WORLD_SIZE={launched} processes, got {world_size}")
    # `--cpu` sets the rendezvous address for the processes, but starts only one
    if world_size == 1 and parse_flag_from_env("ACCELERATE_USE_CPU") and "MASTER_PORT" in os.environ:
        raise ValueError(
            "`accelerate launch --cpu` starts one process, whatever --num_processes says; for several on CPUs, use "
            "ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes N"
        )
