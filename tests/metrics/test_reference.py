import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from vgen.metrics.reference import LPIPS, psnr, ssim


@pytest.fixture
def clips():
    generator = torch.Generator().manual_seed(0)
    true = torch.rand(2, 3, 4, 32, 32, generator=generator) * 2 - 1
    return true, (true + 0.1 * torch.randn(true.shape, generator=generator)).clamp(-1, 1)


def test_psnr_is_its_formula_for_each_clip(clips):
    true, generated = clips
    expected = 10 * torch.log10(4 / (generated - true).square().mean((1, 2, 3, 4)))
    torch.testing.assert_close(psnr(generated, true), expected)
    assert psnr(true, true).isinf().all()


def test_ssim_of_a_clip_is_the_mean_over_its_frames(clips):
    true, generated = clips
    whole = ssim(generated, true)
    each = torch.stack([ssim(generated[:, :, k : k + 1], true[:, :, k : k + 1]) for k in range(4)])
    torch.testing.assert_close(whole, each.mean(0))
    torch.testing.assert_close(ssim(true, true), torch.ones(2))
    assert (whole < 1).all()


def test_ssim_is_that_of_frames_from_black_to_white():
    gray = torch.full((1, 3, 1, 32, 32), 0.5)
    other = gray + 0.1
    # of uniform frames, its term of luminance alone is left: (2 a b + c) / (a^2 + b^2 + c), c = (0.01 * range)^2
    expected = (2 * 0.5 * 0.6 + 1e-4) / (0.5**2 + 0.6**2 + 1e-4)
    assert ssim(2 * gray - 1, 2 * other - 1).item() == pytest.approx(expected, abs=1e-4)


def test_lpips_sees_the_frames_of_each_clip(clips, monkeypatch):
    class Network(nn.Module):
        def __init__(self, net, verbose):
            super().__init__()
            assert net == "vgg"

        def forward(self, a, b):
            assert a.shape == b.shape == (8, 3, 32, 32)
            return (a - b).square().mean((1, 2, 3), keepdim=True)

    monkeypatch.setitem(sys.modules, "lpips", SimpleNamespace(LPIPS=Network))
    true, generated = clips
    torch.testing.assert_close(LPIPS()(generated, true), (generated - true).square().mean((1, 2, 3, 4)))


def test_missing_lpips_raises_with_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(ImportError, match=r"LPIPS needs lpips .* pip install vgen\[lpips\]"):
        LPIPS()


@pytest.mark.parametrize("metric", [psnr, ssim, "lpips"])
def test_clips_that_cannot_be_compared_raise(metric, clips, monkeypatch):
    if metric == "lpips":
        monkeypatch.setitem(sys.modules, "lpips", SimpleNamespace(LPIPS=lambda net, verbose: nn.Identity()))
        metric = LPIPS()
    true, generated = clips
    for wrong in (generated[:1], generated[:, :, :3], generated[..., :16], generated[0]):
        with pytest.raises(ValueError, match="must have the same shape"):
            metric(wrong, true)
    generated[1, 0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="the generated clips contain values that are not finite"):
        metric(generated, true)


def test_frames_too_small_for_ssim_raise():
    small = torch.zeros(1, 3, 2, 5, 40)
    with pytest.raises(ValueError, match=r"SSIM needs frames of \(h, w\) = \(6, 6\) or more, got \(5, 40\)"):
        ssim(small, small)
    assert ssim(torch.zeros(1, 3, 2, 6, 40), torch.zeros(1, 3, 2, 6, 40)).item() == pytest.approx(1)
