"""Rollout: a video that is generated chunk by chunk, for as long as needed, in bounded memory.

Axes: `b` videos, `c` channels, `t h w` latent frames, rows and columns, `n` token frames.
"""

from __future__ import annotations

import contextvars
import math
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from diffusers.utils import logging
from diffusers.video_processor import VideoProcessor
from safetensors.torch import load_file, save_file
from torch import Tensor

from vgen import __version__
from vgen.io.atomic import atomic_directory, locked, restore_backup
from vgen.io.pixels import to_frames, to_pt
from vgen.io.records import check_seal, read_json, seal
from vgen.models.denoiser import pack_keyframes
from vgen.sampling.conditions import Conditions
from vgen.sampling.known_frames import check_tasks, encode_clip, encode_slots, lay_out
from vgen.sampling.options import RolloutOptions
from vgen.sampling.prompts import PromptSchedule, check_prompts
from vgen.sampling.sampler import OnStep, Sampler, Start, draw_noise, latent_shape
from vgen.temporal.actions import pack_actions, read_actions, unknown_actions
from vgen.temporal.state import TemporalState

logger = logging.get_logger(__name__)

FORMAT = "vgen.Rollout/7"
LOCK_WAIT = 60.0
"""How long to wait for another process that reads or writes the same saved rollout, in seconds."""
Encode = Callable[[Any], tuple[Tensor, Tensor | None]]
"""Maps a prompt, or a list of one per video, to its embeddings and those of the negative prompt."""
FrameType = Literal["uint8", "np", "pil", "pt"]
"""What iterating over a rollout yields: uint8 arrays `(n, h, w, 3)`, or diffusers' `np`, `pil` and `pt`."""
Overlap = Literal[False, True, "auto"]
"""Whether a second thread denoises the next chunk of a rollout; `auto` means on a CPU with idle cores."""


class Remembered(NamedTuple):
    """A token frame in the KV cache."""

    latents: Tensor
    """Clean latents `(b, c, p_t, h, w)`."""
    level: float
    """The noise level that the denoiser is conditioned on."""
    actions: Tensor | None = None
    """Its actions `(b, 1, k)`; `None` for checkpoints without."""


