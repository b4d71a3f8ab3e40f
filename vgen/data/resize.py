"""Resizing of frames of any size to the size of a model and of its output back, and enlargement for players."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image


@dataclass(frozen=True)
class Fit:
    """Crops frames to the aspect ratio of a target size and resizes them. `back` reverts the resizing.

    Args:
        source: Height and width of the frames in pixels.
        target: Height and width that the model needs, in pixels.
        pixel_aspect_ratio: Width of a source pixel divided by its height. Pixels of the target are square.
        offset: Vertical and horizontal position of the crop: 0 is at the top or left, 1 at the bottom or right.
    """

    source: tuple[int, int]
    target: tuple[int, int]
    pixel_aspect_ratio: float = 1.0
    offset: tuple[float, float] = (0.5, 0.5)

    @property
    def cropped(self) -> tuple[int, int]:
        """Height and width of the largest crop of the source with the target's aspect ratio."""
        height, width = self.target[0], self.target[1] / self.pixel_aspect_ratio
        ratio = min(self.source[0] / height, self.source[1] / width)
        return max(1, round(height * ratio)), max(1, round(width * ratio))

    @property
    def output(self) -> tuple[int, int]:
        """Height and width of the crop in square pixels."""
        return self.cropped[0], max(1, round(self.cropped[1] * self.pixel_aspect_ratio))

    def crop(self, frames: np.ndarray) -> np.ndarray:
        """Crops frames `(f, h, w, 3)` to the part that is used, in square pixels."""
        return _resized(self._crop(frames), self.output)

    def _crop(self, frames: np.ndarray) -> np.ndarray:
        (height, width), (rows, columns) = self.cropped, self.source
        top, left = int((rows - height) * self.offset[0]), int((columns - width) * self.offset[1])
        return frames[:, top : top + height, left : left + width]

    def to_target(self, frames: np.ndarray) -> np.ndarray:
        """Crops and resizes uint8 frames `(f, h, w, 3)` to the target size."""
        return _resized(self._crop(frames), self.target)

    def back(self, frames: np.ndarray) -> np.ndarray:
        """Resizes frames of the target size to the size of the crop in square pixels."""
        return _resized(frames, self.output)

    def __str__(self) -> str:
        sizes = (self.source, self.cropped, self.target, self.output)
        source, cropped, target, output = (f"{width}x{height}" for height, width in sizes)
        crop = f"the central {cropped} of " if self.offset == (0.5, 0.5) else f"a {cropped} part of "
        part = "" if self.source == self.cropped else crop
        pixels = "" if self.pixel_aspect_ratio == 1 else f" with pixels of aspect ratio {self.pixel_aspect_ratio:.4g}"
        return f"{part}{source}{pixels} is resized to {target} for the model; the output has {output}"


def _resized(frames: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    if frames.shape[1:3] == size:
        return frames
    images = (Image.fromarray(np.ascontiguousarray(frame)) for frame in frames)
    return np.stack([np.asarray(image.resize(size[::-1], Image.Resampling.LANCZOS)) for image in images])


def enlarge(frames: np.ndarray, scale: int) -> np.ndarray:
    """Repeats each pixel of frames `(..., h, w, c)` in `scale` rows and columns."""
    return frames if scale == 1 else frames.repeat(scale, axis=-3).repeat(scale, axis=-2)


def shrink(frame: np.ndarray, scale: int, size: tuple[int, int]) -> np.ndarray:
    """Reverts `enlarge` for a frame `(h, w, 3)`: means of squares, which also average the errors of compression.

    Args:
        frame: uint8. It may have rows and columns in excess at the end.
        scale: The factor of `enlarge`.
        size: Height and width to return, in pixels.
    """
    height, width = (side * scale for side in size)
    return np.array(Image.fromarray(frame).reduce(scale, (0, 0, width, height)))
