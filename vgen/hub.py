"""Resolves names of pipelines (packaged names, folders, Hub ids), and registers pipelines with diffusers."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

CHECKPOINTS = Path(str(resources.files("vgen"))) / "checkpoints"
PREFIX = "vgen/"


def find_checkpoint(name: str | Path) -> Path | str:
    """Resolves a name to the folder of a packaged checkpoint, a local folder, or a Hub id.

    Raises:
        ValueError: There is no such checkpoint, or the folder contains no pipeline.
    """
    text = str(name)
    packaged = find_packaged(text)
    if packaged is not None and (packaged / "model_index.json").is_file():
        return packaged
    folder = Path(text).expanduser()
    if folder.is_dir():
        if not (folder / "model_index.json").is_file():
            raise ValueError(f"{folder} contains no pipeline: it has no model_index.json")
        return folder
    if text.count("/") != 1 or text.startswith((PREFIX, ".", "/", "~")):
        raise ValueError(not_found(text))
    return text


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
    return f"no model {name!r}: it is neither a packaged checkpoint ({packaged}) nor a folder in {Path.cwd()}"


def register(pipeline: type, components: tuple[type[Any], ...]) -> None:
    """Lets diffusers load a pipeline class and its components by name.

    `DiffusionPipeline.from_pretrained` looks up a pipeline's class in the diffusers module, and downloads only
    components from the Hub that it knows how to load.
    """
    import diffusers
    from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES

    setattr(diffusers, pipeline.__name__, pipeline)
    for component in components:
        LOADABLE_CLASSES[component.__module__] = {component.__name__: ["save_pretrained", "from_pretrained"]}