@dataclass(kw_only=True)
class RolloutState:
    """Everything needed to continue a rollout, except the networks: plain data, saved as JSON and safetensors."""

    options: RolloutOptions
    """Resolved options."""
    schedule: PromptSchedule
    single: bool
    """Whether there is one video, so that chunks have no batch axis."""
    size: tuple[int, int]
    """Height and width in pixels."""
    num_frames: int | None
    """Total number of new frames; `None` is unlimited."""
    max_sequence_length: int | None = None
    """Length of prompts in tokens; `None` uses the pipeline's default."""
    attention_kwargs: dict[str, Any] | None = None
    generator: torch.Generator | list[torch.Generator]
    """Source of the noise."""
    frames_done: int = 0
    """Number of new frames so far."""
    prompt: Any = None
    """The prompt that the embeddings are of; `None` if they were given."""
    prompt_embeds: Tensor | None = None
    """`(b, l, d)`."""
    negative_prompt_embeds: Tensor | None = None
    """`(b, l, d)`."""
    history: list[Remembered] = field(default_factory=list)
    """The token frames in the KV cache."""
    actions: Tensor | None = None
    """Actions `(b, f, a)` of the next frames, beginning with the given ones of the next chunk, as far as known; `None`
    for checkpoints without."""
    keyframes: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    """Latents `(b, c, h, w)` of given frames that fill no token frame, by latent and slot of the next chunk."""
    num_given: int = 0
    """Number of frames of the next chunk that are given."""
    recent: Tensor | None = None
    """Pixels `(b, 3, n, h, w)` of the last decoded frames, if one is encoded again: up to one more than the window."""
    denoiser: TemporalState
    decoder: TemporalState = field(default_factory=TemporalState)

    @property
    def generators(self) -> list[torch.Generator]:
        """The noise generators."""
        return self.generator if isinstance(self.generator, list) else [self.generator]

    def copy(self) -> RolloutState:
        """An independent state that continues the same videos, with the same noise."""
        generators = [one.clone_state() for one in self.generators]
        return replace(
            self,
            schedule=PromptSchedule(dict(self.schedule.prompts)),
            generator=generators if isinstance(self.generator, list) else generators[0],
            history=list(self.history),
            keyframes=dict(self.keyframes),
            denoiser=self.denoiser.copy(),
            decoder=self.decoder.copy(),
        )

    def save(self, folder: Path, fingerprint: dict[str, Any]) -> None:
        """Writes the state into a folder.

        Args:
            folder: An existing folder.
            fingerprint: Fingerprint of the networks.
        """
        tensors = {f"generator.{index}": source.get_state() for index, source in enumerate(self.generators)}
        tensors |= {f"history.{index}": one.latents for index, one in enumerate(self.history)}
        acted = {f"acted.{index}": one.actions for index, one in enumerate(self.history)}
        tensors |= {name: one for name, one in acted.items() if one is not None}
        tensors |= {f"keyframe.{latent}.{slot}": image for (latent, slot), image in self.keyframes.items()}
        optional = ("prompt_embeds", "negative_prompt_embeds", "recent", "actions")
        tensors |= {name: getattr(self, name) for name in optional if getattr(self, name) is not None}
        save_file({name: one.cpu().contiguous() for name, one in tensors.items()}, folder / "tensors.safetensors")
        self.denoiser.save(folder / "denoiser.safetensors")
        self.decoder.save(folder / "decoder.safetensors")
        plain = ("single", "size", "num_frames", "max_sequence_length", "attention_kwargs", "frames_done", "prompt")
        record = {
            "format": FORMAT,
            "versions": _versions(),
            "made_with": fingerprint,
            "options": self.options.to_json(),
            "schedule": list(self.schedule.prompts.items()),
            **{name: getattr(self, name) for name in (*plain, "num_given")},
            "levels": [one.level for one in self.history],
            "generators": [str(source.device) for source in self.generators],
            "one_generator": not isinstance(self.generator, list),
        }
        seal(folder, "rollout.json", record)

    @classmethod
    def load(cls, folder: Path, device: torch.device, fingerprint: dict[str, Any]) -> RolloutState:
        """Reads what `save` wrote.

        Args:
            folder: The folder that `save` wrote to.
            device: Device on which the networks run.
            fingerprint: Fingerprint of the current networks.

        Raises:
            ValueError: It was made with other networks, or draws its noise on a device that is not available.
        """
        record = read_record(folder)
        check_fingerprint(folder, record["made_with"], fingerprint)
        if record["versions"] != _versions():
            logger.warning(f"{folder} was saved with {record['versions']}: the continuation may differ in rounding")
        # copies have PyTorch's alignment, on which the rounding of some processors' kernels depends
        tensors = {name: tensor.clone() for name, tensor in load_file(folder / "tensors.safetensors").items()}
        on_device = {name: one.to(device) for name, one in tensors.items() if not name.startswith("generator.")}
        generators = []
        for index, where in enumerate(record["generators"]):
            try:
                generators.append(torch.Generator(where))
            except RuntimeError as error:
                raise ValueError(
                    f"{folder} draws its noise on {where}, which is not available on this machine"
                ) from error
            generators[-1].set_state(tensors[f"generator.{index}"])
        keyframes = {}
        for name in (name for name in on_device if name.startswith("keyframe.")):
            _, latent, slot = name.split(".")
            keyframes[int(latent), int(slot)] = on_device[name]
        height, width = record["size"]
        same = (
            "single",
            "num_frames",
            "max_sequence_length",
            "attention_kwargs",
            "frames_done",
            "prompt",
            "num_given",
        )
        return cls(
            options=RolloutOptions.from_json(record["options"]),
            schedule=PromptSchedule({frame: prompt for frame, prompt in record["schedule"]}),
            size=(height, width),
            generator=generators[0] if record["one_generator"] else generators,
            prompt_embeds=on_device["prompt_embeds"],
            negative_prompt_embeds=on_device.get("negative_prompt_embeds"),
            recent=on_device.get("recent"),
            actions=tensors.get("actions"),
            history=[
                Remembered(on_device[f"history.{index}"], level, on_device.get(f"acted.{index}"))
                for index, level in enumerate(record["levels"])
            ],
            keyframes=keyframes,
            denoiser=TemporalState.load(folder / "denoiser.safetensors").move_to(device),
            decoder=TemporalState.load(folder / "decoder.safetensors").move_to(device),
            **{name: record[name] for name in same},
        )


