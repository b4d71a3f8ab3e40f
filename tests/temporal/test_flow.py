import math
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from vgen.temporal import flow as flow_module
from vgen.temporal.flow import optical_flow, visible, warp

cv2 = pytest.importorskip("cv2")


@pytest.fixture
def texture():
    """Smooth random frames `(2, 3, 96, 96)`, trackable everywhere, and a larger canvas that they are cut from."""
    generator = torch.Generator().manual_seed(0)
    canvas = torch.rand(2, 3, 32, 32, generator=generator) * 2 - 1
    return F.interpolate(canvas, size=128, mode="bicubic").clamp(-1, 1)


def cut(canvas, right, down):
    return canvas[..., 16 - down : 112 - down, 16 - right : 112 - right]


def rotation(size, degrees):
    """The flow of a rotation about the middle of a frame: its closed form."""
    angle = math.radians(degrees)
    y, x = torch.meshgrid(torch.arange(size) - (size - 1) / 2, torch.arange(size) - (size - 1) / 2, indexing="ij")
    moved = x * math.cos(angle) - y * math.sin(angle), x * math.sin(angle) + y * math.cos(angle)
    return torch.stack([moved[0] - x, moved[1] - y])[None]


@pytest.mark.parametrize("method", ["dis", "farneback", "lucas_kanade"])
@pytest.mark.parametrize(("right", "down"), [(3, -2), (0, 4), (-5, 1)])
def test_flow_finds_a_translation(texture, method, right, down):
    flow = optical_flow(cut(texture, 0, 0), cut(texture, right, down), method)
    assert flow.shape == (2, 2, 96, 96)
    error = flow[..., 12:-12, 12:-12] - torch.tensor([right, down]).view(1, 2, 1, 1)
    assert error.norm(dim=1).median() < 0.2
    assert error.norm(dim=1).quantile(0.95) < 0.75


@pytest.mark.parametrize("method", ["dis", "farneback", "lucas_kanade"])
def test_flow_finds_a_rotation(texture, method):
    first = cut(texture, 0, 0)
    # the rotated frame has at p the pixel at the position that p rotates back to
    second = warp(first, rotation(96, -4).expand(2, -1, -1, -1))
    error = optical_flow(first, second, method) - rotation(96, 4)
    assert error[..., 16:-16, 16:-16].norm(dim=1).median() < 0.3


@pytest.mark.parametrize(("right", "down"), [(3, -2), (-7, 5)])
def test_warping_undoes_a_translation_exactly(texture, right, down):
    flow = torch.tensor([right, down]).float().view(1, 2, 1, 1).expand(2, 2, 96, 96)
    back = warp(cut(texture, right, down), flow)
    torch.testing.assert_close(back[..., 8:-8, 8:-8], cut(texture, 0, 0)[..., 8:-8, 8:-8], atol=1e-4, rtol=0)


def test_warping_undoes_a_rotation(texture):
    first = cut(texture, 0, 0)
    second = warp(first, rotation(96, -4).expand(2, -1, -1, -1))
    back = warp(second, rotation(96, 4).expand(2, -1, -1, -1))
    inner = slice(12, -12)
    assert (back - first)[..., inner, inner].abs().mean() < 0.1 * (second - first)[..., inner, inner].abs().mean()


def test_warping_is_differentiable():
    generator = torch.Generator().manual_seed(0)
    frame = torch.randn(1, 2, 6, 5, dtype=torch.double, generator=generator, requires_grad=True)
    # between pixels, where bilinear interpolation has a derivative, and inside the frame
    flow = torch.rand(1, 2, 6, 5, dtype=torch.double, generator=generator) * 0.4 + 0.2
    flow[..., -1, :], flow[..., :, -1] = -0.3, -0.3
    assert torch.autograd.gradcheck(warp, (frame, flow.requires_grad_()))


