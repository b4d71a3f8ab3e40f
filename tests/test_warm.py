"""The warm interpreter of the tests."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import subprocess
from tests.warm import start_server
subprocess.run([start_server(), "-c", "import sys; print('torch' in sys.modules)"], check=True)
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc to count threads")
def test_programs_start_cold_where_an_import_starts_threads(tmp_path):
    threads = "import threading, time\nthreading.Thread(target=time.sleep, args=(60,), daemon=True).start()\n"
    (tmp_path / "sitecustomize.py").write_text(threads)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(Path(__file__).parents[1])])}
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.strip() == "False"
