"""diffusers-style callbacks, called after each denoising step, and the attributes of the running call they read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeAlias
from weakref import ref

from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from torch import Tensor

from vgen.checks import check_choice, check_type, shown
from vgen.sampling.conditions import Conditions, Guidance
from vgen.sampling.sampler import OnStep, Sampler, running_sampler

Callback: TypeAlias = Callable[..., dict[str, Any]] | PipelineCallback | MultiPipelineCallbacks
"""Called as `f(pipeline, step, timestep, tensors)`; tensors that it returns replace the current ones."""

TENSOR_INPUTS = ("latents", "prompt_embeds", "negative_prompt_embeds")
"""Tensors that a callback can receive and replace."""


def tensor_inputs_of(callback: Callback | None, names: Sequence[str]) -> Sequence[str]:
    """Names of the tensors that a callback receives; diffusers' own callback classes list theirs.

    Raises:
        ValueError: The callback is not callable, or a name is not one of `TENSOR_INPUTS`.
    """
    if callback is not None and not callable(callback):
        raise ValueError(f"callback_on_step_end must be callable, got {shown(callback)}")
    if isinstance(callback, (PipelineCallback, MultiPipelineCallbacks)):
        names = callback.tensor_inputs
    check_type("callback_on_step_end_tensor_inputs", names, (list, tuple), "a list of names")
    for name in names:
        check_choice("each of callback_on_step_end_tensor_inputs", name, TENSOR_INPUTS)
    return names


def step_function(
    pipeline: Any,
    sampler: Sampler,
    callback: Callback | None,
    tensor_inputs: Sequence[str],
    advance: Callable[[], Any] | None = None,
) -> OnStep:
    """A function for `Sampler.denoise` that runs a callback and advances a progress bar.

    Args:
        pipeline: First argument of the callback.
        sampler: The sampler whose steps are reported.
        callback: The user's callback; `None` only advances the progress bar.
        tensor_inputs: Names of the tensors that the callback receives.
        advance: Called once for each denoising step, however often the scheduler evaluates the denoiser in it.
    """

    def on_step(index: int, timestep: Tensor, latents: Tensor, conditions: Conditions) -> tuple[Tensor, Conditions]:
        if callback is not None:
            tensors: dict[str, Any] = {
                "latents": latents,
                "prompt_embeds": conditions.prompt_embeds,
                "negative_prompt_embeds": conditions.negative_prompt_embeds,
            }
            tensors |= callback(pipeline, index, timestep, {name: tensors[name] for name in tensor_inputs}) or {}
            sampler.forget_prompts()
            latents = tensors["latents"]
            conditions = replace(conditions, **{name: tensors[name] for name in TENSOR_INPUTS[1:]})
        order = getattr(sampler.scheduler, "order", 1)
        if advance is not None and (index == sampler.num_timesteps - 1 or (index + 1) % order == 0):
            advance()
        return latents, conditions

    return on_step


class RunningCallMixin:
    """Pipeline attributes that diffusers' callbacks and step caches read and set during a call.

    They describe the sampler that is running in this thread, or else the last call.
    """

    def __init__(self) -> None:
        super().__init__()
        self._samplers: set[ref[Sampler]] = set()
        self._last_sampler: Sampler | None = None

    @property
    def _call(self) -> Sampler:
        sampler = running_sampler.get() or self._last_sampler
        if sampler is None:
            raise RuntimeError("this attribute is only available during or after a call of the pipeline")
        return sampler

    @property
    def _guidance(self) -> Guidance:
        running = running_sampler.get()
        return self._call.last_guidance if running is None else running.guidance

    @property
    def guidance_scale(self) -> float:
        """Weight of classifier-free guidance in the running call."""
        return self._guidance.scale

    @property
    def _guidance_scale(self) -> float:
        return self._guidance.scale

    @_guidance_scale.setter
    def _guidance_scale(self, scale: float) -> None:
        self._call.guidance = replace(self._call.guidance, scale=scale)

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the running call uses guidance and therefore negative prompts."""
        return self._guidance.needs_negative

    @property
    def attention_kwargs(self) -> dict[str, Any] | None:
        """Keyword arguments of the attention processors in the running call."""
        return self._call.attention_kwargs

    @property
    def num_timesteps(self) -> int:
        """Number of timesteps of the running call."""
        return self._call.num_timesteps

    @property
    def current_timestep(self) -> Tensor | None:
        """Current timestep of the running call."""
        return None if self._last_sampler is None else self._call.current_timestep

    @property
    def interrupt(self) -> bool:
        """Whether the running call stops; set `_interrupt` in a callback, or in another thread to stop all calls."""
        return self._call.interrupt

    @property
    def _interrupt(self) -> bool:
        return self._call.interrupt

    @_interrupt.setter
    def _interrupt(self, value: bool) -> None:
        running = running_sampler.get()
        # a copy, since other threads may add theirs
        samplers = [one() for one in self._samplers.copy()] if running is None else [running]
        for sampler in samplers:
            if sampler is not None:
                sampler.interrupt = value
