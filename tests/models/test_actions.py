"""The embedding of actions in both denoisers."""

import pytest
import torch

from vgen.models.transformer import SpacetimeTransformer

N = 3


@pytest.fixture(params=["joint", "divided", "unet"])
def make(request, make_transformer, make_unet):
    if request.param == "unet":
        return make_unet
    return lambda **options: make_transformer(attention=request.param, **options)


def inputs(network, seed=0):
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(2, network.config.in_channels, N, 8, 8, generator=generator)
    prompt = torch.randn(2, 5, network.text_dim, generator=generator)
    return latents, torch.tensor([900.0, 300.0]), prompt


def some_actions(seed=0):
    return torch.randn(2, N, 8, generator=torch.Generator().manual_seed(seed))


def untouched(network):
    """The network as it is before training."""
    return type(network).from_config(network.config)


def test_new_layers_change_nothing(make):
    plain, acting = make().eval(), untouched(make(action_dim=2, action_frames=4)).eval()
    missing, unexpected = acting.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected and {name.split(".")[0] for name in missing} == {"action_embedder"}
    expected = plain(*inputs(plain)).sample
    for actions in (None, some_actions(), torch.full((2, N, 8), torch.nan)):
        assert torch.allclose(acting(*inputs(plain), actions=actions).sample, expected, atol=1e-5)


def test_an_action_acts_on_its_frame_and_on_those_that_see_it(make):
    network = make(action_dim=2, action_frames=4).eval()
    actions = some_actions()
    before = network(*inputs(network), actions=actions, groups="causal").sample
    actions[1, 1, 3] += 1.0
    after = network(*inputs(network), actions=actions, groups="causal").sample
    assert torch.allclose(before[0], after[0], atol=1e-5)
    assert torch.allclose(before[1, :, 0], after[1, :, 0], atol=1e-5)
    assert not torch.allclose(before[1, :, 1], after[1, :, 1], atol=1e-3)
    assert not torch.allclose(before[1, :, 2], after[1, :, 2], atol=1e-4)


def test_unknown_actions_are_one_vector(make):
    network = make(action_dim=2, action_frames=4).eval()
    unknown = network(*inputs(network)).sample
    assert torch.allclose(
        network(*inputs(network), actions=torch.full((2, N, 8), torch.nan)).sample, unknown, atol=1e-4
    )
    known, partly = some_actions(), some_actions()
    partly[:, 1, 5] = torch.nan  # one of the pixel frames of a token frame
    whole = known.clone()
    whole[:, 1] = torch.nan
    assert torch.equal(*(network(*inputs(network), actions=one).sample for one in (partly, whole)))
    assert not torch.allclose(network(*inputs(network), actions=known).sample, unknown, atol=1e-3)


def test_all_layers_learn(make):
    network = make(action_dim=2, action_frames=4)
    actions = some_actions()
    actions[:, 0] = torch.nan
    network(*inputs(network), actions=actions).sample.square().mean().backward()
    assert all(weight.grad is not None and weight.grad.any() for weight in network.action_embedder.parameters())


def test_wrong_actions_are_rejected(make):
    network = make(action_dim=2, action_frames=4)
    with pytest.raises(ValueError, match=r"actions must have shape \(2, 3, 8\), got \(2, 3, 2\)"):
        network(*inputs(network), actions=torch.zeros(2, N, 2))
    plain = make()
    with pytest.raises(ValueError, match="does not take actions"):
        plain(*inputs(plain), actions=some_actions())


def test_a_network_that_uses_actions_is_no_wan_network(make_transformer):
    network = untouched(make_transformer(action_dim=2, action_frames=4))
    assert network.to_diffusers() is not None
    torch.nn.init.ones_(network.action_embedder.unknown)
    with pytest.raises(ValueError, match="action_embedder.unknown of SpacetimeTransformer cannot be converted"):
        network.to_diffusers()


def test_it_is_saved(make_transformer, tmp_path):
    network = make_transformer(action_dim=2, action_frames=4).eval()
    network.save_pretrained(tmp_path)
    loaded = SpacetimeTransformer.from_pretrained(tmp_path).eval()
    arguments = inputs(network)
    assert torch.equal(
        loaded(*arguments, actions=some_actions()).sample, network(*arguments, actions=some_actions()).sample
    )