@dataclass(frozen=True, kw_only=True)
class Hooks:
    """Functions of the pipeline that a rollout uses."""

    encode: Encode
    fingerprint: Callable[[], dict[str, Any]]
    """Returns the fingerprint of the networks, for `save`."""
    on_step: OnStep | None = None
    """Called after each denoising step."""
    on_end: Callable[[], None] = lambda: None
    """Called when iterating ends."""


class Ahead(NamedTuple):
    """A chunk that was denoised before it was asked for."""

    latents: Tensor
    """Its latents `(b, c, t, h, w)`."""
    generators: list[Tensor]
    """States of the noise generators before it."""


class VideoStream:
    """Base class of both kinds of rollouts: iterating calls `step` in a loop."""

    state: Any
    hooks: Hooks
    frame_type: FrameType

    def step(self, prompt: Any = None, actions: Any = None) -> Tensor:
        """The next chunk, see `Rollout.step`."""
        raise NotImplementedError

    @property
    def single(self) -> bool:
        """Whether there is one video, so that iterating yields chunks without a batch axis."""
        return self.state.single

    @property
    def num_frames(self) -> int | None:
        """Total number of new frames; `None` is unlimited."""
        return self.state.num_frames

    @property
    def frames_done(self) -> int:
        """Number of new frames so far."""
        return self.state.frames_done

    @property
    def is_done(self) -> bool:
        """Whether all `num_frames` frames have been generated."""
        return self.num_frames is not None and self.frames_done >= self.num_frames

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        """The next chunk in the form that the caller chose."""
        if self.is_done:
            self.hooks.on_end()
            raise StopIteration
        chunk = convert_chunk(self.step(), self.frame_type)
        return chunk[0] if self.single else chunk

    def _check_step(self, prompt: Any) -> None:
        if self.is_done:
            raise ValueError(f"the rollout has ended: all num_frames={self.num_frames} new frames have been generated")
        if prompt is None:
            return
        check_prompts(prompt)
        count, given = (len(one) if isinstance(one, list) else None for one in (self.state.prompt, prompt))
        if count != given:
            expected = "a string" if count is None else f"a list of {count} strings"
            raise ValueError(f"prompt must be {expected}, as at the beginning, got {prompt!r}")


