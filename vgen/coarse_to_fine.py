"""Coarse to fine: frames far apart are rolled out and those between them interpolated, for very long videos.

Axes: `b` videos, `t h w` latent frames, rows and columns.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from vgen.interpolation import Interpolator
from vgen.known_frames import to_frames
from vgen.models.prompts import is_single, untold_as
from vgen.rollout import COARSE_TO_FINE, Rollout, due_prompt, read_record, saved_rollout, start_rollout
from vgen.temporal.state import TemporalState

if TYPE_CHECKING:
    from vgen.pipeline import VideoGenPipeline


class CoarseToFine:
    """Yields the new frames of a video as a `Rollout` does, piece by piece.

    A rollout at a lower frame rate makes every `stride`-th frame, so that what it remembers reaches `stride` times as
    far back; its frames become keyframes, and what lies between them is interpolated. All frames come out of one
    decoder: the coarse ones are shown as it decodes them among the others.

    Made by `VideoGenPipeline.rollout(..., stride=...)`, which describes the arguments.

    Args:
        coarse: Makes the frames far apart.
        fill: Makes those between; it takes frames at the rate of `coarse`.
        schedule: Prompts by new frame.
        num_frames: New frames; `None` never ends.
        last_given: The last frame of a given video, `(b, 3, 1, h, w)` in [-1, 1], from which the new ones lead away.
    """

    def __init__(
        self,
        coarse: Rollout,
        fill: Interpolator,
        schedule: Mapping[int, str | Sequence[str]],
        num_frames: int | None,
        last_given: torch.Tensor | None,
    ):
        self.coarse, self.fill, self.schedule, self.num_frames = coarse, fill, dict(schedule), num_frames
        self.single = coarse.single
        self.frames_done = 0
        """New frames yielded so far."""
        self._prompt = due_prompt(schedule, 0)
        self._given_to_skip = 0 if last_given is None else 1
        if last_given is not None:
            fill.take(last_given)

    def __iter__(self) -> Iterator[np.ndarray]:
        return self

    @torch.no_grad()
    def __next__(self) -> np.ndarray:
        """The next frames."""
        if self.num_frames is not None and self.frames_done >= self.num_frames:
            self.coarse.pipe.maybe_free_model_hooks()
            raise StopIteration
        self._set_prompt()
        while (piece := self.fill.next()) is None:
            chunk = next(self.coarse, None)
            if chunk is None:
                piece = self.fill.next(last=True)
                break
            frames = torch.from_numpy(chunk[None] if self.single else chunk)
            self.fill.take(frames.movedim(-1, 1).to(self.coarse.pipe._execution_device) / 127.5 - 1)
        assert piece is not None
        left = None if self.num_frames is None else self.num_frames - self.frames_done
        new = to_frames(piece)[:, self._given_to_skip :][:, :left]
        self._given_to_skip = 0
        if not new.shape[1]:  # the given frame alone
            return next(self)
        self.frames_done += new.shape[1]
        return new[0] if self.single else new

    def save(self, folder: str | Path) -> None:
        """Writes all that the continuation needs but the weights, as `Rollout.save` does."""
        with saved_rollout(Path(folder)) as partial:
            self.coarse.save(partial / "coarse")
            tensors = {f"given.{index}": frame for index, frame in self.fill.given.items()}
            tensors |= {f"finished.{index}": latent for index, latent in self.fill.finished.items()}
            save_file({k: v.cpu().contiguous() for k, v in tensors.items()}, partial / "fill.safetensors")
            self.fill.decoder_state.save(partial / "decoder.safetensors")
            fill = {name: getattr(self.fill, name) for name in _FILL_SETTINGS}
            own = {name: getattr(self, name) for name in ("num_frames", "frames_done", "_prompt", "_given_to_skip")}
            record = {"format": COARSE_TO_FINE, "fill": fill, "settings": own, "schedule": list(self.schedule.items())}
            (partial / "rollout.json").write_text(json.dumps(record, indent=1))

    @classmethod
    def load(cls, folder: str | Path, pipe: VideoGenPipeline) -> CoarseToFine:
        """Goes on where `save` was called; errors are those of `Rollout.load`."""
        folder = Path(folder)
        record = read_record(folder)
        coarse = Rollout.load(folder / "coarse", pipe)
        assert isinstance(coarse, Rollout)
        tensors, device = load_file(folder / "fill.safetensors"), pipe._execution_device
        fill = Interpolator.__new__(Interpolator)
        fill.pipe, fill.generator = pipe, coarse.generator
        for name in _FILL_SETTINGS:
            setattr(fill, name, record["fill"][name])
        fill.given, fill.finished = (
            {int(k.partition(".")[2]): v.to(device) for k, v in tensors.items() if k.startswith(kind)}
            for kind in ("given.", "finished.")
        )
        fill.decoder_state = TemporalState.load(folder / "decoder.safetensors").move_to(device)
        self = cls(coarse, fill, dict(record["schedule"]), None, None)
        for name, value in record["settings"].items():
            setattr(self, name, value)
        fill.embeds = coarse.embed(self._prompt)
        return self

    def _set_prompt(self) -> None:
        due = due_prompt(self.schedule, self.frames_done)
        if due != self._prompt:
            self._prompt = due
            self.fill.embeds = self.coarse.embed(due)


def coarse_to_fine(
    pipe: VideoGenPipeline,
    prompt: Any,
    video: Any,
    *,
    stride: int,
    num_frames: int | None,
    frame_rate: float | None,
    **options: Any,
) -> CoarseToFine:
    """Sets both parts up; the arguments are those of `VideoGenPipeline.rollout`.

    Raises:
        ValueError: As `rollout` and `interpolate` do.
    """
    if not isinstance(stride, int) or stride < 1:
        raise ValueError(f"stride={stride} is not possible: give a whole number from 1 on")
    rate = (pipe.config.frame_rate if frame_rate is None else frame_rate) / stride
    count, last_given, given = num_frames, None, None
    if video is not None:
        # frames are counted back from the last one, so that all must be there
        clip = pipe.given_clip(list(video) if isinstance(video, Iterator) else video, prompt)
        last_given = clip[:, :, -1:].to(pipe._execution_device)
        given = [one.movedim(1, 0) / 2 + 0.5 for one in clip[:, :, (clip.shape[2] - 1) % stride :: stride]]
        given = given[0] if is_single(prompt) else given
    if num_frames is not None and num_frames > 0:
        count = -(-num_frames // stride) if video is not None else 1 + -(-(num_frames - 1) // stride)
    changes = isinstance(prompt, Mapping) and all(isinstance(frame, int) for frame in prompt)
    schedule = dict(sorted(prompt.items())) if changes else {0: prompt}
    rarely = {-(-frame // stride): text for frame, text in schedule.items()} if changes else prompt
    coarse = start_rollout(pipe, rarely, given, num_frames=count, frame_rate=rate, **options)
    fill = pipe.interpolator(
        stride,
        schedule[0],
        size=coarse.size,
        negative_prompt=coarse.negative_prompt,
        frame_rate=rate,
        num_inference_steps=coarse.num_inference_steps,
        guidance_scale=coarse.guidance_scale,
        generator=coarse.generator,
        keep_given=False,
    )
    prompts = {frame: untold_as(text, "") for frame, text in schedule.items()}
    return CoarseToFine(coarse, fill, prompts, num_frames, last_given)


_FILL_SETTINGS = (
    "factor", "guidance_scale", "frame_rate", "num_inference_steps", "keep_given", "num_given", "num_made",
)  # fmt: skip
