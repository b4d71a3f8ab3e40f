"""Temporal detection: which labels occur when, as segments with scores.

Times are in seconds.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from vgen.checks import check_number

IOU_THRESHOLDS = (0.3, 0.4, 0.5, 0.6, 0.7)
"""Temporal IoU from which a detection counts as correct; results are averaged over them."""
DETECTION_THRESHOLDS = (0.2, 0.35, 0.5, 0.65, 0.8)
"""Probabilities from which a label may occur; segments at all of them are candidates."""


class Segment(NamedTuple):
    """A span of time with a label."""

    label: str
    start: float
    end: float
    score: float = 1.0
    """Confidence of a detection; true segments have 1."""


def temporal_iou(first: Segment, second: Segment) -> float:
    """Length of the intersection of two segments, relative to that of their union."""
    shared = max(0.0, min(first.end, second.end) - max(first.start, second.start))
    union = (first.end - first.start) + (second.end - second.start) - shared
    return shared / union if union > 0 else 0.0


def temporal_iou_loss(probabilities: Tensor, targets: Tensor, mask: Tensor | None = None) -> Tensor:
    """One minus the soft temporal IoU of each class that occurs, averaged over these classes.

    Args:
        probabilities: Probability of each class in each frame, `(b, f, k)`.
        targets: 1 where a class occurs and 0 elsewhere, `(b, f, k)`.
        mask: bool `(b, f)`, false for padding.

    Returns:
        Losses `(b,)`, from 0 to 1; 0 for clips without any class.

    Source: The soft Jaccard loss (Rahman and Wang 2016), over time.
    """
    if mask is not None:
        probabilities, targets = (x * mask[..., None].to(x) for x in (probabilities, targets))
    shared = (probabilities * targets).sum(1)
    union = (probabilities + targets - probabilities * targets).sum(1)
    occurs = (targets.sum(1) > 0).to(probabilities)
    loss = (1 - shared / union.clamp_min(1e-6)) * occurs
    return loss.sum(1) / occurs.sum(1).clamp_min(1)


def suppress(segments: Iterable[Segment], threshold: float = 0.5) -> list[Segment]:
    """Non-maximum suppression: drops segments that overlap one of the same label with a higher score.

    Args:
        segments: Detections in any order.
        threshold: Temporal IoU above which the one with the lower score is dropped.

    Returns:
        The others, in descending order of scores.

    Raises:
        ValueError: `threshold` is not in [0, 1].
    """
    check_number("threshold", threshold, 0, 1)
    kept: list[Segment] = []
    for one in sorted(segments, key=lambda segment: -segment.score):
        if all(one.label != other.label or temporal_iou(one, other) <= threshold for other in kept):
            kept.append(one)
    return kept


def segments_of(
    edges: Sequence[float],
    probabilities: Tensor,
    labels: Sequence[str],
    thresholds: Sequence[float] = DETECTION_THRESHOLDS,
    overlap: float = 0.5,
) -> list[Segment]:
    """Detections from the probabilities over time.

    At each threshold, consecutive parts with a higher probability make a segment, whose score is their mean
    probability. Overlapping segments of all thresholds are suppressed.

    Args:
        edges: Times between which the parts of a video are, `n + 1` in ascending order.
        probabilities: Probabilities of the classes in these parts, `(n, k)`.
        labels: Names of the classes.
        thresholds: Probabilities from which a label may occur.
        overlap: See `suppress`.

    Source: The grouping of thresholded actionness in temporal action grouping, Zhao et al., arXiv 1704.06228.
    """
    found = []
    for index, label in enumerate(labels):
        column = probabilities[:, index]
        for threshold in thresholds:
            steps = torch.diff((column >= threshold).int(), prepend=torch.zeros(1), append=torch.zeros(1))
            begins, ends = ((steps == sign).nonzero()[:, 0].tolist() for sign in (1, -1))
            for begin, end in zip(begins, ends, strict=True):
                score = column[begin:end].mean().item()
                found.append(Segment(label, edges[begin], edges[end], score))
    return suppress(found, overlap)


def average_precision(
    found: Mapping[str, Sequence[Segment]], true: Mapping[str, Sequence[Segment]], label: str, iou: float
) -> float:
    """Average precision of one label.

    A detection is correct if its temporal IoU with a true segment that no better detection has taken is at least
    `iou`. Precision is made monotonic before it is averaged over recall.

    Args:
        found: Detections by video.
        true: True segments by video.
        label: The label.
        iou: Least temporal IoU.

    Returns:
        From 0 to 1; NaN if the label does not occur.

    Source: ActivityNet, Heilbron et al., CVPR 2015.
    """
    wanted = {video: [one for one in segments if one.label == label] for video, segments in true.items()}
    total = sum(map(len, wanted.values()))
    if not total:
        return float("nan")
    ranked = [(one, video) for video, segments in found.items() for one in segments if one.label == label]
    ranked.sort(key=lambda pair: -pair[0].score)
    taken: set[tuple[str, int]] = set()
    correct = []
    for one, video in ranked:
        overlaps = [
            (temporal_iou(one, other), index)
            for index, other in enumerate(wanted.get(video, ()))
            if (video, index) not in taken
        ]
        best, index = max(overlaps, default=(0.0, -1))
        correct.append(best >= iou and index >= 0)
        if correct[-1]:
            taken.add((video, index))
    hits = np.cumsum(correct)
    precision = np.maximum.accumulate((hits / np.arange(1, len(hits) + 1))[::-1])[::-1]
    return float(precision[np.asarray(correct, dtype=bool)].sum() / total)


def mean_average_precision(
    found: Mapping[str, Sequence[Segment]],
    true: Mapping[str, Sequence[Segment]],
    thresholds: Sequence[float] = IOU_THRESHOLDS,
) -> dict[str, float]:
    """Mean average precision over all labels that occur, at each temporal IoU and on average.

    Args:
        found: Detections by video.
        true: True segments by video.
        thresholds: Temporal IoU values.

    Raises:
        ValueError: There are no true segments.
    """
    labels = sorted({one.label for segments in true.values() for one in segments})
    if not labels:
        raise ValueError("mean average precision needs at least one true segment")
    each = {
        f"mAP@{iou:g}": float(np.mean([average_precision(found, true, label, iou) for label in labels]))
        for iou in thresholds
    }
    return each | {"mAP": float(np.mean(list(each.values())))}
