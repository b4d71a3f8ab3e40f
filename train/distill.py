"""Distill a pipeline: the student makes videos in a few steps without guidance, and rollouts too.

    accelerate launch train/distill.py --config train/recipes/shapes-64-distilled.yaml
    accelerate launch train/distill.py --config train/recipes/shapes-64-self-forced.yaml

The settings of samples (tasks, windows, attention modes) are those of train_vdm.py, and latents are encoded as for it.
"""

from vgen.io.spinning import stop_spinning

stop_spinning()  # before torch is imported

import copy
import hashlib
import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

from vgen.checks import check_integer, check_number
from vgen.diffusion import is_flow, shift_of
from vgen.io.errors import one_line_errors
from vgen.io.fingerprint import weights_digest
from vgen.models.compilation import compile_blocks
from vgen.models.prompts import embed, tokenize
from vgen.pipeline import VideoGenPipeline
from vgen.sampling.options import RolloutOptions
from vgen.sampling.rollout import new_state
from vgen.sampling.sampler import resampled, storable
from vgen.tasks.denoiser_training import (
    DenoiserConfig,
    evaluating,
    open_sources,
    prepare_denoiser,
    sample_prompts,
    sample_shape,
    save_result,
    score,
)
from vgen.training.distillation import ConsistencyObjective, Loss, clean_estimate, guided
from vgen.training.feed import Feed
from vgen.training.noise_levels import LevelDistribution
from vgen.training.objective import PromptedDenoiser, denoising_loss
from vgen.training.run import Run, config_text, generators, parse_config, start
from vgen.training.sample import (
    DenoiserBatches,
    DenoiserSpec,
    check_actions,
    check_conditions,
    check_encoders,
    check_stills,
    conditioning,
)
from vgen.training.self_forcing import RolloutLoss, SelfForcing, StudentAndCritic, matching_loss


@dataclass(kw_only=True)
class DistillConfig(DenoiserConfig):
    """Settings of distillation.

    The student starts from `--init`, a pipeline of flow matching, and keeps its VAE, text encoder and defaults.
    `prediction`, `level_shift` and `max_sequence_length` are those of this pipeline.
    """

    method: Literal["consistency", "self_forcing"] = "consistency"
    """`consistency`: the student learns to give the same clean latents all along the teacher's path. `self_forcing`:
    it rolls out and learns from its own videos; it should start from the result of `consistency`."""
    teacher: str | None = None
    """Pipeline with the same VAE, text encoder and kind of denoiser; `None` means `init`."""
    level_distribution: LevelDistribution = "uniform"
    """How noise levels are drawn; `uniform` trains pure noise, where every video begins, as often as other levels."""
    num_levels: int = 32
    """Number of noise levels, as many as steps in which the teacher would make a video; for `consistency`."""
    guidance_scale: float | None = None
    """Weight of the teacher's classifier-free guidance, which becomes a part of the student; `None` means the
    teacher's default."""
    loss: Loss = "huber"
    """`huber` (pseudo-Huber) or `squared`; for `consistency`."""
    num_inference_steps: int = 4
    """Default number of steps of the student."""
    rollout_loss: RolloutLoss = "distribution"
    """What `self_forcing` compares the student's videos with: the `distribution` of the teacher, or by `regression`
    the true clips, for futures that follow from the given frames."""
    rollout: dict[str, Any] = field(default_factory=dict)
    """Options of the rollouts of `self_forcing` that differ from the checkpoint's defaults, such as
    `{chunk_size: 3, window: 21, sink: 0}`; the result has them as its defaults."""
    critic_steps: int = 5
    """Steps that train the critic, before each step that trains the student; for `distribution`."""

    def check(self) -> None:
        """Checks the settings.

        Raises:
            ValueError: A setting is out of range or unknown.
        """
        super().check()
        if self.init is None:
            raise ValueError("distillation needs a pipeline to start from: pass init")
        if self.ema_decay == 0:
            raise ValueError("distillation needs ema_decay above 0: the moving average of the student is its target")
        if self.wants_temporal_loss:
            raise ValueError("distillation has no temporal loss: leave out its weights")
        check_integer("num_levels", self.num_levels, 2)
        check_integer("num_inference_steps", self.num_inference_steps, 1)
        check_integer("critic_steps", self.critic_steps, 1)
        if self.method == "self_forcing" and {kind for kind, share in self.windows.items() if share} != {"start"}:
            raise ValueError(
                f"method=self_forcing makes videos from their start: set windows={{start: 1}}, got {self.windows}"
            )
        if self.num_inference_steps > self.num_levels:
            raise ValueError(
                f"num_inference_steps must be at most num_levels={self.num_levels}, got {self.num_inference_steps}"
            )
        if self.guidance_scale is not None:
            check_number("guidance_scale", self.guidance_scale, minimum=1)


