"""Train a video diffusion model: a denoiser behind a text encoder, on latents that were computed once.

A CPU-sized try, after training a text encoder and a VAE and encoding clips with it:

    accelerate launch train/train_vdm.py --config train/recipes/shapes-64.yaml --output_dir runs/try --max_steps 20
"""

import hashlib
import itertools
import json
import math
import random
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from diffusers.configuration_utils import FrozenDict
from einops import rearrange
from torch import Tensor
from transformers import AutoTokenizer

from vgen.data.latents import EncodedClip, LatentSet, epoch_order
from vgen.data.shapes import ShapesWorld
from vgen.data.video_io import write_video
from vgen.diffusion import make_scheduler, prediction_of, shift_of
from vgen.folders import whole_folder
from vgen.metrics.prompt import adherence
from vgen.models.denoiser import pack_keyframes
from vgen.models.image_vae import load_vae
from vgen.models.loading import encoder_digest, weights_digest
from vgen.models.prompts import load_text_encoder, tokenize
from vgen.models.transformer import SpacetimeTransformer
from vgen.models.unet import UNet3D
from vgen.pipeline import VideoGenPipeline
from vgen.temporal.attention import GROUP_MODES, make_groups
from vgen.temporal.flow import Motion, measure_motion
from vgen.training.mixture import KEYFRAMES, KNOWN, WINDOWS, draw_keyframes, draw_num_leading, draw_window, least_known
from vgen.training.noise_levels import KINDS, draw_levels
from vgen.training.objective import (
    Objective,
    PromptedDenoiser,
    denoising_loss,
)
from vgen.training.run import Run, RunConfig, compile_blocks, config_text, copy_of, generators, parse_config, start
from vgen.training.temporal_loss import TemporalLossConfig, temporal_loss