class Rollout(VideoStream):
    """Continues a video chunk by chunk; iterating yields the new frames, uint8 `(n, h, w, 3)` by default.

    The denoiser keeps `sink` token frames from the start and `window` recent ones in its KV cache; the VAE's decoder
    keeps what its convolutions need. Both are bounded, so a chunk costs the same however long the video is.
    Generated frames are never decoded and encoded again.

    Made by `VideoGenPipeline.rollout`, which describes the arguments.

    Args:
        sampler: The sampler that denoises and decodes.
        state: State to continue from.
        hooks: Functions of the pipeline.
        frame_type: Type of the frames that iterating yields.
        overlap: Whether a second thread denoises the next chunk while one is decoded and used. The result is the same.
            A new prompt, `fork` and `save` discard what is ahead; call `settle` before changing anything else.
    """

    def __init__(
        self,
        sampler: Sampler,
        state: RolloutState,
        hooks: Hooks,
        frame_type: FrameType = "uint8",
        overlap: bool = False,
    ):
        self.sampler, self.state, self.hooks, self.frame_type = sampler, state, hooks, frame_type
        self.overlap = overlap
        self._thread: ThreadPoolExecutor | None = None
        self._ahead: Future[Ahead | None] | None = None

    @torch.no_grad()
    def step(self, prompt: Any = None, actions: Any = None) -> Tensor:
        """Generates the next chunk.

        Args:
            prompt: Prompt from this chunk on, instead of the scheduled one: a string, or a list of one per video.
            actions: Actions of the new frames of this chunk, `(chunk_frames, a)` or with a leading axis for several
                videos, instead of those that the rollout was started with; without either, they are unknown.

        Returns:
            Pixels `(b, 3, n, h, w)` in [-1, 1] on the device.

        Raises:
            ValueError: All frames have been generated, or an argument is invalid.
        """
        self._check_step(prompt)
        state = self.state
        if actions is not None:
            self._set_actions(actions)
        if state.options.prompt_change == "cut" and state.history and isinstance(prompt, list):
            if 0 < sum(_differ(state.prompt, prompt, index) for index in range(len(prompt))) < len(prompt):
                raise ValueError("with prompt_change='cut' the prompts of all videos must change at the same time")
        self.sampler.interrupt = False  # an interrupt between two chunks would leave the next one as noise
        if prompt is not None:
            state.schedule.prompts[state.frames_done] = prompt
        self.set_prompt()
        if state.options.context != "cached":
            self._compute_context()
        ahead, self._ahead = None if self._ahead is None else self._ahead.result(), None
        acted, level = self._next_actions(), state.options.history_noise or 0.0
        latents = self._denoise(acted, self.hooks.on_step) if ahead is None else ahead.latents
        begin, new = state.num_given, self._count_new()
        self._drop_actions(self._num_frames)
        state.num_given, state.keyframes = 0, {}
        state.frames_done += new
        if self._overlaps:
            self._go_on(latents, level, acted)
            clip = self.sampler.decode(latents, state.decoder)
        else:
            clip = self._finish(latents, level, acted)
        return clip[:, :, begin : begin + new]

    @property
    def chunk_frames(self) -> int:
        """Number of new frames of the next chunk."""
        if self._ahead is not None:
            self._ahead.result()
        return self._count_new()

    def _count_new(self) -> int:
        new = self._num_frames - self.state.num_given
        left = None if self.num_frames is None else self.num_frames - self.frames_done
        return new if left is None else min(new, left)

    def settle(self) -> None:
        """Waits for the second thread of `overlap`, and discards the chunk that it has denoised ahead."""
        future, self._ahead = self._ahead, None
        if future is None:
            return
        self.sampler.interrupt = True
        ahead = future.result()
        self.sampler.interrupt = False
        if ahead is not None:
            self._rewind(ahead.generators)

    def fork(self) -> Rollout:
        """An independent copy that continues the same video. Both continue as if the other did not exist."""
        self.settle()
        return Rollout(self.sampler.copy(), self.state.copy(), self.hooks, self.frame_type, self.overlap)

    def save(self, folder: str | Path) -> None:
        """Writes everything needed to continue, except the weights, as JSON and safetensors, for `load_rollout`.

        The folder is written atomically and replaces an older rollout of the same name. Guiders and callbacks are not
        saved.

        Raises:
            ValueError: The path exists and is not a saved rollout.
        """
        self.settle()
        with saved_rollout(Path(folder)) as partial:
            self.state.save(partial, self.hooks.fingerprint())

    def set_prompt(self) -> None:
        """Encodes the prompt that is due; if it changes, the KV cache changes as `prompt_change` says."""
        state = self.state
        due = state.schedule.due(state.frames_done)
        if state.prompt_embeds is not None and due == state.prompt:
            return
        self.settle()
        before, state.prompt = state.prompt, due
        state.prompt_embeds, state.negative_prompt_embeds = self.hooks.encode(due)
        if not state.history:
            return
        history, state.history = state.history, []
        sink = state.options.sink or 0
        state.denoiser = new_state(state.options)
        if state.options.prompt_change == "cut":
            self._drop_actions(state.num_given)
            state.decoder, state.keyframes, state.num_given = TemporalState(), {}, 0
            state.recent = None
        elif state.options.prompt_change == "redraw":
            state.recent = None
            changed = [index for index in range(len(state.prompt_embeds)) if _differ(before, due, index)]
            level = state.options.history_noise or 0.0
            self._remember([Remembered(self._redraw(history[-1], changed), level, history[-1].actions)])
        else:
            self._remember(history[:sink])
            self._remember(history[sink:])

    @torch.no_grad()
    def take(self, clips: Iterable[Tensor], actions: Tensor | None = None) -> None:
        """Encodes given frames `(b, 3, f, h, w)`: whole token frames go to the KV cache, the others are keyframes.

        Args:
            clips: The frames.
            actions: Their actions `(b, f, a)`; `None` if they are unknown.

        Raises:
            ValueError: Some frames would be keyframes, and the checkpoint was not trained for keyframes; or there are
                more or fewer actions than frames.
        """
        self.settle()
        self.set_prompt()
        sampler, grid = self.sampler, self.sampler.grid
        encoder_state, num_frames = TemporalState(), 0
        waiting: list[Tensor] = []  # pixels that fill no chunk yet
        after, self.state.actions = self.state.actions, actions

        def finish() -> None:
            acted = self._pack_actions(len(waiting))
            self._drop_actions(len(waiting))
            self._finish(encode_clip(sampler.vae, torch.stack(waiting, dim=2), encoder_state), 0.0, acted)

        for frame in (frame for clip in clips for frame in clip.unbind(2)):
            waiting.append(frame.to(sampler.device))
            num_frames += 1
            frames = self._run_length * grid.patch_frames
            if len(waiting) == (grid.compression * frames if self.state.history else grid.num_frames(frames)):
                finish()
                waiting = []
        if actions is not None and actions.shape[1] != num_frames:
            raise ValueError(f"video_actions must be those of all {num_frames} given frames, got {actions.shape[1]}")
        if not num_frames:
            self.state.actions = after
            return
        layout = lay_out(range(num_frames), num_frames + grid.unit, grid)
        whole = len(waiting) - len(layout.slots)  # frames of a last, shorter chunk
        rest_of_clip, waiting = waiting[whole:], waiting[:whole]
        if whole:
            finish()
        if layout.slots:
            check_tasks(sampler.denoiser.config, grid, {"keyframes"})
            rest = zip(layout.slots.values(), rest_of_clip, strict=True)
            self.state.keyframes = encode_slots(
                sampler.vae,
                {(latent - layout.num_leading, slot): frame for (latent, slot), frame in rest},
                sampler.denoiser.config.still_keyframes,
            )
        self.state.num_given = len(layout.slots)
        self._append_actions(self.state.num_given, after)

    @property
    def _conditions(self) -> Conditions:
        state = self.state
        assert state.prompt_embeds is not None
        return Conditions(
            prompt_embeds=state.prompt_embeds,
            negative_prompt_embeds=state.negative_prompt_embeds,
            frame_rate=state.options.frame_rate if self.sampler.denoiser.takes_frame_rate else None,
            attention_kwargs=state.attention_kwargs,
        )

    @property
    def _overlaps(self) -> bool:
        """Whether the next chunk can be denoised while this one is decoded."""
        cached, watched = self.state.options.context == "cached", self.hooks.on_step is not None
        autocast = torch.is_autocast_enabled(self.sampler.device.type)  # other threads do not inherit it
        return self.overlap and cached and not (watched or autocast or self.is_done)

    def _go_on(self, latents: Tensor, level: float, actions: Tensor | None) -> None:
        """Remembers finished latents and denoises the next chunk, in a second thread."""
        self._thread = self._thread or ThreadPoolExecutor(1, "vgen rollout")
        threads, inference = torch.get_num_threads(), torch.is_inference_mode_enabled()

        def remember_and_denoise() -> Ahead | None:
            torch.set_num_threads(threads)
            with torch.inference_mode(inference), torch.no_grad():
                self._remember(self._token_frames(latents, level, actions))
                return self._denoise_ahead()

        self._ahead = self._thread.submit(contextvars.copy_context().run, remember_and_denoise)

    def _denoise_ahead(self) -> Ahead | None:
        """The next chunk; `None` if its prompt is another one, its actions are not known, or it was interrupted."""
        state = self.state
        if state.schedule.due(state.frames_done) != state.prompt:
            return None
        if self._action_dim and (state.actions is None or not state.actions.shape[1]):
            return None  # they may come with the next step
        before, steps = [source.get_state() for source in state.generators], 0

        def count(index: int, timestep: Tensor, latents: Tensor, conditions: Conditions) -> tuple[Tensor, Conditions]:
            nonlocal steps
            steps += 1
            return latents, conditions

        latents = self._denoise(self._next_actions(), count)
        if steps == self.sampler.num_timesteps:
            return Ahead(latents, before)
        self._rewind(before)
        return None

    def _rewind(self, states: list[Tensor]) -> None:
        for source, before in zip(self.state.generators, states, strict=True):
            source.set_state(before)

    @property
    def _num_frames(self) -> int:
        """Number of frames of the next chunk, with given ones and those after the end of the video."""
        grid = self.sampler.grid
        count = self._run_length * grid.patch_frames
        return grid.compression * count if self.state.history else grid.num_frames(count)

    @property
    def _action_dim(self) -> int:
        return self.sampler.denoiser.config.action_dim

    def _set_actions(self, actions: Any) -> None:
        """Sets the actions of the new frames of the next chunk."""
        self.settle()
        state, count = self.state, self._count_new()
        assert state.prompt_embeds is not None
        given = read_actions(actions, self._action_dim, len(state.prompt_embeds), count)
        later = None if state.actions is None else state.actions[:, state.num_given + count :]
        state.actions = self._known_actions(state.num_given)
        self._append_actions(state.num_given, given)
        self._append_actions(state.num_given + count, later)

    def _append_actions(self, begin: int, actions: Tensor | None) -> None:
        """Sets the known actions from frame `begin` of the next chunk on."""
        if actions is not None:
            self.state.actions = torch.cat([self._known_actions(begin), actions], dim=1)

    def _known_actions(self, count: int) -> Tensor:
        """Actions `(b, count, a)` of the next frames, NaN where they are unknown."""
        known = self.state.actions
        assert self.state.prompt_embeds is not None
        if known is None:
            return unknown_actions(len(self.state.prompt_embeds), count, self._action_dim)
        known = known[:, :count]
        return torch.cat([known, unknown_actions(len(known), count - known.shape[1], known.shape[2])], dim=1)

    def _drop_actions(self, count: int) -> None:
        """Forgets the actions of frames that are finished."""
        if self.state.actions is not None:
            self.state.actions = self.state.actions[:, count:]

    def _next_actions(self) -> Tensor | None:
        """Actions of the next chunk, `(b, n, k)`; frames after the end of the video repeat the last action."""
        return self._pack_actions(self._num_frames, self.state.num_given + self._count_new())

    def _pack_actions(self, count: int, end: int | None = None) -> Tensor | None:
        if not self._action_dim:
            return None
        actions = self._known_actions(count if end is None else end)
        actions = torch.cat([actions, actions[:, -1:].expand(-1, count - actions.shape[1], -1)], dim=1)
        return pack_actions(actions, self.sampler.grid, bool(self.state.history)).to(self.sampler.device)

    def _token_frames(self, latents: Tensor, level: float, actions: Tensor | None) -> list[Remembered]:
        """Latents `(b, c, t, h, w)` and their actions `(b, n, k)`, one token frame at a time."""
        frames = latents.split(self.sampler.grid.patch_frames, dim=2)
        acted = [None] * len(frames) if actions is None else actions.split(1, dim=1)
        return [Remembered(frame, level, one) for frame, one in zip(frames, acted, strict=True)]

    def _denoise(self, actions: Tensor | None, on_step: OnStep | None) -> Tensor:
        """Denoises the next chunk."""
        state, sampler, conditions = self.state, self.sampler, replace(self._conditions, actions=actions)
        frames = self._run_length * sampler.grid.patch_frames
        shape = latent_shape(sampler.denoiser, sampler.vae, len(conditions.prompt_embeds), frames, state.size)
        noise = draw_noise(shape, state.generator, torch.float32).to(sampler.device)
        if state.keyframes:
            slots = pack_keyframes(state.keyframes, frames, sampler.grid.compression, noise[:, :, 0])
            conditions = replace(conditions, keyframes=slots.to(sampler.denoiser.dtype))
        steps, first_sigmas = state.options.num_inference_steps, state.options.first_chunk_sigmas
        assert steps is not None
        custom = {"sigmas": first_sigmas} if first_sigmas and not state.frames_done else {}
        return sampler.denoise(
            noise,
            conditions,
            steps,
            state.generator,
            state=state.denoiser,
            on_step=on_step,
            custom=custom,
            previous=state.history[-1].latents[:, :, -1] if state.history else None,
        )

    def _redraw(self, frame: Remembered, changed: list[int]) -> Tensor:
        """A token frame `(b, c, p_t, h, w)`, noised and denoised again in the `changed` videos.

        The denoiser sees no other frame, because it would continue the old object.

        Source: SDEdit, arXiv 2108.01073.
        """
        state, steps, latents = self.state, self.state.options.num_inference_steps, frame.latents
        strength, conditions = state.options.prompt_change_strength, self._conditions
        assert steps is not None and strength is not None
        negative = conditions.negative_prompt_embeds
        conditions = replace(
            conditions,
            prompt_embeds=conditions.prompt_embeds[changed],
            negative_prompt_embeds=None if negative is None else negative[changed],
            actions=None if frame.actions is None else frame.actions[changed],
        )
        source = state.generator
        source = [source[index] for index in changed] if isinstance(source, list) else source
        noise = draw_noise(latents[changed].shape, source, torch.float32).to(self.sampler.device)
        done = math.ceil(strength * steps)
        start = None if done == steps else Start(latents[changed], (done + 0.5) / steps)  # `num_steps` rounds down
        redrawn = latents.clone()
        sampler = self.sampler.copy()  # so that an interrupt also reaches the chunk that follows
        redrawn[changed] = sampler.denoise(noise, conditions, steps, source, start=start).to(latents)
        return redrawn

    @property
    def _run_length(self) -> int:
        """Token frames of the next chunk."""
        options = self.state.options
        length = options.chunk_size if self.state.history else options.first_chunk_size
        assert length is not None
        return length

    @property
    def _num_context(self) -> int:
        """Token frames kept beyond those in the KV cache: whole chunks of what convolutions see before them.

        When the KV cache is recomputed, they are evicted from it again, and the convolutions continue from them as if
        no frames were missing after the sink.
        """
        assert self.state.options.chunk_size is not None
        context = getattr(self.sampler.denoiser, "conv_history", 0)
        return math.ceil(context / self.state.options.chunk_size) * self.state.options.chunk_size

    def _finish(self, latents: Tensor, level: float, actions: Tensor | None) -> Tensor:
        """Writes finished latents `(b, c, t, h, w)` to the KV cache at a noise level; returns their pixels."""
        self._remember(self._token_frames(latents, level, actions))
        clip, state = self.sampler.decode(latents, self.state.decoder), self.state
        if state.options.context == "reencoded":
            recent = clip if state.recent is None else torch.cat([state.recent, clip], dim=2)
            state.recent = recent[:, :, -self._num_recent - 1 :]
        return clip

    def _remember(self, frames: list[Remembered]) -> None:
        """Adds token frames to the history, and writes them into the state, chunk by chunk."""
        state = self.state
        while frames:
            run, frames = frames[: self._run_length], frames[self._run_length :]
            if state.options.context == "cached":
                self._write(run)
            state.history += run
            sink, window = state.options.sink or 0, state.options.window
            assert window is not None
            surplus = max(0, len(state.history) - sink - self._num_context - window)
            del state.history[sink : sink + surplus]

    def _write(self, run: list[Remembered]) -> None:
        """Writes token frames into the state."""
        state = self.state
        latents = torch.cat([one.latents for one in run], dim=2)
        # filled on the device: a copy from the host would wait for it
        levels = torch.stack([latents.new_full((), one.level, dtype=torch.float32) for one in run])
        acted = [one.actions for one in run if one.actions is not None]
        conditions = replace(self._conditions, actions=torch.cat(acted, dim=1) if acted else None)
        self.sampler.remember(latents, levels, conditions, state.denoiser, state.generator)

    def _compute_context(self) -> None:
        """Writes the history into a new state, in chunks that begin with the window."""
        state, frames = self.state, list(self.state.history)
        chunk, window, grid = state.options.chunk_size, state.options.window, self.sampler.grid
        assert chunk is not None and window is not None
        state.denoiser = new_state(state.options)
        begins_later = state.recent is not None and state.recent.shape[2] > self._num_recent
        if begins_later and not state.options.sink:
            assert state.recent is not None
            first = state.recent[:, :, 1 : 1 + grid.num_frames(grid.patch_frames)]
            old = frames[-window]
            frames[-window] = old._replace(latents=encode_clip(self.sampler.vae, first).to(old.latents))
        while frames:
            run, frames = frames[:chunk], frames[chunk:]
            self._write(run)

    @property
    def _num_recent(self) -> int:
        """Pixel frames of the window, if it were the start of a video."""
        assert self.state.options.window is not None
        return self.sampler.grid.num_frames(self.state.options.window * self.sampler.grid.patch_frames)


