"""The memory of a stream between calls of a network, as one object that the caller owns.

A stream is a video that is processed in consecutive parts, one call per part.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from vgen.checks import check_choice, check_integer
from vgen.io.atomic import atomic_file
from vgen.io.fingerprint import digest_json
from vgen.temporal.grid import Positions

_FORMAT = "vgen.TemporalState/2"
_HEADER = ("window", "sink", "positions", "identity", "num_frames")
_IGNORED_SETTINGS = ("latents_mean", "latents_std")  # calibration may change these within a stream


def register_state_keys(network: nn.Module) -> None:
    """Sets `state_key`, the key in a `TemporalState`, of every module of `network` that has this attribute.

    Call it once at the end of `__init__`. Keys are the module paths at that time, so wrappers that rename paths later
    (DDP, `torch.compile`, adapters) do not change them.
    """
    for name, module in network.named_modules():
        if hasattr(module, "state_key"):
            module.state_key = name


def network_identity(network: Any) -> dict[str, str]:
    """The class of a network and a hash of its config, which a `TemporalState` is bound to."""
    config = {
        key: value
        for key, value in dict(network.config).items()
        if not key.startswith("_") and key not in _IGNORED_SETTINGS
    }
    return {"class": type(network).__name__, "config": digest_json(config)[:16]}


class History:
    """Reads and pending writes of one call on a state.

    Modules read with `get` and write with `put`. Writes reach the state only when the network's top level calls
    `TemporalState.commit`, so a call that fails leaves the state unchanged.

    Args:
        tensors: Contents of the state before the call, by key.
        at_once: Whether to write at once instead. The old tensors are then freed during the call, which saves memory,
            but the state is lost if the call fails.
    """

    def __init__(self, tensors: dict[str, Tensor], at_once: bool = False):
        self._old = tensors
        self.new: dict[str, Tensor] = tensors if at_once else {}

    def get(self, key: str) -> Tensor | None:
        """The tensor that the previous call stored under `key`; `None` in the first call of a stream."""
        return self._old.get(key)

    def put(self, key: str, value: Tensor) -> None:
        """Stores `value` under `key` for the next call, once it is committed."""
        self.new[key] = value


class TemporalState:
    """The memory of a stream: convolution context, the KV cache, and buffered frames that do not fill a latent yet.

    The first network that writes to a state binds it to its class and config. Later calls with another network raise.
    The object is not a mapping and has no `.to`, because accelerate's hooks copy such arguments; use `move_to`.

    Args:
        window: Number of recent token frames in the KV cache. `None` uses the network's `window`.
        sink: Number of token frames from the start of the stream that are never evicted from the KV cache. `None` uses
            the network's `sink`.
        positions: Time positions of token frames in attention. `relative` counts from the oldest frame in the KV
            cache, so that they stay below `sink + window`. `absolute` counts from the start of the stream, so the
            distance between the sink and new frames grows. Without a sink, both give the same results.

    Raises:
        ValueError: `window` is not an integer of at least 1, or `sink` not one of at least 0, or `positions` is
            unknown.
    """

    def __init__(self, window: int | None = None, sink: int | None = None, positions: Positions = "relative"):
        for name, value, least in (("window", window, 1), ("sink", sink, 0)):
            if value is not None:
                check_integer(name, value, least)
        check_choice("positions", positions, Positions)
        self.window = window
        self.sink = sink
        self.positions: Positions = positions
        self.identity: dict[str, str] | None = None
        self.writable = True
        self.writes_at_once = False
        """Whether calls free old tensors as they go, which saves memory; then a call that fails spoils the state."""
        self._num_frames: int | None = 0
        self.derived: dict[Any, Any] = {}
        """What networks compute from the tensors of a frozen view, to compute it once."""
        self._tensors: dict[str, Tensor] = {}
        self._branches: dict[str, TemporalState] = {}

    def bind(self, network: Any) -> None:
        """Binds this state to a network; if it is bound already, checks that the class and config are the same.

        Limits that are `None` are set from the network's config. A frozen view is checked, but never binds.

        Raises:
            ValueError: The state belongs to a network of another class or config. Or gradient checkpointing is
                enabled, whose second forward pass would write to the state again. Or the network is compiled with CUDA
                graphs, which overwrite their outputs, and so the state, at the next call.
        """
        if getattr(network, "uses_cuda_graphs", False):
            raise ValueError(
                "a network compiled with mode='reduce-overhead' or 'max-autotune' overwrites its earlier outputs, "
                "which a state keeps: compile it with mode='default' or 'max-autotune-no-cudagraphs'"
            )
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
                f"this state belongs to {_describe(self.identity)} and cannot be used with {_describe(identity)}: "
                "use one TemporalState for each network"
            )

    def history(self) -> History:
        """Starts a call: returns the object that its modules read from and write to."""
        return History(self._tensors, self.writes_at_once)

    def commit(self, history: History) -> None:
        """Stores the writes of one call. In a frozen view this does nothing."""
        if self.writable and history.new is not self._tensors:
            self._tensors.update((key, value.detach()) for key, value in history.new.items())

    def get(self, key: str) -> Tensor | None:
        """The tensor stored under `key`, or `None`."""
        return self._tensors.get(key)

    def put(self, key: str, value: Tensor) -> None:
        """Stores `value`, detached, under `key`.

        Raises:
            RuntimeError: This is a frozen view.
        """
        if not self.writable:
            raise RuntimeError("a frozen view of a TemporalState is read-only: use copy() for a writable state")
        self._tensors[key] = value.detach()

    @property
    def num_frames(self) -> int:
        """Token frames in the KV cache, at most `sink + window`."""
        if self._num_frames is None:
            assert self.window is not None
            self._num_frames = min(int(self._tensors["frames"]), self.window + (self.sink or 0))
        return self._num_frames

    @num_frames.setter
    def num_frames(self, value: int) -> None:
        self._num_frames = value

    def forget_num_frames(self) -> None:
        """Reads `num_frames` from the tensors at its next use, which waits for the device."""
        self._num_frames = None

    @property
    def pending(self) -> Tensor | None:
        """Buffered pixel frames `(b, c, n, h, w)` that do not fill a latent yet; `None` before the first call.

        `n` is at least 0 and below the VAE's temporal compression.
        """
        return self._tensors.get("pending")

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors, including those of branches."""
        own = sum(tensor.numel() * tensor.element_size() for tensor in self._tensors.values())
        return own + sum(branch.num_bytes for branch in self._branches.values())

    def frozen(self) -> TemporalState:
        """Returns a read-only snapshot, for example for the denoising steps of a chunk.

        Calls with the snapshot never change this state, and later calls with this state never change the snapshot. It
        shares the tensors until this state is written to, so until then it costs no memory.
        """
        view = TemporalState(self.window, self.sink, self.positions)
        view.identity = self.identity
        view.writable = False
        view._num_frames = self._num_frames
        view._tensors = dict(self._tensors)
        view._branches = {name: branch.frozen() for name, branch in self._branches.items()}
        return view

    def copy(self) -> TemporalState:
        """Returns an independent copy that continues the same stream.

        All tensors are cloned, including those of branches. The copy is writable, even if this is a frozen view.
        """
        copy = TemporalState()
        for name in _HEADER:
            setattr(copy, name, getattr(self, name))
        copy._tensors = {key: tensor.clone() for key, tensor in self._tensors.items()}
        copy._branches = {name: branch.copy() for name, branch in self._branches.items()}
        return copy

    def has_branch(self, name: str) -> bool:
        """Whether a branch of this name exists."""
        return name in self._branches

    def branch(self, name: str) -> TemporalState:
        """Returns the nested state of this name, which is created at first use.

        It has this state's `window`, `sink` and `positions`, but its own tensors. History guidance keeps its noisier
        copy of the history in a branch, and a tiled VAE has one branch per tile. `copy`, `frozen`, `save`, `move_to`
        and `num_bytes` include branches.
        """
        if name not in self._branches:
            branch = TemporalState(self.window, self.sink, self.positions)
            branch.writable, branch.writes_at_once = self.writable, self.writes_at_once
            self._branches[name] = branch
        return self._branches[name]

    def move_to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> TemporalState:
        """Moves all tensors, including those of branches, in place and returns the state.

        Moving a frozen view does not move the original.

        Args:
            device: Target device; `None` keeps the device.
            dtype: Target type of floating-point tensors; `None` keeps the types.
        """
        self.derived = {}
        self._tensors = {
            key: tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None)
            for key, tensor in self._tensors.items()
        }
        for branch in self._branches.values():
            branch.move_to(device, dtype)
        return self

    def save(self, path: str | Path) -> None:
        """Writes the state and its branches to one safetensors file, atomically: an error leaves an older file."""
        tensors: dict[str, Tensor] = {}
        headers: list[dict[str, Any]] = []
        for number, (names, state) in enumerate(self._walk(())):
            headers.append({"branch": names} | {name: getattr(state, name) for name in _HEADER})
            tensors.update((f"{number}/{key}", tensor.contiguous()) for key, tensor in state._tensors.items())
        with atomic_file(Path(path)) as partial:
            save_file(tensors, partial, metadata={"format": _FORMAT, "branches": json.dumps(headers)})

    @classmethod
    def load(cls, path: str | Path) -> TemporalState:
        """Reads a state that `save` wrote. The result is writable.

        Raises:
            ValueError: The file is not a saved state.
        """
        root = cls()
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                # clones have PyTorch's memory alignment, which affects the rounding of some CPU kernels
                tensors = {key: file.get_tensor(key).clone() for key in file.keys()}
            if metadata.get("format") != _FORMAT:
                raise ValueError(f"expected {_FORMAT}, got {metadata.get('format')}")
            for number, header in enumerate(json.loads(metadata["branches"])):
                state = root
                for name in header["branch"]:
                    state = state.branch(name)
                for name in _HEADER:
                    setattr(state, name, header[name])
                lead = f"{number}/"
                state._tensors = {key[len(lead) :]: value for key, value in tensors.items() if key.startswith(lead)}
        except (SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"{path} is not a saved TemporalState: {error}") from error
        return root

    def _walk(self, names: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], TemporalState]]:
        yield names, self
        for name, branch in self._branches.items():
            yield from branch._walk((*names, name))


def _describe(identity: dict[str, str]) -> str:
    return f"{identity['class']} with config {identity['config']}"
