"""Parts that both denoisers share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.utils import is_xformers_available
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from vgen.models.compilation import RecordsCompilation


def expand_frame_rate(frame_rate: float | Tensor, batch_size: int, device: torch.device) -> Tensor:
    """Frame rates `(b,)` in float32. A number is filled in on the device: copying it would wait for the device."""
    if isinstance(frame_rate, Tensor):
        return frame_rate.to(device, torch.float32).expand(batch_size)
    return torch.full((batch_size,), frame_rate, dtype=torch.float32, device=device)


VARIANCE_AROUND_KNOWN = 0.25
"""Variance around filled keyframes in `estimate_linearly`; that of normalized latents around zero is 1."""


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


class ActionEmbedder(nn.Module):
    """Embeds the actions of token frames. It begins as zero, also for unknown actions.

    Args:
        action_dim: Channels of the actions of one token frame.
        dim: Channels of the embedding.

    Source: DIAMOND, arXiv 2405.12399, which adds actions to the embedding of the noise level.
    """

    def __init__(self, action_dim: int, dim: int) -> None:
        super().__init__()
        self.action_dim = action_dim
        self.embedder = TimestepEmbedding(action_dim, dim)
        nn.init.zeros_(self.embedder.linear_2.weight)
        nn.init.zeros_(self.embedder.linear_2.bias)
        self.unknown = nn.Parameter(torch.zeros(dim))
        """Embedding of token frames without known actions."""

    def forward(self, actions: Tensor | None, batch_size: int, num_frames: int) -> Tensor:
        """Embeds actions.

        Args:
            actions: `(b, n, action_dim)`. NaN stands for unknown actions: a token frame with any is one without known
                actions. `None` means that all are unknown.
            batch_size: `b`.
            num_frames: `n`.

        Returns:
            Embeddings `(b, n, d)`, or `(1, 1, d)` for `None`.

        Raises:
            ValueError: The actions have another shape.
        """
        if actions is None:
            return self.unknown[None, None]
        expected = (batch_size, num_frames, self.action_dim)
        if actions.shape != expected:
            raise ValueError(f"actions must have shape {expected}, got {tuple(actions.shape)}")
        known = actions.isfinite().all(-1, keepdim=True)
        embedding = self.embedder(torch.where(known, actions, 0).to(dtype_of(self.embedder)))
        return torch.where(known, embedding, self.unknown.to(embedding))


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


def fill_keyframes(
    keyframes: Tensor | None,
    latents: Tensor,
    num_leading: Tensor | int,
    num_slots: int,
    previous: Tensor | None = None,
) -> Tensor:
    """Fills empty keyframe slots with the known frames before and after them, blended linearly in time.

    Known are the frames in the slots and the last leading latent, which stands for its last frame. Slots before the
    first known frame and after the last one repeat it. Masks and the slots of leading latents stay as they are. So the
    input of a prediction begins with the last frame repeated, and that of an interpolation with a linear blend.

    Args:
        keyframes: Keyframe slots `(b, s * (c + 1), t, h, w)`; `None` equals zeros.
        latents: Latents `(b, c, t, h, w)`; those that follow the leading ones are not read.
        num_leading: Number of leading known latents, one for all videos or `(b,)`.
        num_slots: Slots per latent frame, `s`.
        previous: The latent `(b, c, h, w)` before the first one; `None` if there is none.

    Returns:
        Keyframe slots of the same shape.

    Source: Repeated image latents as channels of the input: Stable Video Diffusion, arXiv 2311.15127.
    """
    (b, c, t, h, w), device = latents.shape, latents.device
    if keyframes is None:
        keyframes = latents.new_zeros(b, num_slots * (c + 1), t, h, w)
    slots = rearrange(keyframes, "b (s c) t h w -> b (t s) c h w", s=num_slots)
    # one place in front of the slots is for the last frame before them
    first = latents.new_zeros(b, c, h, w) if previous is None else previous.to(latents)
    values = torch.cat([first[:, None].to(slots), slots[:, :, :c]], dim=1)
    known = F.pad(slots[:, :, c, 0, 0] > 0, (1, 0), value=previous is not None)
    videos, places = torch.arange(b, device=device), torch.arange(t * num_slots + 1, device=device)
    leading = torch.as_tensor(num_leading, device=device).expand(b)
    last = latents[videos, :, (leading - 1).clamp_min(0)]
    begin = (leading * num_slots)[:, None]
    at_begin = (places == begin) & (leading > 0)[:, None]
    values = torch.where(at_begin[..., None, None, None], last[:, None].to(slots), values)
    known = torch.where(places < begin, False, known | at_begin)
    end = len(places)
    before = torch.where(known, places, -1).cummax(1).values
    after = torch.where(known, places, end).flip(1).cummin(1).values.flip(1)
    before, after = torch.where(before < 0, after, before), torch.where(after == end, before, after)
    is_known = (before >= 0) & (before < end)
    before, after = before.clamp(0, end - 1), after.clamp(0, end - 1)
    share = ((places - before) / (after - before).clamp_min(1)).to(slots)[..., None, None, None]
    blend = values[videos[:, None], before].lerp(values[videos[:, None], after], share)
    fill = (is_known & ~known & (places > begin))[..., None, None, None]
    filled = torch.where(fill[:, 1:], blend[:, 1:], slots[:, :, :c])
    return rearrange(torch.cat([filled, slots[:, :, c:]], dim=2), "b (t s) c h w -> b (s c) t h w", s=num_slots)


def estimate_linearly(noisy: Tensor, timestep: Tensor, keyframes: Tensor | None) -> Tensor:
    """Estimates the velocity of flow matching without layers: the best estimate if latents were Gaussian.

    The clean latents are taken to be normally distributed around the mean of the filled keyframe slots, or around zero
    where nothing is known. A network that adds to this estimate begins with the quality of a linear blend, or of the
    last frame repeated.

    Args:
        noisy: Noisy latents `(b, c, t, h, w)`.
        timestep: Noise levels as timesteps from 0 to 1000, `(b, 1)` or `(b, n)`; `t` is a multiple of `n`.
        keyframes: Filled keyframe slots `(b, s * (c + 1), t, h, w)`; `None` equals zeros.

    Returns:
        Velocity `(b, c, t, h, w)` in float32.

    Source: The preconditioning in Elucidating the design space of diffusion-based generative models, arXiv 2206.00364,
        for flow matching and a mean that is known in part.
    """
    noisy, c = noisy.float(), noisy.shape[1]
    level = (timestep.float() / 1000).repeat_interleave(noisy.shape[2] // timestep.shape[1], dim=1)
    level = level[:, None, :, None, None]
    variance, mean = torch.ones_like(level), torch.zeros_like(noisy)
    if keyframes is not None:
        slots = rearrange(keyframes, "b (s c) t h w -> b s c t h w", c=c + 1)[:, :, :c]
        mean = slots.float().mean(1)
        is_known = slots.flatten(4).any(4).flatten(1, 2).any(1)[:, None, :, None, None]
        variance = torch.where(is_known, VARIANCE_AROUND_KNOWN, 1.0)
    total = (1 - level).square() * variance + level.square()
    return ((level - (1 - level) * variance) * noisy - level * mean) / total


def dtype_of(module: nn.Module) -> torch.dtype:
    """The data type of a module's first parameter."""
    return next(module.parameters()).dtype
