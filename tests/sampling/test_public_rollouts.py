"""Rollouts of public causal checkpoints, compared with recorded results of the Self-Forcing code.

The file has the weights of a tiny random network with the public names, the noises in the order in which that code
drew them, and the latents that it made: blocks of 3 with a window of 7 latents (the current block included) of which 1
is a sink, and single latents with a window of 4. There are 4 steps, warped by a shift of 5, each with fresh noise.
"""

from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchLCMScheduler
from safetensors.torch import load_file

from vgen import VideoGenPipeline, load_rollout
from vgen.models.transformer import SpacetimeTransformer
from vgen.sampling.sampler import resampled

CASES = {"sink_1_local_7": (3, 7, 1), "frame_wise_local_4": (1, 4, 0)}
"""Latents in a block, in the window of the public code, and in the sink."""


@pytest.fixture(scope="module")
def recorded():
    return load_file(Path(__file__).with_name("self_forcing.safetensors"))


@pytest.fixture
def pipe(recorded):
    weights = {name.removeprefix("weight."): one for name, one in recorded.items() if name.startswith("weight.")}
    sizes = {"num_attention_heads": 2, "attention_head_dim": 24, "text_dim": 32, "ffn_dim": 96, "num_layers": 3}
    causal = {"tasks": ["text", "leading"], "group_modes": ["chunk"]}
    transformer = SpacetimeTransformer.from_single_file(weights, config=sizes | causal)
    scheduler = FlowMatchLCMScheduler(shift=5.0)
    return VideoGenPipeline(scheduler, transformer=transformer, sigmas=[1.0, 0.75, 0.5, 0.25], guidance_scale=1.0)


def roll_out(pipe, recorded, name, monkeypatch, **options):
    """The latents of a case, made with its noises."""
    block, local, sink = CASES[name]
    draws = sum(f"{name}.noise" in key for key in recorded)
    noises = iter([recorded[f"{name}.noise.{draw}"] for draw in range(draws)])
    left = 4

    def draw_later(shape, **_):
        nonlocal left
        left = left - 1 or 4  # the noise after the last step has no weight, and the public code draws none
        return torch.zeros(shape) if left == 4 else next(noises)

    monkeypatch.setattr("vgen.sampling.rollout.draw_noise", lambda *_: next(noises))
    monkeypatch.setattr("diffusers.schedulers.scheduling_flow_match_lcm.randn_tensor", draw_later)
    text = recorded["text"]
    rollout = pipe.rollout(
        prompt_embeds=torch.nn.functional.pad(text, (0, 0, 0, 8 - text.shape[1])), height=8, width=12,
        chunk_size=block, first_chunk_size=block, window=local - block - sink, sink=sink, **options,
    )  # fmt: skip
    count = recorded[f"{name}.latents"].shape[2] // block
    latents = torch.cat([rollout.step() for _ in range(count)], dim=2)
    assert next(noises, None) is None
    return latents


@pytest.mark.parametrize(
    ("name", "positions"), [*((name, "absolute") for name in CASES), ("frame_wise_local_4", "relative")]
)
def test_rollouts_equal_those_of_the_public_code(pipe, recorded, monkeypatch, name, positions):
    latents = roll_out(pipe, recorded, name, monkeypatch, positions=positions)
    torch.testing.assert_close(latents, recorded[f"{name}.latents"], atol=1e-4, rtol=0.0)


def test_with_a_sink_relative_positions_differ_once_frames_are_evicted(pipe, recorded, monkeypatch):
    latents, expected = roll_out(pipe, recorded, "sink_1_local_7", monkeypatch), recorded["sink_1_local_7.latents"]
    torch.testing.assert_close(latents[:, :, :6], expected[:, :, :6], atol=1e-4, rtol=0.0)
    assert (latents - expected)[:, :, 6:].abs().amax() > 0.01


def test_a_saved_rollout_goes_on_with_absolute_positions(pipe, recorded, tmp_path):
    options = {"chunk_size": 1, "window": 2, "sink": 1, "positions": "absolute", "height": 8, "width": 12}
    rollout = pipe.rollout(prompt_embeds=recorded["text"], generator=torch.Generator().manual_seed(0), **options)
    for _ in range(5):
        rollout.step()
    rollout.save(tmp_path / "saved")
    assert torch.equal(load_rollout(tmp_path / "saved", pipe).step(), rollout.fork().step())


def test_another_number_of_steps_takes_levels_between_those_of_the_checkpoint():
    assert resampled([1.0, 0.75, 0.5, 0.25], 2) == [1.0, 0.5]
    assert resampled([1.0, 0.5], 4) == [1.0, 0.75, 0.5, 0.25]
    assert resampled([1.0, 0.757, 0.522], 3) == [1.0, 0.757, 0.522]
    assert resampled([1.0, 0.9, 0.6], 6) == pytest.approx([1.0, 0.95, 0.9, 0.75, 0.6, 0.3])
    assert resampled([1.0], 1) == resampled([1.0, 0.0], 1) == [1.0] and resampled([1.0, 0.0], 2) == [1.0, 0.5]


def test_a_pipeline_of_one_step_is_saved_and_loaded(pipe, tmp_path):
    VideoGenPipeline(pipe.scheduler, transformer=pipe.transformer, sigmas=[1.0]).save_pretrained(tmp_path)
    again = VideoGenPipeline.from_pretrained(tmp_path)
    assert again.config.num_inference_steps == 1 and resampled(again.config.sigmas, 1) == [1.0]


def test_the_levels_of_a_checkpoint_are_used(pipe, recorded, tmp_path):
    seen = []
    pipe.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["timestep"].max().item()), with_kwargs=True
    )
    arguments = {"prompt_embeds": recorded["text"], "height": 8, "width": 12, "num_frames": 2, "groups": "chunk"}
    pipe(**arguments, output_type="latent")
    assert seen == pytest.approx([1000.0, 937.5, 833.3333, 625.0])
    seen.clear()
    pipe(**arguments, output_type="latent", num_inference_steps=2)
    assert seen == pytest.approx([1000.0, 833.3333])
    with pytest.raises(ValueError, match="sigmas must be a non-empty list of numbers, got 3"):
        VideoGenPipeline(pipe.scheduler, transformer=pipe.transformer, sigmas=3)
    pipe.save_pretrained(tmp_path)
    again = VideoGenPipeline.from_pretrained(tmp_path)
    assert again.config.sigmas == [1.0, 0.75, 0.5, 0.25] and again.config.num_inference_steps == 4
