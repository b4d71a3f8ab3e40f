"""SpacetimeTransformer: a denoiser of spacetime patches, causal in time where asked.

Axes: `b` batch, `c` channels, `t h w` latent frames, rows and columns, `n` token frames, `p` tokens of a frame,
`d` width of the network, `m` is 1 or `n`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import CacheMixin, ConfigMixin, ModelMixin, WanTransformer3DModel
from diffusers.configuration_utils import register_to_config
from diffusers.hooks._helpers import (
    AttentionProcessorMetadata,
    AttentionProcessorRegistry,
    TransformerBlockMetadata,
    TransformerBlockRegistry,
    _skip_attention___ret___hidden_states,
)
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin, FeedForward
from diffusers.models.embeddings import PixArtAlphaTextProjection, TimestepEmbedding, Timesteps
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.normalization import FP32LayerNorm
from diffusers.utils import apply_lora_scale, logging
from einops import rearrange, repeat
from torch import Tensor, nn

from vgen.models.convert import refuse_nonzero, with_same_weights
from vgen.models.denoiser import DispatchedAttention, FrameRateEmbedder, dtype_of
from vgen.models.loading import StrictLoading
from vgen.temporal.attention import (
    FrameCache,
    Groups,
    RotaryPositions,
    SpacetimeAttention,
    SpacetimeAttnProcessor,
    group_mask,
    group_tensor,
)
from vgen.temporal.state import TemporalState, network_identity, register_state_keys

logger = logging.get_logger(__name__)

TASKS = ("text", "leading", "keyframes")
ATTENTIONS = ("joint", "divided")

_BEYOND_WAN = ("keyframe_embedding", "frame_rate_embedder")


class ConditionEmbedder(nn.Module):
    """Noise levels and frame rate to modulation, prompt embeddings to the network's width."""

    def __init__(self, dim: int, freq_dim: int, text_dim: int) -> None:
        super().__init__()
        self.timesteps_proj = Timesteps(freq_dim, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedder = TimestepEmbedding(freq_dim, dim)
        self.time_proj = nn.Linear(dim, dim * 6)
        self.text_embedder = PixArtAlphaTextProjection(text_dim, dim, act_fn="gelu_tanh")

    def forward(self, timestep: Tensor, dtype: torch.dtype, extra: Tensor | None) -> tuple[Tensor, Tensor]:
        """Timesteps `(b, m)` to `(b, m, d)` and its projection `(b, m, 6, d)`; `extra` `(b, 1, d)` is added."""
        m = timestep.shape[1]
        waves = self.timesteps_proj(timestep.flatten())
        temb = self.time_embedder(waves.to(dtype_of(self.time_embedder))).to(dtype)
        temb = rearrange(temb, "(b m) d -> b m d", m=m)
        temb = temb if extra is None else temb + extra.to(dtype)
        return temb, rearrange(self.time_proj(nn.functional.silu(temb)), "b m (k d) -> b m k d", k=6)


class SpacetimeBlock(nn.Module):
    """Self-attention over space and time, cross-attention to the prompt, feed-forward.

    With divided attention, tokens attend over time at their own place first, then over space in their own frame
    (TimeSformer, arXiv 2102.05095); time has its own attention, space uses `attn1`.
    """

    def __init__(
        self, dim: int, ffn_dim: int, num_heads: int, cross_attn_norm: bool, eps: float, divided: bool
    ) -> None:
        super().__init__()
        self.divided = divided
        dim_head = dim // num_heads
        if divided:
            self.norm_time = FP32LayerNorm(dim, eps, elementwise_affine=False)
            self.attn_time = SpacetimeAttention(dim, num_heads, dim_head, eps)
        self.norm1 = FP32LayerNorm(dim, eps, elementwise_affine=False)
        self.attn1 = SpacetimeAttention(dim, num_heads, dim_head, eps)
        self.attn2 = SpacetimeAttention(dim, num_heads, dim_head, eps, is_cross_attention=True)
        self.norm2 = FP32LayerNorm(dim, eps, elementwise_affine=True) if cross_attn_norm else nn.Identity()
        self.ffn = FeedForward(dim, inner_dim=ffn_dim, activation_fn="gelu-approximate")
        self.norm3 = FP32LayerNorm(dim, eps, elementwise_affine=False)
        self.scale_shift_table = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)

    @property
    def cache_key(self) -> str:
        """Where the attention that looks along time keeps its keys and values in a state."""
        return (self.attn_time if self.divided else self.attn1).state_key

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None,
        temb: Tensor,
        rotary_emb: tuple[Tensor, Tensor],
        num_frames: int,
        attention_mask: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        cache: tuple[Tensor, Tensor] | None = None,
        cache_rotary_emb: tuple[Tensor, Tensor] | None = None,
        return_key_value: bool = False,
    ) -> Any:
        """Maps tokens `(b, n * p, d)` to the same shape.

        Args:
            hidden_states: `(b, n * p, d)`, frame by frame.
            encoder_hidden_states: `(b, l, d)`, or `None` for no prompt.
            temb: `(b, m, 6, d)`.
            rotary_emb: Cosines and sines `(n * p, head / 2)`.
            num_frames: `n`.
            attention_mask: Additive, over tokens and, if divided, over frames.
            encoder_attention_mask: Additive, `(b, 1, 1, l)`.
            cache: Keys, not rotated, and values `(b, k, p, h, head)` of `k` earlier frames.
            cache_rotary_emb: Cosines and sines `(k * p, head / 2)`.
            return_key_value: Whether to return `(hidden_states, key, value)`, the last two `(b, n, p, h, head)`.
        """
        modulation = rearrange(self.scale_shift_table + temb.float(), "b m k d -> k b m 1 d")
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = modulation
        past = (attention_mask, cache, cache_rotary_emb)

        x = _modulate(self.norm_time if self.divided else self.norm1, hidden_states, shift, scale)
        over_time = self._divided_time if self.divided else self._joint
        out, *key_value = over_time(x, num_frames, rotary_emb, *past, return_key_value)
        hidden_states = _gated_sum(hidden_states, out, gate)
        if self.divided:
            x = _modulate(self.norm1, hidden_states, shift, scale)
            hidden_states = _gated_sum(hidden_states, self._divided_space(x, num_frames, rotary_emb), gate)

        if encoder_hidden_states is not None:
            x = self.norm2(hidden_states.float()).type_as(hidden_states)  # float32
            hidden_states = hidden_states + self.attn2(x, encoder_hidden_states, encoder_attention_mask)

        x = self.ffn(_modulate(self.norm3, hidden_states, ffn_shift, ffn_scale))
        hidden_states = _gated_sum(hidden_states, x, ffn_gate)
        return (hidden_states, *key_value) if return_key_value else hidden_states

    def _joint(
        self,
        x: Tensor,
        n: int,
        rotary_emb: tuple[Tensor, Tensor],
        mask: Tensor | None,
        cache: tuple[Tensor, Tensor] | None,
        cache_rotary_emb: tuple[Tensor, Tensor] | None,
        return_key_value: bool,
    ) -> tuple[Tensor, ...]:
        past = cache and (cache[0].flatten(1, 2), cache[1].flatten(1, 2))
        out = self.attn1(x, None, mask, rotary_emb, past, cache_rotary_emb, return_key_value)
        if not return_key_value:
            return (out,)
        return out[0], *(rearrange(part, "b (n p) h d -> b n p h d", n=n) for part in out[1:])

    def _divided_time(
        self,
        x: Tensor,
        n: int,
        rotary_emb: tuple[Tensor, Tensor],
        mask: Tensor | None,
        cache: tuple[Tensor, Tensor] | None,
        cache_rotary_emb: tuple[Tensor, Tensor] | None,
        return_key_value: bool,
    ) -> tuple[Tensor, ...]:
        b, p = x.shape[0], x.shape[1] // n
        # between tokens of one place the angles of space cancel, so the first place's serve all
        first = tuple(part[::p] for part in rotary_emb)
        first_past = cache_rotary_emb and tuple(part[::p] for part in cache_rotary_emb)
        past = cache and tuple(rearrange(part, "b k p h d -> (b p) k h d") for part in cache)
        mask = mask if mask is None or mask.shape[0] == 1 else repeat(mask, "b i q k -> (b p) i q k", p=p)
        x = rearrange(x, "b (n p) d -> (b p) n d", n=n)
        out = self.attn_time(x, None, mask, first, past, first_past, return_key_value)
        out, *key_value = out if return_key_value else (out,)
        key_value = [rearrange(part, "(b p) n h d -> b n p h d", p=p) for part in key_value]
        return rearrange(out, "(b p) n d -> b (n p) d", b=b), *key_value

    def _divided_space(self, x: Tensor, n: int, rotary_emb: tuple[Tensor, Tensor]) -> Tensor:
        p = x.shape[1] // n
        frame = tuple(part[:p] for part in rotary_emb)
        out = self.attn1(rearrange(x, "b (n p) d -> (b n) p d", n=n), rotary_emb=frame)
        return rearrange(out, "(b n) p d -> b (n p) d", n=n)


