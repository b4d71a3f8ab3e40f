"""What a training step needs: memory, calculated on the meta device, and seconds, measured."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from vgen.models.prompts import CAPTIONS_PER_BATCH
from vgen.models.transformer import SpacetimeTransformer
from vgen.models.unet import UNet3D
from vgen.models.vae import CausalVideoVAE
from vgen.temporal.grid import LatentGrid

COPIES_OF_TRAINED = 4
"""Copies in float32 that only trained weights have: gradients, two moments of AdamW, and the moving average."""
_RESERVE = 1.2
"""Temporary memory of operations and fragmentation, as a factor."""
_SECONDS = 4.0


@dataclass(frozen=True, kw_only=True)
class ClipShape:
    """Shape of the clips of a run."""

    height: int
    """Pixels."""
    width: int
    """Pixels."""
    num_frames: int


@dataclass(frozen=True)
class Step:
    """A training step of a network, without data: it can be calculated on the meta device and measured on others.

    Args:
        make: Makes the network on the current default device.
        inputs: Makes the arguments of its forward pass.
    """

    make: Callable[[], nn.Module]
    inputs: Callable[[], Mapping[str, Any]]

    def needs(self, precision: str = "no") -> dict[str, float]:
        """Bytes of `weights`, and bytes of `memory` with activations, without a real device.

        `memory` counts weights, gradients, optimizer, moving average and all tensors that the backward pass needs,
        except those that gradient checkpointing computes again.

        Args:
            precision: That of the forward pass: `no` (float32), `bf16` or `fp16`.
        """
        with torch.device("meta"):
            network, inputs = self.make(), self.inputs()
            activations: float = _saved_bytes(network, inputs)
            if precision != "no":  # autocast keeps about half of them in float32
                half = {name: _to_half(value) for name, value in inputs.items()}
                activations = (activations + _saved_bytes(nn.Module.to(network, torch.bfloat16), half)) / 2
        weights = 4 * sum(one.numel() for one in network.parameters())
        memory = _RESERVE * ((1 + COPIES_OF_TRAINED) * weights + activations)
        return {"weights": weights, "memory": memory}

    def seconds(self, device: torch.device, precision: str = "no") -> float:
        """Measures forward and backward passes for a few seconds, after one that is not counted."""
        with device:
            network, inputs = self.make(), self.inputs()
        optimizer = torch.optim.AdamW(network.parameters(), lr=0.0, fused=True)
        times: list[float] = []
        while len(times) < 2 or sum(times) < _SECONDS:
            begin = time.perf_counter()
            with torch.autocast(device.type, _HALF.get(precision), enabled=precision in _HALF):
                output = network(**inputs)
            output.sample.float().square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            if device.type != "cpu":
                torch.accelerator.synchronize(device)
            times.append(time.perf_counter() - begin)
        return sum(times[1:]) / (len(times) - 1)


def encoding_memory(
    vae: Mapping[str, Any],
    clip: ClipShape,
    batch_size: int,
    precision: str = "no",
    text_encoder: Callable[[], nn.Module] | None = None,
    max_sequence_length: int = 0,
) -> float:
    """Bytes of memory for encoding clips and their frames, and captions, all without gradients or a real device.

    Args:
        vae: Arguments of the `CausalVideoVAE`, whose weights are in float32.
        clip: Shape of the clips in pixels.
        batch_size: Clips that are encoded at once.
        precision: That of the VAE's forward pass: `no` (float32), `bf16` or `fp16`.
        text_encoder: Makes the text encoder, which is kept in float32; `None` if there is none.
        max_sequence_length: Tokens per caption.
    """
    shapes = [(batch_size, clip.num_frames), (batch_size * min(4, clip.num_frames - 1), 1)]
    with torch.device("meta"), torch.no_grad():
        networks: list[Any] = [CausalVideoVAE(**vae).eval()]
        inputs = (torch.zeros(size, 3, frames, clip.height, clip.width) for size, frames in shapes)
        activations: float = max(peak_bytes(networks[0], networks[0].encode, pixels) for pixels in inputs)
        activations *= 1 if precision == "no" else 0.75  # autocast keeps about half of them in float32
        if text_encoder is not None:
            networks.append(text := text_encoder().eval())
            tokens = torch.ones(CAPTIONS_PER_BATCH, max_sequence_length, dtype=torch.long)
            activations = max(activations, peak_bytes(text, text, tokens))
        weights = 4 * sum(one.numel() for network in networks for one in network.parameters())
    return _RESERVE * (weights + activations)


_HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


def vae_step(model: Mapping[str, Any], clip: ClipShape, batch_size: int, checkpointing: bool = False) -> Step:
    """The step of a `CausalVideoVAE` with these arguments."""

    def make() -> nn.Module:
        vae = CausalVideoVAE(**model)
        if checkpointing:
            vae.enable_gradient_checkpointing()
        return vae.train()

    shape = (batch_size, 3, clip.num_frames, clip.height, clip.width)
    return Step(make, lambda: {"sample": torch.zeros(shape), "sample_posterior": True})


def denoiser_step(
    denoiser: str,
    model: Mapping[str, Any],
    clip: ClipShape,
    compression: tuple[int, int],
    batch_size: int,
    text: tuple[int, int],
    checkpointing: bool = False,
) -> Step:
    """The step of a denoiser.

    Args:
        denoiser: `transformer` or `unet`.
        model: Arguments of the network.
        clip: Shape of the clips in pixels.
        compression: Pixels per latent in time and space, such as `(4, 8)`.
        batch_size: Clips per step.
        text: Length in tokens and channels of the prompt's embedding.
        checkpointing: Whether activations are recomputed.
    """
    time_factor, space_factor = compression

    def make() -> nn.Module:
        network: Any
        if denoiser == "unet":
            network = UNet3D(**{"cross_attention_dim": text[1], **model})
        else:
            network = SpacetimeTransformer(**{"text_dim": text[1], **model})
        if checkpointing:
            network.enable_gradient_checkpointing()
        return network.train()

    def inputs() -> dict[str, Tensor]:
        latents = LatentGrid(time_factor).num_latents(clip.num_frames)
        size = (latents, clip.height // space_factor, clip.width // space_factor)
        tokens = latents // model.get("patch_size", (1,))[0]
        return {
            "hidden_states": torch.zeros(batch_size, model["in_channels"], *size),
            "timestep": torch.zeros(batch_size, tokens),
            "encoder_hidden_states": torch.zeros(batch_size, *text),
        }

    return Step(make, inputs)


def peak_bytes(network: nn.Module, run: Callable[[Tensor], Any], inputs: Tensor) -> int:
    """The most bytes of tensors that a computation keeps at once, with its inputs and without the weights."""
    with _Live(network) as live, _FlashAttention():
        run(inputs.clone())
    return live.peak


class _Live(TorchDispatchMode):
    """Adds up the storages that operations make, except views of weights, as long as something refers to them."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.weights = {one.untyped_storage()._cdata for one in network.state_dict().values()}
        self.sizes = WeakIdKeyDictionary()
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for one in tree_leaves(output):
            if torch.is_tensor(one) and (storage := one.untyped_storage())._cdata not in self.weights:
                self.sizes[storage] = storage.nbytes()
        self.peak = max(self.peak, sum(self.sizes.values()))
        return output


def _to_half(value: Any) -> Any:
    return value.to(torch.bfloat16) if torch.is_tensor(value) and value.is_floating_point() else value


def _saved_bytes(network: nn.Module, inputs: Mapping[str, Any]) -> int:
    """Bytes of the tensors that a backward pass needs, without the weights."""
    sizes: dict[int, int] = {}
    kept: list[Tensor] = []
    own = {one.untyped_storage()._cdata for one in network.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            sizes[storage._cdata] = storage.nbytes()
            kept.append(tensor)  # so that its address is not used again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), _FlashAttention():
        network(**inputs)
    return sum(sizes.values())


class _FlashAttention(TorchFunctionMode):
    """Attention that keeps its inputs and its output, as on real devices; that of the meta device keeps its matrix."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.scaled_dot_product_attention:
            inputs = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
            return _KeepsNoMatrix.apply(inputs["query"], inputs["key"], inputs["value"])
        return func(*args, **kwargs)


class _KeepsNoMatrix(torch.autograd.Function):
    """The shapes of attention, and what it keeps for the backward pass."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, output)
        return output
