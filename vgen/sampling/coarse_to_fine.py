"""Coarse to fine, for very long videos: a rollout generates widely spaced frames, and an interpolation fills the gaps.

Axes: `b` videos, `t h w` latent frames, rows and columns.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from vgen.io.pixels import from_uint8, to_uint8
from vgen.io.records import seal
from vgen.sampling.conditions import Conditions
from vgen.sampling.interpolation import InterpolationState, Interpolator
from vgen.sampling.options import InterpolationOptions
from vgen.sampling.prompts import PromptSchedule
from vgen.sampling.rollout import FrameType, Hooks, Rollout, RolloutState, VideoStream, read_record, saved_rollout
from vgen.sampling.sampler import Sampler

FORMAT = "vgen.CoarseToFine/4"


@dataclass(kw_only=True)
class CoarseToFineState:
    """Everything needed to continue, except the states of the rollout and of the interpolation."""

    schedule: PromptSchedule
    """Prompts by new frame of the result."""
    single: bool
    num_frames: int | None
    """Total number of new frames; `None` is unlimited."""
    frames_done: int = 0
    """Number of new frames so far."""
    prompt: Any = None
    """The prompt that the interpolation is conditioned on."""
    num_skipped: int = 0
    """Number of frames of the next chunk that are not new: the last one of a given video."""

    def copy(self) -> CoarseToFineState:
        """An independent state that continues the same videos."""
        return replace(self, schedule=PromptSchedule(dict(self.schedule.prompts)))

    def to_json(self) -> dict[str, Any]:
        """The state as a JSON-serializable dictionary."""
        return vars(self) | {"schedule": list(self.schedule.prompts.items())}

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> CoarseToFineState:
        """The inverse of `to_json`."""
        return cls(**record | {"schedule": PromptSchedule({frame: prompt for frame, prompt in record["schedule"]})})


class CoarseToFine(VideoStream):
    """Continues a video as a `Rollout` does.

    A rollout at a lower frame rate generates every `keyframe_interval`-th frame, so its KV cache covers a time span
    that is longer by the same factor. Its frames become keyframes, and the frames between them are interpolated. One
    decoder decodes all frames: the coarse ones are decoded together with the others.

    Made by `VideoGenPipeline.rollout(..., keyframe_interval=...)`, which describes the arguments.

    Args:
        coarse: The rollout that generates the coarse frames.
        fill: The interpolator that generates the frames between them; it takes frames at the rate of `coarse`.
        state: State to continue from.
        frame_type: Type of the frames that iterating yields.
    """

    def __init__(self, coarse: Rollout, fill: Interpolator, state: CoarseToFineState, frame_type: FrameType = "uint8"):
        self.coarse, self.fill, self.state, self.frame_type = coarse, fill, state, frame_type
        self.hooks = coarse.hooks

    @torch.no_grad()
    def step(self, prompt: Any = None, actions: Any = None) -> Tensor:
        """The next frames; arguments, result and errors are those of `Rollout.step`.

        A prompt applies to the interpolated frames at once and to the coarse frames from their next chunk on.
        """
        self._check_step(prompt)
        if actions is not None:
            raise ValueError("actions must be None with a keyframe interval")
        state = self.state
        if prompt is not None:
            state.schedule.prompts[state.frames_done] = prompt
            self.coarse.state.schedule.prompts[self.coarse.frames_done] = prompt
        self.set_prompt()
        new = self._next()
        while not new.shape[2]:  # the given frame alone
            new = self._next()
        state.frames_done += new.shape[2]
        return new

    def _next(self) -> Tensor:
        state = self.state
        while (clip := self.fill.next(last=self.coarse.is_done)) is None:
            self.fill.take(from_uint8(to_uint8(self.coarse.step())))
        left = None if state.num_frames is None else state.num_frames - state.frames_done
        new = clip[:, :, state.num_skipped :][:, :, :left]
        state.num_skipped = 0
        return new

    def set_prompt(self) -> None:
        """Encodes the prompt that is due for the interpolated frames."""
        due = self.state.schedule.due(self.state.frames_done)
        if due != self.state.prompt:
            self.state.prompt = due
            positive, negative = self.hooks.encode(due)
            self.fill.conditions = replace(
                self.fill.conditions, prompt_embeds=positive, negative_prompt_embeds=negative
            )

    def fork(self) -> CoarseToFine:
        """An independent copy that continues the same video. Both continue as if the other did not exist."""
        coarse, fill = self.coarse.fork(), self.fill
        fill = Interpolator(
            fill.sampler.copy(), fill.options, fill.conditions, coarse.state.generator, keep_given=fill.keep_given,
            state=fill.state.copy(),
        )  # fmt: skip
        return CoarseToFine(coarse, fill, self.state.copy(), self.frame_type)

    def save(self, folder: str | Path) -> None:
        """Writes everything needed to continue, except the weights, as `Rollout.save` does."""
        with saved_rollout(Path(folder)) as partial:
            for name in ("coarse", "fill"):
                (partial / name).mkdir()
            self.coarse.state.save(partial / "coarse", self.hooks.fingerprint())
            self.fill.state.save(partial / "fill")
            conditions = self.fill.conditions
            embeds = {
                "prompt_embeds": conditions.prompt_embeds,
                "negative_prompt_embeds": conditions.negative_prompt_embeds,
            }
            tensors = {name: one.cpu().contiguous() for name, one in embeds.items() if one is not None}
            save_file(tensors, partial / "prompt.safetensors")
            record = {"format": FORMAT, "state": self.state.to_json()}
            seal(partial, "rollout.json", record)


def load_coarse_to_fine(folder: Path, coarse: Rollout) -> CoarseToFine:
    """Reads what `CoarseToFine.save` wrote.

    Args:
        folder: The folder.
        coarse: The rollout that was loaded from the subfolder `coarse`.
    """
    record = read_record(folder, (FORMAT,))
    fill, device = interpolator_for(coarse), coarse.sampler.device
    fill.state = InterpolationState.load(folder / "fill", device)
    # the same embeddings, because computing them again may differ in rounding, and with PyTorch's alignment
    embeds = {name: one.clone().to(device) for name, one in load_file(folder / "prompt.safetensors").items()}
    positive, negative = embeds["prompt_embeds"], embeds.get("negative_prompt_embeds")
    fill.conditions = replace(fill.conditions, prompt_embeds=positive, negative_prompt_embeds=negative)
    return CoarseToFine(coarse, fill, CoarseToFineState.from_json(record["state"]), coarse.frame_type)


def begin_coarse_to_fine(
    sampler: Sampler, state: RolloutState, hooks: Hooks, frame_type: FrameType, clip: Tensor | None
) -> CoarseToFine:
    """Starts the rollout and the interpolation.

    Args:
        sampler: The sampler that denoises and decodes.
        state: A rollout state that has not started, with the settings of the full frame rate.
        hooks: Functions of the pipeline.
        frame_type: Type of the frames that iterating yields.
        clip: The video to continue, `(b, 3, f, h, w)` in [-1, 1]; `None` starts a new one.
    """
    interval, num_frames = state.options.keyframe_interval, state.num_frames
    assert interval is not None and state.options.frame_rate is not None
    options = replace(state.options, frame_rate=state.options.frame_rate / interval)
    count = num_frames
    if num_frames is not None:
        count = -(-num_frames // interval) if clip is not None else 1 + -(-(num_frames - 1) // interval)
    schedule = state.schedule.coarse(interval)
    coarse = Rollout(sampler, replace(state, options=options, schedule=schedule, num_frames=count), hooks, frame_type)
    # coarse frames are counted back from the last given one
    coarse.take([] if clip is None else [clip[:, :, (clip.shape[2] - 1) % interval :: interval]])
    fine = CoarseToFineState(
        schedule=state.schedule,
        single=state.single,
        num_frames=num_frames,
        prompt=coarse.state.prompt,
        num_skipped=0 if clip is None else 1,
    )
    rollout = CoarseToFine(coarse, interpolator_for(coarse), fine, frame_type)
    if clip is not None:
        rollout.fill.take(clip[:, :, -1:])
    return rollout


def interpolator_for(coarse: Rollout) -> Interpolator:
    """The interpolator for the frames between those of a rollout, with its current prompt."""
    options, state = coarse.state.options, coarse.state
    assert state.prompt_embeds is not None and options.keyframe_interval is not None
    filling = InterpolationOptions(
        num_inference_steps=options.num_inference_steps,
        guidance_scale=options.guidance_scale,
        negative_prompt=options.negative_prompt,
        frame_rate=options.frame_rate,
        factor=options.keyframe_interval,
    )
    conditions = Conditions(
        prompt_embeds=state.prompt_embeds,
        negative_prompt_embeds=state.negative_prompt_embeds,
        attention_kwargs=state.attention_kwargs,
    )
    return Interpolator(coarse.sampler.copy(), filling, conditions, state.generator, keep_given=False)
