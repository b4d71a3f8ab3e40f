"""The identity of weights: every value counts, adapters and their scales included."""

import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model

from vgen.io.fingerprint import fingerprint_components, fingerprint_weights, weights_digest

from ..test_pipeline import make_pipeline


@pytest.fixture
def network(make_transformer):
    return make_transformer()


def test_every_single_value_counts(network):
    before = fingerprint_weights(network)
    assert fingerprint_weights(network) == before
    for name, weight in network.named_parameters():
        for index in (0, weight.numel() // 2, weight.numel() - 1):
            with torch.no_grad():
                kept = weight.view(-1)[index].clone()
                weight.view(-1)[index] = kept + 1
                assert fingerprint_weights(network) != before, (name, index)
                weight.view(-1)[index] = kept
    assert fingerprint_weights(network) == before


def test_it_does_not_depend_on_the_object_but_on_precision(make_transformer):
    assert fingerprint_weights(make_transformer()) == fingerprint_weights(make_transformer())
    assert fingerprint_weights(make_transformer()) != fingerprint_weights(make_transformer(seed=1))
    assert fingerprint_weights(make_transformer()) != fingerprint_weights(make_transformer().to(torch.bfloat16))


def test_writes_that_autograd_does_not_see_count(network):
    before = fingerprint_weights(network)
    network.proj_out.bias.data.add_(1)
    written = fingerprint_weights(network)
    network.proj_out.bias.data = network.proj_out.bias.data + 1
    assert len({before, written, fingerprint_weights(network)}) == 3


def test_adapters_their_scales_and_which_are_active_count(network):
    plain = fingerprint_weights(network)
    config = LoraConfig(r=2, lora_alpha=2, target_modules=["to_q"], init_lora_weights=False)
    torch.manual_seed(0)
    inject_adapter_in_model(config, network, "first")
    seen = {plain, fingerprint_weights(network)}
    layers = [module for module in network.modules() if hasattr(module, "scaling")]
    for change in (
        lambda layer: layer.set_scale("first", 0.5),
        lambda layer: layer.enable_adapters(False),
        lambda layer: layer.enable_adapters(True),
    ):
        for layer in layers:
            change(layer)
        seen.add(fingerprint_weights(network))
    assert len(seen) == 4  # enabled again, it is as scaled before
    weights = get_peft_model_state_dict(network, adapter_name="first")
    assert weights
    with torch.no_grad():
        next(layer for layer in layers).lora_B["first"].weight.add_(1e-3)
    assert fingerprint_weights(network) not in seen
    digests = weights_digest(network), weights_digest(network, without=("blocks.",))
    layers[0].set_scale("first", 0.25)
    assert weights_digest(network) != digests[0]
    assert weights_digest(network, without=("blocks.",)) == digests[1]


def test_offloaded_weights_count_too(make_transformer):
    expected = fingerprint_weights(make_transformer())
    offloaded = cpu_offload(make_transformer(), execution_device=torch.device("cpu"))
    assert all(weight.is_meta for weight in offloaded.parameters())
    assert fingerprint_weights(offloaded) == expected
    assert fingerprint_weights(make_transformer().to("meta")) is None


def test_each_component_has_its_own_digest():
    marks = []
    for change in (None, "transformer", "vae", "text_encoder"):
        pipe = make_pipeline()
        if change:
            with torch.no_grad():
                list(getattr(pipe, change).parameters())[-1].flatten()[-1] += 1
        marks.append(pipe.fingerprint())
    names = [None, "denoiser", "vae", "text encoder"]
    for name, mark in zip(names, marks, strict=True):
        assert [key for key in mark if mark[key] != marks[0][key]] == ([name] if name else [])
    pipe = make_pipeline()
    other = fingerprint_components(type(pipe.scheduler)(shift=3.0), pipe.tokenizer, {"denoiser": pipe.transformer})
    assert other["scheduler"] != marks[0]["scheduler"] and other["denoiser"] == marks[0]["denoiser"]
