"""Clips encoded once: latents and captions in safetensors shards, read whole into memory."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor


def write_shard(path: Path, latents: Tensor, captions: Sequence[Sequence[str]]) -> None:
    """Writes normalised latents `(n, c, t, h, w)` in half precision and, for each, its captions.

    The file appears whole or not at all.
    """
    if len(latents) != len(captions):
        raise ValueError(f"{len(latents)} latents with {len(captions)} lists of captions")
    partial = path.with_name(path.name + ".partial")
    metadata = {"captions": json.dumps([list(one) for one in captions])}
    save_file({"latents": latents.to(torch.float16).cpu().contiguous()}, partial, metadata=metadata)
    partial.replace(path)


class LatentSet(torch.utils.data.Dataset):
    """All shards of a folder.

    Args:
        folder: Where `write_shard` wrote `*.safetensors`.

    Raises:
        ValueError: The folder holds no shards.
    """

    def __init__(self, folder: Path):
        paths = sorted(folder.glob("*.safetensors"))
        if not paths:
            raise ValueError(f"{folder} holds no latents (*.safetensors): write them with pipelines/encode_latents.py")
        parts, self.captions = [], []
        for path in paths:
            with safe_open(path, framework="pt") as file:
                parts.append(file.get_tensor("latents"))
                self.captions.extend(json.loads(file.metadata()["captions"]))
        self.latents = torch.cat(parts)

    def __len__(self) -> int:
        return len(self.latents)

    def __getitem__(self, index: int) -> tuple[Tensor, list[str]]:
        """Latents `(c, t, h, w)` and captions of one clip."""
        return self.latents[index], self.captions[index]


def epoch_order(size: int, seed: int, epoch: int) -> Tensor:
    """The order of an epoch, a function of the seed and the epoch alone."""
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
