"""The options of `vgen train`. torch is not imported, so that help and wrong options are fast."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from vgen.checks import check_choice, check_number
from vgen.data.formats import VIDEO_SUFFIXES
from vgen.hub import locate

Preset = Literal["laptop", "gpu-8gb", "gpu-24gb", "gpu-80gb", "gpu-8x80gb"]
Stage = Literal["data", "vae", "latents", "text", "denoiser", "evaluation", "report"]
TrainOnly = Literal["all", "temporal", "lora"]
STAGES: tuple[Stage, ...] = get_args(Stage)


@dataclass(kw_only=True)
class TrainOptions:
    """What `vgen train` is asked for."""

    data: str
    """A folder of videos or another source of `vgen.data.sources.open_clips`."""
    output: Path
    """Folder of the run."""
    preset: Preset | None = None
    """Sizes and settings of all stages; by default those for this machine."""
    minutes: float | None = None
    """Time limit of the whole run."""
    held_out: str | None = None
    """Source of held-out videos; by default a tenth of the videos."""
    vae: str | None = None
    """Pretrained VAE, instead of training one: a packaged checkpoint, a folder, or a Hub id."""
    text_encoder: str | None = None
    """Pretrained text encoder, instead of a small one for the captions that exist."""
    init: str | None = field(default=None, metadata={"flag": "from"})
    """Pipeline to fine-tune, with its VAE and text encoder."""
    train_only: TrainOnly = "all"
    """Weights to fine-tune: `all`, `temporal` layers, or `lora` adapters."""
    changes: list[str] = field(default_factory=list, metadata={"flag": "set"})
    """STAGE.NAME=VALUE: override a setting of a stage's script, or of `clip`; can be repeated."""

    def check(self) -> None:
        """Checks the options.

        Raises:
            ValueError: An option is out of range, or two of them exclude each other.
            OSError: A folder does not exist or cannot be written.
        """
        if self.preset is not None:
            check_choice("preset", self.preset, Preset)
        check_choice("train_only", self.train_only, TrainOnly)
        if self.minutes is not None:
            check_number("minutes", self.minutes, above=0)
        if self.init is None and self.train_only != "all":
            raise ValueError(f"--train-only {self.train_only} needs a model to fine-tune: pass --from MODEL")
        if self.init is not None and (self.vae or self.text_encoder):
            raise ValueError(
                "--from keeps the VAE and the text encoder of its model: leave out --vae and --text-encoder"
            )
        if self.train_only == "lora" and find_spec("peft") is None:
            raise ImportError("--train-only lora needs peft: pip install vgen[lora]")
        for source in filter(None, (self.data, self.held_out)):
            if self.output.resolve().is_relative_to(Path(source).resolve()):
                raise ValueError(
                    f"the run {self.output} would be inside of {source}: pass --output, a folder elsewhere"
                )
        for text in self.changes:
            parse_change(text)
        for source in filter(None, (self.data, self.held_out)):
            check_source(source)
        for model in filter(None, (self.init, self.vae, self.text_encoder)):
            locate(model)
        check_writable(self.output)


def check_packages() -> None:
    """Checks that the packages of all stages are installed.

    Raises:
        ImportError: Some are not.
    """
    missing = [name for name in ("kornia", "cv2", "jinja2", "matplotlib", "scipy") if find_spec(name) is None]
    if missing:
        raise ImportError(f"vgen train needs {', '.join(missing)}: pip install 'vgen[data,evaluation]'")


def check_source(data: str) -> None:
    """Checks that a source that can only be a folder exists, before anything slow.

    Raises:
        FileNotFoundError: It does not.
    """
    if ":" not in data and not Path(data).exists():
        raise FileNotFoundError(f"there is no folder {data}")
    if Path(data).is_file() and Path(data).suffix.lower() in VIDEO_SUFFIXES:
        raise FileNotFoundError(f"{data} is a video: pass the folder that it is in")


def check_writable(folder: Path) -> None:
    """Checks that a folder, or the one that it will be in, can be written.

    Raises:
        OSError: It cannot.
    """
    existing = next(one for one in (folder.absolute(), *folder.absolute().parents) if one.exists())
    if not existing.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "is a file, not a folder", str(existing))
    if not os.access(existing, os.W_OK):
        raise PermissionError(errno.EACCES, "no permission to write here", str(existing))


def parse_change(text: str) -> tuple[str, str, Any]:
    """Splits STAGE.NAME=VALUE.

    Raises:
        ValueError: It has another form, or there is no such stage.
    """
    name, equals, value = text.partition("=")
    stage, dot, setting = name.partition(".")
    if not (equals and dot and setting):
        raise ValueError(f"--set must be STAGE.NAME=VALUE, such as vae.max_steps=2000, got {text!r}")
    check_choice("the stage of --set", stage, ("clip", *STAGES[:-1]))
    try:
        return stage, setting, yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ValueError(f"--set {name}: {value!r} is not YAML") from error