def new_state(options: RolloutOptions) -> TemporalState:
    """The denoiser's state at the start of a video, for resolved options."""
    assert options.positions is not None
    return TemporalState(options.window, options.sink, options.positions)


def _differ(before: Any, after: Any, index: int) -> bool:
    """Whether the prompts of one video differ: strings that apply to all videos, or lists of one per video."""
    one, other = (prompt[index] if isinstance(prompt, list) else prompt for prompt in (before, after))
    return one != other


def convert_chunk(chunk: Tensor, frame_type: FrameType) -> Any:
    """Converts a chunk `(b, 3, n, h, w)` in [-1, 1] to a frame type, with a batch axis."""
    if frame_type == "uint8":
        return to_frames(chunk)
    frames = to_pt(chunk)
    if frame_type == "pt":
        return frames
    arrays = frames.movedim(2, -1).cpu().numpy()
    return arrays if frame_type == "np" else [VideoProcessor.numpy_to_pil(one) for one in arrays]


@contextmanager
def saved_rollout(folder: Path) -> Iterator[Path]:
    """Yields a folder to write a rollout to, which then atomically replaces an older one.

    Raises:
        ValueError: The path exists and is not a saved rollout, or another process holds its lock.
    """
    with locked_rollout(folder):
        if folder.exists() and not (folder / "rollout.json").is_file():
            raise ValueError(f"{folder} exists and is not a saved rollout: choose another name")
        with atomic_directory(folder) as partial:
            yield partial


