"""Clips encoded once: latents and captions in safetensors shards, read whole into memory."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

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
    """
    if not len(latents) == len(captions) == len(frame_rates):
        raise ValueError(f"{len(latents)} latents with {len(captions)} lists of captions, {len(frame_rates)} rates")
    partial = path.with_name(path.name + ".partial")
    metadata = {"captions": json.dumps([list(one) for one in captions])}
    given = {"latents": latents, "frames": frames, "motion": motion}
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
        self.captions: list[list[str]] = []
        parts: dict[str, list[Tensor]] = {}
        for path in paths:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118, it is no mapping
                    parts.setdefault(name, []).append(file.get_tensor(name))
                self.captions.extend(json.loads(file.metadata()["captions"]))
        self.latents = torch.cat(parts["latents"])
        self.frame_rates = torch.cat(parts["frame_rates"])
        self.frames = torch.cat(parts["frames"]) if "frames" in parts else None
        self.motion = torch.cat(parts["motion"]) if "motion" in parts else None

    def __len__(self) -> int:
        return len(self.latents)

    def __getitem__(self, index: int) -> EncodedClip:
        """One clip."""
        frames, motion = (None if part is None else part[index] for part in (self.frames, self.motion))
        return EncodedClip(self.latents[index], self.captions[index], self.frame_rates[index].item(), frames, motion)


def epoch_order(size: int, seed: int, epoch: int) -> Tensor:
    """The order of an epoch, a function of the seed and the epoch alone."""
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
