"""Train a video diffusion model on precomputed latents, with or without text prompts.

A small run for a CPU, after training a text encoder and a VAE and encoding clips with it:

    accelerate launch train/train_vdm.py --config train/recipes/shapes-64.yaml --output_dir runs/try --max_steps 20
"""

from vgen.io.spinning import stop_spinning

stop_spinning()  # before torch is imported

import hashlib
import math
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from vgen.checks import check_number
from vgen.data.latents import LatentSet
from vgen.diffusion import SchedulerName, make_scheduler, prediction_of, shift_of
from vgen.io.errors import one_line_errors
from vgen.models.image_vae import load_vae
from vgen.models.prompts import CutCaptions, load_text_encoder, load_tokenizer
from vgen.models.transformer import SpacetimeTransformer
from vgen.models.unet import UNet3D
from vgen.pipeline import VideoGenPipeline
from vgen.processes import this_process
from vgen.tasks.denoiser_training import (
    DenoiserConfig,
    evaluating,
    open_sources,
    prepare_denoiser,
    sample_images,
    sample_prompts,
    sample_shape,
    save_result,
    score,
)
from vgen.training.feed import Feed
from vgen.training.held_out import FixedSamples
from vgen.training.objective import (
    Objective,
    PromptedDenoiser,
    denoising_loss,
)
from vgen.training.run import Run, config_text, parse_config, start
from vgen.training.sample import (
    DenoiserBatches,
    DenoiserSpec,
    Source,
    check_actions,
    check_conditions,
    check_encoders,
    check_motion,
    check_stills,
    conditioning,
    denoiser_temporal_loss,
    record_frame_rates,
    supported_config,
)

EXPERTS = {"high_noise": "transformer", "low_noise": "transformer_2"}
"""The component of each expert."""
RECORDED = ("tasks", "group_modes", "trained_token_frames", "trained_frame_rates")
"""What training writes to the denoiser's config."""


@dataclass(kw_only=True)
class VDMConfig(DenoiserConfig):
    """Settings for training a denoiser.

    `--init` is a pipeline to start from. Its components and defaults are kept, and the settings of new pipelines
    (`text_encoder`, `denoiser`, `model`, `scheduler`, `defaults`) are ignored.
    """

    vae: str | None = None
    """Folder or Hub id of the VAE that encoded the latents. With `--init`, it replaces the pipeline's VAE."""
    text_encoder: str | None = None
    """Folder or Hub id with a transformers text encoder in `text_encoder` and its tokenizer in `tokenizer`. `None`
    trains without prompts, which requires clips without captions."""
    held_out_latents: Path | None = None
    """Folder with latents that are not trained on. At each evaluation, the loss on fixed samples of them is the score
    that `patience` watches."""
    num_score_clips: int = 64
    """Number of samples for the loss on `held_out_latents`, and on training clips."""
    train_text_encoder: bool = False
    """Whether to train the text encoder together with the denoiser."""
    denoiser: Literal["transformer", "unet"] = "transformer"
    """The network of a new pipeline: `transformer` or `unet`."""
    expert: Literal["high_noise", "low_noise"] | None = None
    """Which Transformer to train of a pipeline with two: `transformer` (`high_noise`) or `transformer_2`
    (`low_noise`), each on its range of noise levels. `None` is for all other pipelines."""
    model: dict[str, Any] = field(default_factory=dict)
    """Arguments of `SpacetimeTransformer` or `UNet3D` for random weights; ignored with `--init`."""
    scheduler: SchedulerName = "ddim"
    """Scheduler of a new pipeline with `v_prediction` or `epsilon`: `ddim`, `dpmsolver++` or `unipc`."""
    zero_terminal_snr: bool = False
    """Whether the last timestep of `v_prediction` is pure noise."""
    snr_gamma: float = 0.0
    """Gamma of min-SNR weighting for `v_prediction` and `epsilon`, usually 5; 0 turns the weighting off."""
    frame_rate: float = 8.0
    """Default frame rate of the pipeline, in frames per second. Training conditions on the frame rate of each clip."""
    defaults: dict[str, Any] = field(default_factory=dict)
    """Default call arguments that are saved with the pipeline."""

    def check(self) -> None:
        """Checks the settings.

        Raises:
            ValueError: A setting is out of range or unknown.
        """
        super().check()
        if self.train_only == "lora" and self.train_text_encoder:
            raise ValueError("train_only=lora needs train_text_encoder=false")
        if not self.init and not self.vae:
            raise ValueError("a new pipeline needs vae: pass it, or pass a pipeline as init")
        if self.patience and not self.held_out_latents:
            raise ValueError("patience needs held_out_latents, on which it watches the loss")
        if self.num_score_clips < 1:
            raise ValueError(f"num_score_clips must be at least 1, got {self.num_score_clips}")
        if self.init is None:
            make_scheduler(self.prediction, self.scheduler, self.level_shift, self.zero_terminal_snr)
            if self.model.get("residual") and self.prediction != "flow":
                raise ValueError(f"residual in model needs prediction=flow, got {self.prediction}")