@dataclass(kw_only=True)
class VDMConfig(RunConfig, TemporalLossConfig):
    """Settings of a denoiser's training.

    `--init` is a pipeline to start from. Its parts and defaults are kept; settings that make a new pipeline
    (`text_encoder`, `model`, `defaults`) do not apply then.
    """

    vae: str | None = None
    """Folder or Hub id of the VAE that encoded the latents; with `--init`, it takes the place of the VAE there."""
    text_encoder: str | None = None
    """Folder or Hub id with a transformers text encoder in `text_encoder` and its tokenizer in `tokenizer`."""
    latents_dir: Path
    """Folder that `pipelines/encode_latents.py` wrote."""
    more_latents: dict[str, float] = field(default_factory=dict)
    """Other such folders, and how often a step draws from each instead. What their clips cannot serve (long windows,
    keyframes) is left out there."""
    train_text_encoder: bool = False
    """Whether the text encoder is trained along."""
    denoiser: str = "transformer"
    """What is trained: `transformer` or `unet`; `--init` brings its own."""
    train_only: str = "all"
    """`all`; `temporal`: layers that mix frames or were not there before a 2D network was inflated; or `lora`:
    low-rank adapters of `lora_targets`, which are saved on their own."""
    lora_rank: int = 16
    """Of the adapters."""
    lora_alpha: float | None = None
    """Adapters are scaled by `lora_alpha / lora_rank`; `None` takes the rank."""
    lora_targets: list[str] = field(default_factory=lambda: ["to_q", "to_k", "to_v", "to_out.0"])
    """Ends of the names of the layers that get one."""
    model: dict[str, Any] = field(default_factory=dict)
    """Arguments of `SpacetimeTransformer` or `UNet3D` for random weights; `--init` ignores them."""
    attention_backend: str | None = None
    """Any name of diffusers' attention dispatcher; `None` is its own, but `_native_math` for short rows on CPUs."""
    max_sequence_length: int = 32
    """Tokens of a prompt."""
    groups: dict[str, float] = field(default_factory=lambda: {"full": 0.5, "chunk": 0.25, "causal": 0.25})
    """How often a step has which groups; `full` has the leading known frames in a group of their own."""
    windows: dict[str, float] = field(default_factory=lambda: {"start": 1.0})
    """How often a sample is the start of its clip, a later part of it (`anywhere`), or its sink and a later part."""
    window_lengths: list[int] = field(default_factory=list)
    """Token frames of a sample, drawn for each step; empty takes whole clips."""
    known: dict[str, float] = field(default_factory=lambda: {"none": 1.0})
    """How often a sample has no known frames, leading ones, keyframes, or both."""
    num_leading: list[int] = field(default_factory=list)
    """Token frames that are known where leading ones are, drawn for each sample; empty takes any number."""
    keyframes: dict[str, float] = field(default_factory=lambda: {"every": 1.0, "last": 1.0, "any": 1.0, "next": 1.0})
    """How often keyframes are every n-th frame, the last one, any, or those next to the known beginning."""
    corrupted: float = 0.5
    """How often leading frames are not clean, but each noised at a level of its own."""
    corrupted_level: float = 1 / 3
    """Highest such level."""
    levels: dict[str, float] = field(default_factory=lambda: {"shared": 1.0})
    """How often a sample has noise levels that are shared, per group, or independent per frame."""
    prediction: str = "flow"
    """`flow`, `v_prediction` or `epsilon`."""
    scheduler: str = "ddim"
    """What a new pipeline for the last two is saved with: `ddim`, `dpmsolver++` or `unipc`."""
    zero_terminal_snr: bool = False
    """Whether the last timestep of `v_prediction` is noise alone."""
    snr_gamma: float = 0.0
    """Min-SNR weighting of `v_prediction` and `epsilon`, usually 5; 0 for none."""
    level_mean: float = 0.0
    """Of the logit of a noise level."""
    level_std: float = 1.0
    """Of the logit of a noise level."""
    level_shift: float = 1.0
    """Moves noise levels towards noise, in training and at inference."""
    temporal_space: str = "latent"
    """Where the temporal loss of the estimated clean clip is taken: `latent`, or `pixel`, which decodes it."""
    text_dropout: float = 0.1
    """How often the caption is replaced by ""."""
    frame_rate: float = 8.0
    """Default of the pipeline, in pixel frames per second; each clip is told with its own."""
    frame_rate_dropout: float = 0.1
    """How often the frame rate is not told."""
    defaults: dict[str, Any] = field(default_factory=dict)
    """Defaults that the pipeline is saved with."""
    sample_prompts: list[str] = field(default_factory=list)
    """Prompts of sample videos, for one's own data; empty scores prompts of ShapesWorld, which can be checked."""
    num_score_prompts: int = 32
    """Prompts of a score, half from training combinations, half held out."""
    save_dtype: str = "float16"
    """Precision of the weights in the saved pipeline; loading gives float32 unless asked otherwise."""

    def check(self) -> None:
        """Refuses what cannot work.

        Raises:
            ValueError: A setting is out of range or unknown.
        """
        super().check()
        if not self.init and not (self.vae and self.text_encoder):
            raise ValueError("a new pipeline needs vae and text_encoder; or give init, a pipeline that has them")
        for name, legal in (
            ("groups", GROUP_MODES),
            ("windows", WINDOWS),
            ("known", KNOWN),
            ("keyframes", KEYFRAMES),
            ("levels", KINDS),
        ):
            given = getattr(self, name)
            if not given or set(given) - set(legal) or min(given.values()) < 0:
                raise ValueError(f"{name}={given} must weigh some of {', '.join(legal)}")
        if min(self.num_leading, default=1) < 1:
            raise ValueError(f"num_leading={self.num_leading} must be at least 1")
        if min(self.more_latents.values(), default=0) < 0 or sum(self.more_latents.values()) > 1:
            raise ValueError(f"more_latents={self.more_latents} must be shares that sum to at most 1")
        for name in ("text_dropout", "frame_rate_dropout", "corrupted", "corrupted_level"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must be in [0, 1]")
        self.check_temporal_loss()
        for name, legal in (
            ("denoiser", ("transformer", "unet")),
            ("train_only", ("all", "temporal", "lora")),
            ("temporal_space", ("latent", "pixel")),
        ):
            if getattr(self, name) not in legal:
                raise ValueError(f"{name}={getattr(self, name)!r} must be one of {', '.join(legal)}")
        if self.init is None:
            make_scheduler(self.prediction, self.scheduler, self.level_shift, self.zero_terminal_snr)
        if self.train_only == "lora" and (self.init is None or self.train_text_encoder or self.lora_rank < 1):
            raise ValueError(
                f"train_only=lora with init={self.init}, train_text_encoder={self.train_text_encoder}, "
                f"lora_rank={self.lora_rank}: it adapts the denoiser of --init, and the rank is at least 1"
            )
        if self.num_score_prompts < 2:
            raise ValueError(f"num_score_prompts={self.num_score_prompts} must be at least 2")
        if self.save_dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"save_dtype={self.save_dtype!r} must be float32, bfloat16 or float16")


