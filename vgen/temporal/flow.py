"""Optical flow between frames, warping along it, and where it can be trusted.

A flow `(b, 2, h, w)` says of each pixel of a first frame how far, in pixels, it has moved in a second one: channel 0
to the right, channel 1 down.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor

LUMINANCE = (0.299, 0.587, 0.114)
"""Weights of red, green and blue, ITU-R BT.601."""
FLOW_METHODS = ("dis", "farneback", "lucas_kanade", "raft")


@torch.no_grad()
def optical_flow(first: Tensor, second: Tensor, method: str = "dis") -> Tensor:
    """Where each pixel of a first frame is found in a second one.

    Args:
        first: `(b, 3, h, w)` in [-1, 1].
        second: The same shape.
        method: `dis`, `farneback` or `lucas_kanade` (pyramidal, a track from each pixel; where there is nothing to
            track the flow is 0) by OpenCV, on the CPU; `raft` by torchvision, on the frames' device.

    Returns:
        `(b, 2, h, w)` float32 in pixels, on the frames' device.

    Raises:
        ValueError: The method is unknown.
        ImportError: Its library is not installed.

    Source: Fast optical flow using dense inverse search, arXiv 1603.03590; Two-frame motion estimation based on
        polynomial expansion (Farneback 2003); Pyramidal implementation of the Lucas Kanade feature tracker (Bouguet
        2001); RAFT, arXiv 2003.12039.
    """
    if method not in FLOW_METHODS:
        raise ValueError(f"flow method {method!r} is none of {', '.join(FLOW_METHODS)}")
    if method == "raft":
        return _raft_flow(first, second)
    between = _opencv(method)
    gray = _to_gray(torch.cat([first, second]))
    flows = [between(one, other) for one, other in zip(gray[: len(first)], gray[len(first) :], strict=True)]
    flow = rearrange(torch.from_numpy(np.stack(flows)), "b h w c -> b c h w")
    return flow.to(first.device, torch.float32)


def warp(second: Tensor, flow: Tensor) -> Tensor:
    """The second frame, fetched along a flow to where the first frame has it; differentiable in both.

    Args:
        second: `(b, c, h, w)`.
        flow: From the first frame to the second, `(b, 2, h, w)`.

    Returns:
        `(b, c, h, w)`, bilinear; beyond the border stands the border's value.
    """
    height, width = flow.shape[-2:]
    flow = flow.to(torch.promote_types(flow.dtype, torch.float32))  # half precision would round places
    y, x = torch.meshgrid(
        torch.arange(height, device=flow.device, dtype=flow.dtype),
        torch.arange(width, device=flow.device, dtype=flow.dtype),
        indexing="ij",
    )
    # pixel centres, as `align_corners=False` counts them
    grid = torch.stack([(x + flow[:, 0] + 0.5) * 2 / width - 1, (y + flow[:, 1] + 0.5) * 2 / height - 1], dim=-1)
    fetched = F.grid_sample(second.to(grid.dtype), grid, padding_mode="border", align_corners=False)
    return fetched.to(second.dtype)


def visible(forward: Tensor, backward: Tensor, relative: float = 0.01, absolute: float = 0.5) -> Tensor:
    """Where a pixel of the first frame is seen in the second one too.

    It is where the flow ends inside the frame and the way back leads to its start: `|f + b|^2 < relative * (|f|^2 +
    |b|^2) + absolute`, with `b` read where `f` ends.

    Args:
        forward: Flow from the first frame to the second, `(b, 2, h, w)`.
        backward: Flow from the second frame to the first.
        relative: Error that is allowed, as a share of the squared lengths.
        absolute: Error that is allowed beside it, in pixels squared.

    Returns:
        `(b, 1, h, w)` bool.

    Source: Dense point trajectories by GPU-accelerated large displacement optical flow (Sundaram et al. 2010), with
        the constants of UnFlow, arXiv 1711.07837.
    """
    height, width = forward.shape[-2:]
    back = warp(backward, forward)
    lengths = forward.square().sum(1, keepdim=True) + back.square().sum(1, keepdim=True)
    returns = (forward + back).square().sum(1, keepdim=True) < relative * lengths + absolute
    x = forward[:, :1] + torch.arange(width, device=forward.device)
    y = forward[:, 1:] + torch.arange(height, device=forward.device)[:, None]
    return returns & (x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1)


class Motion(NamedTuple):
    """How a clip's content moves from each frame to the next one."""

    flow: Tensor
    """`(b, 2, f - 1, h, w)` in pixels."""
    visible: Tensor
    """Where it can be trusted, `(b, 1, f - 1, h, w)` in [0, 1]."""

    def scaled_down(self, factor: int) -> Motion:
        """The motion of frames whose sides are that much shorter; visible is what is so in all of a pixel."""
        spatial = "b c f (h y) (w x) -> b c f h w"
        flow = reduce(self.flow, spatial, "mean", y=factor, x=factor) / factor
        return Motion(flow, reduce(self.visible, spatial, "min", y=factor, x=factor))

    def fetch_next(self, clip: Tensor) -> Tensor:
        """Of a clip `(b, c, f, h, w)`, each next frame as `warp` fetches it, `(b, c, f - 1, h, w)`."""
        later, flow = (rearrange(x, "b c f h w -> (b f) c h w") for x in (clip[:, :, 1:], self.flow))
        return rearrange(warp(later, flow), "(b f) c h w -> b c f h w", b=len(clip))


