"""Weights in 8-bit integers through torchao, as diffusers' users ask for them."""

import pytest
import torch
from diffusers import PipelineQuantizationConfig, TorchAoConfig

from vgen.pipeline import VideoGenPipeline
from vgen.temporal.state import TemporalState

pytest.importorskip("torchao")
from torchao.quantization import Int8WeightOnlyConfig  # noqa: E402
from torchao.utils import TorchAOBaseTensor  # noqa: E402


def quantized(module):
    return [name for name, weight in module.named_parameters() if isinstance(weight, TorchAOBaseTensor)]


@torch.no_grad()
@pytest.mark.parametrize("denoiser", ["transformer", "unet"])
def test_a_quantized_denoiser_is_close_and_its_streams_equal_one_pass(denoiser, make_transformer, make_unet, tmp_path):
    exact = (make_transformer if denoiser == "transformer" else make_unet)(group_modes=["full", "causal"])
    exact.save_pretrained(tmp_path)
    config = TorchAoConfig(Int8WeightOnlyConfig())
    network = type(exact).from_pretrained(tmp_path, dtype=torch.float32, quantization_config=config).eval()
    assert any(name.endswith("attn1.to_q.weight") for name in quantized(network)) and not quantized(exact)

    latents, prompt, level = torch.randn(1, 3, 4, 4, 4), torch.randn(1, 6, 5), torch.tensor([300.0])
    expected, whole = (one(latents, level, prompt, groups="causal").sample for one in (exact, network))
    assert 0 < (whole - expected).norm() / expected.norm() < 0.1
    state = TemporalState(window=4)
    pieces = [network(piece, level, prompt, state=state).sample for piece in latents.split(1, dim=2)]
    torch.testing.assert_close(torch.cat(pieces, dim=2), whole, atol=1e-4, rtol=0)


def test_a_pipeline_quantizes_the_requested_components(tmp_path):
    from ..test_pipeline import PROMPT, make_pipeline

    exact = make_pipeline()
    exact.save_pretrained(tmp_path)
    config = PipelineQuantizationConfig(quant_mapping={"transformer": TorchAoConfig(Int8WeightOnlyConfig())})
    pipe = VideoGenPipeline.from_pretrained(tmp_path, quantization_config=config)
    pipe.set_progress_bar_config(disable=True)
    assert quantized(pipe.transformer) and not quantized(pipe.vae)
    frames, expected = (one(PROMPT, generator=torch.Generator().manual_seed(0)).frames for one in (pipe, exact))
    assert frames.shape == (1, 9, 16, 16, 3) and 0 < abs(frames - expected).mean() < 0.02
