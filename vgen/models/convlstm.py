"""A recurrent network that predicts frames: what video prediction was before diffusion, and a measure for it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from einops import rearrange
from torch import Tensor, nn

from vgen.models.loading import StrictLoading
from vgen.temporal.recurrent import CellState, ConvLSTM


class ConvLSTMPredictor(StrictLoading, ModelMixin, ConfigMixin):
    """Predicts each next frame from those before it by a convolutional LSTM over patches of pixels.

    The hidden states of all layers together give the frame.

    Args:
        patch_size: Pixels of a patch's side, which become channels.
        channels: Of each layer's states.
        kernel_size: Of the gates, odd.

    Source: Convolutional LSTM network, arXiv 1506.04214.
    """

    @register_to_config
    def __init__(self, patch_size: int = 4, channels: Sequence[int] = (64, 64), kernel_size: int = 3) -> None:
        super().__init__()
        pixels = 3 * patch_size**2
        self.recurrent = ConvLSTM(pixels, tuple(channels), kernel_size)
        self.to_pixels = nn.Conv2d(sum(channels), pixels, 1)

    def forward(self, clip: Tensor, num_frames: int = 0) -> Tensor:
        """The frame behind each given one, then further ones from its own: `(b, 3, f + num_frames, h, w)`.

        Args:
            clip: Given frames `(b, 3, f, h, w)` in [-1, 1].
            num_frames: Predictions that follow from predictions.

        Raises:
            ValueError: A side is no multiple of `patch_size`.
        """
        side = self.config.patch_size
        if clip.shape[-2] % side or clip.shape[-1] % side:
            raise ValueError(f"frames of {clip.shape[-2]}x{clip.shape[-1]}: sides must be multiples of {side}")
        patches = rearrange(clip, "b c f (h y) (w x) -> b (c y x) f h w", y=side, x=side)
        made, states = self._step(patches, None)
        frames = [made]
        for _ in range(num_frames):
            made, states = self._step(made[:, :, -1:], states)
            frames.append(made)
        return rearrange(torch.cat(frames, dim=2), "b (c y x) f h w -> b c f (h y) (w x)", y=side, x=side)

    def predict(self, given: Tensor, num_frames: int) -> Tensor:
        """New frames `(b, 3, num_frames, h, w)` behind given ones `(b, 3, f, h, w)` in [-1, 1].

        Raises:
            ValueError: There is nothing to predict, or as for a call.
        """
        if num_frames < 1:
            raise ValueError(f"num_frames={num_frames} must be at least 1")
        return self(given, num_frames - 1)[:, :, given.shape[2] - 1 :]

    def _step(self, patches: Tensor, states: list[CellState] | None) -> tuple[Tensor, list[CellState]]:
        """What follows each of some frames of patches, and the states after them."""
        hidden, states = self.recurrent(patches, states)
        made = self.to_pixels(rearrange(hidden, "b c f h w -> (b f) c h w"))
        return rearrange(made, "(b f) c h w -> b c f h w", b=len(patches)), states
