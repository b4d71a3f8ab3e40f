"""Sources of training clips: ShapesWorld, rendered on the training device, or videos, decoded on the CPU.

A source works in two stages. `batch` runs on the CPU, in a DataLoader worker, and prepares a description of the clips.
`clips` runs on the training device and turns the description into pixels.
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
from vgen.data.clips import (
    Clip,
    Sampling,
    SamplingKind,
    Short,
    VideoFolder,
    draw_frame_rates,
    stack_frames,
)
from vgen.data.shapes import ShapesWorld, Split, render
from vgen.data.sources import VideoStream, open_clips
from vgen.io.pixels import from_frames
from vgen.training.feed import to_device
from vgen.training.run import RunConfig


class ClipSource(ABC):
    """A source of clips, indexed by number."""

    digest: str | None = None
    """Digest of the data; `None` if the clips depend only on the settings."""
    is_stream = False
    """Whether videos are streamed, so that the numbers are ignored."""

    @property
    def max_workers(self) -> int | None:
        """Maximum number of workers that can split the data; `None` for any number."""
        return None

    @abstractmethod
    def batch(self, indices: range, num_frames: int, start: float = 0.0) -> dict[str, Any]:
        """The first stage, on the CPU: what `clips` needs to make the clips of these numbers.

        Args:
            indices: Numbers of the clips.
            num_frames: Frames per clip.
            start: Time in the scene at which clips of ShapesWorld begin, in seconds.
        """

    @abstractmethod
    def clips(self, batch: Mapping[str, Any], device: torch.device) -> tuple[Tensor, Tensor]:
        """The second stage: pixels `(b, 3, f, h, w)` in [-1, 1], and a mask `(b, f)` that is 1 for real frames."""

    @abstractmethod
    def name(self, indices: range, num_frames: int) -> str:
        """Describes the clips of these numbers."""

    def draw(self, indices: range, device: torch.device, num_frames: int, start: float = 0.0) -> tuple[Tensor, Tensor]:
        """Both stages in one call."""
        return self.clips(to_device(self.batch(indices, num_frames, start), device), device)


class ShapesSource(ClipSource):
    """Clips of ShapesWorld, without end.

    Args:
        split: Split of ShapesWorld.
        height: Height in pixels.
        width: Width in pixels.
        frame_rates: Frame rates in frames per second, one of which is drawn for each clip. Empty means 8.
        seed: Seed of ShapesWorld.
        rate_seed: Seed of the choice of frame rates; `None` means `seed`.
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
        """Scenes that are not yet rendered."""
        rates = torch.tensor(draw_frame_rates(self.frame_rates, self.rate_seed, indices))
        scenes = [self.world.scene(index) for index in indices]
        return {"scenes": scenes, "frame_rate": rates, "num_frames": num_frames, "start": start}

    def clips(self, batch: Mapping[str, Any], device: torch.device) -> tuple[Tensor, Tensor]:
        """Renders the scenes."""
        clip = render(**batch, height=self.height, width=self.width, device=device)
        return clip, torch.ones(len(clip), batch["num_frames"], device=device)

    def name(self, indices: range, num_frames: int) -> str:
        """Names the scenes."""
        return f"scenes {indices.start} to {indices.stop - 1} of ShapesWorld(seed={self.world.seed})"


class DecodedSource(ClipSource):
    """A source whose batches have decoded `frames`, and which of them are `real`."""

    def clips(self, batch: Mapping[str, Any], device: torch.device) -> tuple[Tensor, Tensor]:
        """Converts decoded frames to pixels."""
        return from_frames(batch["frames"].to(device)), batch["real"].to(device).float()