def main(config: VDMConfig) -> None:
    """Trains; the same call goes on where an interrupted one stopped."""
    if config.dry_run:
        print(config_text(config))
        return
    accelerator = start(config)
    pipe = make_pipeline(config)
    sources = [declare(pipe, config, LatentSet(config.latents_dir))]
    for folder in map(Path, config.more_latents):
        sources.append(restrict(pipe, replace(sources[0].config, latents_dir=folder), LatentSet(folder)))
    shares = [1 - sum(config.more_latents.values()), *config.more_latents.values()]
    if config.train_only == "lora":
        add_adapter(pipe, config)
    if config.gradient_checkpointing:
        pipe.denoiser.enable_gradient_checkpointing()
    if config.attention_backend:
        pipe.denoiser.set_attention_backend(config.attention_backend)
    if config.compile:
        compile_blocks(pipe.denoiser)
    pipe.text_encoder.requires_grad_(config.train_text_encoder)
    if config.train_only == "temporal":
        pipe.denoiser.requires_grad_(False)
        for weight in temporal_parameters(pipe.denoiser):
            weight.requires_grad_(True)
    if config.wants_temporal_loss:
        check_motion(config, sources)
        pipe.vae.requires_grad_(False).to(accelerator.device)  # which decodes for the loss between pixels
    objective = Objective(pipe.scheduler, config.snr_gamma)
    embedded = not config.train_text_encoder and all(source.data.has_embeddings for source in sources)
    check_made_with(pipe, sources, embedded)
    model = PromptedDenoiser(pipe.denoiser, None if embedded else pipe.text_encoder)
    digest = hashlib.sha256("".join(source.data.digest for source in sources).encode()).hexdigest()
    run = Run(config, accelerator, model, lambda step: name_batch(config, sources, shares, step), digest)
    model.sharded = run.sharded
    empty = sum(not any(captions) for source in sources for captions in source.data.captions)
    accelerator.print(f"{sum(len(source.data) for source in sources)} clips, {empty} of them without a caption")
    pipe.text_encoder.train(config.train_text_encoder)

    for step in run.steps():
        mode, source, length = plan(config, sources, shares, step)
        total = torch.zeros(2, device=accelerator.device)
        for part in run.parts(config.batch_size):
            batch = draw(source, pipe, step, part, mode, length, embedded)
            groups = batch.pop("groups")
            shared = groups[0].tolist() if (groups == groups[0]).all() else groups  # full groups need no mask then
            batch = {name: value.to(accelerator.device) for name, value in batch.items()}
            sample = objective(batch["latents"], batch["noise"], batch["levels"])
            told = ("input_ids", "prompt_mask", "prompt_embeds", "frame_rate", "keyframes", "unseen", "resumes")
            conditions = {name: batch[name] for name in told if name in batch}
            prediction = run.network(sample.latents, sample.timestep, groups=shared, **conditions)
            tokens = sample.latents[:, 0].numel() // math.prod(pipe.denoiser.patch_size)
            gaps = int((batch["resumes"] < length).sum()) if "resumes" in batch else 0
            shape = (sample.latents.shape, *conditions, mode, gaps)
            run.count(
                len(sample.latents),
                tokens,
                shape,
                lambda network: network(sample.latents, sample.timestep, groups=shared, **conditions),  # noqa: B023
            )
            losses = denoising_loss(prediction, sample.target, sample.weight * (batch["generated"] & batch["real"]))
            temporal = torch.zeros_like(losses)
            if config.wants_temporal_loss:
                clean, signal = objective.estimate(sample, prediction)
                with accelerator.autocast():
                    temporal = between_frames(config, pipe, batch, clean, signal)
            run.backward((losses + temporal).sum() / config.batch_size)
            total += torch.stack([losses.sum(), temporal.sum()]).detach() / config.batch_size
        run.update()
        run.log(loss=total[0], **({"temporal": total[1]} if config.wants_temporal_loss else {}))
        if run.wants_scores:  # how many prompts come out right, and a video of some
            with run.average:
                scores, shown = score(pipe, config, accelerator)
            run.report({f"adherence/{name}": value for name, value in scores.items()})
            write_video(shown, config.output_dir / "samples.mp4", frame_rate=config.frame_rate, overwrite=True)
        run.save()

    def save_result(weights: dict[str, Tensor] | None) -> None:
        if weights is not None:
            own = {key.removeprefix("denoiser."): value for key, value in weights.items()}
            own = {key: value for key, value in own.items() if not key.startswith("text_encoder.")}
            pipe.register_modules(**{"transformer" if pipe.unet is None else "unet": copy_of(pipe.denoiser, own)})
        if config.train_only == "lora":
            save_adapter(pipe, config)
            return
        with whole_folder(config.output_dir / "pipeline") as folder:
            pipe.to(getattr(torch, config.save_dtype)).save_pretrained(folder)

    run.end(save_result)


