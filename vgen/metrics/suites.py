"""What models are measured on: clips, what of them is known, and simple ways to make the rest.

Clips are `(b, 3, f, h, w)` in [-1, 1].
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from vgen.data.clips import Sampling, VideoFolder, stack_clips
from vgen.data.moving_mnist import MovingMNIST
from vgen.data.shapes import ShapesWorld, render
from vgen.data.sources import VideoStream, open_clips
from vgen.metrics.prompt import check
from vgen.metrics.reference import LPIPS, check_pair, frame_psnr, frame_ssim, psnr, ssim
from vgen.metrics.temporal import check_clip, flicker, motion_magnitude, statistics, warping_error
from vgen.temporal.flow import measure_motion, optical_flow, warp

SUITES = ("shapes", "folder", "moving-mnist")
WORLD_SEED = 1000  # training draws its scenes from seed 0
IDENTICAL = 100.0
"""PSNR in dB that counts for frames in which nothing differs, so that means are finite."""


class Samples(NamedTuple):
    """Clips of a suite, side by side."""

    numbers: list[int]
    """In the suite; where files are damaged, some are missing."""
    clips: Tensor
    captions: list[str | None]


@dataclass(kw_only=True)
class SuiteConfig:
    """Which clips a model is measured on, and what it gets to know of them."""

    suite: str = "shapes"
    """`shapes`: ShapesWorld, whose captions can be checked. `folder`: videos. `moving-mnist`: bouncing digits."""
    data: str | None = None
    """What `vgen.data.sources.open_clips` takes: a folder of videos, or for Moving MNIST an IDX file of digits."""
    num_clips: int = 100
    """That are measured, the same ones each time."""
    num_frames: int = 0
    """Of a clip; 0 takes the checkpoint's default, as it does below."""
    height: int = 0
    """Pixels."""
    width: int = 0
    """Pixels."""
    frame_rate: float = 0.0
    """Frames per second that videos are resampled to."""
    given: int = 5
    """Frames that a prediction starts from."""
    factor: int = 4
    """Every so many'th frame is given to an interpolation."""
    suite_seed: int = 0
    """Of the choice of clips."""


def check_suite(config: SuiteConfig) -> None:
    """Refuses what cannot work.

    Raises:
        ValueError: A setting is unknown, missing or out of range.
    """
    if config.suite not in SUITES:
        raise ValueError(f"suite={config.suite!r} must be one of {', '.join(SUITES)}")
    if (config.data is None) != (config.suite == "shapes"):
        raise ValueError(
            f"suite={config.suite} with data={config.data}: folder and moving-mnist need data, shapes none"
        )
    if min(config.num_frames, config.height, config.width, config.frame_rate) <= 0:
        raise ValueError("num_frames, height, width and frame_rate must be positive")
    if not 1 <= config.given < config.num_frames:
        raise ValueError(f"given={config.given} must leave some of {config.num_frames} frames to predict")
    if not 2 <= config.factor < config.num_frames:
        raise ValueError(f"factor={config.factor} must be at least 2 and less than num_frames={config.num_frames}")
    if config.num_frames < 3:
        raise ValueError(f"num_frames={config.num_frames}: what happens over time shows in 3 frames or more")
    if config.num_clips < 1:
        raise ValueError(f"num_clips={config.num_clips} must be at least 1")


def keyframes_of(config: SuiteConfig) -> list[int]:
    """The frames that an interpolation gets; frames behind the last one are not measured."""
    return list(range(0, config.num_frames, config.factor))


class Suite(Protocol):
    """Clips by number."""

    captioned: bool
    """Whether every clip has a caption."""

    @property
    def digest(self) -> str | None:
        """Of what the clips are made from; `None` where the settings tell all."""

    @property
    def left_out(self) -> Mapping[str, str]:
        """Files that turned out to be damaged, with the reasons."""

    def __len__(self) -> int: ...

    def samples(self, numbers: range) -> Samples:
        """Some of them."""

    def long(self, numbers: Sequence[int], num_frames: int) -> Tensor | None:
        """Some of the videos `(b, 3, num_frames, h, w)`; `None` where they have an end."""

    def right(self, number: int, clip: Tensor) -> dict[str, float]:
        """Whether a clip `(3, f, h, w)` shows what the caption of this number says, where that can be checked."""


