"""Rollout: a video that is continued chunk after chunk, with bounded memory and for as long as one likes.

Axes: `b` videos, `c` channels, `t h w` latent frames, rows and columns, `n` token frames.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor
from einops import rearrange
from torch import Tensor

from vgen.known_frames import encode_clip, encode_slots, fill_slots, place
from vgen.temporal.state import TemporalState

if TYPE_CHECKING:
    from vgen.pipeline import VideoGenPipeline


class Rollout:
    """Yields the new frames of a video, uint8 `(n, h, w, 3)`, or `(b, n, h, w, 3)` for a list of prompts.

    The denoiser remembers `sink` token frames from the start and `window` recent ones as keys and values; the VAE's
    decoder remembers what its convolutions need. Nothing else grows, so a chunk costs the same however long the video
    is. What was generated is never decoded and encoded again.

    Made by `VideoGenPipeline.rollout`, which describes the arguments.
    """

    def __init__(
        self,
        pipe: VideoGenPipeline,
        prompt: str | Sequence[str] | Mapping[int, str] | None,
        clip: Tensor | None,
        *,
        negative_prompt: str | None,
        num_frames: int | None,
        height: int,
        width: int,
        frame_rate: float,
        num_inference_steps: int,
        guidance_scale: float,
        chunk_size: int,
        window: int | None,
        sink: int | None,
        history_noise: float,
        generator: torch.Generator | list[torch.Generator] | None,
    ):
        self.pipe = pipe
        self.schedule = dict(prompt) if isinstance(prompt, Mapping) else {0: "" if prompt is None else prompt}
        self.single = isinstance(prompt, (str, Mapping)) or prompt is None
        self.negative_prompt = negative_prompt
        self.num_frames = num_frames
        self.size = (height, width)
        self.frame_rate = frame_rate
        self.num_inference_steps = num_inference_steps
        self.guidance_scale = guidance_scale
        self.chunk_size = chunk_size
        self.history_noise = history_noise
        self.generator = generator

        self.state = TemporalState(window, sink)
        self.decoder_state = TemporalState()
        self.frames_done = 0
        """New frames yielded so far."""
        self._history: list[tuple[Tensor, float]] = []  # clean latents of the token frames kept, and their level
        self._keyframes: dict[tuple[int, int], Tensor] = {}  # of the next chunk: given frames that filled no latent
        self._given_frames = 0  # how many frames of the next chunk these are
        self._prompt: str | Sequence[str] | None = None
        self._embeds: tuple[Tensor, Tensor | None] | None = None
        self._set_prompt()
        if clip is not None:
            self._take(clip)

    def __iter__(self) -> Iterator[np.ndarray]:
        return self

    @torch.no_grad()
    def __next__(self) -> np.ndarray:
        """The frames of the next chunk."""
        if self.num_frames is not None and self.frames_done >= self.num_frames:
            raise StopIteration
        self._set_prompt()
        clip = self._finish(self._denoise(), self.history_noise)[:, :, self._given_frames :]
        self._given_frames, self._keyframes = 0, {}
        left = None if self.num_frames is None else self.num_frames - self.frames_done
        clip = clip[:, :, :left]
        self.frames_done += clip.shape[2]
        pixels = clip.float().clamp(-1, 1).add(1).mul(127.5).round().byte()
        frames = rearrange(pixels, "b c n h w -> b n h w c").cpu().numpy()
        return frames[0] if self.single else frames

    def _set_prompt(self) -> None:
        """Embeds the prompt that is due; what is remembered is computed again under a new one."""
        due = self.schedule[max(frame for frame in self.schedule if frame <= self.frames_done)]
        if due == self._prompt:
            return
        self._prompt = due
        self._guide()
        prompts = [due] if isinstance(due, str) else list(due)
        self._embeds = self.pipe.encode_prompt(
            prompts,
            self.negative_prompt,
            self.pipe.do_classifier_free_guidance,
            device=self.pipe._execution_device,
            dtype=self.pipe.denoiser.dtype,
        )
        if self._history:
            history, self._history = self._history, []
            sink = self.state.sink or 0
            self.state = TemporalState(self.state.window, sink)
            self._remember(history[:sink])
            self._remember(history[sink:])

    def _take(self, clip: Tensor) -> None:
        """Encodes given frames `(b, 3, f, h, w)`: whole token frames are remembered, the rest are keyframes."""
        pipe, p_t = self.pipe, self.pipe.denoiser.config.patch_size[0]
        s = pipe.vae_scale_factor_temporal
        placement = place(range(clip.shape[2]), clip.shape[2] + s * p_t, s, p_t)
        clip = clip.to(pipe._execution_device)
        encoder_state, waiting = TemporalState(), clip.new_zeros(0)
        for piece in clip[:, :, : placement.leading_frames].split(s * p_t * self.chunk_size, dim=2):
            latents = encode_clip(pipe.vae, piece, encoder_state)
            waiting = torch.cat([waiting, latents], dim=2) if len(waiting) else latents
            while waiting.shape[2] >= (length := self._run_length * p_t):
                self._finish(waiting[:, :, :length], 0.0)
                waiting = waiting[:, :, length:]
        if len(waiting) and waiting.shape[2]:
            self._finish(waiting, 0.0)
        places = {(k - placement.num_leading, j): clip[:, :, index] for index, (k, j) in placement.slots.items()}
        self._keyframes = encode_slots(pipe.vae, places) if places else {}
        self._given_frames = len(places)

    def _denoise(self) -> Tensor:
        """The latents of the next chunk."""
        pipe, (height, width) = self.pipe, self.size
        assert self._embeds is not None
        space, frames = pipe.vae_scale_factor_spatial, self._run_length * pipe.denoiser.config.patch_size[0]
        shape = (len(self._embeds[0]), pipe.denoiser.config.in_channels, frames, height // space, width // space)
        latents = randn_tensor(shape, generator=self.generator, device=torch.device("cpu"))
        latents = latents.to(pipe._execution_device) * getattr(pipe.scheduler, "init_noise_sigma", 1.0)
        pipe.scheduler.set_timesteps(self.num_inference_steps, device=latents.device)
        keyframes = None
        if self._keyframes:
            keyframes = fill_slots(self._keyframes, frames, pipe.vae_scale_factor_temporal, latents[:, :, 0])
        for timestep in pipe.scheduler.timesteps:
            latents = pipe.denoising_step(
                latents, timestep, timestep, *self._guided(), self.generator, **self._conditions(self.state.frozen()),
                keyframes=keyframes,
            )  # fmt: skip
        return latents

    @property
    def _run_length(self) -> int:
        """Token frames of the next chunk: the first of a video comes alone."""
        return self.chunk_size if self._history else 1

    def _finish(self, latents: Tensor, level: float) -> Tensor:
        """Remembers finished latents `(b, c, t, h, w)`, told to be at a noise level; returns their pixels."""
        p_t = self.pipe.denoiser.config.patch_size[0]
        self._remember([(frame, level) for frame in latents.split(p_t, dim=2)])
        vae = self.pipe.vae
        if vae is None:
            return latents
        return vae.decode(vae.denormalize(latents).to(vae.dtype), state=self.decoder_state).sample

    def _remember(self, frames: list[tuple[Tensor, float]]) -> None:
        """Writes token frames with their levels into the state, run by run."""
        while frames:
            run, frames = frames[: self._run_length], frames[self._run_length :]
            latents = torch.cat([latents for latents, _ in run], dim=2)
            levels = torch.tensor([level for _, level in run], device=latents.device)
            with _without_step_cache(self.pipe.denoiser):
                self.pipe.predict_noise(
                    latents,
                    levels * self.pipe.scheduler.config.num_train_timesteps,
                    *self._guided(),
                    **self._conditions(self.state),
                )
            self._history += run
            assert self.state.window is not None
            sink = self.state.sink or 0
            surplus = max(0, len(self._history) - sink - self.state.window)
            del self._history[sink : sink + surplus]

    def _conditions(self, state: TemporalState) -> dict[str, Any]:
        knows_rate = self.pipe.denoiser.config.frame_rate_embedding
        return {"state": state, "frame_rate": self.frame_rate if knows_rate else None}

    def _guided(self) -> tuple[Tensor, Tensor | None]:
        """The embeddings; the pipeline, which may have served other calls since, guides as this video wants."""
        assert self._embeds is not None
        self._guide()
        return self._embeds

    def _guide(self) -> None:
        self.pipe._guidance_scale, self.pipe._guider = self.guidance_scale, None


@contextmanager
def _without_step_cache(denoiser: Any) -> Iterator[None]:
    """A step cache would skip blocks whose keys and values a state needs."""
    config = denoiser._cache_config
    if config is None:
        yield
        return
    denoiser.disable_cache()
    try:
        yield
    finally:
        denoiser.enable_cache(config)