def make_pipeline(config: VDMConfig) -> VideoGenPipeline:
    """The pipeline to train: from `--init`, or with random weights behind the given VAE."""
    if config.init:
        instead = {"vae": load_vae(config.vae)} if config.vae else {}
        pipe = VideoGenPipeline.from_pretrained(config.init, **instead)
        for name, wanted, found in (
            ("prediction", config.prediction, prediction_of(pipe.scheduler)),
            ("level_shift", config.level_shift, shift_of(pipe.scheduler)),
            (
                "zero_terminal_snr",
                config.zero_terminal_snr,
                pipe.scheduler.config.get("rescale_betas_zero_snr", False),
            ),
            ("max_sequence_length", config.max_sequence_length, pipe.config.max_sequence_length),
            ("frame_rate", config.frame_rate, pipe.config.frame_rate),
        ):
            if wanted != found:
                raise ValueError(f"{name}={wanted}, but the pipeline in {config.init} has {found}: give that")
        return pipe
    assert config.vae and config.text_encoder  # config.check
    vae = load_vae(config.vae)
    text_encoder = load_text_encoder(config.text_encoder)
    text_dim = text_encoder.config.hidden_size
    denoiser: SpacetimeTransformer | UNet3D
    if config.denoiser == "unet":
        denoiser = UNet3D(**{"cross_attention_dim": text_dim, **config.model})
    else:
        denoiser = SpacetimeTransformer(**{"text_dim": text_dim, **config.model})
    return VideoGenPipeline(
        scheduler=make_scheduler(config.prediction, config.scheduler, config.level_shift, config.zero_terminal_snr),
        vae=vae,
        **{config.denoiser: denoiser},
        text_encoder=text_encoder,
        tokenizer=AutoTokenizer.from_pretrained(config.text_encoder, subfolder="tokenizer"),
        max_sequence_length=config.max_sequence_length,
        frame_rate=config.frame_rate,
        **config.defaults,
    )


