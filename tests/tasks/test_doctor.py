"""`vgen doctor` shows what is true of the machine and of the installed packages."""

import json
import time
from importlib.metadata import version

import pytest
import torch
from typer.testing import CliRunner

from vgen.cli import app
from vgen.tasks import doctor


@pytest.fixture(scope="module")
def report():
    done = CliRunner().invoke(app, ["doctor", "--json", "--no-benchmark"])
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout[done.stdout.index("{") :])


def test_the_report_describes_this_machine(report):
    assert report["versions"]["torch"] == version("torch")
    cpu = report["devices"]["cpu"]
    faster = "bf16" if cpu["tflops"]["bfloat16"] > cpu["tflops"]["float32"] else "no"
    assert cpu["fast_precision"] == faster
    assert 1 <= report["threads"]["rollout"] <= report["threads"]["whole video"] <= report["processor"]["cores"]
    assert report["free_memory_gib"] > 0 and report["free_disk_gib"] > 0
    assert "frames_per_second" not in report
    if torch.cpu._is_avx512_bf16_supported():
        assert "avx512_bf16" in report["processor"]["instructions"]


def test_the_table_shows_every_part_and_how_to_install_an_extra(report):
    report = report | {"missing": {"lora": ["peft>=0.17"]}, "frames_per_second": 24.0}
    rows = dict(doctor.as_rows(report))
    assert rows["extra lora"] == "needs peft>=0.17: pip install vgen[lora]"
    assert {"versions", "processor", "cpu", "threads", "free", "benchmark"} <= rows.keys()


METADATA = """Metadata-Version: 2.1
Name: Example-package
Version: 1.0
Requires-Dist: torch
Provides-Extra: plots
Requires-Dist: numpy>=1000; extra == 'plots'
Requires-Dist: no-such-package; extra == 'plots'
Requires-Dist: also-missing; python_version < '3' and extra == 'plots'
Provides-Extra: installed
Requires-Dist: torch>=1; extra == 'installed'
Provides-Extra: everything
Requires-Dist: example_package[installed,plots]; extra == 'everything'
Requires-Dist: no-such-package; extra == 'everything'
"""


def test_extras_miss_what_is_outdated_or_not_installed_also_in_extras_that_they_include(tmp_path, monkeypatch):
    (tmp_path / "example_package-1.0.dist-info").mkdir()
    (tmp_path / "example_package-1.0.dist-info/METADATA").write_text(METADATA)
    monkeypatch.syspath_prepend(tmp_path)
    expected = ["numpy>=1000", "no-such-package"]
    assert doctor.missing_packages("example-package") == {"everything": expected, "plots": expected}


def test_a_package_that_is_not_installed_is_named():
    with pytest.raises(ValueError, match="the package no-such-package is not installed"):
        doctor.missing_packages("no-such-package")


@pytest.mark.slow
def test_the_benchmark_takes_less_than_ten_seconds():
    without, begin = doctor.examine(benchmark=False), time.perf_counter()
    found = doctor.examine()
    assert time.perf_counter() - begin < 10
    assert 0.1 < found["frames_per_second"] < 1e5
    assert found.keys() - without.keys() == {"frames_per_second"}
