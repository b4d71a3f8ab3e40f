from dataclasses import dataclass, field
from typing import Any

import pytest

from vgen.io.settings import parse_settings


@dataclass(kw_only=True)
class Settings:
    """Settings."""

    number: float = 0.0
    """A number."""
    text: str = ""
    """Text."""
    augment: dict[str, Any] = field(default_factory=dict)
    """A mapping."""


DOUBLED = "".join(f"  x{i}: &x{i} [{', '.join([f'*x{i - 1}'] * 9)}]\n" for i in range(1, 9))
MALFORMED = {
    "aliases": ("augment:\n  x0: &x0 [a]\n" + DOUBLED, "alias *x0 is not supported"),
    "recursion": ("augment: &a {b: *a}", "alias *a is not supported"),
    "deep list": ("augment: " + "[" * 20_000, "nested more than 20 levels"),
    "deep mapping": ("augment: " + "{a: " * 20_000, "nested more than 20 levels"),
    "long number": ("number: " + "1" * 5000, "Exceeds the limit"),
    "tag": ("augment: !!python/object/apply:os.getcwd []", "could not determine a constructor"),
    "list": ("- a", "Unexpected config"),
    "encoding": (b"\xff\xfea", "not UTF-8 text"),
}


@pytest.mark.parametrize("kind", MALFORMED)
def test_a_malformed_recipe_is_an_error_of_the_command(tmp_path, capsys, kind):
    content, message = MALFORMED[kind]
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(SystemExit) as stopped:
        parse_settings(Settings, "", ["--config", str(path)])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


@pytest.mark.parametrize(
    ("recipe", "words", "parts"),
    [
        ("numbr: 3", [], ["numbr", "did you mean number?"]),
        ("text: a", ["--txet", "3"], ["--txet", "did you mean text?"]),
        ("text: a", ["--numbe", "3"], ["--numbe", "did you mean number?"]),
        ("text: a", ["--augmnt.crop=3"], ["--augmnt", "did you mean augment?"]),
        ("text: a", ["--zzz", "3"], ["--zzz"]),
        ("number: many", [], ["number", "many"]),
    ],
)
def test_a_mistake_is_one_line_that_names_the_nearest_setting(tmp_path, capsys, recipe, words, parts):
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe)
    with pytest.raises(SystemExit) as stopped:
        parse_settings(Settings, "", ["--config", str(path), *words])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1
    assert all(part in error for part in parts) and ("did you mean" in error) == ("mean" in parts[-1])


def test_values_of_the_command_line_are_bounded_too(capsys):
    for value in ("{a: &a [1], b: [*a, *a]}", "[" * 20_000):
        with pytest.raises(SystemExit):
            parse_settings(Settings, "", ["--augment", value])
    assert "Traceback" not in capsys.readouterr().err


def test_numbers_and_text_are_read_as_before(tmp_path):
    (tmp_path / "recipe.yaml").write_text("number: 1e-4\ntext: a *b* & c\naugment: {crop: [0.5, {x: 1}]}\n")
    settings = parse_settings(Settings, "", ["--config", str(tmp_path / "recipe.yaml")])
    assert settings == Settings(number=1e-4, text="a *b* & c", augment={"crop": [0.5, {"x": 1}]})
    assert parse_settings(Settings, "", ["--text", "*starred*"]).text == "*starred*"
