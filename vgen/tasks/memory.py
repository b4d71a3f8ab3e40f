"""Memory that a checkpoint needs for generation, calculated from its configs on the meta device, without weights."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from huggingface_hub import snapshot_download
from torch import Tensor, nn

from vgen.hub import find_checkpoint
from vgen.io.errors import loading
from vgen.models.transformer import SpacetimeTransformer
from vgen.models.unet import UNet3D
from vgen.models.vae import CausalVideoVAE
from vgen.pipeline import VideoGenPipeline
from vgen.sampling.sampler import latent_shape
from vgen.training.needs import peak_bytes

_CONVOLUTIONS = 1.15
"""Activations of a VAE with the working memory of its convolutions, relative to those without.

On the CPU, measured peaks are 1.0 to 1.25 times the tensors that are kept at once.
"""
_CLASSES: dict[str, Any] = {
    "CausalVideoVAE": CausalVideoVAE, "SpacetimeTransformer": SpacetimeTransformer, "UNet3D": UNet3D,
}  # fmt: skip
_NETWORKS = ("text_encoder", "image_encoder", "transformer", "transformer_2", "unet", "vae")
_DENOISERS = ("transformer", "transformer_2", "unet")


@dataclass(frozen=True)
class Part:
    """What one network needs, in bytes."""

    weights: float
    activations: float
    """Most of all other tensors that are kept at once while it runs."""
    block: float
    """Weights of its largest block, and of all that is in no block."""
    in_blocks: float
    """Weights of all blocks together."""


@dataclass(frozen=True)
class MemoryReport:
    """What a video needs, in bytes."""

    parts: dict[str, Part]
    """By name of the component, in the order in which they run."""
    cache: float
    """Keys and values of past frames in a rollout."""
    tiled: float
    """Activations of the VAE with tiling."""

    @property
    def resident(self) -> float:
        """With all weights on the device."""
        return sum(part.weights for part in self.parts.values()) + self._most(lambda part: 0.0)

    @property
    def model_offloading(self) -> float:
        """With the weights of one network at a time on the device."""
        return self._most(lambda part: part.weights)

    @property
    def group_offloading(self) -> float:
        """With the weights of one block at a time on the device."""
        return self._most(lambda part: part.block)

    @property
    def smallest(self) -> float:
        """With the weights of one block at a time on the device, and tiling."""
        parts = dict(self.parts)
        if "vae" in parts:
            parts["vae"] = replace(parts["vae"], activations=min(parts["vae"].activations, self.tiled))
        return replace(self, parts=parts).group_offloading

    @property
    def float8_storage(self) -> float:
        """Saved if the blocks of the denoisers are stored in float8, with all weights on the device."""
        return sum(part.in_blocks / 2 for name, part in self.parts.items() if name in _DENOISERS)

    def _most(self, weights: Callable[[Part], float]) -> float:
        return max(
            weights(part) + part.activations + (self.cache if name in (*_DENOISERS, "vae") else 0.0)
            for name, part in self.parts.items()
        )


def report_memory(
    source: str | Path,
    num_frames: int | None = None,
    size: tuple[int, int] | None = None,
    dtype: torch.dtype = torch.float32,
    num_prompts: int = 1,
) -> MemoryReport:
    """Calculates the memory for a video. Weights are neither read nor downloaded.

    It counts all tensors as on a GPU, but not CUDA's context, which takes about half a GiB, and fragmentation.

    Args:
        source: A packaged checkpoint, a folder or a Hub id.
        num_frames: Length of the video; by default that of the checkpoint.
        size: Height and width in pixels; by default those of the checkpoint.
        dtype: Data type of all weights.
        num_prompts: Number of videos at once.

    Raises:
        ValueError: There is no such checkpoint, or it cannot make such a video.
    """
    place = find_checkpoint(source)
    with loading(place):
        folder = place if isinstance(place, Path) else Path(snapshot_download(place, allow_patterns=["*.json"]))
        index = VideoGenPipeline.load_config(folder)
        with torch.device("meta"), torch.no_grad():
            networks: dict[str, Any] = {
                name: nn.Module.to(_make(folder / name, index[name][1]), dtype).eval()
                for name in _NETWORKS
                if index.get(name, [None])[0] is not None
            }
            known = inspect.signature(VideoGenPipeline.__init__).parameters
            settings = {name: index[name] for name in known if name in index and not _is_component(index[name])}
            pipe = VideoGenPipeline(scheduler=None, **networks, **settings)
            return _report(pipe, num_frames, size, dtype, num_prompts)


def _is_component(entry: Any) -> bool:
    """Whether an entry of `model_index.json` names a library and a class."""
    return isinstance(entry, list) and len(entry) == 2 and all(one is None or isinstance(one, str) for one in entry)


def _make(folder: Path, name: str) -> nn.Module:
    made = _CLASSES.get(name) or getattr(diffusers, name, None)
    if made is not None:
        return made.from_config(made.load_config(folder))
    config = transformers.AutoConfig.from_pretrained(folder)
    return getattr(transformers, name)(config)


def _report(
    pipe: VideoGenPipeline,
    num_frames: int | None,
    size: tuple[int, int] | None,
    dtype: torch.dtype,
    num_prompts: int,
) -> MemoryReport:
    frames = pipe.config.num_frames if num_frames is None else num_frames
    height, width = (pipe.config.height, pipe.config.width) if size is None else size
    pipe.grid.check(frames)
    denoiser, vae = pipe.denoiser, pipe.video_vae
    doubled = num_prompts * (2 if pipe.config.guidance_scale > 1 and pipe.is_guidable else 1)
    whole = pipe.grid.num_latents(frames)
    at_once = whole  # a rollout computes a chunk at a time
    if "full" not in denoiser.config.group_modes:
        at_once = min(whole, (denoiser.config.chunk_size or 1) * pipe.grid.patch_frames)
    shape = latent_shape(denoiser, vae, doubled, at_once, (height, width))
    cache = _cache_bytes(denoiser, doubled, shape[3], shape[4], dtype) if at_once < whole else 0.0
    parts: dict[str, Part] = {}
    length = pipe.config.max_sequence_length
    if pipe.text_encoder is not None:
        tokens = torch.ones(num_prompts, length, dtype=torch.long)
        parts["text_encoder"] = _part(pipe.text_encoder, pipe.text_encoder, tokens)
    if pipe.image_encoder is not None:
        side = pipe.image_encoder.config.image_size
        pixels = torch.zeros(num_prompts, 3, side, side, dtype=dtype)
        parts["image_encoder"] = _part(pipe.image_encoder, pipe.image_encoder, pixels)

    def denoise(network: Any) -> Callable[[Tensor], Any]:
        inputs: dict[str, Any] = {"timestep": torch.zeros(doubled)}
        inputs["encoder_hidden_states"] = torch.zeros(doubled, length, network.text_dim, dtype=dtype)
        if network.condition_channels:
            inputs["condition"] = torch.zeros(doubled, network.condition_channels, *shape[2:], dtype=dtype)
        if network.condition_channels and network.config.image_dim is not None:
            tokens = network.config.pos_embed_seq_len or 257
            inputs["image_embeds"] = torch.zeros(doubled, tokens, network.config.image_dim, dtype=dtype)
        return lambda latents: network(latents, **inputs)

    for name in _DENOISERS:
        network = getattr(pipe, name, None)
        if network is not None:
            parts[name] = _part(network, denoise(network), torch.zeros(shape, dtype=dtype))
    tiled = 0.0
    if vae is not None and pipe.vae is not None:
        decoded = min(whole, 2 * at_once)
        latents = torch.zeros(latent_shape(denoiser, vae, num_prompts, decoded, (height, width)), dtype=dtype)

        def decode(latents: Tensor) -> Any:
            if at_once == whole:
                return vae.decode(vae.denormalize(latents)).sample.float()
            return [one.shape for one in vae.decode_stream(vae.denormalize(latents))]

        parts["vae"] = _part(pipe.vae, decode, latents, _CONVOLUTIONS)
        pipe.vae.enable_tiling()
        tiled = _CONVOLUTIONS * peak_bytes(pipe.vae, decode, latents)
    return MemoryReport(parts, cache, tiled)


def _part(network: nn.Module, run: Callable[[Tensor], Any], inputs: Tensor, factor: float = 1.0) -> Part:
    weights = _bytes(network)
    sizes = [_bytes(block) for block in _blocks(network)]
    rest = weights - sum(sizes)
    activations = factor * peak_bytes(network, run, inputs)
    return Part(weights, activations, rest + max(sizes, default=0), sum(sizes))


def _bytes(network: nn.Module) -> int:
    return sum(one.numel() * one.itemsize for one in network.parameters())


def _blocks(network: nn.Module) -> Iterator[nn.Module]:
    """The children of all lists of modules that are in no other list, as group offloading takes them."""
    for child in network.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        else:
            yield from _blocks(child)


def _cache_bytes(denoiser: Any, batch_size: int, height: int, width: int, dtype: torch.dtype) -> float:
    """Keys and values of the frames in the window and the sink, in all layers."""
    config = denoiser.config
    frames = (config.window or 1) + config.sink
    if not isinstance(denoiser, SpacetimeTransformer):
        return 0.0
    _, p_h, p_w = denoiser.patch_size
    dim = config.num_attention_heads * config.attention_head_dim
    tokens = frames * (height // p_h) * (width // p_w)
    return 2.0 * config.num_layers * batch_size * tokens * dim * dtype.itemsize


def describe_memory(report: MemoryReport) -> list[tuple[str, str, str]]:
    """Rows of a table: what it is, its weights and its activations; then the sums."""
    rows = [(name, _text(part.weights), _text(part.activations)) for name, part in report.parts.items()]
    if report.cache:
        rows.append(("keys and values of past frames", "", _text(report.cache)))
    return [
        *rows,
        ("all weights on the device", _text(report.resident), ""),
        ("... with float8 storage of the denoiser", _text(report.resident - report.float8_storage), ""),
        ("one network at a time (enable_model_cpu_offload)", _text(report.model_offloading), ""),
        ("one block at a time (group offloading)", _text(report.group_offloading), ""),
        ("... with tiling of the VAE", _text(report.smallest), ""),
    ]


def _text(size: float) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"