def open_suite(config: SuiteConfig) -> Suite:
    """The clips that the settings name.

    Raises:
        FileNotFoundError: There is no such folder or file.
        ValueError: A setting cannot work, or nothing there can be used.
    """
    check_suite(config)
    if config.suite == "shapes":
        return Shapes(config)
    assert config.data is not None
    sampling = Sampling(num_frames=config.num_frames, kind="sliding", frame_rate=config.frame_rate)
    source = open_clips(config.data, sampling, config.height, config.width, WORLD_SEED + config.suite_seed)
    if isinstance(source, VideoStream):
        raise ValueError(f"data={config.data} is a stream, whose clips have no numbers: give a folder")
    if isinstance(source, VideoFolder) == (config.suite == "moving-mnist"):
        raise ValueError(f"data={config.data} does not fit suite={config.suite}")
    return Videos(config, source) if isinstance(source, VideoFolder) else Digits(config, source)


class Shapes:
    """ShapesWorld, with scenes that no training draws."""

    captioned = True
    digest = None
    left_out: Mapping[str, str] = MappingProxyType({})

    def __init__(self, config: SuiteConfig):
        self.config = config
        self.world = ShapesWorld(split="all", seed=WORLD_SEED + config.suite_seed)

    def __len__(self) -> int:
        return self.config.num_clips

    def samples(self, numbers: range) -> Samples:
        """Some of them."""
        clips = self.long(numbers, self.config.num_frames)
        return Samples(list(numbers), clips, [self.world.caption(number) for number in numbers])

    def long(self, numbers: Sequence[int], num_frames: int) -> Tensor:
        """Some of the videos."""
        config = self.config
        return render(
            [self.world.scene(number) for number in numbers],
            num_frames=num_frames,
            height=config.height,
            width=config.width,
            frame_rate=config.frame_rate,
        )

    def right(self, number: int, clip: Tensor) -> dict[str, float]:
        """1 if every object's colour, shape and motion are as the caption says."""
        return {"right": float(check(clip, self.world.scene(number)).right)}


class Videos:
    """Windows of a folder's videos, drawn once for all."""

    def __init__(self, config: SuiteConfig, source: VideoFolder):
        self.source, self.numbers = source, list(range(len(source)))
        random.Random(config.suite_seed).shuffle(self.numbers)
        del self.numbers[config.num_clips :]
        self.captioned = all(any(source.clips[number][0].captions) for number in self.numbers)
        self.digest = source.digest

    def __len__(self) -> int:
        return len(self.numbers)

    def samples(self, numbers: range) -> Samples:
        """Some of them.

        Raises:
            ValueError: The files of all are damaged; they are named.
        """
        found = [(number, self.source.clip(self.numbers[number])) for number in numbers]
        whole = [(number, clip) for number, clip in found if clip is not None]
        if not whole:
            raise ValueError("; ".join(f"{path}: {reason}" for path, reason in self.left_out.items()))
        clips, _ = stack_clips([clip for _, clip in whole], torch.device("cpu"))
        return Samples(
            [number for number, _ in whole], clips, [next(filter(None, clip.captions), None) for _, clip in whole]
        )

    def long(self, numbers: Sequence[int], num_frames: int) -> None:
        """None: files have an end."""

    @property
    def left_out(self) -> dict[str, str]:
        """Files that turned out to be damaged, with the reasons."""
        return {str(one.path): reason for one, reason in self.source.refused.items()}

    def right(self, number: int, clip: Tensor) -> dict[str, float]:
        """Nothing: what real videos show is not checked."""
        return {}


class Digits:
    """Moving MNIST, with ways that no training draws."""

    captioned = False
    left_out: Mapping[str, str] = MappingProxyType({})

    def __init__(self, config: SuiteConfig, source: MovingMNIST):
        self.config, self.source = config, source
        self.digest = hashlib.sha256(source.digits.tobytes()).hexdigest()

    def __len__(self) -> int:
        return self.config.num_clips

    def samples(self, numbers: range) -> Samples:
        """Some of them."""
        clips, _ = stack_clips([self.source.sample(number) for number in numbers], torch.device("cpu"))
        return Samples(list(numbers), clips, [None] * len(numbers))

    def long(self, numbers: Sequence[int], num_frames: int) -> None:
        """None: without captions, long videos are not made."""

    def right(self, number: int, clip: Tensor) -> dict[str, float]:
        """Nothing: the digits have no captions."""
        return {}


def copy_last(clip: Tensor, given: int) -> Tensor:
    """A prediction in which nothing moves any more behind the given frames."""
    rest = clip.shape[2] - given
    return torch.cat([clip[:, :, :given], clip[:, :, given - 1 : given].expand(-1, -1, rest, -1, -1)], dim=2)


