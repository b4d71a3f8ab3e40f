import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_pipeline import make_pipeline
from vgen.models.compilation import compile_blocks


def test_compilation_is_announced_once_with_its_usual_time(caplog):
    compile_blocks(make_pipeline().denoiser)
    (message,) = caplog.messages
    assert message.startswith("SpacetimeTransformer is compiled in its first steps, which takes one or two minutes")


PRINT_CACHE = """
from torch._inductor.runtime.cache_dir_utils import cache_dir
from vgen.models.compilation import separate_compiled_code
if {early}: cache_dir()
separate_compiled_code()
print(cache_dir())
"""


@pytest.mark.parametrize("early", [False, True])
def test_compiled_code_is_stored_by_instructions(early, tmp_path):
    def folder(**variables: str) -> Path:
        variables = {"PATH": os.environ["PATH"], "TMPDIR": str(tmp_path)} | variables
        command = [sys.executable, "-c", PRINT_CACHE.format(early=early)]
        return Path(subprocess.run(command, env=variables, text=True, capture_output=True, check=True).stdout.strip())

    assert folder(ATEN_CPU_CAPABILITY="default") != folder()
    assert folder(TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "own")) == tmp_path / "own"
