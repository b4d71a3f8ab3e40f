"""The identity of weights, and of anything else that JSON can hold."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor, nn

_NOTES = ("training_data", "training_psnr", "trained_frame_rates")  # settings of a network for messages only


def digest_json(value: Any) -> str:
    """SHA-256 of a JSON-serializable value; other values count as strings."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of the content of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def fingerprint_weights(network: nn.Module) -> str | None:
    """A hash of every weight and buffer of a network, with adapters, their scales and which of them are active.

    It is computed at every call: writes through `.data`, as in fusing LoRA layers, leave no other trace.

    Returns:
        XXH3 (128 bits) of names, shapes, dtypes and bytes; `None` where offloading keeps weights out of reach.
    """
    weights = _weights(network)
    return None if any(weight.is_meta for _, weight in weights) else _hash(weights, _adapters(network))


def _weights(network: nn.Module) -> list[tuple[str, Tensor]]:
    """All weights by name; those that accelerate offloaded, from where it keeps them."""
    weights = dict(network.state_dict(keep_vars=True))
    for prefix, module in network.named_modules():
        hook = getattr(module, "_hf_hook", None)
        for one in getattr(hook, "hooks", [hook]):
            offloaded = getattr(one, "weights_map", None)
            if offloaded is not None:
                for name, _ in module.named_parameters(recurse=False):
                    weights[f"{prefix}.{name}".lstrip(".")] = offloaded[name]
    return sorted((name, weight) for name, weight in weights.items() if isinstance(weight, Tensor))


def _adapters(network: nn.Module) -> list[tuple[str, str]]:
    """What of peft's layers is not a weight: scales, and which adapters are active or merged."""
    found = []
    for name, module in network.named_modules():
        if isinstance(getattr(module, "scaling", None), dict) and hasattr(module, "active_adapters"):
            facts = {
                "scaling": module.scaling,
                "active": list(module.active_adapters),
                "merged": list(module.merged_adapters),
                "disabled": module.disable_adapters,
            }
            found.append((name, json.dumps(facts, sort_keys=True, default=str)))
    return found


def _hash(weights: list[tuple[str, Tensor]], adapters: list[tuple[str, str]]) -> str:
    digest = xxhash.xxh3_128()
    for name, weight in weights:
        weight = getattr(weight, "data", weight).detach()
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        digest.update(weight.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    for adapter in adapters:
        digest.update(repr(adapter).encode())
    return digest.hexdigest()


def weights_digest(network: nn.Module, without: tuple[str, ...] = ()) -> str:
    """SHA-256 of a network's weights, of their names, and of the scales of adapters and which are active.

    Files refer to networks by it: latents to the VAE and embeddings to the text encoder that made them. Weights are
    rounded to half precision, as pipelines are saved, so that a network and its saved copy have the same digest.

    Args:
        network: Any network.
        without: Prefixes of names that do not count, each up to and including a dot.
    """
    digest = hashlib.sha256()
    for name, weight in sorted(network.state_dict().items()):
        if not name.startswith(without):
            digest.update(name.encode())
            digest.update(weight.detach().cpu().half().numpy().tobytes())
    for adapter in _adapters(network):
        if not adapter[0].startswith(without):
            digest.update(repr(adapter).encode())
    return digest.hexdigest()


def encoder_digest(vae: Any) -> str:
    """`weights_digest` of the part of a VAE that its latents depend on, with their statistics."""
    statistics = [
        str(vae.config.get(key)) for key in ("latents_mean", "latents_std", "scaling_factor", "shift_factor")
    ]
    digest = weights_digest(vae, without=("decoder.", "post_quant_conv."))
    return hashlib.sha256("".join([digest, *statistics]).encode()).hexdigest()


def fingerprint_components(
    scheduler: Any, tokenizer: Any, networks: dict[str, nn.Module | None]
) -> dict[str, list[str | None]]:
    """The identity of the components that outputs depend on.

    Args:
        scheduler: Of diffusers.
        tokenizer: Of transformers, or `None`.
        networks: By name; `None` where there is none.

    Returns:
        For each component a hash of its configuration and one of its weights; `None` where it has none, or where
        offloading keeps them out of reach.
    """
    settings = {key: value for key, value in scheduler.config.items() if key[:1] != "_"}
    marks: dict[str, list[str | None]] = {
        "scheduler": [digest_json(settings | {"class": type(scheduler).__name__}), None]
    }
    if tokenizer is not None:
        marks["tokenizer"] = [digest_json(tokenizer.get_vocab()), None]
    for name, network in networks.items():
        if network is not None:
            config = {"class": type(network).__name__}
            if isinstance(network.config, dict):  # diffusers'; transformers' also holds versions and precision
                config |= {key: value for key, value in network.config.items() if key[:1] != "_" and key not in _NOTES}
            marks[name] = [digest_json(config), fingerprint_weights(network)]
    return marks
