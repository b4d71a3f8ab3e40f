"""Pretrain a small text encoder for a denoiser, so that it knows which words of a caption describe the same object.

For prompts in unrestricted English, use a pretrained text encoder instead. A small run for a CPU:

    accelerate launch train/train_text_encoder.py --config train/recipes/shapes-64-text.yaml --output_dir runs/try \
        --max_steps 20
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from vgen.data.shapes import ShapesWorld, vocabulary
from vgen.io.atomic import atomic_directory
from vgen.io.errors import one_line_errors
from vgen.models.prompts import CutCaptions, make_text_encoder, make_word_tokenizer
from vgen.training.attributes import ATTRIBUTES, IGNORED, AttributeReader, CaptionBatches, attribute_loss
from vgen.training.feed import Feed, to_device
from vgen.training.run import Run, RunConfig, config_text, parse_config, start


@dataclass(kw_only=True)
class TextEncoderConfig(RunConfig):
    """Settings for training a text encoder."""

    dim: int = 128
    """Channels of the embeddings."""
    num_layers: int = 2
    """Number of transformer blocks."""
    max_sequence_length: int = 32
    """Length in tokens that captions are padded or truncated to."""
    num_score_captions: int = 1000
    """Number of captions with held-out combinations for a score."""


def main(config: TextEncoderConfig) -> None:
    """Trains a text encoder; the same call resumes an interrupted run."""
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
    if accelerator.is_main_process:
        cut = CutCaptions(tokenizer, config.max_sequence_length)
        cut.add(world.caption(index) for index in range(config.num_score_captions))
        cut.warn()
    if run.sharded:
        raise ValueError("train_text_encoder.py does not support FSDP and DeepSpeed: launch it without them")

    for _ in run.steps():
        total = torch.zeros((), device=accelerator.device)
        for _ in run.parts(config.batch_size):
            batch = next(feed)
            tokens = batch["input_ids"], batch["mask"]
            logits = run.network(*tokens)
            size = tokens[0].shape
            run.count(len(tokens[0]), size.numel(), size, lambda network, tokens=tokens: network(*tokens))
            loss = attribute_loss(logits, batch["targets"]) / config.batch_size
            run.backward(loss)
            total += loss.detach()
        run.update()
        run.log(loss=total)
        if run.scores_are_due:
            with run.average:
                scores = score(model, tokenizer, config, accelerator)
            run.report(scores)
        run.save()

    def save_result(_: object) -> None:
        for name, part in (("text_encoder", text_encoder), ("tokenizer", tokenizer)):
            with atomic_directory(config.output_dir / name) as folder:
                part.save_pretrained(folder)

    run.end(save_result, "", "accelerate launch train/train_vdm.py --text_encoder {} --vae ... --latents_dir ...")


@torch.no_grad()
def score(
    model: AttributeReader, tokenizer: Any, config: TextEncoderConfig, accelerator: Accelerator
) -> dict[str, float]:
    """Accuracy of each attribute, over the objects in captions with held-out combinations.

    All processes compute the same scores: one forward pass, which is not worth dividing.
    """
    world = ShapesWorld(split="held_out", seed=config.seed + 1)
    batches = CaptionBatches(world, tokenizer, config.num_score_captions, config.max_sequence_length)
    batch = to_device(batches.draw(range(config.num_score_captions)), accelerator.device)
    logits = model(batch["input_ids"], batch["mask"])
    targets = batch["targets"]
    has_target = targets[..., 0] != IGNORED
    correct = [(values.argmax(-1) == targets[..., i])[has_target] for i, values in enumerate(logits)]
    return {name: values.float().mean().item() for name, values in zip(ATTRIBUTES, correct, strict=True)}


if __name__ == "__main__":
    with one_line_errors(Path(__file__).name):
        main(parse_config(TextEncoderConfig, __doc__))
