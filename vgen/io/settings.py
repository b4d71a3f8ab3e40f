"""Settings of scripts: a documented dataclass, read from YAML and the command line."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, TypeVar, get_type_hints

from jsonargparse import ActionYesNo, ArgumentParser, set_parsing_settings

SettingsT = TypeVar("SettingsT")


def parse_settings(settings: type[SettingsT], description: str | None, args: list[str] | None = None) -> SettingsT:
    """Reads `--config file.yaml` and `--name value` overrides; `--help` shows the documentation of every field.

    Args:
        settings: A dataclass.
        description: Description of the script.
        args: Command-line arguments; `None` uses those of the process.
    """
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    # a script cannot resolve the names in annotations that it inherits
    settings.__init__.__annotations__.update(get_type_hints(settings))
    parser = ArgumentParser(description=description)
    parser.add_argument("--config", action="config", help="settings in YAML; options after it override them")
    names: Any = {field.name for field in fields(settings)}  # type: ignore[arg-type]
    flags = {"dry_run"} & names
    parser.add_class_arguments(settings, skip=flags)
    for name in flags:
        parser.add_argument(f"--{name}", action=ActionYesNo, default=False, help="print the settings and stop")
    values = parser.parse_args(args).as_dict()
    values.pop("config")
    return settings(**values)
