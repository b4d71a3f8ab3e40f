"""Strict loading of weights: safetensors only, and every key must match the config."""

from __future__ import annotations

import itertools
import math
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from vgen.io.errors import loading, one_line
from vgen.io.records import read_json

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
NO_PARALLELISM = (
    "context and tensor parallelism are not supported, because noise levels, frame groups and states belong to whole "
    "frames; to use several devices, distribute the videos over processes"
)


class StrictLoading:
    """Rejects pickled weights, weights that do not match the config, saving with LoRA layers, and model parallelism.

    A mixin that must precede diffusers' `ModelMixin` in the list of base classes.
    """

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """Loads a network as diffusers does, but strictly.

        Args:
            pretrained_model_name_or_path: A folder or Hub id.
            kwargs: Further arguments of diffusers' `from_pretrained`.

        Raises:
            ValueError: The weights are pickled, or keys are missing or unexpected (the error names them). Or
                `parallel_config` is given.
        """
        if kwargs.pop("parallel_config", None) is not None:
            raise ValueError(NO_PARALLELISM)
        load = super().from_pretrained  # type: ignore[misc]
        return load_strictly(load, cls.__name__, pretrained_model_name_or_path, **kwargs)

    @wraps(ModelMixin.save_pretrained, assigned=())  # pipelines look up which arguments it has
    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """Saves a network as diffusers does.

        Args:
            save_directory: Folder to write to.
            args: Further arguments of diffusers' method.
            kwargs: The same by name.

        Raises:
            ValueError: The network has LoRA layers.
        """
        check_no_adapters(self, type(self).__name__)  # type: ignore[arg-type]
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]

    def enable_parallelism(self, *args: Any, **kwargs: Any) -> None:
        """Not supported.

        Raises:
            ValueError: Always.
        """
        raise ValueError(NO_PARALLELISM)


def load_strictly(load: Callable, name: str, source: Any, **kwargs: Any) -> Any:
    """Loads a network with a `from_pretrained` method of diffusers or transformers, from safetensors only.

    Args:
        load: The `from_pretrained` of the class.
        name: Name of the class, for errors.
        source: A folder or Hub id.
        kwargs: Further arguments of `load`.

    Raises:
        ValueError: The weights are pickled, keys are missing or unexpected (the error names them), a weight is NaN or
            infinite, or the config describes a network that is much larger than the files of weights.
    """
    folder = Path(str(source)) / (kwargs.get("subfolder") or "")
    check_not_pickled(folder)
    wants_info = kwargs.pop("output_loading_info", False)
    if kwargs.get("use_safetensors") is None:
        kwargs["use_safetensors"] = True
    if not kwargs["use_safetensors"]:
        raise ValueError(
            f"use_safetensors must be True, because pickles can run code, got {kwargs['use_safetensors']!r}"
        )
    config = folder / "config.json"
    settings = read_json(config) if config.is_file() else {}
    files = _weight_files(folder, kwargs.get("variant"))
    try:
        with loading(folder), _bounded(settings, config, files) if files else nullcontext():
            model, info = load(source, output_loading_info=True, **kwargs)
    except ValueError as error:
        if str(folder) in str(error):
            raise
        raise ValueError(f"{folder}: {one_line(str(error))}") from error
    problems = {kind: sorted(map(str, info[kind])) for kind in ("missing_keys", "unexpected_keys") if info[kind]}
    if problems:
        details = "; ".join(f"{kind.replace('_', ' ')}: {shorten(keys)}" for kind, keys in problems.items())
        raise ValueError(f"the weights of {name} in {folder} do not match its config: {details}")
    check_finite(model, f"{name} in {folder}")
    return (model, info) if wants_info else model


@contextmanager
def _bounded(settings: dict[str, Any], config: Path, files: Iterable[Path]) -> Iterator[None]:
    """Stops the construction of a network that is much larger than its files, which could take all time and memory.

    A network may be somewhat larger: one stored number may hold several quantized weights, and layers may be tied.

    Args:
        settings: The content of the config.
        config: Path of the config.
        files: The files of weights.

    Raises:
        ValueError: The config describes such a network. The error names the largest setting.
    """
    counts = [math.prod(shape) for file in files for _, shape in _stored(file)]
    most_tensors, most_numbers = 2 * len(counts) + 100, 16 * sum(counts) + 2**24
    largest, name = max(_integers(settings), default=(0, ""))
    error = ValueError(
        f"{config} describes a much larger network than the {sum(counts)} numbers in {len(counts)} tensors that are "
        f"stored next to it: check {name}={largest}"
    )
    if largest > most_numbers:
        raise error
    thread, tensors = threading.get_ident(), itertools.count(1)

    def check(module: nn.Module, name: str, weight: Tensor | None) -> None:
        if weight is None or threading.get_ident() != thread:
            return
        if weight.numel() > most_numbers or next(tensors) > most_tensors:
            raise error

    hook = register_module_parameter_registration_hook(check)
    try:
        yield
    finally:
        hook.remove()