@contextmanager
def locked_rollout(folder: Path, *, read_only: bool = False) -> Iterator[None]:
    """Holds the lock of a saved rollout, so that it is not replaced meanwhile.

    Args:
        folder: The saved rollout.
        read_only: Whether it is only read. Then nothing is locked where nothing can be written.

    Raises:
        ValueError: Another process holds the lock. The error says which one.
    """
    if read_only and not os.access(folder.absolute().parent, os.W_OK):
        yield
        return
    with locked(folder, folder.with_name(f".{folder.name}.lock"), wait=LOCK_WAIT):
        yield


def is_saved(folder: Path) -> bool:
    """Whether the folder contains a saved rollout. If replacing one was interrupted, the old one is restored first."""
    restore_backup(folder)
    return (folder / "rollout.json").is_file()


def read_record(folder: Path, formats: tuple[str, ...] = (FORMAT,)) -> dict[str, Any]:
    """The content of `rollout.json`.

    Raises:
        ValueError: The folder contains no rollout, one in another format, or one that was damaged.
    """
    if not is_saved(folder):
        raise ValueError(f"{folder} is not a saved rollout: it has no rollout.json")
    record = read_json(folder / "rollout.json")
    if record.get("format") not in formats:
        raise ValueError(
            f"{folder} must be a saved rollout of this version ({' or '.join(formats)}), got {record.get('format')}"
        )
    try:
        return check_seal(folder, "rollout.json")
    except ValueError as error:
        raise ValueError(f"{folder} is damaged ({error}): start the rollout again or use another copy") from error


def check_fingerprint(folder: Path, made_with: dict[str, Any], fingerprint: dict[str, Any]) -> None:
    """Checks that a result is continued with the same networks that it was made with.

    Args:
        folder: Folder of the result, for the error message.
        made_with: Fingerprints of its components by name. `None` entries are not compared.
        fingerprint: Fingerprints of the current components.

    Raises:
        ValueError: Some components differ. The error names them.
    """

    def agree(one: list[str | None], other: list[str | None] | None) -> bool:
        return other is not None and all(a == b or None in (a, b) for a, b in zip(one, other, strict=True))

    differing = [name for name, mark in made_with.items() if not agree(mark, fingerprint.get(name))]
    if differing:
        raise ValueError(f"{folder} was made with a different {' and '.join(differing)} than this pipeline has")


def _versions() -> dict[str, str]:
    return {"vgen": __version__} | {name: version(name) for name in ("torch", "diffusers")}
