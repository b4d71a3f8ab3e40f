"""Attention over space and time: frame groups, rotary positions, and a cache of keys and values.

Axes: `b` batch, `n` tokens or token frames, `h` heads, `p` tokens of a frame, `d` channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import _AttentionBackendRegistry, dispatch_attention_fn
from einops import rearrange, repeat
from torch import Tensor, nn

from vgen.temporal.state import TemporalState

GROUP_MODES = ("full", "causal", "chunk")
Groups = str | Sequence[int] | Tensor

# prefixes of the dispatcher's names of backends that refuse or ignore a mask
_MASKLESS_BACKENDS = (
    "flash",
    "sage",
    "aiter",
    "native_flash",
)


def make_groups(mode: str, num_frames: int, num_leading: int = 0, chunk_size: int = 1) -> list[int]:
    """Spells a group mode as one integer a token frame; frame i sees frame j iff `groups[j] <= groups[i]`.

    Args:
        mode: `full`: leading known frames are group 0, all others 1. `causal`: 0, 1, 2, ... `chunk`: frame 0 alone,
            then runs of `chunk_size`, restarting at the first generated frame.
        num_frames: Token frames.
        num_leading: How many of them are known.
        chunk_size: Length of a run, in token frames.

    Raises:
        ValueError: There is no such mode.
    """
    if mode == "full":
        return [int(frame >= num_leading) for frame in range(num_frames)]
    if mode == "causal":
        return list(range(num_frames))
    if mode == "chunk":
        starts = {0, *range(1, num_leading, chunk_size), *range(max(num_leading, 1), num_frames, chunk_size)}
        groups: list[int] = []
        for frame in range(num_frames):
            groups.append((groups[-1] if groups else -1) + (frame in starts))
        return groups
    raise ValueError(f"groups={mode!r} is no group mode: give one of {', '.join(GROUP_MODES)}, or integers")


def group_tensor(groups: Groups, num_frames: int, chunk_size: int, device: torch.device) -> Tensor | None:
    """Turns the `groups` argument of a denoiser into integers `(n,)` or `(b, n)`; `None` if all see all.

    Raises:
        ValueError: The mode is unknown, or the number of integers is not that of the token frames.
    """
    if isinstance(groups, str):
        groups = make_groups(groups, num_frames, 0, chunk_size)
    if not isinstance(groups, Tensor):
        if len(groups) and isinstance(groups[0], int) and list(groups) == [groups[0]] * num_frames:
            return None
        groups = torch.tensor(groups)
    if groups.shape[-1] != num_frames or groups.ndim > 2:
        raise ValueError(
            f"groups of shape {tuple(groups.shape)} do not fit {num_frames} token frames: give (n,) or (b, n) integers"
        )
    return groups.to(device)


def group_mask(groups: Tensor | None, num_cached: int, dtype: torch.dtype) -> Tensor | None:
    """The additive mask `(b | 1, 1, n, num_cached + n)` over frames; cached frames are seen by all."""
    if groups is None:
        return None
    groups = groups if groups.ndim == 2 else groups[None]
    hidden = rearrange(groups, "b n -> b 1 1 n") > rearrange(groups, "b n -> b 1 n 1")
    mask = torch.zeros(hidden.shape, dtype=dtype, device=groups.device).masked_fill(hidden, float("-inf"))
    return nn.functional.pad(mask, (num_cached, 0))


class RotaryPositions(nn.Module):
    """Rotary angles of time, height and width side by side in one head, split as in Wan.

    Angles come from positions at each call, so there is no table to run out of.

    Args:
        head_dim: Channels of a head.
        theta: Base of the frequencies.

    Source: RoFormer, arXiv 2104.09864; diffusers' `WanRotaryPosEmbed`.
    """

    def __init__(self, head_dim: int, theta: float = 10000.0) -> None:
        super().__init__()
        side = 2 * (head_dim // 6)
        self.dims = (head_dim - 2 * side, side, side)
        self.theta = theta

    def forward(self, frames: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines `(n * height * width, d / 2)`, float32, of tokens at time positions `frames` `(n,)`."""
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
    """Rotates neighbouring channel pairs of `(b, n, h, d)` by the angles of `(n, d / 2)`; products in float32."""
    cos, sin = (rearrange(part, "n d -> n 1 d") for part in rotary)
    if torch.compiler.is_compiling():  # which generates no code for complex numbers
        even, odd = x[..., 0::2], x[..., 1::2]
        return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).type_as(x)
    wide = x if x.dtype == torch.float64 else x.float()
    pairs = torch.view_as_complex(wide.unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * torch.complex(cos, sin)).flatten(-2).type_as(x)