def add_adapter(pipe: VideoGenPipeline, config: VDMConfig) -> None:
    """Freezes the denoiser and adds low-rank layers that are trained instead.

    Raises:
        ImportError: Peft is not installed.
    """
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ImportError("train_only=lora needs peft: pip install vgen[lora]") from error
    alpha = config.lora_rank if config.lora_alpha is None else config.lora_alpha
    pipe.denoiser.requires_grad_(False)
    pipe.denoiser.add_adapter(LoraConfig(r=config.lora_rank, lora_alpha=alpha, target_modules=config.lora_targets))


def save_adapter(pipe: VideoGenPipeline, config: VDMConfig) -> None:
    """Writes the adapter alone, for `pipe.load_lora_weights(output_dir / "lora")`."""
    from peft import get_peft_model_state_dict

    name = "transformer" if pipe.unet is None else "unet"
    dtype = getattr(torch, config.save_dtype)
    layers = {key: value.to(dtype) for key, value in get_peft_model_state_dict(pipe.denoiser).items()}
    metadata = pipe.denoiser.peft_config["default"].to_dict()
    options = {f"{name}_lora_layers": layers, f"{name}_lora_adapter_metadata": metadata}
    with whole_folder(config.output_dir / "lora") as folder:
        pipe.save_lora_weights(folder, **options)


def temporal_parameters(denoiser: SpacetimeTransformer | UNet3D) -> list[Tensor]:
    """Weights of the layers that mix frames or that an inflated 2D network did not have.

    Raises:
        ValueError: There are none.
    """
    found = [weight for name, weight in denoiser.named_parameters() if any(part in name for part in denoiser.temporal)]
    if not found:
        raise ValueError(
            f"train_only=temporal: this {type(denoiser).__name__} has no layers for time alone, which a UNet3D and "
            "attention=divided have: train all of it, or train_only=lora"
        )
    return found


def choose(weights: dict[str, float], rng: random.Random) -> str:
    """One of the names, by their weights."""
    return rng.choices(list(weights), list(weights.values()))[0]


class Source(NamedTuple):
    """Encoded clips, and what of the settings they serve."""

    data: LatentSet
    config: VDMConfig


def declare(pipe: VideoGenPipeline, config: VDMConfig, data: LatentSet) -> Source:
    """Writes into the denoiser's config what it is trained for; fills in the lengths of windows.

    Raises:
        ValueError: The clips are too short, or known frames have no latents or no slots.
    """
    network = pipe.denoiser.config
    whole = data.latents.shape[2] // pipe.denoiser.patch_size[0]
    lengths = config.window_lengths or [whole]
    used = {kind for kind, weight in config.known.items() if weight > 0}
    if used & {"keyframes", "both"} and (data.frames is None or not network.keyframe_slots):
        raise ValueError(
            f"known={config.known} needs keyframe_slots in the model (it has {network.keyframe_slots}) and latents of "
            "single frames: pipelines/encode_latents.py --keyframes true"
        )
    if used - {"none"} and min(lengths) < 2:
        raise ValueError(
            f"window_lengths={lengths} with known={config.known}: known frames need 2 token frames or more"
        )
    for kind, length in itertools.product((kind for kind, weight in config.windows.items() if weight > 0), lengths):
        draw_window(kind, length, whole, network.sink, random.Random(0))
    later = {kind for kind, weight in config.windows.items() if weight > 0} - {"start"}
    trained = ["leading"] if used & {"leading", "both"} or later else []
    trained += ["keyframes"] if used & {"keyframes", "both"} else []
    pipe.denoiser.register_to_config(
        tasks=list(dict.fromkeys([*network.tasks, *trained])),
        trained_token_frames=max(*lengths, network.trained_token_frames or 0),
    )
    return Source(data, replace(config, window_lengths=lengths))


