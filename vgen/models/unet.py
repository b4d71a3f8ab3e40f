"""UNet3D: a denoiser of frames that is a 2D U-Net in space and causal, where asked, in time.

Axes: `b` batch, `c` channels, `n` latent frames, `h w` rows and columns, `p` places of a frame, `l` prompt tokens, `m`
is 1 or `n`. Frames are folded into the batch, `(b n) c h w`, wherever space is worked on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

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

from vgen.models.denoiser import DispatchedAttention, FrameRateEmbedder
from vgen.models.loading import StrictLoading, load_strictly
from vgen.temporal.attention import (
    DispatchedAttnProcessor,
    FrameCache,
    Groups,
    RotaryPositions,
    SpacetimeAttention,
    group_mask,
    group_tensor,
)
from vgen.temporal.conv import CausalConv3d
from vgen.temporal.state import History, TemporalState, network_identity, register_state_keys

logger = logging.get_logger(__name__)

DOWN_BLOCKS = ("CrossAttnDownBlock2D", "DownBlock2D")
UP_BLOCKS = ("CrossAttnUpBlock2D", "UpBlock2D")


class SpatialAttnProcessor(DispatchedAttnProcessor):
    """Attention of diffusers' 2D blocks; frames of a video share the keys of their prompt."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        """Maps `((b n), p, c)` to the same shape, attending to one another or to a prompt `(b, l, d)`.

        Without a prompt, cross-attention adds nothing.
        """
        rows = hidden_states.shape[0]
        if attn.is_cross_attention:
            if encoder_hidden_states is None:
                return torch.zeros_like(hidden_states)
            source = encoder_hidden_states
            hidden_states = hidden_states.reshape(source.shape[0], -1, hidden_states.shape[-1])
        else:
            source = hidden_states
        query, key, value = attn.to_q(hidden_states), attn.to_k(source), attn.to_v(source)
        query, key, value = (rearrange(x, "b n (h d) -> b n h d", h=attn.heads) for x in (query, key, value))
        out = self.attend(query, key, value, None if attention_mask is None else attention_mask[:, None])
        out = rearrange(out, "b n h d -> b n (h d)").type_as(query)
        for layer in attn.to_out:
            out = layer(out)
        return out.reshape(rows, -1, out.shape[-1])


# diffusers' guiders that disturb attention look up what a processor returns
AttentionProcessorRegistry.register(
    SpatialAttnProcessor, AttentionProcessorMetadata(_skip_attention___ret___hidden_states)
)


@dataclass
class Context:
    """What all layers of one call share."""

    temb: Tensor
    """Of noise levels and frame rate, `((b n), d)`."""
    prompt: Tensor | None
    prompt_mask: Tensor | None
    num_frames: int
    """`n`."""
    positions: Tensor
    """In time, `(n,)`."""
    past_positions: Tensor | None
    """Of the frames in the cache."""
    rotary_emb: tuple[Tensor, Tensor]
    mask: Tensor | None
    history: History | None = None
    cache: FrameCache | None = None
    cache_rotary_emb: tuple[Tensor, Tensor] | None = None
    written: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Keys and values of this call, by layer."""
    order: Tensor | None = None
    """Rows of `((b n), ...)` as convolutions over time are to have them; `None` leaves them."""
    back: Tensor | None = None
    """The rows of what these give in the order of the frames."""

    def to(self, device: torch.device) -> Context:
        """For a stage on another device; what is remembered lies where its layer is."""
        if self.temb.device == device:
            return self

        def move(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(map(move, value))
            return value.to(device) if isinstance(value, Tensor) else value

        return replace(self, **{one.name: move(getattr(self, one.name)) for one in fields(self)})


class TemporalConv(nn.Module):
    """A causal convolution over time that starts as nothing.

    Args:
        channels: Of input and output.
        groups: Of the norm, which sees one frame at a time.
        eps: Of the norm.
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
        y = y if context.order is None else y[context.order]
        y = self.conv(rearrange(y, "(b n) c h w -> b c n h w", n=n), context.history)
        y = rearrange(y, "b c n h w -> (b n) c h w")
        return x + (y if context.back is None else y[context.back])


class TemporalAttention(nn.Module):
    """Attention of each place over time, which starts as nothing.

    Args:
        channels: Of input and output.
        head_dim: Channels of a head.
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
        mask, key = context.mask, self.attn.state_key
        cached = None if context.cache is None else context.cache.read(key, b, p)
        past = cached and tuple(rearrange(part, "b k p h d -> (b p) k h d") for part in cached)
        if mask is not None and mask.shape[0] > 1:
            mask = repeat(mask, "b i q k -> (b p) i q k", p=p)
        out, *pair = self.attn(tokens, None, mask, context.rotary_emb, past, context.cache_rotary_emb, True)
        if context.cache is not None:
            keys, values = (rearrange(part, "(b p) n h d -> b n p h d", p=p) for part in pair)
            context.written[key] = keys, values
        return x + rearrange(out, "(b h w) n c -> (b n) c h w", h=height, w=width)


class NonLocalBlock(nn.Module):
    """Attention of every place in every frame to all others, which starts as nothing and obeys groups.

    Args:
        channels: Of input and output.
        head_dim: Channels of a head.

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
        mask = context.mask
        if mask is not None:
            mask = repeat(mask, "b i q k -> b i (q p) (k r)", p=p, r=p)
        rotary, past, past_rotary = self.rope(context.positions, height, width), None, None
        if context.cache is not None and context.past_positions is not None:
            cached = context.cache.read(key, b, p)
            past = cached and (cached[0].flatten(1, 2), cached[1].flatten(1, 2))
            past_rotary = self.rope(context.past_positions, height, width)
        out, *pair = self.attn(tokens, None, mask, rotary, past, past_rotary, True)
        if context.cache is not None:
            keys, values = (rearrange(part, "b (n p) h d -> b n p h d", p=p) for part in pair)
            context.written[key] = keys, values
        return x + rearrange(out, "b (n h w) c -> (b n) c h w", n=n, h=height, w=width)


class Stage(nn.Module):
    """Residual blocks of one resolution in space, each with its parts in time, and a change of resolution.

    Spatial parts have the names that they have in diffusers' 2D U-Net.

    Args:
        channels: Input channels of each residual block; the output has `out_channels`.
        out_channels: Of all blocks.
        attends: For each residual block, whether attention follows it.
        settings: Of the network.
        heads: Of spatial attention.
        num_layers: Transformer blocks of spatial attention.
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
            x: What the stage before gave.
            context: Of the call.
            skips: On the way up, what is joined to the input of each block, that of the last block first.

        Returns:
            The output, and on the way down what each part of it gave.
        """
        context, made = context.to(x.device), []
        going_down = not skips
        for index in range(len(self.resnets)):
            x = x if going_down else torch.cat([x, skips[-1 - index]], dim=1)
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                x = self._gradient_checkpointing_func(self._layer, index, x, context)
            else:
                x = self._layer(index, x, context)
            made += [x] if going_down else []
        for resample in (*getattr(self, "downsamplers", ()), *getattr(self, "upsamplers", ())):
            x = resample(x)
            made += [x] if going_down else []
        return x, made

    def _layer(self, index: int, x: Tensor, context: Context) -> Tensor:
        """One residual block with what follows it."""
        x = self.resnets[index](x, context.temb)
        x = self.temporal_convs[index](x, context)
        if self.attends[index]:
            place = sum(self.attends[:index])
            x = self.attentions[place](
                x, context.prompt, encoder_attention_mask=context.prompt_mask, return_dict=False
            )[0]
            x = self.temporal_attentions[place](x, context)
        return x


@dataclass(frozen=True)
class Settings:
    """What all stages of a network share."""

    temb_channels: int
    groups: int
    eps: float
    act_fn: str
    cross_attention_dim: int
    use_linear_projection: bool
    upcast_attention: bool
    temporal_head_dim: int

    def resnet(self, in_channels: int, out_channels: int) -> ResnetBlock2D:
        """The residual block of diffusers."""
        return ResnetBlock2D(
            in_channels=in_channels,
            out_channels=out_channels,
            temb_channels=self.temb_channels,
            eps=self.eps,
            groups=self.groups,
            non_linearity=self.act_fn,
        )

    def attention(self, channels: int, heads: int, num_layers: int) -> Transformer2DModel:
        """The attention of diffusers over space and to the prompt, through its dispatcher."""
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
    """A denoiser whose parts in space are those of a 2D diffusion U-Net, and whose parts in time start as nothing.

    Freshly inflated (`from_unet2d`), every frame comes out as the 2D network gives it. Nothing mixes frames but the
    temporal parts: causal convolutions, which never look ahead, and attention over time, which obeys `groups`.
    Parameter and config names are those of `diffusers.UNet2DConditionModel` where it has the part.

    Args:
        sample_size: Kept for conversion.
        in_channels: Channels of the latents.
        out_channels: Channels of the prediction.
        flip_sin_to_cos: Order in the sinusoids of noise levels.
        freq_shift: Of these sinusoids.
        down_block_types: `CrossAttnDownBlock2D` or `DownBlock2D` for each resolution.
        up_block_types: `CrossAttnUpBlock2D` or `UpBlock2D`, the lowest resolution first.
        block_out_channels: Channels of each resolution.
        layers_per_block: Residual blocks of a resolution on the way down; one more on the way up.
        downsample_padding: Of the convolutions that halve space.
        act_fn: Activation.
        norm_num_groups: Groups of the norms, which see one frame at a time.
        norm_eps: Of the norms.
        cross_attention_dim: Channels of the prompt embeddings.
        transformer_layers_per_block: Blocks of each attention over space.
        attention_head_dim: The number of heads of attention over space, one or one for each resolution; the name is
            that of diffusers' config.
        use_linear_projection: Whether attention over space projects with linear layers.
        upcast_attention: Kept for conversion; attention computes as precisely as its backend does.
        temporal_head_dim: Channels of a head of attention over time.
        non_local: Whether the middle ends with attention over space and time together.
        tasks: As for `SpacetimeTransformer`, like all that follow.
        group_modes: Which groups the weights were trained with.
        trained_token_frames: Latent frames of the longest clip in training.
        chunk_size: Latent frames of a run in `chunk` groups.
        window: Latent frames that a state remembers.
        sink: Latent frames from the start that a state never forgets.
        keyframe_slots: Slots a latent, the temporal compression of the VAE; 0 for none.
        frame_rate_embedding: Whether the network can be told the frame rate.

    Source: Video diffusion models, arXiv 2204.03458; AnimateDiff, arXiv 2307.04725; latent diffusion models,
        arXiv 2112.10752.
    """

    _supports_gradient_checkpointing = True
    _skip_layerwise_casting_patterns = ["norm", "conv_in", "keyframe_embedding", "time_embedding", "frame_rate"]
    _no_split_modules = ["Stage", "BasicTransformerBlock", "ResnetBlock2D"]
    _repeated_blocks = ["BasicTransformerBlock", "ResnetBlock2D"]
    _skip_keys = ["state"]
    conv_history = 2
    """Latent frames that a convolution over time sees before each."""
    temporal = ("temporal_", "keyframe_embedding", "frame_rate_embedder")
    """In the names of all parameters that a 2D network does not have."""

    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, int] | None = None,
        in_channels: int = 4,
        out_channels: int = 4,
        flip_sin_to_cos: bool = True,
        freq_shift: int = 0,
        down_block_types: Sequence[str] = (*3 * ("CrossAttnDownBlock2D",), "DownBlock2D"),
        up_block_types: Sequence[str] = ("UpBlock2D", *3 * ("CrossAttnUpBlock2D",)),
        block_out_channels: Sequence[int] = (320, 640, 1280, 1280),
        layers_per_block: int = 2,
        downsample_padding: int = 1,
        act_fn: str = "silu",
        norm_num_groups: int = 32,
        norm_eps: float = 1e-5,
        cross_attention_dim: int = 1280,
        transformer_layers_per_block: int = 1,
        attention_head_dim: int | Sequence[int] = 8,
        use_linear_projection: bool = False,
        upcast_attention: bool = False,
        temporal_head_dim: int = 64,
        non_local: bool = False,
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
        depth = len(block_out_channels)
        for name, given, legal in (
            ("down_block_types", down_block_types, DOWN_BLOCKS),
            ("up_block_types", up_block_types, UP_BLOCKS),
        ):
            if len(given) != depth or set(given) - set(legal):
                raise ValueError(f"{name}={list(given)}: give {depth} of {', '.join(legal)}")
        if any(channels % temporal_head_dim for channels in block_out_channels):
            raise ValueError(
                f"temporal_head_dim={temporal_head_dim} must divide block_out_channels={block_out_channels}"
            )
        heads = [attention_head_dim] * depth if isinstance(attention_head_dim, int) else list(attention_head_dim)
        channels, lowest = list(block_out_channels), block_out_channels[-1]
        time_dim = 4 * channels[0]
        settings = Settings(
            time_dim, norm_num_groups, norm_eps, act_fn, cross_attention_dim, use_linear_projection,
            upcast_attention, temporal_head_dim,
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
        for level, kind in zip(reversed(range(depth)), up_block_types, strict=True):
            inputs = []
            for _ in range(layers_per_block + 1):
                inputs.append(previous + skips.pop())
                previous = channels[level]
            block = stage(inputs, level, [kind.startswith("CrossAttn")] * (layers_per_block + 1))
            if level:
                block.upsamplers = nn.ModuleList([Upsample2D(channels[level], use_conv=True)])
            self.up_blocks.append(block)
        self.conv_norm_out = nn.GroupNorm(norm_num_groups, channels[0], norm_eps)
        self.conv_act = get_activation(act_fn)
        self.conv_out = nn.Conv2d(channels[0], out_channels, 3, padding=1)
        register_state_keys(self)
        self.state_identity = network_identity(self)

    @property
    def patch_size(self) -> tuple[int, int, int]:
        """Latent frames of a token frame; rows and columns that latents must be multiples of."""
        unit = 2 ** (len(self.config.block_out_channels) - 1)
        return 1, unit, unit

    @property
    def text_dim(self) -> int:
        """Channels of prompt embeddings."""
        return self.config.cross_attention_dim

    def enable_cache(self, config: Any) -> None:
        """Always raises: diffusers' caches of steps skip the blocks of transformers.

        Raises:
            ValueError: Says so.
        """
        raise ValueError(f"{type(config).__name__} skips the blocks of transformers, and UNet3D has others")

    def _set_gradient_checkpointing(self, *args: Any, **kwargs: Any) -> None:
        super()._set_gradient_checkpointing(*args, **kwargs)
        for module in self.modules():
            if isinstance(module, Transformer2DModel):
                module.gradient_checkpointing = False  # a stage's layers are computed again as a whole

    @apply_lora_scale("attention_kwargs")
    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor | float,
        encoder_hidden_states: Tensor | None,
        *,
        encoder_attention_mask: Tensor | None = None,
        frame_rate: float | Tensor | None = None,
        keyframes: Tensor | None = None,
        groups: Groups = "full",
        state: TemporalState | None = None,
        unseen: Tensor | None = None,
        resumes: Tensor | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> Any:
        """Predicts what the scheduler asks for, at every latent; arguments and errors are `SpacetimeTransformer`'s.

        Args:
            hidden_states: Normalised latents `(b, c, n, h, w)`.
            timestep: One, `(b,)`, or `(b, n)` with one noise level for each frame; in the scheduler's timesteps.
            encoder_hidden_states: Prompt embeddings `(b, l, d)`; `None` skips cross-attention.
            encoder_attention_mask: `(b, l)`, 1 where a prompt token is to be seen.
            frame_rate: Pixel frames per second, one or `(b,)`; `None` or NaN adds nothing.
            keyframes: Slots `(b, s * (c + 1), n, h, w)`; `None` equals zeros.
            groups: A mode, or integers `(n,)` or `(b, n)`, for attention over time.
            state: What the stream remembers. Written unless `state.frozen()`.
            unseen: Clean latents `(b, c, k, h, w)` for training on a clip with a gap, as a stream's is when it has
                forgotten frames: convolutions see them before frame `resumes`, attention does not.
            resumes: Index of the first frame behind each video's gap, `(b,)`; `n` where it has none.
            attention_kwargs: `{"scale": ...}` scales LoRA layers.
            return_dict: Whether to return a `UNet3DConditionOutput` or a tuple.

        Returns:
            `.sample` `(b, c, n, h, w)`.

        Raises:
            ValueError: A size cannot be halved often enough, or shapes do not fit one another.
        """
        b, _, n, height, width = hidden_states.shape
        if encoder_hidden_states is not None and len(encoder_hidden_states) != b:
            raise ValueError(f"{len(encoder_hidden_states)} prompts for {b} videos")
        unit = self.patch_size[1]
        if height % unit or width % unit:
            raise ValueError(f"latents of (h, w) = ({height}, {width}): each side must be a multiple of {unit}")
        shown = n
        if unseen is not None:
            if state is not None or resumes is None:
                raise ValueError("unseen latents are for whole clips, without a state, and need resumes")
            n, k = n + unseen.shape[2], unseen.shape[2]
            hidden_states = torch.cat([hidden_states, unseen.to(hidden_states)], dim=2)
            levels = _levels(timestep, b, shown, hidden_states.device).expand(b, shown)
            timestep = F.pad(levels, (0, k))
            keyframes = None if keyframes is None else F.pad(keyframes, (0, 0, 0, 0, 0, k))
        cache = None if state is None else FrameCache.opened(self, state, n)
        offset = 0 if cache is None else cache.num_frames
        device = hidden_states.device
        positions, past = torch.arange(offset, offset + n, device=device), None
        if cache is not None and offset:
            past = cache.positions(device)
        mask = group_mask(group_tensor(groups, shown, self.config.chunk_size, device), offset, hidden_states.dtype)
        order = back = None
        if unseen is not None and resumes is not None:
            mask = _alone(mask, shown, n, hidden_states)
            order = _behind_gaps(resumes.to(device), shown, n)
            back = order.argsort()
        x = rearrange(hidden_states, "b c n h w -> (b n) c h w")
        context = Context(
            temb=self._embed_time(timestep, frame_rate, b, n, x),
            prompt=encoder_hidden_states,
            prompt_mask=_additive(encoder_attention_mask, x.dtype),
            num_frames=n,
            positions=positions,
            past_positions=past,
            rotary_emb=self.rope(positions, 1, 1),
            mask=mask,
            history=None if state is None else state.history(),
            cache=cache,
            cache_rotary_emb=None if past is None else self.rope(past, 1, 1),
            order=order,
            back=back,
        )

        x = self.conv_in(x)
        if keyframes is not None:
            if self.keyframe_embedding is None:
                raise ValueError("this network has no keyframe slots (keyframe_slots=0 in its config)")
            x = x + self.keyframe_embedding(rearrange(keyframes, "b c n h w -> (b n) c h w"))
        skips = [x]
        block: Any
        for block in self.down_blocks:
            x, made = block(x, context)
            skips += made
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
        output = rearrange(x, "(b n) c h w -> b c n h w", n=n)[:, :, :shown]
        return UNet3DConditionOutput(sample=output) if return_dict else (output,)

    @classmethod
    def from_unet2d(
        cls, source: UNet2DConditionModel | str | Path, subfolder: str | None = None, **config: Any
    ) -> UNet3D:
        """Inflates a 2D U-Net of the Stable Diffusion family (the layouts of 1.5 and 2.1).

        Args:
            source: The network, or the folder or Hub id of one.
            subfolder: Where it is in there, such as `unet`.
            config: What the 2D network does not have, such as `group_modes` or `keyframe_slots`. Temporal heads have
                64 channels, or the largest divisor of 64 that divides the channels of every resolution.

        Raises:
            ValueError: Its layout is not served, its weights do not fit its config, or a part of `config` is its own;
                what is wrong is named.
        """
        if isinstance(source, (str, Path)):
            options = {} if subfolder is None else {"subfolder": subfolder}
            source = load_strictly(UNet2DConditionModel.from_pretrained, "UNet2DConditionModel", source, **options)
        for name, served in _ONLY.items():
            if source.config.get(name, served[0]) not in served:
                raise ValueError(f"{name}={source.config[name]!r} in this 2D U-Net is not served: only {served[0]!r}")
        for name in ("layers_per_block", "transformer_layers_per_block", "cross_attention_dim"):
            if not isinstance(source.config[name], int):
                raise ValueError(f"{name}={source.config[name]!r} in this 2D U-Net is not served: only one number")
        own = sorted(set(config) & set(source.config))
        if own:
            raise ValueError(f"{', '.join(own)}: the 2D U-Net has its own; frames would no longer be those it gives")
        names = set(cls._get_init_keys(cls))
        shared = {name: value for name, value in source.config.items() if name in names}
        shared["temporal_head_dim"] = math.gcd(64, *source.config.block_out_channels)
        target = cls(**shared | config)
        weights = {name: value.detach().clone() for name, value in source.state_dict().items()}
        missing, unexpected = target.load_state_dict(weights, strict=False, assign=True)
        missing = [name for name in missing if not any(part in name for part in target.temporal)]
        if missing or unexpected:
            raise ValueError(f"this 2D U-Net does not fit: missing {missing[:8]}, unexpected {unexpected[:8]}")
        nn.Module.to(target, source.device, source.dtype)  # diffusers' method warns of modules that there are not
        return target.train(source.training)

    def _embed_time(
        self, timestep: Tensor | float, frame_rate: float | Tensor | None, b: int, n: int, like: Tensor
    ) -> Tensor:
        """`((b n), d)`."""
        levels = _levels(timestep, b, n, like.device)
        temb = self.time_embedding(self.time_proj(levels.flatten()).to(like.dtype)).unflatten(0, levels.shape)
        if frame_rate is not None and self.frame_rate_embedder is None:
            logger.warning_once("frame_rate is ignored: this network has no frame_rate_embedding")
        elif frame_rate is not None and self.frame_rate_embedder is not None:
            rates = torch.as_tensor(frame_rate, dtype=torch.float32, device=like.device)
            temb = temb + self.frame_rate_embedder(rates.expand(b)).to(temb)
        return temb.expand(b, n, -1).flatten(0, 1)


def _levels(timestep: Tensor | float, b: int, n: int, device: torch.device) -> Tensor:
    """Timesteps `(b, 1)` or `(b, n)`.

    Raises:
        ValueError: They have another shape.
    """
    timestep = torch.as_tensor(timestep, device=device)
    levels = timestep.expand(b)[:, None] if timestep.ndim == 0 else timestep
    levels = levels[:, None] if levels.ndim == 1 else levels
    if levels.shape[0] != b or levels.shape[1] not in (1, n):
        raise ValueError(f"timestep of shape {tuple(timestep.shape)}: give ({b},) or ({b}, {n})")
    return levels


def _alone(mask: Tensor | None, shown: int, n: int, like: Tensor) -> Tensor:
    """An additive mask `(b | 1, 1, n, n)` of which frames from `shown` on see themselves alone, and none sees them."""
    whole = like.new_full((1 if mask is None else len(mask), 1, n, n), float("-inf"))
    whole[..., :shown, :shown] = 0 if mask is None else mask
    whole.diagonal(dim1=-2, dim2=-1).fill_(0)
    return whole


def _behind_gaps(resumes: Tensor, shown: int, n: int) -> Tensor:
    """Rows of `((b n), ...)` in the order in which frames from `shown` on come before frame `resumes` `(b,)`."""
    frames = torch.arange(n, device=resumes.device)
    rank = torch.where(frames < shown, frames, resumes[:, None] - 0.5)
    return (
        rank.argsort(dim=1, stable=True) + n * torch.arange(len(resumes), device=resumes.device)[:, None]
    ).flatten()


def _additive(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """`(b, l)` of ones and zeros as what is added to the scores, `(b, 1, l)`."""
    if mask is None:
        return None
    hidden = (mask == 0).unsqueeze(1)
    return torch.zeros(hidden.shape, dtype=dtype, device=mask.device).masked_fill(hidden, float("-inf"))


_ONLY: dict[str, tuple[Any, ...]] = {
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
    "resnet_time_scale_shift": ("default",),
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
