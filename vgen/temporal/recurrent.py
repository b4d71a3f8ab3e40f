"""Recurrent layers over frames: convolutional LSTMs."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn

CellState = tuple[Tensor, Tensor]
"""Hidden state and cell state, each `(b, c, h, w)`."""


class ConvLSTMCell(nn.Module):
    """An LSTM cell whose gates are convolutions.

    Args:
        in_channels: Channels of a frame.
        channels: Channels of the hidden state and of the cell state.
        kernel_size: Side of the square kernels; odd, so that height and width stay the same.

    Source: Convolutional LSTM network, arXiv 1506.04214, without peepholes.
    """

    def __init__(self, in_channels: int, channels: int, kernel_size: int = 3):
        super().__init__()
        self.channels = channels
        self.gates = nn.Conv2d(in_channels + channels, 4 * channels, kernel_size, padding=kernel_size // 2)
        with torch.no_grad():
            assert self.gates.bias is not None
            self.gates.bias[channels : 2 * channels] = 1.0  # forget gates start open, so that the cell remembers

    def forward(self, frame: Tensor, state: CellState | None = None) -> CellState:
        """Updates the states with a frame `(b, c, h, w)`; `None` stands for zero states."""
        if state is None:
            zeros = frame.new_zeros(frame.shape[0], self.channels, *frame.shape[2:])
            state = zeros, zeros
        hidden, cell = state
        input_gate, forget_gate, output_gate, candidate = self.gates(torch.cat([frame, hidden], dim=1)).chunk(4, dim=1)
        cell = forget_gate.sigmoid() * cell + input_gate.sigmoid() * candidate.tanh()
        return output_gate.sigmoid() * cell.tanh(), cell


class ConvLSTM(nn.Module):
    """A stack of convolutional LSTM layers, applied to whole clips or, with the returned states, slice by slice.

    Args:
        in_channels: Channels of a frame.
        channels: Channels of the states of each layer.
        kernel_size: Side of the square kernels, odd.
    """

    def __init__(self, in_channels: int, channels: tuple[int, ...], kernel_size: int = 3):
        super().__init__()
        widths = (in_channels, *channels)
        self.cells = nn.ModuleList(
            ConvLSTMCell(width, own, kernel_size) for width, own in zip(widths, channels, strict=False)
        )

    def forward(self, clip: Tensor, states: list[CellState | None] | None = None) -> tuple[Tensor, list[CellState]]:
        """Runs all layers over a clip.

        Args:
            clip: `(b, c, f, h, w)`, or the next slice of a stream.
            states: States after the previous slice; `None` at the start.

        Returns:
            The hidden states of all layers, `(b, sum(channels), f, h, w)`, and the states of each layer after the
            last frame.
        """
        current: list[CellState | None] = list(states) if states is not None else [None] * len(self.cells)
        hidden = []
        for frame in rearrange(clip, "b c f h w -> f b c h w"):
            for index, cell in enumerate(self.cells):
                current[index] = cell(frame, current[index])
                frame = current[index][0]  # type: ignore[index]
            hidden.append(torch.cat([state[0] for state in current if state is not None], dim=1))
        return torch.stack(hidden, dim=2), current  # type: ignore[return-value]
