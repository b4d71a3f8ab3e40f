"""Recurrence over frames: convolutional LSTM cells, one or several layers deep."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn

CellState = tuple[Tensor, Tensor]
"""Hidden and cell state, `(b, c, h, w)` each."""


class ConvLSTMCell(nn.Module):
    """An LSTM cell whose gates are convolutions.

    Args:
        in_channels: Of a frame.
        channels: Of the states.
        kernel_size: Odd; space keeps its size.

    Source: Convolutional LSTM network, arXiv 1506.04214, without peepholes.
    """

    def __init__(self, in_channels: int, channels: int, kernel_size: int = 3):
        super().__init__()
        self.channels = channels
        self.gates = nn.Conv2d(in_channels + channels, 4 * channels, kernel_size, padding=kernel_size // 2)
        with torch.no_grad():
            assert self.gates.bias is not None
            self.gates.bias[channels : 2 * channels] = 1.0  # remember at first

    def forward(self, frame: Tensor, state: CellState | None = None) -> CellState:
        """The states after a frame `(b, c, h, w)`; `None` begins with zeros."""
        if state is None:
            zeros = frame.new_zeros(frame.shape[0], self.channels, *frame.shape[2:])
            state = zeros, zeros
        hidden, cell = state
        put, keep, show, new = self.gates(torch.cat([frame, hidden], dim=1)).chunk(4, dim=1)
        cell = keep.sigmoid() * cell + put.sigmoid() * new.tanh()
        return show.sigmoid() * cell.tanh(), cell


class ConvLSTM(nn.Module):
    """Layers of cells over a clip or, with the states it returns, over a stream of pieces of one.

    Args:
        in_channels: Of a frame.
        channels: Of each layer's states.
        kernel_size: Odd.
    """

    def __init__(self, in_channels: int, channels: tuple[int, ...], kernel_size: int = 3):
        super().__init__()
        widths = (in_channels, *channels)
        self.cells = nn.ModuleList(
            ConvLSTMCell(width, own, kernel_size) for width, own in zip(widths, channels, strict=False)
        )

    def forward(self, clip: Tensor, states: list[CellState | None] | None = None) -> tuple[Tensor, list[CellState]]:
        """All layers' hidden states, `(b, sum(channels), f, h, w)`, of a clip, and each layer's states after it.

        Args:
            clip: `(b, c, f, h, w)`, or the next piece of a stream.
            states: After the piece before; `None` at the start.
        """
        current: list[CellState | None] = list(states) if states is not None else [None] * len(self.cells)
        shown = []
        for frame in rearrange(clip, "b c f h w -> f b c h w"):
            for index, cell in enumerate(self.cells):
                current[index] = cell(frame, current[index])
                frame = current[index][0]  # type: ignore[index]
            shown.append(torch.cat([state[0] for state in current if state is not None], dim=1))
        return torch.stack(shown, dim=2), current  # type: ignore[return-value]
