"""Noise levels, timesteps and schedulers: the parts of diffusion that training and sampling share."""

from __future__ import annotations

from typing import Any, Literal

import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from einops import repeat
from torch import Tensor

from vgen.checks import check_choice

Prediction = Literal["flow", "v_prediction", "epsilon"]
SchedulerName = Literal["ddim", "dpmsolver++", "unipc"]
SCHEDULERS: dict[str, Any] = {
    "ddim": DDIMScheduler,
    "dpmsolver++": DPMSolverMultistepScheduler,
    "unipc": UniPCMultistepScheduler,
}


def make_scheduler(
    prediction: Prediction, name: SchedulerName = "ddim", shift: float = 1.0, zero_terminal_snr: bool = False
) -> Any:
    """The scheduler that a pipeline is saved with.

    Args:
        prediction: `flow` for flow matching; `v_prediction` or `epsilon` for diffusion on the schedule of Stable
            Diffusion.
        name: `ddim`, `dpmsolver++` or `unipc`, for diffusion.
        shift: Moves noise levels toward noise, for flow matching.
        zero_terminal_snr: Whether the last timestep of diffusion is pure noise.

    Raises:
        ValueError: A name is unknown, or settings contradict each other.

    Source: Common diffusion noise schedules and sample steps are flawed, arXiv 2305.08891.
    """
    check_choice("prediction", prediction, Prediction)
    check_choice("scheduler", name, SchedulerName)
    if prediction == "flow":
        if zero_terminal_snr:
            raise ValueError("zero_terminal_snr must be False for flow matching, which ends in pure noise anyway")
        return FlowMatchEulerDiscreteScheduler(shift=shift)
    if shift != 1:
        raise ValueError(f"level_shift must be 1 for {prediction}, got {shift}: only flow matching supports a shift")
    if zero_terminal_snr and prediction == "epsilon":
        raise ValueError(
            "zero_terminal_snr needs v_prediction, got epsilon, which cannot be learned at the last timestep"
        )
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


def change_scheduler(scheduler: Any, name: str) -> Any:
    """Another scheduler for the checkpoint of a scheduler, with the same noise levels.

    Args:
        scheduler: The checkpoint's scheduler.
        name: `euler`, `dpmsolver++` or `unipc` for flow matching; `ddim`, `dpmsolver++` or `unipc` for diffusion.

    Raises:
        ValueError: The name is none of those for this checkpoint.
    """
    flow = is_flow(scheduler)
    names = ["euler", "dpmsolver++", "unipc"] if flow else list(SCHEDULERS)
    if name not in names:
        kind = "flow matching" if flow else "diffusion"
        raise ValueError(f"scheduler must be {', '.join(names[:-1])} or {names[-1]} for {kind}, got {name!r}")
    if not flow:
        return SCHEDULERS[name].from_config(scheduler.config)
    steps, shift = scheduler.config.num_train_timesteps, shift_of(scheduler)
    if name == "euler":
        return FlowMatchEulerDiscreteScheduler(steps, shift=shift)
    return SCHEDULERS[name](steps, prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)


def prediction_of(scheduler: Any) -> Prediction:
    """What networks predict for a scheduler.

    Raises:
        ValueError: It is none of `Prediction`.
    """
    if is_flow(scheduler):
        return "flow"
    name = scheduler.config.get("prediction_type")
    if name not in ("v_prediction", "epsilon") or "beta_schedule" not in scheduler.config:
        raise ValueError(
            f"training supports schedulers of flow matching, v_prediction and epsilon, got {type(scheduler).__name__} "
            f"with prediction_type={name!r}"
        )
    return name


def shift_of(scheduler: Any) -> float:
    """How far a flow-matching scheduler moves noise levels toward noise; 1 is not at all."""
    settings = _settings(scheduler)
    return settings.get("shift", settings.get("flow_shift", 1.0))


