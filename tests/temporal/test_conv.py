import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from vgen.temporal.conv import CausalConv3d, CausalDownsample, CausalUpsample
from vgen.temporal.state import TemporalState, register_state_keys


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def stream(layer: nn.Module, x: Tensor, pieces: list[int]) -> Tensor:
    state, out = TemporalState(), []
    for piece in x.split(pieces, dim=2):
        history = state.history()
        out.append(layer(piece, history))
        state.commit(history)
    return torch.cat(out, dim=2)


def keyed(layer: nn.Module) -> nn.Module:
    network = nn.ModuleDict({"layer": layer})
    register_state_keys(network)
    return layer


@pytest.mark.parametrize("kernel, padding", [(3, 1), ((3, 1, 1), 0), ((2, 3, 3), 1), ((5, 1, 1), 0), (1, 0)])
@pytest.mark.parametrize("frames", [1, 2, 5])
def test_causal_convolution_equals_convolution_with_leading_zeros(randomize, kernel, padding, frames):
    layer = randomize(CausalConv3d(3, 4, kernel, padding=padding))
    x = draw(2, 3, frames, 5, 4)
    front = layer.kernel_size[0] - 1
    padded = F.pad(x, (padding, padding, padding, padding, front, 0))
    torch.testing.assert_close(layer(x), F.conv3d(padded, layer.weight, layer.bias), atol=1e-6, rtol=1e-5)


def test_single_frame_equals_the_first_frame_of_a_clip(randomize):
    layer = randomize(CausalConv3d(3, 4, 3, padding=1))
    x = draw(2, 3, 4, 5, 4)
    torch.testing.assert_close(layer(x[:, :, :1]), layer(x)[:, :, :1], atol=1e-6, rtol=1e-5)


def test_single_frame_gives_earlier_taps_no_gradient(randomize):
    layer = randomize(CausalConv3d(2, 2, 3, padding=1))
    layer(draw(1, 2, 1, 4, 4)).sum().backward()
    assert layer.weight.grad[:, :, :-1].abs().max() == 0
    assert layer.weight.grad[:, :, -1].abs().min() > 0


def test_streamed_convolution_equals_offline_for_every_split(randomize, splits):
    layer = keyed(randomize(CausalConv3d(3, 4, 3, padding=1)))
    x = draw(2, 3, 6, 4, 5)
    offline = layer(x)
    for pieces in splits(6):
        torch.testing.assert_close(stream(layer, x, pieces), offline, atol=1e-6, rtol=1e-5)


def test_pointwise_convolution_stores_no_state(randomize):
    layer = keyed(randomize(CausalConv3d(3, 4, 1)))
    history = TemporalState().history()
    layer(draw(1, 3, 2, 4, 4), history)
    assert history.new == {}


def test_later_frames_change_nothing_before_them(randomize):
    layer = randomize(CausalConv3d(3, 4, 3, padding=1))
    x = draw(1, 3, 5, 4, 4)
    for k in range(5):
        changed = x.clone()
        changed[:, :, k] += 1
        assert torch.equal(layer(changed)[:, :, :k], layer(x)[:, :, :k])
        assert not torch.equal(layer(changed)[:, :, k], layer(x)[:, :, k])


def test_a_state_is_unchanged_before_the_commit(randomize):
    layer, state = keyed(randomize(CausalConv3d(3, 4, 3, padding=1))), TemporalState()
    history = state.history()
    layer(draw(1, 3, 2, 4, 4), history)
    assert state.num_bytes == 0
    state.commit(history)
    assert torch.equal(state.get("layer"), draw(1, 3, 2, 4, 4))


def test_downsampled_frame_depends_on_its_two_frames_and_the_one_before(randomize):
    layer = randomize(CausalDownsample(3))
    x = draw(2, 3, 7, 2, 3)
    out = layer(x)
    assert out.shape == (2, 3, 4, 2, 3)
    assert torch.equal(out[:, :, 0], x[:, :, 0])
    for k in range(1, 4):
        taps = x[:, :, 2 * k - 2 : 2 * k + 1]
        expected = torch.einsum("octij,bcthw->bohw", layer.time_conv.weight, taps)
        expected = expected + layer.time_conv.bias.view(-1, 1, 1)
        torch.testing.assert_close(out[:, :, k], expected, atol=1e-6, rtol=1e-5)


def test_streamed_downsampling_equals_offline_for_every_split(randomize, splits):
    layer = keyed(randomize(CausalDownsample(3)))
    x = draw(2, 3, 9, 2, 3)
    offline = layer(x)
    for halves in splits(4):
        torch.testing.assert_close(stream(layer, x, [1, *(2 * n for n in halves)]), offline, atol=1e-6, rtol=1e-5)
        first, *rest = (2 * n for n in halves)
        torch.testing.assert_close(stream(layer, x, [1 + first, *rest]), offline, atol=1e-6, rtol=1e-5)


def test_upsampling_doubles_all_frames_but_the_first_and_never_convolves_it(randomize):
    layer = randomize(CausalUpsample(3))
    x = draw(2, 3, 4, 2, 3)
    out = layer(x)
    assert out.shape == (2, 3, 7, 2, 3)
    assert torch.equal(out[:, :, 0], x[:, :, 0])
    rest = torch.cat([torch.zeros(2, 3, 2, 2, 3), x[:, :, 1:]], dim=2)
    for k in range(1, 4):
        both = torch.einsum("octij,bcthw->bohw", layer.time_conv.weight, rest[:, :, k - 1 : k + 2])
        both = both + layer.time_conv.bias.view(-1, 1, 1)
        torch.testing.assert_close(out[:, :, 2 * k - 1], both[:, :3], atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(out[:, :, 2 * k], both[:, 3:], atol=1e-6, rtol=1e-5)


def test_streamed_upsampling_equals_offline_for_every_split(randomize, splits):
    layer = keyed(randomize(CausalUpsample(3)))
    x = draw(2, 3, 5, 2, 3)
    offline = layer(x)
    for pieces in splits(5):
        torch.testing.assert_close(stream(layer, x, pieces), offline, atol=1e-6, rtol=1e-5)


class Operators(TorchDispatchMode):
    """Records the names of the operators that run."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="compares with oneDNN")
def test_a_build_without_onednn_uses_the_default_convolution(randomize, monkeypatch):
    layer, x = randomize(CausalConv3d(3, 4, 3, padding=1)), draw(1, 3, 4, 5, 4)
    with torch.no_grad(), Operators() as with_onednn:
        expected = layer(x)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    with torch.no_grad(), Operators() as without:
        torch.testing.assert_close(layer(x), expected, atol=1e-6, rtol=1e-5)
    assert "mkldnn_convolution" in with_onednn.names
    assert "mkldnn_convolution" not in without.names and "convolution" in without.names
