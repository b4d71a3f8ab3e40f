"""Attention over space and time: frame groups, rotary positions, and the KV cache.

Axes: `b` batch, `n` tokens or token frames, `h` heads, `p` tokens per token frame, `d` channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import _AttentionBackendRegistry, dispatch_attention_fn
from einops import rearrange, repeat
from torch import Tensor, nn

from vgen.checks import check_choice, shown
from vgen.temporal.pointwise import rms_norm_rotary, rotate
from vgen.temporal.state import TemporalState

# torch.compile traces them as single operations: tracing their parsing of patterns takes most of a compilation's time
torch.compiler.allow_in_graph(rearrange)
torch.compiler.allow_in_graph(repeat)

GroupMode = Literal["full", "causal", "chunk"]
Groups = str | Sequence[int] | Sequence[Sequence[int]] | Tensor
GroupIds = Tensor | tuple[tuple[int, ...], ...] | None
"""Group ids `(n,)` or `(b, n)` as a tensor, or rows of integers, one for all videos or one each; `None` for full."""
Span = tuple[int, int]

LONGEST_MASKED = 512
"""Frame groups of up to this many keys use an attention mask; more keys are processed group by group, without one."""

# prefixes of the names of backends that reject or ignore an attention mask
_MASKLESS_BACKENDS = (
    "flash",
    "sage",
    "aiter",
    "native_flash",
)


def make_groups(mode: str, num_frames: int, num_leading: int = 0, chunk_size: int = 1) -> list[int]:
    """Converts a group mode to one group id per token frame.

    Frame i attends to frame j iff `groups[j] <= groups[i]`.

    Args:
        mode: `full`: leading known frames are group 0 and all others group 1. `causal`: 0, 1, 2, ... `chunk`: frame 0
            alone, then runs of `chunk_size` frames, which restart at the first generated frame.
        num_frames: Number of token frames.
        num_leading: Number of leading token frames that are known.
        chunk_size: Token frames per run in `chunk` mode.

    Raises:
        ValueError: The mode is unknown.
    """
    check_choice("groups", mode, GroupMode)
    if mode == "full":
        return [int(frame >= num_leading) for frame in range(num_frames)]
    if mode == "causal":
        return list(range(num_frames))
    starts = {0, *range(1, num_leading, chunk_size), *range(max(num_leading, 1), num_frames, chunk_size)}
    groups: list[int] = []
    for frame in range(num_frames):
        groups.append((groups[-1] if groups else -1) + (frame in starts))
    return groups


def widest_mode(group_modes: Sequence[str]) -> str:
    """The group mode for whole videos: `full` if a network was trained with it, else its first mode."""
    return "full" if "full" in group_modes else group_modes[0]


def check_groups(groups: Any) -> None:
    """Checks group ids that a user passes; their shape is checked where the number of frames is known.

    Raises:
        ValueError: They are not integers.
    """
    try:
        ids = torch.as_tensor(groups)
    except (TypeError, ValueError, RuntimeError, KeyError):
        ids = torch.zeros(())
    if not ids.ndim or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise ValueError(f"groups must be a group mode or integers, got {shown(groups)}")


class Run(NamedTuple):
    """Tokens that attend to the same keys, both as `(begin, end)` of consecutive tokens."""

    queries: tuple[Span, ...]
    keys: tuple[Span, ...]


def group_ids(groups: Groups, num_frames: int, chunk_size: int) -> GroupIds:
    """Converts the `groups` argument of a denoiser to group ids.

    Args:
        groups: A group mode, or integers `(n,)` or `(b, n)`.
        num_frames: Number of token frames, `n`.
        chunk_size: Token frames per run in `chunk` mode.

    Returns:
        A tensor as it is; rows of integers; or `None` if all frames attend to all frames.

    Raises:
        ValueError: The mode is unknown, or the integers have another shape.
    """
    if isinstance(groups, str) and groups == "full":  # also if the number of frames is symbolic
        return None
    if isinstance(groups, str):
        groups = make_groups(groups, num_frames, 0, chunk_size)
    shape: tuple[int | None, ...]
    shape = tuple(groups.shape) if isinstance(groups, Tensor) else _list_shape(groups)
    if not 1 <= len(shape) <= 2 or shape[-1] != num_frames or None in shape:
        raise ValueError(
            f"groups must have shape ({num_frames},) or (batch, {num_frames}), one integer per token frame, "
            f"got {shape}"
        )
    if isinstance(groups, Tensor):
        return groups
    nested: Any = groups if len(shape) == 2 else [groups]
    rows = tuple(tuple(int(group) for group in row) for row in nested)
    rows = rows[:1] if len(set(rows)) == 1 else rows
    return None if all(len(set(row)) == 1 for row in rows) else rows


def _list_shape(x: Any) -> tuple[int | None, ...]:
    """The shape of a nested list; `None` where lengths differ."""
    if not hasattr(x, "__len__"):
        return ()
    shapes = {_list_shape(entry) for entry in x} or {()}
    return len(x), *(shapes.pop() if len(shapes) == 1 else (None,))


def group_runs(row: Sequence[int], num_cached: int = 0, num_isolated: int = 0, tokens: int = 1) -> tuple[Run, ...]:
    """Divides the tokens of one video into runs that attend to the same keys.

    Args:
        row: Group id of each token frame.
        num_cached: Number of token frames in the KV cache, whose keys come first. Every frame attends to all of them.
        num_isolated: Number of token frames at the end that attend to themselves only, each alone.
        tokens: Tokens per token frame.
    """
    runs = []
    for group in sorted(set(row)):
        queries = [frame for frame, other in enumerate(row) if other == group]
        keys = [*range(-num_cached, 0), *(frame for frame, other in enumerate(row) if other <= group)]
        runs.append((queries, keys))
    runs += [([frame], [frame]) for frame in range(len(row), len(row) + num_isolated)]
    return tuple(Run(_spans(queries, 0, tokens), _spans(keys, num_cached, tokens)) for queries, keys in runs)


def _spans(frames: Sequence[int], offset: int, tokens: int) -> tuple[Span, ...]:
    """Sorted frames as spans of consecutive tokens."""
    breaks = [index for index in range(1, len(frames)) if frames[index] != frames[index - 1] + 1]
    parts = [frames[begin:end] for begin, end in zip([0, *breaks], [*breaks, len(frames)], strict=True)]
    return tuple(((part[0] + offset) * tokens, (part[-1] + 1 + offset) * tokens) for part in parts)


def runs_mask(rows: Sequence[Sequence[Run]], like: Tensor) -> Tensor:
    """The additive mask `(b | 1, 1, q, k)` of runs. It is filled in on the device, without copies from the host."""
    ends = [(run.queries[-1][1], run.keys[-1][1]) for run in rows[0]]
    size = (max(query for query, _ in ends), max(key for _, key in ends))
    masks = {}
    for row in dict.fromkeys(rows):
        mask = like.new_full(size, float("-inf"))
        for run in row:
            for begin, end in run.queries:
                for first, last in run.keys:
                    mask[begin:end, first:last] = 0
        masks[row] = mask
    return torch.stack([masks[row] for row in rows]).unsqueeze(1)


def attention_mask(
    ids: GroupIds,
    takes_mask: bool,
    like: Tensor,
    *,
    num_cached: int = 0,
    num_isolated: int = 0,
    tokens: int = 1,
) -> Any:
    """What the `attention_mask` of `SpacetimeAttention` must be for group ids.

    Args:
        ids: From `group_ids`.
        takes_mask: Whether the attention backend takes a mask.
        like: A tensor that sets the data type and the device of a mask.
        num_cached: Number of token frames in the KV cache. Every frame attends to all of them.
        num_isolated: Number of token frames after those of `ids` that attend to themselves only.
        tokens: Tokens per token frame.

    Returns:
        `None`, an additive mask `(b | 1, 1, n * tokens, (num_cached + n) * tokens)`, or runs, one tuple for all videos
        or one each. Integers give runs if the backend takes no mask or the mask would be large.
    """
    if isinstance(ids, Tensor):
        mask = group_mask(ids.to(like.device, non_blocking=True), num_cached, like.dtype)
        mask = mask if num_isolated == 0 else _isolate(mask, num_isolated)
        return mask if tokens == 1 else repeat(mask, "b i q k -> b i (q p) (k r)", p=tokens, r=tokens)
    if ids is None:
        return None
    rows = tuple(group_runs(row, num_cached, num_isolated, tokens) for row in ids)
    num_keys = (num_cached + len(ids[0]) + num_isolated) * tokens
    return runs_mask(rows, like) if takes_mask and num_keys <= LONGEST_MASKED else rows


def group_mask(groups: Tensor, num_cached: int, dtype: torch.dtype) -> Tensor:
    """Builds the additive attention mask over token frames.

    Args:
        groups: Group ids `(n,)` or `(b, n)`.
        num_cached: Number of token frames in the KV cache. Every frame attends to all of them.
        dtype: Data type of the mask.

    Returns:
        A mask `(b | 1, 1, n, num_cached + n)` with 0 where attention is allowed and -inf elsewhere.
    """
    groups = groups if groups.ndim == 2 else groups[None]
    hidden = rearrange(groups, "b n -> b 1 1 n") > rearrange(groups, "b n -> b 1 n 1")
    mask = torch.zeros(hidden.shape, dtype=dtype, device=groups.device).masked_fill(hidden, float("-inf"))
    return nn.functional.pad(mask, (num_cached, 0))


def _isolate(mask: Tensor, num_isolated: int) -> Tensor:
    """Extends a mask by frames that attend to themselves only, and that no other frame attends to."""
    n = mask.shape[-1]
    mask = nn.functional.pad(mask, (0, num_isolated, 0, num_isolated), value=float("-inf"))
    mask[..., n:, n:].diagonal(dim1=-2, dim2=-1).fill_(0)
    return mask


class RotaryPositions(nn.Module):
    """Rotary position embeddings of time, height and width.

    The channels of a head are split between the three axes as in Wan. Angles are computed at each call instead of read
    from a table, so positions have no upper limit.

    Args:
        head_dim: Channels per head.
        theta: Base of the frequencies.

    Source: RoFormer, arXiv 2104.09864; diffusers' `WanRotaryPosEmbed`.
    """

    def __init__(self, head_dim: int, theta: float = 10000.0) -> None:
        super().__init__()
        side = 2 * (head_dim // 6)
        self.dims = (head_dim - 2 * side, side, side)
        self.theta = theta

    def forward(self, frames: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
        """Computes the rotary angles of a grid of tokens.

        Args:
            frames: Time positions of the token frames, `(n,)`.
            height: Token rows.
            width: Token columns.

        Returns:
            Cosines and sines, float32 `(n * height * width, d / 2)`.
        """
        device = frames.device
        axes = (frames, torch.arange(height, device=device), torch.arange(width, device=device))
        t, h, w = (self._angles(axis, dim) for axis, dim in zip(axes, self.dims, strict=True))
        n = frames.shape[0]
        angles = torch.cat(
            [
                repeat(t, "n d -> (n h w) d", h=height, w=width),
                repeat(h, "h d -> (n h w) d", n=n, w=width),
                repeat(w, "w d -> (n h w) d", n=n, h=height),
            ],
            dim=-1,
        )
        return angles.cos().float(), angles.sin().float()

    def _angles(self, positions: Tensor, dim: int) -> Tensor:
        precise = torch.float32 if positions.device.type == "mps" else torch.float64
        exponents = torch.arange(0, dim, 2, dtype=precise, device=positions.device) / dim
        return torch.outer(positions.to(precise), 1.0 / self.theta**exponents)


class HeadsRMSNorm(nn.RMSNorm):
    """RMS norm of queries or keys over all heads, and their rotary embedding."""

    def forward(self, x: Tensor, rotary_emb: tuple[Tensor, Tensor] | None = None, heads: int = 0) -> Tensor:
        """Maps `(b, n, h * d)` to `(b, n, h, d)`.

        Args:
            x: Queries or keys.
            rotary_emb: Cosines and sines `(n, d / 2)`; `None` does not rotate.
            heads: Number of heads; 0 only normalizes, and maps `(b, n, h * d)` to the same shape.
        """
        if heads == 0:
            return super().forward(x)
        return rms_norm_rotary(x, self.weight, self.eps, rotary_emb, heads)  # type: ignore[arg-type]


class FrameCache:
    """The KV cache of a stream: keys and values of past token frames, in the ring buffers of a `TemporalState`.

    It keeps the first `sink` token frames of the stream and the most recent `window` ones. Positions are those that
    `TemporalState` describes: relative ones stay below `sink + window`, however long the stream is.

    Args:
        state: The state that holds the buffers. Its window must be set.

    Raises:
        ValueError: The state has no window.
    """

    def __init__(self, state: TemporalState, padded: bool = False) -> None:
        if state.window is None:
            raise ValueError("attention with a state needs a window: set TemporalState(window=...) or the config's")
        self.state = state
        self.sink = state.sink or 0
        self.capacity = self.sink + state.window
        self.padded = padded and state.get("frames") is not None
        self.num_frames = self.capacity if self.padded else 0 if padded else min(state.num_frames, self.capacity)
        """Number of token frames that `read` returns, including empty slots if the cache is padded."""

    @classmethod
    def open(cls, network: Any, state: TemporalState, num_frames: int) -> FrameCache:
        """Binds a state to a network and checks that new token frames fit after the cached ones.

        The cache of a compiled network is padded, so that no shape changes from chunk to chunk.

        Args:
            network: The denoiser.
            state: The state of the stream.
            num_frames: Number of new token frames.

        Raises:
            ValueError: The state belongs to another network. Or a step cache is enabled, which would skip blocks whose
                keys and values must be written. Or cached and new frames exceed the number of frames that the network
                was trained with; empty slots of a padded cache count as frames.
        """
        if network.is_cache_enabled and state.writable:
            raise ValueError(
                "a step cache (enable_cache) skips blocks, but a writable state needs the keys and values of all "
                "blocks: call disable_cache() or pass state.frozen()"
            )
        state.bind(network)
        cache = cls(state, padded=network.pads_cache)
        limit = network.config.trained_token_frames
        if limit is not None and cache.capacity >= limit:
            raise ValueError(
                f"sink + window must be below {limit}, the number of token frames in training, to leave room for new "
                f"ones; got {cache.sink} + {cache.capacity - cache.sink}"
            )
        if limit is not None and cache.num_frames + num_frames > limit:
            raise ValueError(
                f"cached and new token frames must be at most {limit}, as in training, got {cache.num_frames} + "
                f"{num_frames}: pass at most {limit - cache.num_frames} at once, or use a smaller window"
            )
        return cache

    def positions(self, device: torch.device) -> Tensor:
        """Time positions `(num_frames,)` of the cached frames, in the order in which the ring buffers hold them."""
        slots = torch.arange(self.num_frames, device=device)
        if self.num_frames < self.capacity:
            return slots
        window, total = self.capacity - self.sink, self._total(device)
        moves = (slots >= self.sink) & (total > self.capacity)
        evicted = total - self.capacity if self.state.positions == "absolute" else 0
        return torch.where(moves, self.sink + evicted + (slots - total) % window, slots)

    def next_positions(self, num_frames: int, device: torch.device) -> Tensor:
        """Time positions of the next `num_frames` token frames."""
        if self.state.positions == "absolute":
            return self._total(device) + torch.arange(num_frames, device=device)
        if self.padded:
            return self._total(device).clamp_max(self.capacity) + torch.arange(num_frames, device=device)
        return torch.arange(self.num_frames, self.num_frames + num_frames, device=device)

    def mask_empty(self, mask: Any, num_frames: int, tokens: int, like: Tensor) -> Any:
        """Hides the empty slots of a padded cache in a mask, runs or `None`; see `attention_mask`."""
        if not self.padded:
            return mask
        mask = runs_mask(mask, like) if isinstance(mask, tuple) else mask
        slots = torch.arange(self.capacity + num_frames, device=like.device)
        hidden = ((slots >= self._total(like.device)) & (slots < self.capacity)).repeat_interleave(tokens)
        empty = torch.zeros(hidden.shape, dtype=like.dtype, device=like.device).masked_fill(hidden, float("-inf"))
        return empty.view(1, 1, 1, -1) if mask is None else mask + empty

    def rotary(
        self, rope: RotaryPositions, rows: int, columns: int, device: torch.device
    ) -> tuple[Tensor, Tensor] | None:
        """Cosines and sines `(num_frames * rows * columns, d / 2)` of the cached tokens; `None` if there are none."""
        if self.num_frames == 0:
            return None
        return self._keep((rope, rows, columns), lambda: rope(self.positions(device), rows, columns))

    def read(
        self, key: str, batch_size: int, num_tokens: int, rotary_emb: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor] | None:
        """Reads the keys and values of one attention layer.

        A frozen state keeps the rotated keys, so that they are rotated once and not at each denoising step.

        Args:
            key: The layer's key in the state.
            batch_size: Batch size of the call.
            num_tokens: Tokens per token frame, `p`.
            rotary_emb: Cosines and sines of the cached tokens, `(num_frames * p, d / 2)`, or of the cached token
                frames, `(num_frames, d / 2)`; `None` does not rotate.

        Returns:
            Keys and values, `(b, num_frames, p, h, d)`; `None` if the cache is empty.

        Raises:
            ValueError: The stream has another batch size or another number of tokens per token frame.
        """
        if self.num_frames == 0:
            return None
        keys, values = self.state.get(f"{key}.key"), self.state.get(f"{key}.value")
        assert keys is not None and values is not None
        if (keys.shape[0], keys.shape[2]) != (batch_size, num_tokens):
            raise ValueError(
                f"the input does not continue this stream: expected a batch of {keys.shape[0]} with {keys.shape[2]} "
                f"tokens per frame, got {batch_size} with {num_tokens}; use a new TemporalState for another stream"
            )
        keys, values = keys[:, : self.num_frames], values[:, : self.num_frames]
        if rotary_emb is None:
            return keys, values
        first = 1 if len(rotary_emb[0]) == self.num_frames * num_tokens else 2  # merges the axes of frames and tokens
        rotated = self._keep((key, rotary_emb[0]), lambda: rotate(keys.flatten(first, first + 1), rotary_emb))
        return rotated.view_as(keys), values

    def _keep(self, name: Any, compute: Callable[[], Any]) -> Any:
        """A result that depends on the cached frames only; a frozen state computes it once."""
        if self.state.writable or torch.compiler.is_compiling():
            return compute()
        if name not in self.state.derived:
            self.state.derived[name] = compute()
        return self.state.derived[name]

    def write(self, layers: dict[str, tuple[Tensor, Tensor]]) -> None:
        """Appends new token frames and evicts the oldest ones outside the sink.

        Copies of the buffers are written and replace them, so frozen views keep what they had. One copy for each write
        costs little next to the denoising steps that read it; the old buffer is freed unless a view holds it.

        Args:
            layers: Keys before rotation, and values, `(b, n, p, h, d)`, by the key of every attention layer.
        """
        first = next(iter(layers.values()))[0]
        n, window = first.shape[1], self.capacity - self.sink
        frames = self._total(first.device) + torch.arange(n, device=first.device)
        slots = torch.where(frames < self.sink, frames, self.sink + (frames - self.sink) % window)
        for key, pair in layers.items():
            for name, new in zip(("key", "value"), pair, strict=True):
                buffer = self.state.get(f"{key}.{name}")
                shape = (new.shape[0], self.capacity, *new.shape[2:])
                buffer = new.new_zeros(shape) if buffer is None else buffer.clone()
                for begin in range(0, n, window):  # no two of `window` consecutive frames share a slot
                    part = slice(begin, begin + window)
                    buffer.index_copy_(1, slots[part], new[:, part].detach().to(buffer))
                self.state.put(f"{key}.{name}", buffer)
        self.state.put("frames", self._total(first.device) + n)
        if torch.compiler.is_compiling():  # a compiled network must not depend on this number
            self.state.forget_num_frames()
        else:
            self.state.num_frames = min(self.state.num_frames + n, self.capacity)

    def _total(self, device: torch.device) -> Tensor:
        total = self.state.get("frames")
        return torch.zeros((), dtype=torch.int64, device=device) if total is None else total.to(device)


def _take(x: Tensor, spans: Sequence[Span]) -> Tensor:
    """Concatenates spans of tokens `(b, n, h, d)`; one span is not copied."""
    parts = [x[:, begin:end] for begin, end in spans]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _trains_short_rows_on_cpu(query: Tensor, key: Tensor) -> bool:
    """Whether PyTorch's math backend is faster than the fused kernel that it would choose.

    That is so for training on CPUs in half precision with at most 128 keys. The numbers are in docs/experiments.md.
    """
    if query.device.type != "cpu" or not (query.requires_grad and torch.is_grad_enabled()) or key.shape[1] > 128:
        return False
    autocast = torch.is_autocast_enabled("cpu")
    return (torch.get_autocast_dtype("cpu") if autocast else query.dtype) in (torch.bfloat16, torch.float16)


class PromptCache:
    """What layers compute from a prompt alone, kept between the denoising steps of one call.

    The caller owns it and passes it with every step. It starts again when the prompt is another tensor or was written
    to. It does not notice changes of the network's weights: call `clear` after them.
    """

    def __init__(self) -> None:
        self._results: dict[Any, Any] = {}
        self._prompt: tuple[Tensor, int] | None = None

    def clear(self) -> None:
        """Forgets all results."""
        self._results, self._prompt = {}, None

    def start(self, prompt: Tensor) -> None:
        """Starts a step with this prompt."""
        version = 0 if prompt.is_inference() else prompt._version
        if self._prompt is None or self._prompt[0] is not prompt or self._prompt[1] != version:
            self._results, self._prompt = {}, (prompt, version)

    def get(self, layer: Any, compute: Callable[[], Any]) -> Any:
        """The result of a layer, computed at its first use."""
        if layer not in self._results:
            self._results[layer] = compute()
        return self._results[layer]


def once(cache: PromptCache | None, layer: Any, compute: Callable[[Tensor], Any], prompt: Tensor) -> Any:
    """What `layer` computes from a prompt, from the cache if there is one. Compiled code and training compute it."""
    if cache is None or torch.compiler.is_compiling() or torch.is_grad_enabled():
        return compute(prompt)
    return cache.get(layer, lambda: compute(prompt))


class DispatchedAttnProcessor:
    """Runs attention through diffusers' dispatcher, with a mask, or run by run without one."""

    _attention_backend = None
    _parallel_config = None

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Any) -> Tensor:
        """Computes attention `(b, n, h, d)`.

        Args:
            query: `(b, n, h, d)`.
            key: `(b, m, h, d)`.
            value: `(b, m, h, d)`.
            mask: Additive attention mask `(b | 1, 1, n | 1, m)`, runs, or `None`; see `attention_mask`.

        Raises:
            ValueError: The backend does not support attention masks.
        """
        if isinstance(mask, tuple):
            return self._attend_by_row(query, key, value, mask)
        if mask is not None and not self.takes_mask:
            raise ValueError(
                f"the attention backend {self._backend_name()!r} does not support attention masks, which prompt masks "
                'and groups in a tensor need: use set_attention_backend("native"), or pass groups as integers'
            )
        return self._dispatch(query, key, value, mask)

    def _attend_by_row(self, query: Tensor, key: Tensor, value: Tensor, rows: tuple[tuple[Run, ...], ...]) -> Tensor:
        """Runs one call per run. With several rows, each is for an equal part of the batch."""
        parts = zip(query.chunk(len(rows)), key.chunk(len(rows)), value.chunk(len(rows)), rows, strict=True)
        outputs = [self._attend_in_runs(*part) for part in parts]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _attend_in_runs(self, query: Tensor, key: Tensor, value: Tensor, runs: tuple[Run, ...]) -> Tensor:
        pieces: dict[Span, Tensor] = {}
        for run in runs:
            out = self._dispatch(_take(query, run.queries), _take(key, run.keys), _take(value, run.keys), None)
            pieces.update(zip(run.queries, out.split([end - begin for begin, end in run.queries], 1), strict=True))
        return torch.cat([pieces[span] for span in sorted(pieces)], dim=1)

    def _dispatch(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        if mask is not None and self._backend_name() == "xformers":  # needs rows aligned to 8 elements
            mask = nn.functional.pad(mask, (0, -mask.shape[-1] % 8))[..., : mask.shape[-1]]
        backend = self._attention_backend
        if backend is None and self._backend_name() == "native" and _trains_short_rows_on_cpu(query, key):
            backend = "_native_math"
        return dispatch_attention_fn(
            query,
            key,
            value,
            attn_mask=mask,
            backend=backend,
            parallel_config=self._parallel_config,
        )

    def _backend_name(self) -> str:
        backend = self._attention_backend or _AttentionBackendRegistry.get_active_backend()[0]
        return getattr(backend, "value", backend)

    @property
    def takes_mask(self) -> bool:
        """Whether the attention backend takes a mask."""
        return not self._backend_name().lstrip("_").startswith(_MASKLESS_BACKENDS)


class SpacetimeAttnProcessor(DispatchedAttnProcessor):
    """Attention with rotary positions and a KV cache."""

    def __call__(
        self,
        attn: SpacetimeAttention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Any = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
        cache: tuple[Tensor, Tensor] | None = None,
        return_key_value: bool = False,
        prompt_cache: PromptCache | None = None,
        image_states: Tensor | None = None,
    ) -> Any:
        """Computes attention; see `SpacetimeAttention.forward`."""
        key_rotary = None if return_key_value else rotary_emb

        def key_value(source: Tensor) -> tuple[Tensor, Tensor]:
            key = attn.norm_k(attn.to_k(source), key_rotary, attn.heads)
            return key, rearrange(attn.to_v(source), "b n (h d) -> b n h d", h=attn.heads)

        def image_key_value(source: Tensor) -> tuple[Tensor, Tensor]:
            key = attn.norm_added_k(attn.add_k_proj(source), None, attn.heads)
            return key, rearrange(attn.add_v_proj(source), "b n (h d) -> b n h d", h=attn.heads)

        query = attn.norm_q(attn.to_q(hidden_states), rotary_emb, attn.heads)
        if encoder_hidden_states is None:
            key, value = key_value(hidden_states)
        else:
            key, value = once(prompt_cache, attn, key_value, encoder_hidden_states)
        new = (key, value) if return_key_value else ()
        if return_key_value and rotary_emb is not None:
            key = rotate(key, rotary_emb)
        if cache is not None:
            key = torch.cat([cache[0].to(key), key], dim=1)
            value = torch.cat([cache[1].to(value), value], dim=1)
        out = self.attend(query, key, value, attention_mask)
        if image_states is not None:
            image_key, image_value = once(prompt_cache, (attn, "image"), image_key_value, image_states)
            out = out + self.attend(query, image_key, image_value, None)
        out = rearrange(out, "b n h d -> b n (h d)").type_as(query)
        layer: Any
        for layer in attn.to_out:
            out = layer(out)
        return (out, *new) if return_key_value else out


class SpacetimeAttention(nn.Module, AttentionModuleMixin):
    """Multi-head self- or cross-attention with RMS-normalized queries and keys.

    The parameters have the names of diffusers' `WanAttention`.

    Args:
        dim: Channels of the tokens.
        heads: Number of heads.
        dim_head: Channels per head.
        eps: Epsilon of the norms.
        is_cross_attention: Whether keys and values come from a prompt.
        added_dim: Channels of image tokens, which have keys and values of their own; `None` if there are none.
    """

    processor: Any
    _default_processor_cls = SpacetimeAttnProcessor
    _available_processors = [SpacetimeAttnProcessor]
    _supports_qkv_fusion = False

    def __init__(
        self,
        dim: int,
        heads: int,
        dim_head: int,
        eps: float = 1e-6,
        is_cross_attention: bool = False,
        added_dim: int | None = None,
    ) -> None:
        super().__init__()
        inner = heads * dim_head
        self.heads = heads
        self.is_cross_attention = is_cross_attention
        self.to_q = nn.Linear(dim, inner)
        self.to_k = nn.Linear(dim, inner)
        self.to_v = nn.Linear(dim, inner)
        self.to_out = nn.ModuleList([nn.Linear(inner, dim), nn.Dropout(0.0)])
        self.norm_q = HeadsRMSNorm(inner, eps=eps)
        self.norm_k = HeadsRMSNorm(inner, eps=eps)
        if added_dim is not None:
            self.add_k_proj = nn.Linear(added_dim, inner)
            self.add_v_proj = nn.Linear(added_dim, inner)
            self.norm_added_k = HeadsRMSNorm(inner, eps=eps)
        self.state_key = ""
        self.set_processor(SpacetimeAttnProcessor())  # type: ignore[operator]

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Any = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
        cache: tuple[Tensor, Tensor] | None = None,
        return_key_value: bool = False,
        prompt_cache: PromptCache | None = None,
        image_states: Tensor | None = None,
    ) -> Any:
        """Computes attention; the output has the shape of `hidden_states`.

        Args:
            hidden_states: Tokens `(b, n, d)`.
            encoder_hidden_states: Prompt embeddings `(b, m, d)` for cross-attention; `None` for self-attention.
            attention_mask: Additive mask `(b | 1, 1, n | 1, m)`, where `m` is the number of keys, cached ones first,
                or runs; see `attention_mask`.
            rotary_emb: Cosines and sines `(n, d / 2)` of the tokens' positions.
            cache: Cached keys after rotation, and cached values, `(b, c, h, d)`.
            return_key_value: Whether to also return the keys (before rotation) and values of this call.
            prompt_cache: Keeps the keys and values of a prompt for the next call with it.
            image_states: Image tokens `(b, k, added_dim)`, attended to separately; the two outputs are added.

        Returns:
            The output `(b, n, d)`; with `return_key_value`, a tuple of output, keys and values.
        """
        return self.processor(
            self,
            hidden_states,
            encoder_hidden_states,
            attention_mask,
            rotary_emb,
            cache,
            return_key_value,
            prompt_cache,
            image_states,
        )
