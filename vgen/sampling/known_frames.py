"""Converts given frames to inputs of a denoiser: leading latents at noise level 0, and keyframe slots.

Axes: `b` batch, `c` channels, `t h w` latent frames, rows and columns. Pixel frame 0 is latent 0; latent k >= 1 holds
frames `s*(k-1)+1 .. s*k`, and its slot j is for frame `s*(k-1) + 1 + j`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.utils import logging
from torch import Tensor

from vgen.checks import check_integer
from vgen.io.pixels import size_text, to_pixels
from vgen.models.denoiser import pack_keyframes
from vgen.models.image_vae import PerFrameVAE
from vgen.models.vae import CausalVideoVAE
from vgen.temporal.grid import LatentGrid
from vgen.temporal.state import TemporalState

logger = logging.get_logger(__name__)
UNLIKE_TRAINING = 10.0
"""Decibels by which the VAE's PSNR on given frames is below that on its training data before a warning: measured
with `vgen/shapes-64`, single frames of its world are at most 6 below, natural video and noise 22 and more."""


@dataclass(frozen=True)
class KnownFrameLayout:
    """Which given frames become leading latents and which become keyframes."""

    num_leading: int
    """Number of leading latents, a multiple of the latents per token frame."""
    leading_frames: int
    """Number of pixel frames in these latents, counted from the start of the video."""
    slots: dict[int, tuple[int, int]]
    """Latent and slot of every other given pixel frame."""


def lay_out(given: Collection[int], num_frames: int, grid: LatentGrid) -> KnownFrameLayout:
    """Splits given frames into a leading run that fills whole token frames, and keyframes.

    Args:
        given: Indices of pixel frames.
        num_frames: Length of the video, `1 + s*k`.
        grid: Frame arithmetic of the model.

    Raises:
        ValueError: An index is out of range, frame 0 does not fill a token frame, or nothing is left to generate.
    """
    wrong = sorted(index for index in given if not 0 <= index < num_frames)
    if wrong:
        raise ValueError(f"a known frame must have an index from 0 to {num_frames - 1}, got {wrong[0]}")
    if len(given) == num_frames:
        raise ValueError(f"all {num_frames} frames are given: nothing is left to generate")
    run = next(index for index in range(num_frames) if index not in given)
    latents = grid.num_latents(run) // grid.patch_frames * grid.patch_frames
    frames = grid.num_frames(latents) if latents else 0
    rest = sorted(index for index in given if index >= frames)
    if rest and rest[0] == 0:
        raise ValueError(
            f"frame 0 is given, but this denoiser takes known beginnings in runs of {grid.first} frames: pass frames "
            f"0 to {grid.first - 1}, or omit frame 0"
        )
    return KnownFrameLayout(latents, frames, {index: grid.slot(index) for index in rest})


@dataclass(frozen=True)
class KnownFrames:
    """Inputs of a denoiser made from the given frames of a batch."""

    layout: KnownFrameLayout
    leading: Tensor | None
    """Normalized latents `(b, c, num_leading, h, w)`; `None` if there are none."""
    keyframes: Tensor | None
    """Slots `(b, s * (c + 1), t, h, w)`."""
    pixels: dict[int, Tensor]
    """The given frames `(b, 3, h, w)` in [-1, 1] that are returned unchanged."""
    condition: Tensor | None = None
    """Mask and latents `(b, s + c, t, h, w)` instead of the above, see `encode_condition`."""
    image_embeds: Tensor | None = None
    """Tokens of the given frames from an image encoder `(b, k, d)`."""

    def overwrite_latents(self, latents: Tensor) -> Tensor:
        """Latents `(b, c, t, h, w)` with the known ones at their positions."""
        if self.leading is None:
            return latents
        return torch.cat([self.leading.to(latents), latents[:, :, self.layout.num_leading :]], dim=2)

    def overwrite_frames(self, clip: Tensor) -> Tensor:
        """A decoded clip `(b, 3, f, h, w)` with the given frames at their positions."""
        clip = clip.clone()
        for index, frame in self.pixels.items():
            clip[:, :, index] = frame.to(clip)
        return clip


def from_start(frames: Mapping[int, Tensor], num_frames: int) -> dict[int, Tensor]:
    """Frames by index counted from the start: -1 is the last frame of a video.

    Raises:
        ValueError: Two indices are the same frame.
    """
    found = {index + num_frames if index < 0 else index: frame for index, frame in frames.items()}
    if len(found) < len(frames):
        raise ValueError(f"a frame is given twice: of {num_frames} frames, {sorted(frames)} are the same")
    return found


def check_images(denoiser: Mapping[str, Any], given: Collection[int], num_frames: int) -> None:
    """Checks that an image-to-video denoiser can use the given frames.

    Args:
        denoiser: Config of the denoiser, which has a condition.
        given: Indices of the given frames.
        num_frames: Length of the video.

    Raises:
        ValueError: There are none, all, or others than the denoiser was trained for.
    """
    last = num_frames - 1
    if wrong := sorted(index for index in given if not 0 <= index <= last):
        raise ValueError(f"a known frame must have an index from 0 to {last}, got {wrong[0]}")
    if denoiser["image_dim"] is None:
        if not 0 < len(given) < num_frames:
            raise ValueError(
                "this checkpoint makes videos from images: pass image, or frames={0: first, -1: last}, got "
                f"{len(given)} of {num_frames} frames"
            )
        return
    expected = {0} if denoiser["pos_embed_seq_len"] is None else {0, last}
    if set(given) != expected:
        wanted = "image" if len(expected) == 1 else "frames={0: first, -1: last}"
        raise ValueError(
            f"this checkpoint makes videos from images: pass {wanted}, got the frames {sorted(given) or 'none'}"
        )


def check_tasks(denoiser: Mapping[str, Any], grid: LatentGrid, tasks: set[str]) -> None:
    """Checks that a denoiser was trained for some tasks.

    Args:
        denoiser: Config of the denoiser.
        grid: Frame arithmetic of the model.
        tasks: Required tasks: any of `text`, `leading` and `keyframes`.

    Raises:
        ValueError: A task is missing, or the number of keyframe slots is not the one that the VAE needs.
    """
    missing, slots = sorted(tasks - set(denoiser["tasks"])), denoiser["keyframe_slots"]
    if missing or ("keyframes" in tasks and slots != grid.compression):
        raise ValueError(
            f"this needs a checkpoint trained for {' and '.join(missing or ['keyframes'])}; this one was trained for "
            f"{', '.join(denoiser['tasks']) or 'none of these'} and has {slots} keyframe slots"
        )


@torch.no_grad()
def encode_known_frames(
    frames: Mapping[int, Tensor],
    num_frames: int,
    grid: LatentGrid,
    vae: CausalVideoVAE | PerFrameVAE | None = None,
    still: bool = False,
) -> KnownFrames:
    """Encodes given frames: the leading run as a clip, every other frame on its own.

    Args:
        frames: Pixel frames `(b, 3, h, w)` in [-1, 1] by index.
        num_frames: Length of the video.
        grid: Frame arithmetic of the model.
        vae: Encodes the frames; `None` if latents are pixels.
        still: Whether keyframes are encoded as still clips; see `still_keyframes` of the denoisers.

    Raises:
        ValueError: See `lay_out`.
    """
    layout = lay_out(frames.keys(), num_frames, grid)
    leading = keyframes = None
    if layout.num_leading:
        leading = encode_clip(vae, torch.stack([frames[index] for index in range(layout.leading_frames)], dim=2))
    if layout.slots:
        images = encode_slots(vae, {slot: frames[index] for index, slot in layout.slots.items()}, still)
        like = next(iter(images.values()))
        keyframes = pack_keyframes(images, grid.num_latents(num_frames), grid.compression, like)
    return KnownFrames(layout, leading, keyframes, dict(frames))


@torch.no_grad()
def encode_condition(
    frames: Mapping[int, Tensor], num_frames: int, grid: LatentGrid, vae: CausalVideoVAE | PerFrameVAE | None = None
) -> Tensor:
    """Encodes given frames as extra channels of a denoiser's input, as Wan image to video does.

    The first `s` channels are a mask with one channel for each pixel frame of a latent; the others are the latents of
    the video in which all unknown frames are gray.

    Args:
        frames: Pixel frames `(b, 3, h, w)` in [-1, 1] by index.
        num_frames: Length of the video.
        grid: Frame arithmetic of the model.
        vae: Encodes the video; `None` if latents are pixels.

    Returns:
        `(b, s + c, t, h, w)`.
    """
    like = next(iter(frames.values()))
    clip = like.new_zeros(like.shape[0], 3, num_frames, *like.shape[2:])
    for index, frame in frames.items():
        clip[:, :, index] = frame
    latents = encode_clip(vae, clip)
    mask = latents.new_zeros(latents.shape[0], grid.compression, *latents.shape[2:])
    for index in frames:
        latent, slot = (0, slice(None)) if index == 0 else grid.slot(index)
        mask[:, slot, latent] = 1
    return torch.cat([mask, latents], dim=1)


def encode_clip(vae: CausalVideoVAE | PerFrameVAE | None, clip: Tensor, state: TemporalState | None = None) -> Tensor:
    """Encodes pixels `(b, 3, f, h, w)` in [-1, 1], or with a state the next slice, to normalized `(b, c, t, h, w)`.

    The pixels must be on the device where the VAE computes; offloaded weights do not show which one that is. Without a
    VAE, latents are pixels.
    """
    if vae is None:
        return clip
    posterior = vae.encode(clip.to(vae.dtype), state=state).latent_dist
    return vae.normalize(posterior.mode().float())


@torch.no_grad()
def warn_unlike_training(vae: CausalVideoVAE | PerFrameVAE | None, frame: Tensor, device: torch.device) -> None:
    """Logs a warning if a VAE reconstructs a given frame much worse than the videos that it was trained on.

    Does nothing if the VAE's config has no `training_psnr`.

    Args:
        vae: The VAE.
        frame: Pixels `(b, 3, h, w)` in [-1, 1].
        device: The device where the VAE computes.
    """
    expected = getattr(vae, "config", {}).get("training_psnr")
    if vae is None or expected is None:
        return
    clip = frame.unsqueeze(2).to(device)
    decoded = vae.decode(vae.encode(clip.to(vae.dtype)).latent_dist.mode()).sample.float().clamp(-1, 1)
    errors = (decoded - clip.float()).square().flatten(1).mean(1)
    found = -10 * math.log10(errors.max().item() / 4 + 1e-10)  # pixels span 2
    if found < expected - UNLIKE_TRAINING:
        data = getattr(vae, "config", {}).get("training_data") or "other videos"
        logger.warning(
            f"the given frames do not look like what this checkpoint was trained on ({data}): its VAE reconstructs "
            f"them with {found:.0f} dB instead of {expected:.0f}. Expect nonsense; `vgen train FOLDER` "
            "makes one for yours"
        )


def encode_slots(
    vae: CausalVideoVAE | PerFrameVAE | None, frames: Mapping[tuple[int, int], Tensor], still: bool = False
) -> dict[tuple[int, int], Tensor]:
    """Normalized latents `(b, c, h, w)` of frames `(b, 3, h, w)`, each encoded on its own, by (latent, slot).

    Args:
        vae: Encodes the frames; `None` if latents are pixels.
        frames: Frames by latent and slot.
        still: Whether each is encoded as a still clip; see `still_keyframes` of the denoisers.
    """
    alone = torch.stack(list(frames.values()))
    clips = alone.flatten(0, 1).unsqueeze(2)
    if still and vae is not None:
        clips = still_clips(clips, vae.temporal_compression_ratio)
    images = encode_clip(vae, clips)[:, :, -1].unflatten(0, alone.shape[:2])
    return dict(zip(frames, images, strict=True))


def still_clips(frames: Tensor, compression: int) -> Tensor:
    """Clips `(b, 3, 1 + s, h, w)` in which frames `(b, 3, 1, h, w)` stand still; they have two latents."""
    return frames.expand(-1, -1, 1 + compression, -1, -1)


def collect_given_frames(image: Any, frames: Mapping[int, Any] | None, count: int) -> dict[int, Tensor]:
    """Given frames `(b, 3, h, w)` in [-1, 1] by index, one for each prompt.

    Args:
        image: The first frame, or a list of one per prompt; `None` if it is not given.
        frames: Images, or lists of one per prompt, by index.
        count: Number of prompts.

    Raises:
        ValueError: No frames are given, an index is given twice, or the images of an index differ in size or in number
            from the prompts.
    """
    if frames is not None and (not isinstance(frames, Mapping) or not frames):
        raise ValueError(f"frames must be a non-empty dict of images by frame index, got {type(frames).__name__}")
    for index in frames or {}:
        check_integer("a frame index in frames", index)
    if image is not None and frames is not None and 0 in frames:
        raise ValueError("frame 0 is given twice: as image and in frames")
    given = ({} if image is None else {0: image}) | dict(frames or {})
    result: dict[int, Tensor] = {}
    for index, one in given.items():
        images = list(one) if isinstance(one, (list, tuple)) else [one] * count
        if len(images) != count:
            raise ValueError(f"expected 1 or {count} images of frame {index} for {count} prompts, got {len(images)}")
        pixels = [to_pixels(each) for each in images]
        sizes = sorted({size_text(each) for each in pixels})
        if len(sizes) > 1:
            raise ValueError(f"the images of frame {index} have different sizes: {', '.join(sizes)}")
        result[index] = torch.stack(pixels)
    return result
