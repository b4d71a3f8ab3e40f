import math
import random

import pytest
import torch

from vgen.recognition.detection import (
    Segment,
    average_precision,
    mean_average_precision,
    segments_of,
    suppress,
    temporal_iou,
    temporal_iou_loss,
)


def test_the_iou_of_segments():
    for (a, b), (c, d), expected in [((0, 2), (1, 3), 1 / 3), ((0, 2), (2, 3), 0), ((0, 4), (1, 2), 1 / 4),
                                     ((0, 1), (0, 1), 1), ((1, 1), (1, 1), 0)]:  # fmt: skip
        assert temporal_iou(Segment("x", a, b), Segment("x", c, d)) == pytest.approx(expected)
        assert temporal_iou(Segment("x", c, d), Segment("x", a, b)) == pytest.approx(expected)


def test_the_loss_of_hard_predictions_is_one_minus_the_iou():
    targets = torch.zeros(3, 8, 2)
    targets[0, 2:6, 0] = targets[1, 0:4, 1] = targets[1, :, 0] = 1
    predicted = torch.zeros(3, 8, 2)
    predicted[0, 4:8, 0] = predicted[0, :, 1] = predicted[1, 0:4, 1] = 1  # a class that does not occur costs nothing
    loss = temporal_iou_loss(predicted, targets)
    torch.testing.assert_close(loss, torch.tensor([1 - 2 / 6, (1 + 0) / 2, 0.0]))
    mask = torch.arange(8) < torch.tensor([[6], [8], [8]])
    torch.testing.assert_close(temporal_iou_loss(predicted, targets, mask)[0], torch.tensor(1 - 2 / 4))


def test_the_loss_is_least_for_the_truth_and_has_gradients():
    torch.manual_seed(0)
    targets = (torch.rand(2, 8, 3) > 0.5).float()
    assert temporal_iou_loss(targets, targets).abs().max() < 1e-6
    logits = torch.zeros(2, 8, 3, requires_grad=True)
    temporal_iou_loss(logits.sigmoid(), targets).sum().backward()
    assert (logits.grad[targets > 0] < 0).all() and (logits.grad[targets == 0] > 0).all()


def test_suppression_keeps_the_best_of_overlapping_segments_of_a_label():
    best, near, far = Segment("a", 0, 4, 0.9), Segment("a", 1, 5, 0.8), Segment("a", 4, 8, 0.3)
    other = Segment("b", 0, 4, 0.5)
    assert suppress([near, far, best, other]) == [best, other, far]
    assert suppress([near, far, best, other], threshold=0.6) == [best, near, other, far]
    with pytest.raises(ValueError, match="threshold"):
        suppress([], threshold=2)


def test_segments_are_runs_of_high_probability():
    probabilities = torch.zeros(10, 2)
    probabilities[2:5, 0], probabilities[7:10, 1] = 0.9, 0.3
    found = segments_of([index / 2 for index in range(11)], probabilities, ["a", "b"])
    assert [one[:3] for one in found] == [("a", 1.0, 2.5), ("b", 3.5, 5.0)]
    assert [one.score for one in found] == pytest.approx([0.9, 0.3])
    assert segments_of([0.0, 0.5, 1.0], torch.zeros(2, 2), ["a", "b"]) == []


def test_average_precision_of_a_known_ranking():
    true = {"v": [Segment("a", 0, 2), Segment("a", 4, 6)], "w": [Segment("a", 0, 2), Segment("b", 0, 9)]}
    found = {
        "v": [Segment("a", 0, 2, 0.9), Segment("a", 0, 2, 0.8), Segment("a", 4, 6, 0.5)],  # the second is a duplicate
        "w": [Segment("a", 3, 5, 0.7)],  # wrong, and one is not found
    }
    assert average_precision(found, true, "a", 0.5) == pytest.approx((1 / 1 + 2 / 4) / 3)
    assert math.isnan(average_precision(found, true, "c", 0.5)) and average_precision(found, true, "b", 0.5) == 0
    assert average_precision(found, true, "a", 1.0) == pytest.approx((1 / 1 + 2 / 4) / 3)
    assert average_precision({}, true, "a", 0.5) == 0


def brute_force(found, true, label, iou):
    """The area under the monotonic precision over recall, threshold by threshold."""
    wanted = sum(one.label == label for segments in true.values() for one in segments)
    points = [(0.0, 0.0)]
    for least in sorted({one.score for segments in found.values() for one in segments}, reverse=True):
        hits = count = 0
        for video, segments in found.items():
            free = [one for one in true[video] if one.label == label]
            for one in sorted(segments, key=lambda one: -one.score):
                if one.label == label and one.score >= least:
                    count += 1
                    match = max(free, key=lambda other: temporal_iou(one, other), default=None)
                    if match is not None and temporal_iou(one, match) >= iou:
                        hits += 1
                        free.remove(match)
        points.append((hits / wanted, hits / max(1, count)))
    area = 0.0
    for index in range(1, len(points)):
        height = max(precision for recall, precision in points if recall >= points[index][0])
        area += (points[index][0] - points[index - 1][0]) * height
    return area


@pytest.mark.parametrize("seed", range(5))
def test_average_precision_is_the_area_under_precision_and_recall(seed):
    rng = random.Random(seed)

    def segments(scored):
        for _ in range(6):
            start = rng.uniform(0, 10)
            yield Segment(rng.choice("ab"), start, start + rng.uniform(1, 3), rng.random() if scored else 1.0)

    true = {video: list(segments(False)) for video in "vw"}
    found = {video: list(segments(True)) for video in "vw"}
    for label in {one.label for part in true.values() for one in part}:
        for iou in (0.1, 0.3):
            assert average_precision(found, true, label, iou) == pytest.approx(brute_force(found, true, label, iou))


def test_the_mean_is_over_labels_and_thresholds():
    true = {"v": [Segment("a", 0, 2), Segment("b", 0, 2)]}
    scores = mean_average_precision({"v": [Segment("a", 0, 1, 0.5)]}, true, (0.4, 0.6))
    assert scores == {"mAP@0.4": 0.5, "mAP@0.6": 0.0, "mAP": 0.25}
    with pytest.raises(ValueError, match="at least one true segment"):
        mean_average_precision({}, {"v": []})
