"""Noise levels, timesteps and schedulers: the facts about diffusion that training and sampling share."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from einops import repeat
from torch import Tensor

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
    if is_flow(scheduler):
        return "flow"
    name = scheduler.config.get("prediction_type")
    if name not in ("v_prediction", "epsilon") or "beta_schedule" not in scheduler.config:
        raise ValueError(f"{type(scheduler).__name__} with prediction_type={name!r} cannot be trained for")
    return name


def shift_of(scheduler: Any) -> float:
    """How far a flow-matching scheduler moves noise levels towards noise; 1 is not at all."""
    return scheduler.config.get("shift", scheduler.config.get("flow_shift", 1.0))


def level_to_timestep(scheduler: Any, levels: Tensor) -> Tensor:
    """Timesteps of noise levels in [0, 1], of the same shape.

    Flow matching takes fractions of a timestep. Diffusion rounds up to whole ones; its timestep 0 is already noisy, so
    clean frames (level 0) share it.
    """
    scaled = levels * scheduler.config.num_train_timesteps
    return scaled if is_flow(scheduler) else scaled.ceil().long().sub(1).clamp_min(0)


def is_flow(scheduler: Any) -> bool:
    """Whether a scheduler has the noise levels of flow matching, as UniPC and DPM-Solver++ can, too."""
    return "shift" in scheduler.config or scheduler.config.get("prediction_type") == "flow_prediction"


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
