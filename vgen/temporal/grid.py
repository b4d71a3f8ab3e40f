"""How pixel frames, latent frames and token frames of one model correspond, and how token frames are counted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vgen.checks import check_integer

Positions = Literal["relative", "absolute"]
"""What the time positions of token frames in a KV cache are counted from; see `TemporalState`."""


@dataclass(frozen=True)
class LatentGrid:
    """Pixel frames `f`, latent frames `t` and token frames `n` of a video: `f = 1 + s * (t - 1)` and `n = t / p_t`.

    Latent 0 holds pixel frame 0 alone; latent k >= 1 holds frames `s * (k - 1) + 1 .. s * k`.
    """

    compression: int = 4
    """`s`, pixel frames per latent after the first; 1 without a VAE and for a 2D one."""
    patch_frames: int = 1
    """`p_t`, latent frames per token frame."""

    @property
    def unit(self) -> int:
        """Pixel frames of every token frame after the first."""
        return self.compression * self.patch_frames

    @property
    def first(self) -> int:
        """Pixel frames of the first token frame."""
        return self.num_frames(self.patch_frames)

    def num_frames(self, num_latents: int) -> int:
        """Pixel frames of the first latents of a video, at least one."""
        return 1 + self.compression * (num_latents - 1)

    def num_latents(self, num_frames: int) -> int:
        """Latents that the first pixel frames of a video fill completely."""
        return 1 + (num_frames - 1) // self.compression if num_frames > 0 else 0

    def whole_frames(self, num_frames: int, started: bool = False) -> int:
        """How many of the next pixel frames of a video fill whole latents.

        Args:
            num_frames: Number of frames at hand.
            started: Whether whole latents precede them; otherwise they begin with frame 0.
        """
        if started:
            return num_frames // self.compression * self.compression
        return self.num_frames(self.num_latents(num_frames)) if num_frames > 0 else 0

    def latents_for(self, num_frames: int) -> int:
        """Number of latents that contain the first `num_frames` pixel frames of a video."""
        return 1 + -(-(num_frames - 1) // self.compression)

    def frames_of(self, latent: int) -> range:
        """Pixel frames of a latent."""
        return range(self.compression * (latent - 1) + 1, self.compression * latent + 1) if latent else range(1)

    def slot(self, frame: int) -> tuple[int, int]:
        """The latent that contains a pixel frame other than frame 0, and the index of the frame within the latent."""
        return 1 + (frame - 1) // self.compression, (frame - 1) % self.compression

    def is_valid(self, num_frames: int) -> bool:
        """Whether pixel frames fill whole token frames."""
        return num_frames >= self.first and (num_frames - self.first) % self.unit == 0

    def nearest(self, num_frames: int) -> int:
        """The nearest valid number of pixel frames; the smaller one if two are equally near."""
        below = max(self.first, self.first + (num_frames - self.first) // self.unit * self.unit)
        return below if num_frames <= below + self.unit / 2 else below + self.unit

    def check(self, num_frames: int, name: str = "num_frames") -> None:
        """Checks that a video can have this number of pixel frames.

        Raises:
            ValueError: It is not an integer or does not fill whole token frames. The error names the nearest number.
        """
        check_integer(name, num_frames)
        if not self.is_valid(num_frames):
            raise ValueError(
                f"{name} must be {self.unit}*k + {self.first}, got {num_frames} (nearest: {self.nearest(num_frames)})"
            )
