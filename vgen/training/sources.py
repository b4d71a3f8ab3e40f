"""Where training clips come from: ShapesWorld, drawn on the training device, or videos, decoded on the CPU.

A source works in two halves. `batch` runs on the CPU, in a worker of the feed, and says what the clips are; `clips`
runs on the training device and makes pixels of it.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from vgen.data.augment import Augmentation
from vgen.data.clips import Clip, Sampling, VideoFolder, draw_frame_rates, frames_to_pixels, stack_frames
from vgen.data.shapes import ShapesWorld, Split, render
from vgen.data.sources import VideoStream, open_clips
from vgen.training.feed import to_device
from vgen.training.run import RunConfig


class ClipSource(ABC):
    """Clips by number."""

    digest: str | None = None
    """Of what the clips are made from; `None` where the settings say all."""
    is_stream = False
    """Whether videos come one after another, so that numbers mean nothing."""

    @property
    def max_workers(self) -> int | None:
        """Most workers that can share its reading; `None` for any number."""
        return None

    @abstractmethod
    def batch(self, indices: range, num_frames: int, start: float = 0.0) -> dict[str, Any]:
        """What the clips of these numbers are, on the CPU.

        Args:
            indices: Of the clips.
            num_frames: Of each.
            start: Seconds after its scene's beginning that a clip of ShapesWorld begins.
        """

    @abstractmethod
    def clips(self, batch: Mapping[str, Any], device: torch.device) -> tuple[Tensor, Tensor]:
        """Pixels `(b, 3, f, h, w)` in [-1, 1] of a batch, and 1 for each real frame, `(b, f)`."""

    @abstractmethod
    def name(self, indices: range, num_frames: int) -> str:
        """Names what these numbers are."""

    def draw(self, indices: range, device: torch.device, num_frames: int, start: float = 0.0) -> tuple[Tensor, Tensor]:
        """Both halves at once."""
        return self.clips(to_device(self.batch(indices, num_frames, start), device), device)


class ShapesSource(ClipSource):
    """ShapesWorld, endless.

    Args:
        split: Of the world.
        height: Pixels.
        width: Pixels.
        frame_rates: Frames per second; each clip has one of them. Empty takes 8.
        seed: Of the world.
        rate_seed: Of the choice of frame rates; `None` takes `seed`.
    """

    def __init__(
        self,
        split: Split,
        height: int,
        width: int,
        frame_rates: Sequence[float] = (),
        seed: int = 0,
        rate_seed: int | None = None,
    ):
        self.world = ShapesWorld(split=split, seed=seed)
        self.frame_rates = list(frame_rates) or [8.0]
        self.rate_seed = seed if rate_seed is None else rate_seed
        self.height, self.width = height, width

    def batch(self, indices: range, num_frames: int, start: float = 0.0) -> dict[str, Any]:
        """Scenes, not yet drawn."""
        rates = torch.tensor(draw_frame_rates(self.frame_rates, self.rate_seed, indices))
        scenes = [self.world.scene(index) for index in indices]
        return {"scenes": scenes, "frame_rate": rates, "num_frames": num_frames, "start": start}

    def clips(self, batch: Mapping[str, Any], device: torch.device) -> tuple[Tensor, Tensor]:
        """The drawn scenes."""
        clip = render(**batch, height=self.height, width=self.width, device=device)
        return clip, torch.ones(len(clip), batch["num_frames"], device=device)

    def name(self, indices: range, num_frames: int) -> str:
        """Names the scenes."""
        return f"scenes {indices.start} to {indices.stop - 1} of ShapesWorld(seed={self.world.seed})"


class VideoSource(ClipSource):
    """Real videos, again and again.

    Args:
        data: As `vgen.data.sources.open_clips` takes it.
        samplings: Which frames make clips, one for each number of frames that is asked for; their frame rates do not
            count.
        height: Pixels.
        width: Pixels.
        frame_rates: Frames per second; each clip has one of them. Empty takes the videos' own.
        seed: Of random choices.
        rate_seed: Of the choice of frame rates; `None` takes `seed`.
        augmentation: What else may change in a clip.
    """

    def __init__(
        self,
        data: str,
        samplings: Sequence[Sampling],
        height: int,
        width: int,
        frame_rates: Sequence[float | None] = (),
        seed: int = 0,
        rate_seed: int | None = None,
        augmentation: Augmentation | None = None,
    ):
        self.frame_rates: list[float | None] = list(frame_rates) or [None]
        self.rate_seed = seed if rate_seed is None else rate_seed
        self.opened: dict[tuple[int, float | None], Any] = {}
        """By number of frames and frame rate."""
        for rate in dict.fromkeys(self.frame_rates):
            for sampling in samplings:
                clips = open_clips(data, replace(sampling, frame_rate=rate), height, width, seed, augmentation)
                self.opened[sampling.num_frames, rate] = clips
        self.streams = [clips for clips in self.opened.values() if isinstance(clips, VideoStream)]
        self.is_stream = bool(self.streams)
        # the lists of videos, one for each frame rate of the longest clips
        longest = max(sampling.num_frames for sampling in samplings)
        folders = [clips for (num_frames, _), clips in self.opened.items() if num_frames == longest]
        self.digest = " ".join(clips.digest for clips in folders if isinstance(clips, VideoFolder)) or None

    @property
    def max_workers(self) -> int | None:
        """As many as a stream has shards."""
        return min((stream.max_workers for stream in self.streams), default=None)

    def batch(self, indices: range, num_frames: int, start: float = 0.0) -> dict[str, Any]:
        """Decoded frames."""
        frames, real = stack_frames(self._samples(indices, num_frames))
        return {"frames": frames, "real": real}

    def clips(self, batch: Mapping[str, Any], device: torch.device) -> tuple[Tensor, Tensor]:
        """Pixels of decoded frames."""
        return frames_to_pixels(batch["frames"].to(device)), batch["real"].to(device).float()

    def name(self, indices: range, num_frames: int) -> str:
        """Names the files that these numbers are cut from."""
        if self.is_stream:
            return "videos of a stream, which are not numbered"
        return ", ".join(f"{one.source.path} at {one.first:.2f} s" for one in self._samples(indices, num_frames))

    def _samples(self, indices: range, num_frames: int) -> list[Clip]:
        rates = draw_frame_rates(self.frame_rates, self.rate_seed, indices)
        return [self.opened[num_frames, rate].sample(index) for index, rate in zip(indices, rates, strict=True)]


@dataclass(kw_only=True)
class ClipConfig(RunConfig):
    """Settings of training on clips and, between them, on single images."""

    data: str | None = None
    """A folder of videos or another source, as `vgen.data.sources.open_clips` takes it; `None` draws ShapesWorld."""
    augment: dict[str, Any] = field(default_factory=dict)
    """Settings of `vgen.data.augment.Augmentation`, for training videos."""
    short: str = "skip"
    """What becomes of videos with too few frames: `skip`, or `pad`, where repeated frames carry no loss."""
    sampling: str = "random"
    """Which frames of a video make a clip: a `kind` of `vgen.data.clips.Sampling`."""
    stride: int = 1
    """From one frame of a `random` or `sliding` clip to the next, at `frame_rates`."""
    frame_rates: list[float] = field(default_factory=list)
    """Frames per second; each clip has one of them, drawn evenly. Videos are resampled to it. With none, videos keep
    their own and ShapesWorld's clips have 8. What is to be shown at lower rates, too, must be learned at them."""
    height: int = 64
    """Pixels."""
    width: int = 64
    """Pixels."""
    num_frames: int = 17
    """Frames a clip."""
    image_steps: int = 0
    """The first steps, which train on single frames."""
    image_share: float = 0.0
    """Share of the later steps that train on single frames, too, between those on clips."""
    image_batch_size: int = 32
    """Samples a step while training on single frames."""
    latest_moment: float = 0.0
    """In every second step ShapesWorld's clips begin at a random moment up to this one, in seconds: long after
    a scene's start shapes cross the frame's border, which they do not before."""

    def check(self) -> None:
        """Refuses what cannot work.

        Raises:
            ValueError: A setting is out of range.
        """
        super().check()
        Augmentation(**self.augment)
        if not 0 <= self.image_share < 1:
            raise ValueError(f"image_share={self.image_share} must lie in [0, 1)")
        if any(rate <= 0 for rate in self.frame_rates):
            raise ValueError(f"frame_rates={self.frame_rates} must all be positive")
        if self.augment and not self.data:
            raise ValueError("augment is for videos of --data, ShapesWorld is endless")
        if self.latest_moment < 0:
            raise ValueError(f"latest_moment={self.latest_moment} must not be negative")
        if self.latest_moment and self.data:
            raise ValueError("latest_moment is for ShapesWorld, clips of --data begin as sampling says")


