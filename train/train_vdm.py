"""Train a video diffusion model on precomputed latents, with or without text prompts.

A small run for a CPU, after training a text encoder and a VAE and encoding clips with it:

    accelerate launch train/train_vdm.py --config train/recipes/shapes-64.yaml --output_dir runs/try --max_steps 20
"""

from vgen.io.spinning import stop_spinning

stop_spinning()  # before torch is imported

import hashlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from einops import rearrange
from PIL import Image
from torch import Tensor

from vgen.checks import check_number
from vgen.data.latents import LatentSet
from vgen.data.shapes import ShapesWorld
from vgen.diffusion import SchedulerName, make_scheduler, prediction_of, shift_of
from vgen.io.atomic import atomic_directory
from vgen.io.errors import one_line_errors
from vgen.io.pixels import from_pt, to_uint8
from vgen.io.records import read_json
from vgen.metrics.prompt import adherence
from vgen.models.compilation import compile_blocks
from vgen.models.image_vae import load_vae
from vgen.models.prompts import CutCaptions, load_text_encoder, load_tokenizer
from vgen.models.transformer import SpacetimeTransformer
from vgen.models.unet import UNet3D
from vgen.pipeline import VideoGenPipeline
from vgen.processes import this_process
from vgen.temporal.attention import widest_mode
from vgen.training.feed import Feed
from vgen.training.held_out import FixedSamples
from vgen.training.objective import (
    Objective,
    PromptedDenoiser,
    denoising_loss,
)
from vgen.training.run import Run, config_text, copy_of, parse_config, start
from vgen.training.sample import (
    DenoiserBatches,
    DenoiserSpec,
    SampleConfig,
    Source,
    check_conditions,
    check_encoders,
    check_motion,
    check_stills,
    conditioning,
    denoiser_temporal_loss,
    record_frame_rates,
    record_tasks,
    supported_config,
)

NUM_SAMPLES = 4
"""Number of sample videos if the settings give no prompts."""
EXPERTS = {"high_noise": "transformer", "low_noise": "transformer_2"}
"""The component of each expert."""
RECORDED = ("tasks", "trained_token_frames", "trained_frame_rates")
"""What training writes to the denoiser's config."""


