"""Interpolation: the frames between given ones, window by window, for clips of any length.

Axes: `b` videos, `c` channels, `t h w` latent frames, rows and columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vgen.known_frames import KnownFrames, Placement, encode_clip, encode_slots, place
from vgen.models.denoiser import pack_keyframes
from vgen.rollout import draw_noise
from vgen.temporal.attention import make_groups
from vgen.temporal.state import TemporalState

if TYPE_CHECKING:
    from vgen.pipeline import VideoGenPipeline

RECENT = 2
"""Finished latents just before a window that it sees, beside those from the start, where there is room."""

UNTOLD_LIMIT = 21
"""Latents at once, seen and made, where a denoiser does not say what it was trained with; that of Wan 2.1."""


def next_window(
    first: int, num_latents: int, has_known: Callable[[int], bool], limit: int, sink: int
) -> tuple[list[int], range]:
    """Plans which finished latents the next window sees, and which it makes.

    Every window but the last ends with a latent in which a frame is given, so that it knows where it is going.

    Args:
        first: The first latent that is not finished, 1 or more.
        num_latents: Of the whole video.
        has_known: Whether a frame of a latent is given.
        limit: Latents that the denoiser was trained with at once.
        sink: Latents from the start to see, where there is room.

    Raises:
        ValueError: Given frames are too far apart.
    """
    for start, recent in ((sink, RECENT), (sink, 1), (0, 1)):
        seen = sorted({*range(min(start, first)), *range(max(0, first - recent), first)})
        room = min(limit - len(seen), num_latents - first)
        ends = [end for end in range(first + 1, first + room + 1) if end == num_latents or has_known(end - 1)]
        if ends:
            return seen, range(first, ends[-1])
    raise ValueError(f"latents {first} to {first + limit - 2} hold no given frame: give a smaller factor")


def check_factor(factor: int, compression: int, patch_frames: int, limit: int) -> None:
    """Refuses what no window can hold.

    Args:
        factor: Given frames become every `factor`-th.
        compression: `s`, pixel frames a latent.
        patch_frames: Latents a token frame.
        limit: Latents that the denoiser was trained with at once.

    Raises:
        ValueError: Given frames would be too far apart, or frame 0 has no place.
    """
    if not isinstance(factor, int) or factor < 2:
        raise ValueError(f"factor={factor} is not possible: give a whole number from 2 on")
    place([0], 1 + compression * patch_frames, compression, patch_frames)
    gap = -(-factor // compression)
    if gap > limit - 1:
        raise ValueError(
            f"between frames {factor} apart lie {gap} latents, and this denoiser makes at most {limit - 1} at once: "
            f"give a smaller factor, up to {compression * (limit - 1)}"
        )


class Interpolator:
    """Makes the frames between given ones that come one after another, in memory that does not grow.

    Args:
        pipe: Denoises and decodes.
        factor: Given frames become every `factor`-th.
        embeds: Prompts, and what to steer away from.
        guidance_scale: Weight of classifier-free guidance.
        frame_rate: Of the result, in frames per second.
        num_inference_steps: Denoising steps a window.
        generator: Source of the noise.
        keep_given: Whether given frames come back as they are, or else as the VAE decodes them among the others.
    """

    def __init__(
        self,
        pipe: VideoGenPipeline,
        factor: int,
        embeds: tuple[Tensor, Tensor | None],
        *,
        guidance_scale: float,
        frame_rate: float,
        num_inference_steps: int,
        generator: torch.Generator | list[torch.Generator] | None,
        keep_given: bool,
    ):
        self.pipe, self.factor, self.embeds = pipe, factor, embeds
        self.guidance_scale = guidance_scale
        self.frame_rate = frame_rate
        self.num_inference_steps = num_inference_steps
        self.generator = generator
        self.keep_given = keep_given
        self.decoder_state = TemporalState()
        self.num_given = 0
        """Given frames so far."""
        self.num_made = 0
        """Latents made so far."""
        self.given: dict[int, Tensor] = {}
        """Given frames `(b, 3, h, w)` in [-1, 1] that are still needed, by index in the result."""
        self.finished: dict[int, Tensor] = {}
        """Latents `(b, c, 1, h, w)` that later windows see."""

    def stream(self, clips: Iterable[Tensor]) -> Iterator[Tensor]:
        """Takes given frames, as `take`, and yields pixels, as `next`, as soon as it can and to the end.

        Raises:
            ValueError: There are fewer than two given frames, or they are too far apart.
        """
        for clip in clips:
            self.take(clip)
            while (piece := self.next()) is not None:
                yield piece
        if self.num_given < 2:
            raise ValueError(f"interpolation needs at least 2 frames, got {self.num_given}")
        while (piece := self.next(last=True)) is not None:
            yield piece

    def take(self, clip: Tensor) -> None:
        """Takes the next given frames, `(b, 3, f, h, w)` in [-1, 1], where the denoiser computes."""
        for frame in clip.unbind(2):
            self.given[self.factor * self.num_given] = frame
            self.num_given += 1

    @torch.no_grad()
    def next(self, *, last: bool = False) -> Tensor | None:
        """The next frames, pixels `(b, 3, n, h, w)` in [-1, 1]; `None` if more given frames are needed.

        Args:
            last: Whether there are no more given frames; `None` is the end then.
        """
        s = self.pipe.vae_scale_factor_temporal
        end = self.factor * (self.num_given - 1)  # the last given frame
        limit = self.pipe.denoiser.config.trained_token_frames or UNTOLD_LIMIT
        if self.num_made == 0 and self.given:
            return self._begin(self.given[0])
        num_latents = 1 + -(-end // s)
        ready = self.num_made < num_latents if last else end >= s * (self.num_made + limit)
        return self._make(limit, num_latents, end) if ready else None

    def _begin(self, frame: Tensor) -> Tensor:
        clip = frame.unsqueeze(2)
        self.finished[0] = encode_clip(self.pipe.codec, clip)
        decoded = self.pipe.decode_next(self.finished[0], self.decoder_state).float()
        self.num_made = 1
        return clip if self.keep_given else decoded

    def _known(self, latent: int) -> range:
        """Frames of a latent that are given."""
        s = self.pipe.vae_scale_factor_temporal
        return range(-(-(s * (latent - 1) + 1) // self.factor) * self.factor, s * latent + 1, self.factor)

    def _make(self, limit: int, num_latents: int, end: int) -> Tensor:
        """The pixels of the next window."""
        pipe, config = self.pipe, self.pipe.denoiser.config
        s, first = pipe.vae_scale_factor_temporal, self.num_made
        seen, new = next_window(first, num_latents, lambda latent: bool(self._known(latent)), limit, config.sink)
        leading = torch.cat([self.finished[latent] for latent in seen], dim=2)
        known = KnownFrames(Placement(len(seen), 0, {}), leading, None, {})
        count = len(seen) + len(new)
        frames = [frame for latent in new for frame in self._known(latent) if frame <= end]
        slots = place(frames, 1 + s * num_latents, s, pipe.denoiser.patch_size[0]).slots
        places = {(len(seen) + k - first, j): self.given[frame] for frame, (k, j) in slots.items()}
        images = encode_slots(pipe.codec, places) if places else {}
        conditions: dict[str, Any] = {
            "keyframes": pack_keyframes(images, count, s, leading[:, :, 0]).to(pipe.denoiser.dtype),
            "groups": make_groups(
                "full" if "full" in config.group_modes else config.group_modes[0], count, len(seen), config.chunk_size
            ),
            "frame_rate": self.frame_rate if config.frame_rate_embedding else None,
        }
        pipe._guidance_scale, pipe._guider = self.guidance_scale, None
        latents = pipe.denoise(
            draw_noise((*leading.shape[:2], count, *leading.shape[3:]), self.generator, torch.float32),
            self.num_inference_steps, self.embeds, self.generator, known, **conditions,
        )  # fmt: skip
        made = latents[:, :, len(seen) :]
        self.finished |= {latent: made[:, :, index : index + 1] for index, latent in enumerate(new)}
        oldest = new[-1] + 1 - RECENT
        self.finished = {k: one for k, one in self.finished.items() if k < config.sink or k >= oldest}
        begin = 1 + s * (first - 1)
        pixels = pipe.decode_next(made, self.decoder_state).float()[:, :, : end + 1 - begin].clone()
        for frame in frames if self.keep_given else ():
            pixels[:, :, frame - begin] = self.given[frame].to(pixels)
        self.num_made = new[-1] + 1
        self.given = {frame: one for frame, one in self.given.items() if frame > s * new[-1]}
        return pixels
