"""Checks of arguments: what passes, and the line that tells what is allowed."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import pytest

from vgen.checks import check_choice, check_choices, check_integer, check_literals, check_number, check_weights

Color = Literal["red", "blue"]


def test_allowed_values_pass():
    check_choice("color", "red", Color)
    check_choices("colors", ("red", "blue"), Color)
    check_choices("colors", [], Color)
    check_integer("count", 0, minimum=0)
    check_integer("count", np.int64(3), minimum=3, maximum=3)
    check_number("share", 0.5, 0, 1)
    check_number("share", np.float32(1.0), 0, 1)
    check_number("rate", 8)


@pytest.mark.parametrize("value", ["green", "Red", None, 1, ["red"], np.array(["red", "blue"])])
def test_other_choices_are_rejected(value):
    with pytest.raises(ValueError, match="^color must be one of 'red', 'blue', got "):
        check_choice("color", value, Color)


@pytest.mark.parametrize("values", ["red", None, 3, ("red", "green"), [["red"]]])
def test_other_sequences_of_choices_are_rejected(values):
    with pytest.raises(ValueError, match="colors must be (a sequence|one) of 'red', 'blue', got "):
        check_choices("colors", values, Color)


@pytest.mark.parametrize("value", [2.0, "2", None, True, (2,), float("nan"), 0, 5, np.float64(2)])
def test_other_integers_are_rejected(value):
    with pytest.raises(ValueError, match="^count must be an integer from 1 to 4, got "):
        check_integer("count", value, 1, 4)


@pytest.mark.parametrize("value", ["2", None, False, (2,), float("nan"), float("inf"), -1, 1j])
def test_other_numbers_are_rejected(value):
    with pytest.raises(ValueError, match="^rate must be a finite number of at least 0, got "):
        check_number("rate", value, 0)


@pytest.mark.parametrize("value", [0, 0.0, 1, 1.5])
def test_limits_may_be_excluded(value):
    check_number("noise", 0.5, above=0, below=1)
    with pytest.raises(ValueError, match="^noise must be a finite number above 0 and below 1, got "):
        check_number("noise", value, above=0, below=1)
    check_number("level", 0.0, 0, below=1)
    with pytest.raises(ValueError, match="^level must be a finite number of at least 0 and below 1, got "):
        check_number("level", -0.5, 0, below=1)


def test_choices_may_be_a_sequence():
    check_choice("mode", "full", ("full", "causal"))
    with pytest.raises(ValueError, match="^mode must be one of 'full', 'causal', got 'chunk'"):
        check_choice("mode", "chunk", ("full", "causal"))


@dataclass
class Settings:
    color: Color = "red"
    other: Color | None = None
    name: str = "any"


def test_fields_of_a_literal_type_are_checked():
    check_literals(Settings())
    check_literals(Settings(other="blue", name="green"))
    for wrong in ({"color": "green"}, {"other": "green"}, {"color": None}):
        with pytest.raises(ValueError, match=f"^{next(iter(wrong))} must be one of 'red', 'blue', got "):
            check_literals(Settings(**wrong))


def test_weights_of_choices_are_numbers_and_one_is_positive():
    check_weights("colors", {"red": 0, "blue": 0.5}, Color)
    for wrong, message in (
        (["red"], "must be a dictionary with weights for some of red, blue, got "),
        ({}, "must be a dictionary"),
        ({"green": 1.0}, "must be a dictionary"),
        ({"red": 0.0}, "must have a positive weight, got "),
    ):
        with pytest.raises(ValueError, match=f"^colors {message}"):
            check_weights("colors", wrong, Color)
    for wrong in (-1.0, "1", float("nan"), None):
        with pytest.raises(ValueError, match=r"^colors\['red'\] must be a finite number of at least 0, got "):
            check_weights("colors", {"red": wrong}, Color)
