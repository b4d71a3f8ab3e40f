"""Evaluation suites: clips, the frames of them that models are given, baselines and scores.

Clips are `(b, 3, f, h, w)` in [-1, 1].
"""

import hashlib
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from vgen.checks import check_choice, check_integer, check_number
from vgen.data.clips import Listed, Sampling, VideoFolder, stack_clips
from vgen.data.labels import list_labeled
from vgen.data.moving_mnist import MovingMNIST
from vgen.data.shapes import ShapesWorld, render
from vgen.data.shapes_tasks import scene_labels
from vgen.data.sources import VideoStream, open_clips
from vgen.io.pixels import from_uint8, to_uint8
from vgen.metrics.prompt import check
from vgen.metrics.reference import LPIPS, check_pair, frame_psnr, frame_ssim, psnr, ssim
from vgen.metrics.temporal import check_clip, flicker, motion_magnitude, statistics, warping_error
from vgen.temporal.flow import FlowMethod, measure_motion, optical_flow, warp

SuiteName = Literal["shapes", "folder", "moving-mnist"]
WORLD_SEED = 1000  # training uses seed 0
IDENTICAL = 100.0
"""PSNR in dB that stands for identical frames, so that means are finite."""


class Samples(NamedTuple):
    """A batch of clips of a suite."""

    numbers: list[int]
    """Indices of the clips in the suite. Clips of damaged files are missing."""
    clips: Tensor
    """`(b, 3, f, h, w)` in [-1, 1]."""
    captions: list[str | None]
    """One caption per clip; `None` for a clip without one."""


# Annotations are evaluated here, because jsonargparse looks names up only in modules of first base classes.
@dataclass(kw_only=True)
class SuiteConfig:
    """The clips that a model is evaluated on, and the frames of them that it is given."""

    suite: SuiteName = "shapes"
    """`shapes`: ShapesWorld, whose captions can be checked. `folder`: a folder of videos. `moving-mnist`: bouncing
    digits."""
    data: str | None = None
    """A source for `vgen.data.sources.open_clips`: a folder of videos, or for Moving MNIST an IDX file of digits."""
    num_clips: int = 100
    """Number of clips. Every run uses the same ones."""
    num_frames: int = 0
    """Frames per clip; 0 uses the checkpoint's default."""
    height: int = 0
    """Height in pixels; 0 uses the checkpoint's default."""
    width: int = 0
    """Width in pixels; 0 uses the checkpoint's default."""
    frame_rate: float = 0.0
    """Frames per second that videos are resampled to; 0 uses the checkpoint's default."""
    hop: int | None = None
    """Frames, at that rate, from the start of a clip to the start of the next one in the same video, only for
    `folder`. By default clips do not overlap."""
    given: int = 5
    """Number of leading frames that a prediction is given."""
    factor: int = 4
    """Interpolation factor N: an interpolation is given every N-th frame."""
    suite_seed: int = 0
    """Seed of the choice of clips."""


def check_suite(config: SuiteConfig) -> None:
    """Checks the settings of a suite, after defaults have been filled in.

    Raises:
        ValueError: A setting is unknown, missing or out of range.
    """
    check_choice("suite", config.suite, SuiteName)
    if (config.data is None) != (config.suite == "shapes"):
        expected = "None" if config.suite == "shapes" else "set"
        raise ValueError(f"data must be {expected} for suite={config.suite!r}, got {config.data!r}")
    check_integer("num_frames", config.num_frames, 3)
    for name in ("height", "width", "num_clips"):
        check_integer(name, getattr(config, name), 1)
    check_number("frame_rate", config.frame_rate)
    if config.frame_rate <= 0:
        raise ValueError(f"frame_rate must be positive, got {config.frame_rate}")
    if config.hop is not None:
        check_integer("hop", config.hop, 1)
        if config.suite != "folder":
            raise ValueError(f"hop must be None for suite={config.suite!r}, got {config.hop}")
    check_integer("given", config.given, 1, config.num_frames - 1)
    check_integer("factor", config.factor, 2, config.num_frames - 1)
    check_integer("suite_seed", config.suite_seed, 0)