def _integers(value: Any, name: str = "") -> Iterator[tuple[int, str]]:
    """All integers in a JSON value, each with the name of its setting."""
    if isinstance(value, dict):
        for key, part in value.items():
            yield from _integers(part, f"{name}.{key}" if name else key)
    elif isinstance(value, list):
        for part in value:
            yield from _integers(part, name)
    elif type(value) is int:
        yield value, name


def check_no_adapters(network: nn.Module, name: str) -> None:
    """Checks that the weights of a network have the names that its class expects, and not those of LoRA layers.

    Raises:
        ValueError: It has LoRA layers. The error names the methods to call.
    """
    if any(part.endswith(".base_layer") for part, _ in network.named_modules()):
        raise ValueError(
            f"{name} has LoRA layers, which cannot be saved in it: call unload_lora_weights() on the pipeline (after "
            "fuse_lora() to keep their effect); save_lora_weights() saves them on their own"
        )


def check_finite(network: nn.Module, name: str) -> None:
    """Checks the weights of a network, which costs one pass over their memory. Quantized weights are not checked.

    Raises:
        ValueError: A weight is NaN or infinite. The error names it.
    """
    for key, weight in network.state_dict().items():
        if type(weight) is Tensor and weight.is_floating_point() and weight.device.type != "meta" and weight.numel():
            values = weight.half() if weight.itemsize == 1 else weight  # float8 has no kernel
            if not torch.stack(values.aminmax()).isfinite().all():
                raise ValueError(f"{key} of {name} is NaN or infinite: the file is damaged, or its training diverged")


def check_variant(folder: Path, components: Iterable[str], variant: str) -> None:
    """Checks that all components of a pipeline that have weights have those of a variant, such as `fp16`.

    Args:
        folder: Folder of the pipeline.
        components: Names of the components to load.
        variant: Name of the variant.

    Raises:
        ValueError: Some components do not have it. The error names them.
    """
    weighted = [name for name in components if any((folder / name).glob("*.safetensors"))]
    missing = sorted(name for name in weighted if not _weight_files(folder / name, variant))
    if missing:
        raise ValueError(
            f"{folder} has no weights of variant={variant!r} for {', '.join(missing)}: pass "
            "these components, or load without variant"
        )


def parse_dtype(name: str) -> torch.dtype:
    """The floating-point data type of a name, such as `bfloat16`.

    Raises:
        ValueError: There is none of this name.
    """
    dtype = getattr(torch, name.removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"dtype must be 'auto' or a floating-point type such as 'bfloat16', got {name!r}")
    return dtype


def stored_dtypes(folder: Path, components: Iterable[str], variant: str | None = None) -> dict[str, torch.dtype]:
    """The data type of the weights of each component of a pipeline: that of most of its numbers.

    Args:
        folder: Folder of the pipeline.
        components: Names of the components; those without weights are left out.
        variant: Name of the variant whose weights are loaded.
    """
    found = {}
    for name in components:
        sizes: Counter[str] = Counter()
        for path in _weight_files(folder / name, variant):
            for dtype, shape in _stored(path):
                sizes[dtype] += math.prod(shape)
        dtypes = {kind: _DTYPES[kind] for kind in sizes if kind in _DTYPES}
        if dtypes:
            found[name] = dtypes[max(dtypes, key=lambda kind: sizes[kind])]
    return found


def _stored(path: Path) -> Iterator[tuple[str, list[int]]]:
    """The data type and the shape of each tensor in a safetensors file."""
    with safe_open(path, framework="pt") as file:
        for key in file.keys():  # noqa: SIM118
            part = file.get_slice(key)
            yield part.get_dtype(), part.get_shape()


def _weight_files(folder: Path, variant: str | None) -> list[Path]:
    """The files of a network's weights: those of a variant, or those of none."""
    files = list(folder.glob("*.safetensors"))
    if variant is None:
        return [path for path in files if "." not in path.stem]
    return [path for path in files if f".{variant}." in path.name or f".{variant}-" in path.name]


def check_not_pickled(folder: Path) -> None:
    """Checks that a local folder has weights in safetensors if it has any. Other sources are not checked.

    Raises:
        ValueError: The folder has pickled weights only. The error names a file.
    """
    if not folder.is_dir() or any(folder.glob("*.safetensors")):
        return
    pickled = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLED)
    if pickled:
        raise ValueError(f"weights must be safetensors, got {folder / pickled[0]}, which is a pickle and can run code")


def shorten(keys: list[str], limit: int = 8) -> str:
    """Names in one line: the first ones and the number of others."""
    more = f" and {len(keys) - limit} more" if len(keys) > limit else ""
    return ", ".join(keys[:limit]) + more
