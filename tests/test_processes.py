import torch

from vgen.processes import has_bfloat16


def test_gpus_and_processors_with_avx512_bf16_have_bfloat16():
    assert has_bfloat16(torch.device("cuda"))
    assert has_bfloat16(torch.device("cpu")) or not torch.cpu._is_avx512_bf16_supported()
