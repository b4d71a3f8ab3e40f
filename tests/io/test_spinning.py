import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted([*ROOT.glob("train/*.py"), *ROOT.glob("pipelines/*.py")])

SHOW = """
import os, sys
from unittest import mock
import vgen.cli
with mock.patch("vgen.cli.app", lambda: print("torch" in sys.modules, os.environ.get("OMP_WAIT_POLICY"))):
    vgen.cli.main()
"""


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE"), ({"KMP_BLOCKTIME": "1"}, "None")],
)
def test_the_command_stops_spinning_before_it_imports_torch_unless_the_user_chose(chosen, expected):
    own = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
    environment = {name: value for name, value in os.environ.items() if name not in own} | chosen
    done = subprocess.run([sys.executable, "-c", SHOW], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.split() == ["False", expected]


@pytest.mark.parametrize(("before", "expected"), [("", "PASSIVE"), ("import torch;", "None")])
def test_importing_the_package_before_torch_stops_it_too(before, expected):
    code = f"import os; {before} import vgen; print(os.environ.get('OMP_WAIT_POLICY'))"
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.strip() == expected


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_every_script_stops_spinning_before_all_other_imports(script):
    lines = [
        ast.unparse(statement)
        for statement in ast.parse(script.read_text(encoding="utf-8")).body[1:]
        if getattr(statement, "module", None) != "__future__"
    ]
    assert lines[:2] == ["from vgen.io.spinning import stop_spinning", "stop_spinning()"]
