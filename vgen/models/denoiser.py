"""Parts that both denoisers share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.utils import is_xformers_available
from torch import Tensor, nn

from vgen.models.compilation import RecordsCompilation


def expand_frame_rate(frame_rate: float | Tensor, batch_size: int, device: torch.device) -> Tensor:
    """Frame rates `(b,)` in float32. A number is filled in on the device: copying it would wait for the device."""
    if isinstance(frame_rate, Tensor):
        return frame_rate.to(device, torch.float32).expand(batch_size)
    return torch.full((batch_size,), frame_rate, dtype=torch.float32, device=device)


class FrameRateEmbedder(nn.Module):
    """Embeds the frame rate on a logarithmic scale. The output layer is zero-initialized.

    Args:
        dim: Channels of the embedding.
        freq_dim: Channels of the sinusoids.
    """

    def __init__(self, dim: int, freq_dim: int) -> None:
        super().__init__()
        self.proj = Timesteps(freq_dim, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.embedder = TimestepEmbedding(freq_dim, dim)
        nn.init.zeros_(self.embedder.linear_2.weight)
        nn.init.zeros_(self.embedder.linear_2.bias)

    def forward(self, frame_rate: Tensor) -> Tensor:
        """Embeds frame rates.

        Args:
            frame_rate: Frames per second `(b,)`. NaN stands for an unknown rate, whose embedding is zero.

        Returns:
            Embeddings `(b, 1, d)`.
        """
        known = frame_rate.isfinite()
        octaves = torch.where(known, frame_rate, 1.0).log2()
        embedding = self.embedder(self.proj(100 * octaves).to(dtype_of(self.embedder)))
        return (embedding * known[:, None].to(embedding)).unsqueeze(1)


class DispatchedAttention(RecordsCompilation):
    """Sends all attention, including xformers', through diffusers' dispatcher.

    A mixin that must precede diffusers' `ModelMixin` in the list of base classes.
    """

    def set_attention_backend(self, backend: str) -> None:
        """Sets the attention backend.

        Args:
            backend: Name of a backend of diffusers, such as `native`, `flash` or `xformers`.

        Raises:
            RuntimeError: The backend's library or hardware is not available.
            ValueError: The backend is unknown.
        """
        if backend.lower() == "xformers" and not (is_xformers_available() and torch.cuda.is_available()):
            raise RuntimeError("the backend xformers needs a CUDA device and the extra: pip install vgen[xformers]")
        super().set_attention_backend(backend)  # type: ignore[misc]

    def fuse_qkv_projections(self) -> None:
        """Not supported.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            "fused projections of queries, keys and values are not supported, because LoRA and the KV cache use each "
            "on its own; compile the network instead"
        )

    def set_use_memory_efficient_attention_xformers(self, valid: bool, attention_op: Any = None) -> None:
        """Switches between the backends `xformers` and `native`.

        diffusers' `enable_xformers_memory_efficient_attention` and `disable_xformers_memory_efficient_attention` call
        it.

        Args:
            valid: Whether to use `xformers`.
            attention_op: Must be `None`, because the dispatcher lets xformers choose its kernel.

        Raises:
            RuntimeError: xformers or CUDA is not available.
            ValueError: `attention_op` is not `None`.
        """
        if attention_op is not None:
            raise ValueError(f"attention_op must be None, because xformers chooses its kernel, got {attention_op!r}")
        self.set_attention_backend("xformers" if valid else "native")


def pack_keyframes(images: Mapping[tuple[int, int], Tensor], num_latents: int, num_slots: int, like: Tensor) -> Tensor:
    """Packs keyframes into the keyframe input of a denoiser.

    Each latent frame has one slot per pixel frame. A slot holds the latent of that frame, encoded alone, and a mask
    channel of ones. Empty slots are zero.

    Args:
        images: Normalized latents `(b, c, h, w)` of single frames, by indices of latent frame and slot.
        num_latents: Number of latent frames, `t`.
        num_slots: Slots per latent frame, `s`: the temporal compression of the VAE.
        like: A latent `(b, c, h, w)` that sets the shape, device and dtype.

    Returns:
        Keyframe slots `(b, s * (c + 1), t, h, w)`.
    """
    b, c, h, w = like.shape
    slots = like.new_zeros(b, num_slots, c + 1, num_latents, h, w)
    for (latent, slot), image in images.items():
        slots[:, slot, :c, latent] = image
        slots[:, slot, c, latent] = 1
    return slots.flatten(1, 2)


def dtype_of(module: nn.Module) -> torch.dtype:
    """The data type of a module's first parameter."""
    return next(module.parameters()).dtype
