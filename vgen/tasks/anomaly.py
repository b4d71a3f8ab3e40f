"""Anomaly detection: how badly the model predicts each frame of a video from the frames before it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from vgen.checks import check_integer, check_number

if TYPE_CHECKING:
    from vgen.pipeline import VideoGenPipeline


class Anomaly(NamedTuple):
    """Prediction errors and anomalous frames of one video."""

    scores: np.ndarray
    """Mean squared error of each predicted frame, float `(f,)`, for pixels in [0, 1]. NaN for the first frames, which
    are not predicted."""
    anomalous_frames: list[int]
    """Indices of the frames with an unusually high score."""


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
    """Predicts a video a few frames at a time, each time from the true frames before, and scores the errors.

    A frame is anomalous if the logarithm of its score exceeds the median by more than `threshold` robust standard
    deviations (1.4826 times the median absolute deviation, at least 0.3). Both statistics are of the lower half of the
    scores, because an event may spoil the predictions of all later frames. After an event, the other frames of the
    same prediction are also marked; the first marked frame is the time of the event.

    Args:
        pipe: A pipeline that supports prediction.
        video: Frames, uint8 `(f, h, w, 3)`.
        given: Number of true frames that each prediction starts from.
        ahead: Number of frames per prediction.
        threshold: Number of robust standard deviations above which a frame is anomalous.
        seed: Seed of the noise.
        options: Further arguments of `VideoGenPipeline.predict`.

    Raises:
        ValueError: The video is not uint8 or too short, a number is out of range, or as in `VideoGenPipeline.predict`.
    """
    if video.dtype != np.uint8:
        raise ValueError(f"video must be uint8, got {video.dtype}")
    check_integer("given", given, 1)
    check_integer("ahead", ahead, 1)
    check_number("threshold", threshold)
    if len(video) <= given:
        raise ValueError(f"video must have more than given={given} frames, got {len(video)}")
    scores = np.full(len(video), np.nan)
    for begin, predicted in _predictions(pipe, video, given, ahead, seed, options):
        true = video[begin : begin + len(predicted)] / 255.0
        scores[begin : begin + len(predicted)] = np.square(predicted - true).mean((1, 2, 3))
    logs = np.log(np.maximum(scores, 1e-6))  # errors below 60 dB PSNR count as equal
    lower_half = np.sort(logs[given:])[: (len(logs) - given + 1) // 2]
    median = np.median(lower_half)
    deviation = 1.4826 * np.median(np.abs(lower_half - median))
    anomalous = np.flatnonzero(logs > median + threshold * max(deviation, 0.3))
    return Anomaly(scores, anomalous.tolist())


def _predictions(
    pipe: VideoGenPipeline, video: np.ndarray, given: int, ahead: int, seed: int, options: dict[str, Any]
) -> Iterator[tuple[int, np.ndarray]]:
    """Yields predictions of at most `ahead` frames, with the index of their first frame."""
    for begin in range(given, len(video), ahead):
        count = min(ahead, len(video) - begin)
        generator = torch.Generator().manual_seed(seed * 1_000_003 + begin)
        predicted = pipe.predict(video[begin - given : begin], count, generator=generator, **options).frames[0]
        yield begin, np.asarray(predicted)
