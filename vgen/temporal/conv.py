"""Causal 3D convolutions, and causal down- and upsampling in time, for whole clips and for streams.

Every module takes an optional `History`. Without one, the input is a whole clip. With one, it is the next slice of a
stream: the module reads the frames that it needs from before and stores those that the next slice needs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from vgen.temporal.state import History

torch.compiler.allow_in_graph(rearrange)  # see vgen.temporal.attention


def append(past: Tensor, part: Tensor) -> Tensor:
    """Concatenates earlier frames `(b, c, n, h, w)` of a stream and its next slice.

    The dtype and the memory format are those of the slice, so that a saved and loaded state gives the same result.

    Raises:
        ValueError: Batch size, height or width of the slice differ from those of the stream.
    """
    _check_continues(past, part)
    return torch.cat([past.to(part).contiguous(memory_format=_memory_format(part)), part], dim=2)


def _memory_format(x: Tensor) -> torch.memory_format:
    channels_last = x.is_contiguous(memory_format=torch.channels_last_3d)
    return torch.channels_last_3d if channels_last else torch.contiguous_format


def _check_continues(past: Tensor, part: Tensor) -> None:
    sizes = [(x.shape[0], *x.shape[3:]) for x in (past, part)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"the slice does not continue this stream: expected activations of (b, h, w) = {sizes[0]}, "
            f"got {sizes[1]}; use a new TemporalState"
        )


def convolve(conv: nn.Conv3d, x: Tensor) -> Tensor:
    """Applies a 3D convolution of stride 1, without padding in time, to `(b, c, f, h, w)`.

    For float32 on the CPU, oneDNN is called explicitly: for single clips with few channels, frames or rows PyTorch
    would choose its own kernel, which is several times slower. Compilation and autocast do not support that call.
    """
    plain = x.device.type == "cpu" and x.dtype == torch.float32 and not torch.compiler.is_compiling()
    if plain and x.numel() and _has_onednn() and not torch.is_autocast_enabled("cpu"):
        return torch.ops.aten.mkldnn_convolution(x, conv.weight, conv.bias, conv.padding, (1, 1, 1), (1, 1, 1), 1)
    return F.conv3d(x, conv.weight, conv.bias, padding=conv.padding)  # type: ignore[arg-type]


def _has_onednn() -> bool:
    """Whether this build of PyTorch has oneDNN and the user has not disabled it."""
    return torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled)


class CausalConv3d(nn.Conv3d):
    """A 3D convolution whose output frame k depends on input frames up to k only.

    Time is padded at the start, with zeros or the last inputs of the previous slice. Space is padded on each side.
    The arithmetic is that of diffusers' `WanCausalConv3d` with stride 1.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel_size: `(time, height, width)`, or one number for all three.
        padding: Spatial zero padding on each side. Padding in time is always `kernel - 1` frames at the start.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int | tuple[int, int, int], padding: int = 0
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, padding=(0, padding, padding))
        self.state_key = ""

    def forward(
        self, x: Tensor, history: History | None = None, activate: Callable[..., Tensor] | None = None
    ) -> Tensor:
        """Maps `(b, c, f, h, w)` to `(b, c', f, h', w')`.

        Args:
            x: The clip, or the next slice of a stream.
            history: Memory of the stream.
            activate: A pointwise function of `x` to apply first. `activate(x, out)` writes its result to `out`, so
                that inference needs no memory for it besides the padded input of the convolution.

        Raises:
            ValueError: Batch size, height or width of the slice differ from those of the stream.
        """
        length = self.kernel_size[0] - 1
        if history is None and x.shape[2] == 1 or length == 0:
            x = x if activate is None else activate(x)
            return convolve(self, x) if length == 0 else self._single_frame(x)
        past = None if history is None else history.get(self.state_key)
        if activate is None or torch.is_grad_enabled() or self.training or torch.compiler.is_compiling():
            x = x if activate is None else activate(x)
            x = append(x.new_zeros(*x.shape[:2], length, *x.shape[3:]) if past is None else past, x)
        else:
            x = self._append_activated(past, x, activate)
        if history is not None:
            history.put(self.state_key, x[:, :, -length:].clone())
        del past  # the history may have let go of it
        return convolve(self, x)

    def _append_activated(self, past: Tensor | None, x: Tensor, activate: Callable[..., Tensor]) -> Tensor:
        length, (b, c, f, h, w) = self.kernel_size[0] - 1, x.shape
        if past is not None:
            _check_continues(past, x)
        padded = torch.empty(
            (b, c, length + f, h, w), dtype=x.dtype, device=x.device, memory_format=_memory_format(x)
        )  # fmt: skip
        before, new = padded[:, :, :length], padded[:, :, length:]
        before.zero_() if past is None else before.copy_(past)
        activate(x, new)
        return padded

    def _single_frame(self, x: Tensor) -> Tensor:
        """Convolves a single frame with the last temporal tap only: the others would meet zeros."""
        y = F.conv2d(x.squeeze(2), self.weight[:, :, -1], self.bias, padding=self.padding[1:])
        return y.unsqueeze(2)


class CausalDownsample(nn.Module):
    """Halves the number of frames after the first: `1 + 2k` frames become `1 + k`.

    The first frame of a stream bypasses the convolution. Each later output depends on its own two input frames and the
    one before them.

    Args:
        channels: Channels of input and output.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.time_conv = nn.Conv3d(channels, channels, (3, 1, 1), stride=(2, 1, 1))
        self.state_key = ""

    def forward(self, x: Tensor, history: History | None = None) -> Tensor:
        """Maps `(b, c, 1 + 2k, h, w)` to `(b, c, 1 + k, h, w)`, or a later slice of `2k` frames to `k`.

        Raises:
            ValueError: Batch size, height or width of the slice differ from those of the stream.
        """
        past = None if history is None else history.get(self.state_key)
        if history is not None:
            history.put(self.state_key, x[:, :, -1:].clone())
        if past is not None:
            return self.time_conv(append(past, x))
        if x.shape[2] == 1:
            return x
        return torch.cat([x[:, :, :1], self.time_conv(x)], dim=2)


class CausalUpsample(nn.Module):
    """Doubles the number of frames after the first: `1 + k` frames become `1 + 2k`.

    The first frame of a stream bypasses the convolution and is never an input of it: zeros precede the second frame.

    Args:
        channels: Channels of input and output.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.time_conv = CausalConv3d(channels, 2 * channels, (3, 1, 1))
        self.state_key = ""

    def forward(self, x: Tensor, history: History | None = None) -> Tensor:
        """Maps `(b, c, 1 + k, h, w)` to `(b, c, 1 + 2k, h, w)`, or a later slice of `k` frames to `2k`.

        Raises:
            ValueError: Batch size, height or width of the slice differ from those of the stream.
        """
        if history is not None and history.get(self.state_key) is not None:
            return self._double(x, history)
        first, rest = x[:, :, :1], x[:, :, 1:]
        if history is not None:
            history.put(self.state_key, torch.ones(1, device=x.device))  # marks that the first frame is done
        if rest.shape[2] == 0:
            return first
        return torch.cat([first, self._double(rest, history)], dim=2)

    def _double(self, x: Tensor, history: History | None) -> Tensor:
        return rearrange(self.time_conv(x, history), "b (k c) f h w -> b c (f k) h w", k=2)
