"""Losses and scores of classifiers."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.functional.classification import (
    binary_average_precision,
    multiclass_accuracy,
    multilabel_exact_match,
)

from vgen.checks import check_number
from vgen.recognition.detection import temporal_iou_loss


def classification_loss(logits: Tensor, targets: Tensor, multi_label: bool = False, smoothing: float = 0.0) -> Tensor:
    """Cross entropy of each clip; with several labels, the mean of the binary ones.

    Args:
        logits: `(b, k)`.
        targets: Probabilities of the classes `(b, k)`; with `multi_label`, each from 0 to 1.
        multi_label: Whether a clip may have several labels.
        smoothing: Share of the targets that is spread evenly over all classes, or, with `multi_label`, over both
            outcomes (label smoothing, arXiv 1512.00567).

    Returns:
        Losses `(b,)`, in nats.

    Raises:
        ValueError: `smoothing` is not in [0, 1].
    """
    check_number("smoothing", smoothing, 0, 1)
    logits = logits.float()
    if multi_label:
        targets = targets * (1 - smoothing) + smoothing / 2
        return F.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(-1)
    targets = targets * (1 - smoothing) + smoothing / logits.shape[-1]
    return F.cross_entropy(logits, targets, reduction="none")


def frame_loss(logits: Tensor, targets: Tensor, real: Tensor, iou_weight: float = 0.0) -> Tensor:
    """Loss of the labels of frames: binary cross entropy over real frames, and the temporal IoU loss.

    Args:
        logits: `(b, f, k)`.
        targets: 1 for the labels of each frame and 0 for others, `(b, f, k)`.
        real: 1 for real frames and 0 for padding, `(b, f)`.
        iou_weight: Weight of `vgen.recognition.detection.temporal_iou_loss`.

    Returns:
        Losses `(b,)`.

    Raises:
        ValueError: `iou_weight` is negative.
    """
    check_number("iou_weight", iou_weight, 0)
    logits, real = logits.float(), real.float()
    each = F.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(-1)
    loss = (each * real).sum(1) / real.sum(1).clamp_min(1)
    return loss + iou_weight * temporal_iou_loss(logits.sigmoid(), targets, real.bool()) if iou_weight else loss


def mixup(clip: Tensor, targets: Tensor, alpha: float, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Blends each clip and its targets with those of the previous clip of the batch.

    Args:
        clip: `(b, c, f, h, w)`. All frames of a clip are blended alike.
        targets: `(b, k)`.
        alpha: The shares are drawn from Beta(alpha, alpha); 0 changes nothing.
        rng: Source of the shares.

    Returns:
        Clips and targets of the same shapes.

    Raises:
        ValueError: `alpha` is negative.

    Source: mixup: Beyond empirical risk minimization, arXiv 1710.09412.
    """
    check_number("mixup", alpha, 0)
    if alpha == 0:
        return clip, targets
    share = torch.from_numpy(rng.beta(alpha, alpha, len(clip))).to(clip)
    mixed = clip.roll(1, 0).lerp(clip, share.view(-1, 1, 1, 1, 1))
    return mixed, targets.roll(1, 0).lerp(targets, share[:, None].to(targets))


def classification_scores(probabilities: Tensor, targets: Tensor, multi_label: bool = False) -> dict[str, float]:
    """Scores in [0, 1] of the probabilities of clips.

    Args:
        probabilities: `(b, k)`.
        targets: 1 for the labels of each clip and 0 for others, `(b, k)`.
        multi_label: Whether a clip may have several labels.

    Returns:
        `accuracy` and, as the mean over the classes that occur, `mean_class_accuracy`; with `multi_label`
        `mean_average_precision` and `exact_match`, the share of clips with the right labels at a probability of 0.5.
    """
    count = targets.shape[1]
    if multi_label:
        occurring = [index for index in range(count) if targets[:, index].any()]
        each = [binary_average_precision(probabilities[:, index], targets[:, index].long()) for index in occurring]
        exact = multilabel_exact_match(probabilities, targets.long(), num_labels=count)
        return {"mean_average_precision": torch.stack(each).mean().item(), "exact_match": exact.item()}
    labels = targets.argmax(1)
    scores = {"accuracy": "micro", "mean_class_accuracy": "macro"}
    return {
        name: multiclass_accuracy(probabilities, labels, num_classes=count, average=average).item()  # type: ignore[arg-type]
        for name, average in scores.items()
    }
