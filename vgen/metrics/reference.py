"""Metrics that compare a video with a reference: PSNR, SSIM, LPIPS."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

MIN_SSIM_SIZE = 6
"""Smallest height and width in pixels: the window of 11 pixels is reflected at the border."""


def psnr(generated: Tensor, true: Tensor) -> Tensor:
    """Computes the peak signal-to-noise ratio of each clip over all frames, `(b,)` in dB; infinite for equal clips.

    Args:
        generated: Generated clips, `(b, 3, f, h, w)` in [-1, 1].
        true: Reference clips of the same shape.

    Raises:
        ValueError: The shapes differ, or there are values that are not finite.
    """
    check_pair(generated, true)
    return peak_signal_noise_ratio(generated.float(), true.float(), data_range=2.0, reduction="none", dim=(1, 2, 3, 4))


def ssim(generated: Tensor, true: Tensor) -> Tensor:
    """Computes the structural similarity of each clip, `(b,)`: the mean over its frames; see `psnr` and `frame_ssim`.

    Source: Image quality assessment: from error visibility to structural similarity (Wang et al. 2004).
    """
    return frame_ssim(generated, true).mean(1)


def frame_psnr(generated: Tensor, true: Tensor) -> Tensor:
    """Computes the PSNR of each frame, `(b, f)`; see `psnr`."""
    check_pair(generated, true)
    a, b = (rearrange(x.float(), "b c f h w -> (b f) c h w") for x in (generated, true))
    values = peak_signal_noise_ratio(a, b, data_range=2.0, reduction="none", dim=(1, 2, 3))
    return values.view(len(generated), -1)


def frame_ssim(generated: Tensor, true: Tensor) -> Tensor:
    """Computes the structural similarity of each frame, `(b, f)`; see `psnr` for the arguments.

    Raises:
        ValueError: As in `psnr`, or the frames are smaller than half of the window.
    """
    check_pair(generated, true)
    if min(generated.shape[-2:]) < MIN_SSIM_SIZE:
        size = tuple(generated.shape[-2:])
        raise ValueError(f"SSIM needs frames of (h, w) = ({MIN_SSIM_SIZE}, {MIN_SSIM_SIZE}) or more, got {size}")
    a, b = (
        rearrange(x.float() / 2 + 0.5, "b c f h w -> (b f) c h w") for x in (generated, true)
    )  # SSIM depends on it
    values = structural_similarity_index_measure(a, b, data_range=1.0, reduction="none")
    assert isinstance(values, Tensor)  # it is a tuple only if the full map is requested
    return values.view(len(generated), -1)


class LPIPS(nn.Module):
    """LPIPS between clips, computed by the package `lpips`. It downloads its VGG weights at first use.

    Raises:
        ImportError: lpips or torchvision is not installed.

    Source: The unreasonable effectiveness of deep features as a perceptual metric, arXiv 1801.03924.
    """

    def __init__(self) -> None:
        super().__init__()
        try:
            import lpips
        except (ImportError, RuntimeError) as error:  # a torchvision for another torch fails at import
            raise ImportError(
                f"LPIPS needs lpips and a torchvision that matches this torch: pip install vgen[lpips] ({error})"
            ) from error
        self.network = lpips.LPIPS(net="vgg", verbose=False).eval().requires_grad_(False)

    def forward(self, generated: Tensor, true: Tensor) -> Tensor:
        """Computes the distance of each clip, `(b,)`: the mean over its frames; arguments and errors as in `psnr`."""
        check_pair(generated, true)
        frames = (rearrange(x, "b c f h w -> (b f) c h w") for x in (generated, true))
        return self.network(*frames).view(len(generated), -1).mean(1)


def check_pair(generated: Tensor, true: Tensor) -> None:
    """Checks that two batches of clips can be compared.

    Raises:
        ValueError: The shapes differ, or there are values that are not finite.
    """
    if generated.shape != true.shape or generated.ndim != 5:
        raise ValueError(
            f"both batches of clips must have the same shape (b, c, f, h, w), got {tuple(generated.shape)} and "
            f"{tuple(true.shape)}"
        )
    for name, clip in (("generated", generated), ("true", true)):
        if not torch.isfinite(clip).all():
            raise ValueError(f"the {name} clips contain values that are not finite")