def main(config: DistillConfig) -> None:
    """Distills a pipeline; the same call resumes an interrupted run."""
    if config.dry_run:
        print(config_text(config))
        return
    accelerator = start(config)
    pipe = VideoGenPipeline.from_pretrained(str(config.init))
    take_settings(config, pipe)
    denoiser = pipe.denoiser
    teacher = Teacher(pipe, config)
    sources, shares = open_sources(denoiser, config, pipe.config.expand_timesteps)
    prepare_denoiser(denoiser, config)
    if config.compile and teacher.denoiser is not None:
        compile_blocks(teacher.denoiser)
    embedded = all(source.data.has_embeddings for source in sources)
    check_stills(denoiser, sources)
    check_actions(denoiser, sources)
    check_conditions(denoiser, sources, pipe.config.expand_timesteps)
    check_encoders(sources, pipe.vae, pipe.text_encoder if embedded else None, pipe.config.max_sequence_length)
    if pipe.text_encoder is not None:
        pipe.text_encoder.requires_grad_(False)
    student = PromptedDenoiser(denoiser, None if embedded else pipe.text_encoder)
    make: Any = SelfForced if config.method == "self_forcing" else Consistent
    method = make(config, pipe, student, teacher)
    spec, tokenizer = DenoiserSpec.of(denoiser, pipe.config.expand_timesteps), None if embedded else pipe.tokenizer
    batches = DenoiserBatches(config, sources, shares, spec, tokenizer)
    prompts, options = sample_prompts(pipe, config, None), sample_shape(pipe, sources[0])
    digest = hashlib.sha256("".join(source.data.digest for source in sources).encode()).hexdigest()
    run = Run(config, accelerator, method.trained, batches.name, digest, has_unused_weights=True)
    if run.sharded and config.method == "self_forcing":
        raise ValueError("method=self_forcing does not support sharded networks: use DDP")
    teacher.to(accelerator.device)
    feed = Feed(run, batches)

    for step in run.steps():
        total = torch.zeros((), device=accelerator.device)
        for part in run.parts(config.batch_size):
            batch = next(feed)
            plan = batches.plan(step)
            conditions = conditioning(batch)
            if run.sharded:  # all processes must run the same operations
                conditions["num_gaps"] = None
            prompted = with_and_without_prompts(conditions, batch, pipe, sources[plan.source].data)
            losses = method.losses(run, step, part, batch, prompted)
            latents, name, call = method.called
            tokens = latents[:, 0].numel() // math.prod(denoiser.patch_size)
            run.count(len(latents), tokens, (latents.shape, *conditions, name, plan.mode), call)
            run.backward(losses.sum() / config.batch_size)
            total += losses.sum().detach() / config.batch_size
        run.update()
        run.log(**{method.called.name: total})
        if run.scores_are_due:
            with run.average, evaluating(denoiser, pipe.text_encoder):
                scores, videos = score(pipe, config, prompts, options, accelerator)
            run.report(scores, None)
            run.save_samples(videos, pipe.config.frame_rate)
        run.save()

    result = "lora" if config.train_only == "lora" else "pipeline"
    option = f"--model {config.init} --lora" if result == "lora" else "--model"
    save = partial(save_result, pipe, pipe.denoiser_name, config)
    run.end(save, result, f"vgen rollout PROMPT {option} {{}} -o video.mp4")


