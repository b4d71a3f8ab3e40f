"""Rules of the house that no other test sees."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

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
def test_every_script_compiles_and_says_what_it_does(path):
    assert ast.get_docstring(ast.parse(path.read_text()))


def test_the_readmes_python_runs(tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [path.suffix for path in tmp_path.iterdir()] == [".mp4"]


def test_the_measured_tables_are_those_of_the_results():
    done = subprocess.run([sys.executable, ROOT / "benchmarks/readme.py", "--check"], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


# those between pages of docs/ are checked when the site is built
def test_links_of_the_readme_lead_to_files_and_headings():
    links = re.findall(r"\]\((?!http)([^)#]*)(?:#([^)]*))?\)", (ROOT / "README.md").read_text())
    assert len(links) > 10
    for name, anchor in links:
        assert (ROOT / name).exists(), name
        if anchor:
            headings = re.findall(r"^#+ (.*)$", (ROOT / name).read_text(), flags=re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", text.lower()).replace(" ", "-") for text in headings}, anchor


def test_every_module_is_in_the_api_reference():
    directives = [
        name
        for page in (ROOT / "docs" / "api").glob("*.md")
        for name in re.findall(r"^::: (\S+)$", page.read_text(), flags=re.MULTILINE)
    ]
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in MODULES
        if path.name not in ("__init__.py", "cli.py")
    ]
    assert sorted(directives) == sorted(modules)


def test_the_shipped_checkpoints_are_small():
    for folder in (ROOT / "vgen/checkpoints").iterdir():
        assert sum(path.stat().st_size for path in folder.rglob("*")) < 25e6