def open_source(config: ClipConfig) -> ClipSource:
    """What the settings train on."""
    size = (config.height, config.width, config.frame_rates, config.seed)
    if config.data is None:
        return ShapesSource("train", *size)
    return VideoSource(config.data, samplings_of(config), *size, augmentation=Augmentation(**config.augment))


def open_fresh_source(config: ClipConfig, data: str | None = None) -> ClipSource:
    """What scores are taken on: other scenes at 8 frames per second, or other clips of videos, as they are."""
    seed = config.seed + 1
    if config.data is None:
        return ShapesSource("all", config.height, config.width, seed=seed)
    size = (config.height, config.width, config.frame_rates, seed)
    return VideoSource(data or config.data, samplings_of(config), *size, rate_seed=config.seed)


def samplings_of(config: ClipConfig) -> list[Sampling]:
    """Of clips, and of single images if there are any."""
    clips = Sampling(
        kind=config.sampling, stride=config.stride, num_frames=config.num_frames, short=config.short
    )  # at any of the frame rates
    wants_images = config.image_steps or config.image_share
    return [clips, Sampling(num_frames=1, short=config.short)] if wants_images else [clips]


def batch_of(config: ClipConfig, step: int) -> tuple[range, int]:
    """The numbers of a step's samples, of which none comes twice among those of as many frames, and their frames."""
    images = min(step, config.image_steps)
    rng = random.Random(config.seed * 1_000_003 + step + 0.5)
    if step < config.image_steps or rng.random() < config.image_share:
        return range(step * config.image_batch_size, (step + 1) * config.image_batch_size), 1
    first = images * config.image_batch_size + (step - images) * config.batch_size
    return range(first, first + config.batch_size), config.num_frames


