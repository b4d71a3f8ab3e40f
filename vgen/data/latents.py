"""Encoded clips: latents and captions in safetensors shards, from which clips are read on demand."""

from __future__ import annotations

import bisect
import hashlib
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vgen.data.formats import is_ignored
from vgen.io.atomic import atomic_file


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
    condition: Tensor | None = None,
    image_embeds: Tensor | None = None,
    actions: Tensor | None = None,
) -> None:
    """Writes a shard of encoded clips atomically.

    Args:
        path: Path of the shard.
        latents: Normalized latents `(n, c, t, h, w)`; stored in half precision.
        captions: Captions of each clip.
        frame_rates: Pixel frames per second of each clip.
        frames: Latents of every frame after the first, each encoded as an image, `(n, f - 1, c, h, w)`.
        motion: Motion from each latent to the next, `(n, 3, t - 1, h, w)`: displacement to the right and down in
            latent pixels, and 1 where it is reliable.
        embeddings: Embeddings of the captions of all clips, concatenated, `(k, l, d)`.
        no_prompt: Embedding of the empty prompt, `(l, d)`; required with `embeddings`.
        real: 1 for latents of real frames and 0 for padding, `(n, t)`; `None` if all are real.
        condition: What an image-to-video denoiser is given of each clip, `(n, s + c, t, h, w)`; see
            `vgen.sampling.known_frames.encode_condition`.
        image_embeds: Tokens of the same frames from an image encoder, `(n, k, d)`.
        actions: Actions of the pixel frames `(n, f, a)`, NaN where they are unknown; stored in float32.

    Raises:
        ValueError: The numbers of latents, captions and frame rates differ.
    """
    if not len(latents) == len(captions) == len(frame_rates):
        raise ValueError(
            "latents, captions and frame_rates must have the same length, got "
            f"{len(latents)} latents with {len(captions)} lists of captions and {len(frame_rates)} frame rates"
        )
    metadata = {"captions": json.dumps([list(one) for one in captions])}
    given = {
        "latents": latents,
        "frames": frames,
        "motion": motion,
        "embeddings": embeddings,
        "no_prompt": no_prompt,
        "real": real,
        "condition": condition,
        "image_embeds": image_embeds,
    }
    tensors = {
        name: tensor.to(torch.float16).cpu().contiguous() for name, tensor in given.items() if tensor is not None
    }
    if actions is not None:
        tensors["actions"] = actions.float().cpu().contiguous()
    with atomic_file(path) as partial:
        save_file(tensors | {"frame_rates": torch.tensor(frame_rates)}, partial, metadata=metadata)


class EncodedClip(NamedTuple):
    """One clip of a `LatentSet`."""

    latents: Tensor
    """Normalized latents `(c, t, h, w)`."""
    captions: list[str]
    frame_rate: float
    frames: Tensor | None
    """Latents of every frame after the first, each encoded as an image, `(f - 1, c, h, w)`."""
    motion: Tensor | None
    """Motion between latents, `(3, t - 1, h, w)`; see `write_shard`."""
    real: Tensor
    """bool `(t,)`, false for padding of short videos."""
    condition: Tensor | None = None
    """What an image-to-video denoiser is given, `(s + c, t, h, w)`; see `write_shard`."""
    image_embeds: Tensor | None = None
    """Tokens of the same frames from an image encoder, `(k, d)`."""
    actions: Tensor | None = None
    """Actions of the pixel frames `(f, a)`, NaN where they are unknown."""


def shard_length(path: Path) -> int:
    """Number of clips in a shard.

    Raises:
        ValueError: The shard is damaged, or `write_shard` did not write it.
    """
    return len(_open_shard(path)[1])


