"""Trains a text encoder to know which words of a caption belong together: it reads attributes off captions."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from vgen.data.captions import BACKGROUNDS, COLORS, MOTIONS, SHAPES, SIZES, SPEEDS
from vgen.data.shapes import Scene, ShapesWorld
from vgen.models.prompts import embed, tokenize

ATTRIBUTES = {
    "color": COLORS,
    "shape": SHAPES,
    "motion": MOTIONS,
    "size": SIZES,
    "speed": SPEEDS,
    "background": BACKGROUNDS,
    "number": (1, 2),
}
NOT_SAID = -100
"""Target of words that are no object's colour; `cross_entropy` ignores it."""


class AttributeReader(nn.Module):
    """Reads the attributes of an object from the embedding of its colour's word; colours are unique in a scene.

    Nothing else asks a denoiser's text encoder early on which words belong together.
    """

    def __init__(self, text_encoder: nn.Module, dim: int):
        super().__init__()
        self.text_encoder = text_encoder
        self.heads = nn.ModuleList(nn.Linear(dim, len(values)) for values in ATTRIBUTES.values())

    def forward(self, input_ids: Tensor, mask: Tensor) -> list[Tensor]:
        """Logits `(b, l, values)` of each attribute."""
        embeddings = embed(self.text_encoder, input_ids, mask)
        return [head(embeddings) for head in self.heads]


class CaptionBatches(Dataset):
    """Captions of ShapesWorld and what they say, by step and part of the batch.

    Args:
        world: Of the scenes.
        tokenizer: Of whole words.
        batch_size: Samples of a step.
        max_length: Tokens of a caption.
    """

    def __init__(self, world: ShapesWorld, tokenizer: Any, batch_size: int, max_length: int):
        self.world, self.tokenizer, self.batch_size, self.max_length = world, tokenizer, batch_size, max_length

    def __getitem__(self, key: tuple[int, slice]) -> dict[str, Tensor]:
        """A part of a step's batch; see `draw`."""
        step, part = key
        first = step * self.batch_size
        return self.draw(range(first + part.start, first + part.stop))

    def draw(self, indices: range) -> dict[str, Tensor]:
        """`input_ids` and `mask` `(b, l)` of scenes' captions, and `said` `(b, l, attributes)`.

        That is the number of each attribute's value at the words of colours, and `NOT_SAID` at all others.
        """
        scenes = [self.world.scene(index) for index in indices]
        captions = [self.world.caption(index) for index in indices]
        input_ids, mask = tokenize(self.tokenizer, captions, self.max_length)
        said = torch.full((*input_ids.shape, len(ATTRIBUTES)), NOT_SAID)
        for row, scene in enumerate(scenes):
            words = self.tokenizer.convert_ids_to_tokens(input_ids[row])
            for number, one in enumerate(scene.objects):
                said[row, words.index(one.color)] = torch.tensor(attributes(scene, number))
        return {"input_ids": input_ids, "mask": mask, "said": said}


def attributes(scene: Scene, number: int) -> list[int]:
    """Numbers of an object's values, in the order of `ATTRIBUTES`."""
    one = scene.objects[number]
    values = {"background": scene.background, "number": len(scene.objects)} | {
        name: getattr(one, name) for name in ("color", "shape", "motion", "size")
    }
    values["speed"] = "normal" if one.motion in ("still", "bounce") else one.speed
    return [legal.index(values[name]) for name, legal in ATTRIBUTES.items()]


def attribute_loss(logits: list[Tensor], said: Tensor) -> Tensor:
    """The mean over attributes of the cross-entropy, summed over objects."""
    errors = [
        F.cross_entropy(one.float().flatten(0, 1), said[..., i].flatten(), reduction="sum")
        for i, one in enumerate(logits)
    ]
    return torch.stack(errors).mean()
