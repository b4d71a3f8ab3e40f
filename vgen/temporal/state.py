"""What a stream remembers between its pieces, as one object that the caller owns."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from vgen.io.atomic import atomic_file

_FORMAT = "vgen.TemporalState/1"
_HEADER = ("window", "sink", "identity", "num_frames")
_NOT_ARCHITECTURE = ("latents_mean", "latents_std")  # a calibrated VAE continues the streams that it began


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
    config = {
        key: value
        for key, value in dict(network.config).items()
        if not key.startswith("_") and key not in _NOT_ARCHITECTURE
    }
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
            ValueError: The state holds the stream of another class or configuration, or would be written twice
                under gradient checkpointing.
        """
        if self.writable and torch.is_grad_enabled() and getattr(network, "is_gradient_checkpointing", False):
            raise ValueError(
                "a writable state under gradient checkpointing would be written twice: use state.frozen(), "
                "torch.no_grad() or disable_gradient_checkpointing()"
            )
        identity = network.state_identity
        if self.identity is None:
            if self.writable:
                self.identity = dict(identity)
            self.window = network.config.get("window") if self.window is None else self.window
            self.sink = network.config.get("sink") if self.sink is None else self.sink
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
        view._tensors = dict(self._tensors)
        view._branches = {name: branch.frozen() for name, branch in self._branches.items()}
        return view

    def copy(self) -> TemporalState:
        """An independent state that continues the same stream; writable, also where this is a frozen view."""
        copy = TemporalState()
        for name in _HEADER:
            setattr(copy, name, getattr(self, name))
        copy._tensors = {key: tensor.clone() for key, tensor in self._tensors.items()}
        copy._branches = {name: branch.copy() for name, branch in self._branches.items()}
        return copy

    def has_branch(self, name: str) -> bool:
        """Whether `branch` was called with this name."""
        return name in self._branches

    def branch(self, name: str) -> TemporalState:
        """An independent part of this state, made at first use: another guidance history or a spatial tile."""
        if name not in self._branches:
            branch = TemporalState(self.window, self.sink)
            branch.writable = self.writable
            self._branches[name] = branch
        return self._branches[name]

    def move_to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> TemporalState:
        """Moves all tensors and returns the state; `dtype` applies to floating-point tensors only.

        A frozen view that is moved leaves the state that it views where it was.
        """
        self._tensors = {
            key: tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None)
            for key, tensor in self._tensors.items()
        }
        for branch in self._branches.values():
            branch.move_to(device, dtype)
        return self

    def save(self, path: str | Path) -> None:
        """Writes the state, branches included, to one safetensors file that appears whole or not at all."""
        tensors: dict[str, Tensor] = {}
        headers: list[dict[str, Any]] = []
        for number, (names, state) in enumerate(self._walk(())):
            headers.append({"branch": names} | {name: getattr(state, name) for name in _HEADER})
            tensors.update((f"{number}/{key}", tensor.contiguous()) for key, tensor in state._tensors.items())
        with atomic_file(Path(path)) as partial:
            save_file(tensors, partial, metadata={"format": _FORMAT, "branches": json.dumps(headers)})

    @classmethod
    def load(cls, path: str | Path) -> TemporalState:
        """Reads a state that `save` wrote.

        Raises:
            ValueError: The file is no saved state.
        """
        root = cls()
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                # copies lie where PyTorch aligns them, on which the rounding of some processors' kernels depends
                tensors = {key: file.get_tensor(key).clone() for key in file.keys()}
        except SafetensorError as error:
            raise ValueError(f"{path} is not a saved TemporalState: {error}") from error
        if metadata.get("format") != _FORMAT:
            raise ValueError(f"{path} is not a saved TemporalState ({_FORMAT})")
        for number, header in enumerate(json.loads(metadata["branches"])):
            state = root
            for name in header["branch"]:
                state = state.branch(name)
            for name in _HEADER:
                setattr(state, name, header[name])
            lead = f"{number}/"
            state._tensors = {key[len(lead) :]: value for key, value in tensors.items() if key.startswith(lead)}
        return root

    def _walk(self, names: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], TemporalState]]:
        yield names, self
        for name, branch in self._branches.items():
            yield from branch._walk((*names, name))


def _describe(identity: dict[str, str]) -> str:
    return f"{identity['class']} with config {identity['config']}"