# diffusers' step caches look up what a block takes and returns
TransformerBlockRegistry.register(SpacetimeBlock, TransformerBlockMetadata(return_hidden_states_index=0))
AttentionProcessorRegistry.register(
    SpacetimeAttnProcessor, AttentionProcessorMetadata(_skip_attention___ret___hidden_states)
)


def _modulate(norm: nn.Module, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Norm, then scale and shift `(b, m, 1, d)` by the frame of each token; float32 inside."""
    normed = norm(x.float()).unflatten(1, (shift.shape[1], -1))
    return (normed * (1 + scale) + shift).flatten(1, 2).type_as(x)


def _gated_sum(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """Adds `y`, gated by the frame of each token; float32 inside."""
    gated = (y.float().unflatten(1, (gate.shape[1], -1)) * gate).flatten(1, 2)
    return (x.float() + gated).type_as(x)


class SpacetimeTransformer(
    StrictLoading, DispatchedAttention, ModelMixin, ConfigMixin, PeftAdapterMixin, CacheMixin, AttentionMixin
):
    """A diffusion Transformer over spacetime patches, with the arithmetic of the Wan 2.1 text-to-video Transformer.

    With the same weights it equals `diffusers.WanTransformer3DModel`; parameter and config names are the same where
    that class has the part. Beyond it: a noise level for every token frame, frame groups, a cache of past frames,
    keyframe slots, the frame rate, and divided attention.

    Args:
        patch_size: Latent frames, rows and columns of a patch.
        num_attention_heads: Heads.
        attention_head_dim: Channels of a head.
        in_channels: Channels of the latents.
        out_channels: Channels of the prediction; `None` means `in_channels`.
        text_dim: Channels of the prompt embeddings.
        freq_dim: Channels of the sinusoids of noise levels and frame rates.
        ffn_dim: Inner width of the feed-forward layers.
        num_layers: Blocks.
        cross_attn_norm: Whether to normalise before cross-attention.
        qk_norm: Must be `rms_norm_across_heads`.
        eps: Of the norms.
        image_dim: Must be `None`; image-to-video Wan is not served.
        added_kv_proj_dim: Must be `None`, likewise.
        rope_max_seq_len: Kept for conversion; positions are computed, not looked up.
        pos_embed_seq_len: Must be `None`, likewise.
        attention: `joint` over space and time, or `divided`: time, then space.
        tasks: What the weights were trained for, of `text`, `leading`, `keyframes`.
        group_modes: Which groups they were trained with, of `full`, `causal`, `chunk`.
        trained_token_frames: Token frames of the longest clip in training; `None` if unknown. With a state,
            `sink + window + piece` never exceeds it.
        chunk_size: Token frames of a run in `chunk` groups.
        window: Token frames that a state remembers.
        sink: Token frames from the start that a state never forgets.
        keyframe_slots: Slots a latent, the temporal compression of the VAE; 0 for none.
        frame_rate_embedding: Whether the network can be told the frame rate.

    Source: Wan, arXiv 2503.20314, section 4.2; scalable diffusion Transformers, arXiv 2212.09748.
    """

    _supports_gradient_checkpointing = True
    _skip_layerwise_casting_patterns = [
        "patch_embedding", "keyframe_embedding", "condition_embedder", "frame_rate", "norm",
    ]  # fmt: skip
    _no_split_modules = ["SpacetimeBlock"]
    _keep_in_fp32_modules = ["time_embedder", "scale_shift_table", "norm1", "norm2", "norm3", "norm_time"]
    _repeated_blocks = ["SpacetimeBlock"]
    _skip_keys = ["state", "cache"]
    temporal = ("attn_time",)
    """In the names of all parameters that mix frames alone; there are some where attention is divided."""

    @register_to_config
    def __init__(
        self,
        patch_size: Sequence[int] = (1, 2, 2),
        num_attention_heads: int = 40,
        attention_head_dim: int = 128,
        in_channels: int = 16,
        out_channels: int | None = 16,
        text_dim: int = 4096,
        freq_dim: int = 256,
        ffn_dim: int = 13824,
        num_layers: int = 40,
        cross_attn_norm: bool = True,
        qk_norm: str | None = "rms_norm_across_heads",
        eps: float = 1e-6,
        image_dim: int | None = None,
        added_kv_proj_dim: int | None = None,
        rope_max_seq_len: int = 1024,
        pos_embed_seq_len: int | None = None,
        attention: str = "joint",
        tasks: Sequence[str] = ("text",),
        group_modes: Sequence[str] = ("full",),
        trained_token_frames: int | None = None,
        chunk_size: int = 1,
        window: int | None = None,
        sink: int = 0,
        keyframe_slots: int = 0,
        frame_rate_embedding: bool = False,
    ) -> None:
        super().__init__()
        for name, value in (("image_dim", image_dim), ("added_kv_proj_dim", added_kv_proj_dim)):
            if value is not None:
                raise ValueError(f"{name}={value}: the image-to-video layout of Wan is not served")
        if out_channels not in (None, in_channels):
            raise ValueError(
                f"in_channels={in_channels} with out_channels={out_channels}: layouts that take conditions as "
                "channels, such as the image-to-video layout of Wan 2.2, are not served"
            )
        if pos_embed_seq_len is not None or qk_norm != "rms_norm_across_heads":
            raise ValueError(f"pos_embed_seq_len={pos_embed_seq_len} with qk_norm={qk_norm!r} is not served")
        if attention not in ATTENTIONS:
            raise ValueError(f"attention={attention!r} is unknown: give one of {', '.join(ATTENTIONS)}")
        dim = num_attention_heads * attention_head_dim
        patch = (patch_size[0], patch_size[1], patch_size[2])
        self.rope = RotaryPositions(attention_head_dim)
        self.patch_embedding = nn.Conv3d(in_channels, dim, kernel_size=patch, stride=patch)
        self.keyframe_embedding = None
        if keyframe_slots:
            slots = keyframe_slots * (in_channels + 1)
            self.keyframe_embedding = nn.Conv3d(slots, dim, kernel_size=patch, stride=patch, bias=False)
            nn.init.zeros_(self.keyframe_embedding.weight)
        self.condition_embedder = ConditionEmbedder(dim, freq_dim, text_dim)
        self.frame_rate_embedder = FrameRateEmbedder(dim, freq_dim) if frame_rate_embedding else None
        self.blocks = nn.ModuleList(
            SpacetimeBlock(dim, ffn_dim, num_attention_heads, cross_attn_norm, eps, attention == "divided")
            for _ in range(num_layers)
        )
        self.norm_out = FP32LayerNorm(dim, eps, elementwise_affine=False)
        self.proj_out = nn.Linear(dim, (out_channels or in_channels) * math.prod(patch))
        self.scale_shift_table = nn.Parameter(torch.randn(1, 2, dim) / dim**0.5)
        self.gradient_checkpointing = False
        register_state_keys(self)
        self.state_identity = network_identity(self)

    @property
    def patch_size(self) -> tuple[int, int, int]:
        """Latent frames of a token frame; rows and columns that latents must be multiples of."""
        return self.config.patch_size

    @property
    def text_dim(self) -> int:
        """Channels of prompt embeddings."""
        return self.config.text_dim

    @apply_lora_scale("attention_kwargs")
    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor | None,
        *,
        encoder_attention_mask: Tensor | None = None,
        frame_rate: float | Tensor | None = None,
        keyframes: Tensor | None = None,
        groups: Groups = "full",
        state: TemporalState | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> Any:
        """Predicts what the scheduler asks for, at every latent.

        Args:
            hidden_states: Normalised latents `(b, c, t, h, w)`.
            timestep: `(b,)`, or `(b, n)` with one noise level for each token frame; in the scheduler's timesteps.
            encoder_hidden_states: Prompt embeddings `(b, l, text_dim)`; `None` skips cross-attention.
            encoder_attention_mask: `(b, l)`, 1 where a prompt token is to be seen.
            frame_rate: Pixel frames per second, one or `(b,)`; `None` or NaN adds nothing.
            keyframes: Slots `(b, s * (c + 1), t, h, w)`; `None` equals zeros.
            groups: A mode, or integers `(n,)` or `(b, n)`: frame i sees frame j iff `groups[j] <= groups[i]`. With a
                state they order this piece only; all of it sees every cached frame.
            state: What the stream remembers. Written unless `state.frozen()`.
            attention_kwargs: `{"scale": ...}` scales LoRA layers.
            return_dict: Whether to return a `Transformer2DModelOutput` or a tuple.

        Returns:
            `.sample` `(b, c, t, h, w)`.

        Raises:
            ValueError: A size is no multiple of the patch, or shapes do not fit one another.
        """
        p_t, p_h, p_w = self.config.patch_size
        b, _, t, height, width = hidden_states.shape
        if t % p_t or height % p_h or width % p_w:
            raise ValueError(
                f"latents of (t, h, w) = ({t}, {height}, {width}) cannot be cut into patches of {(p_t, p_h, p_w)}: "
                "each side must be a multiple"
            )
        n, rows, columns = t // p_t, height // p_h, width // p_w

        cache = None if state is None else FrameCache.opened(self, state, n)
        offset = 0 if cache is None else cache.num_frames
        positions = torch.arange(offset, offset + n, device=hidden_states.device)
        rotary_emb = self.rope(positions, rows, columns)
        past_rotary = None
        if cache is not None and offset:
            past_rotary = self.rope(cache.positions(hidden_states.device), rows, columns)
        mask = self._mask(groups, n, rows * columns, offset, hidden_states)

        tokens = self.patch_embedding(hidden_states)
        if keyframes is not None:
            tokens = tokens + self._embed_keyframes(keyframes)
        tokens = rearrange(tokens, "b d n h w -> b (n h w) d").contiguous()

        dtype = tokens.dtype if encoder_hidden_states is None else encoder_hidden_states.dtype
        rate = self._embed_frame_rate(frame_rate, b, hidden_states.device)
        temb, modulation = self.condition_embedder(self._timesteps(timestep, b, n), dtype, rate)
        prompt_mask = None
        if encoder_hidden_states is not None:
            encoder_hidden_states = self.condition_embedder.text_embedder(encoder_hidden_states)
            if encoder_attention_mask is not None:
                hidden = rearrange(encoder_attention_mask == 0, "b l -> b 1 1 l")
                prompt_mask = torch.zeros(hidden.shape, dtype=tokens.dtype, device=tokens.device)
                prompt_mask = prompt_mask.masked_fill(hidden, float("-inf"))

        write = cache is not None and cache.state.writable
        written: dict[str, tuple[Tensor, Tensor]] = {}
        block: Any
        for block in self.blocks:
            past = None if cache is None else cache.read(block.cache_key, b, rows * columns)
            inputs = (encoder_hidden_states, modulation, rotary_emb, n, mask, prompt_mask, past, past_rotary)
            if write:
                tokens, *written[block.cache_key] = block(tokens, *inputs, return_key_value=True)
            elif torch.is_grad_enabled() and self.gradient_checkpointing:
                tokens = self._gradient_checkpointing_func(block, tokens, *inputs)
            else:
                tokens = block(tokens, *inputs)
        if cache is not None and write:
            cache.write(written)

        shift, scale = rearrange(self.scale_shift_table + temb.unsqueeze(2), "b m k d -> k b m 1 d")
        tokens = self.proj_out(_modulate(self.norm_out, tokens, shift, scale))
        output = rearrange(
            tokens,
            "b (n h w) (i j k c) -> b c (n i) (h j) (w k)",
            n=n, h=rows, w=columns, i=p_t, j=p_h, k=p_w,
        )  # fmt: skip
        return Transformer2DModelOutput(sample=output) if return_dict else (output,)

    @classmethod
    def from_diffusers(cls, source: WanTransformer3DModel) -> SpacetimeTransformer:
        """The same network, from diffusers' class.

        Raises:
            ValueError: It has the image-to-video layout.
        """
        return with_same_weights(source, cls)

    def to_diffusers(self) -> WanTransformer3DModel:
        """The same network, as diffusers' class; parts that are still zero are left behind.

        Raises:
            ValueError: Attention is divided, or keyframes or the frame rate do something.
        """
        if self.config.attention != "joint":
            raise ValueError("WanTransformer3DModel has no divided attention")
        for part in _BEYOND_WAN:
            refuse_nonzero(self, f"{part}.{'embedder.linear_2' if 'rate' in part else ''}", "Wan has no such part")
        return with_same_weights(self, WanTransformer3DModel, dropped=_BEYOND_WAN)

    def _mask(self, groups: Groups, n: int, p: int, num_cached: int, like: Tensor) -> Tensor | None:
        numbers = group_tensor(groups, n, self.config.chunk_size, like.device)
        mask = group_mask(numbers, num_cached, like.dtype)
        if mask is None or self.config.attention == "divided":
            return mask
        return repeat(mask, "b i q k -> b i (q p) (k r)", p=p, r=p)

    def _timesteps(self, timestep: Tensor, b: int, n: int) -> Tensor:
        """`(b,)` or `(b, n)` to `(b, m)`."""
        if timestep.ndim == 0:
            timestep = timestep.expand(b)
        levels = timestep[:, None] if timestep.ndim == 1 else timestep
        if levels.shape[0] != b or levels.shape[1] not in (1, n):
            raise ValueError(f"timestep of shape {tuple(timestep.shape)}: give ({b},) or ({b}, {n})")
        return levels

    def _embed_keyframes(self, keyframes: Tensor) -> Tensor:
        if self.keyframe_embedding is None:
            raise ValueError("this network has no keyframe slots (keyframe_slots=0 in its config)")
        return self.keyframe_embedding(keyframes)

    def _embed_frame_rate(self, frame_rate: float | Tensor | None, b: int, device: torch.device) -> Tensor | None:
        if frame_rate is None:
            return None
        if self.frame_rate_embedder is None:
            logger.warning_once("frame_rate is ignored: this network has no frame_rate_embedding")
            return None
        rates = torch.as_tensor(frame_rate, dtype=torch.float32, device=device)
        return self.frame_rate_embedder(rates.expand(b))
