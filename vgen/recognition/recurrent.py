"""Recurrent networks over frames. All run step by step over a stream, and then equal a run on the whole clip."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from vgen.checks import check_choice
from vgen.recognition.network import ClipNetwork, GridPool, LightCNN, RecognizerOutput, last_of_real, per_frame
from vgen.temporal.recurrent import ConvLSTM
from vgen.temporal.state import History, register_state_keys

Cell = Literal["lstm", "gru"]
"""Kind of a recurrent layer."""


class StreamedRNN(nn.Module):
    """LSTM or GRU layers whose states are kept in a `History`.

    Args:
        cell: `lstm` or `gru`.
        in_dim: Features of the input.
        dim: Features of the states.
        num_layers: Number of layers.
    """

    def __init__(self, cell: Cell, in_dim: int, dim: int, num_layers: int = 1) -> None:
        super().__init__()
        check_choice("cell", cell, Cell)
        self.rnn: Any = {"lstm": nn.LSTM, "gru": nn.GRU}[cell](in_dim, dim, num_layers, batch_first=True)
        self.state_key = ""

    def forward(self, frames: Tensor, history: History | None = None) -> Tensor:
        """Maps `(b, f, d)` to hidden states `(b, f, d')`."""
        states = None
        if history is not None:
            hidden, cell = (history.get(f"{self.state_key}.{name}") for name in ("hidden", "cell"))
            states = hidden if cell is None else (hidden, cell)
        frames, states = (self._unrolled if torch.compiler.is_exporting() else self.rnn)(frames, states)
        if history is not None:
            pair = states if isinstance(states, tuple) else (states,)
            for name, value in zip(("hidden", "cell"), pair, strict=False):
                history.put(f"{self.state_key}.{name}", value)
        return frames

    def _unrolled(self, frames: Tensor, states: Any) -> tuple[Tensor, Any]:
        """The layers, frame by frame in plain operations: exported layers would have a fixed batch size."""
        is_lstm = isinstance(self.rnn, nn.LSTM)
        if states is None:
            zeros = frames.new_zeros(self.rnn.num_layers, len(frames), self.rnn.hidden_size)
            states = (zeros, zeros) if is_lstm else zeros
        current: list[Any] = list(zip(*states, strict=True)) if is_lstm else list(states)
        outputs = []
        for x in frames.unbind(1):
            for index, state in enumerate(current):
                weights = self.rnn.all_weights[index]
                current[index] = (torch.lstm_cell if is_lstm else torch.gru_cell)(x, state, *weights)
                x = current[index][0] if is_lstm else current[index]
            outputs.append(x)
        after = tuple(map(torch.stack, zip(*current, strict=True))) if is_lstm else torch.stack(current)
        return torch.stack(outputs, dim=1), after


def classify_states(states: Tensor, head: nn.Module, mask: Tensor | None, **others: Any) -> RecognizerOutput:
    """Scores of each state `(b, f, d)`; those of a clip are those of its last real frame."""
    features = last_of_real(states, mask)
    return RecognizerOutput(logits=head(features), features=features, frame_logits=head(states), **others)


class CNNRecurrent(ClipNetwork):
    """A light CNN over frames, then LSTM or GRU layers.

    Args:
        num_classes: Number of classes.
        num_frames: Frames per clip.
        image_size: Height and width of the frames.
        cell: `lstm` or `gru`.
        dim: Features of the states.
        num_layers: Number of recurrent layers.
        cnn: Arguments of `LightCNN`.

    Source: Long-term recurrent convolutional networks, arXiv 1411.4389.
    """

    is_streamed = takes_mask = True

    def __init__(
        self,
        num_classes: int,
        num_frames: int,
        image_size: int,
        cell: Cell = "lstm",
        dim: int = 128,
        num_layers: int = 1,
        **cnn: Any,
    ) -> None:
        super().__init__()
        self.cnn = LightCNN(dim=dim, **cnn)
        self.rnn = StreamedRNN(cell, dim, dim, num_layers)
        self.head = nn.Linear(dim, num_classes)
        register_state_keys(self)

    def forward(self, clip: Tensor, history: History | None = None, mask: Tensor | None = None) -> RecognizerOutput:
        """See `ClipNetwork.forward`."""
        return classify_states(self.rnn(per_frame(self.cnn, clip), history), self.head, mask)


class ConvLSTMNetwork(ClipNetwork):
    """Convolutional LSTM layers over patches of pixels, then pooling over a grid.

    Args:
        num_classes: Number of classes.
        num_frames: Frames per clip.
        image_size: Height and width of the frames, a multiple of `patch_size`.
        channels: Channels of the states of each layer.
        patch_size: Side of the patches.
        dim: Features.
        grid: See `GridPool`.

    Source: Convolutional LSTM network, arXiv 1506.04214.
    """

    is_streamed = takes_mask = True

    def __init__(
        self,
        num_classes: int,
        num_frames: int,
        image_size: int,
        channels: Sequence[int] = (32, 64),
        patch_size: int = 8,
        dim: int = 128,
        grid: int = 4,
    ) -> None:
        super().__init__()
        self.min_size = patch_size
        self.stem = nn.Conv2d(3, channels[0], patch_size, stride=patch_size)
        self.recurrent = ConvLSTM(channels[0], tuple(channels))
        self.pool = GridPool(channels[-1], dim, grid)
        self.head = nn.Linear(dim, num_classes)

    def forward(self, clip: Tensor, history: History | None = None, mask: Tensor | None = None) -> RecognizerOutput:
        """See `ClipNetwork.forward`."""
        states = None
        if history is not None and history.get("recurrent.0.hidden") is not None:
            names = ("hidden", "cell")
            states = [
                tuple(history.get(f"recurrent.{index}.{name}") for name in names)
                for index in range(len(self.recurrent.cells))
            ]
        maps, states = self.recurrent(per_frame(self.stem, clip).transpose(1, 2), states)  # type: ignore[arg-type]
        if history is not None:
            for index, (hidden, cell) in enumerate(states):
                history.put(f"recurrent.{index}.hidden", hidden)
                history.put(f"recurrent.{index}.cell", cell)
        last = maps[:, -self.pool_channels :]
        return classify_states(per_frame(self.pool, last), self.head, mask)

    @property
    def pool_channels(self) -> int:
        """Channels of the last layer."""
        return self.recurrent.cells[-1].channels  # type: ignore[return-value]


class SpatialAttentionLSTM(ClipNetwork):
    """ST-LSTM: an LSTM over frames whose state decides where to look in the present frame.

    With the maps `x_t` of a frame and the state `h_t`, the attention is `a_t = softmax(W_a h_t + b_a)` over positions,
    and the fused features are `[sum(a_t * x_t); h_t]`.

    Args:
        num_classes: Number of classes.
        num_frames: Frames per clip.
        image_size: Height and width of the frames, the only size.
        channels: Channels of the CNN's layers.
        dim: Features of the state.
        grid: Positions per side; the maps are averaged to them.
    """

    is_streamed = takes_mask = fixed_size = True

    def __init__(
        self,
        num_classes: int,
        num_frames: int,
        image_size: int,
        channels: Sequence[int] = (32, 64, 128),
        dim: int = 128,
        grid: int = 8,
    ) -> None:
        super().__init__()
        self.cnn = LightCNN(channels=channels, dim=dim)
        self.grid = nn.AdaptiveAvgPool2d(grid)
        self.rnn = StreamedRNN("lstm", dim, dim)
        self.to_attention = nn.Linear(dim, grid**2)
        self.head = nn.Linear(channels[-1] + dim, num_classes)
        register_state_keys(self)

    def forward(self, clip: Tensor, history: History | None = None, mask: Tensor | None = None) -> RecognizerOutput:
        """See `ClipNetwork.forward`."""
        maps = per_frame(self.cnn.layers, clip)
        hidden = self.rnn(per_frame(self.cnn.pool, maps.transpose(1, 2)), history)
        grid = per_frame(self.grid, maps.transpose(1, 2))
        attention = self.to_attention(hidden).softmax(-1).unflatten(-1, grid.shape[-2:])
        attended = (grid * attention[:, :, None]).sum((-2, -1))
        return classify_states(torch.cat([attended, hidden], dim=-1), self.head, mask, attention=attention)


class RecurrentCNN(ClipNetwork):
    """A CNN whose layers combine, at each frame, the layer below with their own output at the frame before.

    Args:
        num_classes: Number of classes.
        num_frames: Frames per clip.
        image_size: Height and width of the frames.
        channels: Channels of the layers.
        dim: Features.
        grid: See `GridPool`.

    Source: Delving deeper into convolutional networks for learning video representations, arXiv 1511.06432, without
        gates.
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
        self.below = nn.ModuleList(
            nn.Conv2d(wide, own, 3, stride=2, padding=1) for wide, own in zip(widths, channels, strict=False)
        )
        self.before = nn.ModuleList(nn.Conv2d(own, own, 3, padding=1, bias=False) for own in channels)
        self.norms = nn.ModuleList(nn.GroupNorm(8, own) for own in channels)
        self.pool = GridPool(channels[-1], dim, grid)
        self.head = nn.Linear(dim, num_classes)

    def forward(self, clip: Tensor, history: History | None = None, mask: Tensor | None = None) -> RecognizerOutput:
        """See `ClipNetwork.forward`."""
        layers = range(len(self.below))
        past = [None if history is None else history.get(f"layers.{index}") for index in layers]
        frames = []
        for x in rearrange(clip, "b c f h w -> f b c h w"):
            for index in layers:
                x, own = self.below[index](x), past[index]
                if own is not None:
                    x = x + self.before[index](own)
                past[index] = x = F.relu(self.norms[index](x))
            frames.append(self.pool(x))
        if history is not None:
            for index, own in enumerate(past):
                assert own is not None
                history.put(f"layers.{index}", own)
        return classify_states(torch.stack(frames, dim=1), self.head, mask)
