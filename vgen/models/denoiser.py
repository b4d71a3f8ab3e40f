"""What both denoisers have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.utils import is_xformers_available
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


class DispatchedAttention:
    """Comes before diffusers' `ModelMixin`: all attention goes through its dispatcher, xformers included."""

    def set_attention_backend(self, backend: str) -> None:
        """Chooses what computes attention, as diffusers names it.

        Raises:
            RuntimeError: What it needs is not there.
            ValueError: There is no backend of that name.
        """
        if backend.lower() == "xformers" and not (is_xformers_available() and torch.cuda.is_available()):
            raise RuntimeError("xformers needs CUDA and is an extra: pip install vgen[xformers]")
        super().set_attention_backend(backend)  # type: ignore[misc]

    def set_use_memory_efficient_attention_xformers(self, valid: bool, attention_op: Any = None) -> None:
        """What `enable_xformers_memory_efficient_attention` and its opposite call: the backend `xformers` or `native`.

        Raises:
            RuntimeError: xformers or CUDA is not there.
            ValueError: `attention_op` is given; xformers chooses its kernel.
        """
        if attention_op is not None:
            raise ValueError("xformers chooses its kernel itself here: leave attention_op out")
        self.set_attention_backend("xformers" if valid else "native")


def pack_keyframes(images: Mapping[tuple[int, int], Tensor], num_latents: int, num_slots: int, like: Tensor) -> Tensor:
    """Keyframe slots `(b, s * (c + 1), t, h, w)`: in each the latent of a frame alone and a mask; zero where empty.

    Args:
        images: Normalised latents `(b, c, h, w)` of single frames by (latent, slot).
        num_latents: `t`.
        num_slots: `s`.
        like: A latent `(b, c, h, w)` that gives size, device and dtype.
    """
    b, c, h, w = like.shape
    slots = like.new_zeros(b, num_slots, c + 1, num_latents, h, w)
    for (latent, slot), image in images.items():
        slots[:, slot, :c, latent] = image
        slots[:, slot, c, latent] = 1
    return slots.flatten(1, 2)


def dtype_of(module: nn.Module) -> torch.dtype:
    """Of a module's weights."""
    return next(module.parameters()).dtype