def keyframes_of(config: SuiteConfig) -> list[int]:
    """Indices of the frames that an interpolation is given. Frames after the last one are not evaluated."""
    return list(range(0, config.num_frames, config.factor))


class Suite(Protocol):
    """A numbered set of clips to evaluate on."""

    captioned: bool
    """Whether every clip has a caption."""

    @property
    def digest(self) -> str | None:
        """Hash of the data that the clips come from; `None` if the settings determine them."""

    @property
    def skipped(self) -> Mapping[str, str]:
        """Damaged files that were skipped, with the reasons."""

    def __len__(self) -> int: ...

    def samples(self, numbers: range) -> Samples:
        """Loads clips by number."""

    def long(self, numbers: Sequence[int], num_frames: int) -> Tensor | None:
        """Loads longer videos `(b, 3, num_frames, h, w)` by number; `None` if the suite has only clips."""

    def correct(self, number: int, clip: Tensor) -> dict[str, float]:
        """Scores whether a clip `(3, f, h, w)` shows what the caption says; empty if that cannot be checked."""

    def labels(self, number: int) -> set[str]:
        """What a recognizer should see in a clip.

        Raises:
            ValueError: The suite has no labels.
        """


def open_suite(config: SuiteConfig) -> Suite:
    """Opens the suite that the settings describe.

    Raises:
        FileNotFoundError: The folder or file does not exist.
        ValueError: A setting is invalid, or the source has no usable clips.
    """
    check_suite(config)
    if config.suite == "shapes":
        return Shapes(config)
    assert config.data is not None
    sampling = Sampling(num_frames=config.num_frames, kind="sliding", frame_rate=config.frame_rate, hop=config.hop)
    source = open_clips(config.data, sampling, config.height, config.width, WORLD_SEED + config.suite_seed)
    if isinstance(source, VideoStream):
        raise ValueError(f"data must be a folder or an IDX file, got the stream {config.data!r}")
    if isinstance(source, VideoFolder) == (config.suite == "moving-mnist"):
        raise ValueError(f"data={config.data!r} does not match suite={config.suite!r}")
    return Videos(config, source) if isinstance(source, VideoFolder) else Digits(config, source)


class Shapes:
    """ShapesWorld, with scenes that training never uses."""

    captioned = True
    digest = None
    skipped: Mapping[str, str] = MappingProxyType({})

    def __init__(self, config: SuiteConfig):
        self.config = config
        self.world = ShapesWorld(split="all", seed=WORLD_SEED + config.suite_seed)

    def __len__(self) -> int:
        return self.config.num_clips

    def samples(self, numbers: range) -> Samples:
        """Renders clips by number."""
        clips = self.long(numbers, self.config.num_frames)
        return Samples(list(numbers), clips, [self.world.caption(number) for number in numbers])

    def long(self, numbers: Sequence[int], num_frames: int) -> Tensor:
        """Renders videos of any length by number."""
        config = self.config
        return render(
            [self.world.scene(number) for number in numbers],
            num_frames=num_frames,
            height=config.height,
            width=config.width,
            frame_rate=config.frame_rate,
        )

    def correct(self, number: int, clip: Tensor) -> dict[str, float]:
        """Returns 1 if color, shape and motion of every object match the caption, else 0."""
        return {"correct": float(check(clip, self.world.scene(number)).correct)}

    def labels(self, number: int) -> set[str]:
        """The shapes and motions of the scene's colors."""
        return set(scene_labels(self.world.scene(number)))


