"""Moving MNIST: handwritten digits that bounce in a frame, and the common protocol for predicting them."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np

from vgen.checks import check_integer
from vgen.data.clips import Clip, Listed

NUM_GIVEN = 10
"""Given frames in the common protocol, which predicts the same number."""
SIZE = 64
"""Height and width of a frame in pixels."""


class MovingMNIST:
    """An endless set of clips of bouncing digits. Each clip depends only on the seed and its number.

    Args:
        digits: Digits, uint8 `(n, 28, 28)`, from `read_digits` or `digits_from_hub`.
        num_frames: Frames per clip.
        num_digits: Digits per clip. Their pixel values add up where they overlap, as in the published test set.
        stochastic: Whether a digit leaves a wall with a new random velocity; otherwise it is reflected.
        seed: Seed of all clips.

    Raises:
        ValueError: The digits have another shape or type, or a number is less than 1.

    Source: Unsupervised learning of video representations using LSTMs, arXiv 1502.04681 (per frame, a tenth of the
        free range at any angle); Stochastic video generation with a learned prior, arXiv 1802.07687 (whole pixels, at
        most 4 per frame and axis).
    """

    def __init__(
        self,
        digits: np.ndarray,
        num_frames: int = 2 * NUM_GIVEN,
        num_digits: int = 2,
        stochastic: bool = False,
        seed: int = 0,
    ):
        if digits.ndim != 3 or digits.dtype != np.uint8 or max(digits.shape[1:]) >= SIZE or not len(digits):
            raise ValueError(f"digits must be uint8 (n, 28, 28), got {digits.dtype} {digits.shape}")
        check_integer("num_frames", num_frames, 1)
        check_integer("num_digits", num_digits, 1)
        self.digits, self.num_frames, self.num_digits = digits, num_frames, num_digits
        self.stochastic, self.seed = stochastic, seed

    def frames(self, index: int) -> np.ndarray:
        """Renders a clip, uint8 `(f, 64, 64)`."""
        rng = np.random.default_rng((self.seed, index))
        clip = np.zeros((self.num_frames, SIZE, SIZE), dtype=np.uint16)
        for digit in self.digits[rng.integers(len(self.digits), size=self.num_digits)]:
            height, width = digit.shape
            room = np.array([SIZE - height, SIZE - width])
            path = self._random_path(room, rng) if self.stochastic else self._reflected_path(room, rng)
            for frame, (top, left) in zip(clip, path, strict=True):
                frame[top : top + height, left : left + width] += digit
        return clip.clip(0, 255).astype(np.uint8)

    def protocol(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Splits a clip into given frames, uint8 `(10, 64, 64)`, and frames to predict, `(f - 10, 64, 64)`."""
        frames = self.frames(index)
        return frames[:NUM_GIVEN], frames[NUM_GIVEN:]

    def sample(self, number: int) -> Clip:
        """Renders a clip in the format of a `VideoFolder`."""
        frames = np.repeat(self.frames(number)[..., None], 3, axis=-1)
        listed = Listed(path=Path(f"moving-mnist-{number}"))
        return Clip(frames, np.ones(len(frames), dtype=bool), listed.captions, 8.0, listed, 0.0)

    def _reflected_path(self, room: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Positions `(f, 2)` of the upper left corner, reflected by the walls; a tenth of the free range per frame."""
        angle = rng.uniform(0, 2 * np.pi)
        times = np.arange(self.num_frames)[:, None]
        line = rng.uniform(size=2) + 0.1 * np.array([np.sin(angle), np.cos(angle)]) * times
        folded = np.abs((line + 1) % 2 - 1)  # a triangle wave: 0 at 0, 1 at 1, 0 again at 2
        return (folded * room).astype(int)

    def _random_path(self, room: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Positions `(f, 2)` of the upper left corner in whole pixels; a wall gives a new speed, away from it."""
        position, speed = rng.integers(0, room + 1), rng.integers(-4, 5, size=2)
        path = []
        for _ in range(self.num_frames):
            path.append(position.copy())
            position = position + speed
            for axis, (low, high) in enumerate(zip(position < 0, position > room, strict=True)):
                if low or high:
                    position[axis] = 0 if low else room[axis]
                    speed = rng.integers(-4, 5, size=2)
                    speed[axis] = rng.integers(1, 5) * (1 if low else -1)
        return np.array(path)


def read_digits(path: Path) -> np.ndarray:
    """Reads digits, uint8 `(n, 28, 28)`, from an IDX file such as those of MNIST, plain or compressed with gzip.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: The file is not in IDX format, or contains no images.
        ImportError: The package idx2numpy is not installed.
    """
    try:
        import idx2numpy
    except ImportError as error:
        raise ImportError("IDX files need idx2numpy: pip install vgen[data]") from error
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            digits = idx2numpy.convert_from_file(file)
    except (
        idx2numpy.FormatError,
        OSError,
        EOFError,
        MemoryError,
        OverflowError,
    ) as error:  # its header may declare any size
        raise ValueError(f"{path} is not an IDX file: {error!r}") from error
    if digits.ndim != 3:
        raise ValueError(f"{path} must contain images (n, h, w), got shape {digits.shape}; is it a file of labels?")
    return digits


def digits_from_hub(repo: str = "ylecun/mnist", split: str = "test") -> np.ndarray:
    """Loads digits, uint8 `(n, 28, 28)`, from the column `image` of a Hugging Face dataset.

    Raises:
        ImportError: The package datasets is not installed.
    """
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ImportError("Hub datasets need the package datasets: pip install vgen[data]") from error
    return np.stack([np.asarray(image.convert("L")) for image in load_dataset(repo, split=split)["image"]])
