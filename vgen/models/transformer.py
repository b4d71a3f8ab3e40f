"""SpacetimeTransformer: a denoiser of spacetime patches, optionally causal in time.

Axes: `b` batch, `c` channels, `t h w` latent frames, rows and columns, `n` token frames, `p` tokens per token frame,
`d` width of the network, `l` prompt tokens, `m` is 1 or `n`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, cast

import torch
from diffusers import CacheMixin, ConfigMixin, ModelMixin, SkyReelsV2Transformer3DModel, WanTransformer3DModel
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

from vgen.checks import check_choice, check_choices
from vgen.models.convert.networks import refuse_nonzero, with_same_weights
from vgen.models.denoiser import (
    ActionEmbedder,
    DispatchedAttention,
    FrameRateEmbedder,
    dtype_of,
    estimate_linearly,
    expand_frame_rate,
)
from vgen.models.loading import StrictLoading
from vgen.temporal.attention import (
    FrameCache,
    Groups,
    PromptCache,
    RotaryPositions,
    SpacetimeAttention,
    SpacetimeAttnProcessor,
    attention_mask,
    group_ids,
    once,
)
from vgen.temporal.pointwise import gated_sum, gelu_tanh, modulated_norm
from vgen.temporal.state import TemporalState, network_identity, register_state_keys

logger = logging.get_logger(__name__)

Task = Literal["text", "leading", "keyframes"]
Attention = Literal["joint", "divided"]

_BEYOND_WAN = {
    "keyframe_embedding": ("keyframe_embedding.",),
    "frame_rate_embedder": ("frame_rate_embedder.embedder.linear_2",),
    "action_embedder": ("action_embedder.embedder.linear_2", "action_embedder.unknown"),
}
"""Layers that Wan's network lacks, and those of their weights that are zero if a layer has no effect."""


class ImageEmbedder(nn.Module):
    """Projects the tokens of an image encoder to the network's width.

    Args:
        image_dim: Channels of the tokens.
        dim: Width of the network.
        num_tokens: Number of tokens, each of which gets a position embedding; `None` for no position embedding.
    """

    def __init__(self, image_dim: int, dim: int, num_tokens: int | None = None) -> None:
        super().__init__()
        self.norm1 = FP32LayerNorm(image_dim)
        self.ff = FeedForward(image_dim, dim, mult=1, activation_fn="gelu")
        self.norm2 = FP32LayerNorm(dim)
        self.pos_embed = None if num_tokens is None else nn.Parameter(torch.zeros(1, num_tokens, image_dim))

    def forward(self, image_embeds: Tensor) -> Tensor:
        """Maps `(b, k, image_dim)` to `(b, k, d)`.

        Raises:
            ValueError: There is another number of tokens than positions.
        """
        if self.pos_embed is not None:
            if image_embeds.shape[1] != self.pos_embed.shape[1]:
                raise ValueError(
                    f"image_embeds must have {self.pos_embed.shape[1]} tokens, those of the first and the last frame, "
                    f"got {image_embeds.shape[1]}"
                )
            image_embeds = image_embeds + self.pos_embed
        return self.norm2(self.ff(self.norm1(image_embeds)))


