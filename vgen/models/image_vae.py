"""A 2D image VAE with the interface of a video VAE. It processes each frame independently.

Axes: `b` videos, `c` channels, `n` frames, `h w` rows and columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKLOutput
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from einops import rearrange
from torch import Tensor

from vgen.hub import locate
from vgen.models.loading import load_strictly
from vgen.models.vae import CausalVideoVAE
from vgen.temporal.state import TemporalState

FRAMES_PER_SLICE = 8
"""Frames that `decode_stream` decodes at once."""


class PerFrameVAE:
    """Wraps a 2D VAE in the interface of `CausalVideoVAE` that `VideoGenPipeline` uses.

    Args:
        vae: VAE of an image pipeline. It is not changed.
    """

    temporal_compression_ratio = 1

    def __init__(self, vae: AutoencoderKL):
        self.vae = vae
        self.spatial_compression_ratio = 2 ** (len(vae.config.block_out_channels) - 1)

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the weights."""
        return self.vae.dtype

    def encode(self, clip: Tensor, state: TemporalState | None = None) -> AutoencoderKLOutput:
        """Encodes frames independently.

        Args:
            clip: Pixels `(b, 3, n, h, w)` in [-1, 1].
            state: Ignored, because frames are independent.

        Returns:
            An output whose `latent_dist` is the posterior of raw latents `(b, c, n, h', w')`.
        """
        frames = self.vae.encode(rearrange(clip, "b c n h w -> (b n) c h w")).latent_dist.parameters
        parameters = rearrange(frames, "(b n) c h w -> b c n h w", b=clip.shape[0])
        return AutoencoderKLOutput(latent_dist=DiagonalGaussianDistribution(parameters))

    def decode(self, latents: Tensor, state: TemporalState | None = None, clamp: bool = True) -> DecoderOutput:
        """Decodes frames independently.

        Args:
            latents: Raw latents `(b, c, n, h', w')`.
            state: Ignored, because frames are independent.
            clamp: Whether to clamp pixels to [-1, 1].

        Returns:
            An output whose `sample` has pixels `(b, 3, n, h, w)`.
        """
        frames = self.vae.decode(rearrange(latents, "b c n h w -> (b n) c h w")).sample
        frames = frames.clamp(-1, 1) if clamp else frames
        return DecoderOutput(sample=rearrange(frames, "(b n) c h w -> b c n h w", b=latents.shape[0]))

    def decode_stream(self, latents: Tensor) -> Iterator[Tensor]:
        """Decodes raw latents a few frames at a time; yields pixels `(b, 3, n, h, w)`."""
        for part in latents.split(FRAMES_PER_SLICE, dim=2):
            yield self.decode(part).sample

    def normalize(self, latents: Tensor) -> Tensor:
        """Converts raw latents to the normalized ones that the denoiser uses."""
        return (latents - (self.vae.config.shift_factor or 0)) * self.vae.config.scaling_factor

    def denormalize(self, latents: Tensor) -> Tensor:
        """Converts normalized latents back to raw ones."""
        return latents / self.vae.config.scaling_factor + (self.vae.config.shift_factor or 0)


def load_vae(source: str | Path) -> CausalVideoVAE | AutoencoderKL:
    """Loads a VAE of the class that its config names.

    Args:
        source: A folder or Hub id of a VAE, or of a pipeline with a `vae` subfolder, or a packaged checkpoint.

    Raises:
        ValueError: There is no such folder, the weights are pickled, or do not match the config.
    """
    config, options = _find_config(source)
    if config["_class_name"] == "AutoencoderKL":
        return load_strictly(AutoencoderKL.from_pretrained, "AutoencoderKL", locate(source), **options)
    return CausalVideoVAE.from_pretrained(locate(source), **options)


def vae_config(source: str | Path) -> dict[str, Any]:
    """The config of a VAE, without its weights; arguments and errors as in `load_vae`."""
    return _find_config(source)[0]


def _find_config(source: str | Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The config of a VAE, and the options with which its folder is found."""
    place = str(locate(source))
    try:
        return CausalVideoVAE.load_config(place), {}
    except OSError:
        options = {"subfolder": "vae"}
        return CausalVideoVAE.load_config(place, **options), options


def as_video_vae(vae: CausalVideoVAE | AutoencoderKL) -> CausalVideoVAE | PerFrameVAE:
    """Returns the object that encodes and decodes videos: a video VAE itself, or an image VAE in `PerFrameVAE`."""
    return PerFrameVAE(vae) if isinstance(vae, AutoencoderKL) else vae
