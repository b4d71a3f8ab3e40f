"""Frames of any size for a model that takes one size, and back."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image


@dataclass(frozen=True)
class Fit:
    """Crops frames of one size to another's shape and resizes them; `back` undoes the resizing.

    Args:
        source: Height and width of the frames.
        target: Height and width that are needed.
    """

    source: tuple[int, int]
    target: tuple[int, int]

    @property
    def cropped(self) -> tuple[int, int]:
        """Height and width of the largest centred part of the source that has the target's shape."""
        ratio = min(self.source[0] / self.target[0], self.source[1] / self.target[1])
        return max(1, round(self.target[0] * ratio)), max(1, round(self.target[1] * ratio))

    def crop(self, frames: np.ndarray) -> np.ndarray:
        """The part of frames `(f, h, w, 3)` that is used."""
        (height, width), (rows, columns) = self.cropped, self.source
        top, left = (rows - height) // 2, (columns - width) // 2
        return frames[:, top : top + height, left : left + width]

    def to_target(self, frames: np.ndarray) -> np.ndarray:
        """Frames `(f, h, w, 3)`, uint8, as they are needed."""
        return _resized(self.crop(frames), self.target)

    def back(self, frames: np.ndarray) -> np.ndarray:
        """Frames of the target's size at the size of what was cropped."""
        return _resized(frames, self.cropped)

    def __str__(self) -> str:
        source, cropped, target = (f"{width}x{height}" for height, width in (self.source, self.cropped, self.target))
        part = "" if self.source == self.cropped else f"the middle {cropped} of "
        return f"{part}{source} is shown to the model at {target} and comes back at {cropped}"


def _resized(frames: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    if frames.shape[1:3] == size:
        return frames
    images = (Image.fromarray(np.ascontiguousarray(frame)) for frame in frames)
    return np.stack([np.asarray(image.resize(size[::-1], Image.Resampling.LANCZOS)) for image in images])