def main(config: VDMConfig) -> None:
    """Trains a denoiser; the same call resumes an interrupted run."""
    if config.dry_run:
        print(config_text(config))
        return
    accelerator = start(config)
    pipe = make_pipeline(config)
    denoiser = trained_denoiser(pipe, config)
    takes_first = pipe.config.expand_timesteps
    sources, shares = open_sources(denoiser, config, takes_first)
    record_frame_rates(denoiser, [source.data for source in sources])
    if pipe.transformer_2 is not None:  # both have the same config
        recorded = {name: denoiser.config[name] for name in RECORDED}
        for expert in (pipe.transformer, pipe.transformer_2):
            expert.register_to_config(**recorded)
    prepare_denoiser(denoiser, config)
    if pipe.text_encoder is not None:
        pipe.text_encoder.requires_grad_(config.train_text_encoder)
    if config.wants_temporal_loss:
        check_motion(config, sources)
        pipe.vae.requires_grad_(False).to(accelerator.device)  # decodes for a loss on pixels
    objective = Objective(pipe.scheduler, config.snr_gamma)
    evaluated = {}
    if config.held_out_latents is not None:
        settings = replace(sources[0].config, latents_dir=config.held_out_latents)
        held_out = supported_config(denoiser, settings, LatentSet(config.held_out_latents))
        evaluated = {"held_out_loss": held_out, "train_loss": sources[0]}
    both = [*sources, *evaluated.values()]
    if pipe.text_encoder is None:
        check_unprompted(config, both)
    embedded = not config.train_text_encoder and all(source.data.has_embeddings for source in both)
    check_stills(denoiser, both)
    check_actions(denoiser, both)
    check_conditions(denoiser, both, takes_first)
    check_encoders(both, pipe.vae, pipe.text_encoder if embedded else None, pipe.config.max_sequence_length)
    model = PromptedDenoiser(denoiser, None if embedded else pipe.text_encoder)
    spec, tokenizer = DenoiserSpec.of(denoiser, takes_first), None if embedded else pipe.tokenizer
    batches = DenoiserBatches(config, sources, shares, spec, tokenizer)
    fixed = {name: FixedSamples(source, config.num_score_clips, spec, tokenizer) for name, source in evaluated.items()}
    shown = evaluated.get("held_out_loss", sources[0])
    options: dict[str, Any] = sample_shape(pipe, sources[0])
    takes_images = denoiser.condition_channels > 0
    if takes_images:
        options["frames"] = sample_images(pipe, shown, accelerator.device)
    prompts = sample_prompts(pipe, config, shown if takes_images else evaluated.get("held_out_loss"))
    digest = hashlib.sha256("".join(source.data.digest for source in sources).encode()).hexdigest()
    # the embeddings of keyframes and frame rates are used in some steps only
    run = Run(config, accelerator, model, batches.name, digest, has_unused_weights=True)
    feed = Feed(run, batches)
    empty = sum(not any(captions) for source in sources for captions in source.data.captions)
    accelerator.print(f"{sum(len(source.data) for source in sources)} clips, {empty} of them without a caption")
    if tokenizer is not None and accelerator.is_main_process:  # embedded captions were counted before
        cut = CutCaptions(tokenizer, config.max_sequence_length)
        cut.add(caption for source in sources for captions in source.data.captions for caption in captions)
        cut.warn()
    if pipe.text_encoder is not None:
        pipe.text_encoder.train(config.train_text_encoder)

    for step in run.steps():
        mode = batches.plan(step).mode
        total = torch.zeros(2, device=accelerator.device)
        for _ in run.parts(config.batch_size):
            batch = next(feed)
            sample = objective(batch["latents"], batch["noise"], batch["levels"])
            conditions = conditioning(batch)
            if run.sharded:  # all processes must run the same operations
                conditions["num_gaps"] = None
            prediction = run.network(sample.latents, sample.timestep, **conditions)
            tokens = sample.latents[:, 0].numel() // math.prod(denoiser.patch_size)
            run.count(
                len(sample.latents),
                tokens,
                (sample.latents.shape, *conditions, mode),
                lambda network: network(sample.latents, sample.timestep, **conditions),  # noqa: B023
            )
            losses = denoising_loss(prediction, sample.target, sample.weight * (batch["generated"] & batch["real"]))
            temporal = torch.zeros_like(losses)
            if config.wants_temporal_loss:
                clean, signal = objective.estimate(sample, prediction)
                with accelerator.autocast():
                    temporal = denoiser_temporal_loss(config, pipe.video_vae, batch, clean, signal)
            run.backward((losses + temporal).sum() / config.batch_size)
            total += torch.stack([losses.sum(), temporal.sum()]).detach() / config.batch_size
        run.update()
        run.log(loss=total[0], **({"temporal": total[1]} if config.wants_temporal_loss else {}))
        if run.scores_are_due:  # losses on fixed samples, prompt adherence and sample videos
            with run.average, evaluating(denoiser, pipe.text_encoder):
                scores = {name: samples.loss(model, objective, accelerator) for name, samples in fixed.items()}
                correct, videos = score(pipe, config, prompts, options, accelerator)
            run.report(scores | correct, "held_out_loss", "min")
            run.save_samples(videos, config.frame_rate)
        run.save()

    name = EXPERTS.get(str(config.expert), pipe.denoiser_name)
    save = partial(save_result, pipe, name, config)
    command = "vgen animate IMAGE PROMPT" if takes_images else "vgen generate PROMPT"
    if config.train_only == "lora" and config.expert == "low_noise":
        run.end(save, "lora", f"{command} --model {config.init} --lora-low-noise {{}} -o video.mp4")
    elif config.train_only == "lora":
        run.end(save, "lora", f"{command} --model {config.init} --lora {{}} -o video.mp4")
    elif not pipe.is_unprompted:
        run.end(save, "pipeline", f"{command} --model {{}} -o video.mp4")
    elif "leading" in pipe.denoiser.config.tasks:
        run.end(save, "pipeline", "vgen predict VIDEO --model {} -o video.mp4")
    else:
        run.end(save, "pipeline", "vgen info {}")