class FrameCache:
    """The keys and values of a stream's past token frames, in the ring buffers of a `TemporalState`.

    The first `sink` frames stay; of the others the last `window` do. Positions count from the oldest frame kept, so
    that they never exceed `sink + window`, however long the stream.
    """

    def __init__(self, state: TemporalState) -> None:
        if state.window is None:
            raise ValueError("a state for attention needs a window: TemporalState(window=...), or one in the config")
        self.state = state
        self.sink = state.sink or 0
        self.capacity = self.sink + state.window
        self.num_frames = min(state.num_frames, self.capacity)

    @classmethod
    def opened(cls, network: Any, state: TemporalState, num_frames: int) -> FrameCache:
        """Binds a state to a network and checks that a piece of `num_frames` fits behind what it remembers.

        Raises:
            ValueError: A step cache would skip what is to be written, or more frames than were trained are asked for.
        """
        if network.is_cache_enabled and state.writable:
            raise ValueError(
                "a step cache skips blocks, whose keys and values a writable state needs: disable_cache()"
            )
        state.bind(network)
        cache = cls(state)
        limit = network.config.trained_token_frames
        if limit is not None and cache.capacity >= limit:
            raise ValueError(
                f"a sink of {cache.sink} and a window of {cache.capacity - cache.sink} leave no room for new token "
                f"frames: this network was trained with {limit} in all"
            )
        if limit is not None and cache.num_frames + num_frames > limit:
            raise ValueError(
                f"{cache.num_frames} remembered and {num_frames} new token frames exceed the {limit} that this "
                f"network was trained with: give at most {limit - cache.num_frames} at once, or a smaller window"
            )
        return cache

    def positions(self, device: torch.device) -> Tensor:
        """Time positions `(num_frames,)` of the cached frames, in the order of their slots."""
        slots = torch.arange(self.num_frames, device=device)
        if self.num_frames < self.capacity:
            return slots
        window = self.capacity - self.sink
        return torch.where(slots < self.sink, slots, self.sink + (slots - self._total(device)) % window)

    def read(self, key: str, batch_size: int, num_tokens: int) -> tuple[Tensor, Tensor] | None:
        """Keys, not rotated, and values `(b, num_frames, p, h, d)` of one attention layer; `None` at the start.

        Raises:
            ValueError: The stream has another batch size or number of tokens in a frame.
        """
        if self.num_frames == 0:
            return None
        keys, values = self.state.get(f"{key}.key"), self.state.get(f"{key}.value")
        assert keys is not None and values is not None
        if (keys.shape[0], keys.shape[2]) != (batch_size, num_tokens):
            raise ValueError(
                f"a piece of {batch_size} samples with {num_tokens} tokens a frame does not continue this stream of "
                f"{keys.shape[0]} with {keys.shape[2]}: use a new TemporalState"
            )
        return keys[:, : self.num_frames], values[:, : self.num_frames]

    def write(self, layers: dict[str, tuple[Tensor, Tensor]]) -> None:
        """Appends the new frames' keys and values `(b, n, p, h, d)` of every layer; the oldest make room."""
        first = next(iter(layers.values()))[0]
        n, window = first.shape[1], self.capacity - self.sink
        frames = self._total(first.device) + torch.arange(n, device=first.device)
        slots = torch.where(frames < self.sink, frames, self.sink + (frames - self.sink) % window)
        for key, pair in layers.items():
            for name, new in zip(("key", "value"), pair, strict=True):
                buffer = self.state.get(f"{key}.{name}")
                if buffer is None:
                    buffer = new.new_zeros(new.shape[0], self.capacity, *new.shape[2:])
                    self.state.put(f"{key}.{name}", buffer)
                for begin in range(0, n, window):  # within `window` frames no two share a slot
                    part = slice(begin, begin + window)
                    buffer.index_copy_(1, slots[part], new[:, part].detach().to(buffer))
        self.state.put("frames", self._total(first.device) + n)
        self.state.num_frames = min(self.state.num_frames + n, self.capacity)

    def _total(self, device: torch.device) -> Tensor:
        total = self.state.get("frames")
        return torch.zeros((), dtype=torch.int64, device=device) if total is None else total.to(device)