def test_pixels_that_a_moving_object_covers_are_not_visible():
    forward, backward = torch.zeros(1, 2, 32, 32), torch.zeros(1, 2, 32, 32)
    forward[:, 0, 8:24, 4:12] = 6.0  # a rectangle that moves 6 pixels to the right over a background at rest
    backward[:, 0, 8:24, 10:18] = -6.0
    seen = visible(forward, backward)[0, 0]
    covered = torch.zeros(32, 32, dtype=torch.bool)
    covered[8:24, 12:18] = True
    assert torch.equal(~seen, covered)


def test_pixels_that_leave_the_frame_are_not_visible():
    forward = torch.tensor([5.0, 0.0]).view(1, 2, 1, 1).expand(1, 2, 16, 16)
    seen = visible(forward, -forward)[0, 0]
    assert seen[:, :11].all()
    assert not seen[:, 11:].any()


def test_inconsistent_flow_is_not_visible():
    forward = torch.zeros(1, 2, 16, 16)
    assert not visible(forward, torch.full((1, 2, 16, 16), 2.0)).any()


def test_unknown_methods_wrong_shapes_and_missing_libraries_raise(monkeypatch):
    frame = torch.zeros(1, 3, 16, 16)
    with pytest.raises(
        ValueError, match="flow method must be one of 'dis', 'farneback', 'lucas_kanade', 'raft', got 'nearest'"
    ):
        optical_flow(frame, frame, "nearest")
    with pytest.raises(ValueError, match=r"must be \(b, 3, h, w\), got \(1, 3, 16, 16\) and \(1, 3, 16, 8\)"):
        optical_flow(frame, frame[..., :8])
    monkeypatch.setitem(sys.modules, "torchvision.models.optical_flow", None)
    with pytest.raises(ImportError, match="raft flow needs a torchvision"):
        optical_flow(frame, frame, "raft")


@pytest.mark.parametrize(("height", "width"), [(96, 64), (132, 256)])
def test_raft_gets_supported_sides_and_its_flow_is_in_pixels_of_the_original_frames(monkeypatch, height, width):
    sides = {96: 128, 64: 128, 132: 136, 256: 256}
    seen = []

    class Raft(torch.nn.Module):
        """Replaces torchvision's network: each frame moves right by a quarter of its width and down by an eighth."""

        def forward(self, first, second):
            seen.append((first, second))
            moved = torch.tensor([first.shape[-1] / 4, first.shape[-2] / 8]).view(1, 2, 1, 1)
            return [torch.zeros(len(first), 2, *first.shape[-2:]), moved.expand(len(first), 2, *first.shape[-2:])]

    name = "torchvision.models.optical_flow"
    fake = SimpleNamespace(raft_small=lambda weights: Raft(), Raft_Small_Weights=SimpleNamespace(DEFAULT=None))
    for module in ("torchvision", "torchvision.models", name):
        monkeypatch.setitem(sys.modules, module, fake)
    flow_module._raft.cache_clear()
    frames = torch.rand(2, 2, 3, height, width) * 2 - 1
    actual = optical_flow(*frames, "raft")
    flow_module._raft.cache_clear()
    torch.testing.assert_close(actual, torch.tensor([width / 4, height / 8]).view(1, 2, 1, 1).expand_as(actual))
    for given, brought in zip(frames, seen[0], strict=True):
        assert brought.shape == (2, 3, sides[height], sides[width]) and brought.abs().max() <= 1
        torch.testing.assert_close(brought.mean((-2, -1)), given.mean((-2, -1)), atol=0.02, rtol=0)


def test_missing_opencv_raises_with_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    flow_module._opencv.cache_clear()
    with pytest.raises(ImportError, match=r"dis flow needs OpenCV: pip install vgen\[flow\]"):
        optical_flow(torch.zeros(1, 3, 16, 16), torch.zeros(1, 3, 16, 16))


def test_half_precision_warps_from_the_right_positions():
    """bfloat16 would round positions in a frame of width 480 by a quarter of a pixel and more."""
    frame = torch.linspace(-1, 1, 480)[None, None, None].expand(1, 1, 4, 480)
    flow = torch.full((1, 2, 4, 480), 0.5)
    exact = warp(frame, flow)
    assert (warp(frame.bfloat16(), flow.bfloat16()).float() - exact).abs().max() < 2**-8
