"""What runs the items of a job: the processes of `accelerate launch`, or a Ray cluster."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

Engine = Literal["accelerate", "ray"]


@dataclass(kw_only=True)
class EngineOptions:
    """Where a job runs."""

    engine: Engine = "accelerate"
    """`accelerate`: the processes of `accelerate launch`. `ray`: actors on a Ray cluster (extra `ray`)."""
    ray_address: str | None = None
    """Address of the Ray cluster, such as `auto`; by default the cluster of `RAY_ADDRESS`, or a new one on this
    machine."""
    ray_actors: int | None = None
    """Number of Ray actors, each with its own copy of the model; by default as many as the cluster has room for."""
    ray_cpus: float = 1.0
    """CPUs of each Ray actor."""
    ray_gpus: float | None = None
    """GPUs of each Ray actor; by default 1 if the cluster has GPUs, otherwise 0."""


ENGINE_OPTIONS = tuple(EngineOptions.__dataclass_fields__)
"""Names of the options, which have no influence on the results."""


@dataclass(frozen=True)
class Worker:
    """What a process or an actor has loaded to work on items."""

    settings: Any
    """What all items share, the same in every process."""
    work: Callable[[Any], Any]
    """Does one item and returns its result."""
