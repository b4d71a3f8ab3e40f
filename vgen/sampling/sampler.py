"""Sampler: turns noise into latents with a denoiser, its own copy of a scheduler, guidance and a VAE.

Axes: `b` videos, `c` channels, `t h w` latent frames, rows and columns, `n` token frames.
"""

from __future__ import annotations

import copy
import inspect
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any
from weakref import ref

import numpy as np
import torch
from diffusers import FasterCacheConfig
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from vgen.checks import check_type
from vgen.diffusion import flow_sample, level_to_timestep
from vgen.models.denoiser import fill_keyframes
from vgen.models.image_vae import PerFrameVAE
from vgen.models.locks import lock_of
from vgen.models.tiny_vae import TinyVideoVAE
from vgen.models.transformer import SpacetimeTransformer
from vgen.models.unet import UNet3D
from vgen.models.vae import CausalVideoVAE
from vgen.sampling.conditions import Conditions, Guidance
from vgen.sampling.known_frames import KnownFrames
from vgen.temporal.attention import PromptCache
from vgen.temporal.grid import LatentGrid
from vgen.temporal.state import TemporalState

Generators = torch.Generator | list[torch.Generator] | None
OnStep = Callable[[int, Tensor, Tensor, Conditions], tuple[Tensor, Conditions]]
"""Called after each step with its index, timestep, the latents and the conditions; returns the last two."""

WEAK_LEVEL = 1 / 3
"""Minimum noise level of the weak history in history guidance; training uses no higher level."""

running_sampler: ContextVar[Sampler | None] = ContextVar("running_sampler", default=None)
"""The sampler that denoises in this thread."""


@dataclass(frozen=True)
class Start:
    """Where denoising starts, if not from pure noise."""

    latents: Tensor
    """Clean and normalized, `(b, c, t, h, w)`."""
    strength: float
    """The share of the steps that are done, above 0 and up to 1; the noise level follows from it."""


@dataclass(frozen=True)
class LowNoise:
    """A second network that takes over from the denoiser at low noise levels, as in Wan 2.2 A14B."""

    denoiser: SpacetimeTransformer
    """The network."""
    boundary: float
    """Noise level in [0, 1] below which it is used."""


def num_steps(steps: int, strength: float) -> int:
    """How many of the steps are done; rounded down, as diffusers does."""
    return min(int(steps * strength), steps)


def storable(sigmas: Sequence[float]) -> list[float]:
    """Noise levels for the config of a pipeline. A 0 follows a single one: diffusers cannot load lists of one item."""
    levels = [float(level) for level in sigmas if level]
    return levels if len(levels) > 1 else [*levels, 0.0]


def resampled(sigmas: Sequence[float], steps: int) -> list[float]:
    """Noise levels of another number of steps: evenly spaced along the given ones, after which 0 follows."""
    sigmas = [level for level in sigmas if level]
    if steps == len(sigmas):
        return list(sigmas)
    given = np.linspace(0, 1, len(sigmas) + 1)
    return np.interp(np.arange(steps) / steps, given, [*sigmas, 0.0]).tolist()


class PromptCaches:
    """What depends on prompts alone, and so is the same in all steps of a call."""

    def __init__(self) -> None:
        self.by_name: defaultdict[str, PromptCache] = defaultdict(PromptCache)
        """The denoiser's results, by name of the evaluation."""
        self._doubled: tuple[Conditions, Conditions] | None = None

    def doubled(self, conditions: Conditions) -> Conditions:
        """`conditions.doubled()`, once for all steps with the same conditions."""
        if self._doubled is None or self._doubled[0] is not conditions:
            self._doubled = conditions, conditions.doubled()
        return self._doubled[1]


