"""Rules of the house that no other test sees."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.warm import warm_python

ROOT = Path(__file__).parents[1]
MODULES = sorted((ROOT / "vgen").rglob("*.py"))
SCRIPTS = [
    path for folder in ("train", "pipelines", "examples", "benchmarks") for path in (ROOT / folder).glob("*.py")
]

# floors, from the ground up; data stands beside them
FLOORS = {"temporal": 0, "models": 1, "training": 2, "metrics": 2, "pipeline": 4, "cli": 5}


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (name.name for name in node.names)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_import_goes_up(path):
    place = path.relative_to(ROOT / "vgen").with_suffix("").parts[0]
    for name in imported(path):
        if name.startswith("vgen.") and place in FLOORS:
            target = name.split(".")[1]
            assert target not in FLOORS or FLOORS[target] <= FLOORS[place], f"{path.name} imports {name}"
            assert place != "temporal" or target == "temporal"


def test_scripts_are_not_named_like_a_dependency():
    names = {path.stem for path in SCRIPTS}
    assert not names & (set(sys.stdlib_module_names) | {"torch", "diffusers", "transformers", "accelerate", "vgen"})


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_script_says_what_it_does(path):
    assert ast.get_docstring(ast.parse(path.read_text()))
    if path.parent.name != "examples" and "__main__" in path.read_text():  # examples have tests that run them
        done = subprocess.run([warm_python(), path, "--help"], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        assert "usage: " in done.stdout and "--help" in done.stdout


def test_the_readmes_tables_are_those_that_were_measured():
    done = subprocess.run([sys.executable, ROOT / "benchmarks/readme.py", "--check"], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_shipped_checkpoints_are_small():
    folders = list((ROOT / "vgen/checkpoints").iterdir())
    assert folders
    for folder in folders:
        assert sum(path.stat().st_size for path in folder.rglob("*")) < 25e6
