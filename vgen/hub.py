"""Resolves names of pipelines (packaged names, folders, Hub ids), and registers pipelines with diffusers."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from functools import partial
from importlib import import_module, resources
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from typing import Any

CHECKPOINTS = Path(str(resources.files("vgen"))) / "checkpoints"
PREFIX = "vgen/"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def find_checkpoint(name: str | Path) -> Path | str:
    """Resolves a name to the folder of a packaged checkpoint, a local folder, or a Hub id.

    Raises:
        ValueError: There is no such checkpoint, or the folder contains no pipeline.
    """
    source = locate(name)
    if isinstance(source, Path) and not (source / "model_index.json").is_file():
        if source.is_file():
            raise ValueError(f"{source} is a file, expected the folder of a pipeline")
        if find_packaged(str(name)) is not None:
            raise ValueError(f"{name} is no pipeline; those in the package are {', '.join(packaged_checkpoints())}")
        raise ValueError(f"{source} contains no pipeline: it has no model_index.json")
    return source


def locate(name: str | Path) -> Path | str:
    """Resolves a name to a packaged checkpoint or another path that exists, or to a Hub id, without its content.

    Raises:
        ValueError: There is none.
    """
    text = str(name)
    if (packaged := find_packaged(text)) is not None:
        return packaged
    path = Path(text).expanduser()
    if path.exists():
        return path
    if text.startswith(PREFIX) or not is_hub_id(text):
        raise ValueError(not_found(text))
    return text


def is_hub_id(name: str) -> bool:
    """Whether a name that is no existing path is one of the Hub, `owner/name`: no folder `owner` exists here.

    `runs/name` is never one, because training writes to the folder `runs`.
    """
    owner = name.split("/")[0]
    return _HUB_ID.fullmatch(name) is not None and owner != "runs" and not Path(owner).is_dir()


def find_packaged(name: str) -> Path | None:
    """The folder of a packaged checkpoint, whose name starts with `vgen/`; `None` if there is none of that name."""
    folder = CHECKPOINTS / name.removeprefix(PREFIX)
    return folder if name.startswith(PREFIX) and folder.is_dir() else None


def packaged_checkpoints() -> list[str]:
    """Names of the checkpoints that ship with the package."""
    return sorted(PREFIX + path.parent.name for path in CHECKPOINTS.glob("*/model_index.json"))


def not_found(name: str) -> str:
    """Error message for a checkpoint that does not exist."""
    packaged = ", ".join(packaged_checkpoints()) or "none"
    if not name.startswith(PREFIX) and not is_hub_id(name) and re.search(r"[/\\]", name):
        return f"no such folder: {name} (in {Path.cwd()}; packaged checkpoints: {packaged})"
    return f"no model {name!r}: it is neither a packaged checkpoint ({packaged}) nor a folder in {Path.cwd()}"


def extend_diffusers(homes: dict[str, str]) -> None:
    """Makes classes known to diffusers without importing them.

    Afterwards, `DiffusionPipeline.from_pretrained` and `AutoModel.from_pretrained` find them by name, and download
    them from the Hub. If diffusers is not imported yet, this takes effect when it is.

    Args:
        homes: The module of each class, by name.
    """
    actions = {"diffusers": _add_classes, "diffusers.pipelines.pipeline_loading_utils": _allow_loading}
    for name, act in actions.items():
        if name in sys.modules:
            act(sys.modules[name], homes)
        else:
            sys.meta_path.insert(0, _AfterImport(name, partial(act, homes=homes)))


def _add_classes(module: Any, homes: dict[str, str]) -> None:
    """Lets diffusers find the classes by name: they are imported when it asks for them, as its own are."""
    if hasattr(module, "_objects"):
        module._objects = _Classes(module._objects, homes)
    else:
        for name, home in homes.items():
            setattr(module, name, getattr(import_module(home), name))


def _allow_loading(module: Any, homes: dict[str, str]) -> None:
    """Lets diffusers import the modules of components that a `model_index.json` names."""
    for name, home in homes.items():
        module.LOADABLE_CLASSES[home] = {name: ["save_pretrained", "from_pretrained"]}


class _Classes(dict):
    """Objects of diffusers, and classes that are imported on demand."""

    def __init__(self, objects: dict[str, Any], homes: dict[str, str]):
        super().__init__({**objects, **homes})
        self._homes = homes

    def __getitem__(self, name: str) -> Any:
        value = super().__getitem__(name)
        return getattr(import_module(value), name) if name in self._homes else value


class _AfterImport(MetaPathFinder):
    """Calls a function with a module once the module has been imported."""

    def __init__(self, name: str, act: Callable[[Any], None]):
        self._name, self._act = name, act

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if fullname != self._name or self not in sys.meta_path:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader
            execute = loader.exec_module

            def exec_module(module: Any) -> None:
                execute(module)
                self._act(sys.modules[fullname])

            loader.exec_module = exec_module
        return spec