def make_pipeline(config: VDMConfig) -> VideoGenPipeline:
    """The pipeline to train: loaded from `--init`, or a new one with a random denoiser and the given VAE."""
    if config.init:
        instead = {"vae": load_vae(config.vae)} if config.vae else {}
        pipe = VideoGenPipeline.from_pretrained(config.init, **instead)
        take_settings(config, pipe)
        return pipe
    assert config.vae  # config.check
    vae = load_vae(config.vae)
    text_encoder = load_text_encoder(config.text_encoder) if config.text_encoder else None
    # without prompts, the weights of cross-attention are not used
    tasks, text_dim = ([], 1) if text_encoder is None else (["text"], text_encoder.config.hidden_size)
    denoiser: SpacetimeTransformer | UNet3D
    if config.denoiser == "unet":
        denoiser = UNet3D(**{"cross_attention_dim": text_dim, "tasks": tasks, **config.model})
    else:
        denoiser = SpacetimeTransformer(**{"text_dim": text_dim, "tasks": tasks, **config.model})
    return VideoGenPipeline(
        scheduler=make_scheduler(config.prediction, config.scheduler, config.level_shift, config.zero_terminal_snr),
        vae=vae,
        **{config.denoiser: denoiser},
        text_encoder=text_encoder,
        tokenizer=load_tokenizer(config.text_encoder) if config.text_encoder else None,
        max_sequence_length=config.max_sequence_length,
        frame_rate=config.frame_rate,
        **config.defaults,
    )


