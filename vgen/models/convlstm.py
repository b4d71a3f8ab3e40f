"""A convolutional LSTM that predicts frames: a baseline for video prediction."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from einops import rearrange
from torch import Tensor, nn

from vgen.checks import check_integer
from vgen.models.loading import StrictLoading
from vgen.temporal.recurrent import CellState, ConvLSTM


class ConvLSTMPredictor(StrictLoading, ModelMixin, ConfigMixin):
    """Predicts each frame from the earlier ones with a convolutional LSTM over patches of pixels.

    A 1x1 convolution maps the hidden states of all layers to the frame.

    Args:
        patch_size: Side in pixels of the square patches that become channels.
        channels: Channels of the states of each layer.
        kernel_size: Side of the gates' kernels, odd.

    Source: Convolutional LSTM network, arXiv 1506.04214.
    """

    @register_to_config
    def __init__(self, patch_size: int = 4, channels: Sequence[int] = (64, 64), kernel_size: int = 3) -> None:
        super().__init__()
        pixels = 3 * patch_size**2
        self.recurrent = ConvLSTM(pixels, tuple(channels), kernel_size)
        self.to_pixels = nn.Conv2d(sum(channels), pixels, 1)

    def forward(self, clip: Tensor, num_frames: int = 0) -> Tensor:
        """Predicts the frame after each given one, then `num_frames` more from its own predictions.

        Args:
            clip: Given frames `(b, 3, f, h, w)` in [-1, 1].
            num_frames: Number of frames that are predicted from predictions.

        Returns:
            Predictions `(b, 3, f + num_frames, h, w)` of frames `1 .. f + num_frames`.

        Raises:
            ValueError: Height or width is not a multiple of `patch_size`.
        """
        side = self.config.patch_size
        if clip.shape[-2] % side or clip.shape[-1] % side:
            raise ValueError(f"(h, w) of the clip must be multiples of {side}, got {tuple(clip.shape[-2:])}")
        patches = rearrange(clip, "b c f (h y) (w x) -> b (c y x) f h w", y=side, x=side)
        predicted, states = self._step(patches, None)
        frames = [predicted]
        for _ in range(num_frames):
            predicted, states = self._step(predicted[:, :, -1:], states)
            frames.append(predicted)
        return rearrange(torch.cat(frames, dim=2), "b (c y x) f h w -> b c f (h y) (w x)", y=side, x=side)

    def predict(self, given: Tensor, num_frames: int) -> Tensor:
        """Predicts `(b, 3, num_frames, h, w)` after given frames `(b, 3, f, h, w)` in [-1, 1].

        Raises:
            ValueError: `num_frames` is less than 1, or height or width is not a multiple of `patch_size`.
        """
        check_integer("num_frames", num_frames, 1)
        return self(given, num_frames - 1)[:, :, given.shape[2] - 1 :]

    def _step(self, patches: Tensor, states: list[CellState] | None) -> tuple[Tensor, list[CellState]]:
        """Predicts the frame after each given frame of patches; returns predictions and states."""
        hidden, states = self.recurrent(patches, states)
        predicted = self.to_pixels(rearrange(hidden, "b c f h w -> (b f) c h w"))
        return rearrange(predicted, "(b f) c h w -> b c f h w", b=len(patches)), states
