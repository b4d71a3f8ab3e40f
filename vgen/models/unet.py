"""UNet3D: a 2D diffusion U-Net with temporal layers, optionally causal in time.

Axes: `b` batch, `c` channels, `n` latent frames, `h w` rows and columns, `p` positions in a frame, `l` prompt tokens,
`m` is 1 or `n`. Spatial layers fold frames into the batch: `(b n) c h w`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from diffusers import CacheMixin, ConfigMixin, ModelMixin, UNet2DConditionModel
from diffusers.configuration_utils import register_to_config
from diffusers.hooks._helpers import (
    AttentionProcessorMetadata,
    AttentionProcessorRegistry,
    _skip_attention___ret___hidden_states,
)
from diffusers.loaders import PeftAdapterMixin
from diffusers.loaders.peft import _SET_ADAPTER_SCALE_FN_MAPPING
from diffusers.loaders.unet_loader_utils import _maybe_expand_lora_scales
from diffusers.models.activations import get_activation
from diffusers.models.attention import AttentionMixin
from diffusers.models.attention_processor import Attention
from diffusers.models.downsampling import Downsample2D
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.unets.unet_3d_condition import UNet3DConditionOutput
from diffusers.models.upsampling import Upsample2D
from diffusers.utils import apply_lora_scale, logging
from einops import rearrange, repeat
from torch import Tensor, nn

from vgen.checks import check_choice, check_choices
from vgen.models.denoiser import (
    ActionEmbedder,
    DispatchedAttention,
    FrameRateEmbedder,
    estimate_linearly,
    expand_frame_rate,
)
from vgen.models.loading import StrictLoading, load_strictly
from vgen.models.transformer import Task
from vgen.temporal.attention import (
    DispatchedAttnProcessor,
    FrameCache,
    GroupIds,
    Groups,
    PromptCache,
    RotaryPositions,
    SpacetimeAttention,
    attention_mask,
    group_ids,
    once,
)
from vgen.temporal.conv import CausalConv3d
from vgen.temporal.state import History, TemporalState, network_identity, register_state_keys

logger = logging.get_logger(__name__)

TimeNorm = Literal["default", "scale_shift"]
DownBlock = Literal["CrossAttnDownBlock2D", "DownBlock2D"]
UpBlock = Literal["CrossAttnUpBlock2D", "UpBlock2D"]


class SpatialAttnProcessor(DispatchedAttnProcessor):
    """Attention inside diffusers' 2D blocks. All frames of a video share the keys of their prompt."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        prompt_cache: PromptCache | None = None,
        **_: Any,
    ) -> Tensor:
        """Maps `((b n), p, c)` to the same shape: self-attention, or cross-attention to a prompt `(b, l, d)`.

        Cross-attention returns zeros if there is no prompt.
        """
        rows = hidden_states.shape[0]

        def split(x: Tensor) -> Tensor:
            return rearrange(x, "b n (h d) -> b n h d", h=attn.heads)

        def key_value(source: Tensor) -> tuple[Tensor, Tensor]:
            return split(attn.to_k(source)), split(attn.to_v(source))

        if attn.is_cross_attention:
            if encoder_hidden_states is None:
                return torch.zeros_like(hidden_states)
            hidden_states = hidden_states.reshape(encoder_hidden_states.shape[0], -1, hidden_states.shape[-1])
        query = split(attn.to_q(hidden_states))
        if encoder_hidden_states is None:
            key, value = key_value(hidden_states)
        else:
            key, value = once(prompt_cache, attn, key_value, encoder_hidden_states)
        out = self.attend(query, key, value, None if attention_mask is None else attention_mask[:, None])
        out = rearrange(out, "b n h d -> b n (h d)").type_as(query)
        for layer in attn.to_out:
            out = layer(out)
        return out.reshape(rows, -1, out.shape[-1])


# diffusers' guiders that skip attention look up what a processor returns
AttentionProcessorRegistry.register(
    SpatialAttnProcessor, AttentionProcessorMetadata(_skip_attention___ret___hidden_states)
)
# adapters are scaled block by block under the names that the 2D U-Net's blocks have
_SET_ADAPTER_SCALE_FN_MAPPING["UNet3D"] = _maybe_expand_lora_scales


