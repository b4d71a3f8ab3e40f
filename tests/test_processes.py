import pytest
import torch

from vgen.processes import has_bfloat16, warn_if_emulated


@pytest.mark.parametrize("supported", [True, False])
def test_emulated_bfloat16_is_named_with_the_option_that_avoids_it(supported, caplog, monkeypatch):
    monkeypatch.setattr("vgen.processes.has_bfloat16", lambda device: supported)
    for precision in ("no", "fp16", "float32", "bf16", "bfloat16"):
        warn_if_emulated(torch.device("cpu"), precision, "--mixed_precision no")
    expected = "this processor emulates bfloat16, which is many times slower than float32: pass --mixed_precision no"
    assert caplog.messages == ([] if supported else [expected] * 2)


def test_gpus_and_processors_with_avx512_bf16_have_bfloat16():
    assert has_bfloat16(torch.device("cuda"))
    assert has_bfloat16(torch.device("cpu")) or not torch.cpu._is_avx512_bf16_supported()
