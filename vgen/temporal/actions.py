"""Actions: a vector for each pixel frame, which leads from the frame before it to this one. Frame 0 has none.

Axes: `b` videos, `f` pixel frames, `a` channels of an action, `n` token frames.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from vgen.temporal.grid import LatentGrid


def read_actions(actions: Any, dim: int, num_videos: int, num_frames: int | None, name: str = "actions") -> Tensor:
    """Actions of videos as `(b, f, a)`, float32.

    Args:
        actions: An array or tensor `(f, a)` for all videos, or `(b, f, a)`. For `a = 1`, `(f,)` does, too.
        dim: `a`; 0 for a checkpoint without actions.
        num_videos: `b`.
        num_frames: `f`; `None` takes any number.
        name: Name of the argument, for errors.

    Raises:
        ValueError: The checkpoint was trained without actions, the shape is another one, or a value is not finite.
    """
    if not dim:
        raise ValueError(f"{name} must be None: this checkpoint was trained without actions")
    try:
        given = torch.as_tensor(actions if isinstance(actions, Tensor) else np.asarray(actions)).float()
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must be an array of numbers, got {type(actions).__name__}") from error
    if given.ndim == 1 and dim == 1:
        given = given[:, None]
    expected = f"({'frames' if num_frames is None else num_frames}, {dim})"
    fits = given.ndim in (2, 3) and given.shape[-1] == dim and given.shape[-2] == (num_frames or given.shape[-2])
    if not fits or given.ndim == 3 and len(given) != num_videos:
        several = f" or ({num_videos}, {expected[1:]}" if num_videos > 1 or given.ndim == 3 else ""
        raise ValueError(f"{name} must have shape {expected}{several}, got {tuple(given.shape)}")
    if not given.isfinite().all():
        raise ValueError(f"{name} must be finite numbers, got NaN or infinity")
    return given.expand(num_videos, *given.shape[-2:])


def unknown_actions(num_videos: int, num_frames: int, dim: int) -> Tensor:
    """Actions `(b, f, a)` of frames whose actions are unknown: NaN."""
    return torch.full((num_videos, num_frames, dim), torch.nan)


def pack_actions(actions: Tensor, grid: LatentGrid, started: bool = False) -> Tensor:
    """Concatenates the actions of the pixel frames of each token frame.

    The first token frame of a video lacks some frames. Its actions are unknown if it is frame 0 alone; otherwise those
    of frame 0 and of the frames that it lacks are zero.

    Args:
        actions: `(b, f, a)` of frames that fill whole token frames; that of frame 0 is not read.
        grid: How frames correspond.
        started: Whether token frames precede them.

    Returns:
        `(b, n, grid.unit * a)`.
    """
    b, _, dim = actions.shape
    if not started:
        fill = torch.nan if grid.first == 1 else 0.0
        missing = actions.new_full((b, grid.unit - grid.first + 1, dim), fill)
        actions = torch.cat([missing, actions[:, 1:]], dim=1)
    return actions.reshape(b, -1, grid.unit * dim)
