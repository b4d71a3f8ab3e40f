"""How the `vgen` command and jobs load a checkpoint.

torch is imported when a checkpoint is loaded, so that wrong options are reported before.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from vgen.checks import check_choice
from vgen.hub import is_hub_id

if TYPE_CHECKING:
    from vgen.pipeline import VideoGenPipeline

DType = Literal["auto", "float32", "bfloat16", "float16"]
Scheduler = Literal["euler", "ddim", "dpmsolver++", "unipc"]


@dataclass(kw_only=True)
class LoadOptions:
    """How a checkpoint is loaded."""

    dtype: DType = "float32"
    """Data type of the weights: `float32`, which makes the same video on every machine, `bfloat16`, `float16`, or
    `auto`, the faster of `float32` and `bfloat16` on this machine."""
    scheduler: Scheduler | None = None
    """Scheduler to use instead of the checkpoint's: `euler`, `dpmsolver++` or `unipc` for flow matching; `ddim`,
    `dpmsolver++` or `unipc` for other checkpoints."""
    lora: list[str] = field(default_factory=list)
    """LoRA adapter, as FILE or FILE:WEIGHT, where FILE may be a folder or a Hub id and the weight is 1 by default; can
    be repeated."""
    lora_low_noise: list[str] = field(default_factory=list)
    """The same for `transformer_2` of a checkpoint with two Transformers, such as Wan 2.2 A14B."""
    compile: bool = False
    """Whether to compile the denoiser's blocks, which takes a minute or more at the start."""


def check_loading(options: LoadOptions) -> None:
    """Checks options without loading anything.

    Raises:
        ValueError: An option has no such choice.
        FileNotFoundError: A LoRA adapter does not exist.
        ImportError: LoRA adapters need the package peft.
    """
    check_choice("dtype", options.dtype, DType)
    if options.scheduler is not None:
        check_choice("scheduler", options.scheduler, Scheduler)
    adapters = [*options.lora, *options.lora_low_noise]
    for text in adapters:
        source, _ = parse_adapter(text)
        if not Path(source).exists() and (source.endswith(".safetensors") or not is_hub_id(source)):
            raise FileNotFoundError(f"no such LoRA adapter: {source}")
    if adapters and find_spec("peft") is None:
        raise ImportError("LoRA adapters need peft: pip install vgen[lora]")


def metadata_of(model: str, options: LoadOptions) -> dict[str, Any]:
    """The checkpoint and the options that differ from the defaults, for the metadata of videos."""
    changed = {
        name: getattr(options, name)
        for name, default in asdict(LoadOptions()).items()
        if getattr(options, name) != default
    }
    return {"model": model} | changed


def parse_adapter(text: str) -> tuple[str, float]:
    """Splits FILE or FILE:WEIGHT into the file and the weight, by default 1."""
    source, colon, weight = text.rpartition(":")
    if not colon or Path(text).exists():
        return text, 1.0
    try:
        return source, float(weight)
    except ValueError:
        return text, 1.0


def load_checkpoint(model: str, options: LoadOptions, device: Any, *, streams: bool = False) -> VideoGenPipeline:
    """Loads a pipeline onto a device. On a CPU, it also chooses the number of threads of this process.

    Args:
        model: A packaged checkpoint, a folder, or a Hub id.
        options: How to load it.
        device: Device of the networks.
        streams: Whether it will make videos chunk by chunk, so that forward passes are small.

    Raises:
        ValueError: The scheduler does not fit the checkpoint, or as in `VideoGenPipeline.from_pretrained`.
    """
    check_loading(options)
    import torch
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    from vgen.diffusion import change_scheduler
    from vgen.machine import fast_precision, limit_threads, warn_if_slow
    from vgen.models.compilation import compile_blocks
    from vgen.pipeline import VideoGenPipeline

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    name: str = options.dtype
    if name == "auto":
        name = "bfloat16" if fast_precision(torch.device(device)) == "bf16" else "float32"
    pipe = VideoGenPipeline.from_pretrained(model, dtype=getattr(torch, name)).to(device)
    warn_if_slow(pipe.device, name, "--dtype float32")
    if options.scheduler is not None:
        pipe.scheduler = change_scheduler(pipe.scheduler, options.scheduler)
    weights: dict[str, float] = {}
    for is_low_noise, texts in ((False, options.lora), (True, options.lora_low_noise)):
        for text in texts:
            source, weight = parse_adapter(text)
            name = f"lora-{len(weights)}"
            pipe.load_lora_weights(source, adapter_name=name, load_into_transformer_2=is_low_noise)
            weights[name] = weight
    if weights:
        pipe.set_adapters(list(weights), list(weights.values()))
    if options.compile:
        compile_blocks(pipe.denoiser)
        if pipe.transformer_2 is not None:
            compile_blocks(pipe.transformer_2)
    if pipe.device.type == "cpu":
        limit_threads(operations(pipe, streams=streams))
    return pipe


def operations(pipe: VideoGenPipeline, *, streams: bool) -> float:
    """Approximate floating-point operations of the denoiser's forward pass for one video of the default size.

    Each token takes two for each weight, with guidance twice.

    Args:
        pipe: The pipeline.
        streams: Whether a forward pass has one chunk of a rollout instead of the whole video.
    """
    config, denoiser = pipe.config, pipe.denoiser
    p_t, p_h, p_w = denoiser.patch_size
    frames = pipe.grid.num_latents(config.num_frames) // p_t
    if streams:
        frames = min(frames, config.rollout_defaults.get("chunk_size", denoiser.config.chunk_size))
    unit = pipe.vae_scale_factor_spatial
    tokens = frames * (config.height // (unit * p_h)) * (config.width // (unit * p_w))
    return 4.0 * tokens * sum(weight.numel() for weight in denoiser.parameters())
