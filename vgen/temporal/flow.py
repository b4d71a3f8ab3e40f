"""Optical flow between frames, warping along it, and visibility masks.

A flow `(b, 2, h, w)` is the displacement, in pixels, of each pixel of a first frame to its position in a second frame.
Channel 0 points right and channel 1 points down.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor

from vgen.checks import check_choice
from vgen.io.pixels import to_uint8

LUMINANCE = (0.299, 0.587, 0.114)
"""Weights of red, green and blue, ITU-R BT.601."""
FlowMethod = Literal["dis", "farneback", "lucas_kanade", "raft"]


@torch.no_grad()
def optical_flow(first: Tensor, second: Tensor, method: FlowMethod = "dis") -> Tensor:
    """Estimates the optical flow from a first frame to a second one.

    Args:
        first: First frames, `(b, 3, h, w)` in [-1, 1].
        second: Second frames, of the same shape.
        method: `dis`, `farneback` or `lucas_kanade` (OpenCV, on the CPU), or `raft` (torchvision, on the frames'
            device). `lucas_kanade` is pyramidal and tracks every pixel; the flow of pixels that it loses is 0.

    Returns:
        Flow `(b, 2, h, w)` in pixels, float32, on the frames' device.

    Raises:
        ValueError: The method is unknown, or the frames have another shape.
        ImportError: The library of the method is not installed.

    Source: Fast optical flow using dense inverse search, arXiv 1603.03590; Two-frame motion estimation based on
        polynomial expansion (Farneback 2003); Pyramidal implementation of the Lucas Kanade feature tracker (Bouguet
        2001); RAFT, arXiv 2003.12039.
    """
    check_choice("flow method", method, FlowMethod)
    if first.shape != second.shape or first.ndim != 4 or first.shape[1] != 3:
        raise ValueError(f"both frames must be (b, 3, h, w), got {tuple(first.shape)} and {tuple(second.shape)}")
    if method == "raft":
        return _raft_flow(first, second)
    estimate = _opencv(method)
    gray = _to_gray(torch.cat([first, second]))
    flows = [estimate(a, b) for a, b in zip(gray[: len(first)], gray[len(first) :], strict=True)]
    flow = rearrange(torch.from_numpy(np.stack(flows)), "b h w c -> b c h w")
    return flow.to(first.device, torch.float32)


def warp(second: Tensor, flow: Tensor) -> Tensor:
    """Warps the second frame back to the first frame along the flow. Differentiable in both arguments.

    Args:
        second: Second frames, `(b, c, h, w)`.
        flow: Flow from the first frame to the second, `(b, 2, h, w)`.

    Returns:
        Warped frames `(b, c, h, w)`, interpolated bilinearly. Positions outside the frame take the border's value.
    """
    height, width = flow.shape[-2:]
    flow = flow.to(torch.promote_types(flow.dtype, torch.float32))  # half precision would round positions
    y, x = torch.meshgrid(
        torch.arange(height, device=flow.device, dtype=flow.dtype),
        torch.arange(width, device=flow.device, dtype=flow.dtype),
        indexing="ij",
    )
    # pixel centers in the convention of `align_corners=False`
    grid = torch.stack([(x + flow[:, 0] + 0.5) * 2 / width - 1, (y + flow[:, 1] + 0.5) * 2 / height - 1], dim=-1)
    warped = F.grid_sample(second.to(grid.dtype), grid, padding_mode="border", align_corners=False)
    return warped.to(second.dtype)


def visible(forward: Tensor, backward: Tensor, relative: float = 0.01, absolute: float = 0.5) -> Tensor:
    """Computes which pixels of the first frame are also visible in the second one.

    A pixel is visible if the forward flow `f` ends inside the frame and the backward flow `b` at that point leads back
    to the start: `|f + b|^2 < relative * (|f|^2 + |b|^2) + absolute`.

    Args:
        forward: Flow from the first frame to the second, `(b, 2, h, w)`.
        backward: Flow from the second frame to the first, `(b, 2, h, w)`.
        relative: Allowed error relative to the squared lengths of the flows.
        absolute: Allowed absolute error, in squared pixels.

    Returns:
        Mask `(b, 1, h, w)`, bool.

    Source: Dense point trajectories by GPU-accelerated large displacement optical flow (Sundaram et al. 2010), with
        the constants of UnFlow, arXiv 1711.07837.
    """
    height, width = forward.shape[-2:]
    at_target = warp(backward, forward)
    lengths = forward.square().sum(1, keepdim=True) + at_target.square().sum(1, keepdim=True)
    consistent = (forward + at_target).square().sum(1, keepdim=True) < relative * lengths + absolute
    x = forward[:, :1] + torch.arange(width, device=forward.device)
    y = forward[:, 1:] + torch.arange(height, device=forward.device)[:, None]
    return consistent & (x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1)


class Motion(NamedTuple):
    """Optical flow from each frame of a clip to the next one, with a visibility mask."""

    flow: Tensor
    """Flow `(b, 2, f - 1, h, w)`, in pixels."""
    visible: Tensor
    """Mask `(b, 1, f - 1, h, w)` in [0, 1]: 1 where a pixel is also visible in the next frame."""

    def scaled_down(self, factor: int) -> Motion:
        """Returns the motion at a resolution `factor` times lower. A pixel is visible if all its source pixels are."""
        spatial = "b c f (h y) (w x) -> b c f h w"
        flow = reduce(self.flow, spatial, "mean", y=factor, x=factor) / factor
        return Motion(flow, reduce(self.visible, spatial, "min", y=factor, x=factor))

    def warp_next(self, clip: Tensor) -> Tensor:
        """Warps each frame after the first of a clip `(b, c, f, h, w)` to its predecessor: `(b, c, f - 1, h, w)`."""
        later, flow = (rearrange(x, "b c f h w -> (b f) c h w") for x in (clip[:, :, 1:], self.flow))
        return rearrange(warp(later, flow), "(b f) c h w -> b c f h w", b=len(clip))


def measure_motion(clip: Tensor, method: FlowMethod = "dis") -> Motion:
    """Estimates the motion in a clip `(b, 3, f, h, w)` in [-1, 1]; arguments and errors as in `optical_flow`."""
    frames = rearrange(clip, "b c f h w -> f b c h w")
    first, second = (x.flatten(0, 1) for x in (frames[:-1], frames[1:]))
    forward, backward = optical_flow(first, second, method), optical_flow(second, first, method)
    mask = visible(forward, backward).to(forward)
    return Motion(*(rearrange(x, "(f b) c h w -> b c f h w", b=len(clip)) for x in (forward, mask)))


def _to_gray(frames: Tensor) -> list[np.ndarray]:
    """Converts frames `(b, 3, h, w)` in [-1, 1] to a list of uint8 luminance images `(h, w)`."""
    gray = torch.einsum("b c h w, c -> b h w", frames.float(), torch.tensor(LUMINANCE, device=frames.device))
    return list(to_uint8(gray).cpu().numpy())


@lru_cache(maxsize=4)
def _opencv(method: str) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    try:
        import cv2
    except ImportError as error:
        raise ImportError(f"{method} flow needs OpenCV: pip install vgen[flow]") from error
    if method == "dis":
        search = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
        search.setFinestScale(0)  # small frames need every pixel
        return lambda first, second: search.calc(first, second, None)  # type: ignore[call-overload]
    if method == "farneback":
        # pyramid scale, levels, window, iterations, neighborhood and its deviation from OpenCV's tutorial
        return lambda first, second: cv2.calcOpticalFlowFarneback(first, second, None, 0.5, 3, 15, 3, 5, 1.2, 0)  # type: ignore[call-overload]

    def track(first: np.ndarray, second: np.ndarray) -> np.ndarray:
        y, x = np.mgrid[: first.shape[0], : first.shape[1]]
        start = np.stack([x, y], axis=-1).astype(np.float32)
        end, found, _ = cv2.calcOpticalFlowPyrLK(first, second, start.reshape(-1, 1, 2), None)  # type: ignore[call-overload]
        found = found.reshape(*first.shape, 1).astype(bool)
        return np.where(found, end.reshape(start.shape) - start, 0.0)

    return track


@lru_cache(maxsize=2)
def _raft(device: torch.device) -> Any:
    try:
        from torchvision.models.optical_flow import Raft_Small_Weights, raft_small
    except (ImportError, RuntimeError) as error:  # a build for another torch breaks on import
        raise ImportError(
            f"raft flow needs a torchvision that matches this torch: pip install vgen[raft] ({error})"
        ) from error
    return raft_small(weights=Raft_Small_Weights.DEFAULT).to(device).eval()


def _raft_flow(first: Tensor, second: Tensor) -> Tensor:
    """Runs RAFT on frames resized to sides that it supports: multiples of 8, at least 128."""
    height, width = first.shape[-2:]
    size = [max(128, -(-side // 8) * 8) for side in (height, width)]
    a, b = (F.interpolate(x.float(), size=size, mode="bilinear", antialias=True) for x in (first, second))
    flow = F.interpolate(_raft(first.device)(a, b)[-1], size=(height, width), mode="bilinear", antialias=True)
    return flow * flow.new_tensor([width / size[1], height / size[0]])[:, None, None]
