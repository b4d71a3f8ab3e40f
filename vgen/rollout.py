"""Rollout: a video that is continued chunk after chunk, with bounded memory and for as long as one likes.

Axes: `b` videos, `c` channels, `t h w` latent frames, rows and columns, `n` token frames.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from diffusers.utils import logging
from diffusers.utils.torch_utils import randn_tensor
from safetensors.torch import load_file, save_file
from torch import Tensor

from vgen.diffusion import flow_sample
from vgen.folders import older, whole_folder
from vgen.known_frames import encode_clip, encode_slots, place, to_frames, to_pixels
from vgen.models.denoiser import pack_keyframes
from vgen.models.prompts import is_single, is_told, untold_as
from vgen.temporal.state import TemporalState

if TYPE_CHECKING:
    from vgen.coarse_to_fine import CoarseToFine
    from vgen.pipeline import VideoGenPipeline

logger = logging.get_logger(__name__)

_FORMAT = "vgen.Rollout/1"
WEAK_LEVEL = 1 / 3
"""Noise level of the history that history guidance leads away from: the highest that training shows."""
COARSE_TO_FINE = "vgen.CoarseToFine/2"
SETTINGS_WITH_DEFAULTS = (
    "num_inference_steps",
    "guidance_scale",
    "chunk_size",
    "window",
    "sink",
    "history_noise",
    "history_guidance_scale",
)
"""Settings of a rollout for which a checkpoint may have defaults of its own."""
_SETTINGS = (
    "single",
    "negative_prompt",
    "num_frames",
    "size",
    "frame_rate",
    "num_inference_steps",
    "guidance_scale",
    "chunk_size",
    "history_noise",
    "history_guidance_scale",
    "frames_done",
    "_given_frames",
    "_prompt",
)


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
        prompt: str | Sequence[str | None] | Mapping[int, str] | None,
        clips: Iterable[Tensor],
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
        history_guidance_scale: float,
        generator: torch.Generator | list[torch.Generator],
    ):
        self.pipe = pipe
        schedule = dict(prompt) if isinstance(prompt, Mapping) else {0: prompt}
        self.schedule = {frame: untold_as(one, "") for frame, one in schedule.items()}
        self.single = is_single(prompt)
        self.negative_prompt = negative_prompt
        self.num_frames = num_frames
        self.size = (height, width)
        self.frame_rate = frame_rate
        self.num_inference_steps = num_inference_steps
        self.guidance_scale = guidance_scale
        self.chunk_size = chunk_size
        self.history_noise = history_noise
        self.history_guidance_scale = history_guidance_scale
        self.generator = generator

        self.state = TemporalState(window, sink)
        self.decoder_state = TemporalState()
        self.frames_done = 0
        """New frames yielded so far."""
        self._history: list[tuple[Tensor, float]] = []  # clean latents of the last token frames and their level
        self._keyframes: dict[tuple[int, int], Tensor] = {}  # of the next chunk: given frames that filled no latent
        self._given_frames = 0  # how many frames of the next chunk these are
        self._prompt: str | Sequence[str] | None = None
        self._embeds: tuple[Tensor, Tensor | None] | None = None
        self._set_prompt()
        self._take(clips)

    def __iter__(self) -> Iterator[np.ndarray]:
        return self

    @torch.no_grad()
    def __next__(self) -> np.ndarray:
        """The frames of the next chunk."""
        if self.num_frames is not None and self.frames_done >= self.num_frames:
            self.pipe.maybe_free_model_hooks()
            raise StopIteration
        self._set_prompt()
        clip = self._finish(self._denoise(), self.history_noise)[:, :, self._given_frames :]
        self._given_frames, self._keyframes = 0, {}
        left = None if self.num_frames is None else self.num_frames - self.frames_done
        clip = clip[:, :, :left]
        self.frames_done += clip.shape[2]
        frames = to_frames(clip)
        return frames[0] if self.single else frames

    def save(self, folder: str | Path) -> None:
        """Writes all that the continuation needs but the weights, in JSON and safetensors.

        The folder appears whole; an older rollout of the same name is replaced.

        Raises:
            ValueError: There is something else of that name.
        """
        with saved_rollout(Path(folder)) as partial:
            self._save(partial)

    def _save(self, folder: Path) -> None:
        sources = self.generator if isinstance(self.generator, list) else [self.generator]
        tensors = {f"generator.{index}": source.get_state() for index, source in enumerate(sources)}
        tensors |= {f"history.{index}": latents for index, (latents, _) in enumerate(self._history)}
        tensors |= {f"keyframe.{latent}.{slot}": image for (latent, slot), image in self._keyframes.items()}
        tensors |= {f"embeds.{index}": one for index, one in enumerate(self._embeds or ()) if one is not None}
        save_file(
            {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, folder / "tensors.safetensors"
        )
        self.state.save(folder / "denoiser.safetensors")
        self.decoder_state.save(folder / "decoder.safetensors")
        settings = {name: getattr(self, name) for name in _SETTINGS}
        record = {
            "format": _FORMAT,
            "versions": _versions(),
            "made_with": fingerprint(self.pipe),
            "settings": settings | {"schedule": list(self.schedule.items())},
            "levels": [level for _, level in self._history],
            "generators": [str(source.device) for source in sources],
            "one_generator": not isinstance(self.generator, list),
        }
        (folder / "rollout.json").write_text(json.dumps(record, indent=1))

    @classmethod
    def load(cls, folder: str | Path, pipe: VideoGenPipeline) -> Rollout | CoarseToFine:
        """Goes on where `save` was called, coarse to fine if so; on the CPU, with the same versions, bit for bit.

        Args:
            folder: What `save` wrote.
            pipe: The pipeline that made it, or the same loaded again.

        Raises:
            ValueError: The folder holds no rollout, or that of other networks or another scheduler, which are named.
        """
        folder = Path(folder)
        record = read_record(folder)
        if record["format"] == COARSE_TO_FINE:
            from vgen.coarse_to_fine import CoarseToFine  # which is built on this module

            return CoarseToFine.load(folder, pipe)
        made_with = fingerprint(pipe)
        differing = [name for name, mark in record["made_with"].items() if not _agree(mark, made_with.get(name))]
        if differing:
            raise ValueError(f"{folder} was made with another {' and '.join(differing)} than this pipeline has")
        if record["versions"] != _versions():
            logger.warning(f"{folder} was saved with {record['versions']}: the continuation may differ in rounding")
        device = pipe._execution_device
        # as in `TemporalState.load`
        tensors = {name: tensor.clone() for name, tensor in load_file(folder / "tensors.safetensors").items()}

        self = cls.__new__(cls)
        self.pipe = pipe
        for name in _SETTINGS:
            setattr(self, name, record["settings"][name])
        self.schedule = {frame: prompt for frame, prompt in record["settings"]["schedule"]}
        height, width = self.size
        self.size = height, width
        self.state = TemporalState.load(folder / "denoiser.safetensors").move_to(device)
        self.decoder_state = TemporalState.load(folder / "decoder.safetensors").move_to(device)
        levels = record["levels"]
        self._history = [(tensors[f"history.{index}"].to(device), level) for index, level in enumerate(levels)]
        self._keyframes = {}
        for name in (name for name in tensors if name.startswith("keyframe.")):
            _, latent, slot = name.split(".")
            self._keyframes[int(latent), int(slot)] = tensors[name].to(device)
        negative = tensors.get("embeds.1")
        self._embeds = tensors["embeds.0"].to(device), None if negative is None else negative.to(device)
        generators = []
        for index, where in enumerate(record["generators"]):
            generators.append(torch.Generator(where))
            generators[-1].set_state(tensors[f"generator.{index}"])
        self.generator = generators[0] if record["one_generator"] else generators
        return self

    def _set_prompt(self) -> None:
        """Embeds the prompt that is due; what is remembered is computed again under a new one."""
        due = due_prompt(self.schedule, self.frames_done)
        if due == self._prompt:
            return
        self._prompt = due
        self._embeds = self.embed(due)
        if self._history:
            history, self._history = self._history, []
            sink = self.state.sink or 0
            self.state = TemporalState(self.state.window, sink)
            self._remember(history[:sink])
            self._remember(history[sink:])

    def embed(self, prompt: str | Sequence[str]) -> tuple[Tensor, Tensor | None]:
        """Embeddings of a prompt, or of one for each video, and of what to steer away from."""
        return self.pipe.encode_prompt(
            [prompt] if isinstance(prompt, str) else list(prompt),
            self.negative_prompt,
            self.guidance_scale > 1,
            device=self.pipe._execution_device,
            dtype=self.pipe.denoiser.dtype,
        )

    @torch.no_grad()
    def _take(self, clips: Iterable[Tensor]) -> None:
        """Encodes given frames `(b, 3, f, h, w)`: whole token frames are remembered, the rest are keyframes."""
        pipe, p_t = self.pipe, self.pipe.denoiser.patch_size[0]
        s, device = pipe.vae_scale_factor_temporal, pipe._execution_device
        encoder_state, num_frames = TemporalState(), 0
        waiting: list[Tensor] = []  # pixels that fill no run of token frames yet
        for frame in (frame for clip in clips for frame in clip.unbind(2)):
            waiting.append(frame.to(device))
            num_frames += 1
            if len(waiting) == s * p_t * self._run_length - (0 if self._history else s - 1):
                self._finish(encode_clip(pipe.codec, torch.stack(waiting, dim=2), encoder_state), 0.0)
                waiting = []
        if not num_frames:
            return
        placement = place(range(num_frames), num_frames + s * p_t, s, p_t)
        whole = len(waiting) - len(placement.slots)  # frames of a last, shorter run
        if whole:
            self._finish(encode_clip(pipe.codec, torch.stack(waiting[:whole], dim=2), encoder_state), 0.0)
        if placement.slots:
            pipe.check_tasks({"keyframes"})
            rest = zip(placement.slots.values(), waiting[whole:], strict=True)
            self._keyframes = encode_slots(
                pipe.codec, {(latent - placement.num_leading, slot): frame for (latent, slot), frame in rest}
            )
        self._given_frames = len(placement.slots)

    def _denoise(self) -> Tensor:
        """The latents of the next chunk."""
        pipe, (height, width) = self.pipe, self.size
        assert self._embeds is not None
        space, frames = pipe.vae_scale_factor_spatial, self._run_length * pipe.denoiser.patch_size[0]
        shape = (len(self._embeds[0]), pipe.denoiser.config.in_channels, frames, height // space, width // space)
        noise = draw_noise(shape, self.generator, torch.float32).to(pipe._execution_device)
        keyframes = None
        if self._keyframes:
            keyframes = pack_keyframes(self._keyframes, frames, pipe.vae_scale_factor_temporal, noise[:, :, 0])
            keyframes = keyframes.to(pipe.denoiser.dtype)
        state, guidance = self.state.frozen(), dict[str, Any]()
        if self.history_guidance_scale != 1 and self._history:
            guidance = {"weak_state": state.branch("weak"), "history_guidance_scale": self.history_guidance_scale}
        return pipe.denoise(
            noise, self.num_inference_steps, self._guided(), self.generator, **self._conditions(state), **guidance,
            keyframes=keyframes,
        )  # fmt: skip

    @property
    def _run_length(self) -> int:
        """Token frames of the next chunk: the first of a video comes alone."""
        return self.chunk_size if self._history else 1

    @property
    def _num_unseen(self) -> int:
        """Token frames kept beyond those that attention remembers: whole chunks of what convolutions see before them.

        When all is computed again, these are forgotten on the way, and the convolutions go on from them as if nothing
        were missing behind the sink.
        """
        return math.ceil(getattr(self.pipe.denoiser, "conv_history", 0) / self.chunk_size) * self.chunk_size

    def _finish(self, latents: Tensor, level: float) -> Tensor:
        """Remembers finished latents `(b, c, t, h, w)`, told to be at a noise level; returns their pixels."""
        p_t = self.pipe.denoiser.patch_size[0]
        self._remember([(frame, level) for frame in latents.split(p_t, dim=2)])
        return self.pipe.decode_next(latents, self.decoder_state)

    def _remember(self, frames: list[tuple[Tensor, float]]) -> None:
        """Writes token frames with their levels into the state, run by run."""
        while frames:
            run, frames = frames[: self._run_length], frames[self._run_length :]
            latents = torch.cat([latents for latents, _ in run], dim=2)
            levels = torch.tensor([level for _, level in run], device=latents.device)
            self._write(self.state, latents, levels)
            if self.history_guidance_scale != 1:
                levels = levels.clamp_min(WEAK_LEVEL)
                noise = draw_noise(latents.shape, self.generator, latents.dtype).to(latents.device)
                noisy, _ = flow_sample(latents, noise, levels.expand(len(latents), -1))
                self._write(self.state.branch("weak"), noisy, levels)
            self._history += run
            assert self.state.window is not None
            sink = self.state.sink or 0
            surplus = max(0, len(self._history) - sink - self._num_unseen - self.state.window)
            del self._history[sink : sink + surplus]

    def _write(self, state: TemporalState, latents: Tensor, levels: Tensor) -> None:
        with _without_step_cache(self.pipe.denoiser):
            self.pipe.predict_noise(
                latents,
                levels * self.pipe.scheduler.config.num_train_timesteps,
                *self._guided(),
                **self._conditions(state),
            )

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


def start_rollout(
    pipe: VideoGenPipeline,
    prompt: str | Sequence[str | None] | Mapping[int, str] | None,
    video: Any,
    *,
    negative_prompt: str | None,
    num_frames: int | None,
    height: int | None,
    width: int | None,
    frame_rate: float | None,
    generator: torch.Generator | list[torch.Generator] | None,
    **settings: Any,
) -> Rollout:
    """Fills in the checkpoint's defaults, in `settings` too, and refuses what cannot be.

    See `VideoGenPipeline.rollout`.
    """
    config = pipe.denoiser.config
    schedule = dict(prompt) if isinstance(prompt, Mapping) else {0: prompt}
    if not schedule or min(schedule) != 0 or not all(isinstance(frame, int) for frame in schedule):
        raise ValueError(f"a schedule of prompts begins at frame 0, not with frames {sorted(schedule)}")
    count = 1 if prompt is None or is_single(prompt) else len(prompt)
    clips: Iterator[Tensor] = iter(())
    if video is not None:
        streamed = is_single(prompt) and isinstance(video, Iterator)
        clips = _one_by_one(video) if streamed else iter([pipe.given_clip(video, prompt)])
        clip = next(clips)
        clips = itertools.chain([clip], clips)
        height, width = height or clip.shape[-2], width or clip.shape[-1]
        if (height, width) != clip.shape[-2:]:
            raise ValueError(f"a video of {clip.shape[-2]}x{clip.shape[-1]} cannot become one of {height}x{width}")
    height = pipe.config.height if height is None else height
    width = pipe.config.width if width is None else width
    frame_rate = pipe.config.frame_rate if frame_rate is None else frame_rate
    defaults = default_settings(pipe)
    if not is_told(prompt):
        defaults["guidance_scale"] = 1.0
    settings = defaults | {name: value for name, value in settings.items() if value is not None}
    steps, noise = settings["num_inference_steps"], settings["history_noise"]
    chunk_size, window, sink = (settings[name] for name in ("chunk_size", "window", "sink"))
    for one in schedule.values():
        texts = untold_as(one, "a video")
        pipe.check_inputs(texts, negative_prompt, height, width, pipe.first_frames, frame_rate, steps, groups=(0,))
    if num_frames is not None and num_frames < 1:
        raise ValueError(f"num_frames={num_frames} is not possible: give 1 or more new frames, or None for no end")
    if not 0 <= noise < 1:
        raise ValueError(f"history_noise={noise} must be at least 0 and below 1")
    flow = "shift" in pipe.scheduler.config or pipe.scheduler.config.get("use_flow_sigmas")
    if settings["history_guidance_scale"] != 1 and not flow:
        raise ValueError(f"history guidance needs a flow-matching scheduler, not {type(pipe.scheduler).__name__}")
    if isinstance(generator, list) and len(generator) != count:
        raise ValueError(f"{len(generator)} generators for {count} videos: give one, or as many")
    pipe.check_tasks({"leading"})
    if window is None or window < 1 or sink < 0 or chunk_size < 1:
        raise ValueError(f"window={window}, sink={sink}, chunk_size={chunk_size}: give at least 1, 0 and 1")
    if "chunk" not in config.group_modes and not ("causal" in config.group_modes and chunk_size == 1):
        raise ValueError(
            f"a rollout in chunks of {chunk_size} needs a checkpoint trained with groups chunk, or causal for "
            f"chunks of 1: this one was trained with {', '.join(config.group_modes)}"
        )
    limit = config.trained_token_frames
    if limit is not None and sink + window + chunk_size > limit:
        raise ValueError(
            f"sink={sink}, window={window} and chunk_size={chunk_size} token frames exceed the {limit} that this "
            "checkpoint was trained with"
        )
    return Rollout(
        pipe,
        prompt,
        clips,
        negative_prompt=negative_prompt,
        num_frames=num_frames,
        height=height,
        width=width,
        frame_rate=frame_rate,
        generator=torch.Generator().manual_seed(int(torch.randint(2**62, ()))) if generator is None else generator,
        **settings,
    )


def default_settings(pipe: VideoGenPipeline) -> dict[str, Any]:
    """What a rollout takes for what it is not told: the checkpoint's own for rollouts, or else for all it makes."""
    settings: dict[str, Any] = {"history_noise": 0.0, "history_guidance_scale": 1.0}
    settings |= {**pipe.denoiser.config, **pipe.config, **pipe.config.rollout_defaults}
    return {name: settings[name] for name in SETTINGS_WITH_DEFAULTS}


