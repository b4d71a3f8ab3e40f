"""Several streams or rates: two-stream networks, TSN, SlowFast, and frame differences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from vgen.checks import check_number
from vgen.recognition.network import ClipNetwork, LightCNN, MeanSoFar, RecognizerOutput, per_frame
from vgen.temporal.flow import FlowMethod, optical_flow
from vgen.temporal.state import History, register_state_keys


class TwoStreamNetwork(ClipNetwork):
    """One CNN on the middle frame and one on the stacked optical flow around it.

    The probabilities are `alpha` times those of the frame plus `1 - alpha` times those of the flow. Logits are their
    logarithms. Flow is computed on the CPU and needs OpenCV (`pip install vgen[flow]`).

    Args:
        num_classes: Number of classes.
        num_frames: Frames per clip.
        image_size: Height and width of the frames.
        alpha: Weight of the frame, from 0 to 1.
        num_flows: Flow fields, whose two components become channels.
        flow: Method of `vgen.temporal.flow.optical_flow`; `lucas_kanade` is the fastest on small frames.
        dim: Features of each stream.
        cnn: Arguments of `LightCNN`.

    Source: Two-stream convolutional networks for action recognition in videos, arXiv 1406.2199.
    """

    is_exported = False

    def __init__(
        self,
        num_classes: int,
        num_frames: int,
        image_size: int,
        alpha: float = 0.5,
        num_flows: int = 10,
        flow: FlowMethod = "dis",
        dim: int = 128,
        **cnn: Any,
    ) -> None:
        super().__init__()
        check_number("alpha", alpha, 0, 1)
        self.alpha, self.num_flows, self.flow = alpha, num_flows, flow
        self.min_frames = num_flows + 1
        self.of_frame = LightCNN(3, dim=dim, **cnn)
        self.of_flow = LightCNN(2 * num_flows, dim=dim, **cnn)
        self.heads = nn.ModuleList(nn.Linear(dim, num_classes) for _ in range(2))

    def forward(self, clip: Tensor, history: History | None = None, mask: Tensor | None = None) -> RecognizerOutput:
        """See `ClipNetwork.forward`."""
        middle = clip.shape[2] // 2
        features = self.of_frame(clip[:, :, middle]), self.of_flow(self.stacked_flow(clip).to(clip))
        log_weights = torch.tensor([self.alpha, 1 - self.alpha], device=clip.device).log()
        scores = [head(one).log_softmax(-1) for head, one in zip(self.heads, features, strict=True)]
        logits = (torch.stack(scores) + log_weights[:, None, None]).logsumexp(0)
        return RecognizerOutput(logits=logits, features=torch.cat(features, dim=-1))

    def stacked_flow(self, clip: Tensor) -> Tensor:
        """Optical flow of the frames around the middle, `(b, 2 * num_flows, h, w)`, in tenths of the width."""
        begin = (clip.shape[2] - self.num_flows - 1) // 2
        frames = rearrange(clip[:, :, begin : begin + self.num_flows + 1], "b c f h w -> b f c h w")
        first, second = (x.flatten(0, 1) for x in (frames[:, :-1], frames[:, 1:]))
        flow = optical_flow(first, second, self.flow) * (10 / clip.shape[-1])
        return rearrange(flow, "(b f) c h w -> b (f c) h w", b=len(clip))


class SegmentNetwork(ClipNetwork):
    """TSN: one random frame of each segment, one CNN for all, and the mean of their scores.

    Evaluation takes the middle frame of each segment.

    Args:
        num_classes: Number of classes.
        num_frames: Frames per clip.
        image_size: Height and width of the frames.
        num_segments: Segments of equal length.
        dim: Features.
        cnn: Arguments of `LightCNN`.

    Source: Temporal segment networks, arXiv 1608.00859.
    """

    def __init__(
        self, num_classes: int, num_frames: int, image_size: int, num_segments: int = 3, dim: int = 128, **cnn: Any
    ) -> None:
        super().__init__()
        self.num_segments = self.min_frames = num_segments
        self.cnn = LightCNN(dim=dim, **cnn)
        self.head = nn.Linear(dim, num_classes)

    def forward(self, clip: Tensor, history: History | None = None, mask: Tensor | None = None) -> RecognizerOutput:
        """See `ClipNetwork.forward`."""
        bounds = torch.arange(self.num_segments + 1, device=clip.device) * clip.shape[2] // self.num_segments
        begins, ends = bounds[:-1], bounds[1:]
        picked = (begins + ends - 1) // 2
        if self.training:
            picked = begins + (torch.rand(len(begins), device=clip.device) * (ends - begins)).long()
        # the mean of linear scores is that of features
        features = per_frame(self.cnn, clip.index_select(2, picked)).mean(1)
        return RecognizerOutput(logits=self.head(features), features=features)


class FrameDifference(ClipNetwork):
    """A light CNN on each frame and its difference from the frame before; a clip has the mean of their scores.

    The first frame of a video has no difference.

    Args:
        num_classes: Number of classes.
        num_frames: Frames per clip.
        image_size: Height and width of the frames.
        dim: Features.
        cnn: Arguments of `LightCNN`.
    """

    is_streamed = takes_mask = True

    def __init__(self, num_classes: int, num_frames: int, image_size: int, dim: int = 128, **cnn: Any) -> None:
        super().__init__()
        self.cnn = LightCNN(6, dim=dim, **cnn)
        self.mean = MeanSoFar()
        self.head = nn.Linear(dim, num_classes)
        register_state_keys(self)

    def forward(self, clip: Tensor, history: History | None = None, mask: Tensor | None = None) -> RecognizerOutput:
        """See `ClipNetwork.forward`."""
        past = clip[:, :, :1]
        if history is not None:
            last, started = history.get("last"), history.get("started")
            if last is not None and started is not None:
                past = torch.where(started > 0, last, past)  # an exported stream begins with zeros
            history.put("last", clip[:, :, -1:].clone())
            history.put("started", torch.ones(1, device=clip.device))
        before = torch.cat([past, clip[:, :, :-1]], dim=2)
        frames = per_frame(self.cnn, torch.cat([clip, clip - before], dim=1))
        features = self.mean(frames, history, mask)
        return RecognizerOutput(logits=self.head(features), features=features, frame_logits=self.head(frames))


def convolution(
    channels: int, width: int, kernel: tuple[int, int, int], stride: tuple[int, int, int] = (1, 1, 1)
) -> nn.Sequential:
    """A convolution without bias that keeps the size, and a norm."""
    padding = tuple(size // 2 for size in kernel)
    conv = nn.Conv3d(channels, width, kernel, stride, padding, bias=False)  # type: ignore[arg-type]
    return nn.Sequential(conv, nn.BatchNorm3d(width))


class Bottleneck(nn.Module):
    """A residual block of 1x1, 3x3 and 1x1 convolutions, the first of which may also see three frames.

    Args:
        channels: Channels of the input.
        width: Channels between; the output has four times as many.
        length: Frames of the first kernel.
        stride: Spatial stride.
    """

    def __init__(self, channels: int, width: int, length: int, stride: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            convolution(channels, width, (length, 1, 1)),
            nn.ReLU(),
            convolution(width, width, (1, 3, 3), (1, stride, stride)),
            nn.ReLU(),
            convolution(width, 4 * width, (1, 1, 1)),
        )
        self.skip: nn.Module = nn.Identity()
        if stride != 1 or channels != 4 * width:
            self.skip = convolution(channels, 4 * width, (1, 1, 1), (1, stride, stride))

    def forward(self, x: Tensor) -> Tensor:
        """Maps `(b, c, f, h, w)` to `(b, 4 width, f, h / stride, w / stride)`."""
        return (self.layers(x) + self.skip(x)).relu()


class SlowFastNetwork(ClipNetwork):
    """A slow path with many channels on few frames, and a fast path with few channels on all frames.

    Lateral connections lead from the fast path to the slow one. `num_frames=32` with `alpha=8` is SlowFast 4x16.

    Args:
        num_classes: Number of classes.
        num_frames: Frames per clip that the fast path sees; the slow path sees every `alpha`-th.
        image_size: Height and width of the frames; 224 in the paper.
        width: Channels of the slow path's first layer.
        alpha: Frame rate of the fast path relative to the slow one.
        beta: Channels of the slow path relative to the fast one.
        blocks: Residual blocks of each stage; the default is ResNet-50.
        dropout: Dropout rate before the last layer.

    Source: SlowFast networks for video recognition, arXiv 1812.03982, with the lateral convolutions of its published
        code (kernels of 5 frames, twice as many channels); 34.5 million parameters for R50 4x16 with 400 classes.
    """

    min_size = 32

    def __init__(
        self,
        num_classes: int,
        num_frames: int = 32,
        image_size: int = 224,
        width: int = 64,
        alpha: int = 8,
        beta: int = 8,
        blocks: Sequence[int] = (3, 4, 6, 3),
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        self.alpha = self.min_frames = alpha
        thin = width // beta
        self.stems = nn.ModuleList([self._stem(width, 1), self._stem(thin, 5)])
        self.laterals = nn.ModuleList([self._lateral(thin)])
        slow, fast = [], []
        slow_channels, fast_channels = width + 2 * thin, thin
        for index, count in enumerate(blocks):
            wide, narrow = width * 2**index, thin * 2**index
            strides = [2 if index and block == 0 else 1 for block in range(count)]
            slow.append(self._stage(slow_channels, wide, 1 if index < 2 else 3, strides))
            fast.append(self._stage(fast_channels, narrow, 3, strides))
            slow_channels, fast_channels = 4 * wide, 4 * narrow
            if index < len(blocks) - 1:
                self.laterals.append(self._lateral(fast_channels))
                slow_channels += 2 * fast_channels
        self.slow, self.fast = nn.ModuleList(slow), nn.ModuleList(fast)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(slow_channels + fast_channels, num_classes)

    @staticmethod
    def _stem(width: int, length: int) -> nn.Sequential:
        pool = nn.MaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1))
        return nn.Sequential(convolution(3, width, (length, 7, 7), (1, 2, 2)), nn.ReLU(), pool)

    def _lateral(self, channels: int) -> nn.Sequential:
        return nn.Sequential(convolution(channels, 2 * channels, (5, 1, 1), (self.alpha, 1, 1)), nn.ReLU())

    @staticmethod
    def _stage(channels: int, width: int, length: int, strides: Sequence[int]) -> nn.Sequential:
        inputs = [channels] + [4 * width] * (len(strides) - 1)
        return nn.Sequential(*(Bottleneck(one, width, length, s) for one, s in zip(inputs, strides, strict=True)))

    def forward(self, clip: Tensor, history: History | None = None, mask: Tensor | None = None) -> RecognizerOutput:
        """See `ClipNetwork.forward`."""
        slow, fast = self.stems[0](clip[:, :, :: self.alpha]), self.stems[1](clip)
        for index in range(len(self.slow)):
            slow = self.slow[index](torch.cat([slow, self.laterals[index](fast)], dim=1))
            fast = self.fast[index](fast)
        features = torch.cat([slow.mean((2, 3, 4)), fast.mean((2, 3, 4))], dim=1)
        return RecognizerOutput(logits=self.head(self.dropout(features)), features=features)
