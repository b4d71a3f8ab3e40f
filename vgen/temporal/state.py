"""What a stream remembers between its pieces, as one object that the caller owns."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

_FORMAT = "vgen.TemporalState/1"
_BRANCH = "//"  # separates branch names from keys in a saved file; module paths hold dots only


def register_state_keys(network: nn.Module) -> None:
    """Gives every module of `network` its key in a `TemporalState`; call it once at the end of `__init__`.

    Keys come from the module tree as it is built, so wrappers that later rename paths (DDP, `torch.compile`,
    adapters) leave them alone.
    """
    for name, module in network.named_modules():
        if hasattr(module, "state_key"):
            module.state_key = name


def network_identity(network: Any) -> dict[str, str]:
    """The class and the hash of the configuration that a state is bound to."""
    config = {key: value for key, value in dict(network.config).items() if not key.startswith("_")}
    text = json.dumps(config, sort_keys=True, default=str)
    return {"class": type(network).__name__, "config": hashlib.sha256(text.encode()).hexdigest()[:16]}


class History:
    """One call's reading of a state and what it will leave there.

    Modules read with `get` and leave with `put`; nothing reaches the state before the network's top level commits,
    so a call that fails leaves the state as it was.
    """

    def __init__(self, tensors: dict[str, Tensor]):
        self._old = tensors
        self.new: dict[str, Tensor] = {}

    def get(self, key: str) -> Tensor | None:
        """The tensor that the stream's previous piece left under `key`, or `None` at the first piece."""
        return self._old.get(key)

    def put(self, key: str, value: Tensor) -> None:
        """Leaves `value` under `key` for the next piece."""
        self.new[key] = value


class TemporalState:
    """The memory of a stream: convolution context, keys and values, and frames that wait for company.

    The first network that writes a state binds it: later calls of another network raise. `None` limits are filled
    from that network's config. The object is deliberately no mapping and has no `.to`, because accelerate's hooks
    would hand a module a copy of either; `move_to` moves it.

    Args:
        window: How many recent token frames attention remembers; `None` takes the network's `window`.
        sink: How many token frames from the start of the stream are never forgotten; `None` takes the network's
            `sink`.
    """

    def __init__(self, window: int | None = None, sink: int | None = None):
        for name, value, least in (("window", window, 1), ("sink", sink, 0)):
            if value is not None and value < least:
                raise ValueError(f"{name}={value} token frames is not possible: give at least {least}, or None")
        self.window = window
        self.sink = sink
        self.identity: dict[str, str] | None = None
        self.writable = True
        self.num_frames = 0
        """Token frames in the attention cache, at most `sink + window`."""
        self._tensors: dict[str, Tensor] = {}
        self._branches: dict[str, TemporalState] = {}

    def bind(self, network: Any) -> None:
        """Claims this state for `network`, or checks that it was claimed by its like.

        Raises:
            ValueError: The state holds the stream of another class or configuration.
        """
        identity = network.state_identity
        if self.identity is None:
            if not self.writable:
                return
            self.identity = dict(identity)
            if self.window is None:
                self.window = network.config.get("window")
            if self.sink is None:
                self.sink = network.config.get("sink")
        elif self.identity != identity:
            raise ValueError(
                f"this state belongs to {_describe(self.identity)} and cannot serve {_describe(identity)}: "
                "use one TemporalState for each network"
            )

    def history(self) -> History:
        """What the modules of one call read and write."""
        return History(self._tensors)

    def commit(self, history: History) -> None:
        """Takes over what one call left, unless this view is frozen."""
        if self.writable:
            self._tensors.update((key, value.detach()) for key, value in history.new.items())

    def get(self, key: str) -> Tensor | None:
        """The tensor stored under `key`, or `None`."""
        return self._tensors.get(key)

    def put(self, key: str, value: Tensor) -> None:
        """Stores `value` under `key`.

        Raises:
            RuntimeError: This is a frozen view.
        """
        if not self.writable:
            raise RuntimeError("a frozen view of a TemporalState cannot be written")
        self._tensors[key] = value.detach()

    @property
    def pending(self) -> Tensor | None:
        """Pixel frames `(b, c, n, h, w)`, `0 <= n < s`, that fill no latent yet; `None` before the first piece."""
        return self._tensors.get("pending")

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors, branches included."""
        own = sum(tensor.numel() * tensor.element_size() for tensor in self._tensors.values())
        return own + sum(branch.num_bytes for branch in self._branches.values())

    def frozen(self) -> TemporalState:
        """A view that reads what this state holds and never changes it; for the steps that denoise one chunk."""
        view = TemporalState(self.window, self.sink)
        view.identity = self.identity
        view.writable = False
        view.num_frames = self.num_frames
        view._tensors = self._tensors
        view._branches = {name: branch.frozen() for name, branch in self._branches.items()}
        return view

    def branch(self, name: str) -> TemporalState:
        """An independent part of this state, made at first use: another guidance history or a spatial tile.

        Args:
            name: Any text without "//".
        """
        if _BRANCH in name:
            raise ValueError(f"a branch name must not contain {_BRANCH!r}: {name!r}")
        if name not in self._branches:
            branch = TemporalState(self.window, self.sink)
            branch.writable = self.writable
            self._branches[name] = branch
        return self._branches[name]

    def move_to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> TemporalState:
        """Moves all tensors in place and returns the state; `dtype` applies to floating-point tensors only."""
        for key, tensor in self._tensors.items():
            self._tensors[key] = tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None)
        for branch in self._branches.values():
            branch.move_to(device, dtype)
        return self

    def save(self, path: str | Path) -> None:
        """Writes the state, branches included, to one safetensors file that appears whole or not at all."""
        tensors: dict[str, Tensor] = {}
        headers: dict[str, dict[str, Any]] = {}
        self._collect("", tensors, headers)
        path = Path(path)
        partial = path.with_name(path.name + ".partial")
        try:
            save_file(tensors, partial, metadata={"format": _FORMAT, "branches": json.dumps(headers)})
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | Path) -> TemporalState:
        """Reads a state that `save` wrote.

        Raises:
            ValueError: The file is no saved state.
        """
        root = cls()
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != _FORMAT:
                raise ValueError(f"{path} is not a saved TemporalState ({_FORMAT})")
            for prefix, header in json.loads(metadata["branches"]).items():
                state = root._at(prefix)
                for name in ("window", "sink", "identity", "num_frames"):
                    setattr(state, name, header[name])
            for full_key in file.keys():
                prefix, _, key = full_key.rpartition(_BRANCH)
                root._at(prefix)._tensors[key] = file.get_tensor(full_key)
        return root

    def _at(self, prefix: str) -> TemporalState:
        state = self
        for name in filter(None, prefix.split(_BRANCH)):
            state = state.branch(name)
        return state

    def _collect(self, prefix: str, tensors: dict[str, Tensor], headers: dict[str, dict[str, Any]]) -> None:
        headers[prefix] = {name: getattr(self, name) for name in ("window", "sink", "identity", "num_frames")}
        lead = f"{prefix}{_BRANCH}" if prefix else ""
        tensors.update((lead + key, tensor.contiguous()) for key, tensor in self._tensors.items())
        for name, branch in self._branches.items():
            branch._collect(lead + name, tensors, headers)


def _describe(identity: dict[str, str]) -> str:
    return f"{identity['class']} with config {identity['config']}"
