"""benchmarks/gpu.py, at tiny size and without the tests that need a GPU."""

import json
import os
import runpy
import subprocess
import sys

import pytest
import torch

from tests.train.scripts import ROOT
from tests.warm import warm_python


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return runpy.run_path(str(ROOT / "benchmarks/gpu.py"))


def run(*arguments):
    command = [warm_python(), ROOT / "benchmarks/gpu.py", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=ROOT)


@pytest.mark.slow
def test_every_section_gives_numbers_at_tiny_size(tmp_path):
    done = run("--tiny", "--output", tmp_path / "gpu.json")
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((tmp_path / "gpu.json").read_text())
    assert results["tests"]["pytest"]["passed"] > 10
    assert "torch_npu" in results["rollout"].pop("_native_npu")["error"]
    numbers = {"VAE": {"seconds", "MiB"}, "Transformer": {"MFU"}, "rollout": {"frames/s"}, "training": {"clips/s"}}
    for section, columns in numbers.items():
        assert len(results[section]) >= 2
        assert all(row[column] > 0 for row in results[section].values() for column in columns), results[section]
    for name in (name for section in (*numbers, "tests") for name in results[section]):
        assert sum(f": {name} " in line for line in done.stdout.splitlines()) == 1, name


def test_an_error_takes_one_row_and_the_next_case_is_measured(benchmark, tmp_path, monkeypatch):
    def fail():
        raise torch.OutOfMemoryError("out\nof memory")

    cases = {"first": fail, "second": lambda: {"seconds": 2.0}}
    monkeypatch.setitem(benchmark["SECTIONS"], "VAE", lambda sizes: iter(cases.items()))
    benchmark["run_section"]("VAE", benchmark["TINY"], tmp_path / "rows.json")
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert rows == {"first": {"error": "OutOfMemoryError: out\nof memory"}, "second": {"seconds": 2.0}}


def test_failed_tests_are_counted_and_named(benchmark, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", warm_python())
    (tmp_path / "test_some.py").write_text(
        "import pytest\n"
        "def test_right(): pass\n"
        "def test_wrong(): assert False\n"
        "def test_without(nothing): pass\n"
        "def test_later(): pytest.skip('no GPU')\n"
    )
    ((_, run),) = benchmark["test_cases"]({"tests": [str(tmp_path / "test_some.py"), "--noconftest"]})
    assert run() == {"passed": 1, "failed": ["test_wrong", "test_without"], "skipped": 1}


def test_a_section_that_takes_too_long_is_one_row(benchmark, monkeypatch):
    start = benchmark["start_section"]
    monkeypatch.setitem(start.__globals__, "TIME_LIMIT", 0.1)
    assert start("tests", "--tiny") == {"stopped": {"error": "not done after 0.1 s"}}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_full_sizes_are_one_clear_error():
    done = run()
    assert done.returncode == 1 and not done.stdout
    assert done.stderr.splitlines()[-1].startswith("benchmarks/gpu.py needs a CUDA device")