class Prompted(NamedTuple):
    """What the networks are conditioned on in a step."""

    conditions: dict[str, Any]
    empty: dict[str, Any] | None
    """The same with empty prompts; `None` without prompts."""
    prompted: Tensor
    """Which samples have a prompt, bool `(b,)`."""


class Called(NamedTuple):
    """A call of the trained network, of which the throughput is counted."""

    latents: Tensor
    """Its input `(b, c, t, h, w)`."""
    name: str
    """Name of its loss."""
    call: Callable[[nn.Module], Tensor]


class Teacher:
    """The teacher's denoiser: that of its pipeline, a copy of the student's, or the student's without its adapter.

    Args:
        pipe: The student's pipeline.
        config: Settings of the run.

    Raises:
        ValueError: The teacher does not use flow matching, or has another VAE, text encoder or kind of denoiser.
    """

    def __init__(self, pipe: VideoGenPipeline, config: DistillConfig):
        source = pipe
        if config.teacher is not None:
            source = VideoGenPipeline.from_pretrained(config.teacher)
            check_teacher(pipe, source, config.teacher)
        self.scale = source.config.guidance_scale if config.guidance_scale is None else config.guidance_scale
        self.denoiser: Any = None
        if config.teacher is not None or config.train_only != "lora":
            denoiser = copy.deepcopy(source.denoiser) if source is pipe else source.denoiser
            self.denoiser = denoiser.requires_grad_(False).eval()

    def to(self, device: torch.device) -> None:
        """Moves the teacher's own denoiser to a device."""
        if self.denoiser is not None:
            self.denoiser.to(device)

    def __call__(self, student: PromptedDenoiser, latents: Tensor, timestep: Tensor, prompts: Prompted) -> Tensor:
        """The guided velocity, with the text encoder of the student."""
        with self._network(student) as network:
            with_prompt = network(latents, timestep, **prompts.conditions)
            if self.scale == 1 or prompts.empty is None:
                return with_prompt
            return guided(with_prompt, network(latents, timestep, **prompts.empty), self.scale, prompts.prompted)

    @contextmanager
    def _network(self, student: PromptedDenoiser) -> Iterator[PromptedDenoiser]:
        if self.denoiser is not None:
            yield PromptedDenoiser(self.denoiser, student.text_encoder)
            return
        adapted: Any = student.denoiser
        adapted.disable_adapters()
        try:
            yield student
        finally:
            adapted.enable_adapters()


class Consistent:
    """Causal consistency distillation.

    Args:
        config: Settings of the run.
        pipe: The student's pipeline, which gets its scheduler and defaults.
        student: Its denoiser and text encoder.
        teacher: The teacher.
    """

    called: Called
    """The last call of the trained network."""

    def __init__(self, config: DistillConfig, pipe: VideoGenPipeline, student: PromptedDenoiser, teacher: Teacher):
        self.objective = ConsistencyObjective(pipe.scheduler, config.num_levels, config.loss)
        use_few_steps(pipe, config)
        self.trained, self.teacher = student, teacher

    def losses(self, run: Run, step: int, part: slice, batch: dict[str, Any], prompts: Prompted) -> Tensor:
        """The losses `(b,)` of a part of a batch."""

        def teach(latents: Tensor, timestep: Tensor) -> Tensor:
            return self.teacher(self.trained, latents, timestep, prompts)

        def average(latents: Tensor, timestep: Tensor) -> Tensor:
            with run.average:
                return self.trained(latents, timestep, **prompts.conditions)

        with torch.no_grad(), run.accelerator.autocast():
            pair = self.objective.pair(
                batch["latents"], batch["noise"], batch["levels"], batch["generated"], teach, average
            )
        arguments = (pair.latents, pair.timestep)
        self.called = Called(pair.latents, "loss", lambda network: network(*arguments, **prompts.conditions))
        velocity = run.network(*arguments, **prompts.conditions)
        return self.objective.loss(pair, velocity, batch["generated"] & batch["real"])


