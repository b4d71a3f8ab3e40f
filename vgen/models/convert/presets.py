"""Presets of public checkpoints: how to sample them, as data in `presets.yaml`."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from vgen.checks import check_type

PRESETS = Path(__file__).with_name("presets.yaml")


@dataclass(frozen=True, kw_only=True)
class CheckpointPreset:
    """What a public checkpoint needs besides its weights."""

    about: str
    source: str
    """Hub id and file."""
    license: str
    """License of the weights."""
    base: str
    """The pipeline that has its text encoder, tokenizer and VAE."""
    network: dict[str, Any]
    """Sizes that the weights must have."""
    scheduler: dict[str, Any]
    """The diffusers `class` and its settings."""
    denoiser: dict[str, Any]
    """Settings of the network that no weight shows."""
    pipeline: dict[str, Any]
    """Defaults of the pipeline."""
    rollout: dict[str, Any]
    """Defaults of rollouts."""
    needs: dict[str, float] = field(default_factory=dict)
    """GiB in bfloat16 of all `weights`, and for a video of the default size with all weights on the device (`memory`)
    or with one network at a time (`offloaded`)."""


def read_presets(path: Path = PRESETS) -> dict[str, CheckpointPreset]:
    """All presets of a file, by name.

    Raises:
        ValueError: The file is malformed, or a preset lacks an entry or has an unknown one.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is malformed: {' '.join(str(error).split())}") from error
    check_type(str(path), content, dict, "presets by name")
    optional = {"needs"}
    names = {one.name for one in fields(CheckpointPreset)} - optional
    for name, entries in content.items():
        check_type(f"{path}: {name}", entries, dict, "settings by name")
        if wrong := sorted(names ^ (set(entries) - optional)):
            raise ValueError(
                f"{path}: {name} must have exactly the entries {', '.join(sorted(names))}; see {wrong[0]}"
            )
    return {name: CheckpointPreset(**entries) for name, entries in content.items()}


def find_preset(name: str) -> CheckpointPreset:
    """A preset by name, or the only one in a YAML file of one's own.

    Raises:
        ValueError: There is no such preset.
    """
    if name.endswith((".yaml", ".yml")) and Path(name).is_file():
        own = list(read_presets(Path(name)).values())
        if len(own) != 1:
            raise ValueError(f"{name} must have one preset, got {len(own)}")
        return own[0]
    presets = read_presets()
    if name not in presets:
        raise ValueError(f"--preset must be one of {', '.join(presets)}, or a YAML file with one preset, got {name!r}")
    return presets[name]