class Videos:
    """A fixed random choice of windows of a folder's videos."""

    def __init__(self, config: SuiteConfig, source: VideoFolder):
        self.source, self.numbers = source, list(range(len(source)))
        self.folder = Path(str(config.data))
        random.Random(config.suite_seed).shuffle(self.numbers)
        del self.numbers[config.num_clips :]
        self.captioned = all(any(source.clips[number][0].captions) for number in self.numbers)
        self.digest = source.digest

    def __len__(self) -> int:
        return len(self.numbers)

    def samples(self, numbers: range) -> Samples:
        """Reads clips by number, except those of damaged files.

        Raises:
            ValueError: All files are damaged. The error names them.
        """
        read = [(number, self.source.clip(self.numbers[number])) for number in numbers]
        whole = [(number, clip) for number, clip in read if clip is not None]
        if not whole:
            raise ValueError("; ".join(f"{path}: {reason}" for path, reason in self.skipped.items()))
        clips, _ = stack_clips([clip for _, clip in whole], torch.device("cpu"))
        return Samples(
            [number for number, _ in whole], clips, [next(filter(None, clip.captions), None) for _, clip in whole]
        )

    def long(self, numbers: Sequence[int], num_frames: int) -> None:
        """Returns `None`, because the length of files is limited."""

    @property
    def skipped(self) -> dict[str, str]:
        """Damaged files that were skipped, with the reasons."""
        return {str(video.path): reason for video, reason in self.source.skipped.items()}

    def correct(self, number: int, clip: Tensor) -> dict[str, float]:
        """Returns nothing, because the content of real videos is not checked."""
        return {}

    def labels(self, number: int) -> set[str]:
        """The labels of the video: those of a metadata file, or the name of its folder.

        Raises:
            ValueError: A video has none.
        """
        video = self.source.clips[self.numbers[number]][0]
        return self._labels[replace(video, captions=())]

    @cached_property
    def _labels(self) -> dict[Listed, set[str]]:
        found: dict[Listed, set[str]] = {}
        for video, labels in list_labeled(self.folder):
            found.setdefault(replace(video, captions=()), set()).update(labels)
        return found


class Digits:
    """Moving MNIST, with trajectories that training never uses."""

    captioned = False
    skipped: Mapping[str, str] = MappingProxyType({})

    def __init__(self, config: SuiteConfig, source: MovingMNIST):
        self.config, self.source = config, source
        self.digest = hashlib.sha256(source.digits.tobytes()).hexdigest()

    def __len__(self) -> int:
        return self.config.num_clips

    def samples(self, numbers: range) -> Samples:
        """Renders clips by number."""
        clips, _ = stack_clips([self.source.sample(number) for number in numbers], torch.device("cpu"))
        return Samples(list(numbers), clips, [None] * len(numbers))

    def long(self, numbers: Sequence[int], num_frames: int) -> None:
        """Returns `None`: without captions there are no long videos to compare."""

    def correct(self, number: int, clip: Tensor) -> dict[str, float]:
        """Returns nothing, because the digits have no captions."""
        return {}

    def labels(self, number: int) -> set[str]:
        """Raises an error, because the digits have no labels."""
        raise ValueError("the suite moving-mnist has no labels for a recognizer")


def copy_last(clip: Tensor, given: int) -> Tensor:
    """A baseline for prediction: repeats the last of the `given` leading frames."""
    rest = clip.shape[2] - given
    return torch.cat([clip[:, :, :given], clip[:, :, given - 1 : given].expand(-1, -1, rest, -1, -1)], dim=2)


def hold_keyframes(clip: Tensor, keyframes: Sequence[int]) -> Tensor:
    """A baseline for interpolation: repeats each keyframe until the next one."""
    return _between(clip, keyframes, lambda a, _: lambda _: a)


def linear_blend(clip: Tensor, keyframes: Sequence[int]) -> Tensor:
    """A baseline for interpolation: blends linearly from each keyframe to the next one."""
    return _between(clip, keyframes, lambda a, b: lambda t: (1 - t) * a + t * b)


