"""What the scripts that train the denoiser of a pipeline have in common: data, adapters, sample videos and results."""

from __future__ import annotations

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

from vgen.data.latents import LatentSet
from vgen.data.shapes import ShapesWorld
from vgen.io.atomic import atomic_directory
from vgen.io.errors import without_warnings
from vgen.io.pixels import from_pt, to_uint8
from vgen.io.records import read_json
from vgen.metrics.prompt import adherence
from vgen.models.compilation import compile_blocks
from vgen.models.transformer import SpacetimeTransformer
from vgen.models.unet import UNet3D
from vgen.pipeline import VideoGenPipeline
from vgen.temporal.attention import widest_mode
from vgen.training.run import copy_of
from vgen.training.sample import SampleConfig, Source, record_tasks, supported_config

NUM_SAMPLES = 4
"""Number of sample videos if the settings give no prompts."""


@dataclass(kw_only=True)
class DenoiserConfig(SampleConfig):
    """Settings of the scripts that train the denoiser of a pipeline."""

    more_latents: dict[str, float] = field(default_factory=dict)
    """Other folders with latents, and the probability of each, drawn for each step. Settings that their clips do not
    support (long windows, keyframes) are not used there."""
    train_only: Literal["all", "temporal", "lora"] = "all"
    """Which weights to train: `all`; `temporal`, the layers that mix frames or were added when a 2D network was
    inflated; or `lora`, low-rank adapters of `lora_targets`, which are saved without the denoiser."""
    lora_rank: int = 16
    """Rank of the LoRA adapters."""
    lora_alpha: float | None = None
    """LoRA adapters are scaled by `lora_alpha / lora_rank`; `None` means `lora_rank`."""
    lora_targets: list[str] = field(default_factory=lambda: ["to_q", "to_k", "to_v", "to_out.0"])
    """Layers with LoRA adapters, by the ends of their names."""
    attention_backend: str | None = None
    """Attention backend of diffusers; `None` means diffusers' default, and `_native_math` for short sequences on the
    CPU."""
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
        if min(self.more_latents.values(), default=0) < 0 or sum(self.more_latents.values()) > 1:
            raise ValueError(
                f"more_latents must have probabilities of at least 0 with a sum of at most 1, got {self.more_latents}"
            )
        if self.train_only == "lora" and (self.init is None or self.lora_rank < 1):
            raise ValueError(
                "train_only=lora needs a pipeline as init and lora_rank of at least 1, got "
                f"init={self.init}, lora_rank={self.lora_rank}"
            )
        if self.num_score_prompts < 2:
            raise ValueError(f"num_score_prompts must be at least 2, got {self.num_score_prompts}")


def open_sources(
    denoiser: Any, config: DenoiserConfig, expand_timesteps: bool = False
) -> tuple[list[Source], list[float]]:
    """Opens the latents of a run, and records the tasks in the denoiser's config; see `record_tasks`.

    Returns:
        The sources, and the probability of each.
    """
    sources = [record_tasks(denoiser, config, LatentSet(config.latents_dir), expand_timesteps)]
    for folder in map(Path, config.more_latents):
        settings = replace(sources[0].config, latents_dir=folder)
        sources.append(supported_config(denoiser, settings, LatentSet(folder)))
    return sources, [1 - sum(config.more_latents.values()), *config.more_latents.values()]


def prepare_denoiser(denoiser: Any, config: DenoiserConfig) -> None:
    """Prepares a denoiser for training: what is trained, gradient checkpointing, attention backend and compilation.

    Raises:
        ValueError: There is nothing to train.
        ImportError: `peft` is not installed.
    """
    choose_weights(denoiser, config)
    if config.gradient_checkpointing:
        denoiser.enable_gradient_checkpointing()
    if config.attention_backend:
        denoiser.set_attention_backend(config.attention_backend)
    if config.compile:
        compile_blocks(denoiser)


def choose_weights(denoiser: Any, config: DenoiserConfig) -> None:
    """Freezes what `train_only` excludes, and adds the adapters of `lora`.

    Raises:
        ValueError: There is nothing to train.
        ImportError: `peft` is not installed.
    """
    if config.train_only == "lora":
        add_adapter(denoiser, config)
    elif config.train_only == "temporal":
        denoiser.requires_grad_(False)
        for weight in temporal_parameters(denoiser):
            weight.requires_grad_(True)


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


def sample_prompts(pipe: VideoGenPipeline, config: DenoiserConfig, held_out: Source | None) -> list[str]:
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


def use_whole(pipe: VideoGenPipeline, name: str, weights: dict[str, Tensor]) -> None:
    """Replaces the sharded networks of a pipeline by new ones with the gathered weights of `PromptedDenoiser`.

    Args:
        pipe: The pipeline.
        name: The component that is the denoiser.
        weights: The weights.
    """

    def weights_of(part: str) -> dict[str, Tensor]:
        return {key.removeprefix(part): value for key, value in weights.items() if key.startswith(part)}

    whole = {name: copy_of(getattr(pipe, name), weights_of("denoiser."))}
    if text := weights_of("text_encoder."):
        whole["text_encoder"] = type(pipe.text_encoder)(pipe.text_encoder.config)
        whole["text_encoder"].load_state_dict(text)
    pipe.register_modules(**whole)


def add_adapter(denoiser: Any, config: DenoiserConfig) -> None:
    """Freezes a denoiser and adds trainable LoRA adapters.

    Raises:
        ImportError: `peft` is not installed.
    """
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ImportError("train_only=lora needs peft: pip install vgen[lora]") from error
    alpha: Any = config.lora_rank if config.lora_alpha is None else config.lora_alpha
    denoiser.requires_grad_(False)
    denoiser.add_adapter(LoraConfig(r=config.lora_rank, lora_alpha=alpha, target_modules=config.lora_targets))


def save_result(pipe: VideoGenPipeline, name: str, config: DenoiserConfig, weights: dict[str, Tensor] | None) -> None:
    """Saves the pipeline, or only the adapters.

    Args:
        pipe: The pipeline.
        name: The component that was trained.
        config: Settings of the run.
        weights: The gathered weights of a sharded network; `None` if it is whole.
    """
    if weights is not None:
        use_whole(pipe, name, weights)
    if config.train_only == "lora":
        save_adapter(pipe, getattr(pipe, name), config)
        return
    with (
        atomic_directory(config.output_dir / "pipeline") as folder,
        without_warnings("diffusers.models.modeling_utils"),  # all weights are stored in `save_dtype`
    ):
        pipe.to(getattr(torch, config.save_dtype)).save_pretrained(folder)


def save_adapter(pipe: VideoGenPipeline, denoiser: Any, config: DenoiserConfig) -> None:
    """Saves only the adapters, for `pipe.load_lora_weights(output_dir / "lora")`.

    Those of either expert have the names of `transformer`, as in public adapters.
    """
    from peft import get_peft_model_state_dict

    name = pipe.denoiser_name
    dtype = getattr(torch, config.save_dtype)
    layers = {key: value.to(dtype) for key, value in get_peft_model_state_dict(denoiser).items()}
    metadata = denoiser.peft_config["default"].to_dict()
    options = {f"{name}_lora_layers": layers, f"{name}_lora_adapter_metadata": metadata}
    with atomic_directory(config.output_dir / "lora") as folder:
        pipe.save_lora_weights(folder, **options)


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
    config: DenoiserConfig,
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
