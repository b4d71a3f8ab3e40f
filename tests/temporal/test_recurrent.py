import pytest
import torch
from torch import nn

from vgen.temporal.recurrent import ConvLSTM, ConvLSTMCell


@pytest.fixture
def layers(randomize):
    return randomize(ConvLSTM(3, (5, 4)))


def test_a_cell_with_1x1_kernels_equals_pytorchs_lstm(randomize):
    cell = randomize(ConvLSTMCell(3, 5, kernel_size=1))
    oracle = nn.LSTMCell(3, 5)
    weight, bias = cell.gates.weight[:, :, 0, 0], cell.gates.bias
    with torch.no_grad():
        oracle.weight_ih.copy_(weight[:, :3][swap(5)])
        oracle.weight_hh.copy_(weight[:, 3:][swap(5)])
        oracle.bias_ih.copy_(bias[swap(5)])
        oracle.bias_hh.zero_()
    state, expected = None, None
    for frame in torch.randn(6, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0)):
        state = cell(frame, state)
        expected = oracle(frame.movedim(1, -1).reshape(-1, 3), expected)
        for one, wanted in zip(state, expected, strict=True):
            torch.testing.assert_close(one.movedim(1, -1).reshape(-1, 5), wanted)


def swap(size):
    """PyTorch orders gates as input, forget, new, output; here they are input, forget, output, new."""
    parts = torch.arange(4 * size).split(size)
    return torch.cat([parts[0], parts[1], parts[3], parts[2]])


def test_streamed_equals_offline_for_any_split(layers, splits):
    clip = torch.randn(2, 3, 5, 6, 6, generator=torch.Generator().manual_seed(0))
    whole, last = layers(clip)
    assert whole.shape == (2, 5 + 4, 5, 6, 6)
    for pieces in splits(5):
        outputs, states = [], None
        for piece in clip.split(pieces, dim=2):
            part, states = layers(piece, states)
            outputs.append(part)
        assert torch.equal(torch.cat(outputs, dim=2), whole)
        assert all(torch.equal(a, b) for a, b in zip(sum(states, ()), sum(last, ()), strict=True))


def test_no_output_depends_on_later_frames(layers):
    clip = torch.randn(1, 3, 5, 6, 6, generator=torch.Generator().manual_seed(0))
    before, _ = layers(clip)
    clip[:, :, 3] += 1
    after, _ = layers(clip)
    assert torch.equal(before[:, :, :3], after[:, :, :3])
    assert (before[:, :, 3:] != after[:, :, 3:]).any()


def test_a_fresh_cell_keeps_its_state():
    cell = ConvLSTMCell(1, 2)
    assert cell.gates.bias[2:4].tolist() == [1.0, 1.0]
