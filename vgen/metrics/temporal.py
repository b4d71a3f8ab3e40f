"""What happens over time in a video, without one to compare it with: motion, flicker, drift, seams.

Clips are `(b, 3, f, h, w)` in [-1, 1]; values are in units of the range of brightness, 0 for black and 1 for white.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from vgen.temporal.flow import LUMINANCE, Motion, measure_motion


def warping_error(clip: Tensor, method: str = "dis", motion: Motion | None = None) -> Tensor:
    """How much each frame differs from the next one fetched along their flow: the mean square over visible pixels.

    Args:
        clip: With 2 frames or more.
        method: Of `vgen.temporal.flow.optical_flow`.
        motion: In the clip, if it was measured already.

    Returns:
        `(b,)`; 0 where no pixel is visible in the next frame.

    Raises:
        ValueError: There is one frame only, or values are not finite.

    Source: Learning blind video temporal consistency, arXiv 1808.00449.
    """
    check_clip(clip, 2)
    motion = measure_motion(clip, method) if motion is None else motion
    visible = motion.visible[:, 0]
    error = ((motion.fetch_next(clip.float()) - clip[:, :, :-1]) / 2).square().mean(1) * visible
    return error.sum((1, 2, 3)) / visible.sum((1, 2, 3)).clamp_min(1)


def motion_magnitude(clip: Tensor, method: str = "dis", motion: Motion | None = None) -> Tensor:
    """The mean length of the flow from frame to frame, in pixels, `(b,)`; the rest as for `warping_error`."""
    check_clip(clip, 2)
    motion = measure_motion(clip, method) if motion is None else motion
    return motion.flow.norm(dim=1).mean((1, 2, 3))


def flicker(clip: Tensor) -> Tensor:
    """How unsteady brightness is: the mean size of the second difference of the frames' means, `(b,)`.

    A fade is steady and gives 0.

    Raises:
        ValueError: There are fewer than 3 frames, or values are not finite.
    """
    check_clip(clip, 3)
    return statistics(clip)["brightness"].diff(n=2, dim=1).abs().mean(1)


def statistics(clip: Tensor) -> dict[str, Tensor]:
    """Of each frame, `(b, f)`: mean (brightness), deviation (contrast), mean saturation, and sharpness.

    Saturation is `1 - least / greatest` of a pixel's colours, as in HSV. Sharpness is the deviation of the Laplacian
    of the luminance.
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
    """The slopes `(b,)` of lines through each of the `statistics` against time, per 100 frames.

    Raises:
        ValueError: There is one frame only, or values are not finite.
    """
    check_clip(clip, 2)
    time = torch.arange(clip.shape[2], device=clip.device, dtype=torch.float32) / 100
    time = time - time.mean()
    return {name: (value * time).sum(1) / time.square().sum() for name, value in statistics(clip).items()}


def start_end_difference(clip: Tensor, share: float = 0.15) -> dict[str, Tensor]:
    """How far each of the `statistics` is in the last part of a video from where it was in the first part, `(b,)`.

    Args:
        clip: With as many frames as make two such parts.
        share: Of the frames that each part has.

    Raises:
        ValueError: There is one frame only, values are not finite, or the parts would overlap.

    Source: The drift measure of FramePack, arXiv 2504.12626.
    """
    check_clip(clip, 2)
    if not 0 < share <= 0.5:
        raise ValueError(f"share={share} must be in (0, 0.5]")
    count = max(1, int(clip.shape[2] * share))
    found = statistics(clip)
    return {name: (value[:, :count].mean(1) - value[:, -count:].mean(1)).abs() for name, value in found.items()}


def seam_ratio(clip: Tensor, chunk: int, compression: int = 4) -> Tensor:
    """How much more frames differ across borders of chunks than elsewhere, `(b,)`.

    Arguments and errors as for `border_differences`; a video at rest has no ratio, but NaN.
    """
    at_chunks, elsewhere = border_differences(clip, chunk, compression)
    return at_chunks / elsewhere


def border_differences(clip: Tensor, chunk: int, compression: int = 4) -> tuple[Tensor, Tensor]:
    """How much neighbouring frames differ across borders of chunks, and elsewhere, `(b,)` each.

    Elsewhere is across other borders of latents; in chunks of one, which leave none, it is inside latents, so that
    what the VAE does at the borders of its latents counts too.

    Args:
        clip: With the video's first frame, which is a latent alone.
        chunk: Latents of a chunk; the first frame is no part of one.
        compression: Frames of a latent.

    Raises:
        ValueError: There are too few frames for both kinds of border, or values are not finite.
    """
    check_clip(clip, 2)
    change = (clip[:, :, 1:].float() - clip[:, :, :-1].float()).abs().mean((1, 3, 4)) / 2  # from frame i to i + 1
    last = torch.arange(1, change.shape[1], device=clip.device)
    if chunk > 1:
        last = last[last % compression == 0]  # last frames of latents
    is_chunk = last % (compression * chunk) == 0
    if not is_chunk.any() or is_chunk.all():
        raise ValueError(
            f"{clip.shape[2]} frames in chunks of {chunk} latents of {compression} frames have no border of each kind"
        )
    return change[:, last[is_chunk]].mean(1), change[:, last[~is_chunk]].mean(1)


def check_clip(clip: Tensor, least: int) -> None:
    """Refuses clips that say nothing about time.

    Raises:
        ValueError: They have another form, too few frames, or values that are not finite.
    """
    if clip.ndim != 5 or clip.shape[1] != 3:
        raise ValueError(f"clips must be (b, 3, f, h, w), not {tuple(clip.shape)}")
    if clip.shape[2] < least:
        raise ValueError(f"{clip.shape[2]} frames: at least {least} are needed")
    if not torch.isfinite(clip).all():
        raise ValueError("the clips hold values that are not finite")
