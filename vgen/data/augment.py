"""Augmentation of clips: geometry is the same for every frame, colour may differ."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from einops import rearrange


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """What may change in a clip; by default nothing.

    Captions stay as they are: mirror or rotate only where they name no sides.

    Raises:
        ValueError: A setting is out of range.
    """

    crop: float = 1.0
    """Smallest share of the area that a random crop keeps; it is brought back to the clip's size."""
    flip: float = 0.0
    """How often a clip is mirrored."""
    rotate: float = 0.0
    """Largest rotation, in degrees; what comes in from outside is the mirrored frame."""
    brightness: float = 0.0
    """Largest change, as a share, like `contrast` and `saturation`."""
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    """Largest change, as a share of the colour circle, at most 0.5."""
    color_per_frame: bool = False
    """Whether each frame's colours change on their own, as under a flickering light."""

    def __post_init__(self) -> None:
        """Refuses what cannot work."""
        if not 0 < self.crop <= 1 or not 0 <= self.flip <= 1 or not 0 <= self.rotate <= 180:
            raise ValueError(
                f"crop={self.crop} must be in (0, 1], flip={self.flip} in [0, 1], rotate={self.rotate} in [0, 180]"
            )
        colors = (self.brightness, self.contrast, self.saturation)
        if min(colors) < 0 or max(colors) > 1 or not 0 <= self.hue <= 0.5:
            raise ValueError(
                f"brightness, contrast, saturation={colors} must be in [0, 1] and hue={self.hue} in [0, 0.5]"
            )


def augment(clip: np.ndarray, augmentation: Augmentation, seed: int) -> np.ndarray:
    """Changes a clip at random, by kornia.

    Args:
        clip: uint8 `(f, h, w, 3)`.
        augmentation: What may change.
        seed: The result is a function of it and the clip alone.

    Returns:
        uint8 of the same shape.

    Raises:
        ImportError: Kornia is not installed.
    """
    parts = _parts(augmentation, clip.shape[1:3])
    if not parts:
        return clip
    pixels = rearrange(torch.from_numpy(clip), "f h w c -> 1 f c h w").float() / 255
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for part in parts:
            pixels = part(pixels)
    pixels = rearrange(pixels.clamp(0, 1).mul(255).round().byte(), "1 f c h w -> f h w c")
    return pixels.numpy()


@lru_cache(maxsize=8)
def _parts(augmentation: Augmentation, size: tuple[int, int]) -> list[Any]:
    if augmentation == Augmentation():
        return []
    try:
        import kornia.augmentation as K
    except ImportError as error:
        raise ImportError("augmentation needs kornia: pip install vgen[data]") from error
    one = augmentation
    geometry: list[Any] = []
    color: list[Any] = []
    if one.rotate:
        geometry.append(K.RandomAffine(one.rotate, padding_mode="reflection", p=1.0))
    if one.crop < 1:
        geometry.append(K.RandomResizedCrop(size, scale=(one.crop, 1.0), cropping_mode="resample"))
    if one.flip:
        geometry.append(K.RandomHorizontalFlip(p=one.flip))
    if max(one.brightness, one.contrast, one.saturation, one.hue) > 0:
        color.append(K.ColorJitter(one.brightness, one.contrast, one.saturation, one.hue, p=1.0))
    found = []
    if geometry:
        found.append(K.VideoSequential(*geometry, same_on_frame=True))
    if color:
        found.append(K.VideoSequential(*color, same_on_frame=not one.color_per_frame))
    return found
