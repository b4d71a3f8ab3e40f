"""What both denoisers have."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from torch import Tensor, nn


class FrameRateEmbedder(nn.Module):
    """Frames per second, on a logarithmic scale, to something that starts as zero."""

    def __init__(self, dim: int, freq_dim: int) -> None:
        super().__init__()
        self.proj = Timesteps(freq_dim, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.embedder = TimestepEmbedding(freq_dim, dim)
        nn.init.zeros_(self.embedder.linear_2.weight)
        nn.init.zeros_(self.embedder.linear_2.bias)

    def forward(self, frame_rate: Tensor) -> Tensor:
        """Rates `(b,)`, where NaN adds nothing, to `(b, 1, d)`."""
        known = frame_rate.isfinite()
        octaves = torch.where(known, frame_rate, 1.0).log2()
        embedding = self.embedder(self.proj(100 * octaves).to(dtype_of(self.embedder)))
        return (embedding * known[:, None].to(embedding)).unsqueeze(1)


class WholeVideos:
    """Comes before diffusers' `ModelMixin` and says why a video is not split between devices."""

    def enable_parallelism(self, *args: Any, **kwargs: Any) -> None:
        """Always raises: diffusers' hooks split tokens or heads, and here levels and masks go with whole frames.

        Raises:
            ValueError: Says so.
        """
        raise ValueError(
            "context and tensor parallelism are not served: they would split the tokens or heads of a video between "
            "devices, but not the noise levels, groups and cached keys that belong to whole token frames; share out "
            "videos instead"
        )


def dtype_of(module: nn.Module) -> torch.dtype:
    """Of a module's weights."""
    return next(module.parameters()).dtype
