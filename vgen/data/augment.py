"""Augmentation of clips. Geometric changes are the same for every frame; color changes may differ."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from einops import rearrange

from vgen.checks import check_number


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """Random changes of clips. By default nothing changes.

    Captions are not changed, so flips and rotations suit only clips whose captions name no directions, and reversal
    only those that name no motion: a reversed clip of "moves right" moves left.

    Raises:
        ValueError: A setting is out of range.
    """

    crop: float = 1.0
    """Smallest fraction of the area that a random crop keeps. The crop is resized to the size of the clip."""
    flip: float = 0.0
    """Probability of a horizontal flip."""
    reverse: float = 0.0
    """Probability that a clip runs backwards."""
    position: float = 0.0
    """Largest shift of the crop to the aspect ratio of clips, as a fraction of the way from the center to the border:
    with 1, every part of a wide video is shown; with 0, only its center."""
    rotate: float = 0.0
    """Largest rotation in degrees. Pixels from outside the frame are reflected."""
    brightness: float = 0.0
    """Largest relative change of brightness, at most 1."""
    contrast: float = 0.0
    """Largest relative change of contrast, at most 1."""
    saturation: float = 0.0
    """Largest relative change of saturation, at most 1."""
    hue: float = 0.0
    """Largest change of hue, as a fraction of the color circle, at most 0.5."""
    color_per_frame: bool = False
    """Whether colors change independently in each frame, as under flickering light."""

    def __post_init__(self) -> None:
        """Checks the settings."""
        for name in ("crop", "flip", "reverse", "position", "brightness", "contrast", "saturation"):
            check_number(name, getattr(self, name), 0, 1)
        check_number("rotate", self.rotate, 0, 180)
        check_number("hue", self.hue, 0, 0.5)
        if self.crop == 0:
            raise ValueError("crop must be greater than 0, got 0")


def draw_offset(augmentation: Augmentation, seed: int) -> tuple[float, float]:
    """Draws the position of the crop of a clip, as `vgen.data.resize.Fit` takes it.

    Args:
        augmentation: The changes to draw from.
        seed: Seed of the position.
    """
    shift = augmentation.position / 2
    rng = random.Random(f"position {seed}")
    return 0.5 + rng.uniform(-shift, shift), 0.5 + rng.uniform(-shift, shift)


def augment(clip: np.ndarray, augmentation: Augmentation, seed: int, num_real: int | None = None) -> np.ndarray:
    """Augments a clip at random: reverses it, and changes geometry and colors with kornia.

    Args:
        clip: uint8 `(f, h, w, 3)`.
        augmentation: The changes to draw from.
        seed: Seed of the changes. Equal seeds change equal clips equally.
        num_real: Number of frames before the copies of the last one that pad the clip; `None` if nothing pads it.

    Returns:
        The changed clip, uint8 of the same shape. Padding is still at its end.

    Raises:
        ImportError: Kornia is not installed, and more is to change than the order of frames.
    """
    if random.Random(f"reverse {seed}").random() < augmentation.reverse:
        num_real = len(clip) if num_real is None else num_real
        clip = clip[[max(0, num_real - 1 - index) for index in range(len(clip))]]
    steps = _make_steps(replace(augmentation, reverse=0.0, position=0.0), clip.shape[1:3])
    if not steps:
        return clip
    pixels = rearrange(torch.from_numpy(clip), "f h w c -> 1 f c h w").float() / 255
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for step in steps:
            pixels = step(pixels)
    pixels = rearrange(pixels.clamp(0, 1).mul(255).round().byte(), "1 f c h w -> f h w c")
    return pixels.numpy()


@lru_cache(maxsize=8)
def _make_steps(augmentation: Augmentation, size: tuple[int, int]) -> list[Any]:
    """Builds the modules of kornia that change a clip, in order."""
    if augmentation == Augmentation():
        return []
    try:
        import kornia.augmentation as K
    except ImportError as error:
        raise ImportError("augmentation needs kornia: pip install vgen[data]") from error
    geometry: list[Any] = []
    color: list[Any] = []
    if augmentation.rotate:
        geometry.append(K.RandomAffine(augmentation.rotate, padding_mode="reflection", p=1.0))
    if augmentation.crop < 1:
        geometry.append(K.RandomResizedCrop(size, scale=(augmentation.crop, 1.0), cropping_mode="resample"))
    if augmentation.flip:
        geometry.append(K.RandomHorizontalFlip(p=augmentation.flip))
    jitter = (augmentation.brightness, augmentation.contrast, augmentation.saturation, augmentation.hue)
    if max(jitter) > 0:
        color.append(K.ColorJitter(*jitter, p=1.0))
    steps = []
    if geometry:
        steps.append(K.VideoSequential(*geometry, same_on_frame=True))
    if color:
        steps.append(K.VideoSequential(*color, same_on_frame=not augmentation.color_per_frame))
    return steps
