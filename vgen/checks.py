"""Checks of arguments whose errors are one line: what is allowed and what was given.

They are in the lowest layer, so every module can use them.
"""

from __future__ import annotations

import math
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


def shown(value: Any) -> str:
    """A value in one short line, for an error."""
    if hasattr(value, "shape"):
        return f"{type(value).__name__} of shape {tuple(value.shape)}"
    text = " ".join(repr(value).split())
    return text if len(text) <= 100 else f"{text[:97]}..."


def check_type(name: str, value: object, types: Any, expected: str) -> None:
    """Checks the type of an argument.

    Args:
        name: Name of the argument, for the error.
        value: What the caller passed.
        types: A type or a tuple of types.
        expected: Describes them in the error: "a tensor (b, l, d)".

    Raises:
        ValueError: `value` has another type.
    """
    if not isinstance(value, types):
        raise ValueError(f"{name} must be {expected}, got {shown(value)}")


def check_choice(name: str, value: object, choices: Any) -> None:
    """Checks an option with a small set of values.

    Args:
        name: Name of the argument, for the error.
        value: What the caller passed.
        choices: A `Literal` type that lists the allowed values, or a sequence of them.

    Raises:
        ValueError: `value` is not one of them.
    """
    allowed = get_args(choices) or tuple(choices)
    if not any(type(value) is type(choice) and value == choice for choice in allowed):
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {shown(value)}")


def check_choices(name: str, values: Any, choices: Any) -> None:
    """Checks a sequence of options; see `check_choice`.

    Raises:
        ValueError: `values` is not a sequence, or one of its entries is not allowed.
    """
    if isinstance(values, str) or not hasattr(values, "__iter__"):
        raise ValueError(
            f"{name} must be a sequence of {', '.join(map(repr, get_args(choices)))}, got {shown(values)}"
        )
    for value in values:
        check_choice(f"each of {name}", value, choices)


def check_weights(name: str, weights: Any, choices: Any) -> None:
    """Checks the probability weights of some choices: `{"leading": 1.0, "none": 3.0}`.

    Args:
        name: Name of the argument, for the error.
        weights: What the caller passed.
        choices: A `Literal` type that lists the allowed keys.

    Raises:
        ValueError: `weights` is not such a dictionary, or no weight is positive.
    """
    allowed = ", ".join(get_args(choices))
    if not isinstance(weights, dict) or not weights or set(weights) - set(get_args(choices)):
        raise ValueError(f"{name} must be a dictionary with weights for some of {allowed}, got {shown(weights)}")
    for choice, weight in weights.items():
        check_number(f"{name}[{choice!r}]", weight, minimum=0)
    if not any(weights.values()):
        raise ValueError(f"{name} must have a positive weight, got {weights}")


def check_literals(settings: Any) -> None:
    """Checks all fields of a dataclass whose type is a `Literal`, or a `Literal` or `None`.

    Raises:
        ValueError: A field has a value that is not allowed.
    """
    for name, hint in get_type_hints(type(settings)).items():
        options = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
        literals = [one for one in options if get_origin(one) is Literal]
        value = getattr(settings, name)
        if literals and not (value is None and NoneType in options):
            check_choice(name, value, literals[0])


def check_integer(name: str, value: object, minimum: int | None = None, maximum: int | None = None) -> None:
    """Checks a count or an index. Booleans and floats such as 64.0 are rejected.

    Raises:
        ValueError: `value` is not an integer, or is out of range.
    """
    is_integer = isinstance(value, Integral) and not isinstance(value, bool)
    if not is_integer or not _in_range(value, minimum, maximum):
        raise ValueError(f"{name} must be an integer{_describe_range(minimum, maximum)}, got {shown(value)}")


def check_number(
    name: str,
    value: object,
    minimum: float | None = None,
    maximum: float | None = None,
    *,
    above: float | None = None,
    below: float | None = None,
) -> None:
    """Checks a finite real number. Booleans, strings and NaN are rejected.

    Args:
        name: Name of the argument, for the error.
        value: What the caller passed.
        minimum: Smallest allowed value.
        maximum: Largest allowed value.
        above: The value must be greater than this.
        below: The value must be smaller than this.

    Raises:
        ValueError: `value` is not a finite number, or is out of range.
    """
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    limits = (minimum, maximum, above, below)
    if not is_number or not math.isfinite(value) or not _in_range(value, *limits):  # type: ignore[arg-type]
        raise ValueError(f"{name} must be a finite number{_describe_range(*limits)}, got {shown(value)}")


def _in_range(
    value: Any,
    minimum: float | None,
    maximum: float | None,
    above: float | None = None,
    below: float | None = None,
) -> bool:
    return (
        (minimum is None or value >= minimum)
        and (maximum is None or value <= maximum)
        and (above is None or value > above)
        and (below is None or value < below)
    )


def _describe_range(
    minimum: float | None, maximum: float | None, above: float | None = None, below: float | None = None
) -> str:
    if minimum is not None and maximum is not None:
        return f" from {minimum:g} to {maximum:g}"
    limits = (("of at least", minimum), ("of at most", maximum), ("above", above), ("below", below))
    parts = [f"{words} {limit:g}" for words, limit in limits if limit is not None]
    return f" {' and '.join(parts)}" if parts else ""
