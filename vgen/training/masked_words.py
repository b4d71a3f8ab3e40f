"""Pretraining of a text encoder by predicting masked words of captions."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from vgen.models.prompts import embed, tokenize

LEAST_MASKED, MOST_MASKED = 0.15, 0.3
"""Fraction of the words of a caption that are masked, drawn for each caption; at least one word is."""
IGNORED = -100
"""Target of words that are not masked; `cross_entropy` ignores it."""


class WordReader(nn.Module):
    """Predicts the masked words of captions from their embeddings.

    Args:
        text_encoder: A text encoder of transformers.
        dim: Channels of its embeddings.
        num_words: Size of the vocabulary, including special tokens.
    """

    def __init__(self, text_encoder: nn.Module, dim: int, num_words: int):
        super().__init__()
        self.text_encoder = text_encoder
        self.head = nn.Linear(dim, num_words)

    def forward(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        """Logits `(b, l, words)`."""
        return self.head(embed(self.text_encoder, input_ids, mask))


class MaskedCaptions(Dataset):
    """Captions with words replaced by the unknown token, indexed by step and part of the batch.

    Args:
        captions: Captions, of which one is drawn for each sample.
        tokenizer: A tokenizer with one token per word.
        batch_size: Samples per step.
        max_length: Length in tokens that captions are padded or truncated to.
        seed: Seed of the captions and of the words that are masked.
    """

    def __init__(self, captions: Sequence[str], tokenizer: Any, batch_size: int, max_length: int, seed: int):
        self.captions, self.tokenizer, self.batch_size = captions, tokenizer, batch_size
        self.max_length, self.seed = max_length, seed

    def __getitem__(self, key: tuple[int, slice]) -> dict[str, Tensor]:
        """Makes a part of a step's batch; see `draw`."""
        step, part = key
        first = step * self.batch_size
        return self.draw(range(first + part.start, first + part.stop))

    def draw(self, indices: range) -> dict[str, Tensor]:
        """`input_ids` and `mask` `(b, l)` of captions, and `targets` `(b, l)`: masked words, `IGNORED` elsewhere."""
        rngs = [random.Random(self.seed * 1_000_003 + index) for index in indices]
        input_ids, mask = tokenize(self.tokenizer, [rng.choice(self.captions) for rng in rngs], self.max_length)
        targets = torch.full_like(input_ids, IGNORED)
        special = torch.tensor(self.tokenizer.all_special_ids)
        for row, rng in enumerate(rngs):
            words = torch.nonzero(~torch.isin(input_ids[row], special))[:, 0].tolist()
            share = rng.uniform(LEAST_MASKED, MOST_MASKED)
            chosen = rng.sample(words, min(len(words), max(1, round(share * len(words)))))
            targets[row, chosen] = input_ids[row, chosen]
            input_ids[row, chosen] = self.tokenizer.unk_token_id
        return {"input_ids": input_ids, "mask": mask, "targets": targets}


def masked_word_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """The cross-entropy, averaged over the masked words of each caption and summed over captions."""
    errors = F.cross_entropy(logits.float().transpose(1, 2), targets, reduction="none")
    return (errors.sum(1) / (targets != IGNORED).sum(1).clamp_min(1)).sum()


def correct_words(logits: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Whether each masked word is the most likely one, as `accuracy`."""
    masked = targets != IGNORED
    return {"accuracy": (logits.argmax(-1) == targets)[masked]}
