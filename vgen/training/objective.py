"""What a denoiser is asked to predict, and the network that training calls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from diffusers.training_utils import compute_snr
from einops import rearrange, repeat
from torch import Tensor, nn

from vgen.models.prompts import embed

PREDICTIONS = ("flow", "v_prediction", "epsilon")
SCHEDULERS = {"ddim": DDIMScheduler, "dpmsolver++": DPMSolverMultistepScheduler, "unipc": UniPCMultistepScheduler}


def make_scheduler(prediction: str, name: str = "ddim", shift: float = 1.0, zero_terminal_snr: bool = False) -> Any:
    """The scheduler that a pipeline is saved with.

    Args:
        prediction: `flow` for flow matching; `v_prediction` or `epsilon` for diffusion on the schedule of Stable
            Diffusion.
        name: `ddim`, `dpmsolver++` or `unipc`, for diffusion.
        shift: Moves noise levels towards noise, for flow matching.
        zero_terminal_snr: Whether the last timestep of diffusion is noise alone.

    Raises:
        ValueError: A name is unknown, or settings contradict each other.

    Source: Common diffusion noise schedules and sample steps are flawed, arXiv 2305.08891.
    """
    if prediction not in PREDICTIONS or name not in SCHEDULERS:
        raise ValueError(
            f"prediction={prediction!r} with scheduler={name!r}: give one of {', '.join(PREDICTIONS)} and one of "
            f"{', '.join(SCHEDULERS)}"
        )
    if prediction == "flow":
        if zero_terminal_snr:
            raise ValueError("flow matching ends in noise alone anyway: zero_terminal_snr is for v_prediction")
        return FlowMatchEulerDiscreteScheduler(shift=shift)
    if shift != 1:
        raise ValueError(f"level_shift={shift} is for flow matching, not for {prediction}")
    if zero_terminal_snr and prediction == "epsilon":
        raise ValueError("zero_terminal_snr with epsilon: noise alone says nothing of the video; take v_prediction")
    options: dict[str, Any] = {"clip_sample": False, "set_alpha_to_one": False} if name == "ddim" else {}
    return SCHEDULERS[name](
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type=prediction,
        rescale_betas_zero_snr=zero_terminal_snr,
        timestep_spacing="trailing",
        **options,
    )


def prediction_of(scheduler: Any) -> str:
    """What networks for a scheduler predict.

    Raises:
        ValueError: It is none of `PREDICTIONS`.
    """
    name = "flow" if "shift" in scheduler.config else scheduler.config.get("prediction_type")
    if name == "flow_prediction":  # UniPC and DPM-Solver++ with the noise levels of flow matching
        return "flow"
    if name not in PREDICTIONS or (name != "flow" and "beta_schedule" not in scheduler.config):
        raise ValueError(f"{type(scheduler).__name__} with prediction_type={name!r} cannot be trained for")
    return name


def shift_of(scheduler: Any) -> float:
    """How far a flow-matching scheduler moves noise levels towards noise; 1 is not at all."""
    return scheduler.config.get("shift", scheduler.config.get("flow_shift", 1.0))


class NoisySample(NamedTuple):
    """What a network gets, and what it should give."""

    latents: Tensor
    """Noisy, `(b, c, t, h, w)`."""
    timestep: Tensor
    """What it is told, `(b, n)`."""
    target: Tensor
    """`(b, c, t, h, w)`."""
    weight: Tensor
    """Of the loss, `(b, n)`."""


class Objective:
    """Makes samples noisy as a scheduler expects.

    Args:
        scheduler: Of flow matching, or of diffusers' DDPM family.
        snr_gamma: Diffusion losses are weighted by `min(SNR, gamma)`; 0 weights all alike.

    Raises:
        ValueError: The scheduler cannot be trained for, or the weighting does not apply.

    Source: Denoising diffusion implicit models, arXiv 2010.02502; Progressive distillation (v), arXiv 2202.00512;
        Efficient diffusion training via min-SNR weighting strategy, arXiv 2303.09556.
    """

    def __init__(self, scheduler: Any, snr_gamma: float = 0.0):
        self.prediction = prediction_of(scheduler)
        # all of the family share their schedule of noise, but not all give targets
        self.scheduler = scheduler if self.prediction == "flow" else DDIMScheduler.from_config(scheduler.config)
        self.snr_gamma = snr_gamma
        if snr_gamma < 0 or (snr_gamma and self.prediction == "flow"):
            raise ValueError(f"snr_gamma={snr_gamma} with {self.prediction}: give a positive one, with diffusion only")

    def __call__(self, latents: Tensor, noise: Tensor, levels: Tensor) -> NoisySample:
        """A noisy sample.

        Args:
            latents: Clean and normalised, `(b, c, t, h, w)`.
            noise: The same shape.
            levels: `(b, n)` in [0, 1], one for each token frame; `t` is a multiple of `n`. Diffusion rounds
                up to whole timesteps; level 0 is clean.
        """
        count = self.scheduler.config.num_train_timesteps
        if self.prediction == "flow":
            noisy, target = flow_sample(latents, noise, levels)
            return NoisySample(noisy, levels * count, target, torch.ones_like(levels))
        timestep = (levels * count).ceil().long().sub(1).clamp_min(0)
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
        """The clean latents that a prediction leads to, and how much of each frame's variance was signal.

        Args:
            sample: What the network got.
            prediction: What it gave, `(b, c, t, h, w)`.

        Returns:
            `(b, c, t, h, w)` and `(b, t)` in [0, 1]: near 0 the estimate means little.
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


