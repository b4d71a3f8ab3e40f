"""Conversion between images or arrays (uint8, or floats in [0, 1]) and clips (floats in [-1, 1]).

Axes: `b` videos, `c` channels, `f` frames, `h w` rows and columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vgen.io.images import image_pixels


def to_uint8(pixels: Tensor) -> Tensor:
    """Pixels in [-1, 1] as uint8, clamped and rounded; any shape."""
    return to_byte_range(pixels.float().clamp(-1, 1)).round().byte()


def to_byte_range(pixels: Tensor) -> Tensor:
    """Pixels in [-1, 1] as floats in [0, 255], neither clamped nor rounded; any shape."""
    return (pixels.float() + 1) * 127.5


def from_uint8(pixels: Tensor | np.ndarray) -> Tensor:
    """uint8 pixels as floats in [-1, 1]; any shape."""
    return torch.as_tensor(pixels).float() / 127.5 - 1


def to_frames(clip: Tensor) -> np.ndarray:
    """Frames `(b, f, h, w, 3)`, uint8 on the CPU, of a clip `(b, 3, f, h, w)` in [-1, 1]."""
    return to_uint8(clip).movedim(1, -1).cpu().numpy()


def from_frames(frames: np.ndarray | Tensor) -> Tensor:
    """A clip `(..., 3, f, h, w)` in [-1, 1] of uint8 frames `(..., f, h, w, 3)`."""
    return from_uint8(frames).movedim(-1, -4)


def from_pt(frames: Tensor) -> Tensor:
    """Converts `pt` outputs of the pipeline, `(b, f, c, h, w)` in [0, 1], to clips `(b, c, f, h, w)` in [-1, 1]."""
    return frames.float().movedim(1, 2) * 2 - 1


def to_pt(clip: Tensor) -> Tensor:
    """Converts clips `(b, c, f, h, w)` in [-1, 1] to `(b, f, c, h, w)` in [0, 1]."""
    return (clip.float().movedim(1, 2) / 2 + 0.5).clamp(0, 1)


def is_batch(video: Any) -> bool:
    """Whether this is several videos, each as `to_clip` takes it, rather than the frames of one."""
    if isinstance(video, (list, tuple)):
        return any(isinstance(one, (list, tuple)) or getattr(one, "ndim", 0) == 4 for one in video)
    return getattr(video, "ndim", 0) == 5


def to_clip(video: Any) -> Tensor:
    """A video as pixels `(3, f, h, w)` in [-1, 1].

    Args:
        video: An array `(f, h, w, 3)`, a tensor `(f, 3, h, w)`, or a sequence of images as `to_pixels` takes them.

    Raises:
        ValueError: It is none of these, is empty, or has frames of different sizes.
    """
    is_sequence = isinstance(video, (list, tuple))
    if not is_sequence and getattr(video, "ndim", 0) != 4:
        raise ValueError(
            f"expected a video as an array (f, h, w, 3), a tensor (f, 3, h, w) or a list of images, got "
            f"{_describe(video)}"
        )
    frames = [to_pixels(image) for image in video]
    sizes = sorted({f"{frame.shape[-2]}x{frame.shape[-1]}" for frame in frames})
    if len(sizes) != 1:
        problem = f"frames of different sizes: {', '.join(sizes)}" if sizes else "no frames"
        raise ValueError(f"the video has {problem}")
    return torch.stack(frames, dim=1)


def to_clips(video: Any, count: int, batched: bool) -> Tensor:
    """Given videos `(b, 3, f, h, w)` in [-1, 1].

    Args:
        video: One video as `to_clip` takes it, or a sequence of them.
        count: Number of videos that are expected.
        batched: Whether the caller works with a list of prompts, so that `video` is a sequence of videos.

    Raises:
        ValueError: There is another number of videos, or they differ in length or size.
    """
    videos = list(video) if batched or is_batch(video) else [video]
    if len(videos) != count:
        raise ValueError(f"expected one video per prompt, got {len(videos)} videos for {count} prompts")
    clips = [to_clip(one) for one in videos]
    if len({clip.shape for clip in clips}) > 1:
        raise ValueError("the videos of a batch must have the same length and size")
    return torch.stack(clips)


def stream_clips(images: Iterator[Any]) -> Iterator[Tensor]:
    """Clips `(1, 3, 1, h, w)` in [-1, 1] of one image each.

    Raises:
        ValueError: There are no images, or they differ in size.
    """
    size = None
    for image in images:
        pixels = to_pixels(image)
        size = size or pixels.shape
        if pixels.shape != size:
            sizes = ", ".join("x".join(map(str, shape[1:])) for shape in (size, pixels.shape))
            raise ValueError(f"the video has frames of different sizes: {sizes}")
        yield pixels[None, :, None]
    if size is None:
        raise ValueError("the video has no frames")


def to_pixels(image: Any) -> Tensor:
    """An image as pixels `(3, h, w)` in [-1, 1].

    Args:
        image: A PIL image (converted by `vgen.io.images`), an array `(h, w, 3)`, or a tensor `(3, h, w)`; uint8, or
            floats in [0, 1].

    Raises:
        ValueError: It is none of these, or its values are out of range.
    """
    if isinstance(image, Image.Image):
        image = image_pixels(image)
    if isinstance(image, np.ndarray) and image.ndim == 3:
        image = torch.from_numpy(np.ascontiguousarray(image)).movedim(-1, 0)
    if not isinstance(image, Tensor) or image.ndim != 3 or image.shape[0] != 3:
        raise ValueError(
            f"expected an image as a PIL image, an array (h, w, 3) or a tensor (3, h, w), got {_describe(image)}"
        )
    pixels = image.float() / 255 if image.dtype == torch.uint8 else image.float()
    if not (pixels.amin() >= 0 and pixels.amax() <= 1):
        raise ValueError(
            f"an image must be uint8 or floats in [0, 1], got values from {pixels.amin():g} to {pixels.amax():g}"
        )
    return pixels * 2 - 1


def size_text(pixels: Tensor) -> str:
    """Height and width of pixels `(..., h, w)` for an error."""
    return f"{pixels.shape[-2]}x{pixels.shape[-1]}"


def _describe(value: Any) -> str:
    return f"shape {tuple(value.shape)}" if hasattr(value, "shape") else type(value).__name__