@dataclass(kw_only=True)
class VDMConfig(SampleConfig):
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
    more_latents: dict[str, float] = field(default_factory=dict)
    """Other folders with latents, and the probability of each, drawn for each step. Settings that their clips do not
    support (long windows, keyframes) are not used there."""
    train_text_encoder: bool = False
    """Whether to train the text encoder together with the denoiser."""
    denoiser: Literal["transformer", "unet"] = "transformer"
    """The network of a new pipeline: `transformer` or `unet`."""
    expert: Literal["high_noise", "low_noise"] | None = None
    """Which Transformer to train of a pipeline with two: `transformer` (`high_noise`) or `transformer_2`
    (`low_noise`), each on its range of noise levels. `None` is for all other pipelines."""
    train_only: Literal["all", "temporal", "lora"] = "all"
    """Which weights to train: `all`; `temporal`, the layers that mix frames or were added when a 2D network was
    inflated; or `lora`, low-rank adapters of `lora_targets`, which are saved without the denoiser."""
    lora_rank: int = 16
    """Rank of the LoRA adapters."""
    lora_alpha: float | None = None
    """LoRA adapters are scaled by `lora_alpha / lora_rank`; `None` means `lora_rank`."""
    lora_targets: list[str] = field(default_factory=lambda: ["to_q", "to_k", "to_v", "to_out.0"])
    """Layers with LoRA adapters, by the ends of their names."""
    model: dict[str, Any] = field(default_factory=dict)
    """Arguments of `SpacetimeTransformer` or `UNet3D` for random weights; ignored with `--init`."""
    attention_backend: str | None = None
    """Attention backend of diffusers; `None` means diffusers' default, and `_native_math` for short sequences on the
    CPU."""
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
    sample_prompts: list[str] = field(default_factory=list)
    """Prompts of sample videos. With an empty list, these are captions of `held_out_latents`; without these latents,
    scores are computed on prompts of ShapesWorld."""
    num_score_prompts: int = 32
    """Number of ShapesWorld prompts for a score: half from training combinations, half held out."""
    save_dtype: Literal["float32", "bfloat16", "float16"] = "float16"
    """Data type of the weights in the saved pipeline: `float32`, `bfloat16` or `float16`. They are loaded as float32
    by default."""

    def check(self) -> None:
        """Checks the settings.

        Raises:
            ValueError: A setting is out of range or unknown.
        """
        super().check()
        if not self.init and not self.vae:
            raise ValueError("a new pipeline needs vae: pass it, or pass a pipeline as init")
        if self.patience and not self.held_out_latents:
            raise ValueError("patience needs held_out_latents, on which it watches the loss")
        if self.num_score_clips < 1:
            raise ValueError(f"num_score_clips must be at least 1, got {self.num_score_clips}")
        if min(self.more_latents.values(), default=0) < 0 or sum(self.more_latents.values()) > 1:
            raise ValueError(
                f"more_latents must have probabilities of at least 0 with a sum of at most 1, got {self.more_latents}"
            )
        if self.init is None:
            make_scheduler(self.prediction, self.scheduler, self.level_shift, self.zero_terminal_snr)
            if self.model.get("residual") and self.prediction != "flow":
                raise ValueError(f"residual in model needs prediction=flow, got {self.prediction}")
        if self.train_only == "lora" and (self.init is None or self.train_text_encoder or self.lora_rank < 1):
            raise ValueError(
                "train_only=lora needs a pipeline as init, train_text_encoder=false and lora_rank of at least 1, got "
                f"init={self.init}, train_text_encoder={self.train_text_encoder}, lora_rank={self.lora_rank}"
            )
        if self.num_score_prompts < 2:
            raise ValueError(f"num_score_prompts must be at least 2, got {self.num_score_prompts}")


def main(config: VDMConfig) -> None:
    """Trains a denoiser; the same call resumes an interrupted run."""
    if config.dry_run:
        print(config_text(config))
        return
    accelerator = start(config)
    pipe = make_pipeline(config)
    denoiser = trained_denoiser(pipe, config)
    takes_first = pipe.config.expand_timesteps
    sources = [record_tasks(denoiser, config, LatentSet(config.latents_dir), takes_first)]
    for folder in map(Path, config.more_latents):
        settings = replace(sources[0].config, latents_dir=folder)
        sources.append(supported_config(denoiser, settings, LatentSet(folder)))
    shares = [1 - sum(config.more_latents.values()), *config.more_latents.values()]
    record_frame_rates(denoiser, [source.data for source in sources])
    if pipe.transformer_2 is not None:  # both have the same config
        recorded = {name: denoiser.config[name] for name in RECORDED}
        for expert in (pipe.transformer, pipe.transformer_2):
            expert.register_to_config(**recorded)
    if config.train_only == "lora":
        add_adapter(denoiser, config)
    if config.gradient_checkpointing:
        denoiser.enable_gradient_checkpointing()
    if config.attention_backend:
        denoiser.set_attention_backend(config.attention_backend)
    if config.compile:
        compile_blocks(denoiser)
    if pipe.text_encoder is not None:
        pipe.text_encoder.requires_grad_(config.train_text_encoder)
    if config.train_only == "temporal":
        denoiser.requires_grad_(False)
        for weight in temporal_parameters(denoiser):
            weight.requires_grad_(True)
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

    def save_result(weights: dict[str, Tensor] | None) -> None:
        if weights is not None:
            use_whole(pipe, config, weights)
        if config.train_only == "lora":
            save_adapter(pipe, config)
            return
        with atomic_directory(config.output_dir / "pipeline") as folder:
            pipe.to(getattr(torch, config.save_dtype)).save_pretrained(folder)

    command = "vgen animate IMAGE PROMPT" if takes_images else "vgen generate PROMPT"
    if config.train_only == "lora" and config.expert == "low_noise":
        run.end(save_result, "lora", f"{command} --model {config.init} --lora-low-noise {{}} -o video.mp4")
    elif config.train_only == "lora":
        run.end(save_result, "lora", f"{command} --model {config.init} --lora {{}} -o video.mp4")
    elif not pipe.is_unprompted:
        run.end(save_result, "pipeline", f"{command} --model {{}} -o video.mp4")
    elif "leading" in pipe.denoiser.config.tasks:
        run.end(save_result, "pipeline", "vgen predict VIDEO --model {} -o video.mp4")
    else:
        run.end(save_result, "pipeline", "vgen info {}")


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


