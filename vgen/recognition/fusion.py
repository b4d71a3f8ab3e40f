"""Image CNNs that see one frame, or fuse frames early, late or slowly.

Source: Large-scale video classification with convolutional neural networks, Karpathy et al., CVPR 2014.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from einops import rearrange
from torch import Tensor, nn

from vgen.checks import check_choice
from vgen.recognition.network import ClipNetwork, GridPool, LightCNN, RecognizerOutput, mean_of_real, per_frame
from vgen.temporal.state import History

FusionPool = Literal["concat", "mean", "max"]
"""How the features of frames become those of a clip."""


class SingleFrame(ClipNetwork):
    """Classifies the middle frame.

    Args:
        num_classes: Number of classes.
        num_frames: Frames per clip.
        image_size: Height and width of the frames.
        dim: Features.
        cnn: Arguments of `LightCNN`.
    """

    def __init__(self, num_classes: int, num_frames: int, image_size: int, dim: int = 128, **cnn: Any) -> None:
        super().__init__()
        self.cnn = LightCNN(dim=dim, **cnn)
        self.head = nn.Linear(dim, num_classes)

    def forward(self, clip: Tensor, history: History | None = None, mask: Tensor | None = None) -> RecognizerOutput:
        """See `ClipNetwork.forward`."""
        features = self.cnn(clip[:, :, clip.shape[2] // 2])
        return RecognizerOutput(logits=self.head(features), features=features)


class LateFusion(ClipNetwork):
    """Fuses the features of frames: concatenated, then an MLP; or pooled, then a linear layer.

    Args:
        num_classes: Number of classes.
        num_frames: Frames per clip; the only length with `concat`.
        image_size: Height and width of the frames.
        pool: `concat`, `mean` or `max`.
        dim: Features.
        cnn: Arguments of `LightCNN`.
    """

    def __init__(
        self,
        num_classes: int,
        num_frames: int,
        image_size: int,
        pool: FusionPool = "concat",
        dim: int = 128,
        **cnn: Any,
    ) -> None:
        super().__init__()
        check_choice("pool", pool, FusionPool)
        self.pool = pool
        self.cnn = LightCNN(dim=dim, **cnn)
        self.fixed_length, self.takes_mask = pool == "concat", pool != "concat"
        self.mix = nn.Sequential(nn.Linear(num_frames * dim, dim), nn.ReLU()) if pool == "concat" else nn.Identity()
        self.head = nn.Linear(dim, num_classes)

    def forward(self, clip: Tensor, history: History | None = None, mask: Tensor | None = None) -> RecognizerOutput:
        """See `ClipNetwork.forward`."""
        frames = per_frame(self.cnn, clip)
        if self.pool == "concat":
            features = self.mix(frames.flatten(1))
        elif self.pool == "mean":
            features = mean_of_real(frames, mask)
        else:
            features = (frames if mask is None else frames.masked_fill(~mask[..., None], -torch.inf)).amax(1)
        return RecognizerOutput(logits=self.head(features), features=features)


class EarlyFusion(ClipNetwork):
    """Folds time into channels, then a 2D CNN.

    Args:
        num_classes: Number of classes.
        num_frames: Frames per clip, the only length.
        image_size: Height and width of the frames.
        dim: Features.
        cnn: Arguments of `LightCNN`.
    """

    fixed_length = True

    def __init__(self, num_classes: int, num_frames: int, image_size: int, dim: int = 128, **cnn: Any) -> None:
        super().__init__()
        self.cnn = LightCNN(3 * num_frames, dim=dim, **cnn)
        self.head = nn.Linear(dim, num_classes)

    def forward(self, clip: Tensor, history: History | None = None, mask: Tensor | None = None) -> RecognizerOutput:
        """See `ClipNetwork.forward`."""
        features = self.cnn(rearrange(clip, "b c f h w -> b (c f) h w"))
        return RecognizerOutput(logits=self.head(features), features=features)


class SlowFusion(ClipNetwork):
    """3D convolutions whose receptive field in time grows layer by layer: 4, 6, then 10 frames.

    Args:
        num_classes: Number of classes.
        num_frames: Frames per clip.
        image_size: Height and width of the frames.
        channels: Channels of the three layers.
        dim: Features.
        grid: See `GridPool`.
    """

    min_frames = 10

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
        layers, width = [], 3
        for own, length, stride in zip(channels, (4, 2, 2), (2, 2, 1), strict=True):
            conv = nn.Conv3d(width, own, (length, 3, 3), (stride, 2, 2), (0, 1, 1))
            layers.append(nn.Sequential(conv, nn.GroupNorm(8, own), nn.ReLU()))
            width = own
        self.layers = nn.Sequential(*layers)
        self.pool = GridPool(width, dim, grid)
        self.head = nn.Linear(dim, num_classes)

    def forward(self, clip: Tensor, history: History | None = None, mask: Tensor | None = None) -> RecognizerOutput:
        """See `ClipNetwork.forward`."""
        features = self.pool(self.layers(clip).mean(2))
        return RecognizerOutput(logits=self.head(features), features=features)
