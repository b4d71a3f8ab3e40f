"""Distill a pipeline: the student makes videos in a few steps without guidance, and rollouts too.

    accelerate launch train/distill.py --config train/recipes/shapes-64-distilled.yaml

The settings of samples (tasks, windows, attention modes) are those of train_vdm.py, and latents are encoded as for it.
"""

from vgen.io.spinning import stop_spinning

stop_spinning()  # before torch is imported

import copy
import hashlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from vgen.checks import check_integer, check_number
from vgen.diffusion import shift_of
from vgen.io.atomic import atomic_directory
from vgen.io.errors import one_line_errors
from vgen.models.compilation import compile_blocks
from vgen.models.prompts import tokenize
from vgen.pipeline import VideoGenPipeline
from vgen.tasks.denoiser_training import (
    DenoiserConfig,
    evaluating,
    open_sources,
    prepare_denoiser,
    sample_prompts,
    sample_shape,
    save_adapter,
    score,
    use_whole,
)
from vgen.training.distillation import ConsistencyObjective, Loss, guided
from vgen.training.feed import Feed
from vgen.training.objective import PromptedDenoiser
from vgen.training.run import Run, config_text, parse_config, start
from vgen.training.sample import (
    DenoiserBatches,
    DenoiserSpec,
    check_conditions,
    check_encoders,
    check_stills,
    conditioning,
)


@dataclass(kw_only=True)
class DistillConfig(DenoiserConfig):
    """Settings of causal consistency distillation.

    `--init` is the teacher, a pipeline of flow matching. The student has its VAE, text encoder and defaults, and
    starts from its denoiser. `prediction`, `level_shift` and `max_sequence_length` are those of the teacher.
    """

    num_levels: int = 32
    """Number of noise levels, as many as steps in which the teacher would make a video."""
    guidance_scale: float | None = None
    """Weight of the teacher's classifier-free guidance, which becomes a part of the student; `None` means the
    teacher's default."""
    loss: Loss = "huber"
    """`huber` (pseudo-Huber) or `squared`."""
    num_inference_steps: int = 4
    """Default number of steps of the student."""

    def check(self) -> None:
        """Checks the settings.

        Raises:
            ValueError: A setting is out of range or unknown.
        """
        super().check()
        if self.init is None:
            raise ValueError("distillation needs a teacher: pass init")
        if self.ema_decay == 0:
            raise ValueError("distillation needs ema_decay above 0: the moving average of the student is its target")
        if self.wants_temporal_loss:
            raise ValueError("distillation has no temporal loss: leave out its weights")
        check_integer("num_levels", self.num_levels, 2)
        check_integer("num_inference_steps", self.num_inference_steps, 1)
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
    objective = ConsistencyObjective(pipe.scheduler, config.num_levels, config.loss)
    denoiser = pipe.denoiser
    teacher = Teacher(denoiser, config.train_only == "lora")
    sources, shares = open_sources(denoiser, config, pipe.config.expand_timesteps)
    prepare_denoiser(denoiser, config)
    if config.compile and teacher.denoiser is not None:
        compile_blocks(teacher.denoiser)
    embedded = all(source.data.has_embeddings for source in sources)
    check_stills(denoiser, sources)
    check_conditions(denoiser, sources, pipe.config.expand_timesteps)
    check_encoders(sources, pipe.vae, pipe.text_encoder if embedded else None, pipe.config.max_sequence_length)
    scale = pipe.config.guidance_scale if config.guidance_scale is None else config.guidance_scale
    use_few_steps(pipe, config)
    if pipe.text_encoder is not None:
        pipe.text_encoder.requires_grad_(False)
    model = PromptedDenoiser(denoiser, None if embedded else pipe.text_encoder)
    spec, tokenizer = DenoiserSpec.of(denoiser, pipe.config.expand_timesteps), None if embedded else pipe.tokenizer
    batches = DenoiserBatches(config, sources, shares, spec, tokenizer)
    prompts, options = sample_prompts(pipe, config, None), sample_shape(pipe, sources[0])
    digest = hashlib.sha256("".join(source.data.digest for source in sources).encode()).hexdigest()
    run = Run(config, accelerator, model, batches.name, digest, has_unused_weights=True)
    teacher.to(accelerator.device)
    feed = Feed(run, batches)

    for step in run.steps():
        mode = batches.plan(step).mode
        total = torch.zeros((), device=accelerator.device)
        for _ in run.parts(config.batch_size):
            batch = next(feed)
            conditions = conditioning(batch)
            if run.sharded:  # all processes must run the same operations
                conditions["num_gaps"] = None
            empty, prompted = without_prompts(conditions, batch, pipe, sources[batches.plan(step).source].data)
            counted = batch["generated"] & batch["real"]

            def teach(latents: Tensor, timestep: Tensor) -> Tensor:
                with teacher.teaching(model) as network:
                    with_prompt = network(latents, timestep, **conditions)  # noqa: B023
                    if scale == 1 or empty is None:  # noqa: B023
                        return with_prompt
                    return guided(with_prompt, network(latents, timestep, **empty), scale, prompted)  # noqa: B023

            def average(latents: Tensor, timestep: Tensor) -> Tensor:
                with run.average:
                    return model(latents, timestep, **conditions)  # noqa: B023

            with torch.no_grad(), accelerator.autocast():
                pair = objective.pair(
                    batch["latents"], batch["noise"], batch["levels"], batch["generated"], teach, average
                )
            velocity = run.network(pair.latents, pair.timestep, **conditions)
            tokens = pair.latents[:, 0].numel() // math.prod(denoiser.patch_size)
            run.count(
                len(pair.latents),
                tokens,
                (pair.latents.shape, *conditions, mode),
                lambda network: network(pair.latents, pair.timestep, **conditions),  # noqa: B023
            )
            losses = objective.loss(pair, velocity, counted)
            run.backward(losses.sum() / config.batch_size)
            total += losses.sum().detach() / config.batch_size
        run.update()
        run.log(loss=total)
        if run.scores_are_due:
            with run.average, evaluating(denoiser, pipe.text_encoder):
                scores, videos = score(pipe, config, prompts, options, accelerator)
            run.report(scores, None)
            run.save_samples(videos, pipe.config.frame_rate)
        run.save()

    def save_result(weights: dict[str, Tensor] | None) -> None:
        if weights is not None:
            use_whole(pipe, pipe.denoiser_name, weights)
        if config.train_only == "lora":
            save_adapter(pipe, denoiser, config)
            return
        with atomic_directory(config.output_dir / "pipeline") as folder:
            pipe.to(getattr(torch, config.save_dtype)).save_pretrained(folder)

    result = "lora" if config.train_only == "lora" else "pipeline"
    option = f"--model {config.init} --lora" if result == "lora" else "--model"
    run.end(save_result, result, f"vgen rollout PROMPT {option} {{}} -o video.mp4")


