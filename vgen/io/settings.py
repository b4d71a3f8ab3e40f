"""Settings of scripts: a documented dataclass, read from YAML and the command line."""

from __future__ import annotations

import sys
from dataclasses import fields
from typing import TYPE_CHECKING, Any, TypeVar, get_type_hints

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

SettingsT = TypeVar("SettingsT")
FLAGS = {
    "steps": "num_inference_steps",
    "guidance": "guidance_scale",
    "history-guidance": "history_guidance_scale",
    "negative": "negative_prompt",
}
"""Short names of settings on the command line, in `vgen` and in scripts."""
REPEATABLE = ("lora",)
"""Lists whose option appends one value."""


def parse_settings(settings: type[SettingsT], description: str | None, args: list[str] | None = None) -> SettingsT:
    """Reads `--config file.yaml` and `--name value` overrides; `--help` shows the documentation of every field.

    Args:
        settings: A dataclass.
        description: Description of the script.
        args: Command-line arguments; `None` uses those of the process.
    """
    from jsonargparse import ActionYesNo, ArgumentParser, set_parsing_settings  # `vgen` does without its import

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
    words = sys.argv[1:] if args is None else args
    values = parser.parse_args([_full_name(word, parser) for word in words]).as_dict()
    values.pop("config")
    return settings(**values)


def _full_name(word: str, parser: ArgumentParser) -> str:
    """A command-line word, with the full name of the setting that it sets."""
    flag, equals, value = word.partition("=")
    name = FLAGS.get(flag[2:], flag[2:]) if flag.startswith("--") else ""
    if f"--{name}" not in parser._option_string_actions:
        return word
    return f"--{name}{'+' if name in REPEATABLE else ''}{equals}{value}"
