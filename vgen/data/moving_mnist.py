"""Moving MNIST: handwritten digits that bounce in a frame, and the usual task of predicting them."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np

from vgen.data.clips import Clip, Listed

NUM_GIVEN = 10
"""Frames that are given in the usual protocol; as many are to be predicted."""
SIZE = 64
"""Pixels of a side."""


class MovingMNIST:
    """Endless clips of bouncing digits, each a function of the seed and its number alone.

    Args:
        digits: uint8 `(n, 28, 28)`, as `read_digits` and `digits_from_hub` give them.
        num_frames: Of a clip.
        num_digits: That bounce at once; they add up where they meet, as in the published test set.
        stochastic: Whether a digit leaves a wall in a direction and at a speed of their own, drawn anew; else it is
            reflected.
        seed: Of the world.

    Source: Unsupervised learning of video representations using LSTMs, arXiv 1502.04681 (a tenth of the free way a
        frame, at any angle); Stochastic video generation with a learned prior, arXiv 1802.07687 (whole pixels, at most
        4 a frame in each direction).
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
            raise ValueError(f"digits must be uint8 (n, 28, 28), not {digits.dtype} {digits.shape}")
        if min(num_frames, num_digits) < 1:
            raise ValueError(f"num_frames={num_frames} and num_digits={num_digits} must be at least 1")
        self.digits, self.num_frames, self.num_digits = digits, num_frames, num_digits
        self.stochastic, self.seed = stochastic, seed

    def frames(self, index: int) -> np.ndarray:
        """A clip, uint8 `(f, 64, 64)`."""
        rng = np.random.default_rng((self.seed, index))
        clip = np.zeros((self.num_frames, SIZE, SIZE), dtype=np.uint16)
        for digit in self.digits[rng.integers(len(self.digits), size=self.num_digits)]:
            height, width = digit.shape
            room = np.array([SIZE - height, SIZE - width])
            way = self._random_way(room, rng) if self.stochastic else self._reflected_way(room, rng)
            for frame, (top, left) in zip(clip, way, strict=True):
                frame[top : top + height, left : left + width] += digit
        return clip.clip(0, 255).astype(np.uint8)

    def protocol(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """The frames that are given and those to predict, uint8 `(10, 64, 64)` each with the default length."""
        frames = self.frames(index)
        return frames[:NUM_GIVEN], frames[NUM_GIVEN:]

    def sample(self, number: int) -> Clip:
        """A clip in the form that a `VideoFolder` gives."""
        frames = np.repeat(self.frames(number)[..., None], 3, axis=-1)
        listed = Listed(path=Path(f"moving-mnist-{number}"))
        return Clip(frames, np.ones(len(frames), dtype=bool), listed.captions, 8.0, listed, 0.0)

    def _reflected_way(self, room: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Places of the upper left corner: a tenth of the room a frame along a line that the walls reflect."""
        angle = rng.uniform(0, 2 * np.pi)
        times = np.arange(self.num_frames)[:, None]
        line = rng.uniform(size=2) + 0.1 * np.array([np.sin(angle), np.cos(angle)]) * times
        folded = np.abs((line + 1) % 2 - 1)  # a triangle wave: 0 at 0, 1 at 1, 0 again at 2
        return (folded * room).astype(int)

    def _random_way(self, room: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Places of the upper left corner: whole pixels; a wall gives a new speed, away from it."""
        place, speed = rng.integers(0, room + 1), rng.integers(-4, 5, size=2)
        way = []
        for _ in range(self.num_frames):
            way.append(place.copy())
            place = place + speed
            for axis, (low, high) in enumerate(zip(place < 0, place > room, strict=True)):
                if low or high:
                    place[axis] = 0 if low else room[axis]
                    speed = rng.integers(-4, 5, size=2)
                    speed[axis] = rng.integers(1, 5) * (1 if low else -1)
        return np.array(way)


def read_digits(path: Path) -> np.ndarray:
    """Digits of an IDX file, as MNIST's are, plain or in gzip: uint8 `(n, 28, 28)`.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It holds no images.
        ImportError: Idx2numpy is not installed.
    """
    try:
        import idx2numpy
    except ImportError as error:
        raise ImportError("IDX files need idx2numpy: pip install vgen[data]") from error
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            digits = idx2numpy.convert_from_file(file)
    except (idx2numpy.FormatError, OSError, EOFError) as error:
        raise ValueError(f"{path} is no IDX file: {error}") from error
    if digits.ndim != 3:
        raise ValueError(f"{path} holds an array of shape {digits.shape}, no images: labels perhaps?")
    return digits


def digits_from_hub(repo: str = "ylecun/mnist", split: str = "test") -> np.ndarray:
    """Digits of a Hugging Face dataset with a column `image`: uint8 `(n, 28, 28)`.

    Raises:
        ImportError: Datasets is not installed.
    """
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ImportError("datasets of the Hub need datasets: pip install vgen[data]") from error
    return np.stack([np.asarray(image.convert("L")) for image in load_dataset(repo, split=split)["image"]])
