"""A patch discriminator in space and time, and the adversarial losses that sharpen a VAE's reconstructions."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vgen.models.vae import CausalVideoVAE


class PatchDiscriminator(nn.Sequential):
    """Classifies overlapping patches of clips `(b, 3, f, h, w)`: logits `(b, 1, f', h', w')`, high for real ones.

    Args:
        dim: Channels of the first layer. The second layer has twice and the third four times as many.

    Source: Image-to-image translation with conditional adversarial networks, arXiv 1611.07004 (PatchGAN), with
        convolutions over time as well.
    """

    def __init__(self, dim: int = 32):
        layers: list[nn.Module] = [nn.Conv3d(3, dim, (3, 4, 4), (1, 2, 2), 1), nn.LeakyReLU(0.2)]
        for channels in (dim, 2 * dim):
            # GroupNorm, because the logits of a clip must not depend on the rest of the batch
            layers += [
                nn.Conv3d(channels, 2 * channels, (3, 4, 4), (1, 2, 2), 1, bias=False),
                nn.GroupNorm(8, 2 * channels),
                nn.LeakyReLU(0.2),
            ]
        super().__init__(*layers, nn.Conv3d(4 * dim, 1, 3, 1, 1))


class GANOutput(NamedTuple):
    """A reconstruction and the discriminator's logits, which are `None` where it was not used."""

    sample: Tensor
    latent_dist: Any
    real: Tensor | None = None
    """Logits of the clip, with a gradient to the discriminator."""
    fake: Tensor | None = None
    """Logits of the reconstruction, with a gradient to the discriminator only."""
    generator_logits: Tensor | None = None
    """Logits of the reconstruction, with a gradient to the VAE only."""


class VAEWithDiscriminator(nn.Module):
    """A VAE with its discriminator, so that one `forward` and one backward pass train both.

    Args:
        vae: The generator.
        discriminator: Trained to tell its reconstructions from real clips.
    """

    def __init__(self, vae: CausalVideoVAE, discriminator: PatchDiscriminator):
        super().__init__()
        self.vae = vae
        self.discriminator = discriminator

    def forward(self, clip: Tensor, generator: Any = None, use_discriminator: bool = True) -> GANOutput:
        """Reconstructs clips `(b, 3, f, h, w)` in [-1, 1], and applies the discriminator if `use_discriminator`."""
        out = self.vae(clip, sample_posterior=True, generator=generator)
        if not use_discriminator:
            return GANOutput(out.sample, out.latent_dist)
        frozen = {name: weight.detach() for name, weight in self.discriminator.named_parameters()}
        return GANOutput(
            out.sample,
            out.latent_dist,
            real=self.discriminator(clip),
            fake=self.discriminator(out.sample.detach()),
            generator_logits=torch.func.functional_call(self.discriminator, frozen, (out.sample,)),
        )


def discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """The hinge loss of the discriminator's logits, averaged over patches.

    Source: Geometric GAN, arXiv 1705.02894.
    """
    return 0.5 * (F.relu(1 - real.float()).mean() + F.relu(1 + fake.float()).mean())


def adaptive_weight(error: Tensor, generator_loss: Tensor, last_layer: Tensor, largest: float = 1e4) -> Tensor:
    """The weight that gives a generator's loss the reconstruction error's gradient norm at the last layer.

    Source: Taming transformers for high-resolution image synthesis, arXiv 2012.09841.
    """
    norms = [torch.autograd.grad(loss, last_layer, retain_graph=True)[0].norm() for loss in (error, generator_loss)]
    return (norms[0] / (norms[1] + 1e-4)).clamp(0, largest).detach()
