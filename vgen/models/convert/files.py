"""Files of public weights: containers, and prefixes of names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vgen.io.errors import one_line

Weights = dict[str, Tensor]
"""Weights by name."""

CONTAINERS = ("generator_ema", "generator", "ema", "model", "state_dict")
"""Names under which training code stores the weights of the network, the best ones first."""
LORA_CONTAINER = "generator_lora"
"""The name under which training code stores a LoRA of the network."""
_WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")
"""Parts that wrappers insert anywhere into names."""
_PREFIXES = ("model.", "module.", "diffusion_model.")
"""Prefixes that all names of a file may have."""


def read_pickle(path: Path) -> Any:
    """Reads a `.pt` or `.pth` file without running code, and without reading weights that are not used.

    Raises:
        ValueError: The file is malformed, or contains other objects than weights.
    """
    try:
        return _load(path)
    except FileNotFoundError as error:
        raise ValueError(f"there is no file {path}") from error
    except Exception as error:  # PyTorch raises many kinds, some of its own
        raise ValueError(
            f"{path} is malformed, or contains more than weights: {one_line(str(error))[:200]}"
        ) from error


def _load(path: Path) -> Any:
    with path.open("rb") as file:
        is_zip = file.read(4) == b"PK\x03\x04"
    return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)  # older files cannot be mapped


def unwrap(content: Any, name: str, container: str | None = None) -> Weights:
    """The weights of one network in what a file contains, without wrappers and prefixes in their names.

    Args:
        content: Weights by name, or a dictionary of these.
        name: Name of the file, for errors.
        container: The entry that has the weights; by default the first of `CONTAINERS` that exists.

    Raises:
        ValueError: There are no weights, or two names become the same.
    """
    found = content
    if container is not None or not _holds_weights(content):
        entries = list(content) if isinstance(content, Mapping) else []
        wanted = CONTAINERS if container is None else (container,)
        chosen = next((one for one in wanted if one in entries and _holds_weights(content[one])), None)
        if chosen is None:
            shown = ", ".join(map(str, entries[:8])) or type(content).__name__
            raise ValueError(f"{name} must have weights under {' or '.join(wanted)}, got {shown}")
        found = content[chosen]
    names = {key: key for key in found}
    for wrapper in _WRAPPERS:
        names = {key: short.replace(wrapper, "") for key, short in names.items()}
    while prefix := next((one for one in _PREFIXES if all(short.startswith(one) for short in names.values())), None):
        names = {key: short.removeprefix(prefix) for key, short in names.items()}
    if len(set(names.values())) < len(names):
        raise ValueError(f"{name} has several weights of the same name in different wrappers")
    return {short: found[key] for key, short in names.items()}


def _holds_weights(content: Any) -> bool:
    return isinstance(content, Mapping) and bool(content) and all(isinstance(one, Tensor) for one in content.values())
