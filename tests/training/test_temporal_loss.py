import pytest
import torch
import torch.nn.functional as F

from vgen.checks import check_literals
from vgen.temporal.flow import Motion, measure_motion
from vgen.training.temporal_loss import TemporalLossConfig, temporal_loss


@pytest.fixture
def moving():
    """A smooth texture `(2, 3, 5, 48, 48)` that moves 2 pixels to the right and 1 down a frame."""
    generator = torch.Generator().manual_seed(0)
    canvas = F.interpolate(torch.rand(2, 3, 24, 24, generator=generator) * 2 - 1, size=72, mode="bicubic")
    return torch.stack([canvas[..., 12 - k : 60 - k, 12 - 2 * k : 60 - 2 * k] for k in range(5)], dim=2)


def still_motion(video):
    b, _, f, h, w = video.shape
    return Motion(torch.zeros(b, 2, f - 1, h, w), torch.ones(b, 1, f - 1, h, w))


def test_terms_match_their_formulas():
    generator = torch.Generator().manual_seed(0)
    video, real = torch.randn(2, 2, 2, 3, 4, 4, generator=generator)
    config = TemporalLossConfig(difference_weight=2.0, warping_weight=3.0, matched_weight=5.0)
    change, wanted = video[:, :, 1:] - video[:, :, :-1], real[:, :, 1:] - real[:, :, :-1]
    # with no flow the second term is the first
    expected = 5 * change.abs().mean((1, 2, 3, 4)) + 5 * (change - wanted).abs().mean((1, 2, 3, 4))
    torch.testing.assert_close(temporal_loss(config, video, real, still_motion(video)), expected)


def test_a_true_clip_agrees_along_its_motion(moving):
    motion = measure_motion(moving)
    along = temporal_loss(TemporalLossConfig(warping_weight=1.0), moving, moving, motion)
    across = temporal_loss(TemporalLossConfig(difference_weight=1.0), moving, moving)
    assert (along < 0.15 * across).all()
    assert motion.visible.mean() > 0.8


def test_matched_differences_are_zero_for_the_real_clip_only(moving):
    config = TemporalLossConfig(matched_weight=1.0)
    assert (temporal_loss(config, moving, moving) == 0).all()
    assert (temporal_loss(config, moving + 0.5, moving) < 1e-6).all()  # a shift of brightness is no change in time
    assert (temporal_loss(config, moving.flip(2), moving) > 0.05).all()


def test_pairs_of_weight_zero_and_hidden_pixels_carry_no_loss(moving):
    broken = moving.clone()
    broken[:, :, 4] = 1.0
    weight = torch.ones(2, 4)
    weight[:, 3] = 0
    config = TemporalLossConfig(difference_weight=1.0, matched_weight=1.0)
    whole = temporal_loss(config, moving[:, :, :4], moving[:, :, :4])
    torch.testing.assert_close(temporal_loss(config, broken, moving, weight=weight), whole)

    motion = still_motion(moving)
    hidden = Motion(motion.flow, torch.zeros_like(motion.visible))
    warping = TemporalLossConfig(warping_weight=1.0)
    assert (temporal_loss(warping, moving, moving, hidden) == 0).all()
    assert (temporal_loss(warping, moving, moving, motion) > 0).all()


def test_weights_scale_the_losses(moving):
    config = TemporalLossConfig(difference_weight=1.0)
    half = temporal_loss(config, moving, moving, weight=torch.full((2, 4), 0.5))
    torch.testing.assert_close(half, 0.5 * temporal_loss(config, moving, moving))


def test_gradients_reach_every_frame(moving):
    for name in ("difference_weight", "warping_weight", "matched_weight"):
        video = (moving + 0.1 * torch.randn(moving.shape, generator=torch.Generator().manual_seed(1))).requires_grad_()
        loss = temporal_loss(TemporalLossConfig(**{name: 1.0}), video, moving, measure_motion(moving))
        (gradient,) = torch.autograd.grad(loss.sum(), video)
        assert (gradient.abs().amax((0, 1, 3, 4)) > 0).all(), name


def test_scaled_down_motion_moves_by_fewer_pixels(moving):
    motion = measure_motion(moving).scaled_down(8)
    assert motion.flow.shape == (2, 2, 4, 6, 6)
    middle = motion.flow[..., 2:4, 2:4].mean((0, 2, 3, 4))
    torch.testing.assert_close(middle, torch.tensor([2.0, 1.0]) / 8, atol=0.02, rtol=0)
    assert set(motion.visible.unique().tolist()) <= {0.0, 1.0}


def test_wrong_settings_are_named():
    with pytest.raises(ValueError, match="warping_weight must be a finite number of at least 0, got -1.0"):
        TemporalLossConfig(warping_weight=-1.0).check_temporal_loss()
    with pytest.raises(ValueError, match="flow must be one of 'dis', .*, got 'nearest'"):
        check_literals(TemporalLossConfig(flow="nearest"))
