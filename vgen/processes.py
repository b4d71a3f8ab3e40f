"""Processes started by `accelerate launch` or `torchrun`, on GPUs or on CPUs."""

from __future__ import annotations

import atexit
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object, parse_flag_from_env

from vgen.io.atomic import locked
from vgen.io.remote import is_url


def on_cpus() -> bool:
    """Whether processes compute on CPUs: `ACCELERATE_USE_CPU` is set, or there is no accelerator."""
    return parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()


def has_bfloat16(device: torch.device) -> bool:
    """Whether a device computes in bfloat16. Other CPUs emulate it: a matrix product takes tens of times as long."""
    try:
        return device.type != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    except AttributeError:  # a build without oneDNN
        return False


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


def on_several_machines() -> bool:
    """Whether the launcher started processes on other machines too."""
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    return world_size > int(os.environ.get("LOCAL_WORLD_SIZE", world_size))


def from_main_process(value: Any) -> Any:
    """The main process's `value`, in all processes."""
    values = [value]
    broadcast_object_list(values)
    return values[0]


@contextmanager
def locked_output_dir(folder: Path) -> Iterator[None]:
    """Holds the lock of an output folder in the main process; all processes must enter it. URLs have no locks.

    Raises:
        ValueError: Another command writes to the folder. The error says which one; all processes raise it.
    """
    with ExitStack() as stack:
        error = None
        if this_process().is_main_process and not is_url(folder):
            try:
                stack.enter_context(locked(folder, folder / ".lock"))
            except ValueError as in_use:
                error = str(in_use)
        if error := from_main_process(error):
            raise ValueError(error)
        yield


def check_shared_folder(folder: Path, wait: float = 60.0) -> None:
    """Checks that all processes see the files that the main process writes to a folder; creates the folder.

    Args:
        folder: The folder.
        wait: How long a new file may take to appear on other machines, in seconds; network file systems cache folders.

    Raises:
        ValueError: Some processes do not see them. All processes raise it.
    """
    process = PartialState()
    probe = folder / f".shared-{from_main_process(uuid4().hex)}"
    if process.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
    process.wait_for_everyone()
    deadline = time.monotonic() + wait
    while not (seen := probe.exists()) and time.monotonic() < deadline:
        time.sleep(0.1)
    blind = [rank for rank, found in enumerate(gather_object([seen])) if not found]
    if process.is_main_process:
        probe.unlink()
    if blind:
        raise ValueError(
            f"output_dir must be a folder that all machines share, but processes {', '.join(map(str, blind))} do not "
            f"see the files that process 0 writes to {folder}"
        )