class VideoSource(DecodedSource):
    """Clips of real videos, repeated for any number of epochs.

    Args:
        data: Source of the videos; see `vgen.data.sources.open_clips`.
        samplings: Which frames of a video make a clip: one sampling for each number of frames that `batch` is called
            with. Their frame rates are ignored.
        height: Height in pixels.
        width: Width in pixels.
        frame_rates: Frame rates in frames per second, one of which is drawn for each clip. Empty keeps the videos'
            own.
        seed: Seed of random choices.
        rate_seed: Seed of the choice of frame rates; `None` means `seed`.
        augmentation: Random augmentation of clips.
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
        """Clips by number of frames and frame rate."""
        for rate in dict.fromkeys(self.frame_rates):
            for sampling in samplings:
                clips = open_clips(data, replace(sampling, frame_rate=rate), height, width, seed, augmentation)
                self.opened[sampling.num_frames, rate] = clips
        self.streams = [clips for clips in self.opened.values() if isinstance(clips, VideoStream)]
        self.is_stream = bool(self.streams)
        # digests of the folders at all frame rates, for the longest clips
        longest = max(sampling.num_frames for sampling in samplings)
        folders = [clips for (num_frames, _), clips in self.opened.items() if num_frames == longest]
        self.digest = " ".join(clips.digest for clips in folders if isinstance(clips, VideoFolder)) or None

    @property
    def max_workers(self) -> int | None:
        """The number of shards of a stream, and `None` for folders."""
        return min((stream.max_workers for stream in self.streams), default=None)

    def batch(self, indices: range, num_frames: int, start: float = 0.0) -> dict[str, Any]:
        """Decoded frames."""
        frames, real = stack_frames(self._samples(indices, num_frames))
        return {"frames": frames, "real": real}

    def name(self, indices: range, num_frames: int) -> str:
        """Describes the files that the clips are taken from."""
        if self.is_stream:
            return "videos of a stream, which are not numbered"
        return ", ".join(f"{one.source.path} at {one.first:.2f} s" for one in self._samples(indices, num_frames))

    def _samples(self, indices: range, num_frames: int) -> list[Clip]:
        rates = draw_frame_rates(self.frame_rates, self.rate_seed, indices)
        return [self.opened[num_frames, rate].sample(index) for index, rate in zip(indices, rates, strict=True)]


@dataclass(kw_only=True)
class ClipConfig(RunConfig):
    """Settings of training on clips and on single images."""

    data: str | None = None
    """A folder of videos or another source of `vgen.data.sources.open_clips`; `None` generates ShapesWorld."""
    augment: dict[str, Any] = field(default_factory=dict)
    """Settings of `vgen.data.augment.Augmentation`, for training videos."""
    short: Short = "skip"
    """How to treat videos with too few frames: `skip` them, or `pad` them with copies of the last frame, which are
    excluded from the loss."""
    sampling: SamplingKind = "random"
    """Which frames of a video make a clip: a `kind` of `vgen.data.clips.Sampling`."""
    stride: int = 1
    """Step between the frames of a `random` or `sliding` clip, counted at the clip's frame rate."""
    frame_rates: list[float] = field(default_factory=list)
    """Frame rates in frames per second, one of which is drawn for each clip; videos are resampled to it. With an empty
    list, videos keep their own rate and ShapesWorld has 8. Include all rates at which the model will be used."""
    height: int = 64
    """Height of clips in pixels."""
    width: int = 64
    """Width of clips in pixels."""
    num_frames: int = 17
    """Frames per clip."""
    image_steps: int = 0
    """Number of steps at the start that train on single frames."""
    image_share: float = 0.0
    """Fraction of the later steps that train on single frames."""
    image_batch_size: int = 32
    """Samples per step on single frames."""
    latest_moment: float = 0.0
    """In every second step, clips of ShapesWorld begin at a random time up to this one, in seconds. Shapes cross the
    border of the frame only long after the start of a scene."""

    def check(self) -> None:
        """Checks the settings.

        Raises:
            ValueError: A setting is out of range.
        """
        super().check()
        Augmentation(**self.augment)
        if not 0 <= self.image_share < 1:
            raise ValueError(f"image_share must be in [0, 1), got {self.image_share}")
        if any(rate <= 0 for rate in self.frame_rates):
            raise ValueError(f"frame_rates must all be positive, got {self.frame_rates}")
        if self.augment and not self.data:
            raise ValueError("augment needs videos (--data); ShapesWorld is not augmented")
        if self.latest_moment < 0:
            raise ValueError(f"latest_moment must be at least 0, got {self.latest_moment}")
        if self.latest_moment and self.data:
            raise ValueError("latest_moment is for ShapesWorld only; with --data, sampling decides where clips begin")