@dataclass
class Context:
    """Inputs that all layers of one forward pass share."""

    temb: Tensor
    """Embedding of noise level and frame rate, `((b n), d)`."""
    prompt: Tensor | None
    """Prompt embeddings, `(b, l, d)`."""
    prompt_mask: Tensor | None
    """Additive mask over prompt tokens, `(b, 1, l)`."""
    prompt_cache: PromptCache | None
    num_frames: int
    """Number of latent frames, `n`."""
    num_context: int
    """How many of them, at the end, are context of temporal convolutions; they attend to themselves only."""
    positions: Tensor
    """Time positions of the frames, `(n,)`."""
    rotary_emb: tuple[Tensor, Tensor]
    groups: GroupIds
    """Groups of the other frames."""
    history: History | None = None
    cache: FrameCache | None = None
    cache_rotary_emb: tuple[Tensor, Tensor] | None = None
    masks: dict[tuple[int, torch.device], Any] = field(default_factory=dict)
    """Attention masks and runs, by tokens per frame and device."""
    written: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Keys and values computed in this pass, by layer."""
    perm: Tensor | None = None
    """Permutation of the rows `((b n), ...)` applied before temporal convolutions; `None` is the identity."""
    inverse_perm: Tensor | None = None
    """Permutation applied to their output, to restore the order of the frames."""

    def mask(self, attn: SpacetimeAttention, tokens: int, like: Tensor) -> Any:
        """The attention mask or runs of temporal attention, with this many tokens per frame."""
        key = (tokens, like.device)
        if key not in self.masks:
            num_cached = 0 if self.cache is None else self.cache.num_frames
            mask = attention_mask(
                self.groups, attn.processor.takes_mask, like,
                num_cached=num_cached, num_isolated=self.num_context, tokens=tokens,
            )  # fmt: skip
            self.masks[key] = (
                mask if self.cache is None else self.cache.mask_empty(mask, self.num_frames, tokens, like)
            )
        return self.masks[key]

    def to(self, device: torch.device) -> Context:
        """Copies the tensors to a stage's device. The history and the cache stay on the devices of their layers."""
        if self.temb.device == device:
            return self

        def move(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(map(move, value))
            return value.to(device) if isinstance(value, Tensor) else value

        return replace(self, **{item.name: move(getattr(self, item.name)) for item in fields(self)})


class TemporalConv(nn.Module):
    """A residual causal convolution over time. Its weights start at zero, so it starts as the identity.

    Args:
        channels: Channels of input and output.
        groups: Groups of the norm, which is computed per frame.
        eps: Epsilon of the norm.
    """

    def __init__(self, channels: int, groups: int, eps: float) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps)
        self.conv = CausalConv3d(channels, channels, (3, 1, 1))
        for weight in self.conv.parameters():
            nn.init.zeros_(weight)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """Maps `((b n), c, h, w)` to the same shape."""
        n = context.num_frames
        y = F.silu(self.norm(x))
        y = y if context.perm is None else y[context.perm]
        y = self.conv(rearrange(y, "(b n) c h w -> b c n h w", n=n), context.history)
        y = rearrange(y, "b c n h w -> (b n) c h w")
        return x + (y if context.inverse_perm is None else y[context.inverse_perm])


