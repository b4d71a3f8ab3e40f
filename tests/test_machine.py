"""What is chosen for a machine, compared with measured times and with processors that have fewer instructions."""

import os
import subprocess
import sys
import time

import pytest
import torch

from vgen import machine
from vgen.machine import fast_precision, limit_threads, matrix_peak, warn_if_slow

CPU = torch.device("cpu")
AVX2 = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}


@pytest.fixture
def peaks(monkeypatch):
    """Peaks of a processor in operations per second, which tests set."""
    chosen = {torch.float32: 4.0, torch.bfloat16: 2.0, torch.float16: 3.9}
    monkeypatch.setattr(machine, "matrix_peak", lambda device, dtype: chosen[dtype])
    return chosen


def test_the_peak_is_that_of_a_machine_and_measured_once_in_less_than_a_second():
    matrix_peak.cache_clear()
    begin = time.perf_counter()
    peak = matrix_peak(CPU, torch.float32)
    assert time.perf_counter() - begin < 1
    assert 1e8 < peak < 1e14
    assert matrix_peak(CPU, torch.float32) == peak


@pytest.mark.parametrize(("bfloat16", "expected"), [(3.9, "no"), (4.1, "bf16")])
def test_the_faster_precision_is_chosen(peaks, bfloat16, expected):
    peaks[torch.bfloat16] = bfloat16
    assert fast_precision(CPU) == expected


def test_a_slow_precision_is_named_with_the_option_that_avoids_it(peaks, caplog):
    for precision in ("no", "fp16", "float32", "float16", "bf16", "bfloat16"):
        warn_if_slow(CPU, precision, "--mixed_precision no")
    expected = "bfloat16 takes 2.0 times as long as float32 on this processor: pass --mixed_precision no"
    assert caplog.messages == [expected] * 2


def test_a_processor_without_instructions_for_bfloat16_computes_in_float32():
    code = "import torch; from vgen.machine import fast_precision; print(fast_precision(torch.device('cpu')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | AVX2)
    assert done.stdout.split() == ["no"], done.stderr


@pytest.fixture
def eight_cores(monkeypatch):
    """A machine with eight cores, without settings of the user."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(machine, "_ALL_THREADS", 8)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("operations", "threads"), [(0, 1), (6e8, 1), (2.4e9, 2), (1e15, 8)])
def test_threads_grow_with_the_work_up_to_the_cores(eight_cores, operations, threads):
    assert limit_threads(operations) == torch.get_num_threads() == threads


def test_the_users_number_of_threads_takes_precedence(eight_cores, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    before = torch.get_num_threads()
    assert limit_threads(1e15) == before