class Teacher:
    """The teacher's denoiser: a copy, or the student's without its adapter.

    Args:
        denoiser: The denoiser of both at the start.
        shared: Whether the student is an adapter of it.
    """

    def __init__(self, denoiser: Any, shared: bool):
        self.denoiser = None if shared else copy.deepcopy(denoiser).requires_grad_(False).eval()

    def to(self, device: torch.device) -> None:
        """Moves the copy to a device."""
        if self.denoiser is not None:
            self.denoiser.to(device)

    @contextmanager
    def teaching(self, model: PromptedDenoiser) -> Iterator[PromptedDenoiser]:
        """The teacher with the text encoder of the student."""
        if self.denoiser is not None:
            yield PromptedDenoiser(self.denoiser, model.text_encoder)
            return
        student: Any = model.denoiser
        student.disable_adapters()
        yield model
        student.enable_adapters()


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
    pipe.register_to_config(
        **few, rollout_defaults=own, guidance_scale_2=None, sigmas=[1 - index / steps for index in range(steps)]
    )


def without_prompts(
    conditions: dict[str, Any], batch: dict[str, Any], pipe: VideoGenPipeline, data: Any
) -> tuple[dict[str, Any] | None, Tensor]:
    """The same conditions with empty prompts, or `None` without prompts; and which samples have a prompt, `(b,)`."""
    name = "prompt_embeds" if "prompt_embeds" in batch else "input_ids"
    if name not in batch:
        return None, torch.zeros(len(batch["latents"]), dtype=torch.bool, device=batch["latents"].device)
    given = batch[name]
    if name == "prompt_embeds":
        nothing = {name: data.embedding(0, None).to(given).expand_as(given)}
    else:
        ids, mask = (x.to(given.device) for x in tokenize(pipe.tokenizer, [""], given.shape[1]))
        nothing = {name: ids.expand_as(given), "prompt_mask": mask.expand_as(given)}
    prompted = (given != nothing[name]).flatten(1).any(1)
    return conditions | nothing, prompted


if __name__ == "__main__":
    with one_line_errors(Path(__file__).name):
        main(parse_config(DistillConfig, __doc__))
