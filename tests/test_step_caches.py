"""Step caches of diffusers: with thresholds that skip nothing they change nothing, with others they save work."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import (
    ClassifierFreeGuidance,
    FasterCacheConfig,
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)

from vgen.temporal.attention import SpacetimeAttnProcessor
from vgen.temporal.state import TemporalState

from .test_pipeline import PROMPT, make_pipeline, seeded

STEPS, LAYERS = 8, 4


def broadcast(pipe, every):
    return PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=every,
        cross_attention_block_skip_range=every,
        spatial_attention_timestep_skip_range=(0, 1001),
        cross_attention_timestep_skip_range=(0, 1001),
        cross_attention_block_identifiers=("blocks.*attn2",),
        current_timestep_callback=lambda: pipe.current_timestep,
    )


def faster(pipe, every):
    return FasterCacheConfig(
        spatial_attention_block_skip_range=every,
        spatial_attention_timestep_skip_range=(-1, 1001),
        unconditional_batch_skip_range=every,
        unconditional_batch_timestep_skip_range=(-1, 1001),
        attention_weight_callback=lambda _: 0.5,
        current_timestep_callback=lambda: pipe.current_timestep,
    )


def magnitude(pipe, skip):
    return MagCacheConfig(
        threshold=10.0 if skip else 0.0, num_inference_steps=STEPS, mag_ratios=torch.linspace(1.1, 0.9, STEPS)
    )


def taylor(interval):
    # its default names end in "attn" and so match neither diffusers' Wan nor this network
    names = [r"blocks\.\d+\.attn[^.]*"]
    return TaylorSeerCacheConfig(cache_interval=interval, taylor_factors_dtype=torch.float32, cache_identifiers=names)


CACHES = {
    "first block": (lambda pipe: FirstBlockCacheConfig(threshold=-1.0), lambda pipe: FirstBlockCacheConfig(10.0)),
    "pyramid attention broadcast": (lambda pipe: broadcast(pipe, 1), lambda pipe: broadcast(pipe, 2)),
    "FasterCache": (lambda pipe: faster(pipe, 1), lambda pipe: faster(pipe, 2)),
    "MagCache": (lambda pipe: magnitude(pipe, False), lambda pipe: magnitude(pipe, True)),
    "TaylorSeer": (
        lambda pipe: taylor(1),
        lambda pipe: taylor(3),
    ),
}


@pytest.fixture
def rows(monkeypatch):
    """Rows of self- and cross-attention that were computed."""
    counted = []
    attend = SpacetimeAttnProcessor.__call__

    def counting(self, attn, hidden_states, *inputs, **named):
        counted.append(len(hidden_states))
        return attend(self, attn, hidden_states, *inputs, **named)

    monkeypatch.setattr(SpacetimeAttnProcessor, "__call__", counting)
    return counted


def generate(pipe):
    return pipe(PROMPT, generator=seeded(), num_inference_steps=STEPS, output_type="latent").frames


@pytest.mark.parametrize("attention", ["joint", "divided"])
@pytest.mark.parametrize("name", CACHES)
def test_a_cache_that_skips_nothing_changes_nothing_and_one_that_skips_saves_work(name, attention, rows):
    pipe = make_pipeline(num_layers=LAYERS, attention=attention)
    plain, work = generate(pipe), sum(rows)
    nothing, something = CACHES[name]
    pipe.transformer.enable_cache(nothing(pipe))
    rows.clear()
    assert torch.allclose(generate(pipe), plain, atol=1e-5) and sum(rows) == work
    pipe.transformer.disable_cache()

    pipe.transformer.enable_cache(something(pipe))
    rows.clear()
    cached = generate(pipe)
    assert sum(rows) < 0.8 * work
    assert torch.isfinite(cached).all() and not torch.equal(cached, plain)
    again = generate(pipe)
    assert torch.equal(again, cached)
    pipe.transformer.disable_cache()
    assert torch.equal(generate(pipe), plain)


@pytest.mark.parametrize("name", CACHES)
def test_a_cache_that_skips_gives_the_predictions_of_diffusers(name, make_transformer):
    network = make_transformer(num_layers=LAYERS)
    steps, noise = SimpleNamespace(), torch.randn(STEPS, 2, 3, 2, 4, 4, generator=seeded())
    prompt = torch.randn(2, 6, 5, generator=seeded(1))
    predictions = []
    for one in (network, network.to_diffusers()):
        one.enable_cache(CACHES[name][1](steps))
        for latents, level in zip(noise, torch.linspace(900, 100, STEPS), strict=True):
            steps.current_timestep = level
            with torch.no_grad(), one.cache_context("cond_uncond"):
                inputs = {"hidden_states": latents, "timestep": level.expand(2), "encoder_hidden_states": prompt}
                predictions.append(one(**inputs).sample)
    ours, theirs = torch.stack(predictions).chunk(2)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("how", ["rollout", "interpolation"])
@pytest.mark.parametrize("name", CACHES)
def test_long_videos_under_a_cache(name, how, rows, video):
    pipe = make_pipeline(num_layers=LAYERS, tasks=["text", "leading", "keyframes"], window=2, sink=1, chunk_size=1)
    pipe.transformer.register_to_config(trained_token_frames=4)  # several windows, of two lengths

    latents = []  # frames are bytes, in which no number is infinite
    pipe.vae.decoder.register_forward_pre_hook(lambda _, inputs: latents.append(inputs[0]))

    def make():
        settings = {"num_inference_steps": STEPS, "generator": seeded()}
        if how == "interpolation":
            return pipe.interpolate(video[:4], 7, PROMPT, **settings).frames
        return np.concatenate(list(pipe.rollout(PROMPT, num_frames=17, output_type="np", **settings)))

    plain, work = make(), sum(rows)
    if name == "FasterCache":
        pipe.transformer.enable_cache(faster(pipe, 2))
        with pytest.raises(ValueError, match="FasterCache skips half of the batch"):
            make()
        return
    for cache, skips in zip(CACHES[name], (False, True), strict=True):
        pipe.transformer.enable_cache(cache(pipe))
        rows.clear()
        latents.clear()
        cached = make()
        assert (sum(rows) < 0.9 * work) == skips
        assert latents and all(part.isfinite().all() for part in latents)
        assert abs(cached - plain).max() > 1e-4 if skips else abs(cached - plain).max() <= 1.01 / 255
        assert np.array_equal(make(), cached)
        pipe.transformer.disable_cache()
    assert pipe.current_timestep is None and np.array_equal(make(), plain)


@pytest.mark.parametrize("name", CACHES)
def test_a_unet_rejects_caches(name, make_unet):
    nothing, _ = CACHES[name]
    with pytest.raises(ValueError, match="Config is not supported by UNet3D"):
        make_unet().enable_cache(nothing(make_pipeline()))


def test_faster_cache_and_guiders_do_not_go_together():
    pipe = make_pipeline(num_layers=LAYERS)
    pipe.transformer.enable_cache(faster(pipe, 2))
    with pytest.raises(ValueError, match="FasterCache"):
        pipe(PROMPT, guider=ClassifierFreeGuidance())


def test_a_cache_that_would_skip_a_state_update_is_rejected():
    network = make_pipeline(num_layers=LAYERS).transformer
    inputs = (torch.randn(1, 4, 1, 4, 4), torch.tensor([500.0]), torch.randn(1, 8, 32))
    state = TemporalState(window=2)
    network.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    with torch.no_grad(), pytest.raises(ValueError, match="disable_cache"):
        network(*inputs, state=state)
    network.disable_cache()
    with torch.no_grad():
        network(*inputs, state=state)
        expected = network(*inputs, state=state.frozen()).sample
        network.enable_cache(FirstBlockCacheConfig(threshold=-1.0))
        with network.cache_context("cond"):
            torch.testing.assert_close(network(*inputs, state=state.frozen()).sample, expected)