class TemporalAttention(nn.Module):
    """Residual attention over time at each spatial position. It starts as the identity.

    Args:
        channels: Channels of input and output.
        head_dim: Channels per head.
    """

    def __init__(self, channels: int, head_dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.attn = SpacetimeAttention(channels, channels // head_dim, head_dim)
        for weight in self.attn.to_out.parameters():
            nn.init.zeros_(weight)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """Maps `((b n), c, h, w)` to the same shape."""
        n, (height, width) = context.num_frames, x.shape[2:]
        b, p = x.shape[0] // n, height * width
        tokens = self.norm(rearrange(x, "(b n) c h w -> (b h w) n c", n=n))
        mask, key, past = context.mask(self.attn, 1, tokens), self.attn.state_key, None
        if context.cache is not None:
            cached = context.cache.read(key, b, p, context.cache_rotary_emb)
            past = cached and tuple(rearrange(part, "b k p h d -> (b p) k h d") for part in cached)
        if isinstance(mask, Tensor) and mask.shape[0] > 1:
            mask = repeat(mask, "b i q k -> (b p) i q k", p=p)
        out, *pair = self.attn(tokens, None, mask, context.rotary_emb, past, True)
        if context.cache is not None:
            keys, values = (rearrange(part, "(b p) n h d -> b n p h d", p=p) for part in pair)
            context.written[key] = keys, values
        return x + rearrange(out, "(b h w) n c -> (b n) c h w", h=height, w=width)


class NonLocalBlock(nn.Module):
    """Residual attention over all positions of all frames, masked by `groups`. It starts as the identity.

    Args:
        channels: Channels of input and output.
        head_dim: Channels per head.

    Source: Non-local neural networks, arXiv 1711.07971.
    """

    def __init__(self, channels: int, head_dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.rope = RotaryPositions(head_dim)
        self.attn = SpacetimeAttention(channels, channels // head_dim, head_dim)
        for weight in self.attn.to_out.parameters():
            nn.init.zeros_(weight)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """Maps `((b n), c, h, w)` to the same shape."""
        n, (height, width) = context.num_frames, x.shape[2:]
        b, p, key = x.shape[0] // n, height * width, self.attn.state_key
        tokens = self.norm(rearrange(x, "(b n) c h w -> b (n h w) c", n=n))
        mask, rotary, past = context.mask(self.attn, p, tokens), self.rope(context.positions, height, width), None
        if context.cache is not None:
            cached = context.cache.read(key, b, p, context.cache.rotary(self.rope, height, width, x.device))
            past = cached and (cached[0].flatten(1, 2), cached[1].flatten(1, 2))
        out, *pair = self.attn(tokens, None, mask, rotary, past, True)
        if context.cache is not None:
            keys, values = (rearrange(part, "b (n p) h d -> b n p h d", p=p) for part in pair)
            context.written[key] = keys, values
        return x + rearrange(out, "b (n h w) c -> (b n) c h w", n=n, h=height, w=width)


class Stage(nn.Module):
    """Residual blocks of one spatial resolution with their temporal layers, and an optional change of resolution.

    Spatial layers have the names that they have in diffusers' 2D U-Net.

    Args:
        channels: Input channels of each residual block.
        out_channels: Output channels of all blocks.
        attends: For each residual block, whether attention follows it.
        settings: Settings of the network.
        heads: Heads of spatial attention.
        num_layers: Transformer blocks in each spatial attention.
    """

    def __init__(
        self,
        channels: Sequence[int],
        out_channels: int,
        attends: Sequence[bool],
        settings: Settings,
        heads: int,
        num_layers: int,
    ) -> None:
        super().__init__()
        self.gradient_checkpointing = False
        self._gradient_checkpointing_func: Any = None  # diffusers sets both
        self.resnets = nn.ModuleList(settings.resnet(in_channels, out_channels) for in_channels in channels)
        self.temporal_convs = nn.ModuleList(
            TemporalConv(out_channels, settings.groups, settings.eps) for _ in channels
        )
        self.attends = tuple(attends)
        if any(attends):
            count = sum(attends)
            self.attentions = nn.ModuleList(settings.attention(out_channels, heads, num_layers) for _ in range(count))
            self.temporal_attentions = nn.ModuleList(
                TemporalAttention(out_channels, settings.temporal_head_dim) for _ in range(count)
            )

    def forward(self, x: Tensor, context: Context, skips: Sequence[Tensor] = ()) -> tuple[Tensor, list[Tensor]]:
        """Maps `((b n), c, h, w)` to `((b n), c', h', w')`.

        Args:
            x: Output of the previous stage.
            context: Shared inputs of the forward pass.
            skips: In the upsampling path, the skip connection of each block, in reverse order.

        Returns:
            The output, and in the downsampling path the output of every layer, for the skip connections.
        """
        context, outputs = context.to(x.device), []
        going_down = not skips
        for index in range(len(self.resnets)):
            x = x if going_down else torch.cat([x, skips[-1 - index]], dim=1)
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                x = self._gradient_checkpointing_func(self._layer, index, x, context)
            else:
                x = self._layer(index, x, context)
            outputs += [x] if going_down else []
        for resample in (*getattr(self, "downsamplers", ()), *getattr(self, "upsamplers", ())):
            x = resample(x)
            outputs += [x] if going_down else []
        return x, outputs

    def _layer(self, index: int, x: Tensor, context: Context) -> Tensor:
        """One residual block, its temporal convolution and, if it has any, its attention."""
        x = self.resnets[index](x, context.temb)
        x = self.temporal_convs[index](x, context)
        if self.attends[index]:
            position = sum(self.attends[:index])
            x = self.attentions[position](
                x,
                context.prompt,
                cross_attention_kwargs={"prompt_cache": context.prompt_cache},
                encoder_attention_mask=context.prompt_mask,
                return_dict=False,
            )[0]
            x = self.temporal_attentions[position](x, context)
        return x


@dataclass(frozen=True)
class Settings:
    """Settings that all stages of a network share."""

    temb_channels: int
    groups: int
    eps: float
    act_fn: str
    cross_attention_dim: int
    use_linear_projection: bool
    upcast_attention: bool
    temporal_head_dim: int
    time_norm: str

    def resnet(self, in_channels: int, out_channels: int) -> ResnetBlock2D:
        """A residual block of diffusers."""
        return ResnetBlock2D(
            in_channels=in_channels,
            out_channels=out_channels,
            temb_channels=self.temb_channels,
            eps=self.eps,
            groups=self.groups,
            non_linearity=self.act_fn,
            time_embedding_norm=self.time_norm,
        )

    def attention(self, channels: int, heads: int, num_layers: int) -> Transformer2DModel:
        """Spatial attention and cross-attention of diffusers, with processors that use its dispatcher."""
        model = Transformer2DModel(
            heads,
            channels // heads,
            in_channels=channels,
            num_layers=num_layers,
            cross_attention_dim=self.cross_attention_dim,
            norm_num_groups=self.groups,
            use_linear_projection=self.use_linear_projection,
            upcast_attention=self.upcast_attention,
        )
        for module in model.modules():
            if isinstance(module, Attention):
                module.set_processor(SpatialAttnProcessor())
        return model


class UNet3D(
    StrictLoading, DispatchedAttention, ModelMixin, ConfigMixin, PeftAdapterMixin, CacheMixin, AttentionMixin
):
    """A denoiser with the spatial layers of a 2D diffusion U-Net and temporal layers that start as the identity.

    A freshly inflated network (`from_unet2d`) gives for every frame the output of the 2D network. Only the temporal
    layers mix frames: convolutions that are causal in every mode, and temporal attention masked by `groups`.
    Parameter and config names are those of `diffusers.UNet2DConditionModel` for the layers that it has.

    Args:
        sample_size: Unused; kept for conversion.
        in_channels: Channels of the latents.
        out_channels: Channels of the prediction.
        flip_sin_to_cos: Whether cosines precede sines in the embedding of noise levels.
        freq_shift: Frequency shift of these sinusoids.
        down_block_types: `CrossAttnDownBlock2D` or `DownBlock2D` for each resolution.
        up_block_types: `CrossAttnUpBlock2D` or `UpBlock2D` for each resolution, lowest first.
        block_out_channels: Channels of each resolution.
        layers_per_block: Residual blocks per resolution in the downsampling path; the upsampling path has one more.
        downsample_padding: Padding of the downsampling convolutions.
        act_fn: Activation function, as diffusers names it.
        resnet_time_scale_shift: How noise levels enter residual blocks: added (`default`), or as scale and shift of
            the second norm (`scale_shift`).
        norm_num_groups: Groups of the norms, which are computed per frame.
        norm_eps: Epsilon of the norms.
        cross_attention_dim: Channels of the prompt embeddings.
        transformer_layers_per_block: Transformer blocks in each spatial attention.
        attention_head_dim: Number of heads of spatial attention, one number or one for each resolution. The misleading
            name is that of diffusers' config.
        use_linear_projection: Whether spatial attention uses linear layers instead of 1x1 convolutions for projection.
        upcast_attention: Unused; kept for conversion. Precision depends on the attention backend.
        temporal_head_dim: Channels per head of temporal attention.
        non_local: Whether to add joint attention over space and time after the middle block.
        tasks: Tasks that the weights were trained for, of `text`, `leading`, `keyframes`.
        group_modes: Group modes that the weights were trained with, of `full`, `causal`, `chunk`.
        trained_token_frames: Latent frames of the longest training clip; `None` if unknown. With a state, `sink`,
            `window` and the new latent frames together never exceed it.
        chunk_size: Latent frames per chunk in `chunk` groups.
        window: Number of recent latent frames in the KV cache.
        sink: Number of latent frames at the start of a stream that are never evicted from the KV cache.
        keyframe_slots: Keyframe slots per latent, equal to the temporal compression of the VAE; 0 disables keyframes.
        still_keyframes: Whether the latent of a keyframe is that of a clip in which the frame stands still, so that it
            looks like the latents around it. Otherwise it is that of the frame alone, the first of a video.
        frame_rate_embedding: Whether the network is conditioned on the frame rate.
        action_dim: Channels of the action of one pixel frame; 0 for a network without actions.
        action_frames: Pixel frames per latent frame, whose actions are taken together.
        residual: Whether the network predicts the difference from `estimate_linearly`, so that it begins as good as a
            linear blend of the known frames. It needs flow matching. Training and pipelines fill the empty keyframe
            slots for it (`fill_keyframes`); whoever calls the network alone does that before.
        trained_frame_rates: Lowest and highest frame rate of the training clips in frames per second, for messages
            only; `None` if unknown.

    Raises:
        ValueError: A block type is unknown, the number of block types does not match, or `temporal_head_dim` does not
            divide the channels of every resolution.

    Source: Video diffusion models, arXiv 2204.03458; AnimateDiff, arXiv 2307.04725; latent diffusion models,
        arXiv 2112.10752.
    """

    _supports_gradient_checkpointing = True
    _skip_layerwise_casting_patterns = [
        "norm",
        "conv_in",
        "keyframe_embedding",
        "time_embedding",
        "frame_rate",
        "action",
    ]
    _no_split_modules = ["Stage", "BasicTransformerBlock", "ResnetBlock2D"]
    _repeated_blocks = ["BasicTransformerBlock", "ResnetBlock2D"]
    _skip_keys = ["state", "prompt_cache"]
    conv_history = 2
    """Number of preceding latent frames in the receptive field of one temporal convolution."""
    condition_channels = 0
    """Channels of a condition, which only Transformers have."""
    temporal = ("temporal_", "keyframe_embedding", "frame_rate_embedder", "action_embedder")
    """Substrings that identify the parameters that a 2D network does not have."""

    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, int] | None = None,
        in_channels: int = 4,
        out_channels: int = 4,
        flip_sin_to_cos: bool = True,
        freq_shift: int = 0,
        down_block_types: Sequence[DownBlock] = (*3 * ("CrossAttnDownBlock2D",), "DownBlock2D"),
        up_block_types: Sequence[UpBlock] = ("UpBlock2D", *3 * ("CrossAttnUpBlock2D",)),
        block_out_channels: Sequence[int] = (320, 640, 1280, 1280),
        layers_per_block: int = 2,
        downsample_padding: int = 1,
        act_fn: str = "silu",
        resnet_time_scale_shift: TimeNorm = "default",
        norm_num_groups: int = 32,
        norm_eps: float = 1e-5,
        cross_attention_dim: int = 1280,
        transformer_layers_per_block: int = 1,
        attention_head_dim: int | Sequence[int] = 8,
        use_linear_projection: bool = False,
        upcast_attention: bool = False,
        temporal_head_dim: int = 64,
        non_local: bool = False,
        tasks: Sequence[Task] = ("text",),
        group_modes: Sequence[str] = ("full",),
        trained_token_frames: int | None = None,
        chunk_size: int = 1,
        window: int | None = None,
        sink: int = 0,
        keyframe_slots: int = 0,
        still_keyframes: bool = False,
        frame_rate_embedding: bool = False,
        action_dim: int = 0,
        action_frames: int = 1,
        residual: bool = False,
        trained_frame_rates: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        depth = len(block_out_channels)
        check_choices("tasks", tasks, Task)
        check_choice("resnet_time_scale_shift", resnet_time_scale_shift, TimeNorm)
        blocks: tuple[tuple[str, Sequence[str], Any], ...] = (
            ("down_block_types", down_block_types, DownBlock),
            ("up_block_types", up_block_types, UpBlock),
        )
        for name, types, choices in blocks:
            check_choices(name, types, choices)
            if len(types) != depth:
                raise ValueError(
                    f"{name} must have one entry for each of the {depth} block_out_channels, got {len(types)}"
                )
        if any(channels % temporal_head_dim for channels in block_out_channels):
            raise ValueError(
                f"temporal_head_dim must divide each of block_out_channels={tuple(block_out_channels)}, "
                f"got {temporal_head_dim}"
            )
        heads = [attention_head_dim] * depth if isinstance(attention_head_dim, int) else list(attention_head_dim)
        channels, lowest = list(block_out_channels), block_out_channels[-1]
        time_dim = 4 * channels[0]
        settings = Settings(
            time_dim, norm_num_groups, norm_eps, act_fn, cross_attention_dim, use_linear_projection,
            upcast_attention, temporal_head_dim, resnet_time_scale_shift,
        )  # fmt: skip
        self.rope = RotaryPositions(temporal_head_dim)
        self.conv_in = nn.Conv2d(in_channels, channels[0], 3, padding=1)
        self.keyframe_embedding = None
        if keyframe_slots:
            slots = keyframe_slots * (in_channels + 1)
            self.keyframe_embedding = nn.Conv2d(slots, channels[0], 3, padding=1, bias=False)
            nn.init.zeros_(self.keyframe_embedding.weight)
        self.time_proj = Timesteps(channels[0], flip_sin_to_cos, freq_shift)
        self.time_embedding = TimestepEmbedding(channels[0], time_dim, act_fn=act_fn)
        self.frame_rate_embedder = FrameRateEmbedder(time_dim, channels[0]) if frame_rate_embedding else None
        self.action_embedder = ActionEmbedder(action_dim * action_frames, time_dim) if action_dim else None

        def stage(inputs: Sequence[int], level: int, attends: Sequence[bool]) -> Stage:
            return Stage(inputs, channels[level], attends, settings, heads[level], transformer_layers_per_block)

        self.down_blocks = nn.ModuleList()
        skips = [channels[0]]
        for level, kind in enumerate(down_block_types):
            inputs = [channels[max(0, level - 1)], *[channels[level]] * (layers_per_block - 1)]
            block = stage(inputs, level, [kind.startswith("CrossAttn")] * layers_per_block)
            skips += [channels[level]] * layers_per_block
            if level < depth - 1:
                down = Downsample2D(channels[level], use_conv=True, padding=downsample_padding, name="op")
                block.downsamplers = nn.ModuleList([down])
                skips.append(channels[level])
            self.down_blocks.append(block)
        self.mid_block = stage([lowest, lowest], depth - 1, (True, False))
        self.temporal_non_local = NonLocalBlock(lowest, temporal_head_dim) if non_local else None
        self.up_blocks = nn.ModuleList()
        previous = lowest
        for level, up_kind in zip(reversed(range(depth)), up_block_types, strict=True):
            inputs = []
            for _ in range(layers_per_block + 1):
                inputs.append(previous + skips.pop())
                previous = channels[level]
            block = stage(inputs, level, [up_kind.startswith("CrossAttn")] * (layers_per_block + 1))
            if level:
                block.upsamplers = nn.ModuleList([Upsample2D(channels[level], use_conv=True)])
            self.up_blocks.append(block)
        self.conv_norm_out = nn.GroupNorm(norm_num_groups, channels[0], norm_eps)
        self.conv_act = get_activation(act_fn)
        self.conv_out = nn.Conv2d(channels[0], out_channels, 3, padding=1)
        if residual:
            for weight in self.conv_out.parameters():
                nn.init.zeros_(weight)
        register_state_keys(self)
        self.state_identity = network_identity(self)

    @property
    def takes_frame_rate(self) -> bool:
        """Whether the network is conditioned on the frame rate."""
        return self.config.frame_rate_embedding

    @property
    def patch_size(self) -> tuple[int, int, int]:
        """Latent frames per token frame (always 1), and the divisor of the latents' height and of their width."""
        unit = 2 ** (len(self.config.block_out_channels) - 1)
        return 1, unit, unit

    @property
    def text_dim(self) -> int:
        """Channels of the prompt embeddings."""
        return self.config.cross_attention_dim

    @property
    def pads_cache(self) -> bool:
        """Whether reads from a KV cache include empty slots, so that compiled code sees one shape."""
        if not torch.compiler.is_compiling():
            return False
        return all(
            module.attn.processor.takes_mask for module in self.modules() if isinstance(module, TemporalAttention)
        )

    def enable_cache(self, config: Any) -> None:
        """Always raises, because diffusers' step caches work on Transformer blocks only.

        Raises:
            ValueError: Always.
        """
        raise ValueError(f"{type(config).__name__} is not supported by UNet3D: step caches work on Transformers only")

    def _set_gradient_checkpointing(self, *args: Any, **kwargs: Any) -> None:
        super()._set_gradient_checkpointing(*args, **kwargs)
        for module in self.modules():
            if isinstance(module, Transformer2DModel):
                module.gradient_checkpointing = False  # checkpointing recomputes whole layers of a stage

    @apply_lora_scale("attention_kwargs")
    def forward(
        self,
        sample: Tensor | None = None,
        timestep: Tensor | float | None = None,
        encoder_hidden_states: Tensor | None = None,
        *,
        hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        frame_rate: float | Tensor | None = None,
        actions: Tensor | None = None,
        keyframes: Tensor | None = None,
        groups: Groups = "full",
        state: TemporalState | None = None,
        conv_context: Tensor | None = None,
        gap_index: Tensor | None = None,
        prompt_cache: PromptCache | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> Any:
        """Predicts the scheduler's target (velocity or noise) for every latent frame.

        Args:
            sample: Normalized latents `(b, c, n, h, w)`.
            timestep: Noise levels as scheduler timesteps: one number, `(1,)`, `(b,)`, or `(b, n)` with one for each
                frame.
            encoder_hidden_states: Prompt embeddings `(b, l, d)`; `None` or `l = 0` skips cross-attention.
            hidden_states: The latents under the name that Transformers have for them, instead of `sample`.
            encoder_attention_mask: `(b, l)`, 1 for prompt tokens to attend to and 0 for padding.
            frame_rate: Pixel frames per second, a number or `(b,)`; `None` or NaN means unconditional.
            actions: Actions of the frames `(b, n, action_frames * action_dim)`; `None` or NaN means unknown. Those of
                the frames of `conv_context` follow. See `vgen.temporal.actions`.
            keyframes: Keyframe slots `(b, s * (c + 1), n, h, w)`; `None` equals zeros.
            groups: A group mode, or integers `(n,)` or `(b, n)`, for temporal attention: frame i attends to frame j
                iff `groups[j] <= groups[i]`. With a state they apply within these frames only, all of which attend to
                every cached frame. Integers in a list need no attention mask; a tensor does.
            state: Memory of the stream. It is updated unless it is `state.frozen()`.
            conv_context: Clean latents `(b, c, k, h, w)`, for training on clips with a gap in time, like a stream with
                evicted frames. They precede frame `gap_index` as input of the temporal convolutions. No frame attends
                to them.
            gap_index: Index of the first frame after each video's gap, `(b,)`; `n` for a video without a gap.
            prompt_cache: Keeps what depends on the prompt alone, for the next call with the same prompt and weights.
            attention_kwargs: `{"scale": ...}` scales LoRA layers.
            return_dict: Whether to return a `UNet3DConditionOutput` or a tuple.

        Returns:
            An output whose `sample` is the prediction `(b, c, n, h, w)`.

        Raises:
            ValueError: Height or width is not a multiple of the downsampling factor, or the shapes do not match.
        """
        hidden_states = sample if hidden_states is None else hidden_states
        if hidden_states is None or timestep is None:
            raise ValueError("pass the latents as sample, and their timestep")
        b, _, n, height, width = hidden_states.shape
        if encoder_hidden_states is not None and encoder_hidden_states.shape[0] != b:
            raise ValueError(f"expected one prompt for each of {b} videos, got {encoder_hidden_states.shape[0]}")
        if encoder_hidden_states is not None and not encoder_hidden_states.shape[1]:
            encoder_hidden_states = None
        unit = self.patch_size[1]
        if height % unit or width % unit:
            nearest = tuple(max(unit, round(side / unit) * unit) for side in (height, width))
            raise ValueError(
                f"(h, w) of the latents must be multiples of {unit}, got {(height, width)} (nearest: {nearest})"
            )
        noisy, num_visible, estimate = hidden_states, n, None
        if self.config.residual:
            levels = _levels(timestep, b, n, hidden_states.device)
            estimate = estimate_linearly(noisy, levels, keyframes)
        if conv_context is not None:
            if state is not None or gap_index is None:
                raise ValueError("conv_context needs gap_index and cannot be used with a state")
            hidden_states, timestep, keyframes = _append_context(conv_context, hidden_states, timestep, keyframes)
            n = hidden_states.shape[2]
        cache = None if state is None else FrameCache.open(self, state, n)
        device, past_rotary = hidden_states.device, None
        positions = torch.arange(n, device=device)
        if cache is not None:
            positions, past_rotary = cache.next_positions(n, device), cache.rotary(self.rope, 1, 1, device)
        ids = group_ids(groups, num_visible, self.config.chunk_size)
        perm = inverse_perm = None
        if conv_context is not None and gap_index is not None:
            ids = ((0,) * num_visible,) if ids is None else ids  # all attend to all but the context
            perm = _conv_order(gap_index.to(device), num_visible, n)
            inverse_perm = perm.argsort()
        if prompt_cache is not None and encoder_hidden_states is not None:
            prompt_cache.start(encoder_hidden_states)
        x = rearrange(hidden_states, "b c n h w -> (b n) c h w")
        context = Context(
            temb=self._embed_time(timestep, frame_rate, actions, b, n, x),
            prompt=encoder_hidden_states,
            prompt_mask=_additive(encoder_attention_mask, x.dtype),
            prompt_cache=prompt_cache,
            num_frames=n,
            num_context=n - num_visible,
            positions=positions,
            rotary_emb=self.rope(positions, 1, 1),
            groups=ids,
            history=None if state is None else state.history(),
            cache=cache,
            cache_rotary_emb=past_rotary,
            perm=perm,
            inverse_perm=inverse_perm,
        )

        x = self.conv_in(x)
        if keyframes is not None:
            if self.keyframe_embedding is None:
                raise ValueError("this network does not support keyframes (keyframe_slots=0 in its config)")
            x = x + self.keyframe_embedding(rearrange(keyframes, "b c n h w -> (b n) c h w"))
        skips = [x]
        block: Any
        for block in self.down_blocks:
            x, outputs = block(x, context)
            skips += outputs
        x, _ = self.mid_block(x, context)
        if self.temporal_non_local is not None:
            x = self.temporal_non_local(x, context)
        for block in self.up_blocks:
            first = len(skips) - len(block.resnets)
            x, _ = block(x, context, skips[first:])
            del skips[first:]
        x = self.conv_out(self.conv_act(self.conv_norm_out(x)))
        if cache is not None and context.history is not None and cache.state.writable:
            cache.write(context.written)
            cache.state.commit(context.history)
        output = rearrange(x, "(b n) c h w -> b c n h w", n=n)[:, :, :num_visible]
        output = output if estimate is None else (output + estimate).to(noisy.dtype)
        return UNet3DConditionOutput(sample=output) if return_dict else (output,)

    @classmethod
    def from_unet2d(
        cls, source: UNet2DConditionModel | str | Path, subfolder: str | None = None, **config: Any
    ) -> UNet3D:
        """Inflates a 2D U-Net of the Stable Diffusion family (the layouts of 1.5 and 2.1).

        Args:
            source: The network, or a folder or Hub id to load it from.
            subfolder: Subfolder of the source that holds the network, such as `unet`.
            config: Settings that the 2D network does not have, such as `group_modes` or `keyframe_slots`. By default
                temporal heads have 64 channels, or the largest divisor of 64 that divides the channels of every
                resolution.

        Raises:
            ValueError: The layout is unsupported, the weights do not match the config, or `config` overrides a setting
                of the 2D network. The error names the part.
        """
        if isinstance(source, (str, Path)):
            options = {} if subfolder is None else {"subfolder": subfolder}
            source = load_strictly(UNet2DConditionModel.from_pretrained, "UNet2DConditionModel", source, **options)
        for name, supported in _SUPPORTED.items():
            if source.config.get(name, supported[0]) not in supported:
                raise ValueError(f"unsupported 2D U-Net: {name} must be {supported[0]!r}, got {source.config[name]!r}")
        for name in ("layers_per_block", "transformer_layers_per_block", "cross_attention_dim"):
            if not isinstance(source.config[name], int):
                raise ValueError(f"unsupported 2D U-Net: {name} must be a single integer, got {source.config[name]!r}")
        own = sorted(set(config) & set(source.config))
        if own:
            raise ValueError(f"these settings come from the 2D U-Net and cannot be overridden: {', '.join(own)}")
        names = set(cls._get_init_keys(cls))
        shared = {name: value for name, value in source.config.items() if name in names}
        shared["temporal_head_dim"] = math.gcd(64, *source.config.block_out_channels)
        target = cls(**shared | config)
        weights = {name: value.detach().clone() for name, value in source.state_dict().items()}
        missing, unexpected = target.load_state_dict(weights, strict=False, assign=True)
        missing = [name for name in missing if not any(part in name for part in target.temporal)]
        if missing or unexpected:
            raise ValueError(
                f"the weights of this 2D U-Net do not match: missing {missing[:8]}, unexpected {unexpected[:8]}"
            )
        nn.Module.to(target, source.device, source.dtype)  # diffusers' method warns about modules that do not exist
        return target.train(source.training)

    def _embed_time(
        self,
        timestep: Tensor | float,
        frame_rate: float | Tensor | None,
        actions: Tensor | None,
        b: int,
        n: int,
        like: Tensor,
    ) -> Tensor:
        """Embeds noise levels, frame rate and actions, `((b n), d)`."""
        levels = _levels(timestep, b, n, like.device)
        temb = self.time_embedding(self.time_proj(levels.flatten()).to(like.dtype)).unflatten(0, levels.shape)
        if frame_rate is not None and self.frame_rate_embedder is None:
            logger.warning_once("frame_rate is ignored: this network has no frame_rate_embedding")
        elif frame_rate is not None and self.frame_rate_embedder is not None:
            rates = expand_frame_rate(frame_rate, b, like.device)
            temb = temb + self.frame_rate_embedder(rates).to(temb)
        if self.action_embedder is not None:
            temb = temb + self.action_embedder(actions, b, n).to(temb)
        elif actions is not None:
            raise ValueError("this network does not take actions (action_dim=0 in its config)")
        return temb.expand(b, n, -1).flatten(0, 1)


def _levels(timestep: Tensor | float, b: int, n: int, device: torch.device) -> Tensor:
    """Brings timesteps to the shape `(b, 1)` or `(b, n)`.

    Raises:
        ValueError: They have another shape.
    """
    timestep = torch.as_tensor(timestep, device=device)
    levels = timestep.reshape(1).expand(b) if timestep.numel() == 1 else timestep
    levels = levels[:, None] if levels.ndim == 1 else levels
    if levels.shape[0] != b or levels.shape[1] not in (1, n):
        raise ValueError(f"timestep must be a number or have shape ({b},) or ({b}, {n}), got {tuple(timestep.shape)}")
    return levels


def _append_context(
    context: Tensor, latents: Tensor, timestep: Tensor | float, keyframes: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Appends clean latents `(b, c, k, h, w)` to latents, timesteps `(b, n + k)` and keyframe slots."""
    b, _, n = latents.shape[:3]
    k = context.shape[2]
    levels = _levels(timestep, b, n, latents.device).expand(b, n)
    keyframes = None if keyframes is None else F.pad(keyframes, (0, 0, 0, 0, 0, k))
    return torch.cat([latents, context.to(latents)], dim=2), F.pad(levels, (0, k)), keyframes


def _conv_order(gap_index: Tensor, num_visible: int, n: int) -> Tensor:
    """Permutation of rows `((b n), ...)` that moves frames from `num_visible` on to just before `gap_index` `(b,)`."""
    frames = torch.arange(n, device=gap_index.device)
    rank = torch.where(frames < num_visible, frames, gap_index[:, None] - 0.5)
    first_rows = n * torch.arange(len(gap_index), device=gap_index.device)[:, None]
    return (rank.argsort(dim=1, stable=True) + first_rows).flatten()


def _additive(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Turns a mask `(b, l)` of ones and zeros into an additive one, `(b, 1, l)`."""
    if mask is None:
        return None
    hidden = (mask == 0).unsqueeze(1)
    return torch.zeros(hidden.shape, dtype=dtype, device=mask.device).masked_fill(hidden, float("-inf"))


_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "addition_embed_type": (None,),
    "class_embed_type": (None,),
    "num_class_embeds": (None,),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "time_embedding_type": ("positional",),
    "time_embedding_dim": (None,),
    "time_embedding_act_fn": (None,),
    "timestep_post_act": (None,),
    "time_cond_proj_dim": (None,),
    "resnet_skip_time_act": (False,),
    "resnet_out_scale_factor": (1.0,),
    "mid_block_scale_factor": (1,),
    "mid_block_only_cross_attention": (None, False),
    "only_cross_attention": (False,),
    "dual_cross_attention": (False,),
    "cross_attention_norm": (None,),
    "attention_type": ("default",),
    "reverse_transformer_layers_per_block": (None,),
    "center_input_sample": (False,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "dropout": (0.0,),
}