def measure_motion(clip: Tensor, method: str = "dis") -> Motion:
    """The motion in a real clip `(b, 3, f, h, w)` in [-1, 1]."""
    frames = rearrange(clip, "b c f h w -> f b c h w")
    first, second = (x.flatten(0, 1) for x in (frames[:-1], frames[1:]))
    forward, backward = optical_flow(first, second, method), optical_flow(second, first, method)
    seen = visible(forward, backward).to(forward)
    return Motion(*(rearrange(x, "(f b) c h w -> b c f h w", b=len(clip)) for x in (forward, seen)))


def _to_gray(frames: Tensor) -> list[np.ndarray]:
    """Luminance of frames, uint8 `(h, w)`."""
    gray = torch.einsum("b c h w, c -> b h w", frames.float(), torch.tensor(LUMINANCE, device=frames.device))
    return list(gray.add(1).mul(127.5).round().clamp(0, 255).byte().cpu().numpy())


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
        # pyramid scale, levels, window, iterations, neighbourhood and its deviation as OpenCV's tutorial has them
        return lambda first, second: cv2.calcOpticalFlowFarneback(first, second, None, 0.5, 3, 15, 3, 5, 1.2, 0)  # type: ignore[call-overload]

    def tracks(first: np.ndarray, second: np.ndarray) -> np.ndarray:
        y, x = np.mgrid[: first.shape[0], : first.shape[1]]
        start = np.stack([x, y], axis=-1).astype(np.float32)
        end, found, _ = cv2.calcOpticalFlowPyrLK(first, second, start.reshape(-1, 1, 2), None)  # type: ignore[call-overload]
        found = found.reshape(*first.shape, 1).astype(bool)
        return np.where(found, end.reshape(start.shape) - start, 0.0)

    return tracks


@lru_cache(maxsize=2)
def _raft(device: torch.device) -> Any:
    try:
        from torchvision.models.optical_flow import Raft_Small_Weights, raft_small
    except (ImportError, RuntimeError) as error:  # a build for another torch breaks on import
        raise ImportError(
            f"raft flow needs torchvision that fits this torch, pip install vgen[raft]: {error}"
        ) from error
    return raft_small(weights=Raft_Small_Weights.DEFAULT).to(device).eval()


def _raft_flow(first: Tensor, second: Tensor) -> Tensor:
    """RAFT on frames brought to sides that it takes: multiples of 8, at least 128."""
    height, width = first.shape[-2:]
    size = [max(128, -(-side // 8) * 8) for side in (height, width)]
    one, other = (F.interpolate(x.float(), size=size, mode="bilinear", antialias=True) for x in (first, second))
    flow = F.interpolate(_raft(first.device)(one, other)[-1], size=(height, width), mode="bilinear", antialias=True)
    return flow * flow.new_tensor([width / size[1], height / size[0]])[:, None, None]