def _trains_short_rows_on_cpu(query: Tensor, key: Tensor) -> bool:
    """Whether PyTorch's math beats the fused kernel that it would choose: in half precision, forward and backward.

    The numbers are in docs/experiments.md.
    """
    if query.device.type != "cpu" or not (query.requires_grad and torch.is_grad_enabled()) or key.shape[1] > 128:
        return False
    autocast = torch.is_autocast_enabled("cpu")
    return (torch.get_autocast_dtype("cpu") if autocast else query.dtype) in (torch.bfloat16, torch.float16)


class DispatchedAttnProcessor:
    """Runs attention through diffusers' dispatcher, with masks or, where a backend has none, group by group."""

    _attention_backend = None
    _parallel_config = None

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """Attention of `(b, n, h, d)` to `(b, m, h, d)` under an additive mask `(b | 1, 1, n | 1, m)`.

        Raises:
            ValueError: The backend takes no masks and this one cannot do without.
        """
        if mask is None or self._takes_mask():
            return self._dispatch(query, key, value, mask)
        return self._row_by_row(query, key, value, mask)

    def _row_by_row(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        """Serves a backend without masks: tokens that see the same keys are asked together, with those keys only."""
        if mask.shape[0] > 1 or mask.shape[2] != query.shape[1]:
            raise ValueError(
                f"the attention backend {self._backend_name()!r} takes no mask, which groups of their own for each "
                'sample and masked prompts need: set_attention_backend("native")'
            )
        patterns, member = torch.unique(mask[0, 0] == 0, dim=0, return_inverse=True)
        out = torch.empty_like(query)
        for index, visible in enumerate(patterns):
            rows = member == index
            out[:, rows] = self._dispatch(query[:, rows], key[:, visible], value[:, visible], None)
        return out

    def _dispatch(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        if mask is not None and self._backend_name() == "xformers":  # which wants rows that begin at multiples of 8
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
    """Attention of frames and tokens, with rotary positions and a cache."""

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
        """Attends; see `SpacetimeAttention.forward`."""
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = attn.norm_q(attn.to_q(hidden_states)), attn.norm_k(attn.to_k(source)), attn.to_v(source)
        query, key, value = (rearrange(x, "b n (h d) -> b n h d", h=attn.heads) for x in (query, key, value))
        new = (key, value) if return_key_value else ()  # else the keys can go when they are rotated
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
    """Multi-head attention with normalised queries and keys, of tokens to one another or to a prompt.

    Parameter names are those of diffusers' `WanAttention`.

    Args:
        dim: Channels of the tokens.
        heads: Number of heads.
        dim_head: Channels of a head.
        eps: Of the norms.
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
        """Maps tokens `(b, n, d)` to the same shape.

        Args:
            hidden_states: `(b, n, d)`.
            encoder_hidden_states: A prompt `(b, m, d)` to attend to instead of one another.
            attention_mask: Additive, `(b | 1, 1, n | 1, m)` with `m` the number of keys, cached ones first.
            rotary_emb: Cosines and sines `(n, d / 2)`.
            cache: Keys, not rotated, and values `(b, c, h, d)` from before.
            cache_rotary_emb: Cosines and sines `(c, d / 2)` of the cached keys.
            return_key_value: Whether to return this call's own keys, not rotated, and values too.
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
