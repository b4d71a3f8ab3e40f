"""One lock per network, for operations that change a network while it is evaluated."""

from threading import RLock
from typing import Any
from weakref import WeakKeyDictionary

_locks: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()


def lock_of(network: Any) -> Any:
    """The lock to hold while a network is evaluated.

    LoRA scales, guiders, step caches and fast tokenizers change objects that all threads share.
    """
    return _locks.setdefault(network, RLock())
