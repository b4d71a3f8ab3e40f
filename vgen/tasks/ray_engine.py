"""Runs the items of a job on a Ray cluster.

Each actor loads its networks once and then works on one item at a time. The driver hands out the items and receives
the results, so it alone knows and records what is done.
"""

from __future__ import annotations

import os
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from vgen.checks import check_integer, check_number
from vgen.tasks.engine import EngineOptions, Worker

MAX_DEATHS = 3
"""How many actors may die on the same item, or one after another in place of the same one while loading."""


class ItemError(RuntimeError):
    """An item that ended every actor that worked on it."""


class _Call(NamedTuple):
    actor: Any
    item: Any = None
    """`None` while the actor loads its worker or shows that it is alive."""
    attempt: int = 1
    """How many actors have loaded in this place, if no item was done since."""


class RayPool:
    """Actors on a Ray cluster, each with its own worker.

    An actor that dies, also with its node, is replaced, and another actor gets its item. If the cluster has no room
    for the replacement, the others go on without it.

    Args:
        load: Creates the worker, in each actor.
        options: Address and resources.
        max_actors: Largest number of actors, if the number of items is known.

    Raises:
        ValueError: A resource is invalid, or the processes were started by accelerate.
        RuntimeError: Actors die while they load their worker.
    """

    def __init__(self, load: Callable[[], Worker], options: EngineOptions, max_actors: int | None = None):
        import ray

        self.ray, self.load, self.options = ray, load, options
        self._ready: list[Any] = []
        self._calls: dict[Any, _Call] = {}  # by the references of their results
        resources = ray.cluster_resources()
        gpus = options.ray_gpus if options.ray_gpus is not None else min(1, resources.get("GPU", 0))
        self._actor_class: Any = ray.remote(num_cpus=options.ray_cpus, num_gpus=gpus)(_Actor)
        room = [resources.get(kind, 0) // one for kind, one in (("CPU", options.ray_cpus), ("GPU", gpus)) if one]
        wanted = options.ray_actors or int(min(room, default=1))
        for _ in range(max(1, wanted if max_actors is None else min(wanted, max_actors))):
            self._start_actor()

    @property
    def settings(self) -> Any:
        """The settings of the first worker that has loaded."""
        while not self._ready:
            self._wait()
        return self._settings

    def map(self, items: Sequence[Any]) -> Iterator[tuple[Any, Any]]:
        """Yields each item with its result, in the order in which they are finished.

        The result of an item that ended `MAX_DEATHS` actors is an `ItemError`.
        """
        queue, deaths, left = deque(items), Counter[int](), len(items)
        while left:
            while queue and self._ready:
                actor, item = self._ready.pop(), queue.popleft()
                self._calls[actor.work.remote(item)] = _Call(actor, item)
            item, result = self._wait()
            if item is None:
                continue
            if isinstance(result, ItemError):
                deaths[id(item)] += 1
                if deaths[id(item)] < MAX_DEATHS:
                    queue.appendleft(item)
                    continue
            left -= 1
            yield item, result

    def close(self) -> None:
        """Ends the actors."""
        for actor in [*self._ready, *(call.actor for call in self._calls.values())]:
            self.ray.kill(actor)

    def _start_actor(self, attempt: int = 1) -> None:
        actor: Any = self._actor_class.remote()
        self._calls[actor.start.remote(self.load, os.getcwd())] = _Call(actor, attempt=attempt)

    def _wait(self) -> tuple[Any, Any]:
        """Waits for one call; returns its item and result."""
        [reference], _ = self.ray.wait(list(self._calls))
        call = self._calls.pop(reference)
        try:
            result = self.ray.get(reference)
        except self.ray.exceptions.RayTaskError as error:
            self._ready.append(call.actor)
            raise error.as_instanceof_cause() from None
        except (self.ray.exceptions.RayActorError, self.ray.exceptions.ObjectLostError) as error:
            self.ray.kill(call.actor)  # it may be alive and only out of reach
            self._replace(call, error)
            return call.item, ItemError(f"{MAX_DEATHS} actors died while they worked on it: {error}")
        self._ready.append(call.actor)
        if call.item is None:
            self._settings = result
        return call.item, result

    def _replace(self, call: _Call, error: Exception) -> None:
        """Starts another actor, and asks the idle ones whether they live, so that no item is lost to a dead one."""
        if call.item is None and call.attempt == MAX_DEATHS:
            raise RuntimeError(f"{MAX_DEATHS} actors died while they loaded the model: {error}") from error
        self._start_actor(1 if call.item is not None else call.attempt + 1)
        while self._ready:
            actor = self._ready.pop()
            self._calls[actor.settings.remote()] = _Call(actor)


class _Actor:
    def start(self, load: Callable[[], Worker], folder: str) -> Any:
        """Loads the worker, in the folder of the driver, so that relative paths have the same meaning."""
        if Path(folder).is_dir():
            os.chdir(folder)
        self.worker = load()
        return self.settings()

    def settings(self) -> Any:
        return self.worker.settings

    def work(self, item: Any) -> Any:
        return self.worker.work(item)


@contextmanager
def ray_pool(load: Callable[[], Worker], options: EngineOptions, max_actors: int | None = None) -> Iterator[RayPool]:
    """Connects to a cluster, or starts one on this machine, and yields its pool of actors.

    Args:
        load: As in `RayPool`.
        options: As in `RayPool`.
        max_actors: As in `RayPool`.

    Raises:
        ImportError: Ray is not installed.
        ValueError: As in `RayPool`.
        ConnectionError: There is no cluster at the address.
    """
    check_options(options)
    try:
        import ray
    except ImportError as error:
        raise ImportError('engine=ray needs the package ray: pip install "vgen[ray]"') from error
    connected = ray.is_initialized()
    if not connected:
        ray.init(address=options.ray_address)
    try:
        pool = RayPool(load, options, max_actors)
        try:
            yield pool
        finally:
            pool.close()
    finally:
        if not connected:
            ray.shutdown()


def check_options(options: EngineOptions) -> None:
    """Checks the options of Ray.

    Raises:
        ValueError: A resource is out of range, or accelerate started several processes.
    """
    if options.ray_actors is not None:
        check_integer("ray_actors", options.ray_actors, 1)
    check_number("ray_cpus", options.ray_cpus, 0)
    if options.ray_gpus is not None:
        check_number("ray_gpus", options.ray_gpus, 0)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("engine=ray starts its own processes: run the script with python, not with accelerate launch")