def hold_keyframes(clip: Tensor, keyframes: Sequence[int]) -> Tensor:
    """An interpolation in which each keyframe stands until the next."""
    return _between(clip, keyframes, lambda a, _: lambda _: a)


def linear_blend(clip: Tensor, keyframes: Sequence[int]) -> Tensor:
    """An interpolation in which each keyframe fades into the next."""
    return _between(clip, keyframes, lambda a, b: lambda t: (1 - t) * a + t * b)


def flow_interpolation(clip: Tensor, keyframes: Sequence[int], method: str = "dis") -> Tensor:
    """An interpolation that moves both keyframes along the flow between them, and blends them.

    Source: Super SloMo, arXiv 1712.00080, without its networks.
    """

    def prepare(a: Tensor, b: Tensor) -> Callable[[float], Tensor]:
        there, back = optical_flow(a, b, method), optical_flow(b, a, method)

        def at(t: float) -> Tensor:
            to_a = -(1 - t) * t * there + t * t * back
            to_b = (1 - t) ** 2 * there - t * (1 - t) * back
            return (1 - t) * warp(a, to_a) + t * warp(b, to_b)

        return at

    return _between(clip, keyframes, prepare)


def _between(clip: Tensor, keyframes: Sequence[int], prepare: Callable) -> Tensor:
    """Each frame between keyframes `(b, 3, h, w)` from them; up to the last keyframe, in steps of pixels' values."""
    made = clip[:, :, : keyframes[-1] + 1].clone()
    for first, second in zip(keyframes[:-1], keyframes[1:], strict=True):
        at = prepare(made[:, :, first], made[:, :, second])
        for index in range(first + 1, second):
            made[:, :, index] = at((index - first) / (second - first))
    return quantize(made)


def quantize(clip: Tensor) -> Tensor:
    """The clip with the values that a file of 8 bits a channel would have."""
    return clip.clamp(-1, 1).add(1).mul(127.5).round().div(127.5).sub(1)


def score_pairs(made: Tensor, true: Tensor, counted: Sequence[int], lpips: LPIPS | None = None) -> dict[str, Tensor]:
    """How near made clips come to the true ones, `(b,)` for each metric.

    Args:
        made: Clips.
        true: The same shape.
        counted: The frames that are compared: those that were not given.
        lpips: The network, if it is wanted.

    Raises:
        ValueError: Shapes differ, or values are not finite.
    """
    check_pair(made, true)
    a, b = made[:, :, counted], true[:, :, counted]
    found = {"psnr": psnr(a, b).clamp_max(IDENTICAL), "ssim": ssim(a, b)}
    found |= {"mse": ((a - b) / 2).square().mean((1, 2, 3, 4)), "mae": ((a - b) / 2).abs().mean((1, 2, 3, 4))}
    if lpips is not None:
        device = next(lpips.parameters()).device
        found["lpips"] = lpips(a.to(device), b.to(device)).cpu()
    return found | {"sharpness": statistics(a)["sharpness"].mean(1)}


def score_time(made: Tensor) -> dict[str, Tensor]:
    """What happens over time in clips of 3 frames or more, `(b,)` for each metric."""
    check_clip(made, 3)
    motion = measure_motion(made)
    return {
        "warping error": warping_error(made, motion=motion),
        "flicker": flicker(made),
        "motion": motion_magnitude(made, motion=motion),
    }


def curves(made: Tensor, true: Tensor, counted: Sequence[int]) -> dict[str, Tensor]:
    """How near each of these frames comes, `(b, f)` for each metric; the rest as for `score_pairs`."""
    check_pair(made, true)
    made, true = made[:, :, counted], true[:, :, counted]
    return {"psnr": frame_psnr(made, true).clamp_max(IDENTICAL), "ssim": frame_ssim(made, true)}


def combine(samples: Tensor, true: Tensor, counted: Sequence[int]) -> dict[str, Tensor]:
    """Several predictions `(n, b, 3, f, h, w)` as one: their mean, and for each clip the best by SSIM.

    Source: Stochastic video generation with a learned prior, arXiv 1802.07687.
    """
    count = len(samples)
    best = torch.stack([ssim(one[:, :, counted], true[:, :, counted]) for one in samples]).argmax(0)
    return {
        f"mean of {count}": samples.mean(0),
        f"best of {count}": samples[best, torch.arange(samples.shape[1])],
    }
