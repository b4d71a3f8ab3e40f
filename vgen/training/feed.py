"""Data loading for runs: workers prepare batches in advance, and copies to the device do not block."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from multiprocessing import resource_tracker
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from vgen.training.run import Run, RunConfig, micro_batches

MOST_WORKERS = 4
"""Maximum number of workers per process if the settings do not give a number."""


class StepSampler(Sampler):
    """The parts of each step's batch that this process computes, as `(step, slice)`, from `run.step` on.

    Args:
        run: The run.
        size: Returns the number of samples of a step's batch.
    """

    def __init__(self, run: Run, size: Callable[[int], int]):
        self.run, self.size = run, size

    def __iter__(self) -> Iterator[tuple[int, slice]]:
        config, accelerator = self.run.config, self.run.accelerator
        for step in range(self.run.step, config.max_steps):
            for part in micro_batches(config, accelerator, self.size(step)):
                yield step, part


class Feed:
    """An iterator over the parts of a run's batches, in the order of `run.steps()` and `run.parts()`.

    A batch depends only on its step and part, and neither on the number of workers nor on where a run was interrupted.
    Workers are started when the first batch is requested.

    Args:
        run: The run; the feed starts at `run.step`.
        batches: Dataset of batches, indexed by `(step, slice)`, with tensors on the CPU. Its attribute `max_workers`,
            if present, limits the number of workers.
        size: Returns the number of samples of a step's batch; `None` means `batch_size` in all steps.
    """

    def __init__(self, run: Run, batches: Dataset, size: Callable[[int], int] | None = None):
        self.device = run.accelerator.device
        count = num_workers(run.config, self.device)
        most = getattr(batches, "max_workers", None) if count else None
        count = count if most is None else min(count, most)
        options: dict[str, Any] = {}
        if count:
            options = {"multiprocessing_context": worker_context(), "worker_init_fn": ignore_signals}
        self._loader = DataLoader(
            batches,
            batch_size=None,
            sampler=StepSampler(run, size or (lambda _: run.config.batch_size)),
            num_workers=count,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # seeds workers; the global generator's numbers stay those of the network
            **options,
        )
        self._batches: Iterator[Any] | None = None
        self.close: Callable[[], Any] = lambda: None
        """Stops the workers; also called by the garbage collector and at the end of the program."""

    def __iter__(self) -> Feed:
        return self

    def __next__(self) -> Any:
        """The next part, on the device."""
        if self._batches is None:
            with block_signals_in_children() if self._loader.num_workers else nullcontext():
                self._batches = iter(self._loader)
            # otherwise the program would hang at exit, waiting for workers that ignore SIGTERM
            self.close = weakref.finalize(self, getattr(self._batches, "_shutdown_workers", int))
        return to_device(next(self._batches), self.device)


def num_workers(config: RunConfig, device: torch.device) -> int:
    """Number of workers per process: as configured; by default 0 on the CPU, where training needs all cores."""
    if config.num_workers is not None:
        return config.num_workers
    if device.type == "cpu":
        return 0
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(MOST_WORKERS, max(0, cores // local - 1))


def worker_context() -> Any:
    """The start method of workers: forked from a server that has imported vgen and runs no threads.

    A fork of the training process itself could inherit locks that its threads hold.
    """
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    context.set_forkserver_preload([name for name in sys.modules if name.split(".")[0] == "vgen"])
    return context


SIGNALS = {signal.SIGINT, signal.SIGTERM}
"""Signals that only the training process handles; workers ignore them and end with it."""


def ignore_signals(_: int) -> None:
    """Makes a worker ignore `SIGNALS`."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def block_signals_in_children() -> Iterator[None]:
    """Blocks `SIGNALS` in processes that are started in this context, such as the fork server of workers."""
    resource_tracker.ensure_running()  # its start would unblock them
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def to_device(batch: Any, device: torch.device) -> Any:
    """Moves the tensors of a batch to a device; from pinned memory, without blocking the CPU."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, Mapping):
        return {name: to_device(value, device) for name, value in batch.items()}
    return batch