def restrict(pipe: VideoGenPipeline, config: VDMConfig, data: LatentSet) -> Source:
    """Leaves out of the settings what some clips cannot serve.

    Raises:
        ValueError: Nothing is left.
    """
    whole = data.latents.shape[2] // pipe.denoiser.patch_size[0]
    lengths = [length for length in config.window_lengths if length <= whole]
    # a window behind a gap needs one frame more than the window
    windows = {
        kind: weight for kind, weight in config.windows.items() if kind != "sink" or max(lengths, default=0) < whole
    }
    known = {
        kind: weight for kind, weight in config.known.items() if data.frames is not None or kind in ("none", "leading")
    }
    if not lengths or not sum(windows.values()) or not sum(known.values()):
        raise ValueError(
            f"clips of {whole} token frames serve none of window_lengths={config.window_lengths}, "
            f"windows={config.windows}, known={config.known}"
        )
    return Source(data, replace(config, window_lengths=lengths, windows=windows, known=known))


def check_made_with(pipe: VideoGenPipeline, sources: list[Source], embedded: bool) -> None:
    """Refuses latents of another VAE, and embedded captions of another text encoder or other lengths.

    Raises:
        ValueError: The VAE's encoder or statistics, or the text encoder, are not those of the pipeline.
    """
    vae = encoder_digest(pipe.vae)
    text = {"max_sequence_length": pipe.config.max_sequence_length}
    text |= {"text_encoder_sha256": weights_digest(pipe.text_encoder)} if embedded else {}
    for source in sources:
        folder = source.config.latents_dir
        path = folder / "settings.json"
        made = json.loads(path.read_text()) if path.is_file() else {}
        if made.get("vae_sha256", vae) != vae:
            raise ValueError(
                f"the latents in {folder} were encoded by another VAE than this pipeline has: encode them again, or "
                "give the VAE that did it with --vae"
            )
        wrong = [name for name, value in text.items() if embedded and made.get(name) != value]
        if wrong:
            raise ValueError(
                f"the captions in {folder} were embedded with another {', '.join(wrong)} than this pipeline has: "
                "encode them with its text encoder, or without --text_encoder"
            )


def check_motion(config: VDMConfig, sources: list[Source]) -> None:
    """Refuses a temporal loss that the latents cannot serve.

    Raises:
        ValueError: They were encoded without motion, or pixels are asked for of windows that no decoder sees.
    """
    if config.temporal_space == "latent":
        if config.warping_weight and any(source.data.motion is None for source in sources):
            raise ValueError("warping_weight needs latents with motion: pipelines/encode_latents.py --flow dis")
    elif {kind for kind, weight in config.windows.items() if weight > 0} != {"start"}:
        raise ValueError(
            f"temporal_space=pixel decodes windows, which must begin with their clip: windows={config.windows}"
        )


def between_frames(
    config: VDMConfig, pipe: VideoGenPipeline, batch: dict[str, Tensor], clean: Tensor, signal: Tensor
) -> Tensor:
    """The temporal loss `(b,)` of an estimate of the clean clip, in which what is known is true."""
    real = batch["latents"]
    k = real.shape[2] // batch["generated"].shape[1]
    generated, real_frames = (batch[name].repeat_interleave(k, dim=1) for name in ("generated", "real"))
    counted = generated & real_frames
    clean = torch.where(generated[:, None, :, None, None], clean, real)
    signal = torch.where(generated, signal, 1.0)
    motion = None
    if config.temporal_space == "pixel":
        codec = pipe.codec
        assert codec is not None  # latents come from one
        clean = codec.decode(codec.denormalize(clean), clamp=False).sample
        with torch.no_grad():
            real = codec.decode(codec.denormalize(real), clamp=False).sample
            motion = measure_motion(real, config.flow) if config.warping_weight else None
        s = codec.temporal_compression_ratio
        signal, counted, real_frames = (
            torch.cat([x[:, :1], x[:, 1:].repeat_interleave(s, 1)], 1) for x in (signal, counted, real_frames)
        )
        adjacent: Tensor | float = 1.0
    else:
        adjacent = batch["adjacent"]
        if config.warping_weight:
            motion = Motion(batch["motion"][:, :2], batch["motion"][:, 2:])
    real_pairs = real_frames[:, 1:] & real_frames[:, :-1]
    either = counted[:, 1:] | counted[:, :-1]
    weight = torch.minimum(signal[:, 1:], signal[:, :-1]) * (either & real_pairs) * adjacent
    return temporal_loss(config, clean, real, motion, weight)