class ConditionEmbedder(nn.Module):
    """Embeds noise levels and frame rates as modulation, and projects prompts and images to the network's width."""

    def __init__(
        self, dim: int, freq_dim: int, text_dim: int, image_dim: int | None = None, image_tokens: int | None = None
    ) -> None:
        super().__init__()
        self.timesteps_proj = Timesteps(freq_dim, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedder = TimestepEmbedding(freq_dim, dim)
        self.time_proj = nn.Linear(dim, dim * 6)
        self.text_embedder = PixArtAlphaTextProjection(text_dim, dim, act_fn="gelu_tanh")
        self.image_embedder = None if image_dim is None else ImageEmbedder(image_dim, dim, image_tokens)

    def forward(self, timestep: Tensor, dtype: torch.dtype, extra: Tensor | None) -> tuple[Tensor, Tensor]:
        """Embeds timesteps `(b, m)` and adds `extra` `(b, m, d)`, where either `m` may be 1.

        Returns:
            The sum `(b, m, d)` and its projection `(b, m, 6, d)`.
        """
        m = timestep.shape[1]
        sinusoids = self.timesteps_proj(timestep.flatten())
        temb = self.time_embedder(sinusoids.to(dtype_of(self.time_embedder))).to(dtype)
        temb = rearrange(temb, "(b m) d -> b m d", m=m)
        temb = temb if extra is None else temb + extra.to(dtype)
        return temb, rearrange(self.time_proj(nn.functional.silu(temb)), "b m (k d) -> b m k d", k=6)


class TanhGELU(nn.Module):
    """A linear layer and the tanh approximation of GELU, with the parameter names of diffusers' `GELU`."""

    def __init__(self, proj: nn.Linear) -> None:
        super().__init__()
        self.proj = proj

    def forward(self, x: Tensor) -> Tensor:
        """Maps `(b, n, d)` to `(b, n, ffn_dim)`."""
        return gelu_tanh(self.proj(x))


class SpacetimeBlock(nn.Module):
    """Self-attention over space and time, cross-attention to the prompt, feed-forward.

    With divided attention (TimeSformer, arXiv 2102.05095), tokens attend first over time at their own position
    (`attn_time`), then over space within their own frame (`attn1`).
    """

    def __init__(
        self,
        dim: int,
        ffn_dim: int,
        num_heads: int,
        cross_attn_norm: bool,
        eps: float,
        divided: bool,
        added_dim: int | None = None,
    ) -> None:
        super().__init__()
        self.divided = divided
        dim_head = dim // num_heads
        self.eps = eps
        if divided:
            self.attn_time = SpacetimeAttention(dim, num_heads, dim_head, eps)
        self.attn1 = SpacetimeAttention(dim, num_heads, dim_head, eps)
        self.attn2 = SpacetimeAttention(dim, num_heads, dim_head, eps, is_cross_attention=True, added_dim=added_dim)
        self.norm2 = FP32LayerNorm(dim, eps, elementwise_affine=True) if cross_attn_norm else nn.Identity()
        self.ffn = FeedForward(dim, inner_dim=ffn_dim, activation_fn="gelu-approximate")
        self.ffn.net[0] = TanhGELU(self.ffn.net[0].proj)
        self.scale_shift_table = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)

    @property
    def cache_key(self) -> str:
        """The key under which a state stores the keys and values of the attention over time."""
        return (self.attn_time if self.divided else self.attn1).state_key

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None,
        temb: Tensor,
        rotary_emb: tuple[Tensor, Tensor],
        num_frames: int,
        attention_mask: Any = None,
        encoder_attention_mask: Tensor | None = None,
        cache: tuple[Tensor, Tensor] | None = None,
        prompt_cache: PromptCache | None = None,
        image_states: Tensor | None = None,
        return_key_value: bool = False,
    ) -> Any:
        """Maps tokens `(b, n * p, d)` to the same shape.

        Args:
            hidden_states: `(b, n * p, d)`, frame by frame.
            encoder_hidden_states: Prompt `(b, l, d)`; `None` skips cross-attention.
            temb: Modulation `(b, m, 6, d)`.
            rotary_emb: Cosines and sines `(n * p, head / 2)`.
            num_frames: `n`.
            attention_mask: Additive mask or runs over tokens, or over token frames if attention is divided.
            encoder_attention_mask: Additive mask `(b, 1, 1, l)`.
            cache: Rotated keys, and values, `(b, k, p, h, head)` of `k` earlier token frames.
            prompt_cache: Keeps the keys and values of the prompt.
            image_states: Image tokens `(b, k, d)`.
            return_key_value: Whether to return `(hidden_states, key, value)`, the last two `(b, n, p, h, head)`.
        """
        modulation = rearrange(self.scale_shift_table + temb.float(), "b m k d -> k b m 1 d")
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = modulation

        x = modulated_norm(hidden_states, shift, scale, self.eps)
        over_time = self._divided_time if self.divided else self._joint
        out, *key_value = over_time(x, num_frames, rotary_emb, attention_mask, cache, return_key_value)
        hidden_states = gated_sum(hidden_states, out, gate)
        if self.divided:
            x = modulated_norm(hidden_states, shift, scale, self.eps)
            hidden_states = gated_sum(hidden_states, self._divided_space(x, num_frames, rotary_emb), gate)

        if encoder_hidden_states is not None:
            x = self.norm2(hidden_states.float()).type_as(hidden_states)  # float32
            hidden_states = hidden_states + self.attn2(
                x, encoder_hidden_states, encoder_attention_mask, prompt_cache=prompt_cache, image_states=image_states
            )

        x = self.ffn(modulated_norm(hidden_states, ffn_shift, ffn_scale, self.eps))
        hidden_states = gated_sum(hidden_states, x, ffn_gate)
        return (hidden_states, *key_value) if return_key_value else hidden_states

    def _joint(
        self,
        x: Tensor,
        n: int,
        rotary_emb: tuple[Tensor, Tensor],
        mask: Any,
        cache: tuple[Tensor, Tensor] | None,
        return_key_value: bool,
    ) -> tuple[Tensor, ...]:
        past = cache and (cache[0].flatten(1, 2), cache[1].flatten(1, 2))
        out = self.attn1(x, None, mask, rotary_emb, past, return_key_value)
        if not return_key_value:
            return (out,)
        return out[0], *(rearrange(part, "b (n p) h d -> b n p h d", n=n) for part in out[1:])

    def _divided_time(
        self,
        x: Tensor,
        n: int,
        rotary_emb: tuple[Tensor, Tensor],
        mask: Any,
        cache: tuple[Tensor, Tensor] | None,
        return_key_value: bool,
    ) -> tuple[Tensor, ...]:
        b, p = x.shape[0], x.shape[1] // n
        # spatial angles cancel between tokens at one position, so the angles of the first position do for all
        time_rotary = (rotary_emb[0].unflatten(0, (n, p))[:, 0], rotary_emb[1].unflatten(0, (n, p))[:, 0])
        past = cache and tuple(rearrange(part, "b k p h d -> (b p) k h d") for part in cache)
        if isinstance(mask, Tensor) and mask.shape[0] > 1:
            mask = repeat(mask, "b i q k -> (b p) i q k", p=p)
        x = rearrange(x, "b (n p) d -> (b p) n d", n=n)
        out = self.attn_time(x, None, mask, time_rotary, past, return_key_value)
        out, *key_value = out if return_key_value else (out,)
        key_value = [rearrange(part, "(b p) n h d -> b n p h d", p=p) for part in key_value]
        return rearrange(out, "(b p) n d -> b (n p) d", b=b), *key_value

    def _divided_space(self, x: Tensor, n: int, rotary_emb: tuple[Tensor, Tensor]) -> Tensor:
        p = x.shape[1] // n
        space_rotary = tuple(part[:p] for part in rotary_emb)
        out = self.attn1(rearrange(x, "b (n p) d -> (b n) p d", n=n), rotary_emb=space_rotary)
        return rearrange(out, "(b n) p d -> b (n p) d", n=n)


