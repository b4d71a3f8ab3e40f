"""SkyReels-V2 diffusion forcing equals diffusers, for whole clips and chunk by chunk."""

import pytest
import torch
from diffusers import (
    SkyReelsV2DiffusionForcingPipeline,
    SkyReelsV2Transformer3DModel,
    UniPCMultistepScheduler,
    WanPipeline,
)
from safetensors.torch import save_file
from typer.testing import CliRunner

from vgen import SpacetimeTransformer, VideoGenPipeline
from vgen.cli import app
from vgen.models.convert.names import to_original

PROMPT, NEGATIVE = "a red circle moves", "blue"
SETTINGS = {"height": 32, "width": 32, "num_inference_steps": 3, "guidance_scale": 3.0}


@pytest.fixture(scope="module")
def folder(wan_folder, tmp_path_factory, randomize):
    """A tiny random folder in the layout of SkyReels-V2 DF 1.3B."""
    parts = {name: one for name, one in WanPipeline.from_pretrained(wan_folder).components.items() if one is not None}
    config = {name: value for name, value in parts["transformer"].config.items() if name[:1] != "_"}
    accepted = {name: value for name, value in config.items() if name not in ("image_dim", "added_kv_proj_dim")}
    transformer = randomize(SkyReelsV2Transformer3DModel(**accepted, inject_sample_info=True), seed=4)
    path = tmp_path_factory.mktemp("skyreels")
    SkyReelsV2DiffusionForcingPipeline(
        **{name: parts[name] for name in ("tokenizer", "text_encoder", "vae", "scheduler")}, transformer=transformer
    ).save_pretrained(path)
    return path


class CopyingUniPC(UniPCMultistepScheduler):
    """UniPC on copies: its corrector needs the last sample, which diffusers' SkyReels pipelines overwrite in place."""

    def step(self, model_output, timestep, sample, **options):
        return super().step(model_output, timestep, sample.clone(), **options)


@pytest.fixture
def pipes(folder):
    both = SkyReelsV2DiffusionForcingPipeline.from_pretrained(folder), VideoGenPipeline.from_pretrained(folder)
    for pipe in both:
        pipe.set_progress_bar_config(disable=True)
    both[0].scheduler = CopyingUniPC.from_config(both[0].scheduler.config)
    return both


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("fps", [16, 24])
@torch.no_grad()
def test_the_network_equals_that_of_diffusers(pipes, fps):
    theirs, ours = (pipe.transformer for pipe in pipes)
    generator = torch.Generator().manual_seed(0)
    latents, prompt = torch.randn(1, 4, 3, 4, 4, generator=generator), torch.randn(1, 512, 32, generator=generator)
    levels = torch.tensor([[0.0, 300.0, 900.0]])
    expected = theirs(latents, levels, prompt, enable_diffusion_forcing=True, fps=[int(fps != 16)]).sample
    torch.testing.assert_close(ours(latents, levels, prompt, frame_rate=fps).sample, expected, atol=1e-5, rtol=1e-5)
    other = ours(latents, levels, prompt, frame_rate=40 - fps).sample
    assert (other - expected).abs().max() > 1e-3
    if fps == 24:
        torch.testing.assert_close(ours(latents, levels, prompt).sample, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("fps", [16, 24])
def test_whole_clips_equal_those_of_diffusers(pipes, fps):
    theirs, ours = pipes
    settings = SETTINGS | {"num_frames": 17, "output_type": "np"}
    expected = theirs(PROMPT, NEGATIVE, **settings, generator=seeded(), fps=fps, base_num_frames=17).frames
    got = ours(PROMPT, NEGATIVE, **settings, generator=seeded(), frame_rate=fps).frames
    torch.testing.assert_close(torch.as_tensor(got), torch.as_tensor(expected), atol=1e-4, rtol=1e-4)


def test_a_rollout_equals_their_asynchronous_mode_when_blocks_wait_for_each_other(pipes, monkeypatch):
    theirs, ours = pipes
    noise = torch.randn(1, 4, 6, 4, 4, generator=seeded())
    settings = SETTINGS | {"num_frames": 21, "output_type": "latent"}
    expected = theirs(
        PROMPT, NEGATIVE, **settings, generator=seeded(), base_num_frames=21, ar_step=3, causal_block_size=2
    ).frames
    ours.transformer.register_to_config(group_modes=["chunk"], tasks=["text", "leading"])
    chunks = iter(noise.split(2, dim=2))
    monkeypatch.setattr("vgen.sampling.rollout.draw_noise", lambda *_: next(chunks))
    chunk = {"chunk_size": 2, "first_chunk_size": 2, "window": 4, "sink": 0}
    rollout = ours.rollout(PROMPT, negative_prompt=NEGATIVE, frame_rate=24.0, **SETTINGS | chunk)
    for _ in range(3):
        rollout.step()
    latents = torch.cat([one for one, *_ in rollout.state.history[-4:]], dim=2)
    torch.testing.assert_close(latents, expected[:, :, 2:], atol=1e-4, rtol=1e-4)


def test_a_pipeline_survives_saving_and_conversion(pipes, tmp_path):
    theirs, ours = pipes
    assert ours.config.num_frames == 97 and ours.config.frame_rate == 24.0 and ours.config.height == 544
    settings = SETTINGS | {"num_frames": 9, "output_type": "latent"}

    def latents(pipe):
        pipe.set_progress_bar_config(disable=True)
        return pipe(PROMPT, NEGATIVE, **settings, generator=seeded()).frames

    expected = latents(ours)
    ours.save_pretrained(tmp_path)
    back = ours.to_diffusers()
    assert type(back) is SkyReelsV2DiffusionForcingPipeline
    back.scheduler = theirs.scheduler
    for pipe in (VideoGenPipeline.from_pretrained(tmp_path), VideoGenPipeline.from_pipe(theirs), back):
        torch.testing.assert_close(latents(pipe), expected, atol=1e-4, rtol=1e-4)
    network = SpacetimeTransformer.from_diffusers(theirs.transformer)
    assert network.config.inject_sample_info and network.takes_frame_rate


def test_an_original_file_becomes_a_pipeline_and_back(folder, wan_folder, tmp_path):
    pipe = VideoGenPipeline.from_pretrained(folder)
    original = to_original("transformer", pipe.transformer.state_dict())
    assert {"fps_embedding.weight", "fps_projection.0.weight", "fps_projection.2.bias"} <= original.keys()
    save_file({name: weight.contiguous() for name, weight in original.items()}, tmp_path / "model.safetensors")
    words = ["convert", tmp_path / "model.safetensors", "--base", wan_folder, "-o", tmp_path / "made"]
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exit_code == 0, done.output
    made = VideoGenPipeline.from_pretrained(tmp_path / "made")
    weights = made.transformer.state_dict()
    assert made.transformer.config.inject_sample_info
    assert all(torch.equal(weights[name], weight) for name, weight in pipe.transformer.state_dict().items())
