"""Callbacks of diffusers' kind, called after each denoising step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from torch import Tensor

from vgen.checks import check_choice, check_type, shown
from vgen.sampling.conditions import Conditions
from vgen.sampling.sampler import OnStep, Sampler

Callback: TypeAlias = Callable[..., dict[str, Any]] | PipelineCallback | MultiPipelineCallbacks
"""Called as `f(pipeline, step, timestep, tensors)`; tensors that it returns replace the current ones."""

TENSOR_INPUTS = ("latents", "prompt_embeds", "negative_prompt_embeds")
"""What a callback can get and replace."""


def tensor_inputs_of(callback: Callback | None, names: Sequence[str]) -> Sequence[str]:
    """Names of the tensors that a callback gets; diffusers' own classes name theirs.

    Raises:
        ValueError: The callback cannot be called, or there are other tensors than `TENSOR_INPUTS`.
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
        sampler: Denoises.
        callback: Of the user.
        tensor_inputs: Names of the tensors that the callback gets.
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
            latents = tensors["latents"]
            conditions = replace(conditions, **{name: tensors[name] for name in TENSOR_INPUTS[1:]})
        order = getattr(sampler.scheduler, "order", 1)
        if advance is not None and (index == sampler.num_timesteps - 1 or (index + 1) % order == 0):
            advance()
        return latents, conditions

    return on_step
