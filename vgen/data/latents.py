"""Clips encoded once: latents and captions in safetensors shards, read whole into memory."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor


def write_shard(
    path: Path,
    latents: Tensor,
    captions: Sequence[Sequence[str]],
    frame_rates: Sequence[float],
    frames: Tensor | None = None,
    motion: Tensor | None = None,
    embeddings: Tensor | None = None,
    no_prompt: Tensor | None = None,
    real: Tensor | None = None,
) -> None:
    """Writes what is known of some clips; the file appears whole or not at all.

    Args:
        path: Of the shard.
        latents: Normalised, `(n, c, t, h, w)`; kept in half precision.
        captions: Of each clip.
        frame_rates: Pixel frames per second of each clip.
        frames: Latents of single frames, `(n, f - 1, c, h, w)`, those of every frame after the first encoded alone.
        motion: From each latent to the next, `(n, 3, t - 1, h, w)`: how far to the right and down, in latent pixels,
            and 1 where that can be trusted.
        embeddings: Of all captions, one after another, `(k, l, d)`.
        no_prompt: Embedding of "", `(l, d)`, which goes with `embeddings`.
        real: 1 for latents of real frames, 0 where a short video was padded, `(n, t)`; `None` if all are real.
    """
    if not len(latents) == len(captions) == len(frame_rates):
        raise ValueError(f"{len(latents)} latents with {len(captions)} lists of captions, {len(frame_rates)} rates")
    partial = path.with_name(path.name + ".partial")
    metadata = {"captions": json.dumps([list(one) for one in captions])}
    given = {
        "latents": latents,
        "frames": frames,
        "motion": motion,
        "embeddings": embeddings,
        "no_prompt": no_prompt,
        "real": real,
    }
    tensors = {
        name: tensor.to(torch.float16).cpu().contiguous() for name, tensor in given.items() if tensor is not None
    }
    save_file(tensors | {"frame_rates": torch.tensor(frame_rates)}, partial, metadata=metadata)
    partial.replace(path)


class EncodedClip(NamedTuple):
    """One clip of a `LatentSet`."""

    latents: Tensor
    """Normalised, `(c, t, h, w)`."""
    captions: list[str]
    frame_rate: float
    frames: Tensor | None
    """Latents of its frames from the second on, each encoded alone, `(f - 1, c, h, w)`."""
    motion: Tensor | None
    """As `write_shard` takes it, `(3, t - 1, h, w)`."""
    real: Tensor
    """bool `(t,)`, false where a short video was padded."""


def shard_length(path: Path) -> int:
    """Clips of a shard."""
    with safe_open(path, framework="pt") as file:
        return len(json.loads(file.metadata()["captions"]))


class LatentSet(torch.utils.data.Dataset):
    """All shards of a folder, in memory but for embeddings of captions, which are read when they are asked for.

    Args:
        folder: Where `write_shard` wrote `*.safetensors`.

    Raises:
        ValueError: The folder holds no shards.
    """

    def __init__(self, folder: Path):
        paths = sorted(folder.glob("*.safetensors"))
        if not paths:
            raise ValueError(f"{folder} holds no latents (*.safetensors): write them with pipelines/encode_latents.py")
        self.captions: list[list[str]] = []
        parts: dict[str, list[Tensor]] = {}
        self._embeddings: list[tuple[Any, int]] = []  # the open shard of each clip, and where its captions begin there
        for path in paths:
            with safe_open(path, framework="pt") as file:
                names = set(file.keys())
                for name in names - {"embeddings", "no_prompt"}:
                    parts.setdefault(name, []).append(file.get_tensor(name))
                captions = json.loads(file.metadata()["captions"])
                if "embeddings" in names:
                    self.no_prompt = file.get_tensor("no_prompt")
                    begins = itertools.accumulate((len(one) for one in captions[:-1]), initial=0)
                    opened = safe_open(path, framework="pt")
                    self._embeddings += [(opened, begin) for begin in begins]
            self.captions.extend(captions)
        if self._embeddings and len(self._embeddings) < len(self.captions):
            raise ValueError(f"some shards of {folder} have embeddings of their captions, some have none")
        self.latents = torch.cat(parts["latents"])
        self.frame_rates = torch.cat(parts["frame_rates"])
        self.frames = torch.cat(parts["frames"]) if "frames" in parts else None
        self.motion = torch.cat(parts["motion"]) if "motion" in parts else None
        whole = torch.ones(len(self.latents), self.latents.shape[2], dtype=torch.bool)
        self.real = torch.cat(parts["real"]).bool() if "real" in parts else whole

    def __len__(self) -> int:
        return len(self.latents)

    @property
    def digest(self) -> str:
        """Of all captions and rates, and of 64 clips spread over the folder."""
        some = self.latents[torch.linspace(0, len(self) - 1, min(64, len(self))).long()]
        told = json.dumps([self.captions, self.frame_rates.tolist(), list(self.latents.shape)]).encode()
        return hashlib.sha256(told + some.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()

    def __getitem__(self, index: int) -> EncodedClip:
        """One clip."""
        frames, motion = (None if part is None else part[index] for part in (self.frames, self.motion))
        rate, real = self.frame_rates[index].item(), self.real[index]
        return EncodedClip(self.latents[index], self.captions[index], rate, frames, motion, real)

    @property
    def has_embeddings(self) -> bool:
        """Whether captions were embedded when the clips were encoded."""
        return bool(self._embeddings)

    def embedding(self, index: int, caption: int | None) -> Tensor:
        """The embedding `(l, d)` of one of a clip's captions, or of "" for `None`."""
        if caption is None:
            return self.no_prompt
        shard, begin = self._embeddings[index]
        return shard.get_slice("embeddings")[begin + caption]


def epoch_order(size: int, seed: int, epoch: int) -> Tensor:
    """The order of an epoch, a function of the seed and the epoch alone."""
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
