"""Checks of arguments: one clear line that names the argument, what is allowed and what was given."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any, get_args


def check_integer(name: str, value: Any, *, least: int | None = None) -> None:
    """Checks a whole number.

    Args:
        name: Of the argument, for the error.
        value: What was given.
        least: Smallest allowed value.

    Raises:
        ValueError: The value is not a whole number (`True` and `64.0` are not), or is too small.
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise ValueError(f"{name} must be a whole number, got {value!r}")
    if least is not None and value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def check_number(
    name: str, value: Any, *, least: float | None = None, above: float | None = None, below: float | None = None
) -> None:
    """Checks a finite number.

    Args:
        name: Of the argument, for the error.
        value: What was given.
        least: Smallest allowed value.
        above: The value must be greater than this.
        below: The value must be smaller than this.

    Raises:
        ValueError: The value is not a finite number, or is out of range.
    """
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, got {value!r}")
    limits = [
        f"{word} {limit:g}"
        for word, limit in (("at least", least), ("above", above), ("below", below))
        if limit is not None
    ]
    if (
        (least is not None and float(value) < least)
        or (above is not None and float(value) <= above)
        or (below is not None and float(value) >= below)
    ):
        raise ValueError(f"{name} must be {' and '.join(limits)}, got {value}")


def check_choice(name: str, value: Any, choices: Any) -> None:
    """Checks one of a few strings.

    Args:
        name: Of the argument, for the error.
        value: What was given.
        choices: A `Literal` type, or the strings.

    Raises:
        ValueError: The value is none of them.
    """
    allowed = get_args(choices) or tuple(choices)
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(str, allowed))}, got {value!r}")