def denoising_loss(prediction: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Squared error of each sample `(b,)`, a weighted mean over the token frames that were to be generated.

    Args:
        prediction: `(b, c, t, h, w)`.
        target: The same shape.
        weight: `(b, n)`, of each token frame, 0 where it was known.
    """
    error = (prediction.float() - target.float()).square().mean(dim=(1, 3, 4))
    weight = repeat(weight, "b n -> b (n k)", k=error.shape[1] // weight.shape[1]).to(error)
    return (error * weight).sum(1) / (weight > 0).sum(1).clamp_min(1)


class PromptedDenoiser(nn.Module):
    """A denoiser with its text encoder, so that one `forward` trains both.

    Args:
        denoiser: Any denoiser of the package.
        text_encoder: A transformers text encoder; `None` if prompts always come embedded.
    """

    def __init__(self, denoiser: nn.Module, text_encoder: nn.Module | None):
        super().__init__()
        self.denoiser = denoiser
        self.text_encoder = text_encoder
        self.sharded = False
        """Whether each process holds a part of the weights; all then have to call the denoiser equally often."""

    def forward(
        self,
        latents: Tensor,
        timestep: Tensor,
        input_ids: Tensor | None = None,
        prompt_mask: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        groups: str | Sequence[int] | Tensor = "full",
        **conditions: Any,
    ) -> Tensor:
        """Predicts from noisy latents `(b, c, t, h, w)`, timesteps `(b, n)` and prompts.

        Prompts come tokenised, `(b, l)`, or embedded, `(b, l, d)`; all tensors have a row for each video. Unless
        `sharded`, only videos with a gap are computed with their `conv_context`.
        """
        if prompt_embeds is None:
            assert input_ids is not None and prompt_mask is not None
            prompt_embeds = embed(self.text_encoder, input_ids, prompt_mask)
        inputs = {
            "hidden_states": latents, "timestep": timestep, "encoder_hidden_states": prompt_embeds, "groups": groups,
        } | conditions  # fmt: skip
        if "gap_index" not in inputs or self.sharded:
            return self.denoiser(**inputs, return_dict=False)[0]
        gap, parts = inputs["gap_index"] < latents.shape[2], []
        order = gap.nonzero()[:, 0], (~gap).nonzero()[:, 0]
        for rows in order:
            if len(rows):
                part = {key: value[rows] if torch.is_tensor(value) else value for key, value in inputs.items()}
                told = part if gap[rows[0]] else part | {"conv_context": None, "gap_index": None}
                parts.append(self.denoiser(**told, return_dict=False)[0])
        return torch.cat(parts)[torch.cat(order).argsort()]