def start_time(config: ClipConfig, step: int, images: bool) -> float:
    """When a step's samples begin, in seconds after the start of their scenes."""
    rng = random.Random(config.seed * 1_000_003 + step)
    if images:
        return rng.uniform(0, 4)
    return rng.uniform(0, config.latest_moment) if step % 2 else 0.0


class ClipPlan(NamedTuple):
    """Which clips a step trains on."""

    indices: range
    """Their numbers."""
    num_frames: int
    """Frames of each; 1 for single images."""
    start: float = 0.0
    """Seconds after its scene's beginning that a clip of ShapesWorld begins."""


def plan_clips(config: ClipConfig, step: int) -> ClipPlan:
    """A step's clips or images, with the settings' mixture of them."""
    indices, num_frames = batch_of(config, step)
    return ClipPlan(indices, num_frames, start_time(config, step, num_frames == 1))


def consecutive_clips(batch_size: int, num_frames: int, step: int) -> ClipPlan:
    """A step's clips where all steps are alike."""
    return ClipPlan(range(step * batch_size, (step + 1) * batch_size), num_frames)


class ClipBatches(Dataset):
    """Training batches of clips, by step and part of the batch, as `ClipSource.batch` gives them.

    Args:
        source: Of the clips.
        plan: Which clips a step trains on.
    """

    def __init__(self, source: ClipSource, plan: Callable[[int], ClipPlan]):
        self.source, self.plan = source, plan

    @property
    def max_workers(self) -> int | None:
        """See `ClipSource`."""
        return self.source.max_workers

    def size(self, step: int) -> int:
        """Samples of a step."""
        return len(self.plan(step).indices)

    def __getitem__(self, key: tuple[int, slice]) -> dict[str, Any]:
        """What the clips of a part of a step's batch are."""
        step, part = key
        indices, num_frames, start = self.plan(step)
        return self.source.batch(indices[part], num_frames, start)

    def name(self, step: int) -> str:
        """Names a step's clips."""
        indices, num_frames, _ = self.plan(step)
        return self.source.name(indices, num_frames)


def masked_mean(error: Tensor, real: Tensor) -> Tensor:
    """The mean over clips of the mean over each one's real frames, of errors `(b, c, f, h, w)`."""
    frames = error.mean(dim=(1, 3, 4))
    return ((frames * real).sum(1) / real.sum(1)).mean()
