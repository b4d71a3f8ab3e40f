"""What the networks of a `Recognizer` have in common.

Axes: `b` batch, `c` channels, `f` frames, `h` height, `w` width, `d` features, `k` classes, `n` token frames.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from diffusers.utils import BaseOutput
from einops import rearrange
from torch import Tensor, nn

from vgen.temporal.state import History


@dataclass
class RecognizerOutput(BaseOutput):
    """What a recognizer says about clips."""

    logits: Tensor
    """Scores of the classes `(b, k)`, before softmax or sigmoid. In a stream, those of all frames so far."""
    features: Tensor = None  # type: ignore[assignment]  # accelerate makes outputs from dictionaries
    """Features `(b, d)` that the last layer classifies."""
    frame_logits: Tensor | None = None
    """Scores of each frame `(b, f, k)`, from that frame and earlier ones; `None` for networks that see whole clips."""
    attention: Tensor | None = None
    """Weights `(b, n, h, w)` with which tokens or positions enter the features; `None` without such weights."""


class ClipNetwork(nn.Module):
    """A network that classifies clips. Subclasses set the attributes that apply to them."""

    is_streamed = False
    """Whether it also runs over the slices of a stream, with a `History`."""
    takes_mask = False
    """Whether it takes a mask of real frames."""
    fixed_length = False
    """Whether clips must have the number of frames that it was made for."""
    fixed_size = False
    """Whether clips must have the size that it was made for."""
    is_exported = True
    """Whether it can be exported to ONNX."""
    min_frames = 1
    """Least number of frames."""
    min_size = 8
    """Least height and width."""

    def forward(self, clip: Tensor, history: History | None = None, mask: Tensor | None = None) -> RecognizerOutput:
        """Classifies clips.

        Args:
            clip: `(b, 3, f, h, w)` in [-1, 1], or the next slice of a stream.
            history: Memory of the stream, for networks with `is_streamed`.
            mask: bool `(b, f)`, false for padding at the end, for networks with `takes_mask`.
        """
        raise NotImplementedError


class GridPool(nn.Module):
    """Features of an image: averages over a grid of cells, so that they tell where something is.

    Args:
        channels: Channels of the maps.
        dim: Features.
        grid: Cells per side; 1 pools globally.
    """

    def __init__(self, channels: int, dim: int, grid: int = 4) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(grid)
        self.project = nn.Linear(channels * grid**2, dim)

    def forward(self, maps: Tensor) -> Tensor:
        """Maps `(b, c, h, w)` to `(b, d)`."""
        return self.project(self.pool(maps).flatten(1)).relu()


class LightCNN(nn.Module):
    """A small 2D CNN: 3x3 convolutions of stride 2, each with a group norm.

    Args:
        in_channels: Channels of the images.
        channels: Channels of each layer.
        dim: Features.
        grid: See `GridPool`.
    """

    def __init__(
        self, in_channels: int = 3, channels: Sequence[int] = (32, 64, 128), dim: int = 128, grid: int = 4
    ) -> None:
        super().__init__()
        widths = (in_channels, *channels)
        layers = [
            nn.Sequential(nn.Conv2d(wide, own, 3, stride=2, padding=1), nn.GroupNorm(8, own), nn.ReLU())
            for wide, own in zip(widths, channels, strict=False)
        ]
        self.layers = nn.Sequential(*layers)
        self.pool = GridPool(channels[-1], dim, grid)

    def forward(self, images: Tensor) -> Tensor:
        """Maps `(b, c, h, w)` to features `(b, d)`."""
        return self.pool(self.layers(images))


def per_frame(layer: Callable[[Tensor], Tensor], clip: Tensor) -> Tensor:
    """Applies an image network to each frame: `(b, c, f, h, w)` to `(b, f, ...)`."""
    frames = layer(rearrange(clip, "b c f h w -> (b f) c h w"))
    return frames.unflatten(0, (len(clip), clip.shape[2]))


def mean_of_real(frames: Tensor, mask: Tensor | None) -> Tensor:
    """Mean of `(b, f, ...)` over the real frames."""
    if mask is None:
        return frames.mean(1)
    weights = mask.to(frames).view(*mask.shape, *[1] * (frames.ndim - 2))
    return (frames * weights).sum(1) / weights.sum(1).clamp_min(1)


def last_of_real(frames: Tensor, mask: Tensor | None) -> Tensor:
    """The last real frame of `(b, f, d)`."""
    if mask is None:
        return frames[:, -1]
    last = (mask.sum(1) - 1).clamp_min(0)
    return frames[torch.arange(len(frames), device=frames.device), last]


class MeanSoFar(nn.Module):
    """Mean of the features of all frames of a stream so far."""

    def __init__(self) -> None:
        super().__init__()
        self.state_key = ""

    def forward(self, frames: Tensor, history: History | None, mask: Tensor | None = None) -> Tensor:
        """Maps the next features `(b, f, d)` to `(b, d)`."""
        if history is None:
            return mean_of_real(frames, mask)
        total, count = frames.sum(1), frames.new_full((1,), frames.shape[1], dtype=torch.float32)
        past_total, past_count = history.get(f"{self.state_key}.sum"), history.get(f"{self.state_key}.count")
        if past_total is not None and past_count is not None:
            total, count = total + past_total, count + past_count
        history.put(f"{self.state_key}.sum", total)
        history.put(f"{self.state_key}.count", count)
        return total / count