def flow_interpolation(clip: Tensor, keyframes: Sequence[int], method: FlowMethod = "dis") -> Tensor:
    """A baseline for interpolation: warps both keyframes along the optical flow between them and blends them.

    Source: Super SloMo, arXiv 1712.00080, without its networks (the approximation of intermediate flows).
    """

    def prepare(a: Tensor, b: Tensor) -> Callable[[float], Tensor]:
        flow_ab, flow_ba = optical_flow(a, b, method), optical_flow(b, a, method)

        def frame_at(t: float) -> Tensor:
            flow_ta = -(1 - t) * t * flow_ab + t * t * flow_ba
            flow_tb = (1 - t) ** 2 * flow_ab - t * (1 - t) * flow_ba
            return (1 - t) * warp(a, flow_ta) + t * warp(b, flow_tb)

        return frame_at

    return _between(clip, keyframes, prepare)


def _between(clip: Tensor, keyframes: Sequence[int], prepare: Callable) -> Tensor:
    """Fills in the frames between keyframes, up to the last one, quantized to 8 bits.

    `prepare` maps two keyframes `(b, 3, h, w)` to a function from a time in (0, 1) to a frame.
    """
    generated = clip[:, :, : keyframes[-1] + 1].clone()
    for first, second in zip(keyframes[:-1], keyframes[1:], strict=True):
        frame_at = prepare(generated[:, :, first], generated[:, :, second])
        for index in range(first + 1, second):
            generated[:, :, index] = frame_at((index - first) / (second - first))
    return quantize(generated)


def quantize(clip: Tensor) -> Tensor:
    """Rounds a clip to the values that 8 bits per channel can represent."""
    return from_uint8(to_uint8(clip))


def score_pairs(
    generated: Tensor, true: Tensor, counted: Sequence[int], lpips: LPIPS | None = None
) -> dict[str, Tensor]:
    """Compares generated clips with the true ones, `(b,)` for each metric.

    Args:
        generated: Generated clips.
        true: True clips of the same shape.
        counted: Indices of the frames to compare: those that the model was not given.
        lpips: Network for LPIPS; `None` leaves the metric out.

    Raises:
        ValueError: The shapes differ, or there are values that are not finite.
    """
    check_pair(generated, true)
    a, b = generated[:, :, counted], true[:, :, counted]
    scores = {"psnr": psnr(a, b).clamp_max(IDENTICAL), "ssim": ssim(a, b)}
    scores |= {"mse": ((a - b) / 2).square().mean((1, 2, 3, 4)), "mae": ((a - b) / 2).abs().mean((1, 2, 3, 4))}
    if lpips is not None:
        device = next(lpips.parameters()).device
        scores["lpips"] = lpips(a.to(device), b.to(device)).cpu()
    return scores | {"sharpness": statistics(a)["sharpness"].mean(1)}


def score_time(generated: Tensor) -> dict[str, Tensor]:
    """Computes temporal metrics of clips of at least 3 frames, `(b,)` for each metric."""
    check_clip(generated, 3)
    motion = measure_motion(generated)
    return {
        "warping error": warping_error(generated, motion=motion),
        "flicker": flicker(generated),
        "motion": motion_magnitude(generated, motion=motion),
    }


def curves(generated: Tensor, true: Tensor, counted: Sequence[int]) -> dict[str, Tensor]:
    """Compares clips frame by frame, `(b, f)` for each metric; arguments and errors as in `score_pairs`."""
    check_pair(generated, true)
    generated, true = generated[:, :, counted], true[:, :, counted]
    return {"psnr": frame_psnr(generated, true).clamp_max(IDENTICAL), "ssim": frame_ssim(generated, true)}


def combine(samples: Tensor, true: Tensor, counted: Sequence[int]) -> dict[str, Tensor]:
    """Combines `n` predictions `(n, b, 3, f, h, w)`: their mean, and the best one of each clip by SSIM.

    Source: Stochastic video generation with a learned prior, arXiv 1802.07687.
    """
    count = len(samples)
    best = torch.stack([ssim(sample[:, :, counted], true[:, :, counted]) for sample in samples]).argmax(0)
    return {
        f"mean of {count}": samples.mean(0),
        f"best of {count}": samples[best, torch.arange(samples.shape[1])],
    }
