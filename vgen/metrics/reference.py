"""How near videos come to the ones they should be: PSNR, SSIM, LPIPS."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

SSIM_LEAST = 6
"""Pixels of a frame's side; its window of 11 is reflected at the border."""


def psnr(made: Tensor, true: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each clip over all its frames, in dB; infinite where nothing differs.

    Args:
        made: `(b, 3, f, h, w)` in [-1, 1].
        true: The same shape.

    Raises:
        ValueError: Shapes differ, or values are not finite.
    """
    check_pair(made, true)
    return peak_signal_noise_ratio(made.float(), true.float(), data_range=2.0, reduction="none", dim=(1, 2, 3, 4))


def ssim(made: Tensor, true: Tensor) -> Tensor:
    """Structural similarity of each clip, the mean over its frames; arguments and errors as for `psnr`.

    Source: Image quality assessment: from error visibility to structural similarity (Wang et al. 2004).
    """
    return frame_ssim(made, true).mean(1)


def frame_psnr(made: Tensor, true: Tensor) -> Tensor:
    """As `psnr`, of each frame: `(b, f)`."""
    check_pair(made, true)
    a, b = (rearrange(x.float(), "b c f h w -> (b f) c h w") for x in (made, true))
    values = peak_signal_noise_ratio(a, b, data_range=2.0, reduction="none", dim=(1, 2, 3))
    return values.view(len(made), -1)


def frame_ssim(made: Tensor, true: Tensor) -> Tensor:
    """As `ssim`, of each frame: `(b, f)`.

    Raises:
        ValueError: As for `ssim`, or frames are smaller than half of its window.
    """
    check_pair(made, true)
    if min(made.shape[-2:]) < SSIM_LEAST:
        raise ValueError(f"frames of {made.shape[-2]}x{made.shape[-1]}: SSIM needs {SSIM_LEAST}x{SSIM_LEAST} or more")
    a, b = (rearrange(x.float() / 2 + 0.5, "b c f h w -> (b f) c h w") for x in (made, true))  # which it depends on
    values = structural_similarity_index_measure(a, b, data_range=1.0, reduction="none")
    assert isinstance(values, Tensor)  # a tuple only if the whole map is asked for
    return values.view(len(made), -1)


class LPIPS(nn.Module):
    """LPIPS between clips, by the package `lpips`, which fetches its VGG weights once.

    Raises:
        ImportError: It or torchvision is not installed.

    Source: The unreasonable effectiveness of deep features as a perceptual metric, arXiv 1801.03924.
    """

    def __init__(self) -> None:
        super().__init__()
        try:
            import lpips
        except (ImportError, RuntimeError) as error:  # torchvision for another torch breaks on import
            raise ImportError(
                f"LPIPS needs lpips and torchvision that fits this torch: pip install vgen[lpips] ({error})"
            ) from error
        self.network = lpips.LPIPS(net="vgg", verbose=False).eval().requires_grad_(False)

    def forward(self, made: Tensor, true: Tensor) -> Tensor:
        """The distance of each clip, the mean over its frames; arguments and errors as for `psnr`."""
        check_pair(made, true)
        frames = (rearrange(x, "b c f h w -> (b f) c h w") for x in (made, true))
        return self.network(*frames).view(len(made), -1).mean(1)


def check_pair(made: Tensor, true: Tensor) -> None:
    """Refuses clips that cannot be compared.

    Raises:
        ValueError: Shapes differ, or values are not finite.
    """
    if made.shape != true.shape or made.ndim != 5:
        raise ValueError(f"clips of {tuple(made.shape)} and {tuple(true.shape)}: both must be (b, c, f, h, w) alike")
    for name, clip in (("made", made), ("true", true)):
        if not torch.isfinite(clip).all():
            raise ValueError(f"the {name} clips hold values that are not finite")
