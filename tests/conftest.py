"""How the tests run. The fixtures are in `fixtures.py`, which only the processes that run tests import."""

import gc
import os
import sys

import pytest

from tests.warm import start_server


def pytest_configure(config: pytest.Config) -> None:
    """The workers of xdist are forks of the warm interpreter."""
    if config.getoption("numprocesses", None) and "PYTEST_XDIST_WORKER" not in os.environ:
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # one process a core, so one thread each, also in what it starts
        os.environ["COLD_PYTHON"] = sys.executable
        config.option.tx = [f"popen//python={start_server()}"] * len(config.option.tx)
    else:
        sys.executable = os.environ.get("COLD_PYTHON", sys.executable)
        config.pluginmanager.import_plugin("tests.fixtures")


def pytest_collection_finish() -> None:
    """Lets later garbage collections skip the millions of objects of imported modules."""
    gc.collect()
    gc.freeze()
