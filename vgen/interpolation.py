"""Interpolation: the frames between given ones, window by window, for clips of any length.

Axes: `b` videos, `c` channels, `t h w` latent frames, rows and columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vgen.known_frames import KnownFrames, Placement, encode_clip, encode_slots, fill_slots, place
from vgen.rollout import draw_noise
from vgen.temporal.attention import make_groups
from vgen.temporal.state import TemporalState

if TYPE_CHECKING:
    from vgen.pipeline import VideoGenPipeline

RECENT = 2
"""Finished latents just before a window that it sees, beside those from the start, where there is room."""


def windows(num_latents: int, has_known: list[bool], limit: int, sink: int) -> Iterator[tuple[list[int], range]]:
    """Plans which finished latents each window sees, and which it makes; latent 0 is finished already.

    Every window but the last ends with a latent in which a frame is given, so that it knows where it is going.

    Args:
        num_latents: Of the whole video.
        has_known: For each latent, whether one of its frames is given.
        limit: Latents that the denoiser was trained with at once.
        sink: Latents from the start to see, where there is room.

    Raises:
        ValueError: Given frames are too far apart.
    """
    first = 1
    while first < num_latents:
        for start, recent in ((sink, RECENT), (sink, 1), (0, 1)):
            seen = sorted({*range(min(start, first)), *range(max(0, first - recent), first)})
            room = min(limit - len(seen), num_latents - first)
            ends = [end for end in range(first + 1, first + room + 1) if end == num_latents or has_known[end - 1]]
            if ends:
                yield seen, range(first, ends[-1])
                first = ends[-1]
                break
        else:
            gap = next(end for end in range(first, num_latents) if has_known[end]) - first + 1
            raise ValueError(
                f"between given frames lie {gap} latents, and this denoiser makes at most {limit - 1} at once: give a "
                "smaller factor"
            )


@torch.no_grad()
def interpolate(
    pipe: VideoGenPipeline,
    clip: Tensor,
    factor: int,
    embeds: tuple[Tensor, Tensor | None],
    *,
    frame_rate: float,
    num_inference_steps: int,
    generator: torch.Generator | list[torch.Generator] | None,
) -> Iterator[Tensor]:
    """Yields the video piece by piece, pixels `(b, 3, n, h, w)` in [-1, 1], given frames at their places.

    Args:
        pipe: Denoises and decodes, with the guidance that it is set to.
        clip: Given frames `(b, 3, f, h, w)` in [-1, 1], where the denoiser computes.
        factor: Given frames become every `factor`-th.
        embeds: Prompts, and what to steer away from.
        frame_rate: Of the result, in frames per second.
        num_inference_steps: Denoising steps a window.
        generator: Source of the noise.
    """
    config, s = pipe.denoiser.config, pipe.vae_scale_factor_temporal
    total = factor * (clip.shape[2] - 1) + 1
    num_latents = 1 + -(-(total - 1) // s)
    given = {factor * index: clip[:, :, index] for index in range(clip.shape[2])}
    slots = place(given.keys(), 1 + s * num_latents, s, config.patch_size[0]).slots
    latents_of: dict[int, list[int]] = {}
    for frame, (latent, _) in slots.items():
        latents_of.setdefault(latent, []).append(frame)
    limit = config.trained_token_frames or num_latents
    mode = "full" if "full" in config.group_modes else config.group_modes[0]

    finished = {0: encode_clip(pipe.vae, clip[:, :, :1])}
    decoder_state = TemporalState()
    yield clip[:, :, :1]
    _decode(pipe, finished[0], decoder_state)
    begin = 1
    for seen, new in windows(num_latents, [latent in latents_of for latent in range(num_latents)], limit, config.sink):
        leading = torch.cat([finished[latent] for latent in seen], dim=2)
        known = KnownFrames(Placement(len(seen), 0, {}), leading, None, {})
        frames = [frame for latent in new for frame in latents_of.get(latent, ())]
        places = {(len(seen) + slots[frame][0] - new[0], slots[frame][1]): given[frame] for frame in frames}
        count = len(seen) + len(new)
        images = encode_slots(pipe.vae, places) if places else {}
        keyframes = fill_slots(images, count, s, leading[:, :, 0])
        generated = torch.arange(count, device=clip.device) >= len(seen)

        pipe.scheduler.set_timesteps(num_inference_steps, device=clip.device)
        shape = (*leading.shape[:2], count, *leading.shape[3:])
        latents = draw_noise(shape, generator, torch.float32).to(clip.device)
        latents = known.put_back(latents * getattr(pipe.scheduler, "init_noise_sigma", 1.0))
        for timestep in pipe.scheduler.timesteps:
            latents = pipe.denoising_step(
                latents,
                timestep,
                timestep * generated,
                *embeds,
                generator,
                known,
                keyframes=keyframes.to(pipe.denoiser.dtype),
                groups=make_groups(mode, count, len(seen), config.chunk_size),
                frame_rate=frame_rate if config.frame_rate_embedding else None,
            )
            latents = known.put_back(latents)
        made = latents[:, :, len(seen) :]
        finished |= {latent: made[:, :, index : index + 1] for index, latent in enumerate(new)}
        oldest = new[-1] + 1 - RECENT
        finished = {latent: one for latent, one in finished.items() if latent < config.sink or latent >= oldest}
        pixels = _decode(pipe, made, decoder_state)[:, :, : total - begin].clone()
        for frame in frames:
            pixels[:, :, frame - begin] = given[frame].to(pixels)
        begin += pixels.shape[2]
        yield pixels


def _decode(pipe: VideoGenPipeline, latents: Tensor, state: TemporalState) -> Tensor:
    if pipe.vae is None:
        return latents
    return pipe.vae.decode(pipe.vae.denormalize(latents).to(pipe.vae.dtype), state=state).sample.float()