def trained_denoiser(pipe: VideoGenPipeline, config: VDMConfig) -> Any:
    """The denoiser to train. For one of two experts, also limits the noise levels to its range.

    Raises:
        ValueError: `expert` is missing, or the pipeline has no two Transformers.
    """
    if (pipe.transformer_2 is None) != (config.expert is None):
        found = "two Transformers: set expert to high_noise or low_noise" if pipe.transformer_2 else "one denoiser"
        raise ValueError(f"the pipeline to train has {found}, got expert={config.expert}")
    if config.expert is None:
        return pipe.denoiser
    boundary, (low, high) = pipe.config.boundary_ratio, config.level_range
    limits = {"high_noise": [max(low, boundary), high], "low_noise": [low, min(high, boundary)]}
    config.level_range = limits[config.expert]
    check_number("the lower end of level_range", config.level_range[0], below=config.level_range[1])
    return getattr(pipe, EXPERTS[config.expert])


def check_unprompted(config: VDMConfig, sources: list[Source]) -> None:
    """Checks that no text encoder is needed.

    Raises:
        ValueError: Clips have captions, or a setting needs a text encoder.
    """
    if config.train_text_encoder or config.sample_prompts:
        raise ValueError("train_text_encoder and sample_prompts need a text encoder: pass text_encoder")
    for source in sources:
        if source.data.has_embeddings or any(map(any, source.data.captions)):
            raise ValueError(
                f"the clips in {source.config.latents_dir} have captions, so a text encoder is needed: pass "
                "text_encoder, for example the result of train_text_encoder.py --data"
            )


def take_settings(config: VDMConfig, pipe: VideoGenPipeline) -> None:
    """Replaces settings that have their defaults by those of the pipeline in `--init`, and prints which ones.

    Raises:
        ValueError: A setting is neither the default nor that of the pipeline.
    """
    found = {
        "prediction": prediction_of(pipe.scheduler),
        "level_shift": shift_of(pipe.scheduler),
        "zero_terminal_snr": pipe.scheduler.config.get("rescale_betas_zero_snr", False),
        "max_sequence_length": pipe.config.max_sequence_length,
        "frame_rate": pipe.config.frame_rate,
    }
    taken = {name: value for name, value in found.items() if getattr(config, name) != value}
    for name, value in taken.items():
        wanted = getattr(config, name)
        if wanted != getattr(VDMConfig, name):
            raise ValueError(f"{name}={wanted}, but the pipeline in {config.init} has {value}: set {name}={value}")
        setattr(config, name, value)
    if taken and this_process().is_main_process:
        print(f"settings of {config.init}: {', '.join(f'{name}={value}' for name, value in taken.items())}")


if __name__ == "__main__":
    with one_line_errors(Path(__file__).name):
        main(parse_config(VDMConfig, __doc__))