def _open_shard(path: Path) -> tuple[Any, list[list[str]]]:
    """Opens a shard, and reads its captions.

    Raises:
        ValueError: The shard is damaged, or `write_shard` did not write it.
    """
    try:
        file = safe_open(path, framework="pt")
        captions = json.loads((file.metadata() or {})["captions"])
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
        rates = file.get_tensor("frame_rates")
    except (SafetensorError, OSError, KeyError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged, or has no latents of pipelines/encode_latents.py: {error!r}") from error
    if not isinstance(captions, list) or not all(
        isinstance(one, list) and all(isinstance(caption, str) for caption in one) for one in captions
    ):
        raise ValueError(f"{path} is damaged: its captions must be lists of strings")
    per_clip = ("latents", "frame_rates", "frames", "motion", "real", "condition", "image_embeds", "actions")
    lengths = {name: len(captions) for name in per_clip}
    lengths["embeddings"] = sum(map(len, captions))
    for name, num_axes in {
        "latents": 5,
        "frame_rates": 1,
        "frames": 5,
        "motion": 5,
        "real": 2,
        "embeddings": 3,
        "condition": 5,
        "image_embeds": 3,
        "actions": 3,
    }.items():
        shape = shapes.get(name)
        if (shape is None and name == "latents") or (shape and (len(shape) != num_axes or shape[0] != lengths[name])):
            raise ValueError(
                f"{path} is damaged: expected {name} with {num_axes} axes, the first of length {lengths[name]}, got "
                f"{shape and list(shape)}"
            )
    if "embeddings" in shapes and shapes.get("no_prompt") != shapes["embeddings"][1:]:
        raise ValueError(f"{path} is damaged: expected no_prompt of shape {list(shapes['embeddings'][1:])}")
    if not (rates.isfinite() & (rates > 0)).all():
        raise ValueError(f"{path} is damaged: frame rates must be positive")
    return file, captions


class LatentSet(torch.utils.data.Dataset):
    """The clips in a folder of shards. Captions and frame rates are kept in memory; tensors are read on demand.

    Shards are memory-mapped, so that processes share them in the page cache. After pickling, a copy opens the files
    again.

    Args:
        folder: Folder of `*.safetensors` files that `write_shard` wrote.

    Raises:
        ValueError: The folder contains no shards, one is damaged, or their shapes or contents differ.
    """

    def __init__(self, folder: Path):
        self.paths = sorted(path for path in folder.glob("*.safetensors") if not is_ignored(path.name))
        if not self.paths:
            raise ValueError(
                f"{folder} contains no latents (*.safetensors): create them with pipelines/encode_latents.py"
            )
        self.captions: list[list[str]] = []
        self._files: dict[int, Any] = {}  # open shards
        self._begins: list[int] = []  # number of each shard's first clip
        self._first_caption: list[int] = []  # of each clip, among its shard's embeddings
        rates, names, shapes = [], [], []
        for number in range(len(self.paths)):
            file, captions = _open_shard(self.paths[number])
            self._files[number] = file
            self._begins.append(len(self.captions))
            self._first_caption += itertools.accumulate((len(one) for one in captions[:-1]), initial=0)
            self.captions += captions
            rates.append(file.get_tensor("frame_rates"))
            names.append(set(file.keys()))
            shapes.append(tuple(file.get_slice("latents").get_shape()[1:]))
        if len(set(shapes)) > 1:
            raise ValueError(f"the shards of {folder} have latents of different shapes: {sorted(set(shapes))}")
        self.shape: tuple[int, ...] = shapes[0]
        """Shape of a clip's latents, `(c, t, h, w)`."""
        self.frame_rates = torch.cat(rates)
        """Pixel frames per second of each clip."""
        for name in ("frames", "motion", "embeddings", "condition", "image_embeds", "actions"):
            if 0 < sum(name in one for one in names) < len(names):
                raise ValueError(
                    f"some shards of {folder} have {name} and some do not: encode all clips with the same settings"
                )
        self._names = names

    def __len__(self) -> int:
        return len(self.captions)

    @property
    def num_latents(self) -> int:
        """Number of latent frames per clip."""
        return self.shape[1]

    @property
    def has_frames(self) -> bool:
        """Whether clips have latents of single frames."""
        return "frames" in self._names[0]

    @property
    def has_motion(self) -> bool:
        """Whether clips have the motion between their latents."""
        return "motion" in self._names[0]

    @property
    def has_embeddings(self) -> bool:
        """Whether clips have embeddings of their captions."""
        return "embeddings" in self._names[0]

    @property
    def condition_channels(self) -> int:
        """Channels of the condition of an image-to-video denoiser; 0 if clips have none."""
        return self._stored_shape("condition")[1]

    @property
    def image_tokens(self) -> tuple[int, int]:
        """Number of tokens of the image encoder, and their channels; zeros if clips have none."""
        _, number, channels = self._stored_shape("image_embeds")[:3]
        return number, channels

    @property
    def action_dim(self) -> int:
        """Channels of the actions of the pixel frames; 0 if clips have none."""
        return self._stored_shape("actions")[2]

    @property
    def num_frames(self) -> int:
        """Number of pixel frames per clip; 0 if clips have no actions, of which there is one for each."""
        return self._stored_shape("actions")[1]

    @property
    def digest(self) -> str:
        """SHA-256 of all captions and frame rates, and of the latents and actions of up to 64 evenly spaced clips."""
        summary = json.dumps([self.captions, self.frame_rates.tolist(), [len(self), *self.shape]]).encode()
        digest = hashlib.sha256(summary)
        for index in torch.linspace(0, len(self) - 1, min(64, len(self))).long().tolist():
            for name in ("latents", *(["actions"] if self.action_dim else [])):
                read = self._read(name, *self._place(index))
                digest.update(read.contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def __getitem__(self, index: int) -> EncodedClip:
        """One clip."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"clip index must be in [{-len(self)}, {len(self)}), got {index}")
        index %= len(self)
        shard, row = self._place(index)
        frames, motion, real, condition, image_embeds, actions = (
            self._read(name, shard, row) if name in self._names[shard] else None
            for name in ("frames", "motion", "real", "condition", "image_embeds", "actions")
        )
        real = torch.ones(self.num_latents, dtype=torch.bool) if real is None else real.bool()
        latents, rate = self._read("latents", shard, row), self.frame_rates[index].item()
        return EncodedClip(latents, self.captions[index], rate, frames, motion, real, condition, image_embeds, actions)

    def embedding(self, index: int, caption: int | None) -> Tensor:
        """The embedding `(l, d)` of one of a clip's captions, or of the empty prompt for `None`."""
        if caption is None:
            return self._file(len(self.paths) - 1).get_tensor("no_prompt")
        shard, _ = self._place(index)
        return self._read("embeddings", shard, self._first_caption[index] + caption)

    def _place(self, index: int) -> tuple[int, int]:
        """The shard of a clip, and its row there."""
        shard = bisect.bisect_right(self._begins, index) - 1
        return shard, index - self._begins[shard]

    def _stored_shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor in the first shard; zeros if there is none."""
        return tuple(self._file(0).get_slice(name).get_shape()) if name in self._names[0] else (0,) * 5

    def _read(self, name: str, shard: int, row: int) -> Tensor:
        return self._file(shard).get_slice(name)[row]

    def _file(self, shard: int) -> Any:
        if shard not in self._files:
            self._files[shard] = safe_open(self.paths[shard], framework="pt")
        return self._files[shard]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_files": {}}


def epoch_order(size: int, seed: int, epoch: int) -> Tensor:
    """The order of an epoch, which depends only on the seed and the epoch."""
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
