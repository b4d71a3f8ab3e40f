"""Temporal metrics of a video without a reference: motion, warping error, flicker, drift, seams.

Clips are `(b, 3, f, h, w)` in [-1, 1]. Values of pixels count from 0 (black) to 1 (white).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from vgen.checks import check_integer, check_number
from vgen.temporal.flow import LUMINANCE, FlowMethod, Motion, measure_motion


def warping_error(clip: Tensor, method: FlowMethod = "dis", motion: Motion | None = None) -> Tensor:
    """Computes the mean squared difference between each frame and the next one warped to it, over visible pixels.

    Args:
        clip: Clips with at least 2 frames.
        method: Method of `vgen.temporal.flow.optical_flow`.
        motion: Motion of the clips; `None` estimates it.

    Returns:
        Errors `(b,)`; 0 for a clip without visible pixels.

    Raises:
        ValueError: A clip has fewer than 2 frames, or has values that are not finite.

    Source: Learning blind video temporal consistency, arXiv 1808.00449.
    """
    check_clip(clip, 2)
    motion = measure_motion(clip, method) if motion is None else motion
    visible = motion.visible[:, 0]
    error = ((motion.warp_next(clip.float()) - clip[:, :, :-1]) / 2).square().mean(1) * visible
    return error.sum((1, 2, 3)) / visible.sum((1, 2, 3)).clamp_min(1)


def motion_magnitude(clip: Tensor, method: FlowMethod = "dis", motion: Motion | None = None) -> Tensor:
    """Computes the mean length of the flow between frames, `(b,)` in pixels; arguments as in `warping_error`."""
    check_clip(clip, 2)
    motion = measure_motion(clip, method) if motion is None else motion
    return motion.flow.norm(dim=1).mean((1, 2, 3))


def flicker(clip: Tensor) -> Tensor:
    """Computes how unsteady the brightness is, `(b,)`: the mean absolute second difference of the frames' means.

    A linear fade gives 0.

    Raises:
        ValueError: A clip has fewer than 3 frames, or has values that are not finite.
    """
    check_clip(clip, 3)
    return statistics(clip)["brightness"].diff(n=2, dim=1).abs().mean(1)


def statistics(clip: Tensor) -> dict[str, Tensor]:
    """Computes brightness, contrast, saturation and sharpness of each frame, `(b, f)` each.

    Brightness is the mean and contrast the standard deviation of all values. Saturation is the mean of
    `1 - min / max` over a pixel's channels, as in HSV. Sharpness is the standard deviation of the Laplacian of the
    luminance.
    """
    pixels = (clip.float() + 1) / 2
    greatest, least = pixels.amax(1), pixels.amin(1)
    luminance = torch.einsum("b c f h w, c -> b f h w", pixels, pixels.new_tensor(LUMINANCE))
    kernel = pixels.new_tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]])[None, None]
    laplacian = F.conv2d(rearrange(luminance, "b f h w -> (b f) 1 h w"), kernel)
    return {
        "brightness": pixels.mean((1, 3, 4)),
        "contrast": pixels.std((1, 3, 4), correction=0),
        "saturation": ((greatest - least) / greatest.clamp_min(1e-6)).mean((2, 3)),
        "sharpness": laplacian.view(*luminance.shape[:2], -1).std(2, correction=0),
    }


def drift_slopes(clip: Tensor) -> dict[str, Tensor]:
    """Fits a line to each of the `statistics` over time and returns its slope per 100 frames, `(b,)`.

    Raises:
        ValueError: A clip has fewer than 2 frames, or has values that are not finite.
    """
    check_clip(clip, 2)
    time = torch.arange(clip.shape[2], device=clip.device, dtype=torch.float32) / 100
    time = time - time.mean()
    return {name: (value * time).sum(1) / time.square().sum() for name, value in statistics(clip).items()}


def start_end_difference(clip: Tensor, share: float = 0.15) -> dict[str, Tensor]:
    """Computes the absolute difference of each of the `statistics` between start and end of a video, `(b,)`.

    Args:
        clip: Clips with at least 2 frames.
        share: Fraction of the frames that counts as the start, and as the end.

    Raises:
        ValueError: A clip has fewer than 2 frames, has values that are not finite, or `share` is not in (0, 0.5].

    Source: The drift measure of FramePack, arXiv 2504.12626.
    """
    check_clip(clip, 2)
    check_number("share", share)
    if not 0 < share <= 0.5:
        raise ValueError(f"share must be in (0, 0.5], got {share}")
    count = max(1, int(clip.shape[2] * share))
    values = statistics(clip)
    return {name: (value[:, :count].mean(1) - value[:, -count:].mean(1)).abs() for name, value in values.items()}


def seam_ratio(clip: Tensor, chunk: int, compression: int = 4) -> Tensor:
    """Computes the ratio of the two `border_differences`, `(b,)`: above 1, seams between chunks are visible.

    Arguments and errors are those of `border_differences`. The ratio of a still video is NaN.
    """
    at_chunks, elsewhere = border_differences(clip, chunk, compression)
    return at_chunks / elsewhere


def border_differences(clip: Tensor, chunk: int, compression: int = 4) -> tuple[Tensor, Tensor]:
    """Computes the mean absolute difference of adjacent frames across borders of chunks, and elsewhere, `(b,)` each.

    "Elsewhere" means across the other borders of latents. In chunks of one latent there are none, so differences
    within latents are used; the result then includes what the VAE does at the borders of its latents.

    Args:
        clip: Clips that begin with the first frame of the video, which is a latent of its own.
        chunk: Latents per chunk. The first frame is not part of a chunk.
        compression: Frames per latent.

    Raises:
        ValueError: There are too few frames for both kinds of border, or values that are not finite.
    """
    check_integer("chunk", chunk, 1)
    check_integer("compression", compression, 1)
    check_clip(clip, 2)
    change = (clip[:, :, 1:].float() - clip[:, :, :-1].float()).abs().mean(
        (1, 3, 4)
    ) / 2  # change i: from frame i to i + 1
    last = torch.arange(1, change.shape[1])
    if chunk > 1:
        last = last[last % compression == 0]  # change k crosses the border after latent frame k
    is_chunk = last % (compression * chunk) == 0
    if not is_chunk.any() or is_chunk.all():
        raise ValueError(
            f"too few frames: {clip.shape[2]} frames in chunks of {chunk} latents with {compression} frames each do "
            "not have both kinds of border"
        )
    return change[:, last[is_chunk]].mean(1), change[:, last[~is_chunk]].mean(1)


def check_clip(clip: Tensor, min_frames: int) -> None:
    """Checks the shape and the values of clips.

    Raises:
        ValueError: The clips are not `(b, 3, f, h, w)`, have fewer than `min_frames` frames, or have values that are
            not finite.
    """
    if clip.ndim != 5 or clip.shape[1] != 3:
        raise ValueError(f"clips must be (b, 3, f, h, w), got {tuple(clip.shape)}")
    if clip.shape[2] < min_frames:
        raise ValueError(f"clips must have at least {min_frames} frames, got {clip.shape[2]}")
    if not torch.isfinite(clip).all():
        raise ValueError("the clips contain values that are not finite")
