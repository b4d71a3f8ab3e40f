"""Train a small text encoder, before a denoiser reads it, to know which of a caption's words belong together.

For prompts in free English take a pretrained encoder instead. A CPU-sized try:

    accelerate launch train/train_text_encoder.py --config train/recipes/shapes-64-text.yaml --output_dir runs/try \
        --max_steps 20
"""

from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator

from vgen.data.shapes import ShapesWorld, vocabulary
from vgen.io.atomic import atomic_directory
from vgen.models.prompts import make_text_encoder, make_word_tokenizer
from vgen.training.attributes import ATTRIBUTES, NOT_SAID, AttributeReader, CaptionBatches, attribute_loss
from vgen.training.feed import Feed, to_device
from vgen.training.run import Run, RunConfig, config_text, parse_config, start


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
    batches = CaptionBatches(world, tokenizer, config.batch_size, config.max_sequence_length)
    feed = Feed(run, batches)
    if run.sharded:
        raise ValueError("this network is small: train it without FSDP or DeepSpeed")

    for _ in run.steps():
        total = torch.zeros((), device=accelerator.device)
        for _ in run.parts(config.batch_size):
            batch = next(feed)
            tokens = batch["input_ids"], batch["mask"]
            logits = run.network(*tokens)
            size = tokens[0].shape
            run.count(len(tokens[0]), size.numel(), size, lambda network, tokens=tokens: network(*tokens))
            loss = attribute_loss(logits, batch["said"]) / config.batch_size
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


@torch.no_grad()
def score(
    model: AttributeReader, tokenizer: Any, config: TextEncoderConfig, accelerator: Accelerator
) -> dict[str, float]:
    """Share of objects whose attribute is read right, in captions of combinations never seen."""
    world = ShapesWorld(split="held_out", seed=config.seed + 1)
    batches = CaptionBatches(world, tokenizer, config.num_score_captions, config.max_sequence_length)
    batch = to_device(batches.draw(range(config.num_score_captions)), accelerator.device)
    logits = model(batch["input_ids"], batch["mask"])
    said = batch["said"]
    there = said[..., 0] != NOT_SAID
    right = [(one.argmax(-1) == said[..., i])[there] for i, one in enumerate(logits)]
    return {name: one.float().mean().item() for name, one in zip(ATTRIBUTES, right, strict=True)}


if __name__ == "__main__":
    main(parse_config(TextEncoderConfig, __doc__))