# diffusers' step caches look up the inputs and outputs of a block
TransformerBlockRegistry.register(SpacetimeBlock, TransformerBlockMetadata(return_hidden_states_index=0))
AttentionProcessorRegistry.register(
    SpacetimeAttnProcessor, AttentionProcessorMetadata(_skip_attention___ret___hidden_states)
)


class SpacetimeTransformer(
    StrictLoading, DispatchedAttention, ModelMixin, ConfigMixin, PeftAdapterMixin, CacheMixin, AttentionMixin
):
    """A diffusion Transformer over spacetime patches, with the arithmetic of the Wan Transformer.

    With the same weights it equals `diffusers.WanTransformer3DModel`. Parameter and config names are the same for the
    layers that both classes have. It adds one noise level per token frame, frame groups, a KV cache of past frames,
    keyframe slots, frame-rate conditioning and divided attention.

    Args:
        patch_size: Latent frames, rows and columns per patch.
        num_attention_heads: Number of heads.
        attention_head_dim: Channels per head.
        in_channels: Channels of the latents, and of the condition if there is one (`condition`).
        out_channels: Channels of the latents and of the prediction; `None` means `in_channels`.
        text_dim: Channels of the prompt embeddings.
        freq_dim: Channels of the sinusoidal embeddings of noise levels and frame rates.
        ffn_dim: Inner width of the feed-forward layers.
        num_layers: Number of blocks.
        cross_attn_norm: Whether to normalize before cross-attention.
        qk_norm: Must be `rms_norm_across_heads`.
        eps: Epsilon of the norms.
        image_dim: Channels of the image tokens of Wan 2.1 image to video; `None` if there are none.
        added_kv_proj_dim: Width of the network if there are image tokens, else `None`.
        rope_max_seq_len: Unused; kept for conversion. Rotary angles are computed, not looked up.
        pos_embed_seq_len: Number of image tokens of the first and the last frame together, which then have position
            embeddings; `None` for tokens of the first frame without them.
        attention: `joint` attention over space and time, or `divided`: over time, then over space.
        tasks: Tasks that the weights were trained for, of `text`, `leading`, `keyframes`.
        group_modes: Group modes that the weights were trained with, of `full`, `causal`, `chunk`.
        trained_token_frames: Token frames of the longest training clip; `None` if unknown. With a state, `sink`,
            `window` and the new token frames together never exceed it.
        chunk_size: Token frames per chunk in `chunk` groups.
        window: Number of recent token frames in the KV cache.
        sink: Number of token frames at the start of a stream that are never evicted from the KV cache.
        keyframe_slots: Keyframe slots per latent, equal to the temporal compression of the VAE; 0 disables keyframes.
        still_keyframes: Whether the latent of a keyframe is that of a clip in which the frame stands still, so that it
            looks like the latents around it. Otherwise it is that of the frame alone, the first of a video.
        frame_rate_embedding: Whether the network is conditioned on the frame rate.
        inject_sample_info: Whether it is conditioned on one of two frame rates, 16 or any other, as in SkyReels-V2 DF
            1.3B.
        action_dim: Channels of the action of one pixel frame; 0 for a network without actions.
        action_frames: Pixel frames per token frame, whose actions are taken together.
        residual: Whether the network predicts the difference from `estimate_linearly`, so that it begins as good as a
            linear blend of the known frames. It needs flow matching. Training and pipelines fill the empty keyframe
            slots for it (`fill_keyframes`); whoever calls the network alone does that before.
        trained_frame_rates: Lowest and highest frame rate of the training clips in frames per second, for messages
            only; `None` if unknown.

    Raises:
        ValueError: The layout is unsupported, or `attention` or one of `tasks` is unknown.

    Source: Wan, arXiv 2503.20314, section 4.2; scalable diffusion Transformers, arXiv 2212.09748.
    """

    _supports_gradient_checkpointing = True
    _skip_layerwise_casting_patterns = [
        "patch_embedding", "keyframe_embedding", "condition_embedder", "frame_rate", "action", "norm",
    ]  # fmt: skip
    _no_split_modules = ["SpacetimeBlock"]
    _keep_in_fp32_modules = ["time_embedder", "scale_shift_table", "norm2"]
    _repeated_blocks = ["SpacetimeBlock"]
    _skip_keys = ["state", "cache", "prompt_cache"]
    temporal = ("attn_time",)
    """Substrings that identify purely temporal parameters, which exist if attention is divided."""

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
        attention: Attention = "joint",
        tasks: Sequence[Task] = ("text",),
        group_modes: Sequence[str] = ("full",),
        trained_token_frames: int | None = None,
        chunk_size: int = 1,
        window: int | None = None,
        sink: int = 0,
        keyframe_slots: int = 0,
        still_keyframes: bool = False,
        frame_rate_embedding: bool = False,
        inject_sample_info: bool = False,
        action_dim: int = 0,
        action_frames: int = 1,
        residual: bool = False,
        trained_frame_rates: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        dim = num_attention_heads * attention_head_dim
        if out_channels is not None and out_channels > in_channels:
            raise ValueError(f"out_channels must be at most in_channels={in_channels}, got {out_channels}")
        if (image_dim is None) != (added_kv_proj_dim is None) or added_kv_proj_dim not in (None, dim):
            raise ValueError(
                f"image_dim={image_dim} needs added_kv_proj_dim={None if image_dim is None else dim}, got "
                f"{added_kv_proj_dim}"
            )
        if image_dim is None and pos_embed_seq_len is not None:
            raise ValueError(f"pos_embed_seq_len={pos_embed_seq_len} needs image_dim")
        if (residual or keyframe_slots) and out_channels not in (None, in_channels):
            raise ValueError("keyframe_slots and residual are for networks without a condition (out_channels)")
        if qk_norm != "rms_norm_across_heads":
            raise ValueError(f"qk_norm must be 'rms_norm_across_heads', got {qk_norm!r}")
        check_choice("attention", attention, Attention)
        check_choices("tasks", tasks, Task)
        patch = (patch_size[0], patch_size[1], patch_size[2])
        self.rope = RotaryPositions(attention_head_dim)
        self.patch_embedding = nn.Conv3d(in_channels, dim, kernel_size=patch, stride=patch)
        self.keyframe_embedding = None
        if keyframe_slots:
            slots = keyframe_slots * (in_channels + 1)
            self.keyframe_embedding = nn.Conv3d(slots, dim, kernel_size=patch, stride=patch, bias=False)
            nn.init.zeros_(self.keyframe_embedding.weight)
        self.condition_embedder = ConditionEmbedder(dim, freq_dim, text_dim, image_dim, pos_embed_seq_len)
        self.frame_rate_embedder = FrameRateEmbedder(dim, freq_dim) if frame_rate_embedding else None
        self.action_embedder = ActionEmbedder(action_dim * action_frames, dim) if action_dim else None
        self.fps_embedding = nn.Embedding(2, dim) if inject_sample_info else None
        self.fps_projection = (
            FeedForward(dim, 6 * dim, mult=1, activation_fn="linear-silu") if inject_sample_info else None
        )
        self.blocks = nn.ModuleList(
            SpacetimeBlock(
                dim, ffn_dim, num_attention_heads, cross_attn_norm, eps, attention == "divided", added_kv_proj_dim
            )
            for _ in range(num_layers)
        )
        self.proj_out = nn.Linear(dim, (out_channels or in_channels) * math.prod(patch))
        if residual:
            for weight in self.proj_out.parameters():
                nn.init.zeros_(weight)
        self.scale_shift_table = nn.Parameter(torch.randn(1, 2, dim) / dim**0.5)
        self.gradient_checkpointing = False
        register_state_keys(self)
        self.state_identity = network_identity(self)

    @property
    def patch_size(self) -> tuple[int, int, int]:
        """Latent frames per token frame, and the divisor of the latents' height and of their width."""
        return self.config.patch_size

    @property
    def text_dim(self) -> int:
        """Channels of the prompt embeddings."""
        return self.config.text_dim

    @property
    def takes_frame_rate(self) -> bool:
        """Whether the network is conditioned on the frame rate."""
        return self.config.frame_rate_embedding or self.config.inject_sample_info

    @property
    def condition_channels(self) -> int:
        """Channels of the condition; 0 without one."""
        return self.config.in_channels - (self.config.out_channels or self.config.in_channels)

    @apply_lora_scale("attention_kwargs")
    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor | None,
        *,
        encoder_attention_mask: Tensor | None = None,
        frame_rate: float | Tensor | None = None,
        actions: Tensor | None = None,
        keyframes: Tensor | None = None,
        condition: Tensor | None = None,
        image_embeds: Tensor | None = None,
        groups: Groups = "full",
        state: TemporalState | None = None,
        prompt_cache: PromptCache | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> Any:
        """Predicts the scheduler's target (velocity or noise) for every latent frame.

        Args:
            hidden_states: Normalized latents `(b, c, t, h, w)`.
            timestep: Noise levels as scheduler timesteps: one number, `(1,)`, `(b,)`, or `(b, n)` with one for each
                token frame.
            encoder_hidden_states: Prompt embeddings `(b, l, text_dim)`; `None` or `l = 0` skips cross-attention.
            encoder_attention_mask: `(b, l)`, 1 for prompt tokens to attend to and 0 for padding.
            frame_rate: Pixel frames per second, a number or `(b,)`; `None` or NaN means unconditional.
            actions: Actions of the token frames `(b, n, action_frames * action_dim)`; `None` or NaN means unknown. See
                `vgen.temporal.actions`.
            keyframes: Keyframe slots `(b, s * (c + 1), t, h, w)`; `None` equals zeros.
            condition: Mask and latents of the known frames `(b, condition_channels, t, h, w)`, for networks with more
                `in_channels` than `out_channels`; see `vgen.sampling.known_frames.encode_condition`.
            image_embeds: Tokens of the image encoder for known frames `(b, k, image_dim)`, for networks with
                `image_dim`.
            groups: A group mode, or integers `(n,)` or `(b, n)`: frame i attends to frame j iff
                `groups[j] <= groups[i]`. With a state they apply within these frames only, all of which attend to
                every cached frame. Integers in a list need no attention mask; a tensor does.
            state: Memory of the stream. It is updated unless it is `state.frozen()`.
            prompt_cache: Keeps what depends on the prompt alone, for the next call with the same prompt and weights.
            attention_kwargs: `{"scale": ...}` scales LoRA layers.
            return_dict: Whether to return a `Transformer2DModelOutput` or a tuple.

        Returns:
            An output whose `sample` is the prediction `(b, c, t, h, w)`.

        Raises:
            ValueError: A size is not a multiple of the patch size, the shapes do not match, or an input is missing or
                not supported.
        """
        self._check_condition(condition, image_embeds)
        p_t, p_h, p_w = self.config.patch_size
        b, _, t, height, width = hidden_states.shape
        if t % p_t or height % p_h or width % p_w:
            sizes, patch = (t, height, width), (p_t, p_h, p_w)
            nearest = tuple(max(p, round(size / p) * p) for size, p in zip(sizes, patch, strict=True))
            raise ValueError(
                f"(t, h, w) of the latents must be multiples of the patch size {patch}, got {sizes} "
                f"(nearest: {nearest})"
            )
        n, rows, columns = t // p_t, height // p_h, width // p_w

        cache = None if state is None else FrameCache.open(self, state, n)
        device, like = hidden_states.device, hidden_states
        is_joint = self.config.attention == "joint"
        joined: tuple[int, int] = (rows, columns) if is_joint else (1, 1)  # tokens of a frame in one sequence
        mask = attention_mask(
            group_ids(groups, n, self.config.chunk_size), self._takes_mask, like,
            num_cached=0 if cache is None else cache.num_frames, tokens=math.prod(joined),
        )  # fmt: skip
        positions, past_rotary = torch.arange(n, device=device), None
        if cache is not None:
            positions, past_rotary = cache.next_positions(n, device), cache.rotary(self.rope, *joined, device)
            mask = cache.mask_empty(mask, n, math.prod(joined), like)
        rotary_emb = self.rope(positions, rows, columns)

        estimate = None
        if self.config.residual:
            estimate = estimate_linearly(hidden_states, self._timesteps(timestep, b, n), keyframes)
        tokens = self.patch_embedding(
            hidden_states if condition is None else torch.cat([hidden_states, condition.to(hidden_states)], dim=1)
        )
        if keyframes is not None:
            tokens = tokens + self._embed_keyframes(keyframes)
        tokens = rearrange(tokens, "b d n h w -> b (n h w) d").contiguous()

        if encoder_hidden_states is not None and not encoder_hidden_states.shape[1]:
            encoder_hidden_states = None
        dtype = tokens.dtype if encoder_hidden_states is None else encoder_hidden_states.dtype
        extra = self._embed_frame_rate(frame_rate, b, hidden_states.device)
        if self.action_embedder is not None:
            acted = self.action_embedder(actions, b, n)
            extra = acted if extra is None else extra + acted
        elif actions is not None:
            raise ValueError("this network does not take actions (action_dim=0 in its config)")
        temb, modulation = self.condition_embedder(self._timesteps(timestep, b, n), dtype, extra)
        if self.fps_embedding is not None:
            modulation = modulation + self._project_frame_rate(frame_rate, b, hidden_states.device)
        prompt_mask = None
        if encoder_hidden_states is not None:
            if prompt_cache is not None:
                prompt_cache.start(encoder_hidden_states)
            project = self.condition_embedder.text_embedder
            encoder_hidden_states = once(prompt_cache, project, project, encoder_hidden_states)
            if encoder_attention_mask is not None:
                hidden = rearrange(encoder_attention_mask == 0, "b l -> b 1 1 l")
                prompt_mask = torch.zeros(hidden.shape, dtype=tokens.dtype, device=tokens.device)
                prompt_mask = prompt_mask.masked_fill(hidden, float("-inf"))
        image_states: Any = None
        if image_embeds is not None:
            image_embedder: Any = self.condition_embedder.image_embedder
            image_states = once(prompt_cache, image_embedder, image_embedder, image_embeds.to(tokens.dtype))

        write = cache is not None and cache.state.writable
        written: dict[str, tuple[Tensor, Tensor]] = {}
        block: Any
        for block in self.blocks:
            past = None if cache is None else cache.read(block.cache_key, b, rows * columns, past_rotary)
            inputs = (
                encoder_hidden_states, modulation, rotary_emb, n, mask, prompt_mask, past, prompt_cache, image_states,
            )  # fmt: skip
            if write:
                tokens, *written[block.cache_key] = block(tokens, *inputs, return_key_value=True)
            elif torch.is_grad_enabled() and self.gradient_checkpointing:
                tokens = self._gradient_checkpointing_func(block, tokens, *inputs)
            else:
                tokens = block(tokens, *inputs)
        if cache is not None and write:
            cache.write(written)

        shift, scale = rearrange(self.scale_shift_table + temb.unsqueeze(2), "b m k d -> k b m 1 d")
        tokens = self.proj_out(modulated_norm(tokens, shift, scale, self.config.eps))
        output = rearrange(
            tokens,
            "b (n h w) (i j k c) -> b c (n i) (h j) (w k)",
            n=n, h=rows, w=columns, i=p_t, j=p_h, k=p_w,
        )  # fmt: skip
        output = output if estimate is None else (output + estimate).to(like.dtype)
        return Transformer2DModelOutput(sample=output) if return_dict else (output,)

    @classmethod
    def from_single_file(cls, source: str | Path | dict[str, Tensor], **kwargs: Any) -> SpacetimeTransformer:
        """Loads one file: `.safetensors`, or `.gguf` with the extra `quantization`.

        The names of the weights are those of the original Wan repository or those of diffusers.

        Args:
            source: The file, a link to one on the Hub, or its weights.
            kwargs: Arguments of diffusers' `from_single_file`. `config` is a folder, a Hub id or a dictionary; by
                default, the sizes are those of the weights, with heads of 128 channels. `dtype` is by default that of
                the weights, and bfloat16 for float8.

        Raises:
            ValueError: The file is pickled or malformed, its weights do not match the network (the error names them),
                or one is NaN or infinite.
        """
        from vgen.models.single_file import load_single_file  # loads diffusers' converters

        return cast(SpacetimeTransformer, load_single_file(cls, source, **kwargs))

    @classmethod
    def from_diffusers(cls, source: WanTransformer3DModel | SkyReelsV2Transformer3DModel) -> SpacetimeTransformer:
        """Converts a diffusers model; the result has the same weights and gives the same output.

        Raises:
            ValueError: The model has another layout.
        """
        return with_same_weights(source, cls)

    def to_diffusers(self, shared: bool = False) -> WanTransformer3DModel | SkyReelsV2Transformer3DModel:
        """Converts to diffusers' class. Layers that it lacks are dropped if their weights are all zero.

        Args:
            shared: Whether the result shares the memory of the weights, instead of copying them.

        Raises:
            ValueError: Attention is divided, the network is residual, or the embedding of keyframes, frame rates or
                actions is not zero.
        """
        target = SkyReelsV2Transformer3DModel if self.config.inject_sample_info else WanTransformer3DModel
        if self.config.attention != "joint":
            raise ValueError(f"{target.__name__} does not support attention='divided'")
        if self.config.residual:
            raise ValueError(f"{target.__name__} does not support residual=True")
        for weight in itertools.chain(*_BEYOND_WAN.values()):
            refuse_nonzero(self, weight, f"{target.__name__} has no such layer")
        return with_same_weights(self, target, dropped=tuple(_BEYOND_WAN), shared=shared)

    @property
    def pads_cache(self) -> bool:
        """Whether reads from a KV cache include empty slots, so that compiled code sees one shape."""
        compiled = torch.compiler.is_compiling() or self.blocks[0]._compiled_call_impl is not None
        return compiled and self._takes_mask

    @property
    def _takes_mask(self) -> bool:
        block: Any = self.blocks[0]
        return block.attn1.processor.takes_mask

    def _timesteps(self, timestep: Tensor, b: int, n: int) -> Tensor:
        """Brings timesteps to the shape `(b, m)`."""
        if timestep.numel() == 1:
            timestep = timestep.reshape(1).expand(b)
        levels = timestep[:, None] if timestep.ndim == 1 else timestep
        if levels.shape[0] != b or levels.shape[1] not in (1, n):
            raise ValueError(
                f"timestep must be a number or have shape ({b},) or ({b}, {n}), got {tuple(timestep.shape)}"
            )
        return levels

    def _check_condition(self, condition: Tensor | None, image_embeds: Tensor | None) -> None:
        """Checks that inputs of image-to-video networks are given exactly where they are needed."""
        channels = 0 if condition is None else condition.shape[1]
        if channels != self.condition_channels:
            raise ValueError(f"condition must have {self.condition_channels} channels, got {channels}")
        if (image_embeds is None) != (self.config.image_dim is None):
            raise ValueError(
                f"image_embeds must be {'given' if image_embeds is None else 'None'} for a network with "
                f"image_dim={self.config.image_dim}"
            )

    def _embed_keyframes(self, keyframes: Tensor) -> Tensor:
        if self.keyframe_embedding is None:
            raise ValueError("this network does not support keyframes (keyframe_slots=0 in its config)")
        return self.keyframe_embedding(keyframes)

    def _project_frame_rate(self, frame_rate: float | Tensor | None, b: int, device: torch.device) -> Tensor:
        """The modulation `(b, 1, 6, d)` of a frame rate."""
        assert self.fps_embedding is not None and self.fps_projection is not None
        rates = expand_frame_rate(float("nan") if frame_rate is None else frame_rate, b, device)
        projected = self.fps_projection(self.fps_embedding((rates != 16).long()))
        return rearrange(projected, "b (k d) -> b 1 k d", k=6)

    def _embed_frame_rate(self, frame_rate: float | Tensor | None, b: int, device: torch.device) -> Tensor | None:
        if frame_rate is None or self.config.inject_sample_info:
            return None
        if self.frame_rate_embedder is None:
            logger.warning_once("frame_rate is ignored: this network has no frame_rate_embedding")
            return None
        return self.frame_rate_embedder(expand_frame_rate(frame_rate, b, device))
