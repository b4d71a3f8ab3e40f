"""What a call computes once, and what it computes at every step."""

from functools import partial

import pytest
import torch

from ..test_pipeline import PROMPT, seeded
from ..test_unet_pipeline import build as build_unet
from .test_rollout import build


@pytest.fixture(params=[build, build_unet], ids=["transformer", "unet"])
def pipe(request, randomize):
    pipe = request.param(randomize)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def prompt_layers(pipe):
    """The layers whose input is the prompt alone, by name."""
    return {
        name: module
        for name, module in pipe.denoiser.named_modules()
        if name.endswith(("attn2.to_k", "attn2.to_v", "condition_embedder.text_embedder"))
    }


def test_prompts_are_projected_once_per_call_and_again_after_a_callback(pipe):
    layers, calls = prompt_layers(pipe), []
    assert len(layers) > 2
    for name, layer in layers.items():
        layer.register_forward_hook(lambda *_, name=name: calls.append(name))
    options = {"guidance_scale": 3.0, "num_inference_steps": 4, "output_type": "latent"}
    once = pipe(PROMPT, generator=seeded(), **options).frames
    assert sorted(calls) == sorted(layers)
    calls.clear()
    each = pipe(PROMPT, generator=seeded(), callback_on_step_end=lambda *_: {}, **options).frames
    assert sorted(calls) == sorted(4 * [*layers])
    assert torch.equal(once, each)


def without_cache(forward, *args, prompt_cache, **kwargs):
    return forward(*args, **kwargs)


def test_a_callback_may_change_the_weights_of_prompt_layers(pipe):
    def halve(pipe, step, timestep, tensors):
        for layer in prompt_layers(pipe).values():
            for weight in layer.parameters():
                weight.data.mul_(0.5)
        return {}

    options = {"num_inference_steps": 3, "output_type": "latent"}
    weights = {name: value.clone() for name, value in pipe.denoiser.state_dict().items()}
    results = []
    for projects_once in (True, False):
        pipe.denoiser.load_state_dict(weights)
        if not projects_once:
            pipe.denoiser.forward = partial(without_cache, pipe.denoiser.forward)
        results.append(pipe(PROMPT, generator=seeded(), callback_on_step_end=halve, **options).frames)
    assert torch.equal(*results)
