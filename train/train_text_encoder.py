"""Train a small text encoder, before a denoiser reads it, to know which of a caption's words belong together.

For prompts in free English take a pretrained encoder instead. A CPU-sized try:

    accelerate launch train/train_text_encoder.py --config train/recipes/shapes-64-text.yaml --output_dir runs/try \
        --max_steps 20
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from vgen.data.captions import BACKGROUNDS, COLORS, MOTIONS, SHAPES, SIZES, SPEEDS
from vgen.data.shapes import Scene, ShapesWorld, vocabulary
from vgen.io.atomic import atomic_directory
from vgen.models.prompts import embed, make_text_encoder, make_word_tokenizer, tokenize
from vgen.training.run import Run, RunConfig, config_text, parse_config, start

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


@dataclass(kw_only=True)
class TextEncoderConfig(RunConfig):
    """Settings of a text encoder's training."""

    dim: int = 128
    """Channels of the embeddings."""
    num_layers: int = 2
    """Blocks."""
    max_sequence_length: int = 32
    """Tokens of a prompt."""
    num_score_captions: int = 1000
    """Captions of combinations never seen that a score is the mean over."""


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


def main(config: TextEncoderConfig) -> None:
    """Trains; the same call goes on where an interrupted one stopped."""
    if config.dry_run:
        print(config_text(config))
        return
    accelerator = start(config)
    world = ShapesWorld(split="train", seed=config.seed)
    tokenizer = make_word_tokenizer(vocabulary(), config.max_sequence_length)
    text_encoder = make_text_encoder(len(tokenizer), config.dim, config.num_layers, config.seed)
    if config.gradient_checkpointing:
        text_encoder.gradient_checkpointing_enable()
    model = AttributeReader(text_encoder, config.dim)
    run = Run(config, accelerator, model)
    if run.sharded:
        raise ValueError("this network is small: train it without FSDP or DeepSpeed")

    for step in run.steps():
        total = torch.zeros((), device=accelerator.device)
        for part in run.parts(config.batch_size):
            first = step * config.batch_size
            input_ids, mask, said = draw(world, tokenizer, range(first + part.start, first + part.stop), config)
            logits = run.network(input_ids.to(accelerator.device), mask.to(accelerator.device))
            tokens = (input_ids.to(accelerator.device), mask.to(accelerator.device))
            run.count(len(mask), mask.numel(), mask.shape, lambda network, tokens=tokens: network(*tokens))
            loss = torch.stack([_error(one, said[..., i]) for i, one in enumerate(logits)]).mean() / config.batch_size
            run.backward(loss)
            total += loss.detach()
        run.update()
        run.log(loss=total)
        if run.wants_scores:
            with run.average:
                scores = score(model, tokenizer, config, accelerator)
            run.report(scores)
        run.save()

    def save_result(_: object) -> None:
        for name, part in (("text_encoder", text_encoder), ("tokenizer", tokenizer)):
            with atomic_directory(config.output_dir / name) as folder:
                part.save_pretrained(folder)

    run.end(save_result)


def draw(
    world: ShapesWorld, tokenizer: Any, indices: range, config: TextEncoderConfig
) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids and mask `(b, l)` of captions, and what they say `(b, l, attributes)` at the words of colours."""
    scenes = [world.scene(index) for index in indices]
    captions = [world.caption(index) for index in indices]
    input_ids, mask = tokenize(tokenizer, captions, config.max_sequence_length)
    said = torch.full((*input_ids.shape, len(ATTRIBUTES)), NOT_SAID)
    for row, scene in enumerate(scenes):
        words = tokenizer.convert_ids_to_tokens(input_ids[row])
        for number, one in enumerate(scene.objects):
            said[row, words.index(one.color)] = torch.tensor(attributes(scene, number))
    return input_ids, mask, said


def attributes(scene: Scene, number: int) -> list[int]:
    """Numbers of an object's values, in the order of `ATTRIBUTES`."""
    one = scene.objects[number]
    values = {"background": scene.background, "number": len(scene.objects)} | {
        name: getattr(one, name) for name in ("color", "shape", "motion", "size")
    }
    values["speed"] = "normal" if one.motion in ("still", "bounce") else one.speed
    return [legal.index(values[name]) for name, legal in ATTRIBUTES.items()]


def _error(logits: Tensor, said: Tensor) -> Tensor:
    return F.cross_entropy(logits.float().flatten(0, 1), said.flatten().to(logits.device), reduction="sum")


@torch.no_grad()
def score(
    model: AttributeReader, tokenizer: Any, config: TextEncoderConfig, accelerator: Accelerator
) -> dict[str, float]:
    """Share of objects whose attribute is read right, in captions of combinations never seen."""
    world = ShapesWorld(split="held_out", seed=config.seed + 1)
    input_ids, mask, said = draw(world, tokenizer, range(config.num_score_captions), config)
    logits = model(input_ids.to(accelerator.device), mask.to(accelerator.device))
    there = said[..., 0] != NOT_SAID
    right = [(one.argmax(-1).cpu() == said[..., i])[there] for i, one in enumerate(logits)]
    return {name: one.float().mean().item() for name, one in zip(ATTRIBUTES, right, strict=True)}


if __name__ == "__main__":
    main(parse_config(TextEncoderConfig, __doc__))
