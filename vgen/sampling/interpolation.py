"""Interpolation: the frames between given ones, window by window, for clips of any length.

Axes: `b` videos, `c` channels, `t h w` latent frames, rows and columns.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from vgen.io.records import read_json
from vgen.models.denoiser import pack_keyframes
from vgen.sampling.conditions import Conditions
from vgen.sampling.known_frames import (
    KnownFrameLayout,
    KnownFrames,
    encode_clip,
    encode_slots,
    lay_out,
    warn_unlike_training,
)
from vgen.sampling.options import InterpolationOptions
from vgen.sampling.sampler import Generators, Sampler, draw_noise
from vgen.temporal.attention import make_groups, widest_mode
from vgen.temporal.grid import LatentGrid
from vgen.temporal.state import TemporalState

RECENT = 2
"""Number of finished latents just before a window that it is conditioned on, in addition to those from the start."""

DEFAULT_MAX_LATENTS = 21
"""Maximum latents per window for denoisers that do not record their training length; that of Wan 2.1."""


def next_window(
    first: int, num_latents: int, has_known: Callable[[int], bool], limit: int, sink: int
) -> tuple[list[int], range]:
    """Plans which finished latents the next window is conditioned on, and which latents it generates.

    Every window but the last ends with a latent that holds a given frame.

    Args:
        first: The first latent that is not finished, 1 or more.
        num_latents: Number of latents of the whole video.
        has_known: Whether a frame of a latent is given.
        limit: Maximum number of latents that the denoiser was trained with.
        sink: Latents from the start to condition on, if there is room.

    Raises:
        ValueError: Given frames are too far apart.
    """
    for start, recent in ((sink, RECENT), (sink, 1), (0, 1)):
        seen = sorted({*range(min(start, first)), *range(max(0, first - recent), first)})
        room = min(limit - len(seen), num_latents - first)
        ends = [end for end in range(first + 1, first + room + 1) if end == num_latents or has_known(end - 1)]
        if ends:
            return seen, range(first, ends[-1])
    raise ValueError(f"no frame is given in latents {first} to {first + limit - 2}: use a smaller factor")


def max_latents(sampler: Sampler) -> int:
    """Maximum number of latents per window."""
    return sampler.denoiser.config.trained_token_frames or DEFAULT_MAX_LATENTS


def check_factor(factor: int, grid: LatentGrid, limit: int) -> None:
    """Checks that a window can reach from one given frame to the next.

    Args:
        factor: Given frames become every `factor`-th.
        grid: Frame arithmetic of the model.
        limit: Maximum number of latents that the denoiser was trained with.

    Raises:
        ValueError: Given frames would be too far apart, or frame 0 does not fill a token frame.
    """
    lay_out([0], 1 + grid.unit, grid)
    gap = grid.latents_for(1 + factor) - 1
    if gap > limit - 1:
        raise ValueError(
            f"factor must be at most {grid.num_frames(limit) - 1} for this checkpoint, which generates at most "
            f"{limit - 1} latents at once; got {factor}, which puts {gap} latents between given frames"
        )


@dataclass
class InterpolationState:
    """Everything needed to continue an interpolation, except the weights and the noise generator."""

    decoder: TemporalState = field(default_factory=TemporalState)
    num_given: int = 0
    """Number of given frames so far."""
    num_made: int = 0
    """Number of latents generated so far."""
    given: dict[int, Tensor] = field(default_factory=dict)
    """Given frames `(b, 3, h, w)` in [-1, 1] that are still needed, by index in the result."""
    finished: dict[int, Tensor] = field(default_factory=dict)
    """Latents `(b, c, 1, h, w)` that later windows are conditioned on."""

    def copy(self) -> InterpolationState:
        """An independent state that continues the same video."""
        return replace(self, decoder=self.decoder.copy(), given=dict(self.given), finished=dict(self.finished))

    def save(self, folder: Path) -> None:
        """Writes the state into a folder."""
        tensors = {f"given.{index}": frame for index, frame in self.given.items()}
        tensors |= {f"finished.{index}": latent for index, latent in self.finished.items()}
        save_file({name: one.cpu().contiguous() for name, one in tensors.items()}, folder / "tensors.safetensors")
        self.decoder.save(folder / "decoder.safetensors")
        record = {"num_given": self.num_given, "num_made": self.num_made}
        (folder / "interpolation.json").write_text(json.dumps(record, indent=1))

    @classmethod
    def load(cls, folder: Path, device: torch.device) -> InterpolationState:
        """Reads what `save` wrote."""
        parts: dict[str, dict[int, Tensor]] = {"given": {}, "finished": {}}
        for name, tensor in load_file(folder / "tensors.safetensors").items():
            kind, _, index = name.partition(".")
            parts[kind][int(index)] = tensor.clone().to(device)
        decoder = TemporalState.load(folder / "decoder.safetensors").move_to(device)
        counts = read_json(folder / "interpolation.json")
        return cls(decoder=decoder, given=parts["given"], finished=parts["finished"], **counts)


class Interpolator:
    """Generates the frames between given frames, which arrive one after another, in bounded memory.

    Args:
        sampler: The sampler that denoises and decodes.
        options: Resolved options; their frame rate is that of the given frames.
        conditions: Prompt embeddings; keyframes, groups and frame rate are set for each window.
        generator: Source of the noise.
        keep_given: Whether to return given frames unchanged. Otherwise the VAE decodes them together with the others:
            they are no longer exact, but there is no visible jump between them and their neighbors.
        state: State to continue from; `None` starts a new video.
    """

    def __init__(
        self,
        sampler: Sampler,
        options: InterpolationOptions,
        conditions: Conditions,
        generator: Generators,
        *,
        keep_given: bool = True,
        state: InterpolationState | None = None,
    ):
        assert options.frame_rate is not None
        self.sampler, self.options, self.generator, self.keep_given = sampler, options, generator, keep_given
        rate = options.frame_rate * options.factor if sampler.denoiser.takes_frame_rate else None
        self.conditions = replace(conditions, frame_rate=rate)
        self.state = state or InterpolationState()

    def stream(self, clips: Iterable[Tensor]) -> Iterator[Tensor]:
        """Takes given frames, as `take` does, and yields pixels, as `next` does, as soon as they can be generated.

        Raises:
            ValueError: There are fewer than two given frames, or they are too far apart.
        """
        for clip in clips:
            if self.state.num_given == 0:
                warn_unlike_training(self.sampler.vae, clip[:, :, 0], self.sampler.device)
            self.take(clip)
            while (made := self.next()) is not None:
                yield made
        if self.state.num_given < 2:
            raise ValueError(f"interpolation needs at least 2 frames, got {self.state.num_given}")
        while (made := self.next(last=True)) is not None:
            yield made

    def take(self, clip: Tensor) -> None:
        """Takes the next given frames, `(b, 3, f, h, w)` in [-1, 1], on any device."""
        for frame in clip.to(self.sampler.device).unbind(2):
            self.state.given[self.options.factor * self.state.num_given] = frame
            self.state.num_given += 1

    @torch.no_grad()
    def next(self, *, last: bool = False) -> Tensor | None:
        """The next frames, pixels `(b, 3, n, h, w)` in [-1, 1]; `None` if more given frames are needed.

        Args:
            last: Whether there are no more given frames; a result of `None` then means the end.
        """
        grid, state, limit = self.sampler.grid, self.state, max_latents(self.sampler)
        end = self.options.factor * (state.num_given - 1)  # the last given frame
        if state.num_made == 0 and state.given:
            return self._begin(state.given[0])
        num_latents = grid.latents_for(end + 1)
        enough = end + 1 >= grid.num_frames(state.num_made + limit + 1)
        ready = state.num_made < num_latents if last else enough
        return self._make(limit, num_latents, end) if ready else None

    def _begin(self, frame: Tensor) -> Tensor:
        clip = frame.unsqueeze(2)
        self.state.finished[0] = encode_clip(self.sampler.vae, clip)
        decoded = self.sampler.decode(self.state.finished[0], self.state.decoder).float()
        self.state.num_made = 1
        return clip if self.keep_given else decoded

    def _known(self, latent: int) -> range:
        """The given frames of a latent other than the first."""
        frames, factor = self.sampler.grid.frames_of(latent), self.options.factor
        return range(-(-frames.start // factor) * factor, frames.stop, factor)

    def _make(self, limit: int, num_latents: int, end: int) -> Tensor:
        """The pixels of the next window."""
        sampler, state, config = self.sampler, self.state, self.sampler.denoiser.config
        grid, first = sampler.grid, state.num_made
        seen, new = next_window(first, num_latents, lambda latent: bool(self._known(latent)), limit, config.sink)
        leading = torch.cat([state.finished[latent] for latent in seen], dim=2)
        known = KnownFrames(KnownFrameLayout(len(seen), 0, {}), leading, None, {})
        frames = [frame for latent in new for frame in self._known(latent) if frame <= end]
        conditions = self._conditions_of(leading, frames, num_latents, len(seen) + len(new), first - len(seen))
        noise = draw_noise(
            (*leading.shape[:2], len(seen) + len(new), *leading.shape[3:]), self.generator, torch.float32
        )
        steps = self.options.num_inference_steps
        assert steps is not None
        sampler.interrupt = False  # an interrupt between two windows would leave the next one as noise
        latents = sampler.denoise(noise, conditions, steps, self.generator, known=known)
        made = latents[:, :, len(seen) :]
        state.finished |= {latent: made[:, :, index : index + 1] for index, latent in enumerate(new)}
        oldest = new[-1] + 1 - RECENT
        state.finished = {k: one for k, one in state.finished.items() if k < config.sink or k >= oldest}
        begin = grid.frames_of(first).start
        pixels = sampler.decode(made, state.decoder).float()[:, :, : end + 1 - begin].clone()
        for frame in frames if self.keep_given else ():
            pixels[:, :, frame - begin] = state.given[frame].to(pixels)
        state.num_made = new[-1] + 1
        state.given = {frame: one for frame, one in state.given.items() if frame >= grid.frames_of(new[-1]).stop}
        return pixels

    def _conditions_of(
        self, leading: Tensor, frames: list[int], num_latents: int, count: int, offset: int
    ) -> Conditions:
        """Conditions of a window of `count` latents; latent k of the video is at index `k - offset`."""
        sampler, config, grid = self.sampler, self.sampler.denoiser.config, self.sampler.grid
        slots = lay_out(frames, grid.num_frames(num_latents + 1), grid).slots
        places = {(latent - offset, slot): self.state.given[frame] for frame, (latent, slot) in slots.items()}
        images = encode_slots(sampler.vae, places, config.still_keyframes) if places else {}
        mode = widest_mode(config.group_modes)
        groups: Any = make_groups(mode, count, leading.shape[2], config.chunk_size)
        keyframes = pack_keyframes(images, count, grid.compression, leading[:, :, 0]).to(sampler.denoiser.dtype)
        return replace(self.conditions, keyframes=keyframes, groups=groups)
