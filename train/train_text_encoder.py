"""Pretrain a small text encoder for a denoiser, so that it knows which words of a caption belong together.

For ShapesWorld, it learns which words describe the same object; for the captions of videos, it learns to predict
masked words. For prompts in unrestricted English, use a pretrained text encoder instead. A small run for a CPU:

    accelerate launch train/train_text_encoder.py --config train/recipes/shapes-64-text.yaml --output_dir runs/try \
        --max_steps 20
"""

from vgen.io.spinning import stop_spinning

stop_spinning()  # before torch is imported

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from vgen.data.clips import list_videos
from vgen.data.shapes import ShapesWorld, vocabulary
from vgen.io.atomic import atomic_directory
from vgen.io.errors import one_line_errors
from vgen.io.remote import local_copy
from vgen.models.prompts import CutCaptions, count_words, make_text_encoder, make_word_tokenizer
from vgen.training.attributes import AttributeReader, CaptionBatches, attribute_loss, correct_attributes
from vgen.training.feed import Feed, to_device
from vgen.training.masked_words import MaskedCaptions, WordReader, correct_words, masked_word_loss
from vgen.training.run import Run, RunConfig, config_text, parse_config, start


@dataclass(kw_only=True)
class TextEncoderConfig(RunConfig):
    """Settings for training a text encoder."""

    data: str | None = None
    """A folder of videos, whose captions are learned; `None` generates captions of ShapesWorld."""
    max_words: int = 8000
    """Size of the vocabulary of the captions of videos: their most frequent words. Others are unknown words."""
    dim: int = 128
    """Channels of the embeddings."""
    num_layers: int = 2
    """Number of transformer blocks."""
    max_sequence_length: int = 32
    """Length in tokens that captions are padded or truncated to."""
    num_score_captions: int = 1000
    """Number of captions for a score: for ShapesWorld, with held-out combinations; of videos, with other masked
    words."""

    def check(self) -> None:
        """Checks the settings.

        Raises:
            ValueError: A setting is out of range.
        """
        super().check()
        if self.max_words < 1:
            raise ValueError(f"max_words must be at least 1, got {self.max_words}")


def main(config: TextEncoderConfig) -> None:
    """Trains a text encoder; the same call resumes an interrupted run."""
    if config.dry_run:
        print(config_text(config))
        return
    accelerator = start(config)
    if config.data is None:
        world = ShapesWorld(split="train", seed=config.seed)
        new_world = ShapesWorld(split="held_out", seed=config.seed + 1)
        captions = [world.caption(index) for index in range(config.num_score_captions)]
        words = vocabulary()
    else:
        captions = captions_of(config.data)
        words = frequent_words(captions, config.max_words, accelerator)
    length = config.max_sequence_length
    tokenizer = make_word_tokenizer(words, length)
    text_encoder = make_text_encoder(len(tokenizer), config.dim, config.num_layers, config.seed)
    if config.gradient_checkpointing:
        text_encoder.gradient_checkpointing_enable()
    model: nn.Module
    batches: CaptionBatches | MaskedCaptions
    fresh: CaptionBatches | MaskedCaptions
    loss_of: Callable[[Any, Tensor], Tensor]
    correct: Callable[[Any, Tensor], dict[str, Tensor]]
    if config.data is None:
        model, loss_of, correct = AttributeReader(text_encoder, config.dim), attribute_loss, correct_attributes
        batches, fresh = (CaptionBatches(one, tokenizer, config.batch_size, length) for one in (world, new_world))
    else:
        model, loss_of, correct = WordReader(text_encoder, config.dim, len(tokenizer)), masked_word_loss, correct_words
        batches, fresh = (
            MaskedCaptions(captions, tokenizer, config.batch_size, length, seed)
            for seed in (config.seed, config.seed + 1)
        )
    digest = None if config.data is None else hashlib.sha256(json.dumps(captions).encode()).hexdigest()
    run = Run(config, accelerator, model, data=digest)
    feed = Feed(run, batches)
    if accelerator.is_main_process:
        cut = CutCaptions(tokenizer, length)
        cut.add(captions)
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
            loss = loss_of(logits, batch["targets"]) / config.batch_size
            run.backward(loss)
            total += loss.detach()
        run.update()
        run.log(loss=total)
        if run.scores_are_due:
            with run.average:
                scores = score(model, fresh, correct, config, accelerator)
            run.report(scores, "accuracy")
        run.save()

    def save_result(_: object) -> None:
        for name, part in (("text_encoder", text_encoder), ("tokenizer", tokenizer)):
            with atomic_directory(config.output_dir / name) as folder:
                part.save_pretrained(folder)

    run.end(save_result, "", "accelerate launch train/train_vdm.py --text_encoder {} --vae ... --latents_dir ...")


def captions_of(data: str) -> list[str]:
    """All captions of the videos in a folder, without empty ones.

    Raises:
        ValueError: There are none.
    """
    videos = list_videos(local_copy(data))
    captions = [caption for video in videos for caption in video.captions if any(map(str.isalnum, caption))]
    if not captions:
        raise ValueError(
            f"the videos in {data} have no captions, so no text encoder is needed: run train_vdm.py without it"
        )
    return captions


def frequent_words(captions: list[str], limit: int, accelerator: Accelerator) -> list[str]:
    """The most frequent words of captions, sorted; prints a line if there are more words."""
    counts = count_words(captions)
    if len(counts) > limit:
        accelerator.print(f"the vocabulary has the {limit} most frequent of {len(counts)} words (max_words)")
    return sorted(sorted(counts, key=lambda word: (-counts[word], word))[:limit])


@torch.no_grad()
def score(
    model: nn.Module,
    fresh: CaptionBatches | MaskedCaptions,
    correct: Callable[[Any, Tensor], dict[str, Tensor]],
    config: TextEncoderConfig,
    accelerator: Accelerator,
) -> dict[str, float]:
    """Accuracies on other captions, or on other masked words, and their mean as `accuracy`.

    All processes compute the same scores, which takes too little time to be worth dividing.
    """
    found = defaultdict(list)
    for first in range(0, config.num_score_captions, config.batch_size):
        numbers = range(first, min(first + config.batch_size, config.num_score_captions))
        batch = to_device(fresh.draw(numbers), accelerator.device)
        for name, values in correct(model(batch["input_ids"], batch["mask"]), batch["targets"]).items():
            found[name].append(values)
    scores = {name: torch.cat(values).float().mean().item() for name, values in found.items()}
    return {"accuracy": sum(scores.values()) / len(scores)} | scores


if __name__ == "__main__":
    with one_line_errors(Path(__file__).name):
        main(parse_config(TextEncoderConfig, __doc__))