def plan(config: VDMConfig, sources: list[Source], shares: list[float], step: int) -> tuple[str, Source, int]:
    """A step's kind of groups, clips and length of windows."""
    rng = random.Random(config.seed * 1_000_003 + step)
    mode = choose(config.groups, rng)
    source = rng.choices(sources, shares)[0]
    return mode, source, rng.choice(source.config.window_lengths)


def clip_of(source: Source, sample: int) -> int:
    """The clip that a sample, counted from the start of the run, is drawn from."""
    epoch, place = divmod(sample, len(source.data))
    return int(_order(len(source.data), source.config.seed, epoch)[place])


def name_batch(config: VDMConfig, sources: list[Source], shares: list[float], step: int) -> str:
    """A step's clips, by number and folder."""
    _, source, length = plan(config, sources, shares, step)
    first = step * config.batch_size
    clips = [str(clip_of(source, sample)) for sample in range(first, first + config.batch_size)]
    return f"{length} token frames of clips {', '.join(clips)} in {source.config.latents_dir}"


def draw(
    source: Source, pipe: VideoGenPipeline, step: int, part: slice, mode: str, length: int, embedded: bool = False
) -> dict[str, Tensor]:
    """A part of a step's batch; each sample is a function of the seed, the step and its index in the batch alone."""
    data, config = source
    first = step * config.batch_size
    own = {"patch_size": pipe.denoiser.patch_size, "conv_history": getattr(pipe.denoiser, "conv_history", 0)}
    network = FrozenDict({**pipe.denoiser.config, **own})
    rows: list[dict[str, Tensor]] = []
    prompts: list[str] = []
    for index, generator in zip(range(part.start, part.stop), generators(config.seed, step, part), strict=True):
        rng = random.Random(torch.randint(2**62, (), generator=generator).item())
        number = clip_of(source, first + index)
        clip = data[number]
        caption = None if rng.random() < config.text_dropout else rng.randrange(len(clip.captions))
        row = draw_row(clip, network, config, mode, length, rng, generator)
        if embedded:
            row["prompt_embeds"] = data.embedding(number, caption).float()
        else:
            prompts.append("" if caption is None else clip.captions[caption])
        rows.append(row)
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    if prompts:
        batch["input_ids"], batch["prompt_mask"] = tokenize(pipe.tokenizer, prompts, config.max_sequence_length)
    return batch


