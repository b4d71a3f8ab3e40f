"""What sharpens a VAE beside its reconstruction error: a discriminator of patches in space and time."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vgen.models.vae import CausalVideoVAE


class PatchDiscriminator(nn.Sequential):
    """Judges overlapping patches of clips `(b, 3, f, h, w)`: logits `(b, 1, f', h', w')`, high for real ones.

    Args:
        dim: Channels of the first layer; the next ones have twice and four times as many.

    Source: Image-to-image translation with conditional adversarial networks, arXiv 1611.07004 (PatchGAN), with
        convolutions over time as well.
    """

    def __init__(self, dim: int = 32):
        layers: list[nn.Module] = [nn.Conv3d(3, dim, (3, 4, 4), (1, 2, 2), 1), nn.LeakyReLU(0.2)]
        for channels in (dim, 2 * dim):
            # norms of single clips: what a batch holds must not matter
            layers += [
                nn.Conv3d(channels, 2 * channels, (3, 4, 4), (1, 2, 2), 1, bias=False),
                nn.GroupNorm(8, 2 * channels),
                nn.LeakyReLU(0.2),
            ]
        super().__init__(*layers, nn.Conv3d(4 * dim, 1, 3, 1, 1))


class Judged(NamedTuple):
    """A reconstruction and what the discriminator says; logits are `None` before it takes part."""

    sample: Tensor
    latent_dist: Any
    real: Tensor | None = None
    """Of the clip, with a gradient to the discriminator."""
    fake: Tensor | None = None
    """Of the reconstruction, with a gradient to the discriminator alone."""
    fooling: Tensor | None = None
    """Of the reconstruction, with a gradient to the VAE alone."""


class JudgedVAE(nn.Module):
    """A VAE with its discriminator, so that one `forward` and one backward pass train both.

    Args:
        vae: What is trained.
        discriminator: Its opponent.
    """

    def __init__(self, vae: CausalVideoVAE, discriminator: PatchDiscriminator):
        super().__init__()
        self.vae = vae
        self.discriminator = discriminator

    def forward(self, clip: Tensor, generator: Any = None, judge: bool = True) -> Judged:
        """Reconstructs clips `(b, 3, f, h, w)` in [-1, 1]; the discriminator takes part if `judge`."""
        out = self.vae(clip, generator=generator)
        if not judge:
            return Judged(out.sample, out.latent_dist)
        frozen = {name: weight.detach() for name, weight in self.discriminator.named_parameters()}
        return Judged(
            out.sample,
            out.latent_dist,
            real=self.discriminator(clip),
            fake=self.discriminator(out.sample.detach()),
            fooling=torch.func.functional_call(self.discriminator, frozen, (out.sample,)),
        )


def discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """The hinge loss of logits, a mean over patches.

    Source: Geometric GAN, arXiv 1705.02894.
    """
    return 0.5 * (F.relu(1 - real.float()).mean() + F.relu(1 + fake.float()).mean())


def adaptive_weight(error: Tensor, fooling: Tensor, last_layer: Tensor, largest: float = 1e4) -> Tensor:
    """What makes a generator's loss pull at the last layer as hard as the reconstruction error does.

    Source: Taming transformers for high-resolution image synthesis, arXiv 2012.09841.
    """
    pulls = [torch.autograd.grad(loss, last_layer, retain_graph=True)[0].norm() for loss in (error, fooling)]
    return (pulls[0] / (pulls[1] + 1e-4)).clamp(0, largest).detach()
