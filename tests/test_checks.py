"""Checks name the argument, what is allowed and what was given, in one line."""

from typing import Literal

import numpy as np
import pytest

from vgen.checks import check_choice, check_integer, check_number


def test_whole_numbers():
    for value in (0, 3, np.int64(3)):
        check_integer("n", value, least=0)
    for value, message in (
        (3.0, "n must be a whole number, got 3.0"),
        (True, "n must be a whole number, got True"),
        ("3", "n must be a whole number, got '3'"),
        (None, "n must be a whole number, got None"),
        (float("nan"), "n must be a whole number, got nan"),
        (-1, "n must be at least 0, got -1"),
    ):
        with pytest.raises(ValueError) as error:
            check_integer("n", value, least=0)
        assert str(error.value) == message


def test_numbers():
    for value in (0, 0.5, np.float32(0.5)):
        check_number("x", value, least=0, below=1)
    check_number("x", 1e9, above=0)
    for value, message in (
        ("1", "x must be a finite number, got '1'"),
        (float("nan"), "x must be a finite number, got nan"),
        (float("inf"), "x must be a finite number, got inf"),
        (False, "x must be a finite number, got False"),
        (1, "x must be at least 0 and below 1, got 1"),
        (-0.5, "x must be at least 0 and below 1, got -0.5"),
    ):
        with pytest.raises(ValueError) as error:
            check_number("x", value, least=0, below=1)
        assert str(error.value) == message
    with pytest.raises(ValueError, match="x must be above 0, got 0"):
        check_number("x", 0, above=0)


def test_choices():
    for choices in (Literal["a", "b"], ("a", "b")):
        check_choice("kind", "b", choices)
        for value in ("c", None, 3, ["a"]):
            with pytest.raises(ValueError, match="kind must be one of a, b, got"):
                check_choice("kind", value, choices)
