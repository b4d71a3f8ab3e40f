"""Feeds a run with batches: workers make them ahead of the step, and they arrive on the device without waiting."""

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
"""Workers of a process where the settings leave their number open."""


class StepSampler(Sampler):
    """The parts of each step's batch that this process computes, as `(step, slice)`, from a step on.

    Args:
        run: To feed.
        size: Samples of a step's batch.
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

    What a batch holds is a function of its step and part, so it depends neither on the number of workers nor on where
    a run was interrupted. Workers are started with the first batch.

    Args:
        run: To feed; it begins at `run.step`.
        batches: A batch by `(step, slice)`, as tensors on the CPU and other values. `max_workers`, if it has one,
            bounds the number of workers.
        size: Samples of a step's batch; `None` for always `batch_size`.
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
        """Ends the workers, as leaving the feed to the garbage collector or the end of the program does."""

    def __iter__(self) -> Feed:
        return self

    def __next__(self) -> Any:
        """The next part, on the device."""
        if self._batches is None:
            with deaf_children() if self._loader.num_workers else nullcontext():
                self._batches = iter(self._loader)
            # without it, the program would wait at its end for workers that ignore its request to end
            self.close = weakref.finalize(self, getattr(self._batches, "_shutdown_workers", int))
        return to_device(next(self._batches), self.device)


def num_workers(config: RunConfig, device: torch.device) -> int:
    """Workers of each process: as configured, or by default 0 on the CPU, whose cores the training itself needs."""
    if config.num_workers is not None:
        return config.num_workers
    if device.type == "cpu":
        return 0
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(MOST_WORKERS, max(0, cores // local - 1))


def worker_context() -> Any:
    """How workers start: forked from a server that has imported what this process has, but runs no threads.

    A fork of the training process itself could inherit locks that its threads hold.
    """
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    context.set_forkserver_preload([name for name in sys.modules if name.split(".")[0] == "vgen"])
    return context


SIGNALS = {signal.SIGINT, signal.SIGTERM}
"""Signals to all processes of a run, which only the training process answers: workers end when it does."""


def ignore_signals(_: int) -> None:
    """Lets a worker ignore `SIGNALS`."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def deaf_children() -> Iterator[None]:
    """Lets processes that are started ignore `SIGNALS`, such as the server that workers are forked from."""
    resource_tracker.ensure_running()  # which would let them through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def to_device(batch: Any, device: torch.device) -> Any:
    """A batch whose tensors are on a device, which they reach while the CPU goes on if their memory is pinned."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, Mapping):
        return {name: to_device(value, device) for name, value in batch.items()}
    return batch
