import time

import pytest
import torch
from torch import nn

from vgen.training.throughput import Throughput, count_flops


def test_operations_are_counted_by_the_formula():
    linear, conv = nn.Linear(8, 16), nn.Conv3d(4, 6, (1, 3, 3), padding=(0, 1, 1))
    assert count_flops(lambda: linear(torch.randn(5, 8))) == 2 * 5 * 8 * 16
    assert count_flops(lambda: conv(torch.randn(2, 4, 3, 7, 7))) == 2 * (2 * 3 * 7 * 7) * 4 * 9 * 6


def test_attention_of_the_cpu_is_counted():
    query = torch.randn(2, 4, 16, 8)
    attention = nn.functional.scaled_dot_product_attention
    assert count_flops(lambda: attention(query, query, query)) == 2 * (2 * 4) * (2 * 16 * 16 * 8)


def test_counting_does_not_change_random_states_or_gradients():
    linear = nn.Linear(8, 8)
    before = torch.get_rng_state()
    count_flops(lambda: nn.functional.dropout(linear(torch.randn(5, 8))))
    assert torch.equal(torch.get_rng_state(), before) and linear.weight.grad is None


def test_throughput_is_per_second_and_counted_from_zero_after_each_report(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    measured = []

    def matrix_peak(device, dtype):
        measured.append(dtype)
        return 1000.0

    monkeypatch.setattr("vgen.training.throughput.matrix_peak", matrix_peak)
    throughput = Throughput(torch.device("cpu"))
    calls = []
    weight = torch.randn(4, 3)

    def forward():
        calls.append(1)
        now[0] += 5  # counting takes time, which does not count
        return torch.randn(2, 4) @ weight

    for shape in ("a", "a", "b"):
        throughput.add(2, 10, shape, forward)
        now[0] += 1
    assert len(calls) == 2
    flops = 3 * 3 * 2 * 2 * 4 * 3  # three parts, each forward and twice that backward
    assert not measured  # the progress bar comes first
    reported = throughput.take()
    assert reported == pytest.approx(
        {"clips_per_second": 2, "tokens_per_second": 10, "flops_utilization": flops / 3 / 1000}
    )
    now[0] += 2
    assert throughput.take()["clips_per_second"] == 0