class SelfForced:
    """Self forcing; arguments as those of `Consistent`.

    Raises:
        ValueError: The student cannot roll out, or takes actions.
    """

    called: Called

    def __init__(self, config: DistillConfig, pipe: VideoGenPipeline, student: PromptedDenoiser, teacher: Teacher):
        if pipe.denoiser.config.action_dim:
            raise ValueError("method=self_forcing does not support denoisers with actions: use method=consistency")
        use_few_steps(pipe, config)
        pipe.register_to_config(rollout_defaults=pipe.config.rollout_defaults | config.rollout)
        options = RolloutOptions.from_json(config.rollout, "rollout")
        needed = ("chunk_size", "window", "sink")
        filled = options.filled(pipe.config, pipe.denoiser.config, prompted=not pipe.is_unprompted)
        if missing := [name for name in needed if getattr(filled, name) is None]:
            raise ValueError(
                f"{config.init} has no default of {', '.join(missing)}: set rollout={{{missing[0]}: ...}}"
            )
        options = options.resolve(pipe.config, pipe.denoiser.config, prompted=not pipe.is_unprompted)
        chunks: Any = (options.first_chunk_size, options.chunk_size)
        make_state = partial(new_state, options)
        levels = resampled(pipe.config.sigmas, config.num_inference_steps)
        self.forcing = SelfForcing(pipe.scheduler, levels, pipe.denoiser, chunks, make_state, config.rollout_loss)
        self.config, self.student, self.teacher = config, student, teacher
        critic = None if config.rollout_loss == "regression" else self._make_critic()
        self.trained = StudentAndCritic(student, critic)

    def _make_critic(self) -> PromptedDenoiser:
        if self.config.train_only == "lora":  # another adapter of the same weights
            frozen = {id(weight): weight for weight in self.student.parameters() if not weight.requires_grad}
            critic = copy.deepcopy(self.student.denoiser, frozen)
        else:
            critic = copy.deepcopy(self.teacher.denoiser).requires_grad_(True)
        return PromptedDenoiser(critic, self.student.text_encoder)

    def losses(self, run: Run, step: int, part: slice, batch: dict[str, Any], prompts: Prompted) -> Tensor:
        """The losses `(b,)` of a part of a batch, of the student or of its critic."""
        forcing, known = self.forcing, self.config.known
        rng = random.Random(f"{self.config.seed} {step}")
        plan = forcing.plan(batch["levels"].shape[1], known.get("leading", 0) / sum(known.values()), rng)
        sources = generators(self.config.seed + 1, step, part)
        conditions = self._kept(prompts.conditions)
        trains_critic = forcing.loss_kind == "distribution" and (step + 1) % (self.config.critic_steps + 1) != 0

        def student(*arguments: Any, **conditions: Any) -> Tensor:
            with run.accelerator.autocast():
                return self.student(*arguments, **conditions)

        def trained(*arguments: Any, **conditions: Any) -> Tensor:
            name: Any = "critic" if trains_critic else "student"
            self.called = Called(arguments[0], name, lambda network: network(name, *arguments, **conditions))
            return run.network(name, *arguments, **conditions)

        video = forcing.roll_out(
            student, batch["latents"], plan, sources, conditions, None if trains_critic else trained
        )
        last = torch.arange(plan.num_frames, device=video.device).expand(len(video), -1) >= plan.last_begin
        if forcing.loss_kind == "regression":
            true = batch["latents"][:, :, : video.shape[2]]
            return denoising_loss(video, true, (last & batch["real"][:, : plan.num_frames]).float())
        noised = forcing.noised(video.detach(), plan, sources)
        if trains_critic:
            velocity = trained(noised.latents, noised.timestep, **conditions)
            return denoising_loss(velocity, noised.velocity, noised.made.float())
        empty = None if prompts.empty is None else self._kept(prompts.empty)
        with torch.no_grad(), run.accelerator.autocast():
            fake = self.trained("critic", noised.latents, noised.timestep, **conditions)
            real = self.teacher(
                self.student, noised.latents, noised.timestep, Prompted(conditions, empty, prompts.prompted)
            )
        fake, real = (clean_estimate(noised.latents, noised.levels, velocity) for velocity in (fake, real))
        return matching_loss(video, fake, real, last)

    @torch.no_grad()
    def _kept(self, conditions: dict[str, Any]) -> dict[str, Any]:
        """Embedded prompts and the frame rate, because what a student has made sets everything else."""
        kept: dict[str, Any] = {
            name: conditions[name] for name in ("prompt_embeds", "frame_rate") if name in conditions
        }
        if "input_ids" in conditions:
            encoder = self.student.text_encoder
            kept["prompt_embeds"] = embed(encoder, conditions["input_ids"], conditions["prompt_mask"])
        return kept