def draw_row(
    clip: EncodedClip,
    network: FrozenDict,
    config: VDMConfig,
    mode: str,
    length: int,
    rng: random.Random,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """A sample: a window of a clip, what of it is known, its noise and what is told beside the prompt."""
    p_t = network.patch_size[0]
    window_kind = choose(config.windows, rng)
    window = draw_window(window_kind, length, clip.latents.shape[1] // p_t, network.sink, rng)
    places = torch.tensor([frame * p_t + i for frame in window for i in range(p_t)])  # latents
    latents = clip.latents[:, places].float()
    known = choose(config.known, rng)
    num_leading = draw_num_leading(known, length, least_known(window_kind, network.sink), config.num_leading, rng)
    groups = torch.tensor(make_groups(mode, length, num_leading, network.chunk_size))
    real = clip.real[places].unflatten(0, (-1, p_t)).all(1)
    groups = torch.where(real, groups, groups.max() + 1)  # what was padded is seen by none but itself

    kind = choose(config.levels, rng)
    if config.prediction == "flow":
        levels = draw_levels(kind, groups, generator, config.level_mean, config.level_std, config.level_shift)
    else:
        levels = draw_levels(kind, groups, generator, uniform=True)
    generated = torch.arange(length) >= num_leading
    history = torch.rand(length, generator=generator) * config.corrupted_level
    levels = torch.where(generated, levels, history if rng.random() < config.corrupted else torch.zeros(length))
    row = {
        "latents": latents,
        "noise": torch.randn(latents.shape, generator=generator),
        "levels": levels,
        "groups": groups,
        "generated": generated,
        "real": real,
        "frame_rate": torch.tensor(float("nan") if rng.random() < config.frame_rate_dropout else clip.frame_rate),
    }
    if network.conv_history and network.sink and config.windows.get("sink"):
        first = window[network.sink] if window_kind == "sink" else network.conv_history
        row["unseen"] = clip.latents[:, first - network.conv_history : first].float()
        row["resumes"] = torch.tensor(network.sink if window_kind == "sink" else length)
    if config.wants_temporal_loss:
        row["adjacent"] = places.diff() == 1
        if clip.motion is not None:
            row["motion"] = clip.motion[:, places[:-1].clamp_max(clip.motion.shape[1] - 1)].float()
    if clip.frames is None or not network.keyframe_slots:
        return row

    images: dict[tuple[int, int], Tensor] = {}
    if known in ("keyframes", "both"):
        s, begin = network.keyframe_slots, max(num_leading * p_t, 1)
        unknown = range(s * (begin - 1) + 1, s * (len(places) - 1) + 1)
        for frame in draw_keyframes(choose(config.keyframes, rng), unknown, s, rng):
            latent, slot = 1 + (frame - 1) // s, (frame - 1) % s
            images[latent, slot] = clip.frames[s * (int(places[latent]) - 1) + slot][None].float()
    row["keyframes"] = pack_keyframes(images, len(places), network.keyframe_slots, latents[None, :, 0])[0]
    return row


@torch.no_grad()
def score(pipe: VideoGenPipeline, config: VDMConfig, accelerator: Accelerator) -> tuple[dict[str, float], Tensor]:
    """Adherence on fixed prompts where it can be checked, and frames `(f, h, w, 3)` of some videos."""
    scores: dict[str, float] = {}
    shown = []
    training, trains_text = pipe.denoiser.training, pipe.text_encoder.training
    pipe.denoiser.eval()
    pipe.text_encoder.eval()
    pipe.to(accelerator.device)
    pipe.set_progress_bar_config(disable=True)

    def generate(prompts: list[str]) -> Tensor:
        with accelerator.autocast():
            videos = pipe(
                prompts,
                generator=[torch.Generator().manual_seed(index) for index in range(len(prompts))],
                output_type="pt",
            ).frames
        clips = rearrange(videos.float().cpu() * 2 - 1, "b f c h w -> b c f h w")
        shown.append(rearrange(clips[:8], "b c f h w -> f h (b w) c"))
        return clips

    if config.sample_prompts:
        generate(config.sample_prompts)
    for split in () if config.sample_prompts else ("train", "held_out"):
        world = ShapesWorld(split=split, seed=config.seed + 1)
        indices = range(config.num_score_prompts // 2)
        clips = generate([world.caption(index) for index in indices])
        result = adherence(list(clips), [world.scene(index) for index in indices])
        scores |= {f"{split} {name}": value for name, value in result.items()}
    pipe.denoiser.train(training)
    pipe.text_encoder.train(trains_text)
    return scores, torch.cat(shown, dim=1).add(1).mul(127.5).round().byte().numpy()


_order = lru_cache(maxsize=8)(epoch_order)


if __name__ == "__main__":
    main(parse_config(VDMConfig, __doc__))
