"""How public models expect pixels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusers.utils import logging

logger = logging.get_logger(__name__)


def read_processor(source: str | Path) -> dict[str, Any]:
    """Reads how the processor of a model of transformers normalizes values.

    Args:
        source: Folder or Hub id of the model.

    Returns:
        `image_mean`, `image_std`, `do_normalize`, `rescale_factor` and `offset`. Without a config, these are common
        defaults, with a warning.
    """
    from transformers import ImageProcessingMixin
    from transformers.video_processing_utils import BaseVideoProcessor

    defaults = {"image_mean": 0.5, "image_std": 0.5, "do_normalize": True, "rescale_factor": 1 / 255, "offset": False}
    for read in (BaseVideoProcessor.get_video_processor_dict, ImageProcessingMixin.get_image_processor_dict):
        try:
            config, _ = read(source)
        except OSError:
            continue
        return defaults | {name: config[name] for name in defaults if config.get(name) is not None}
    logger.warning(f"{source} has no processor config: a mean and a standard deviation of 0.5 are assumed")
    return defaults
