"""CausalVideoVAE: encodes clips to spacetime latents and decodes them, in one pass or as a stream.

Shapes: clip `(b, c, f, h, w)`, latents `(b, c, t, h, w)`, with `f = 1 + s * (t - 1)`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import NoneType
from typing import Any, cast

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan, ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import AutoencoderMixin, DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.utils import BaseOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from einops import rearrange
from torch import Tensor, nn

from vgen.models.compilation import RecordsCompilation
from vgen.models.convert.networks import with_same_weights
from vgen.models.loading import StrictLoading
from vgen.models.tiling import Tiling, run_tiled
from vgen.temporal.conv import CausalConv3d, CausalDownsample, CausalUpsample, append
from vgen.temporal.grid import LatentGrid
from vgen.temporal.state import History, TemporalState, network_identity, register_state_keys

# frames * rows * columns (after patchification) of a slice. On CPUs, as many as are fast; in half precision, so few
# that the memory stays below that of diffusers, which takes 4 frames at once
_CPU_POSITIONS, _CPU_HALF_POSITIONS, _POSITIONS = 2**15, 2**14, 2**20
_MOST_FRAMES = 32


@dataclass
class VAEOutput(BaseOutput):
    """A reconstructed clip `(b, c, f, h, w)`, not clamped, and the posterior that its latents were drawn from."""

    sample: Tensor
    latent_dist: DiagonalGaussianDistribution = None  # type: ignore[assignment]  # accelerate rebuilds it from a dict


class ChannelNorm(nn.Module):
    """RMS norm over the channels of each position. No statistic spans time or space."""

    def __init__(self, channels: int, num_axes: int = 3) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, *[1] * num_axes))

    def forward(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """Maps `(b, c, ...)` to the same shape, or writes to `out`. The statistic is computed in float32."""
        scale = x.shape[1] ** 0.5 / _length(x).clamp_min(1e-12)
        scale = scale if x.dtype == torch.float16 else scale.to(x.dtype)  # float16 has no range for small vectors
        if out is None:
            return (x * scale).to(x.dtype) * self.gamma.to(x.dtype)
        out.copy_(x * scale) if x.dtype == torch.float16 else torch.mul(x, scale, out=out)
        return out.mul_(self.gamma.to(x.dtype))


def _length(x: Tensor) -> Tensor:
    """Length of the channel vector of each position, `(b, 1, ...)`, in float32."""
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.float32)
    return cast(Tensor, _LengthOnCPU.apply(x))


class _LengthOnCPU(torch.autograd.Function):
    """What PyTorch's function gives, which takes several times as long unless the axis is the last one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        squares = [part.float().square().sum(1, keepdim=True) for part in x.split(16, dim=1)]  # needs little memory
        length = torch.stack(squares).sum(0).sqrt()
        ctx.save_for_backward(x, length)
        return length

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        x, length = ctx.saved_tensors
        return cast(Tensor, x * (gradient / length.clamp_min(1e-12)).to(x.dtype))


def _activate(norm: ChannelNorm, x: Tensor, out: Tensor | None = None) -> Tensor:
    """The activation before a convolution; see `CausalConv3d.forward`."""
    return F.silu(norm(x, out), inplace=out is not None)


def _sum(x: Tensor, y: Tensor) -> Tensor:
    """`x + y`; inference writes it to `y`."""
    return x + y if torch.is_grad_enabled() else y.add_(x)


class ResidualBlock(nn.Module):
    """Two causal convolutions with a shortcut connection."""

    def __init__(self, in_channels: int, out_channels: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm1 = ChannelNorm(in_channels)
        self.conv1 = CausalConv3d(in_channels, out_channels, 3, padding=1)
        self.norm2 = ChannelNorm(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = CausalConv3d(out_channels, out_channels, 3, padding=1)
        same = in_channels == out_channels
        self.conv_shortcut = nn.Identity() if same else CausalConv3d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, history: History | None = None) -> Tensor:
        """Maps `(b, c, f, h, w)` to `(b, c', f, h, w)`."""
        h = self.conv1(x, history, partial(_activate, self.norm1))
        h = self.conv2(h, history, lambda h, out=None: self.dropout(_activate(self.norm2, h, out)))
        return _sum(self.conv_shortcut(x), h)


def _residual_blocks(in_channels: int, out_channels: int, count: int, dropout: float) -> nn.ModuleList:
    """Residual blocks at one resolution; the first one changes the number of channels."""
    channels = [in_channels] + [out_channels] * count
    pairs = zip(channels[:-1], channels[1:], strict=True)
    return nn.ModuleList([ResidualBlock(before, after, dropout) for before, after in pairs])


class FrameAttention(nn.Module):
    """Single-head attention within each frame."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = ChannelNorm(channels, num_axes=2)
        self.to_qkv = nn.Conv2d(channels, channels * 3, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Maps `(b, c, f, h, w)` to the same shape."""
        b, _, _, h, _ = x.shape
        frames = rearrange(x, "b c f h w -> (b f) c h w")
        qkv = rearrange(self.to_qkv(self.norm(frames)), "n (k c) h w -> k n 1 (h w) c", k=3)
        out = F.scaled_dot_product_attention(*qkv.unbind(0))
        out = self.proj(rearrange(out, "n 1 (h w) c -> n c h w", h=h))
        return _sum(x, rearrange(out, "(b f) c h w -> b c f h w", b=b))


class Downsample(CausalDownsample):
    """Halves height and width and, if `time`, the number of frames after the first."""

    def __init__(self, channels: int, time: bool) -> None:
        super().__init__(channels)
        self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(channels, channels, 3, stride=2))
        if not time:
            del self.time_conv
        self.time = time

    def forward(self, x: Tensor, history: History | None = None) -> Tensor:
        """Maps `(b, c, f, h, w)` to `(b, c, f', h / 2, w / 2)`."""
        x = _per_frame(self.resample, x)
        return super().forward(x, history) if self.time else x


