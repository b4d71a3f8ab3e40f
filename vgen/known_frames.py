"""Which frames are given, and what a denoiser gets of them: leading latents at noise level 0, and keyframe slots.

Axes: `b` batch, `c` channels, `t h w` latent frames, rows and columns. Pixel frame 0 is latent 0; latent k >= 1 holds
frames `s*(k-1)+1 .. s*k`, and its slot j is for frame `s*(k-1) + 1 + j`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vgen.models.denoiser import pack_keyframes
from vgen.models.image_vae import FrameByFrame
from vgen.models.vae import CausalVideoVAE
from vgen.temporal.state import TemporalState


@dataclass(frozen=True)
class Placement:
    """Where given frames go."""

    num_leading: int
    """Leading latents, a multiple of the patch's frames."""
    leading_frames: int
    """Pixel frames that these hold: the first ones of the video."""
    slots: dict[int, tuple[int, int]]
    """Latent and slot of each other given pixel frame."""


def place(given: Collection[int], num_frames: int, compression: int = 4, patch_frames: int = 1) -> Placement:
    """Splits given frames into a leading run that fills whole token frames, and keyframes.

    Args:
        given: Indices of pixel frames.
        num_frames: Of the video, `1 + s*k`.
        compression: `s`, pixel frames a latent.
        patch_frames: Latents a token frame.

    Raises:
        ValueError: An index is out of range, frame 0 has no place, or nothing is left to generate.
    """
    wrong = sorted(index for index in given if not 0 <= index < num_frames)
    if wrong:
        raise ValueError(f"frame {wrong[0]} cannot be given: a video of {num_frames} has frames 0 to {num_frames - 1}")
    if len(given) == num_frames:
        raise ValueError(f"all {num_frames} frames are given: nothing is left to generate")
    run = next(index for index in range(num_frames) if index not in given)
    latents = (1 + (run - 1) // compression if run else 0) // patch_frames * patch_frames
    frames = 1 + compression * (latents - 1) if latents else 0
    rest = sorted(index for index in given if index >= frames)
    if rest and rest[0] == 0:
        needed = 1 + compression * (patch_frames - 1)
        raise ValueError(
            f"frame 0 is given, but this denoiser takes known beginnings in runs of {needed} frames: give frames 0 to "
            f"{needed - 1}, or leave frame 0 out"
        )
    slots = {index: (1 + (index - 1) // compression, (index - 1) % compression) for index in rest}
    return Placement(latents, frames, slots)


@dataclass(frozen=True)
class KnownFrames:
    """What a denoiser gets of the given frames of a batch."""

    placement: Placement
    leading: Tensor | None
    """Normalised latents `(b, c, num_leading, h, w)`; `None` if there are none."""
    keyframes: Tensor | None
    """Slots `(b, s * (c + 1), t, h, w)`."""
    pixels: dict[int, Tensor]
    """The given frames `(b, 3, h, w)` in [-1, 1]."""

    def put_back(self, latents: Tensor) -> Tensor:
        """Latents `(b, c, t, h, w)` whose leading ones are the known ones."""
        if self.leading is None:
            return latents
        return torch.cat([self.leading.to(latents), latents[:, :, self.placement.num_leading :]], dim=2)

    def paste(self, clip: Tensor) -> Tensor:
        """A decoded clip `(b, 3, f, h, w)` with the given frames at their places."""
        clip = clip.clone()
        for index, frame in self.pixels.items():
            clip[:, :, index] = frame.to(clip)
        return clip


@torch.no_grad()
def encode_known_frames(
    frames: Mapping[int, Tensor],
    num_frames: int,
    vae: CausalVideoVAE | FrameByFrame | None = None,
    compression: int = 1,
    patch_frames: int = 1,
) -> KnownFrames:
    """Encodes given frames: the leading run as a clip, every other frame alone.

    Args:
        frames: Pixel frames `(b, 3, h, w)` in [-1, 1] by index.
        num_frames: Of the video.
        vae: Encodes; without one, latents are pixels.
        compression: `s`, 1 without a VAE.
        patch_frames: Latents a token frame.

    Raises:
        ValueError: See `place`.
    """
    placement = place(frames.keys(), num_frames, compression, patch_frames)
    leading = keyframes = None
    if placement.num_leading:
        leading = encode_clip(vae, torch.stack([frames[index] for index in range(placement.leading_frames)], dim=2))
    if placement.slots:
        images = encode_slots(vae, {place: frames[index] for index, place in placement.slots.items()})
        num_latents = 1 + (num_frames - 1) // compression
        keyframes = pack_keyframes(images, num_latents, compression, next(iter(images.values())))
    return KnownFrames(placement, leading, keyframes, dict(frames))


def encode_clip(vae: CausalVideoVAE | FrameByFrame | None, clip: Tensor, state: TemporalState | None = None) -> Tensor:
    """Normalised latents `(b, c, t, h, w)` of pixels `(b, 3, f, h, w)` in [-1, 1]; with a state, the next of a stream.

    Pixels are where the VAE computes, which offloaded weights do not tell. Without a VAE, latents are pixels.
    """
    if vae is None:
        return clip
    posterior = vae.encode(clip.to(vae.dtype), state=state).latent_dist
    return vae.normalize(posterior.mode().float())


def encode_slots(
    vae: CausalVideoVAE | FrameByFrame | None, frames: Mapping[tuple[int, int], Tensor]
) -> dict[tuple[int, int], Tensor]:
    """Normalised latents `(b, c, h, w)` of frames `(b, 3, h, w)`, each encoded alone, by (latent, slot)."""
    alone = torch.stack(list(frames.values()))
    images = encode_clip(vae, alone.flatten(0, 1).unsqueeze(2)).squeeze(2).unflatten(0, alone.shape[:2])
    return dict(zip(frames, images, strict=True))


def is_batch(video: Any) -> bool:
    """Whether these are several videos, each as `to_clip` takes them, rather than the frames of one."""
    if isinstance(video, (list, tuple)):
        return any(isinstance(one, (list, tuple)) or getattr(one, "ndim", 0) == 4 for one in video)
    return getattr(video, "ndim", 0) == 5


def to_clip(video: Any) -> Tensor:
    """A video as pixels `(3, f, h, w)` in [-1, 1].

    Args:
        video: An array `(f, h, w, 3)`, a tensor `(f, 3, h, w)`, or a sequence of images as `to_pixels` takes them.

    Raises:
        ValueError: It is none of these, empty, or its frames have different sizes.
    """
    is_sequence = isinstance(video, (list, tuple))
    if not is_sequence and getattr(video, "ndim", 0) != 4:
        found = tuple(video.shape) if hasattr(video, "shape") else type(video).__name__
        raise ValueError(f"{found} is no video: give an array (f, h, w, 3), a tensor (f, 3, h, w) or a list of images")
    frames = [to_pixels(image) for image in video]
    sizes = sorted({f"{frame.shape[-2]}x{frame.shape[-1]}" for frame in frames})
    if len(sizes) != 1:
        told = f"frames of different sizes: {', '.join(sizes)}" if sizes else "no frames"
        raise ValueError(f"the video has {told}")
    return torch.stack(frames, dim=1)


def to_frames(clip: Tensor) -> np.ndarray:
    """Frames `(b, f, h, w, 3)`, uint8, of pixels `(b, 3, f, h, w)` in [-1, 1]."""
    frames = clip.float().clamp(-1, 1).add(1).mul(127.5).round().byte()
    return frames.movedim(1, -1).cpu().numpy()


def to_pixels(image: Any) -> Tensor:
    """An image as pixels `(3, h, w)` in [-1, 1].

    Args:
        image: A PIL image, an array `(h, w, 3)`, or a tensor `(3, h, w)`; uint8, or floats in [0, 1].

    Raises:
        ValueError: It is none of these, or its values are out of range.
    """
    if isinstance(image, Image.Image):
        image = np.array(image.convert("RGB"))
    if isinstance(image, np.ndarray) and image.ndim == 3:
        image = torch.from_numpy(np.ascontiguousarray(image)).movedim(-1, 0)
    if not isinstance(image, Tensor) or image.ndim != 3 or image.shape[0] != 3:
        found = tuple(image.shape) if hasattr(image, "shape") else type(image).__name__
        raise ValueError(
            f"{found} is no image: give a PIL image, an array (h, w, 3) or a tensor (3, h, w), uint8 or in [0, 1]"
        )
    pixels = image.float() / 255 if image.dtype == torch.uint8 else image.float()
    if not (pixels.amin() >= 0 and pixels.amax() <= 1):
        raise ValueError(
            f"an image has values from {pixels.amin():g} to {pixels.amax():g}: give uint8, or floats in [0, 1]"
        )
    return pixels * 2 - 1
