"""Pretraining of a text encoder by classifying the attributes of the objects in captions."""

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
IGNORED = -100
"""Target of words that are not the color of an object; `cross_entropy` ignores it."""


class AttributeReader(nn.Module):
    """Classifies the attributes of an object from the embedding of its color word; colors are unique in a scene.

    This teaches the text encoder which words describe the same object, which denoising alone teaches only slowly.
    """

    def __init__(self, text_encoder: nn.Module, dim: int):
        super().__init__()
        self.text_encoder = text_encoder
        self.heads = nn.ModuleList(nn.Linear(dim, len(values)) for values in ATTRIBUTES.values())

    def forward(self, input_ids: Tensor, mask: Tensor) -> list[Tensor]:
        """Logits `(b, l, values)` of each attribute, at all words."""
        embeddings = embed(self.text_encoder, input_ids, mask)
        return [head(embeddings) for head in self.heads]


class CaptionBatches(Dataset):
    """Captions of ShapesWorld with their attributes, indexed by step and part of the batch.

    Args:
        world: The world of the scenes.
        tokenizer: A tokenizer with one token per word.
        batch_size: Samples per step.
        max_length: Length in tokens that captions are padded or truncated to.
    """

    def __init__(self, world: ShapesWorld, tokenizer: Any, batch_size: int, max_length: int):
        self.world, self.tokenizer, self.batch_size, self.max_length = world, tokenizer, batch_size, max_length

    def __getitem__(self, key: tuple[int, slice]) -> dict[str, Tensor]:
        """Makes a part of a step's batch; see `draw`."""
        step, part = key
        first = step * self.batch_size
        return self.draw(range(first + part.start, first + part.stop))

    def draw(self, indices: range) -> dict[str, Tensor]:
        """`input_ids` and `mask` `(b, l)` of the captions of scenes, and `targets` `(b, l, attributes)`.

        Targets are class indices of the attributes at color words, and `IGNORED` at all other words.

        Raises:
            ValueError: A caption is so long that the color of an object is truncated.
        """
        scenes = [self.world.scene(index) for index in indices]
        captions = [self.world.caption(index) for index in indices]
        input_ids, mask = tokenize(self.tokenizer, captions, self.max_length)
        targets = torch.full((*input_ids.shape, len(ATTRIBUTES)), IGNORED)
        for row, scene in enumerate(scenes):
            words = self.tokenizer.convert_ids_to_tokens(input_ids[row])
            cut = [one.color for one in scene.objects if one.color not in words]
            if cut:
                names = " and ".join(cut)
                raise ValueError(
                    f"max_sequence_length={self.max_length} cuts {names} from the caption {captions[row]!r}"
                )
            for number, one in enumerate(scene.objects):
                targets[row, words.index(one.color)] = torch.tensor(attributes(scene, number))
        return {"input_ids": input_ids, "mask": mask, "targets": targets}


def attributes(scene: Scene, number: int) -> list[int]:
    """Class indices of an object's attributes, in the order of `ATTRIBUTES`."""
    one = scene.objects[number]
    values = {"background": scene.background, "number": len(scene.objects)} | {
        name: getattr(one, name) for name in ("color", "shape", "motion", "size")
    }
    values["speed"] = "normal" if one.motion in ("still", "bounce") else one.speed
    return [legal.index(values[name]) for name, legal in ATTRIBUTES.items()]


def correct_attributes(logits: list[Tensor], targets: Tensor) -> dict[str, Tensor]:
    """Whether each attribute of each object is the most likely one, by attribute."""
    has_target = targets[..., 0] != IGNORED
    correct = [(values.argmax(-1) == targets[..., i])[has_target] for i, values in enumerate(logits)]
    return dict(zip(ATTRIBUTES, correct, strict=True))


def attribute_loss(logits: list[Tensor], targets: Tensor) -> Tensor:
    """The cross-entropy, summed over objects and averaged over attributes."""
    errors = [
        F.cross_entropy(one.float().flatten(0, 1), targets[..., i].flatten(), reduction="sum")
        for i, one in enumerate(logits)
    ]
    return torch.stack(errors).mean()
