"""The image encoder of Wan 2.1 image to video.

Axes: `b` batch, `k` tokens of one image or several, `d` channels.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import BaseImageProcessor, CLIPVisionModel

from vgen.hub import locate
from vgen.io.pixels import to_frames
from vgen.models.loading import load_strictly


def load_image_encoder(source: str) -> tuple[CLIPVisionModel, BaseImageProcessor]:
    """Loads the image encoder of a pipeline in float32, and its image processor.

    Args:
        source: A folder or Hub id with the subfolders `image_encoder` and `image_processor`.

    Raises:
        ValueError: There is no such folder, the weights are pickled, do not match the config, or are NaN or infinite.
    """
    from transformers import CLIPImageProcessor  # warns if torchvision is missing

    folder, load = locate(source), CLIPVisionModel.from_pretrained
    if Path(folder).is_dir() and not Path(folder, "image_encoder").is_dir():
        raise ValueError(f"{source} has no image_encoder: pass a pipeline of Wan 2.1 image to video")
    encoder = load_strictly(load, "the image encoder", folder, subfolder="image_encoder", dtype=torch.float32)
    return encoder, cast(Any, CLIPImageProcessor).from_pretrained(folder, subfolder="image_processor")


@torch.no_grad()
def embed_images(encoder: CLIPVisionModel, processor: BaseImageProcessor, frames: Iterable[Tensor]) -> Tensor:
    """Tokens `(b, k, d)` of frames `(b, 3, h, w)` in [-1, 1], those of one frame after the other.

    The frames must be on the device where the encoder computes.

    Source: Wan: open and advanced large-scale video generative models, arXiv 2503.20314.
    """
    found = []
    for frame in frames:
        images = list(to_frames(frame.unsqueeze(2))[:, 0])
        inputs = processor(images=images, return_tensors="pt").to(frame.device)
        hidden = encoder(**inputs, output_hidden_states=True).hidden_states
        assert hidden is not None
        found.append(hidden[-2])
    return torch.cat(found, dim=1)
