"""3D convolutional networks: C3D, I3D and S3D, R(2+1)D, non-local blocks, and a causal network for streams.

All take non-local blocks. `non_local=[2, 3]` puts one after the stages 2 and 3, counted from 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from vgen.checks import check_choice
from vgen.models.convert.networks import load_inflated
from vgen.recognition.network import ClipNetwork, GridPool, MeanSoFar, RecognizerOutput, per_frame
from vgen.temporal.conv import CausalConv3d
from vgen.temporal.state import History, register_state_keys

Kernels = Literal["full", "space_time", "channels"]
"""Factors of a 3D convolution: none, one over space and one over time, or depthwise and pointwise."""
TimePadding = Literal["zeros", "replicate"]
"""What precedes and follows a clip in convolutions over time."""


class NonLocalBlock(nn.Module):
    """Attention over all positions of space and time, added to its input. It starts as the identity.

    Args:
        channels: Channels of the maps; half as many are used inside.

    Source: Non-local neural networks, arXiv 1711.07971, embedded Gaussian without subsampling.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.to_query, self.to_key, self.to_value = (nn.Conv3d(channels, channels // 2, 1) for _ in range(3))
        self.to_out = nn.Conv3d(channels // 2, channels, 1)
        nn.init.zeros_(self.to_out.weight)
        if self.to_out.bias is not None:
            nn.init.zeros_(self.to_out.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Maps `(b, c, f, h, w)` to the same shape."""
        query, key, value = (
            rearrange(layer(x), "b c f h w -> b (f h w) c") for layer in (self.to_query, self.to_key, self.to_value)
        )
        mixed = F.scaled_dot_product_attention(query, key, value, scale=1.0)
        return x + self.to_out(mixed.mT.unflatten(2, x.shape[2:]))


def add_non_local(stages: nn.ModuleList, widths: Sequence[int], after: Sequence[int]) -> None:
    """Puts a `NonLocalBlock` at the end of stages.

    Raises:
        ValueError: There is no such stage.
    """
    for index in after:
        if index not in range(len(stages)):
            raise ValueError(f"non_local must be stages from 0 to {len(stages) - 1}, got {index}")
        stages[index] = nn.Sequential(stages[index], NonLocalBlock(widths[index]))


class C3D(ClipNetwork):
    """Eight layers of 3x3x3 convolutions and two fully connected ones. Its features are those of `fc6`.

    Args:
        num_classes: Number of classes.
        num_frames: Frames per clip, the only length; 16 in the paper.
        image_size: Height and width of the frames, the only size; 112 in the paper.
        widths: Channels of the five stages.
        dim: Features of the fully connected layers.
        dropout: Dropout rate before `fc7` and the last layer.
        non_local: Stages with a non-local block.

    Source: Learning spatiotemporal features with 3D convolutional networks, arXiv 1412.0767; 78.4 million parameters
        with 101 classes.
    """

    fixed_length = fixed_size = True
    min_frames, min_size = 16, 32

    def __init__(
        self,
        num_classes: int,
        num_frames: int = 16,
        image_size: int = 112,
        widths: Sequence[int] = (64, 128, 256, 512, 512),
        dim: int = 4096,
        dropout: float = 0.5,
        non_local: Sequence[int] = (),
    ) -> None:
        super().__init__()
        stages, channels = [], 3
        for index, width in enumerate(widths):
            layers: list[nn.Module] = []
            for _ in range(1 if index < 2 else 2):
                layers += [nn.Conv3d(channels, width, 3, padding=1), nn.ReLU()]
                channels = width
            stride = (1, 2, 2) if index == 0 else (2, 2, 2)
            layers.append(nn.MaxPool3d(stride, stride, padding=(0, 1, 1) if index == 4 else 0))
            stages.append(nn.Sequential(*layers))
        self.stages = nn.ModuleList(stages)
        add_non_local(self.stages, widths, non_local)
        side = (image_size // 16 + 2) // 2
        self.fc6 = nn.Linear(channels * max(1, num_frames // 16) * side**2, dim)
        self.fc7 = nn.Linear(dim, dim)
        self.head = nn.Linear(dim, num_classes)
        self.dropout = nn.Dropout(dropout)

    def forward(self, clip: Tensor, history: History | None = None, mask: Tensor | None = None) -> RecognizerOutput:
        """See `ClipNetwork.forward`."""
        for stage in self.stages:
            clip = stage(clip)
        features = self.fc6(clip.flatten(1)).relu()
        hidden = self.fc7(self.dropout(features)).relu()
        return RecognizerOutput(logits=self.head(self.dropout(hidden)), features=features)


class SameConv3d(nn.Conv3d):
    """A 3D convolution that keeps the size, or halves it with stride 2.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel_size: `(time, height, width)`, odd.
        stride: `(time, height, width)`.
        groups: Groups of channels.
        time_padding: With `replicate`, a still clip gives a still result, as `InceptionNetwork.inflate` needs.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: tuple[int, int, int],
        stride: tuple[int, int, int] = (1, 1, 1),
        groups: int = 1,
        time_padding: TimePadding = "zeros",
    ) -> None:
        time, height, width = (size // 2 for size in kernel_size)
        replicates = time_padding == "replicate"
        padding = (0 if replicates else time, height, width)
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, groups=groups, bias=False)
        self.replicated = time if replicates else 0

    def forward(self, x: Tensor) -> Tensor:
        """Maps `(b, c, f, h, w)` to `(b, c', f', h', w')`."""
        if self.replicated:
            x = F.pad(x, (0, 0, 0, 0, self.replicated, self.replicated), mode="replicate")
        return super().forward(x)


class InceptionNetwork(ClipNetwork):
    """The Inception network over clips: I3D with full kernels, S3D with separable ones.

    Args:
        num_classes: Number of classes.
        num_frames: Frames per clip; 64 in the papers.
        image_size: Height and width of the frames; 224 in the papers.
        kernels: `full` is I3D; `space_time` is the published S3D, which separates space and time; `channels` has a
            depthwise 3D convolution and a pointwise one.
        time_padding: `zeros` as published; `replicate` keeps still clips still.
        length: Frames of the kernels; 1 makes an image network, for `inflate`.
        width: Channels relative to the published ones.
        dropout: Dropout rate before the last layer.
        non_local: Stages with a non-local block: 0 and 1 are the stem, 2 to 4 the Inception blocks of each size.

    Source: Quo vadis, action recognition? (I3D), arXiv 1705.07750; Rethinking spatiotemporal feature learning (S3D),
        arXiv 1712.04851.
    """

    min_frames, min_size = 5, 32

    def __init__(
        self,
        num_classes: int,
        num_frames: int = 64,
        image_size: int = 224,
        kernels: Kernels = "full",
        time_padding: TimePadding = "zeros",
        length: int | None = None,
        width: float = 1.0,
        dropout: float = 0.2,
        non_local: Sequence[int] = (),
    ) -> None:
        super().__init__()
        check_choice("kernels", kernels, Kernels)
        check_choice("time_padding", time_padding, TimePadding)
        self.kernels, self.time_padding, self.length = kernels, time_padding, length
        w = [max(8, round(width * channels)) for channels in (64, 64, 192)]
        spatial = nn.MaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1))
        blocks = {
            2: [(64, 96, 128, 16, 32, 32), (128, 128, 192, 32, 96, 64)],
            3: [
                (192, 96, 208, 16, 48, 64),
                (160, 112, 224, 24, 64, 64),
                (128, 128, 256, 24, 64, 64),
                (112, 144, 288, 32, 64, 64),
                (256, 160, 320, 32, 128, 128),
            ],
            4: [(256, 160, 320, 32, 128, 128), (384, 192, 384, 48, 128, 128)],
        }
        time = 1 if length == 1 else 2  # stride
        pools = {
            2: spatial,
            3: nn.MaxPool3d((2 * time - 1, 3, 3), (time, 2, 2), (time - 1, 1, 1)),
            4: nn.MaxPool3d((time, 2, 2)),
        }
        stages: list[nn.Module] = [
            self._conv(3, w[0], 7, stride=2),
            nn.Sequential(spatial, self._conv(w[0], w[1], 1), self._conv(w[1], w[2], 3)),
        ]
        widths = [w[0], w[2]]
        for index, sizes in blocks.items():
            layers: list[nn.Module] = [pools[index]]
            channels = widths[-1]
            for size in sizes:
                block = InceptionBlock(self, channels, [max(8, round(width * one)) for one in size])
                layers.append(block)
                channels = block.out_channels
            stages.append(nn.Sequential(*layers))
            widths.append(channels)
        self.stages = nn.ModuleList(stages)
        add_non_local(self.stages, widths, non_local)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(widths[-1], num_classes)

    def forward(self, clip: Tensor, history: History | None = None, mask: Tensor | None = None) -> RecognizerOutput:
        """See `ClipNetwork.forward`."""
        for stage in self.stages:
            clip = stage(clip)
        sizes = [min(size, most) for size, most in zip(clip.shape[2:], (2, 7, 7), strict=True)]
        features = F.avg_pool3d(clip, sizes, stride=1).mean((2, 3, 4))
        return RecognizerOutput(logits=self.head(self.dropout(features)), features=features)

    def inflate(self, image_weights: Mapping[str, Tensor]) -> None:
        """Loads the weights of an image network: a network of this class with `length=1`.

        With `time_padding="replicate"`, a still clip then has the scores of its frame.

        Args:
            image_weights: State dict. Its kernels are `(o, i, h, w)` or `(o, i, 1, h, w)`.

        Raises:
            ValueError: Names or shapes do not match.
        """
        flat = {name: weight.squeeze(2) if weight.ndim == 5 else weight for name, weight in image_weights.items()}
        load_inflated(self, flat)

    def _conv(self, channels: int, out_channels: int, size: int, stride: int = 1) -> nn.Sequential:
        """A convolution in the factors of `kernels`, each with a norm and ReLU."""
        length = size if self.length is None else min(size, self.length)
        whole = (length, size, size), (stride if self.length != 1 else 1, stride, stride)
        if size == 1 or self.kernels == "full":
            return nn.Sequential(*self._layer(channels, out_channels, *whole))
        if self.kernels == "channels":
            depthwise = self._layer(channels, channels, *whole, groups=channels)
            return nn.Sequential(*depthwise, *self._layer(channels, out_channels, (1, 1, 1), (1, 1, 1)))
        over_space = self._layer(channels, out_channels, (1, size, size), (1, stride, stride))
        return nn.Sequential(
            *over_space, *self._layer(out_channels, out_channels, (length, 1, 1), (whole[1][0], 1, 1))
        )

    def _layer(self, channels: int, out_channels: int, size: Any, stride: Any, groups: int = 1) -> list[nn.Module]:
        conv = SameConv3d(channels, out_channels, size, stride, groups, self.time_padding)
        return [conv, nn.BatchNorm3d(out_channels, eps=1e-3), nn.ReLU()]


class InceptionBlock(nn.Module):
    """Four branches, whose outputs are concatenated.

    Args:
        network: The network, which makes the convolutions.
        channels: Channels of the input.
        sizes: Channels of 1x1x1; of 1x1x1 and 3x3x3; of 1x1x1 and 3x3x3 again; and of 1x1x1 after a pool.
    """

    def __init__(self, network: InceptionNetwork, channels: int, sizes: Sequence[int]) -> None:
        super().__init__()
        conv = network._conv
        time = 1 if network.length == 1 else 3
        pool = nn.MaxPool3d((time, 3, 3), 1, (time // 2, 1, 1))
        self.out_channels = sizes[0] + sizes[2] + sizes[4] + sizes[5]
        branches = [
            conv(channels, sizes[0], 1),
            nn.Sequential(conv(channels, sizes[1], 1), conv(sizes[1], sizes[2], 3)),
            nn.Sequential(conv(channels, sizes[3], 1), conv(sizes[3], sizes[4], 3)),
            nn.Sequential(pool, conv(channels, sizes[5], 1)),
        ]
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        """Maps `(b, c, f, h, w)` to `(b, c', f, h, w)`."""
        return torch.cat([branch(x) for branch in self.branches], dim=1)


class R2Plus1D(ClipNetwork):
    """A residual network whose 3D convolutions are factored into one over space and one over time.

    Args:
        num_classes: Number of classes.
        num_frames: Frames per clip; 16 in the paper.
        image_size: Height and width of the frames; 112 in the paper.
        widths: Channels of the stages.
        blocks: Residual blocks of each stage; two are R(2+1)D-18.
        non_local: Stages with a non-local block.

    Source: A closer look at spatiotemporal convolutions, arXiv 1711.11248, with the numbers of channels between both
        convolutions, and so the 31.5 million parameters with 400 classes, of torchvision's `r2plus1d_18`.
    """

    min_size = 16

    def __init__(
        self,
        num_classes: int,
        num_frames: int = 16,
        image_size: int = 112,
        widths: Sequence[int] = (64, 128, 256, 512),
        blocks: Sequence[int] = (2, 2, 2, 2),
        non_local: Sequence[int] = (),
    ) -> None:
        super().__init__()
        between = round(45 * widths[0] / 64)
        self.stem = nn.Sequential(
            nn.Conv3d(3, between, (1, 7, 7), (1, 2, 2), (0, 3, 3), bias=False),
            nn.BatchNorm3d(between),
            nn.ReLU(),
            nn.Conv3d(between, widths[0], (3, 1, 1), padding=(1, 0, 0), bias=False),
            nn.BatchNorm3d(widths[0]),
            nn.ReLU(),
        )
        stages, channels = [], widths[0]
        for index, (width, count) in enumerate(zip(widths, blocks, strict=True)):
            strides = [2 if index and block == 0 else 1 for block in range(count)]
            stage = []
            for stride in strides:
                stage.append(FactoredBlock(channels, width, stride))
                channels = width
            stages.append(nn.Sequential(*stage))
        self.stages = nn.ModuleList(stages)
        self.head = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv3d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        add_non_local(self.stages, widths, non_local)

    def forward(self, clip: Tensor, history: History | None = None, mask: Tensor | None = None) -> RecognizerOutput:
        """See `ClipNetwork.forward`."""
        clip = self.stem(clip)
        for stage in self.stages:
            clip = stage(clip)
        features = clip.mean((2, 3, 4))
        return RecognizerOutput(logits=self.head(features), features=features)


class FactoredBlock(nn.Module):
    """A residual block of two factored convolutions.

    Args:
        channels: Channels of the input.
        width: Channels of the output.
        stride: Stride of the first convolution, over time and space.
    """

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        between = channels * width * 27 // (channels * 9 + 3 * width)  # as many parameters as full kernels have
        self.conv1 = nn.Sequential(*self._factored(channels, between, width, stride), nn.ReLU())
        self.conv2 = nn.Sequential(*self._factored(width, between, width, 1))
        self.skip: nn.Module = nn.Identity()
        if stride != 1 or channels != width:
            self.skip = nn.Sequential(nn.Conv3d(channels, width, 1, stride, bias=False), nn.BatchNorm3d(width))

    @staticmethod
    def _factored(channels: int, between: int, width: int, stride: int) -> list[nn.Module]:
        return [
            nn.Conv3d(channels, between, (1, 3, 3), (1, stride, stride), (0, 1, 1), bias=False),
            nn.BatchNorm3d(between),
            nn.ReLU(),
            nn.Conv3d(between, width, (3, 1, 1), (stride, 1, 1), (1, 0, 0), bias=False),
            nn.BatchNorm3d(width),
        ]

    def forward(self, x: Tensor) -> Tensor:
        """Maps `(b, c, f, h, w)` to `(b, c', f', h', w')`."""
        return (self.conv2(self.conv1(x)) + self.skip(x)).relu()


class CausalCNN(ClipNetwork):
    """Causal 3D convolutions: each frame is classified from itself and earlier ones, so that streams are possible.

    A clip has the mean of the scores of its frames.

    Args:
        num_classes: Number of classes.
        num_frames: Frames per clip.
        image_size: Height and width of the frames.
        channels: Channels of the layers. Each sees two frames before that of the layer below.
        dim: Features.
        grid: See `GridPool`.
    """

    is_streamed = takes_mask = True

    def __init__(
        self,
        num_classes: int,
        num_frames: int,
        image_size: int,
        channels: Sequence[int] = (32, 64, 128),
        dim: int = 128,
        grid: int = 4,
    ) -> None:
        super().__init__()
        widths = (3, *channels)
        self.convs = nn.ModuleList(
            CausalConv3d(wide, own, 3, padding=1) for wide, own in zip(widths, channels, strict=False)
        )
        self.norms = nn.ModuleList(nn.GroupNorm(8, own) for own in channels)
        self.pool = GridPool(channels[-1], dim, grid)
        self.mean = MeanSoFar()
        self.head = nn.Linear(dim, num_classes)
        register_state_keys(self)

    def forward(self, clip: Tensor, history: History | None = None, mask: Tensor | None = None) -> RecognizerOutput:
        """See `ClipNetwork.forward`."""
        for conv, norm in zip(self.convs, self.norms, strict=True):
            clip = F.avg_pool3d(conv(clip, history), (1, 2, 2))
            clip = per_frame(norm, clip).relu().transpose(1, 2)  # a norm over time would look ahead
        frames = per_frame(self.pool, clip)
        features = self.mean(frames, history, mask)
        return RecognizerOutput(logits=self.head(features), features=features, frame_logits=self.head(frames))