class Upsample(CausalUpsample):
    """Doubles height and width and, if `time`, the number of frames after the first.

    Args:
        channels: Channels of the input.
        out_channels: Channels of the output.
        time: Whether to double the number of frames.
    """

    def __init__(self, channels: int, out_channels: int, time: bool) -> None:
        super().__init__(channels)
        self.resample = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(channels, out_channels, 3, padding=1))
        if not time:
            del self.time_conv
        self.time = time

    def forward(self, x: Tensor, history: History | None = None) -> Tensor:
        """Maps `(b, c, f, h, w)` to `(b, c', f', 2h, 2w)`."""
        x = super().forward(x, history) if self.time else x
        return _per_frame(self.resample, x)


def average_down(x: Tensor, channels: int, time: int, space: int, first: bool) -> Tensor:
    """Moves blocks of `time * space * space` positions into channels, and averages groups of these.

    Args:
        x: `(b, c, f, h, w)`.
        channels: Channels of the result.
        time: Frames per block.
        space: Rows and columns per block.
        first: Whether the first frame is that of the stream, which zeros precede.

    Returns:
        `(b, channels, f', h / space, w / space)`.
    """
    x = F.pad(x, (0, 0, 0, 0, time - 1, 0)) if first else x
    x = rearrange(x, "b c (f i) (h j) (w k) -> b (c i j k) f h w", i=time, j=space, k=space)
    return x.unflatten(1, (channels, -1)).mean(2)


