"""Settings of scripts: a documented dataclass, read from YAML and the command line."""

from __future__ import annotations

import re
import sys
from argparse import RawDescriptionHelpFormatter
from dataclasses import fields
from difflib import get_close_matches
from typing import Any, NoReturn, TypeVar, get_type_hints

import yaml
from jsonargparse import (
    ActionYesNo,
    ArgumentParser,
    DefaultHelpFormatter,
    get_loader,
    set_loader,
    set_parsing_settings,
)

from vgen.io.errors import one_line
from vgen.io.flags import FLAGS, REPEATABLE

SettingsT = TypeVar("SettingsT")
MAX_DEPTH = 20
"""How deep lists and mappings of settings may be nested."""
_load_yaml = get_loader("yaml")


def did_you_mean(name: str, known: list[str]) -> str:
    """The end of an error about an unknown name: the nearest known one, or nothing."""
    nearest = get_close_matches(name, known, n=1)
    return f": did you mean {nearest[0]}?" if nearest else ""


class _Formatter(RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Keeps the lines of a description, because some are commands."""


class _Parser(ArgumentParser):
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Prints one line instead of the usage of all settings, with the nearest setting to an unknown one."""
        known = [option.removeprefix("--") for option in self._option_string_actions]
        unknown = re.findall(r"(?:unrecognized arguments: --|Option ')(\w+)", message)
        advice = did_you_mean(unknown[0], known) if unknown else ""
        print(f"{self.prog}: {one_line(message)}{advice} (--help lists all settings)", file=sys.stderr)
        raise SystemExit(2)


def parse_settings(settings: type[SettingsT], description: str | None, args: list[str] | None = None) -> SettingsT:
    """Reads `--config file.yaml` and `--name value` overrides; `--help` shows the documentation of every field.

    Args:
        settings: A dataclass.
        description: Description of the script.
        args: Command-line arguments; `None` uses those of the process.
    """
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    set_loader("yaml", _load_bounded, (yaml.YAMLError,))
    # a script cannot resolve the names in annotations that it inherits
    settings.__init__.__annotations__.update(get_type_hints(settings))
    parser = _Parser(description=description, formatter_class=_Formatter, allow_abbrev=False)
    parser.add_argument("--config", action="config", help="settings in YAML; options after it override them")
    names: Any = {field.name for field in fields(settings)}  # type: ignore[arg-type]
    flags = {"dry_run"} & names
    parser.add_class_arguments(settings, skip=flags)
    for name in flags:
        parser.add_argument(f"--{name}", action=ActionYesNo, default=False, help="print the settings and stop")
    words = sys.argv[1:] if args is None else args
    try:
        values = parser.parse_args([_full_name(word, parser) for word in words]).as_dict()
    except UnicodeDecodeError as error:
        parser.error(f"the file of --config is not UTF-8 text: {error}")
    values.pop("config")
    return settings(**values)


def _full_name(word: str, parser: ArgumentParser) -> str:
    """A command-line word, with the full name of the setting that it sets."""
    flag, equals, value = word.partition("=")
    name = FLAGS.get(flag[2:], flag[2:]) if flag.startswith("--") else ""
    if f"--{name}" not in parser._option_string_actions:
        return word
    return f"--{name}{'+' if name in REPEATABLE else ''}{equals}{value}"


def _load_bounded(text: str) -> Any:
    """Loads YAML as jsonargparse does, but no aliases, because a few lines of them expand to more than memory holds.

    Raises:
        yaml.YAMLError: The text is not YAML, has an alias, is nested too deeply, or has a number that is too long.
    """
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if isinstance(event, yaml.AliasEvent):
            raise yaml.YAMLError(f"the alias *{event.anchor} is not supported: write the value out")
        if depth > MAX_DEPTH:
            raise yaml.YAMLError(f"values are nested more than {MAX_DEPTH} levels deep")
    try:
        return _load_yaml(text)
    except ValueError as error:
        raise yaml.YAMLError(str(error)) from error
