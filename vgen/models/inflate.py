"""Stable Diffusion's image pipelines as video pipelines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

from vgen.models.image_vae import load_vae
from vgen.models.prompts import load_text_encoder
from vgen.models.unet import UNet3D


def inflate_stable_diffusion(source: str | Path | DiffusionPipeline, **unet: Any) -> dict[str, Any]:
    """Components and defaults of a video pipeline whose frames are, at first, the images of an image pipeline.

    Args:
        source: A `StableDiffusionPipeline`, or the folder or Hub id of one (the layouts of 1.5 and 2.1).
        unet: Settings that the 2D network does not have.

    Raises:
        ValueError: The layout is not supported. The error names the part.
    """
    given = isinstance(source, DiffusionPipeline)
    name = type(source).__name__ if given else DiffusionPipeline.load_config(str(source)).get("_class_name")
    if name != "StableDiffusionPipeline":
        raise ValueError(f"source must be a StableDiffusionPipeline, got {source}, which contains a {name}")
    images: Any = source
    if not given:
        parts = {"unet": None, "safety_checker": None, "requires_safety_checker": False}
        strict = {"vae": load_vae(source), "text_encoder": load_text_encoder(str(source))}
        images = DiffusionPipeline.from_pretrained(str(source), use_safetensors=True, **parts, **strict)
    network = UNet3D.from_unet2d(images.unet if given else source, None if given else "unet", **unet)
    size = network.config.sample_size
    sides = (size, size) if isinstance(size, int) else size
    if sides is None:
        raise ValueError("this 2D U-Net has sample_size=None: the size of its training images is unknown")
    height, width = (side * 2 ** (len(images.vae.config.block_out_channels) - 1) for side in sides)
    return {
        "scheduler": images.scheduler,
        "vae": images.vae,
        "unet": network,
        "text_encoder": images.text_encoder,
        "tokenizer": images.tokenizer,
        "height": height,
        "width": width,
        "num_inference_steps": 50,
        "guidance_scale": 7.5,
        "max_sequence_length": images.tokenizer.model_max_length,
    }