def _one_by_one(images: Iterator[Any]) -> Iterator[Tensor]:
    """Clips `(1, 3, 1, h, w)` of one image each, in [-1, 1]."""
    size = None
    for image in images:
        pixels = to_pixels(image)
        size = size or pixels.shape
        if pixels.shape != size:
            sizes = ", ".join("x".join(map(str, shape[1:])) for shape in (size, pixels.shape))
            raise ValueError(f"the video has frames of different sizes: {sizes}")
        yield pixels[None, :, None]
    if size is None:
        raise ValueError("the video has no frames")


def due_prompt(schedule: Mapping[int, Any], frame: int) -> Any:
    """What a schedule of prompts says at a new frame."""
    return schedule[max(begin for begin in schedule if begin <= frame)]


@contextmanager
def saved_rollout(folder: Path) -> Iterator[Path]:
    """A folder to write a rollout into, that then appears whole in the place of an older one.

    Raises:
        ValueError: There is something else of that name.
    """
    if folder.exists() and not (folder / "rollout.json").is_file():
        raise ValueError(f"{folder} exists and is no saved rollout: choose another name")
    with whole_folder(folder) as partial:
        yield partial


def is_saved(folder: Path) -> bool:
    """Whether a rollout was saved there; takes the older one back where replacing it was cut short."""
    if not folder.exists() and older(folder).exists():
        older(folder).replace(folder)
    return (folder / "rollout.json").is_file()


