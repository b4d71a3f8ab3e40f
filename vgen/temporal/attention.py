"""Attention over space and time: frame groups, rotary positions, and the KV cache.

Axes: `b` batch, `n` tokens or token frames, `h` heads, `p` tokens per token frame, `d` channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import _AttentionBackendRegistry, dispatch_attention_fn
from einops import rearrange, repeat
from torch import Tensor, nn

from vgen.checks import check_choice, shown
from vgen.temporal.state import TemporalState

# torch.compile traces them as single operations: tracing their parsing of patterns takes most of a compilation's time
torch.compiler.allow_in_graph(rearrange)
torch.compiler.allow_in_graph(repeat)

GroupMode = Literal["full", "causal", "chunk"]
Groups = str | Sequence[int] | Tensor

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


def group_tensor(groups: Groups, num_frames: int, chunk_size: int, device: torch.device) -> Tensor | None:
    """Converts the `groups` argument of a denoiser to group ids.

    Args:
        groups: A group mode, or integers `(n,)` or `(b, n)`.
        num_frames: Number of token frames, `n`.
        chunk_size: Token frames per run in `chunk` mode.
        device: Device of the result.

    Returns:
        Integers `(n,)` or `(b, n)`; `None` if all frames attend to all frames, so that no mask is needed.

    Raises:
        ValueError: The mode is unknown, or the integers have another shape.
    """
    if isinstance(groups, str):
        groups = make_groups(groups, num_frames, 0, chunk_size)
    if not isinstance(groups, Tensor):
        if len(groups) and isinstance(groups[0], int) and list(groups) == [groups[0]] * num_frames:
            return None
        groups = torch.tensor(groups)
    if groups.shape[-1] != num_frames or groups.ndim > 2:
        raise ValueError(
            f"groups must have shape ({num_frames},) or (batch, {num_frames}), one integer per token frame, "
            f"got {tuple(groups.shape)}"
        )
    return groups.to(device)


def group_mask(groups: Tensor | None, num_cached: int, dtype: torch.dtype) -> Tensor | None:
    """Builds the additive attention mask over token frames.

    Args:
        groups: Group ids `(n,)` or `(b, n)`; `None` gives no mask.
        num_cached: Number of token frames in the KV cache. Every frame attends to all of them.
        dtype: Data type of the mask.

    Returns:
        A mask `(b | 1, 1, n, num_cached + n)` with 0 where attention is allowed and -inf elsewhere.
    """
    if groups is None:
        return None
    groups = groups if groups.ndim == 2 else groups[None]
    hidden = rearrange(groups, "b n -> b 1 1 n") > rearrange(groups, "b n -> b 1 n 1")
    mask = torch.zeros(hidden.shape, dtype=dtype, device=groups.device).masked_fill(hidden, float("-inf"))
    return nn.functional.pad(mask, (num_cached, 0))


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
        n = len(frames)
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


def rotate(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Applies rotary embeddings to queries or keys, in float32 or higher precision.

    Args:
        x: Queries or keys `(b, n, h, d)`. Adjacent channels form the pairs that are rotated.
        rotary: Cosines and sines `(n, d / 2)`.
    """
    cos, sin = (rearrange(part, "n d -> n 1 d") for part in rotary)
    if torch.compiler.is_compiling():  # torch.compile does not support complex numbers
        even, odd = x[..., 0::2], x[..., 1::2]
        return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).type_as(x)
    wide = x if x.dtype == torch.float64 else x.float()
    pairs = torch.view_as_complex(wide.unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * torch.complex(cos, sin)).flatten(-2).type_as(x)