def sample_prompts(pipe: VideoGenPipeline, config: VDMConfig, held_out: Source | None) -> list[str]:
    """The prompts of sample videos; an empty list stands for those of ShapesWorld."""
    if config.sample_prompts:
        return config.sample_prompts
    if pipe.is_unprompted:
        return [""] * NUM_SAMPLES
    captions = [] if held_out is None else held_out.data.captions
    return list(dict.fromkeys(one[0] for one in captions))[:NUM_SAMPLES]


def sample_shape(pipe: VideoGenPipeline, source: Source) -> dict[str, int]:
    """Size of sample videos: that of the clips, and no more frames than they have."""
    height, width = (pipe.vae_scale_factor_spatial * size for size in source.data.shape[2:])
    num_frames = min(pipe.config.num_frames, pipe.grid.num_frames(source.data.num_latents))
    return {"height": height, "width": width, "num_frames": num_frames}


@torch.no_grad()
def sample_images(pipe: VideoGenPipeline, source: Source, device: torch.device) -> dict[int, list[Image.Image]]:
    """The known frames of the first clips, as the VAE decodes them: by index, a picture for each clip."""
    indices = read_json(source.config.latents_dir / "settings.json")["condition"]
    frames: dict[int, list[Image.Image]] = {index: [] for index in indices}
    codec: Any = pipe.video_vae
    pipe.vae.to(device)
    for number in range(min(NUM_SAMPLES, len(source.data))):
        latents = source.data[number].latents[None].float().to(device)
        needed = latents if -1 in indices else latents[:, :, :1]
        clip = codec.decode(codec.denormalize(needed)).sample
        pixels = to_uint8(rearrange(clip[0], "c f h w -> f h w c")).cpu().numpy()
        for index, pictures in frames.items():
            pictures.append(Image.fromarray(pixels[index]))
    return frames


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


def use_whole(pipe: VideoGenPipeline, config: VDMConfig, weights: dict[str, Tensor]) -> None:
    """Replaces the sharded networks of a pipeline by new ones with the gathered weights of `PromptedDenoiser`."""

    def weights_of(part: str) -> dict[str, Tensor]:
        return {key.removeprefix(part): value for key, value in weights.items() if key.startswith(part)}

    name = EXPERTS.get(config.expert, pipe.denoiser_name)
    whole = {name: copy_of(getattr(pipe, name), weights_of("denoiser."))}
    if text := weights_of("text_encoder."):
        whole["text_encoder"] = type(pipe.text_encoder)(pipe.text_encoder.config)
        whole["text_encoder"].load_state_dict(text)
    pipe.register_modules(**whole)


def add_adapter(denoiser: Any, config: VDMConfig) -> None:
    """Freezes a denoiser and adds trainable LoRA adapters.

    Raises:
        ImportError: `peft` is not installed.
    """
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ImportError("train_only=lora needs peft: pip install vgen[lora]") from error
    alpha = config.lora_rank if config.lora_alpha is None else config.lora_alpha
    denoiser.requires_grad_(False)
    denoiser.add_adapter(LoraConfig(r=config.lora_rank, lora_alpha=alpha, target_modules=config.lora_targets))