def shifted(levels: Tensor, shift: float) -> Tensor:
    """Noise levels in [0, 1], moved toward noise by a shift above 1."""
    return shift * levels / (1 + (shift - 1) * levels)


def level_to_timestep(scheduler: Any, levels: Tensor) -> Tensor:
    """Timesteps of noise levels in [0, 1], of the same shape.

    Flow matching takes fractions of a timestep. Diffusion rounds up to whole ones; its timestep 0 is already noisy, so
    clean frames (level 0) share it.
    """
    scaled = levels * scheduler.config.num_train_timesteps
    return scaled if is_flow(scheduler) else scaled.ceil().long().sub(1).clamp_min(0)


def is_flow(scheduler: Any) -> bool:
    """Whether a scheduler has the noise levels of flow matching, as UniPC and DPM-Solver++ can, too."""
    settings = _settings(scheduler)
    return "shift" in settings or settings.get("prediction_type") == "flow_prediction"


def prediction_type(scheduler: Any) -> str:
    """What a network must predict for a scheduler: `flow`, or the `prediction_type` of its config.

    Raises:
        ValueError: The scheduler is `None`.
    """
    return "flow" if is_flow(scheduler) else _settings(scheduler).get("prediction_type", "epsilon")


def check_scheduler(scheduler: Any) -> None:
    """Checks that the settings of a scheduler fit each other.

    They often do not after `from_config` with the config of a scheduler of another kind, whose settings are ignored.

    Raises:
        ValueError: Samples would be noise: the error names the scheduler and the settings. Or there is no scheduler.
    """
    name, settings, advice = type(scheduler).__name__, _settings(scheduler), ""
    ignored = {key: value for key, value in scheduler.config.items() if key not in settings and key[0] != "_"}
    kind, flow = settings.get("prediction_type"), is_flow(scheduler)
    if "use_flow_sigmas" in settings:
        advice = " (pass prediction_type='flow_prediction', use_flow_sigmas=True)"
        if settings["use_flow_sigmas"] != flow:
            raise ValueError(
                f"{name} has use_flow_sigmas={settings['use_flow_sigmas']} and prediction_type={kind!r}: "
                f"flow matching needs both{advice}, other predictions need neither"
            )
    elif kind == "flow_prediction":
        raise ValueError(f"{name} does not support flow matching: use FlowMatchEulerDiscreteScheduler")
    if not flow and "shift" in ignored:
        raise ValueError(
            f"{name} was made from the config of a flow-matching scheduler but predicts {kind!r}: use a flow-matching "
            f"scheduler{advice}"
        )
    if flow and ignored.get("prediction_type", "flow_prediction") != "flow_prediction":
        raise ValueError(
            f"{name} does flow matching but was made from the config of a scheduler with "
            f"prediction_type={ignored['prediction_type']!r}: use a scheduler with this prediction_type"
        )


def _settings(scheduler: Any) -> dict[str, Any]:
    """The settings that a scheduler uses. Its config also has those of the config that it was made from."""
    if scheduler is None:
        raise ValueError("this pipeline has no scheduler, which generating videos needs: set pipe.scheduler")
    names = type(scheduler)._get_init_keys(type(scheduler))
    return {name: value for name, value in scheduler.config.items() if name in names}


def flow_sample(latents: Tensor, noise: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """Noisy latents and the velocity to predict.

    `x_l = (1 - l) x_0 + l e` and `v = e - x_0`, as `FlowMatchEulerDiscreteScheduler` expects.

    Args:
        latents: Clean and normalized, `(b, c, t, h, w)`.
        noise: The same shape.
        levels: `(b, n)` in [0, 1], one for each token frame; `t` is a multiple of `n`.

    Source: Flow matching for generative modeling, arXiv 2210.02747; rectified flow, arXiv 2209.03003.
    """
    level = repeat(levels, "b n -> b 1 (n k) 1 1", k=latents.shape[2] // levels.shape[1]).to(latents)
    return torch.lerp(latents, noise, level), noise - latents
