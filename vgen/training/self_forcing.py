"""Self forcing: a student rolls out with its own cache, and learns from what it made.

Axes: `b` batch, `c` channels, `t h w` latent frames, rows and columns, `n` token frames.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from diffusers.utils.torch_utils import randn_tensor
from einops import repeat
from torch import Tensor, nn

from vgen.checks import check_choice
from vgen.diffusion import flow_sample, level_to_timestep, shift_of, shifted
from vgen.models.denoiser import fill_keyframes
from vgen.temporal.state import TemporalState
from vgen.training.objective import PromptedDenoiser

RolloutLoss = Literal["distribution", "regression"]
LOWEST_LEVEL, HIGHEST_LEVEL = 0.02, 0.98
"""Range of the noise levels, before the shift, at which teacher and critic are compared."""
Network = Callable[..., Tensor]
"""The velocity `(b, c, t, h, w)` of latents at timesteps `(b, n)`, with arguments of the denoiser."""


class StudentAndCritic(nn.Module):
    """Two networks that are trained together, so that one optimizer, checkpoint and average has both.

    Args:
        student: The student, with its text encoder.
        critic: Follows the distribution of the student's videos; `None` for `regression`.
    """

    def __init__(self, student: PromptedDenoiser, critic: PromptedDenoiser | None):
        super().__init__()
        self.student, self.critic = student, critic

    def forward(self, name: Literal["student", "critic"], *args: Any, **kwargs: Any) -> Tensor:
        """Calls one of them."""
        return getattr(self, name)(*args, **kwargs)


class Plan(NamedTuple):
    """What all samples of a step have in common."""

    num_given: int
    """Number of given token frames: none, or whole chunks."""
    num_frames: int
    """Token frames of the video, of which the last chunk is trained."""
    exit_step: int
    """The denoising step after which each chunk takes the estimate of its clean latents."""
    last_begin: int
    """First token frame of the last chunk."""


class Noised(NamedTuple):
    """A video with noise."""

    latents: Tensor
    """`(b, c, t, h, w)`."""
    levels: Tensor
    """Noise level of each token frame, `(b, n)`."""
    timestep: Tensor
    """The levels as timesteps, `(b, n)`."""
    velocity: Tensor
    """What a network should predict, `(b, c, t, h, w)`."""
    made: Tensor
    """Which token frames the student made, bool `(b, n)`."""


class SelfForcing:
    """Rolls out a student, and compares its videos with a teacher.

    Each chunk is denoised in the first `exit_step + 1` of the student's steps, and its clean latents are written to
    the cache, as in a rollout of a pipeline. Only the last step of the last chunk has a gradient.

    Args:
        scheduler: The student's scheduler, of flow matching, with `stochastic_sampling`.
        sigmas: Noise levels of the student's steps, before the scheduler's shift.
        denoiser: The student's denoiser.
        chunks: Token frames of the first chunk and of each other one.
        new_state: Makes the denoiser's state at the start of a video.
        loss: `distribution` compares with the teacher's score. `regression` compares with the true latents; it needs
            given frames and suits futures that follow from them.

    Raises:
        ValueError: The loss is unknown.

    Source: Self forcing, arXiv 2506.08009; improved distribution matching distillation, arXiv 2405.14867.
    """

    def __init__(
        self,
        scheduler: Any,
        sigmas: Sequence[float],
        denoiser: Any,
        chunks: tuple[int, int],
        new_state: Callable[[], TemporalState],
        loss: RolloutLoss = "distribution",
    ):
        check_choice("rollout_loss", loss, RolloutLoss)
        scheduler.set_timesteps(sigmas=list(sigmas), device="cpu")
        self.scheduler, self.chunks, self.new_state = scheduler, chunks, new_state
        self.levels: list[float] = scheduler.sigmas[:-1].tolist()
        """Noise levels of the steps."""
        self.patch_frames, self.loss_kind = denoiser.patch_size[0], loss
        self.slots: int = denoiser.config.keyframe_slots if denoiser.config.residual else 0
        """Slots of each latent frame that repeat the frame before it."""

    def plan(self, length: int, given_share: float, rng: random.Random) -> Plan:
        """Draws a plan.

        Args:
            length: Token frames of the clips.
            given_share: Probability that leading frames are given.
            rng: The same on all processes.
        """
        borders = self._borders(length)
        given = 0
        if len(borders) > 1 and (self.loss_kind == "regression" or rng.random() < given_share):
            given = rng.choice(borders[:-1])
        end = rng.choice([end for end in borders if end > given])
        return Plan(given, end, rng.randrange(len(self.levels)), max([0, *(one for one in borders if one < end)]))

    def _borders(self, length: int) -> list[int]:
        """Ends of the whole chunks in a number of token frames, of which the first chunk is always one."""
        first, chunk = self.chunks
        return list(range(first, max(length, first) + 1, chunk))

    @torch.no_grad()
    def roll_out(
        self,
        network: Network,
        given: Tensor,
        plan: Plan,
        generators: list[torch.Generator],
        conditions: dict[str, Any],
        trained: Network | None = None,
    ) -> Tensor:
        """Makes a video `(b, c, t, h, w)` of `plan.num_frames` token frames.

        Args:
            network: The student.
            given: Clean latents, of which the given frames are used; the others only have the right shape.
            plan: From `plan`.
            generators: Source of the noise of each video.
            conditions: Prompts and all else that the denoiser is conditioned on.
            trained: The student for the last step of the last chunk, with a gradient; `None` computes none.
        """
        k, state, begin = self.patch_frames, self.new_state(), 0
        parts: list[Tensor] = []
        for end in self._borders(plan.num_frames):
            if end <= plan.num_given:
                chunk = given[:, :, begin * k : end * k]
            else:
                shape = (*given.shape[:2], (end - begin) * k, *given.shape[3:])
                noise = _noise(shape, generators, given.device)
                options = conditions | {"state": state.frozen()}
                if self.slots:
                    previous = parts[-1][:, :, -1] if parts else None
                    options["keyframes"] = fill_keyframes(None, noise, 0, self.slots, previous)
                call, chunk = partial(network, **options), noise
                for step in range(plan.exit_step):
                    clean = self._clean(call, chunk, step)
                    noise = _noise(shape, generators, given.device)
                    chunk, _ = flow_sample(clean, noise, self._spread(self.levels[step + 1], chunk))
                if end == plan.num_frames and trained is not None:
                    with torch.enable_grad():
                        chunk = self._clean(partial(trained, **options), chunk, plan.exit_step)
                else:
                    chunk = self._clean(call, chunk, plan.exit_step)
            parts.append(chunk)
            if end < plan.num_frames:
                clean_timestep = level_to_timestep(self.scheduler, self._spread(0.0, chunk))
                network(chunk, clean_timestep, **conditions, state=state)
            begin = end
        with torch.enable_grad():
            return torch.cat(parts, dim=2)

    def noised(self, video: Tensor, plan: Plan, generators: list[torch.Generator]) -> Noised:
        """A clean video with noise of one level on all frames but the given ones."""
        b, n = len(video), plan.num_frames
        even = torch.cat([torch.rand(1, generator=one) for one in generators]).to(video.device)
        even = LOWEST_LEVEL + (HIGHEST_LEVEL - LOWEST_LEVEL) * even
        made = torch.arange(n, device=video.device) >= plan.num_given
        levels = shifted(even, shift_of(self.scheduler))[:, None] * made
        noise = _noise(tuple(video.shape), generators, video.device)
        noisy, velocity = flow_sample(video, noise, levels)
        return Noised(noisy, levels, level_to_timestep(self.scheduler, levels), velocity, made.expand(b, -1))

    def _spread(self, level: float, latents: Tensor) -> Tensor:
        """A level for each token frame of latents, `(b, n)`."""
        return latents.new_full((len(latents), latents.shape[2] // self.patch_frames), level)

    def _clean(self, call: Network, latents: Tensor, step: int) -> Tensor:
        """The clean latents as the network estimates them in a step."""
        level = self.levels[step]
        return latents - level * call(latents, level_to_timestep(self.scheduler, self._spread(level, latents))).float()


def matching_loss(video: Tensor, fake: Tensor, real: Tensor, counted: Tensor) -> Tensor:
    """A loss `(b,)` whose gradient leads a video to where the teacher's distribution is denser than the student's.

    Args:
        video: The student's video `(b, c, t, h, w)`.
        fake: Clean latents as the critic estimates them from the noised video.
        real: The same of the teacher.
        counted: bool `(b, n)`, true for frames that count.

    Source: Improved distribution matching distillation, arXiv 2405.14867, equation 7.
    """
    weight = repeat(counted, "b n -> b 1 (n k) 1 1", k=video.shape[2] // counted.shape[1]).to(video)
    elements = weight.flatten(1).sum(1) * video[0, :, 0].numel()

    def average(values: Tensor) -> Tensor:
        return (values * weight).flatten(1).sum(1) / elements

    distance = average((video.detach() - real).abs()).clamp_min(1e-6)
    gradient = (fake - real) / distance[:, None, None, None, None]
    return 0.5 * average((video - (video.detach() - gradient)).square())


def _noise(shape: tuple[int, ...], generators: list[torch.Generator], device: torch.device) -> Tensor:
    return randn_tensor(shape, generators, generators[0].device, torch.float32).to(device)