def check_teacher(pipe: VideoGenPipeline, teacher: VideoGenPipeline, name: str) -> None:
    """Checks that a teacher can teach a student.

    Raises:
        ValueError: It cannot.
    """
    if not is_flow(teacher.scheduler):
        raise ValueError(f"the teacher {name} is not one of flow matching")
    if type(teacher.denoiser) is not type(pipe.denoiser):
        kinds = [type(one.denoiser).__name__ for one in (teacher, pipe)]
        raise ValueError(f"the teacher {name} has a {kinds[0]}, and the student a {kinds[1]}")
    for part in ("vae", "text_encoder"):
        networks = [getattr(one, part) for one in (teacher, pipe)]
        digests = [network and weights_digest(network) for network in networks]
        if digests[0] != digests[1]:
            raise ValueError(f"the teacher {name} has another {part} than the student {pipe.config._name_or_path}")


def take_settings(config: DistillConfig, pipe: VideoGenPipeline) -> None:
    """Takes the settings that depend on the teacher.

    Raises:
        ValueError: The teacher has two Transformers.
    """
    if pipe.transformer_2 is not None:
        raise ValueError(f"{config.init} has two Transformers, which distillation does not support")
    config.prediction, config.level_shift = "flow", shift_of(pipe.scheduler)
    config.max_sequence_length = pipe.config.max_sequence_length


def use_few_steps(pipe: VideoGenPipeline, config: DistillConfig) -> None:
    """Gives the pipeline the scheduler and the defaults of the student.

    Each step gives an estimate of the clean latents, to which the noise of the next level is added.
    """
    steps = config.num_inference_steps
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=config.level_shift, stochastic_sampling=True)
    few: dict[str, Any] = {"num_inference_steps": steps, "guidance_scale": 1.0}
    own = {name: value for name, value in pipe.config.rollout_defaults.items() if name not in few}
    levels = storable([1 - index / steps for index in range(steps)])
    pipe.register_to_config(**few, rollout_defaults=own, guidance_scale_2=None, sigmas=levels)


def with_and_without_prompts(
    conditions: dict[str, Any], batch: dict[str, Any], pipe: VideoGenPipeline, data: Any
) -> Prompted:
    """The conditions of a batch with its prompts and with empty ones."""
    name = "prompt_embeds" if "prompt_embeds" in batch else "input_ids"
    if name not in batch:
        nobody = torch.zeros(len(batch["latents"]), dtype=torch.bool, device=batch["latents"].device)
        return Prompted(conditions, None, nobody)
    given = batch[name]
    if name == "prompt_embeds":
        nothing = {name: data.embedding(0, None).to(given).expand_as(given)}
    else:
        ids, mask = (x.to(given.device) for x in tokenize(pipe.tokenizer, [""], given.shape[1]))
        nothing = {name: ids.expand_as(given), "prompt_mask": mask.expand_as(given)}
    return Prompted(conditions, conditions | nothing, (given != nothing[name]).flatten(1).any(1))


if __name__ == "__main__":
    with one_line_errors(Path(__file__).name):
        main(parse_config(DistillConfig, __doc__))