class FrameCache:
    """The KV cache of a stream: keys and values of past token frames, in the ring buffers of a `TemporalState`.

    It keeps the first `sink` token frames of the stream and the most recent `window` ones. Positions are counted from
    the oldest frame in the cache. They therefore stay below `sink + window`, however long the stream is.

    Args:
        state: The state that holds the buffers. Its window must be set.

    Raises:
        ValueError: The state has no window.
    """

    def __init__(self, state: TemporalState) -> None:
        if state.window is None:
            raise ValueError("attention with a state needs a window: set TemporalState(window=...) or the config's")
        self.state = state
        self.sink = state.sink or 0
        self.capacity = self.sink + state.window
        self.num_frames = min(state.num_frames, self.capacity)

    @classmethod
    def open(cls, network: Any, state: TemporalState, num_frames: int) -> FrameCache:
        """Binds a state to a network and checks that new token frames fit after the cached ones.

        Args:
            network: The denoiser.
            state: The state of the stream.
            num_frames: Number of new token frames.

        Raises:
            ValueError: The state belongs to another network. Or a step cache is enabled, which would skip blocks whose
                keys and values must be written. Or cached and new frames exceed the number of frames that the network
                was trained with.
        """
        if network.is_cache_enabled and state.writable:
            raise ValueError(
                "a step cache (enable_cache) skips blocks, but a writable state needs the keys and values of all "
                "blocks: call disable_cache() or pass state.frozen()"
            )
        state.bind(network)
        cache = cls(state)
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
        window = self.capacity - self.sink
        return torch.where(slots < self.sink, slots, self.sink + (slots - self._total(device)) % window)

    def read(self, key: str, batch_size: int, num_tokens: int) -> tuple[Tensor, Tensor] | None:
        """Reads the keys and values of one attention layer.

        Args:
            key: The layer's key in the state.
            batch_size: Batch size of the call.
            num_tokens: Tokens per token frame, `p`.

        Returns:
            Keys before rotation, and values, `(b, num_frames, p, h, d)`; `None` if the cache is empty.

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
        return keys[:, : self.num_frames], values[:, : self.num_frames]

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
        self.state.num_frames = min(self.state.num_frames + n, self.capacity)

    def _total(self, device: torch.device) -> Tensor:
        total = self.state.get("frames")
        return torch.zeros((), dtype=torch.int64, device=device) if total is None else total.to(device)


def _trains_short_rows_on_cpu(query: Tensor, key: Tensor) -> bool:
    """Whether PyTorch's math backend is faster than the fused kernel that it would choose.

    That is so for training on CPUs in half precision with at most 128 keys. The numbers are in docs/experiments.md.
    """
    if query.device.type != "cpu" or not (query.requires_grad and torch.is_grad_enabled()) or key.shape[1] > 128:
        return False
    autocast = torch.is_autocast_enabled("cpu")
    return (torch.get_autocast_dtype("cpu") if autocast else query.dtype) in (torch.bfloat16, torch.float16)


class DispatchedAttnProcessor:
    """Runs attention through diffusers' dispatcher.

    For backends without attention masks, tokens with the same visible keys are processed together, without a mask.
    """

    _attention_backend = None
    _parallel_config = None

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """Computes attention `(b, n, h, d)`.

        Args:
            query: `(b, n, h, d)`.
            key: `(b, m, h, d)`.
            value: `(b, m, h, d)`.
            mask: Additive attention mask `(b | 1, 1, n | 1, m)`, or `None`.

        Raises:
            ValueError: The backend does not support attention masks, and this one differs between samples or masks
                tokens of a prompt.
        """
        if mask is None or self._takes_mask():
            return self._dispatch(query, key, value, mask)
        return self._attend_without_mask(query, key, value, mask)

    def _attend_without_mask(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        """Runs one unmasked call per set of visible keys, for the tokens that attend to exactly these keys."""
        if mask.shape[0] > 1 or mask.shape[2] != query.shape[1]:
            raise ValueError(
                f"the attention backend {self._backend_name()!r} does not support attention masks, which groups per "
                'sample and prompt masks need: use set_attention_backend("native")'
            )
        patterns, member = torch.unique(mask[0, 0] == 0, dim=0, return_inverse=True)
        out = torch.empty_like(query)
        for index, visible in enumerate(patterns):
            rows = member == index
            out[:, rows] = self._dispatch(query[:, rows], key[:, visible], value[:, visible], None)
        return out

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

    def _takes_mask(self) -> bool:
        return not self._backend_name().lstrip("_").startswith(_MASKLESS_BACKENDS)


class SpacetimeAttnProcessor(DispatchedAttnProcessor):
    """Attention with rotary positions and a KV cache."""

    def __call__(
        self,
        attn: SpacetimeAttention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
        cache: tuple[Tensor, Tensor] | None = None,
        cache_rotary_emb: tuple[Tensor, Tensor] | None = None,
        return_key_value: bool = False,
    ) -> Any:
        """Computes attention; see `SpacetimeAttention.forward`."""
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = attn.norm_q(attn.to_q(hidden_states)), attn.norm_k(attn.to_k(source)), attn.to_v(source)
        query, key, value = (rearrange(x, "b n (h d) -> b n h d", h=attn.heads) for x in (query, key, value))
        new = (key, value) if return_key_value else ()  # otherwise their memory is freed after the rotation
        if rotary_emb is not None:
            query, key = rotate(query, rotary_emb), rotate(key, rotary_emb)
        if cache is not None and cache_rotary_emb is not None:
            key = torch.cat([rotate(cache[0].to(key), cache_rotary_emb), key], dim=1)
            value = torch.cat([cache[1].to(value), value], dim=1)
        out = self.attend(query, key, value, attention_mask)
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
    """

    processor: Any
    _default_processor_cls = SpacetimeAttnProcessor
    _available_processors = [SpacetimeAttnProcessor]
    _supports_qkv_fusion = False

    def __init__(
        self, dim: int, heads: int, dim_head: int, eps: float = 1e-6, is_cross_attention: bool = False
    ) -> None:
        super().__init__()
        inner = heads * dim_head
        self.heads = heads
        self.is_cross_attention = is_cross_attention
        self.to_q = nn.Linear(dim, inner)
        self.to_k = nn.Linear(dim, inner)
        self.to_v = nn.Linear(dim, inner)
        self.to_out = nn.ModuleList([nn.Linear(inner, dim), nn.Dropout(0.0)])
        self.norm_q = nn.RMSNorm(inner, eps=eps)
        self.norm_k = nn.RMSNorm(inner, eps=eps)
        self.state_key = ""
        self.set_processor(SpacetimeAttnProcessor())  # type: ignore[operator]

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
        cache: tuple[Tensor, Tensor] | None = None,
        cache_rotary_emb: tuple[Tensor, Tensor] | None = None,
        return_key_value: bool = False,
    ) -> Any:
        """Computes attention; the output has the shape of `hidden_states`.

        Args:
            hidden_states: Tokens `(b, n, d)`.
            encoder_hidden_states: Prompt embeddings `(b, m, d)` for cross-attention; `None` for self-attention.
            attention_mask: Additive mask `(b | 1, 1, n | 1, m)`, where `m` is the number of keys, cached ones first.
            rotary_emb: Cosines and sines `(n, d / 2)` of the tokens' positions.
            cache: Cached keys before rotation, and cached values, `(b, c, h, d)`.
            cache_rotary_emb: Cosines and sines `(c, d / 2)` of the cached keys' positions.
            return_key_value: Whether to also return the keys (before rotation) and values of this call.

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
            cache_rotary_emb,
            return_key_value,
        )