def repeat_up(x: Tensor, channels: int, time: int, space: int, first: bool) -> Tensor:
    """Repeats channels, and moves them into blocks of `time * space * space` positions.

    Args:
        x: `(b, c, f, h, w)`.
        channels: Channels of the result.
        time: Frames per block.
        space: Rows and columns per block.
        first: Whether the first frame is that of the stream, which becomes one frame only.

    Returns:
        `(b, channels, f', space * h, space * w)`.
    """
    x = x.repeat_interleave(channels * time * space**2 // x.shape[1], dim=1)
    x = rearrange(x, "b (c i j k) f h w -> b c (f i) (h j) (w k)", i=time, j=space, k=space)
    return x[:, :, time - 1 :] if first else x


def _check_shortcut(channels: int, out_channels: int) -> None:
    """Checks that a shortcut without weights can map between numbers of channels.

    Raises:
        ValueError: It cannot.
    """
    if channels % out_channels:
        raise ValueError(
            f"is_residual needs channels that are multiples of each other between levels, got {channels} and "
            f"{out_channels}: change dim_mult"
        )


def _begins(block: nn.Module, history: History | None) -> bool:
    """Whether a block that changes the frame rate sees the first frame of a stream."""
    return history is None or history.get(str(block.state_key)) is None


class ResidualDown(nn.Module):
    """A level of the encoder of Wan 2.2: residual blocks and downsampling, with a shortcut without weights."""

    def __init__(
        self, in_channels: int, out_channels: int, num_res_blocks: int, dropout: float, down: bool, time: bool
    ) -> None:
        super().__init__()
        self.resnets = _residual_blocks(in_channels, out_channels, num_res_blocks, dropout)
        self.downsampler = Downsample(out_channels, time) if down else None
        _check_shortcut(in_channels * (1 + time) * (1 + down) ** 2, out_channels)
        self.shortcut = partial(average_down, channels=out_channels, time=1 + time, space=1 + down)

    def forward(self, x: Tensor, history: History | None = None) -> Tensor:
        """Maps `(b, c, f, h, w)` to `(b, c', f', h', w')`."""
        first = self.downsampler is not None and _begins(self.downsampler, history)
        shortcut = self.shortcut(x, first=first)
        for resnet in self.resnets:
            x = resnet(x, history)
        x = x if self.downsampler is None else self.downsampler(x, history)
        return _sum(x, shortcut)


class ResidualUp(nn.Module):
    """A level of the decoder of Wan 2.2: residual blocks and upsampling, with a shortcut without weights."""

    def __init__(
        self, in_channels: int, out_channels: int, num_res_blocks: int, dropout: float, up: bool, time: bool
    ) -> None:
        super().__init__()
        self.resnets = _residual_blocks(in_channels, out_channels, num_res_blocks + 1, dropout)
        self.upsampler = None
        if up:
            _check_shortcut(out_channels * (1 + time) * 4, in_channels)
            self.upsampler = Upsample(out_channels, out_channels, time)
            self.shortcut = partial(repeat_up, channels=out_channels, time=1 + time, space=2)

    def forward(self, x: Tensor, history: History | None = None) -> Tensor:
        """Maps `(b, c, f, h, w)` to `(b, c', f', h', w')`."""
        given = x
        for resnet in self.resnets:
            x = resnet(x, history)
        if self.upsampler is None:
            return x
        first = _begins(self.upsampler, history)
        return _sum(self.upsampler(x, history), self.shortcut(given, first=first))


class MidBlock(nn.Module):
    """A residual block, attention within each frame and another residual block."""

    def __init__(self, channels: int, dropout: float) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([FrameAttention(channels)])
        self.resnets = nn.ModuleList([ResidualBlock(channels, channels, dropout) for _ in range(2)])

    def forward(self, x: Tensor, history: History | None = None) -> Tensor:
        """Maps `(b, c, f, h, w)` to the same shape."""
        x = self.resnets[0](x, history)
        x = self.attentions[0](x)
        return self.resnets[1](x, history)


class Encoder(nn.Module):
    """Maps a patchified clip `(b, c, f, h, w)` to the parameters of the posterior, before `quant_conv`."""

    def __init__(
        self,
        in_channels: int,
        base_dim: int,
        z_dim: int,
        dim_mult: Sequence[int],
        num_res_blocks: int,
        temperal_downsample: Sequence[bool],
        dropout: float,
        is_residual: bool,
    ) -> None:
        super().__init__()
        dims = [base_dim * m for m in (1, *dim_mult)]
        self.conv_in = CausalConv3d(in_channels, dims[0], 3, padding=1)
        self.down_blocks = nn.ModuleList()
        for level, (in_dim, out_dim) in enumerate(zip(dims[:-1], dims[1:], strict=True)):
            down = level < len(dim_mult) - 1
            if is_residual:
                time = down and temperal_downsample[level]
                self.down_blocks.append(ResidualDown(in_dim, out_dim, num_res_blocks, dropout, down, time))
                continue
            for i in range(num_res_blocks):
                self.down_blocks.append(ResidualBlock(in_dim if i == 0 else out_dim, out_dim, dropout))
            if down:
                self.down_blocks.append(Downsample(out_dim, time=temperal_downsample[level]))
        self.mid_block = MidBlock(dims[-1], dropout)
        self.norm_out = ChannelNorm(dims[-1])
        self.conv_out = CausalConv3d(dims[-1], z_dim, 3, padding=1)
        self.gradient_checkpointing = False

    def forward(self, x: Tensor, history: History | None = None) -> Tensor:
        """Maps `(b, c, f, h, w)` to `(b, 2 * z, t, h', w')`."""
        x = self.conv_in(x, history)
        for block in (*self.down_blocks, self.mid_block):
            x = _run_block(self, block, x, history)
        return self.conv_out(x, history, partial(_activate, self.norm_out))


class UpBlock(nn.Module):
    """Residual blocks at one resolution, followed by upsampling if `up`."""

    def __init__(
        self, in_channels: int, out_channels: int, num_res_blocks: int, dropout: float, up: bool, time: bool
    ) -> None:
        super().__init__()
        self.resnets = _residual_blocks(in_channels, out_channels, num_res_blocks + 1, dropout)
        self.upsamplers = nn.ModuleList([Upsample(out_channels, out_channels // 2, time)]) if up else None

    def forward(self, x: Tensor, history: History | None = None) -> Tensor:
        """Maps `(b, c, f, h, w)` to `(b, c', f', h', w')`."""
        for resnet in self.resnets:
            x = resnet(x, history)
        return x if self.upsamplers is None else self.upsamplers[0](x, history)


class Decoder(nn.Module):
    """Maps latents `(b, c, t, h, w)`, after `post_quant_conv`, to a patchified clip."""

    def __init__(
        self,
        out_channels: int,
        base_dim: int,
        z_dim: int,
        dim_mult: Sequence[int],
        num_res_blocks: int,
        temperal_upsample: Sequence[bool],
        dropout: float,
        is_residual: bool,
    ) -> None:
        super().__init__()
        dims = [base_dim * m for m in (dim_mult[-1], *reversed(dim_mult))]
        self.conv_in = CausalConv3d(z_dim, dims[0], 3, padding=1)
        self.mid_block = MidBlock(dims[0], dropout)
        self.up_blocks = nn.ModuleList()
        for level, (in_dim, out_dim) in enumerate(zip(dims[:-1], dims[1:], strict=True)):
            up = level < len(dim_mult) - 1
            time = up and temperal_upsample[level]
            if is_residual:
                self.up_blocks.append(ResidualUp(in_dim, out_dim, num_res_blocks, dropout, up, time))
                continue
            in_dim = in_dim if level == 0 else in_dim // 2  # upsampling halves the channels
            self.up_blocks.append(UpBlock(in_dim, out_dim, num_res_blocks, dropout, up, time))
        self.norm_out = ChannelNorm(dims[-1])
        self.conv_out = CausalConv3d(dims[-1], out_channels, 3, padding=1)
        self.gradient_checkpointing = False

    def forward(self, x: Tensor, history: History | None = None) -> Tensor:
        """Maps `(b, z, t, h, w)` to `(b, c, f, h', w')`."""
        x = self.conv_in(x, history)
        for block in (self.mid_block, *self.up_blocks):
            x = _run_block(self, block, x, history)
        return self.conv_out(x, history, partial(_activate, self.norm_out))


def _tile_size(name: str) -> Any:
    """A size of tiles as an attribute with diffusers' name."""
    return property(lambda vae: getattr(vae.tiling, name), lambda vae, size: setattr(vae.tiling, name, size))


class CausalVideoVAE(StrictLoading, RecordsCompilation, ModelMixin, AutoencoderMixin, ConfigMixin):
    """A variational autoencoder of clips that is causal in time, with the arithmetic of the Wan VAE.

    With the same weights it equals `diffusers.AutoencoderKLWan`, in one pass and streamed. Parameter and config names
    are the same. Latent 0 holds pixel frame 0 only; latent k holds frames `s*(k-1)+1 .. s*k`, where `s` is the
    temporal compression.

    Args:
        base_dim: Channels of the encoder's first level.
        decoder_base_dim: Channels of the decoder's last level; `None` means `base_dim`.
        z_dim: Channels of the latents.
        dim_mult: Multiples of `base_dim`, one per level. Height and width are halved between levels.
        num_res_blocks: Residual blocks per level in the encoder; the decoder has one more.
        attn_scales: Must be empty; only the middle block has attention.
        temperal_downsample: For each step between levels, whether it halves time too (diffusers' spelling).
        dropout: Dropout rate inside residual blocks.
        latents_mean: Mean of each latent channel, for `normalize`; `None` means zeros.
        latents_std: Standard deviation of each latent channel; `None` means ones.
        is_residual: Whether each level has a shortcut without weights, as in Wan 2.2 TI2V-5B.
        in_channels: Input channels after patchification: `3 * patch_size**2`.
        out_channels: Output channels before the inverse of patchification: `3 * patch_size**2`.
        patch_size: Side in pixels of the squares that are moved into channels at the input and back at the output;
            `None` means 1.
        scale_factor_temporal: Temporal compression `s`; must match `temperal_downsample`. `None` derives it.
        scale_factor_spatial: Height and width in pixels of one latent; must match the levels. `None` derives it.
        training_data: What the training videos show, in a few words; for messages only.
        training_psnr: Mean PSNR in dB of reconstructed clips of the training data; for messages only.

    Raises:
        ValueError: The layout is unsupported, or the settings contradict one another.

    Source: Wan: Open and Advanced Large-Scale Video Generative Models, arXiv 2503.20314, section 4.1.
    """

    _supports_gradient_checkpointing = True
    _repeated_blocks = ["ResidualBlock"]
    _no_split_modules = ["ResidualBlock", "MidBlock", "UpBlock", "ResidualDown", "ResidualUp"]
    _skip_keys = ["history", "state"]
    _group_offload_block_modules = ["quant_conv", "post_quant_conv", "encoder", "decoder"]

    @register_to_config
    def __init__(
        self,
        base_dim: int = 96,
        decoder_base_dim: int | None = None,
        z_dim: int = 16,
        dim_mult: Sequence[int] = (1, 2, 4, 4),
        num_res_blocks: int = 2,
        attn_scales: Sequence[float] = (),
        temperal_downsample: Sequence[bool] = (False, True, True),
        dropout: float = 0.0,
        latents_mean: Sequence[float] | None = None,
        latents_std: Sequence[float] | None = None,
        is_residual: bool = False,
        in_channels: int = 3,
        out_channels: int = 3,
        patch_size: int | None = None,
        scale_factor_temporal: int | None = None,
        scale_factor_spatial: int | None = None,
        training_data: str | None = None,
        training_psnr: float | None = None,
    ) -> None:
        super().__init__()
        temporal = 2 ** sum(map(bool, temperal_downsample))
        spatial = 2 ** (len(dim_mult) - 1) * (patch_size or 1)
        _check_layout(
            attn_scales=attn_scales,
            stages=(len(temperal_downsample), len(dim_mult) - 1),
            temporal=(scale_factor_temporal, temporal),
            spatial=(scale_factor_spatial, spatial),
        )
        self.temporal_compression_ratio = temporal
        self.spatial_compression_ratio = spatial
        self.register_to_config(
            scale_factor_temporal=temporal,
            scale_factor_spatial=spatial,
            latents_mean=list(latents_mean or [0.0] * z_dim),
            latents_std=list(latents_std or [1.0] * z_dim),
        )
        shared: dict[str, Any] = {
            "dim_mult": dim_mult, "num_res_blocks": num_res_blocks, "dropout": dropout, "is_residual": is_residual,
        }  # fmt: skip
        self.encoder = Encoder(in_channels, base_dim, z_dim * 2, temperal_downsample=temperal_downsample, **shared)
        self.quant_conv = CausalConv3d(z_dim * 2, z_dim * 2, 1)
        self.post_quant_conv = CausalConv3d(z_dim, z_dim, 1)
        self.decoder = Decoder(
            out_channels,
            decoder_base_dim or base_dim,
            z_dim,
            temperal_upsample=list(reversed(temperal_downsample)),
            **shared,
        )
        self._initialize()
        self.frames_per_slice: int | None = None
        """Pixel frames that are encoded or decoded at once, at least `s`; `None` depends on their size."""
        self.use_slicing = False
        self.use_tiling = False
        self.tiling = Tiling()
        register_state_keys(self)
        self.state_identity = network_identity(self)

    @torch.no_grad()
    def _initialize(self) -> None:
        """Starts as an image autoencoder that repeats frames: only the last temporal tap of a kernel is non-zero."""
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Conv3d)):
                taps = module.weight if module.weight.ndim == 4 else module.weight.zero_()[:, :, -1]
                nn.init.kaiming_normal_(taps, nonlinearity="linear")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, (CausalDownsample, CausalUpsample)) and hasattr(module, "time_conv"):
                last = module.time_conv.weight.zero_()[:, :, -1, 0, 0]
                last.copy_(torch.eye(last.shape[1]).repeat(last.shape[0] // last.shape[1], 1))
            elif isinstance(module, ResidualBlock):
                nn.init.zeros_(module.conv2.weight)
            elif isinstance(module, FrameAttention):
                nn.init.zeros_(module.proj.weight)
        assert self.quant_conv.bias is not None
        nn.init.constant_(
            self.quant_conv.bias[self.config.z_dim :], -6.0
        )  # training does not recover from a wide posterior

    def forward(
        self,
        sample: Tensor,
        sample_posterior: bool = False,
        return_dict: bool = True,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> Any:
        """Encodes and decodes a clip. Training uses only this call: DDP and FSDP synchronize no other.

        Args:
            sample: Clip `(b, c, f, h, w)` in [-1, 1], `f = 1 + s*k`.
            sample_posterior: Whether to sample the latents from the posterior or use its mode.
            return_dict: Whether to return a `VAEOutput` or a tuple that holds only the reconstruction.
            generator: Random generator for sampling, one for all or one per sample.

        Raises:
            ValueError: Height or width is not a multiple of the spatial compression, or `f` is not `1 + s*k`.
        """
        self._check_size(sample)
        ratio = self.spatial_compression_ratio
        moments = self._in_parts(lambda part, _: self._encode(part, None), sample, None, 1, ratio)
        posterior = DiagonalGaussianDistribution(moments.float())  # bf16 is too coarse for the KL
        latents = posterior.sample(generator) if sample_posterior else posterior.mode()
        latents = latents.to(self.dtype)
        clip = self._in_parts(lambda part, _: self._decode(part, None), latents, None, ratio, 1)
        return VAEOutput(sample=clip, latent_dist=posterior) if return_dict else (clip,)

    @apply_forward_hook
    def encode(
        self, x: Tensor, return_dict: bool | TemporalState | None = True, state: TemporalState | None = None
    ) -> Any:
        """Encodes a clip, or the next slice of a stream.

        Args:
            x: Clip `(b, c, f, h, w)` in [-1, 1]. Without a state, `f = 1 + s*k`. With a state, any number of frames:
                those that do not complete a latent are buffered in `state.pending`.
            return_dict: Whether to return an `AutoencoderKLOutput` or a tuple. A state may take its position.
            state: Memory of the stream; updated by this call.

        Returns:
            An output whose `latent_dist` is the posterior of raw latents `(b, c, t, h, w)`; `t = 0` if the slice
            completes no latent.

        Raises:
            ValueError: Height or width is not a multiple of the spatial compression, `f` is not `1 + s*k`, or the
                slice does not match the stream.
        """
        return_dict, state = _positional(return_dict, state)
        self._check_size(x)
        moments = self._encode_in_parts(x, None) if state is None else self._encode_slice(x, state)
        posterior = DiagonalGaussianDistribution(moments)
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    @apply_forward_hook
    def decode(
        self,
        z: Tensor,
        return_dict: bool | TemporalState | None = True,
        state: TemporalState | None = None,
        clamp: bool = True,
    ) -> Any:
        """Decodes latents, or the next slice of a stream of them.

        Args:
            z: Raw latents `(b, c, t, h, w)`. Any split of a stream into slices gives the same frames.
            return_dict: Whether to return a `DecoderOutput` or a tuple. A state may take its position.
            state: Memory of the stream; updated by this call.
            clamp: Whether to clamp to [-1, 1]. Losses use the unclamped values.

        Returns:
            An output whose `sample` is a clip `(b, c, f, h, w)`. The first latent of a stream gives one frame and
            every other one gives `s`.

        Raises:
            ValueError: The slice does not match the stream.
        """
        return_dict, state = _positional(return_dict, state)
        if z.shape[2] == 0:
            clip = self._empty_clip(z)
        else:
            clip = self._in_parts(self._decode_part, z, state, self.spatial_compression_ratio, 1)
        clip = clip.clamp(-1, 1) if clamp else clip
        return DecoderOutput(sample=clip) if return_dict else (clip,)

    def decode_stream(
        self, latents: Tensor, state: TemporalState | None = None, clamp: bool = True
    ) -> Iterator[Tensor]:
        """Decodes `latents` slice by slice, with memory that does not grow with their number.

        Args:
            latents: Raw latents `(b, c, t, h, w)`.
            state: Memory of the stream; updated, unless it is frozen: then a copy of it is.
            clamp: Whether to clamp to [-1, 1].

        Yields:
            Consecutive slices `(b, c, n, h, w)` of the clip.
        """
        state = _own_state() if state is None else state if state.writable else state.copy()
        for part in latents.split(self._latents_per_slice(latents), dim=2):
            yield self.decode(part, state=state, clamp=clamp).sample

    def tiled_encode(self, x: Tensor) -> Tensor:
        """Encodes a clip `(b, c, f, h, w)` in tiles, whatever its size; gives the moments `(b, 2 * z, t, h, w)`."""
        self._check_size(x)
        return self._in_tiles(self._encode_part, x, None, 1, self.spatial_compression_ratio)

    def tiled_decode(self, z: Tensor, return_dict: bool = True) -> Any:
        """Decodes raw latents `(b, c, t, h, w)` in tiles, whatever their size, to a clip in [-1, 1]."""
        clip = self._in_tiles(self._decode_part, z, None, self.spatial_compression_ratio, 1).clamp(-1, 1)
        return DecoderOutput(sample=clip) if return_dict else (clip,)

    def clear_cache(self) -> None:
        """Does nothing: streams are kept in states that the caller owns, and not in the network."""

    def enable_tiling(
        self,
        tile_sample_min_height: int | None = None,
        tile_sample_min_width: int | None = None,
        tile_sample_stride_height: int | None = None,
        tile_sample_stride_width: int | None = None,
    ) -> None:
        """Encodes and decodes large frames in overlapping tiles, each with its own branch of the state.

        Frames that fit into one tile are not tiled. `None` keeps the current setting.

        Args:
            tile_sample_min_height: Height of a tile in pixels, initially 256.
            tile_sample_min_width: Width of a tile in pixels, initially 256.
            tile_sample_stride_height: Vertical distance between tiles in pixels, initially 192.
            tile_sample_stride_width: Horizontal distance between tiles in pixels, initially 192.

        Raises:
            ValueError: The tiles would leave gaps or would not be aligned with latents.
        """
        tiling = Tiling(
            tile_sample_min_height or self.tiling.height,
            tile_sample_min_width or self.tiling.width,
            tile_sample_stride_height or self.tiling.stride_height,
            tile_sample_stride_width or self.tiling.stride_width,
        )
        tiling.check(self.spatial_compression_ratio)
        self.tiling = tiling
        super().enable_tiling()

    tile_sample_min_height = _tile_size("height")
    tile_sample_min_width = _tile_size("width")
    tile_sample_stride_height = _tile_size("stride_height")
    tile_sample_stride_width = _tile_size("stride_width")

    def normalize(self, latents: Tensor) -> Tensor:
        """Scales raw latents `(b, c, t, h, w)` to zero mean and unit deviation per channel, as denoisers expect."""
        mean, std = self._statistics(latents)
        return (latents - mean) / std

    def denormalize(self, latents: Tensor) -> Tensor:
        """The inverse of `normalize`."""
        mean, std = self._statistics(latents)
        return latents * std + mean

    @torch.no_grad()
    def calibrate(self, latents: Tensor) -> None:
        """Computes the statistics for `normalize` from raw latents `(n, c, t, h, w)` and stores them in the config."""
        values = rearrange(latents.double(), "n c t h w -> c (n t h w)")
        self.register_to_config(latents_mean=values.mean(1).tolist(), latents_std=values.std(1).tolist())

    @classmethod
    def from_single_file(cls, source: str | Path | dict[str, Tensor], **kwargs: Any) -> CausalVideoVAE:
        """Loads one file: `.safetensors`, or `.gguf` with the extra `quantization`.

        The names of the weights are those of the original Wan repository or those of diffusers.

        Args:
            source: The file, a link to one on the Hub, or its weights.
            kwargs: Arguments of diffusers' `from_single_file`. `config` is a folder, a Hub id or a dictionary; by
                default, the sizes are those of the weights, and the other settings those of Wan 2.1. `dtype` is by
                default that of the weights, and bfloat16 for float8.

        Raises:
            ValueError: The file is pickled or malformed, its weights do not match the network (the error names them),
                or one is NaN or infinite.
        """
        from vgen.models.single_file import load_single_file  # loads diffusers' converters

        return cast(CausalVideoVAE, load_single_file(cls, source, **kwargs))

    @classmethod
    def from_diffusers(cls, source: AutoencoderKLWan) -> CausalVideoVAE:
        """Converts a diffusers model; the result has the same weights and gives the same output.

        Raises:
            ValueError: The model has another layout.
        """
        return with_same_weights(source, cls)

    def to_diffusers(self, shared: bool = False) -> AutoencoderKLWan:
        """Converts to diffusers' class.

        Args:
            shared: Whether the result shares the memory of the weights, instead of copying them.

        Raises:
            ValueError: The temporal compression is not 4, the only one that diffusers' class supports.
        """
        if self.temporal_compression_ratio != 4:
            raise ValueError(
                f"AutoencoderKLWan supports a temporal compression of 4 only, got {self.temporal_compression_ratio}"
            )
        return with_same_weights(self, AutoencoderKLWan, shared=shared)

    def _latents_per_slice(self, latents: Tensor) -> int:
        """How many of these latents, or of latents of this size, are processed at once."""
        frames = self.frames_per_slice
        if frames is None:
            height, width = (side * self.spatial_compression_ratio for side in latents.shape[-2:])
            if self.use_tiling:
                height, width = min(height, self.tiling.height), min(width, self.tiling.width)
            positions = len(latents) * height * width // (self.config.patch_size or 1) ** 2
            half = latents.dtype in (torch.bfloat16, torch.float16)
            on_cpu = _CPU_HALF_POSITIONS if half else _CPU_POSITIONS
            frames = (on_cpu if latents.device.type == "cpu" else _POSITIONS) // positions
        return max(1, min(frames, _MOST_FRAMES) // self.temporal_compression_ratio)

    def _statistics(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        shape = (1, -1, 1, 1, 1)
        mean, std = (torch.tensor(self.config[key]).view(shape) for key in ("latents_mean", "latents_std"))
        return mean.to(latents), std.to(latents)

    def _check_size(self, clip: Tensor) -> None:
        ratio = self.spatial_compression_ratio
        height, width = clip.shape[-2:]
        if height % ratio or width % ratio:
            nearest = tuple(max(ratio, round(side / ratio) * ratio) for side in (height, width))
            raise ValueError(
                f"(h, w) of the clip must be multiples of {ratio}, got {(height, width)} (nearest: {nearest})"
            )

    @property
    def grid(self) -> LatentGrid:
        """Arithmetic of pixel frames and latents."""
        return LatentGrid(self.temporal_compression_ratio)

    def _encode(self, clip: Tensor, history: History | None) -> Tensor:
        if history is None and not torch.compiler.is_exporting():  # then the number may be a symbol
            self.grid.check(clip.shape[2], "the number of frames")
        x = patchify(clip, self.config.patch_size)
        moments = self.quant_conv(self.encoder(_channels_last(x), history))
        return moments.contiguous()  # saved latents are, and a denoiser rounds differently in another memory format

    def _encode_slice(self, clip: Tensor, state: TemporalState) -> Tensor:
        state.bind(self)
        pending = state.pending
        frames = clip if pending is None else append(pending, clip)
        usable = self.grid.whole_frames(frames.shape[2], started=state.get("encoded_frames") is not None)
        if usable:
            moments = self._encode_in_parts(frames[:, :, :usable], state)
        else:
            size = [side // self.spatial_compression_ratio for side in clip.shape[-2:]]
            moments = clip.new_zeros(clip.shape[0], 2 * self.config.z_dim, 0, *size, dtype=self.dtype)
        history = state.history()
        history.put("pending", frames[:, :, usable:].clone())
        if usable:
            history.put("encoded_frames", torch.ones(1))
        state.commit(history)
        return moments

    def _encode_in_parts(self, clip: Tensor, state: TemporalState | None) -> Tensor:
        return self._in_parts(self._encode_part, clip, state, 1, self.spatial_compression_ratio)

    def _encode_part(self, clip: Tensor, state: TemporalState | None) -> Tensor:
        if state is not None:
            return self._streamed(self._encode, clip, state)
        return self._encode(clip, None) if torch.is_grad_enabled() else self._encode_bounded(clip)

    def _decode_part(self, latents: Tensor, state: TemporalState | None) -> Tensor:
        if state is not None:
            return self._streamed(self._decode, latents, state)
        return self._decode(latents, None) if torch.is_grad_enabled() else self._decode_bounded(latents)

    def _encode_bounded(self, clip: Tensor) -> Tensor:
        s = self.temporal_compression_ratio
        height, width = (side // self.spatial_compression_ratio for side in clip.shape[-2:])
        n = self._latents_per_slice(clip[:, :, :, :height, :width])
        first = self.grid.num_frames(n)
        if clip.shape[2] <= first:
            return self._encode(clip, None)
        self.grid.check(clip.shape[2], "the number of frames")
        rest = clip.shape[2] - first
        sizes = [first, *(min(s * n, rest - begin) for begin in range(0, rest, s * n))]
        state = _own_state()
        return torch.cat([self._streamed(self._encode, part, state) for part in clip.split(sizes, dim=2)], dim=2)

    def _decode(self, latents: Tensor, history: History | None) -> Tensor:
        x = self.decoder(_channels_last(self.post_quant_conv(latents)), history)
        return unpatchify(x, self.config.patch_size)

    def _streamed(self, run: Callable[[Tensor, History | None], Tensor], x: Tensor, state: TemporalState) -> Tensor:
        state.bind(self)
        history = state.history()
        out = run(x, history)
        state.commit(history)
        return out

    def _empty_clip(self, latents: Tensor) -> Tensor:
        channels = self.config.out_channels // (self.config.patch_size or 1) ** 2
        height, width = (side * self.spatial_compression_ratio for side in latents.shape[-2:])
        return latents.new_zeros(latents.shape[0], channels, 0, height, width)

    def _in_parts(
        self,
        run: Callable[[Tensor, TemporalState | None], Tensor],
        x: Tensor,
        state: TemporalState | None,
        in_unit: int,
        out_unit: int,
    ) -> Tensor:
        """Runs sample by sample if slicing is on, and tile by tile if tiling is on and the frames exceed a tile."""
        if self.use_slicing and len(x) > 1:
            branches = [state and state.branch(f"sample {index}") for index in range(len(x))]
            parts = zip(x.split(1), branches, strict=True)
            return torch.cat([self._in_parts(run, part, branch, in_unit, out_unit) for part, branch in parts])
        height, width = (side * in_unit for side in x.shape[-2:])
        if not self.use_tiling or (height <= self.tiling.height and width <= self.tiling.width):
            return run(x, state)
        return self._in_tiles(run, x, state, in_unit, out_unit)

    def _in_tiles(
        self,
        run: Callable[[Tensor, TemporalState | None], Tensor],
        x: Tensor,
        state: TemporalState | None,
        in_unit: int,
        out_unit: int,
    ) -> Tensor:
        """Runs tile by tile."""
        self.tiling.check(self.spatial_compression_ratio)  # its sizes can be assigned one by one
        return run_tiled(lambda tile, name: run(tile, state and state.branch(name)), x, self.tiling, in_unit, out_unit)

    def _decode_bounded(self, latents: Tensor) -> Tensor:
        b, _, t, h, w = latents.shape
        if t <= self._latents_per_slice(latents):
            return self._decode(latents, None)
        ratio = self.spatial_compression_ratio
        clip, begin = None, 0
        for part in self.decode_stream(latents, clamp=False):
            if clip is None:
                clip = part.new_empty(b, part.shape[1], self.grid.num_frames(t), h * ratio, w * ratio)
            clip[:, :, begin : begin + part.shape[2]] = part
            begin += part.shape[2]
        assert clip is not None
        return clip


def _positional(
    return_dict: bool | TemporalState | None, state: TemporalState | None
) -> tuple[bool, TemporalState | None]:
    """Sorts `return_dict` and `state`, which may both be the second argument."""
    if isinstance(return_dict, (TemporalState, NoneType)):
        return True, state if return_dict is None else return_dict
    return return_dict, state


def patchify(clip: Tensor, patch_size: int | None) -> Tensor:
    """Moves squares of `patch_size` by `patch_size` pixels into channels, in diffusers' order."""
    p = patch_size or 1
    return rearrange(clip, "b c f (h p) (w q) -> b (c q p) f h w", p=p, q=p)


def unpatchify(x: Tensor, patch_size: int | None) -> Tensor:
    """The inverse of `patchify`."""
    p = patch_size or 1
    return rearrange(x, "b (c q p) f h w -> b c f (h p) (w q)", p=p, q=p)


def _own_state() -> TemporalState:
    """A state for one call, which is lost if the call fails."""
    state = TemporalState()
    state.writes_at_once = True
    return state


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last_3d)


def _per_frame(layer: nn.Module, x: Tensor) -> Tensor:
    b = x.shape[0]
    frames = layer(rearrange(x, "b c f h w -> (b f) c h w"))
    return rearrange(frames, "(b f) c h w -> b c f h w", b=b)


def _run_block(owner: Any, block: nn.Module, x: Tensor, history: History | None) -> Tensor:
    if owner.gradient_checkpointing and torch.is_grad_enabled():
        return owner._gradient_checkpointing_func(block, x, history)
    return block(x, history)


def _check_layout(
    *,
    attn_scales: Sequence[float],
    stages: tuple[int, int],
    temporal: tuple[int | None, int],
    spatial: tuple[int | None, int],
) -> None:
    if attn_scales:
        raise ValueError(f"attn_scales must be empty, got {list(attn_scales)}: only the middle block has attention")
    if stages[0] != stages[1]:
        raise ValueError(
            f"temperal_downsample must have one entry for each of {stages[1]} steps between levels, got {stages[0]}"
        )
    for name, (given, actual) in {"temporal": temporal, "spatial": spatial}.items():
        if given is not None and given != actual:
            raise ValueError(f"scale_factor_{name} must be {actual}, the factor of the layers, got {given}")