class Sampler:
    """Samples latents. It shares the networks with other samplers and owns everything else.

    Each call of a pipeline and each rollout has its own sampler, so calls in two threads do not affect each other.

    Args:
        denoiser: The denoising network.
        scheduler: A diffusers scheduler; the sampler works with a copy.
        vae: Encodes and decodes; `None` if latents are pixels.
        device: Device on which the networks run.
        guidance: How predictions are guided.
        sigmas: Noise levels before the scheduler's shift, instead of the scheduler's own; see `resampled`.
        decoder: Decodes instead of the VAE; `None` uses the VAE.
        low_noise: The network for low noise levels; `None` uses the denoiser for all.
        siblings: Weak references to all samplers of a pipeline; this one and its copies are added.
    """

    def __init__(
        self,
        denoiser: SpacetimeTransformer | UNet3D,
        scheduler: Any,
        vae: CausalVideoVAE | PerFrameVAE | None,
        *,
        device: torch.device,
        guidance: Guidance | None = None,
        sigmas: Sequence[float] | None = None,
        decoder: TinyVideoVAE | None = None,
        low_noise: LowNoise | None = None,
        siblings: set[ref[Sampler]] | None = None,
    ):
        self.denoiser = denoiser
        self.scheduler = copy.deepcopy(scheduler)
        self.vae = vae
        self.device = device
        self.sigmas = sigmas
        self.decoder = decoder
        self.low_noise = low_noise
        self.network = denoiser
        """The network of the running step: the denoiser, or the one for low noise levels."""
        guidance = guidance or Guidance()
        self.guidance = replace(guidance, guider=copy.deepcopy(guidance.guider))  # guiders count steps
        self.last_guidance = self.guidance
        """How predictions of the last call were guided at its end."""
        compression = 1 if vae is None else vae.temporal_compression_ratio
        self.grid = LatentGrid(compression, denoiser.patch_size[0])
        self.siblings = set() if siblings is None else siblings
        self.siblings.add(ref(self, self.siblings.discard))
        self.attention_kwargs: dict[str, Any] | None = None
        """Keyword arguments of the attention processors in the last call."""
        self.interrupt = False
        """Whether to stop denoising before the next step; the end of `denoise` clears it."""
        self.num_timesteps = 0
        """Number of timesteps of the running call."""
        self.current_timestep: Tensor | None = None
        """The timestep of the running step."""
        self._prompts: PromptCaches | None = None
        self._begin = 0

    def copy(self) -> Sampler:
        """An independent sampler with the same networks."""
        return Sampler(
            self.denoiser, self.scheduler, self.vae, device=self.device, guidance=self.guidance, sigmas=self.sigmas,
            decoder=self.decoder, low_noise=self.low_noise, siblings=self.siblings,
        )  # fmt: skip

    def denoise(
        self,
        noise: Tensor,
        conditions: Conditions,
        num_inference_steps: int,
        generator: Generators = None,
        *,
        known: KnownFrames | None = None,
        state: TemporalState | None = None,
        on_step: OnStep | None = None,
        start: Start | None = None,
        custom: Mapping[str, Sequence[float]] | None = None,
        previous: Tensor | None = None,
    ) -> Tensor:
        """Denoises noise to latents `(b, c, t, h, w)`.

        Args:
            noise: Noise of variance 1; the scheduler's initial scale is applied here.
            conditions: What the denoiser is conditioned on.
            num_inference_steps: Number of denoising steps.
            generator: Source of the noise that stochastic schedulers add.
            known: Known frames; their leading latents stay unchanged, at noise level 0.
            state: State of the denoiser after the previous frames; it is only read.
            on_step: Called after each step.
            start: Latents to start from, with noise of an intermediate level; `None` starts from pure noise.
            custom: `timesteps` or `sigmas` instead of the scheduler's own.
            previous: The clean latent `(b, c, h, w)` before the first one, for denoisers with `residual`.
        """
        network = self.denoiser.config
        if network.residual and network.keyframe_slots:
            num_leading = 0 if known is None else known.layout.num_leading
            latents = noise if known is None else known.overwrite_latents(noise)
            latents = latents.to(self.device, self.denoiser.dtype)
            slots = fill_keyframes(conditions.keyframes, latents, num_leading, network.keyframe_slots, previous)
            conditions = replace(conditions, keyframes=slots)
        token, guidance = running_sampler.set(self), self.guidance
        self._prompts = PromptCaches()
        self.attention_kwargs = conditions.attention_kwargs
        try:
            with self._without_other_calls():
                for network in self._networks:  # a step cache must not compare with other latents' last step
                    network._reset_stateful_cache()
                self._set_timesteps(num_inference_steps, custom or {}, 1.0 if start is None else start.strength)
                return self._denoise(noise, conditions, generator, known, state, on_step, start)
        finally:
            self.current_timestep, self.interrupt, self.network = None, False, self.denoiser
            self._prompts = None  # before the next call, adapters may change
            self.last_guidance, self.guidance = self.guidance, guidance  # a callback changes it for this call only
            running_sampler.reset(token)

    def forget_prompts(self) -> None:
        """Computes what depends on prompts alone again, because a callback may have changed the weights."""
        self._prompts = PromptCaches()

    def _set_timesteps(self, num_inference_steps: int, custom: Mapping[str, Sequence[float]], strength: float) -> None:
        """Sets the scheduler's timesteps, and where they begin.

        They stay on the host: schedulers read their values, and reading from the device would wait for it.
        """
        if not custom and self.sigmas is not None:
            custom = {"sigmas": resampled(self.sigmas, num_inference_steps)}
        for name in custom:
            if name not in inspect.signature(self.scheduler.set_timesteps).parameters:
                raise ValueError(f"{type(self.scheduler).__name__} takes no {name}: use num_inference_steps")
        options: Any = {name: list(values) for name, values in custom.items()}
        self.scheduler.set_timesteps(**(options or {"num_inference_steps": num_inference_steps}), device="cpu")
        order = getattr(self.scheduler, "order", 1)
        steps = len(self.scheduler.timesteps) // order
        self._begin = (steps - num_steps(steps, strength)) * order
        if self._begin:
            self.scheduler.set_begin_index(self._begin)

    def _denoise(
        self,
        noise: Tensor,
        conditions: Conditions,
        generator: Generators,
        known: KnownFrames | None,
        state: TemporalState | None,
        on_step: OnStep | None,
        start: Start | None,
    ) -> Tensor:
        on_host = self.scheduler.timesteps[self._begin :]
        timesteps = on_host.to(self.device)
        self.num_timesteps = len(timesteps)
        if start is None:
            latents = noise.to(self.device) * getattr(self.scheduler, "init_noise_sigma", 1.0)
        else:
            latents = self._add_noise(start.latents, noise, on_host[:1]).to(self.device)
        num_known = 0 if known is None else known.layout.num_leading // self.grid.patch_frames
        generated = torch.arange(latents.shape[2] // self.grid.patch_frames, device=self.device) >= num_known
        keep = known.overwrite_latents if known is not None else lambda latents: latents
        frozen = None if state is None else state.frozen()
        latents = keep(latents)
        for index, timestep in enumerate(timesteps):
            if self.interrupt:
                break
            self.current_timestep = timestep
            self._choose_network(on_host[index])
            if self.guidance.guider is not None:
                self.guidance.guider.set_state(step=index, num_inference_steps=len(timesteps), timestep=timestep)
            levels = timestep * generated if num_known else timestep
            scaled = latents
            if hasattr(self.scheduler, "scale_model_input"):
                scaled = keep(self.scheduler.scale_model_input(latents, on_host[index]))
            prediction = self.predict(scaled, levels, conditions, frozen)
            latents = keep(self._step(prediction, on_host[index], latents, generator))
            if on_step is not None:
                latents, conditions = on_step(index, timestep, latents, conditions)
                latents = keep(latents)
        return latents

    @property
    def _networks(self) -> list[SpacetimeTransformer | UNet3D]:
        return [self.denoiser] if self.low_noise is None else [self.denoiser, self.low_noise.denoiser]

    def _choose_network(self, timestep: Tensor) -> None:
        if self.low_noise is None:
            return
        boundary = self.low_noise.boundary * self.scheduler.config.num_train_timesteps
        chosen = self.low_noise.denoiser if timestep < boundary else self.denoiser
        if chosen is not self.network:
            self.network = chosen
            self.forget_prompts()  # each network has its own projections of prompts

    @property
    def _scale(self) -> float:
        """Weight of classifier-free guidance in the running step."""
        low = self.guidance.low_noise_scale
        return self.guidance.scale if low is None or self.network is self.denoiser else low

    def _add_noise(self, latents: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        latents = latents.to(noise)
        if hasattr(self.scheduler, "scale_noise"):
            return self.scheduler.scale_noise(latents, timestep, noise)
        return self.scheduler.add_noise(latents, noise, timestep)

    def _step(self, prediction: Tensor, timestep: Tensor, latents: Tensor, generator: Generators) -> Tensor:
        takes_generator = "generator" in inspect.signature(self.scheduler.step).parameters
        options = {"generator": generator} if takes_generator else {}
        return self.scheduler.step(prediction, timestep, latents, return_dict=False, **options)[0]

    def predict(
        self, latents: Tensor, timestep: Tensor, conditions: Conditions, state: TemporalState | None = None
    ) -> Tensor:
        """The guided prediction `(b, c, t, h, w)`, float32.

        With history guidance, if the state contains a weak (noisier) history, the prediction is also guided away from
        the prediction for that history.

        Args:
            latents: Noisy latents `(b, c, t, h, w)`.
            timestep: One timestep for all token frames, or `(n,)`.
            conditions: What the denoiser is conditioned on.
            state: State of the denoiser after the previous frames.

        Source: Classifier-free diffusion guidance, arXiv 2207.12598; history-guided video diffusion, arXiv 2502.06764.
        """
        prediction = self._guided(latents, timestep, conditions, state)
        if state is None or not self.guidance.uses_weak_history or not state.has_branch("weak"):
            return prediction
        weak = self._guided(latents, timestep, conditions, state.branch("weak"), context="weak_")
        return weak + self.guidance.history_scale * (prediction - weak)

    def remember(
        self, latents: Tensor, levels: Tensor, conditions: Conditions, state: TemporalState, generator: Generators
    ) -> None:
        """Writes clean latents into a state, and the weak history too if guidance needs it.

        Args:
            latents: Clean latents `(b, c, t, h, w)`.
            levels: Noise levels `(n,)` that the denoiser is conditioned on.
            conditions: What the denoiser is conditioned on; keyframes are ignored for clean latents.
            state: The state to write to.
            generator: Source of the weak history's noise.
        """
        conditions = conditions.without_keyframes()
        self._write(latents, levels, conditions, state)
        if self.guidance.uses_weak_history:
            levels = levels.clamp_min(WEAK_LEVEL)
            noise = draw_noise(latents.shape, generator, latents.dtype).to(latents.device)
            noisy, _ = flow_sample(latents, noise, levels.expand(len(latents), -1))
            self._write(noisy, levels, conditions, state.branch("weak"))

    def _write(self, latents: Tensor, levels: Tensor, conditions: Conditions, state: TemporalState) -> None:
        timestep = level_to_timestep(self.scheduler, levels)
        with lock_of(self.network), _without_step_cache(self.network):
            if self.guidance.guider is None:
                self._guided(latents, timestep, conditions, state)
                return
            for name, prompts in _prompts_by_name(conditions).items():
                self._evaluate(name, latents, timestep, prompts, conditions, state.branch(name))

    def _guided(
        self,
        latents: Tensor,
        timestep: Tensor,
        conditions: Conditions,
        state: TemporalState | None,
        context: str = "",
    ) -> Tensor:
        """The guided prediction: one batch for classifier-free guidance, one evaluation per input for guiders."""
        if self.guidance.guider is not None:
            return self._guided_by_guider(latents, timestep, conditions, state, context)
        scale = self._scale
        is_guided = scale > 1
        # a rollout's cache has rows for both prompts, also when a callback turns guidance off
        if conditions.negative_prompt_embeds is None or not (is_guided or state is not None):
            return self._evaluate(f"{context}cond", latents, timestep, conditions.prompt_embeds, conditions, state)
        if state is None and conditions.negative_prompt_embeds.shape != conditions.prompt_embeds.shape:
            prompts = {"uncond": conditions.negative_prompt_embeds, "cond": conditions.prompt_embeds}
            negative, positive = (
                self._evaluate(f"{context}{name}", latents, timestep, embeds, conditions, None)
                for name, embeds in prompts.items()
            )
            return negative + scale * (positive - negative)
        both = conditions.doubled() if self._prompts is None else self._prompts.doubled(conditions)
        out = self._evaluate(
            f"{context}cond_uncond", torch.cat([latents, latents]), timestep, both.prompt_embeds, both, state
        )
        negative, positive = out.chunk(2)
        return negative + scale * (positive - negative) if is_guided else positive

    def _guided_by_guider(
        self, latents: Tensor, timestep: Tensor, conditions: Conditions, state: TemporalState | None, context: str
    ) -> Tensor:
        guider: Any = self.guidance.guider
        inputs = guider.prepare_inputs({"prompts": (conditions.prompt_embeds, conditions.negative_prompt_embeds)})
        for one in inputs:
            name = getattr(one, guider._identifier_key)
            history = "negative" if one.prompts is conditions.negative_prompt_embeds else "positive"
            with lock_of(self.network):
                guider.prepare_models(self.network)
                try:
                    one.noise_pred = self._evaluate(
                        context + name, latents, timestep, one.prompts, conditions,
                        None if state is None else state.branch(history),
                    )  # fmt: skip
                finally:
                    guider.cleanup_models(self.network)
        return guider(inputs)[0]

    def _evaluate(
        self,
        name: str,
        latents: Tensor,
        timestep: Tensor,
        prompts: Tensor,
        conditions: Conditions,
        state: TemporalState | None,
    ) -> Tensor:
        """One evaluation of the denoiser; diffusers' step caches store their data per `name`.

        Raises:
            ValueError: FasterCache is enabled with keyframes or a state, which it cannot halve.
        """
        with lock_of(self.network), self.network.cache_context(name):
            if isinstance(self.network._cache_config, FasterCacheConfig) and not (
                conditions.keyframes is None and state is None
            ):
                raise ValueError(
                    "FasterCache skips half of the batch, which keyframes, interpolation and rollouts do not allow: "
                    "call disable_cache(), or enable another cache"
                )
            out = self.network(
                hidden_states=latents.to(self.network.dtype),
                timestep=timestep.expand(latents.shape[0], *timestep.shape),
                encoder_hidden_states=prompts,
                state=state,
                prompt_cache=None if self._prompts is None else self._prompts.by_name[name],
                return_dict=False,
                **conditions.for_denoiser(),
            )
        return out[0].float()

    @contextmanager
    def _without_other_calls(self) -> Iterator[None]:
        """Blocks other threads for a whole call if a network has a step cache."""
        with ExitStack() as held:
            for network in self._networks:
                lock = lock_of(network)
                with lock:  # another thread may have disabled the cache for an evaluation
                    has_cache = network._cache_config is not None
                if has_cache:
                    held.enter_context(lock)
            yield

    def decode(self, latents: Tensor, state: TemporalState | None = None) -> Tensor:
        """Pixels of normalized latents, see `decode_latents`."""
        return decode_latents(self.vae if self.decoder is None else self.decoder, latents, state)


def decode_latents(
    vae: CausalVideoVAE | PerFrameVAE | TinyVideoVAE | None, latents: Tensor, state: TemporalState | None = None
) -> Tensor:
    """Pixels `(b, 3, f, h, w)` in [-1, 1] of normalized latents; with a state, of the next slice."""
    if vae is None:
        return latents
    return vae.decode(vae.denormalize(latents).to(vae.dtype), state=state).sample


def latent_shape(
    denoiser: SpacetimeTransformer | UNet3D,
    vae: CausalVideoVAE | PerFrameVAE | None,
    batch_size: int,
    num_latents: int,
    size: tuple[int, int],
) -> tuple[int, ...]:
    """`(b, c, t, h, w)` for frames of `size`, which is height and width in pixels."""
    space = 1 if vae is None else vae.spatial_compression_ratio
    channels = denoiser.config.out_channels or denoiser.config.in_channels
    return batch_size, channels, num_latents, size[0] // space, size[1] // space


def check_generator(generator: Any, num_videos: int) -> None:
    """Checks the noise generators of a batch of videos.

    Raises:
        ValueError: `generator` is neither a generator nor a list with one for each video.
    """
    each = generator if isinstance(generator, list) else [] if generator is None else [generator]
    for one in each:
        check_type("generator", one, torch.Generator, "a torch.Generator or a list of them")
    if isinstance(generator, list) and len(generator) != num_videos:
        raise ValueError(f"expected one generator or {num_videos}, one per video, got {len(generator)}")


def draw_noise(shape: tuple[int, ...], generator: Generators, dtype: torch.dtype) -> Tensor:
    """Noise on the device of its generators, or on the CPU without one, so a seed does not depend on the device."""
    first = generator[0] if isinstance(generator, list) else generator
    return randn_tensor(shape, generator, torch.device("cpu") if first is None else first.device, dtype)


def draw_generator() -> torch.Generator:
    """A generator on the CPU, seeded by torch's global one."""
    return torch.Generator().manual_seed(int(torch.randint(2**62, ())))


def _prompts_by_name(conditions: Conditions) -> dict[str, Tensor]:
    prompts = {"positive": conditions.prompt_embeds}
    if conditions.negative_prompt_embeds is not None:
        prompts["negative"] = conditions.negative_prompt_embeds
    return prompts


@contextmanager
def _without_step_cache(denoiser: Any) -> Iterator[None]:
    """Disables the step cache, which would skip blocks whose keys and values a state needs."""
    config = denoiser._cache_config
    if config is None:
        yield
        return
    denoiser.disable_cache()
    try:
        yield
    finally:
        denoiser.enable_cache(config)
