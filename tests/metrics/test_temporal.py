import numpy as np
import pytest
import torch
import torch.nn.functional as F

from vgen.metrics.temporal import (
    drift_slopes,
    flicker,
    motion_magnitude,
    seam_ratio,
    start_end_difference,
    statistics,
    warping_error,
)


def texture(size=64):
    generator = torch.Generator().manual_seed(0)
    return F.interpolate(torch.rand(1, 3, 24, 24, generator=generator) * 2 - 1, size=size, mode="bicubic")


@pytest.fixture
def moving():
    """A texture that moves 3 pixels to the right and 4 down a frame: 5 pixels."""
    canvas = texture(128).clamp(-1, 1)
    return torch.stack([canvas[..., 60 - 4 * k : 108 - 4 * k, 60 - 3 * k : 108 - 3 * k] for k in range(5)], dim=2)


def flat(values):
    """Frames of one gray each, given in [0, 1]."""
    return (torch.tensor(values).float() * 2 - 1).view(1, 1, -1, 1, 1).expand(1, 3, -1, 16, 16)


def test_motion_is_measured_in_pixels(moving):
    inner = motion_magnitude(moving)
    assert inner.shape == (1,) and inner.item() == pytest.approx(5, abs=0.5)
    assert motion_magnitude(moving[:, :, :1].expand(-1, -1, 5, -1, -1)).item() == pytest.approx(0, abs=1e-3)


def test_moving_textures_warp_well_and_noise_does_not(moving):
    generator = torch.Generator().manual_seed(0)
    noisy = moving + 0.2 * torch.randn(moving.shape, generator=generator)
    clean, dirty = warping_error(moving).item(), warping_error(noisy).item()
    # two frames' noise of variance 0.2^2, in units of half the range, less what bilinear fetching averages
    assert clean < 1e-3 and 0.3 * 0.02 < dirty < 1.3 * 0.02
    still = moving[:, :, :1].expand(-1, -1, 5, -1, -1)
    assert warping_error(still).item() < 1e-8


def test_a_fade_does_not_flicker_and_a_blinking_light_does():
    assert flicker(flat(np.linspace(0.2, 0.8, 9))).item() < 1e-6
    assert flicker(flat([0.4, 0.6] * 4)).item() == pytest.approx(0.4, abs=1e-5)  # +0.2 - (-0.2)


def test_statistics_are_their_formulas():
    red = torch.tensor([1.0, -1.0, -1.0]).view(1, 3, 1, 1, 1).expand(1, 3, 2, 8, 8)
    actual = statistics(red)
    assert actual["brightness"].tolist() == [[pytest.approx(1 / 3)] * 2]
    assert actual["contrast"].tolist() == [[pytest.approx(2**0.5 / 3)] * 2]
    assert actual["saturation"].tolist() == [[1.0, 1.0]] and actual["sharpness"].abs().max() < 1e-6
    gray = statistics(flat([0.25, 0.75]))
    assert gray["brightness"].tolist() == [[0.25, 0.75]] and gray["saturation"].abs().max() == 0
    board = torch.ones(1, 3, 1, 8, 8)
    board[..., ::2, 1::2] = board[..., 1::2, ::2] = -1
    assert statistics(board)["sharpness"].item() == pytest.approx(4)  # the Laplacian is 4 and -4 in turns
    blurred = F.avg_pool3d(texture(16)[:, :, None], (1, 3, 3), 1)
    assert statistics(blurred)["sharpness"] < statistics(texture(16)[:, :, None, 1:-1, 1:-1])["sharpness"]


def test_slopes_are_those_of_numpys_lines():
    values = np.random.default_rng(0).uniform(0.2, 0.8, 30)
    expected = np.polyfit(np.arange(30) / 100, values, 1)[0]
    assert drift_slopes(flat(values))["brightness"].item() == pytest.approx(expected, abs=1e-4)
    assert drift_slopes(flat(np.linspace(0, 0.5, 51)))["brightness"].item() == pytest.approx(1.0, abs=1e-4)
    assert abs(drift_slopes(flat([0.5] * 20))["contrast"].item()) < 1e-6


def test_the_ends_of_a_video_are_compared():
    clip = flat([0.2] * 3 + [0.9] * 14 + [0.5] * 3)
    assert start_end_difference(clip)["brightness"].item() == pytest.approx(0.3, abs=1e-5)
    with pytest.raises(ValueError, match=r"share must be in \(0, 0.5\], got 0.6"):
        start_end_difference(clip, 0.6)


def test_seams_are_where_chunks_meet():
    # latent k holds frames 4k-3 .. 4k; chunks of two latents end at frames 8, 16, 24
    values = np.zeros(33)
    for frame in range(33):
        values[frame] = 0.1 * ((frame + 3) // 4) / 10  # every border of latents changes by 0.01
    values[9:] += 0.01
    values[17:] += 0.01
    values[25:] += 0.01
    assert seam_ratio(flat(values), chunk=2).item() == pytest.approx(2.0, rel=1e-3)
    assert seam_ratio(flat(np.arange(33) / 40), chunk=2).item() == pytest.approx(1.0, rel=1e-3)
    with pytest.raises(ValueError, match="do not have both kinds"):
        seam_ratio(flat([0.1] * 8), chunk=2)


def test_seams_of_chunks_of_one_latent_are_against_the_inside_of_latents():
    frames = np.arange(33)
    values = 0.005 * frames + 0.01 * ((frames + 3) // 4)  # 0.005 everywhere, and 0.015 across borders of latents
    assert seam_ratio(flat(values), chunk=1).item() == pytest.approx(3.0, rel=1e-3)
    assert seam_ratio(flat(frames / 40), chunk=1).item() == pytest.approx(1.0, rel=1e-3)
    for compression, count in ((1, 33), (4, 5)):  # nothing inside, or no border
        with pytest.raises(ValueError, match="do not have both kinds"):
            seam_ratio(flat([0.1] * count), chunk=1, compression=compression)


def seams(clip):
    return seam_ratio(clip, chunk=2)


@pytest.mark.parametrize(
    "metric", [warping_error, motion_magnitude, flicker, drift_slopes, start_end_difference, seams]
)
def test_invalid_clips_raise(metric, moving):
    with pytest.raises(ValueError, match="must have at least . frames, got 1"):
        metric(moving[:, :, :1])
    with pytest.raises(ValueError, match="must be"):
        metric(moving[0])
    moving[0, 0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        metric(moving)


@pytest.mark.parametrize("metric", [warping_error, motion_magnitude, flicker])
def test_a_constant_video_gives_zero(metric):
    assert metric(flat([0.3] * 4)).item() == pytest.approx(0, abs=1e-6)


def test_a_constant_video_neither_drifts_nor_has_a_seam_ratio():
    still = flat([0.3] * 33)
    for measured in (drift_slopes(still), start_end_difference(still)):
        assert all(value.item() == pytest.approx(0, abs=1e-5) for value in measured.values())
    assert seams(still).isnan().all()  # nothing over nothing
