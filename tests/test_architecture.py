"""Rules of the codebase that no other test checks."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import vgen
from tests.warm import warm_python

ROOT = Path(__file__).parents[1]
MODULES = sorted((ROOT / "vgen").rglob("*.py"))
SCRIPTS = [
    path for folder in ("train", "pipelines", "examples", "benchmarks") for path in (ROOT / folder).glob("*.py")
]

# layers from the bottom up; a module may import its own layer's package and lower layers
LAYERS = [
    ["checks", "hub", "io"],
    ["processes"],
    ["machine"],
    ["temporal"],
    ["models", "diffusion", "data"],
    ["sampling", "training", "metrics", "recognition"],
    ["pipeline"],
    ["tasks"],
    ["serve"],
    ["cli"],
]
LEVELS = {name: level for level, names in enumerate(LAYERS) for name in names}


def name_of(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports_of(path, known):
    """Modules of the package that a file imports anywhere: at its top, in functions, for type checkers alone."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide where they lead"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                home = vgen._HOMES.get(alias.name, "vgen") if node.module == "vgen" else node.module
                yield whole if whole in known else home
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def package_of(module):
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else None


def import_graph(root):
    known = {".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__") for path in files(root)}
    return {
        ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): {
            name for name in imports_of(path, known) if name in known
        }
        for path in files(root)
    }


def files(root):
    return sorted((root / "vgen").rglob("*.py"))


def upward(graph):
    """Imports that do not lead down: to a higher layer, or to another package of the same one."""
    for module, targets in graph.items():
        for target in targets:
            here, there = package_of(module), package_of(target)
            if here is None or there is None or here == there:
                continue  # the package itself loads public names lazily
            if LEVELS[there] >= LEVELS[here]:
                yield f"{module} imports {target}"


def cycles(graph):
    """Modules that import themselves by way of others."""
    reach = {module: set(targets) for module, targets in graph.items()}
    for _ in graph:
        grown = {module: targets.union(*(reach[one] for one in targets)) for module, targets in reach.items()}
        if grown == reach:
            break
        reach = grown
    return sorted(module for module, targets in reach.items() if module in targets)


def test_every_module_belongs_to_a_layer():
    packages = {package_of(name_of(path)) for path in MODULES} - {None}
    assert packages <= set(LEVELS), packages - set(LEVELS)


def test_every_import_is_from_a_lower_layer():
    graph = import_graph(ROOT)
    graph["vgen"] = set()  # its lazy names and their annotations
    assert len(graph) == len(MODULES) and sum(map(len, graph.values())) > 100
    assert not list(upward(graph)), list(upward(graph))
    assert not cycles(graph), cycles(graph)


def test_the_rule_sees_imports_in_functions_and_for_type_checkers(tmp_path):
    (tmp_path / "vgen/temporal").mkdir(parents=True)
    (tmp_path / "vgen/models").mkdir()
    for name, text in {
        "vgen/__init__.py": "",
        "vgen/temporal/state.py": "def f():\n    from vgen.models.vae import VAE\n",
        "vgen/temporal/grid.py": "from vgen import CausalVideoVAE\n",
        "vgen/models/vae.py": "from vgen.models import unet\n",
        "vgen/models/unet.py": "if TYPE_CHECKING:\n    from vgen.models.vae import VAE\n",
    }.items():
        (tmp_path / name).write_text(text)
    graph = import_graph(tmp_path)
    assert list(upward(graph)) == [f"vgen.temporal.{name} imports vgen.models.vae" for name in ("grid", "state")]
    assert cycles(graph) == ["vgen.models.unet", "vgen.models.vae"]


def test_scripts_are_not_named_like_a_dependency():
    names = {path.stem for path in SCRIPTS}
    assert not names & (set(sys.stdlib_module_names) | {"torch", "diffusers", "transformers", "accelerate", "vgen"})


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_script_has_a_help_text(path):
    assert ast.get_docstring(ast.parse(path.read_text()))
    if path.parent.name != "examples" and "__main__" in path.read_text():  # examples have tests that run them
        done = subprocess.run([warm_python(), path, "--help"], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        assert "usage: " in done.stdout and "--help" in done.stdout
        assert "Unvalidated" not in done.stdout, "a setting whose type its script cannot resolve"


def test_the_measured_tables_are_those_of_the_results():
    done = subprocess.run([warm_python(), ROOT / "benchmarks/readme.py", "--check"], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


# those between pages of docs/ are checked when the site is built
def test_links_of_the_readme_point_to_files_and_headings():
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
    folders = list((ROOT / "vgen/checkpoints").iterdir())
    assert folders
    for folder in folders:
        assert sum(path.stat().st_size for path in folder.rglob("*")) < 25e6


def test_nothing_outside_reads_or_writes_private_attributes_of_a_pipeline():
    private = re.compile(r"\b(?:pipe|pipeline)\._[a-z]\w*")
    paths = [path for path in [*MODULES, *SCRIPTS] if path != ROOT / "vgen/pipeline.py"]
    uses = {str(path.relative_to(ROOT)): private.findall(path.read_text()) for path in paths}
    assert not {name: names for name, names in uses.items() if names}
    assert private.findall("pipe._guidance_scale = 3")  # the rule sees what it forbids
    written = re.compile(r"\bpipe(?:line)?\.(?!scheduler\b)\w+ = ")  # a scheduler may be exchanged, as in diffusers
    assert not {str(path.relative_to(ROOT)) for path in paths if written.search(path.read_text())}


def test_importing_the_pipeline_prints_nothing_of_image_processors():
    """Some pipelines of diffusers import them, and transformers warns of each if torchvision is missing."""
    done = subprocess.run([sys.executable, "-c", "import vgen.pipeline"], capture_output=True, text=True, check=True)
    assert "ImageProcessor" not in done.stderr
