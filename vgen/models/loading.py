"""Loading that never guesses: weights fit their config to the last key, or an error names what does not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
NO_PARALLELISM = (
    "context and tensor parallelism are not served: they would split the tokens, heads or channels of a video between "
    "devices, but not the noise levels, groups and states that belong to whole frames; share out videos instead"
)


class StrictLoading:
    """Comes before diffusers' `ModelMixin` and refuses weights that do not fit or are pickled, and parallelism."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """Loads as diffusers does, from safetensors only.

        Raises:
            ValueError: The weights are pickled, or keys of weights and config do not agree, which are named; or
                `parallel_config` is given.
        """
        if kwargs.pop("parallel_config", None) is not None:
            raise ValueError(NO_PARALLELISM)
        load = super().from_pretrained  # type: ignore[misc]
        return load_strictly(load, cls.__name__, pretrained_model_name_or_path, **kwargs)

    def enable_parallelism(self, *args: Any, **kwargs: Any) -> None:
        """Always raises: a video is not split between devices.

        Raises:
            ValueError: Says why.
        """
        raise ValueError(NO_PARALLELISM)


def load_strictly(load: Callable, name: str, source: Any, **kwargs: Any) -> Any:
    """What `load`, diffusers' `from_pretrained` of a class of this name, makes of a folder or Hub id.

    Raises:
        ValueError: The weights are pickled, or keys of weights and config do not agree, which are named.
    """
    folder = Path(str(source)) / (kwargs.get("subfolder") or "")
    refuse_pickles(folder)
    wants_info = kwargs.pop("output_loading_info", False)
    if kwargs.get("use_safetensors") is None:
        kwargs["use_safetensors"] = True
    if not kwargs["use_safetensors"]:
        raise ValueError("use_safetensors=False asks for a pickle, which can run code: only safetensors are loaded")
    model, info = load(source, output_loading_info=True, **kwargs)
    problems = {kind: sorted(map(str, info[kind])) for kind in ("missing_keys", "unexpected_keys") if info[kind]}
    if problems:
        told = "; ".join(f"{kind.replace('_', ' ')}: {_shorten(keys)}" for kind, keys in problems.items())
        raise ValueError(f"the weights of {name} in {folder} do not fit its config: {told}")
    return (model, info) if wants_info else model


def refuse_pickles(folder: Path) -> None:
    """Raises where a local folder's weights are pickled and nothing else.

    Raises:
        ValueError: Names the file.
    """
    if not folder.is_dir() or any(folder.glob("*.safetensors")):
        return
    pickled = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLED)
    if pickled:
        raise ValueError(f"{folder / pickled[0]} is a pickle, which can run code: only safetensors are loaded")


def _shorten(keys: list[str], most: int = 8) -> str:
    more = f" and {len(keys) - most} more" if len(keys) > most else ""
    return ", ".join(keys[:most]) + more
