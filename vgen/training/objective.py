"""Flow matching, and the network that training calls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from einops import repeat
from torch import Tensor, nn

from vgen.models.prompts import embed


def flow_sample(latents: Tensor, noise: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """Noisy latents and the velocity to predict.

    `x_l = (1 - l) x_0 + l e` and `v = e - x_0`, as `FlowMatchEulerDiscreteScheduler` expects.

    Args:
        latents: Clean and normalised, `(b, c, t, h, w)`.
        noise: The same shape.
        levels: `(b, n)` in [0, 1], one for each token frame; `t` is a multiple of `n`.

    Source: Flow matching for generative modeling, arXiv 2210.02747; rectified flow, arXiv 2209.03003.
    """
    level = repeat(levels, "b n -> b 1 (n k) 1 1", k=latents.shape[2] // levels.shape[1]).to(latents)
    return torch.lerp(latents, noise, level), noise - latents


def velocity_loss(prediction: Tensor, target: Tensor, generated: Tensor | None = None) -> Tensor:
    """Squared error of each sample `(b,)`, a mean over what was to be generated.

    Args:
        prediction: `(b, c, t, h, w)`.
        target: The same shape.
        generated: `(b, n)`, true where a token frame was not known; `None` for all.
    """
    error = (prediction.float() - target.float()).square().mean(dim=(1, 3, 4))
    if generated is None:
        return error.mean(dim=1)
    weight = repeat(generated, "b n -> b (n k)", k=error.shape[1] // generated.shape[1]).to(error)
    return (error * weight).sum(1) / weight.sum(1).clamp_min(1)


class PromptedDenoiser(nn.Module):
    """A denoiser with its text encoder, so that one `forward` trains both.

    Args:
        denoiser: Any denoiser of the package.
        text_encoder: A transformers text encoder.
        num_train_timesteps: Of the scheduler; level l is told as `l * num_train_timesteps`.
    """

    def __init__(self, denoiser: nn.Module, text_encoder: nn.Module, num_train_timesteps: int = 1000):
        super().__init__()
        self.denoiser = denoiser
        self.text_encoder = text_encoder
        self.num_train_timesteps = num_train_timesteps

    def forward(
        self,
        latents: Tensor,
        levels: Tensor,
        input_ids: Tensor,
        prompt_mask: Tensor,
        groups: str | Sequence[int] | Tensor = "full",
        **conditions: Any,
    ) -> Tensor:
        """Predicts from noisy latents `(b, c, t, h, w)`, levels `(b, n)` and tokenised prompts `(b, l)`."""
        prompts = embed(self.text_encoder, input_ids, prompt_mask)
        timestep = levels * self.num_train_timesteps
        return self.denoiser(latents, timestep, prompts, groups=groups, return_dict=False, **conditions)[0]