def read_record(folder: Path) -> dict[str, Any]:
    """What `rollout.json` says.

    Raises:
        ValueError: The folder holds no rollout, or one of another format.
    """
    if not is_saved(folder):
        raise ValueError(f"{folder} holds no saved rollout: it has no rollout.json")
    record = json.loads((folder / "rollout.json").read_text())
    if record.get("format") not in (_FORMAT, COARSE_TO_FINE):
        known = f"{_FORMAT} or {COARSE_TO_FINE}"
        raise ValueError(f"{folder} is not a saved rollout of this version ({known}), but {record.get('format')}")
    return record


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("vgen", "torch", "diffusers")}


def fingerprint(pipe: VideoGenPipeline) -> dict[str, list[str | None]]:
    """For each component the hashes of its configuration and of the first values of each of its weights.

    The second is `None` where there are no weights, or where offloading hides them.
    """
    scheduler = {key: value for key, value in pipe.scheduler.config.items() if key[:1] != "_"}
    scheduler["class"] = type(pipe.scheduler).__name__
    marks: dict[str, list[str | None]] = {
        "scheduler": [_digest(json.dumps(scheduler, sort_keys=True, default=str)), None]
    }
    if pipe.tokenizer is not None:
        marks["tokenizer"] = [_digest(json.dumps(pipe.tokenizer.get_vocab(), sort_keys=True)), None]
    for name, network in (("denoiser", pipe.denoiser), ("vae", pipe.vae), ("text encoder", pipe.text_encoder)):
        if network is not None:
            config = {"class": type(network).__name__}
            if isinstance(network.config, dict):  # ours; transformers' also holds versions and precision
                config |= {key: value for key, value in network.config.items() if key[:1] != "_"}
            weights = sorted(network.state_dict().items())
            values = None
            if not any(weight.is_meta for _, weight in weights):
                values = _digest(str([(key, weight.flatten()[:8].tolist()) for key, weight in weights]))
            marks[name] = [_digest(json.dumps(config, sort_keys=True, default=str)), values]
    return marks


def _agree(mark: list[str | None], other: list[str | None] | None) -> bool:
    return other is not None and mark[0] == other[0] and (None in (mark[1], other[1]) or mark[1] == other[1])


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def draw_noise(
    shape: tuple[int, ...], generator: torch.Generator | list[torch.Generator] | None, dtype: torch.dtype
) -> Tensor:
    """Noise on the device of its generators, on the CPU without one."""
    first = generator[0] if isinstance(generator, list) else generator
    return randn_tensor(shape, generator, torch.device("cpu") if first is None else first.device, dtype)


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
