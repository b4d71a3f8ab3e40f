import numpy as np
import pytest
import torch
from torch.nn import functional as F

from vgen.recognition.objective import classification_loss, classification_scores, mixup


def test_the_loss_is_the_cross_entropy_of_pytorch():
    logits, labels = torch.randn(5, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 3, 3])
    targets = F.one_hot(labels, 4).float()
    for smoothing in (0.0, 0.1):
        expected = F.cross_entropy(logits, labels, label_smoothing=smoothing, reduction="none")
        torch.testing.assert_close(classification_loss(logits, targets, smoothing=smoothing), expected)
    expected = F.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(1)
    torch.testing.assert_close(classification_loss(logits, targets, multi_label=True), expected)


def test_smoothed_labels_are_least_costly_at_their_probabilities():
    targets = torch.tensor([[1.0, 0.0]])
    for multi_label, best in ((False, torch.tensor([[0.9, 0.1]]).log()), (True, torch.tensor([[0.9, 0.1]]).logit())):
        best = best.clone().requires_grad_()
        classification_loss(best, targets, multi_label, smoothing=0.2).sum().backward()
        torch.testing.assert_close(best.grad, torch.zeros(1, 2), atol=1e-6, rtol=0)


def test_mixed_clips_and_targets_have_the_same_shares():
    """Clip i is constant i and has target i, so both show their shares."""
    clip = torch.arange(4.0).view(4, 1, 1, 1, 1).expand(-1, 3, 2, 4, 4)
    mixed, targets = mixup(clip, torch.eye(4), 0.5, np.random.default_rng(0))
    assert all(len(one.unique()) == 1 for one in mixed)  # all frames alike
    torch.testing.assert_close(mixed[:, 0, 0, 0, 0], targets @ torch.arange(4.0))
    torch.testing.assert_close(targets.sum(1), torch.ones(4))
    assert ((targets > 0).sum(1) == 2).all() and not torch.equal(targets, torch.eye(4))
    assert mixup(clip, torch.eye(4), 0.0, np.random.default_rng(0))[0] is clip
    again, _ = mixup(clip, torch.eye(4), 0.5, np.random.default_rng(0))
    assert torch.equal(again, mixed)


def test_scores_of_one_and_of_several_labels():
    probabilities = torch.tensor([[0.7, 0.2, 0.1], [0.6, 0.3, 0.1], [0.1, 0.8, 0.1], [0.5, 0.4, 0.1]])
    labels = F.one_hot(torch.tensor([0, 0, 1, 1]), 3).float()
    scores = classification_scores(probabilities, labels)
    assert scores == pytest.approx({"accuracy": 0.75, "mean_class_accuracy": 0.75})
    # the clips of class 0 are at ranks 1 and 4, those of class 1 at ranks 1 and 2; no clip has class 2
    ranked = torch.tensor([[0.9, 0.2, 0.1], [0.1, 0.3, 0.1], [0.4, 0.8, 0.1], [0.5, 0.4, 0.1]])
    expected = ((1 / 1 + 2 / 4) / 2 + 1.0) / 2
    exact = ((ranked >= 0.5) == labels.bool()).all(1).float().mean().item()
    found = classification_scores(ranked, labels, True)
    assert found == pytest.approx({"mean_average_precision": expected, "exact_match": exact})


@pytest.mark.parametrize("call", [lambda x: classification_loss(x, x, smoothing=1.5),
                                  lambda x: mixup(x, x, -1.0, np.random.default_rng(0))])  # fmt: skip
def test_shares_out_of_range_are_refused(call):
    with pytest.raises(ValueError, match="smoothing|mixup"):
        call(torch.rand(2, 3))
