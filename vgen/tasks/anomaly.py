"""Where a video does what the model did not expect: the error of predicting each frame from those before it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

if TYPE_CHECKING:
    from vgen.pipeline import VideoGenPipeline


class Anomaly(NamedTuple):
    """Of one video."""

    scores: np.ndarray
    """Mean squared error of each predicted frame, float `(f,)`, in units of the range of brightness; NaN for the first
    ones, which nothing precedes."""
    jumps: list[int]
    """Frames whose score stands out."""


def find_anomalies(
    pipe: VideoGenPipeline,
    video: np.ndarray,
    *,
    given: int = 5,
    ahead: int = 4,
    threshold: float = 6.0,
    seed: int = 0,
    **options: Any,
) -> Anomaly:
    """Predicts each piece of a video from the true frames before it and compares.

    What is usual is told by the lower half of the scores, since an event may spoil the predictions of all that follow.
    A frame stands out if the logarithm of its score is more than `threshold` robust deviations (1.4826 times the
    median distance to the median, at least 0.3) above the usual median. An event in the middle of a piece marks what
    is left of it; the first frame marked is when it happened.

    Args:
        pipe: A checkpoint that predicts.
        video: uint8 `(f, h, w, 3)`.
        given: Frames that each prediction starts from.
        ahead: Frames of a piece.
        threshold: What stands out.
        seed: Of the noise.
        options: Further arguments of `VideoGenPipeline.predict`.

    Raises:
        ValueError: The video is not uint8 or too short, or as `predict`.
    """
    if video.dtype != np.uint8:
        raise ValueError(f"the video has {video.dtype} values: give uint8")
    if given < 1 or ahead < 1:
        raise ValueError(f"given={given} and ahead={ahead} must be at least 1")
    if len(video) <= given:
        raise ValueError(f"the video has {len(video)} frames: more than given={given} are needed")
    scores = np.full(len(video), np.nan)
    for begin, made in _predictions(pipe, video, given, ahead, seed, options):
        true = video[begin : begin + len(made)] / 255.0
        scores[begin : begin + len(made)] = np.square(made - true).mean((1, 2, 3))
    logs = np.log(np.maximum(scores, 1e-6))  # 60 dB is as good as exact
    usual = np.sort(logs[given:])[: (len(logs) - given + 1) // 2]
    middle = np.median(usual)
    deviation = 1.4826 * np.median(np.abs(usual - middle))
    jumps = np.flatnonzero(logs > middle + threshold * max(deviation, 0.3))
    return Anomaly(scores, jumps.tolist())


def _predictions(
    pipe: VideoGenPipeline, video: np.ndarray, given: int, ahead: int, seed: int, options: dict[str, Any]
) -> Iterator[tuple[int, np.ndarray]]:
    """Pieces of at most `ahead` frames with their places."""
    for begin in range(given, len(video), ahead):
        count = min(ahead, len(video) - begin)
        generator = torch.Generator().manual_seed(seed * 1_000_003 + begin)
        made = pipe.predict(video[begin - given : begin], count, generator=generator, **options).frames[0]
        yield begin, np.asarray(made)