def save_adapter(pipe: VideoGenPipeline, config: VDMConfig) -> None:
    """Saves only the adapters, for `pipe.load_lora_weights(output_dir / "lora")`.

    Those of either expert have the names of `transformer`, as in public adapters.
    """
    from peft import get_peft_model_state_dict

    name, denoiser = pipe.denoiser_name, getattr(pipe, EXPERTS.get(config.expert, pipe.denoiser_name))
    dtype = getattr(torch, config.save_dtype)
    layers = {key: value.to(dtype) for key, value in get_peft_model_state_dict(denoiser).items()}
    metadata = denoiser.peft_config["default"].to_dict()
    options = {f"{name}_lora_layers": layers, f"{name}_lora_adapter_metadata": metadata}
    with atomic_directory(config.output_dir / "lora") as folder:
        pipe.save_lora_weights(folder, **options)


def temporal_parameters(denoiser: SpacetimeTransformer | UNet3D) -> list[Tensor]:
    """Weights of the layers that mix frames or were added when a 2D network was inflated.

    Raises:
        ValueError: The denoiser has no such layers.
    """
    found = [weight for name, weight in denoiser.named_parameters() if any(part in name for part in denoiser.temporal)]
    if not found:
        raise ValueError(
            f"train_only=temporal: this {type(denoiser).__name__} has no purely temporal layers, which a UNet3D and "
            "a SpacetimeTransformer with attention=divided have: use train_only=all or train_only=lora"
        )
    return found


@contextmanager
def evaluating(*given: Any) -> Iterator[None]:
    """Puts networks into evaluation mode; those that are `None` do not exist."""
    networks = [one for one in given if one is not None]
    modes = [network.training for network in networks]
    for network in networks:
        network.eval()
    yield
    for network, mode in zip(networks, modes, strict=True):
        network.train(mode)


@torch.no_grad()
def score(
    pipe: VideoGenPipeline,
    config: VDMConfig,
    prompts: list[str],
    options: dict[str, Any],
    accelerator: Accelerator,
) -> tuple[dict[str, float], np.ndarray]:
    """Frames `(f, h, w, 3)` of videos from prompts; without prompts, of ShapesWorld, with their prompt adherence.

    The processes divide the videos among them.

    Args:
        pipe: Makes the videos.
        config: Settings of the run.
        prompts: The prompts, or none.
        options: Size of the videos, and for models that make videos from images `frames`, used in turn.
        accelerator: That of the run.
    """
    scores: dict[str, float] = {}
    shown = []
    pipe.to(accelerator.device)
    pipe.set_progress_bar_config(disable=True)
    groups = widest_mode(pipe.denoiser.config.group_modes)

    def generate(prompts: list[str]) -> Tensor:
        videos: list[tuple[int, Tensor]] = []
        mine = range(len(prompts))[accelerator.process_index :: accelerator.num_processes]
        if mine:
            generators = [torch.Generator().manual_seed(index) for index in mine]
            with accelerator.autocast():
                some = [prompts[index] for index in mine]
                each = options.get("frames", {}).items()
                frames = {index: [images[one % len(images)] for one in mine] for index, images in each}
                given = options | ({"frames": frames} if frames else {})
                made = pipe(some, groups=groups, generator=generators, output_type="pt", **given).frames
            videos = list(zip(mine, made.float().cpu(), strict=True))
        gathered = dict(gather_object(videos))
        clips = from_pt(torch.stack([gathered[index] for index in range(len(prompts))]))
        shown.append(rearrange(clips[:8], "b c f h w -> f h (b w) c"))
        return clips

    if prompts:
        generate(prompts)
    for split in () if prompts else ("train", "held_out"):
        world = ShapesWorld(split=split, seed=config.seed + 1)
        indices = range(config.num_score_prompts // 2)
        clips = generate([world.caption(index) for index in indices])
        result = adherence(list(clips), [world.scene(index) for index in indices])
        scores |= {f"adherence/{split} {name}": value for name, value in result.items()}
    return scores, to_uint8(torch.cat(shown, dim=1)).numpy()


if __name__ == "__main__":
    with one_line_errors(Path(__file__).name):
        main(parse_config(VDMConfig, __doc__))
