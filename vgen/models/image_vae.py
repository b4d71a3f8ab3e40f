"""A 2D autoencoder where the pipeline expects a video's: each frame by itself, time as it is.

Axes: `b` videos, `c` channels, `n` frames, `h w` rows and columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKLOutput
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from einops import rearrange
from torch import Tensor

from vgen.models.loading import load_strictly
from vgen.models.vae import CausalVideoVAE
from vgen.temporal.state import TemporalState

PIECE = 8
"""Frames that are decoded at once in a stream."""


class PerFrameVAE:
    """What `VideoGenPipeline` asks of a VAE, by a 2D one that it does not change.

    Args:
        vae: Of an image pipeline.
    """

    temporal_compression_ratio = 1

    def __init__(self, vae: AutoencoderKL):
        self.vae = vae
        self.spatial_compression_ratio = 2 ** (len(vae.config.block_out_channels) - 1)

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self.vae.dtype

    def encode(self, clip: Tensor, state: TemporalState | None = None) -> AutoencoderKLOutput:
        """Pixels `(b, 3, n, h, w)` to a distribution over latents `(b, c, n, h', w')`; frames need no state."""
        frames = self.vae.encode(rearrange(clip, "b c n h w -> (b n) c h w")).latent_dist.parameters
        parameters = rearrange(frames, "(b n) c h w -> b c n h w", b=clip.shape[0])
        return AutoencoderKLOutput(latent_dist=DiagonalGaussianDistribution(parameters))

    def decode(self, latents: Tensor, state: TemporalState | None = None, clamp: bool = True) -> DecoderOutput:
        """Raw latents `(b, c, n, h', w')` to pixels `(b, 3, n, h, w)`; frames need no state."""
        frames = self.vae.decode(rearrange(latents, "b c n h w -> (b n) c h w")).sample
        frames = frames.clamp(-1, 1) if clamp else frames
        return DecoderOutput(sample=rearrange(frames, "(b n) c h w -> b c n h w", b=latents.shape[0]))

    def decode_stream(self, latents: Tensor) -> Iterator[Tensor]:
        """Yields the pixels of `decode` piece by piece."""
        for piece in latents.split(PIECE, dim=2):
            yield self.decode(piece).sample

    def normalize(self, latents: Tensor) -> Tensor:
        """Raw latents as the denoiser sees them."""
        return (latents - (self.vae.config.shift_factor or 0)) * self.vae.config.scaling_factor

    def denormalize(self, latents: Tensor) -> Tensor:
        """The inverse of `normalize`."""
        return latents / self.vae.config.scaling_factor + (self.vae.config.shift_factor or 0)


def load_vae(source: str | Path) -> CausalVideoVAE | AutoencoderKL:
    """The VAE of a folder or Hub id, or of the pipeline there, by the class that its config names.

    Raises:
        ValueError: Its weights are pickled, or do not fit its config.
    """
    options: dict[str, str] = {}
    try:
        config = CausalVideoVAE.load_config(str(source))
    except OSError:
        options = {"subfolder": "vae"}
        config = CausalVideoVAE.load_config(str(source), **options)
    if config["_class_name"] == "AutoencoderKL":
        return load_strictly(AutoencoderKL.from_pretrained, "AutoencoderKL", source, **options)
    return CausalVideoVAE.from_pretrained(source, **options)


def as_video_vae(vae: CausalVideoVAE | AutoencoderKL) -> CausalVideoVAE | PerFrameVAE:
    """What encodes and decodes videos with a VAE's weights."""
    return PerFrameVAE(vae) if isinstance(vae, AutoencoderKL) else vae