def open_source(config: ClipConfig) -> ClipSource:
    """Opens the training data."""
    size = (config.height, config.width, config.frame_rates, config.seed)
    if config.data is None:
        return ShapesSource("train", *size)
    return VideoSource(config.data, samplings_of(config), *size, augmentation=Augmentation(**config.augment))


def open_fresh_source(config: ClipConfig, data: str | None = None) -> ClipSource:
    """Opens the data for scores: other scenes at 8 frames per second, or other clips of videos, not augmented."""
    seed = config.seed + 1
    if config.data is None:
        return ShapesSource("all", config.height, config.width, seed=seed)
    size = (config.height, config.width, config.frame_rates, seed)
    return VideoSource(data or config.data, samplings_of(config), *size, rate_seed=config.seed)


def samplings_of(config: ClipConfig) -> list[Sampling]:
    """The sampling of clips and, if the run also trains on them, of single images."""
    clips = Sampling(
        kind=config.sampling, stride=config.stride, num_frames=config.num_frames, short=config.short
    )  # VideoSource fills in the frame rates
    wants_images = config.image_steps or config.image_share
    return [clips, Sampling(num_frames=1, short=config.short)] if wants_images else [clips]


def batch_of(config: ClipConfig, step: int) -> tuple[range, int]:
    """The numbers of a step's samples, and their number of frames; no number is used twice for clips or for images."""
    images = min(step, config.image_steps)
    rng = random.Random(config.seed * 1_000_003 + step + 0.5)
    if step < config.image_steps or rng.random() < config.image_share:
        return range(step * config.image_batch_size, (step + 1) * config.image_batch_size), 1
    first = images * config.image_batch_size + (step - images) * config.batch_size
    return range(first, first + config.batch_size), config.num_frames


def start_time(config: ClipConfig, step: int, images: bool) -> float:
    """The time in their scenes at which a step's samples begin, in seconds."""
    rng = random.Random(config.seed * 1_000_003 + step)
    if images:
        return rng.uniform(0, 4)
    return rng.uniform(0, config.latest_moment) if step % 2 else 0.0


class ClipPlan(NamedTuple):
    """Which clips a step trains on."""

    indices: range
    """Numbers of the clips."""
    num_frames: int
    """Frames per clip; 1 for single images."""
    start: float = 0.0
    """Time in the scene at which clips of ShapesWorld begin, in seconds."""


def plan_clips(config: ClipConfig, step: int) -> ClipPlan:
    """Chooses the clips or images of a step by the settings."""
    indices, num_frames = batch_of(config, step)
    return ClipPlan(indices, num_frames, start_time(config, step, num_frames == 1))


def consecutive_clips(batch_size: int, num_frames: int, step: int) -> ClipPlan:
    """Chooses consecutive clips for a step, with the same batch size in all steps."""
    return ClipPlan(range(step * batch_size, (step + 1) * batch_size), num_frames)


class ClipBatches(Dataset):
    """Training batches from `ClipSource.batch`, indexed by step and part of the batch.

    Args:
        source: Source of the clips.
        plan: Chooses the clips of a step.
    """

    def __init__(self, source: ClipSource, plan: Callable[[int], ClipPlan]):
        self.source, self.plan = source, plan

    @property
    def max_workers(self) -> int | None:
        """See `ClipSource`."""
        return self.source.max_workers

    def size(self, step: int) -> int:
        """Number of samples of a step."""
        return len(self.plan(step).indices)

    def __getitem__(self, key: tuple[int, slice]) -> dict[str, Any]:
        """The first stage of a part of a step's batch."""
        step, part = key
        indices, num_frames, start = self.plan(step)
        return self.source.batch(indices[part], num_frames, start)

    def name(self, step: int) -> str:
        """Describes a step's clips."""
        indices, num_frames, _ = self.plan(step)
        return self.source.name(indices, num_frames)


def masked_mean(error: Tensor, real: Tensor) -> Tensor:
    """The mean of errors `(b, c, f, h, w)`: first over the real frames of each clip, then over clips."""
    frames = error.mean(dim=(1, 3, 4))
    return ((frames * real).sum(1) / real.sum(1)).mean()
