"""Training objectives of flow matching and diffusion, and the module that training calls."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from diffusers import DDIMScheduler
from diffusers.training_utils import compute_snr
from einops import rearrange, repeat
from torch import Tensor, nn

from vgen.diffusion import flow_sample, level_to_timestep, prediction_of
from vgen.models.denoiser import fill_keyframes
from vgen.models.prompts import embed
from vgen.temporal.attention import Groups


class NoisySample(NamedTuple):
    """The input of a network, and its target."""

    latents: Tensor
    """Noisy latents `(b, c, t, h, w)`."""
    timestep: Tensor
    """Timestep of each token frame, `(b, n)`."""
    target: Tensor
    """Target of the prediction, `(b, c, t, h, w)`."""
    weight: Tensor
    """Weight of the loss of each token frame, `(b, n)`."""


class Objective:
    """Adds noise to samples as a scheduler expects it.

    Args:
        scheduler: A scheduler of flow matching, or of diffusers' DDPM family.
        snr_gamma: Gamma of min-SNR loss weighting for diffusion; 0 turns the weighting off.

    Raises:
        ValueError: The scheduler is not supported, or does not support `snr_gamma`.

    Source: Denoising diffusion implicit models, arXiv 2010.02502; Progressive distillation (v), arXiv 2202.00512;
        Efficient diffusion training via min-SNR weighting strategy, arXiv 2303.09556.
    """

    def __init__(self, scheduler: Any, snr_gamma: float = 0.0):
        self.prediction = prediction_of(scheduler)
        # all of the family have the same noise schedule, but not all compute targets
        self.scheduler = scheduler if self.prediction == "flow" else DDIMScheduler.from_config(scheduler.config)
        self.snr_gamma = snr_gamma
        if snr_gamma < 0 or (snr_gamma and self.prediction == "flow"):
            raise ValueError(
                f"snr_gamma must be 0 with flow matching and at least 0 with diffusion, got snr_gamma={snr_gamma} "
                f"with {self.prediction}"
            )

    def __call__(self, latents: Tensor, noise: Tensor, levels: Tensor) -> NoisySample:
        """Makes a noisy sample.

        Args:
            latents: Clean normalized latents `(b, c, t, h, w)`.
            noise: Gaussian noise of the same shape.
            levels: Noise level of each token frame, `(b, n)` in [0, 1]; `t` is a multiple of `n`. Level 0 is clean.
                Diffusion rounds levels up to whole timesteps.
        """
        timestep = level_to_timestep(self.scheduler, levels)
        if self.prediction == "flow":
            noisy, target = flow_sample(latents, noise, levels)
            return NoisySample(noisy, timestep, target, torch.ones_like(levels))
        k, times = latents.shape[2] // levels.shape[1], timestep.flatten()
        frames, noises = (rearrange(x, "b c (n k) h w -> (b n) c k h w", k=k) for x in (latents, noise))
        noisy = self.scheduler.add_noise(frames, noises, times)
        noisy = torch.where(levels.flatten()[:, None, None, None, None] > 0, noisy, frames)
        target = noises if self.prediction == "epsilon" else self.scheduler.get_velocity(frames, noises, times)
        weight = torch.ones_like(levels)
        if self.snr_gamma:
            snr = compute_snr(self.scheduler, timestep)
            weight = snr.clamp_max(self.snr_gamma) / (snr if self.prediction == "epsilon" else snr + 1)
        noisy, target = (rearrange(x, "(b n) c k h w -> b c (n k) h w", b=len(latents)) for x in (noisy, target))
        return NoisySample(noisy, timestep, target, weight)

    def estimate(self, sample: NoisySample, prediction: Tensor) -> tuple[Tensor, Tensor]:
        """Estimates the clean latents from a prediction, and gives the signal fraction of each frame's variance.

        Args:
            sample: The input of the network.
            prediction: Its output, `(b, c, t, h, w)`.

        Returns:
            The estimate `(b, c, t, h, w)` and the fraction `(b, t)` in [0, 1]; near 0, the estimate is poor.
        """
        k = prediction.shape[2] // sample.timestep.shape[1]
        timestep = repeat(sample.timestep, "b n -> b (n k)", k=k)
        prediction, noisy = prediction.float(), sample.latents.float()
        if self.prediction == "flow":
            level = (timestep / self.scheduler.config.num_train_timesteps).float()
            return noisy - level[:, None, :, None, None] * prediction, (1 - level).square()
        signal = self.scheduler.alphas_cumprod.to(noisy.device)[timestep]
        alpha, sigma = (x[:, None, :, None, None] for x in (signal.sqrt(), (1 - signal).sqrt()))
        if self.prediction == "epsilon":
            return (noisy - sigma * prediction) / alpha, signal
        return alpha * noisy - sigma * prediction, signal


def denoising_loss(prediction: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Squared error of each sample `(b,)`: a weighted mean over the token frames with a positive weight.

    Args:
        prediction: Output of the denoiser, `(b, c, t, h, w)`.
        target: Target of the same shape.
        weight: Weight of each token frame, `(b, n)`; 0 for known frames.
    """
    error = (prediction.float() - target.float()).square().mean(dim=(1, 3, 4))
    weight = repeat(weight, "b n -> b (n k)", k=error.shape[1] // weight.shape[1]).to(error)
    return (error * weight).sum(1) / (weight > 0).sum(1).clamp_min(1)


class PromptedDenoiser(nn.Module):
    """A denoiser with its text encoder, so that one `forward` trains both.

    Args:
        denoiser: Any denoiser of the package.
        text_encoder: A transformers text encoder; `None` if prompts are passed as embeddings, or there are none.
    """

    def __init__(self, denoiser: nn.Module, text_encoder: nn.Module | None):
        super().__init__()
        self.denoiser = denoiser
        self.text_encoder = text_encoder

    def forward(
        self,
        latents: Tensor,
        timestep: Tensor,
        input_ids: Tensor | None = None,
        prompt_mask: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        num_leading: Tensor | None = None,
        groups: Groups = "full",
        gap_order: Tensor | None = None,
        num_gaps: int | None = None,
        **conditions: Any,
    ) -> Tensor:
        """Predicts from noisy latents `(b, c, t, h, w)`, timesteps `(b, n)` and prompts, if there are any.

        Args:
            latents: Noisy latents.
            timestep: Timestep of each token frame.
            input_ids: Tokens of the prompts, `(b, l)`, with `prompt_mask`.
            prompt_mask: 1 for tokens of the prompt.
            prompt_embeds: Embedded prompts `(b, l, d)`, in place of `input_ids`.
            num_leading: Number of leading known latents of each video, `(b,)`, for networks with `residual`.
            groups: Attention groups of token frames; see the denoiser.
            gap_order: A permutation `(b,)` of the videos that puts those with a gap first.
            num_gaps: Number of videos with a gap. The others are then computed without `conv_context`. `None` computes
                all videos with it; sharded networks need this, because all processes must call them equally often.
            conditions: Other arguments of the denoiser, with one row per video.
        """
        if input_ids is not None:
            assert prompt_mask is not None
            prompt_embeds = embed(self.text_encoder, input_ids, prompt_mask)
        network: Any = self.denoiser
        if num_leading is not None and network.config.residual and network.config.keyframe_slots:
            slots = network.config.keyframe_slots
            conditions["keyframes"] = fill_keyframes(conditions.get("keyframes"), latents, num_leading, slots)
        inputs = {
            "hidden_states": latents, "timestep": timestep, "encoder_hidden_states": prompt_embeds, "groups": groups,
        } | conditions  # fmt: skip
        if gap_order is None or num_gaps is None:
            return self.denoiser(**inputs, return_dict=False)[0]
        parts = []
        for rows, has_gap in ((gap_order[:num_gaps], True), (gap_order[num_gaps:], False)):
            if len(rows):
                part = {key: value[rows] if torch.is_tensor(value) else value for key, value in inputs.items()}
                part |= {} if has_gap else {"conv_context": None, "gap_index": None}
                if not has_gap and part.get("actions") is not None:
                    part["actions"] = part["actions"][:, : timestep.shape[1]]  # without those of the context
                parts.append(self.denoiser(**part, return_dict=False)[0])
        return torch.cat(parts)[gap_order.argsort()]
