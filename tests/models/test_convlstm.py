import pytest
import torch

from vgen.data.shapes import ShapesWorld, render
from vgen.hub import find_packaged
from vgen.metrics.reference import psnr
from vgen.metrics.suites import copy_last
from vgen.models.convlstm import ConvLSTMPredictor


@pytest.fixture
def network(randomize):
    return randomize(ConvLSTMPredictor(patch_size=2, channels=(5, 4)))


def draw(f=6, size=8):
    return torch.rand(2, 3, f, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1


@torch.no_grad()
def test_predictions_follow_from_predictions(network):
    clip = draw()
    new = network.predict(clip, 3)
    assert new.shape == (2, 3, 3, 8, 8)
    longer = clip
    for index in range(3):  # the slow method: recompute everything for each frame
        longer = torch.cat([longer, network(longer)[:, :, -1:]], dim=2)
        torch.testing.assert_close(longer[:, :, -1], new[:, :, index])


@torch.no_grad()
def test_no_prediction_depends_on_later_frames(network):
    clip = draw()
    changed = clip.clone()
    changed[:, :, 4:] += 1
    torch.testing.assert_close(network(changed)[:, :, :4], network(clip)[:, :, :4])
    assert not torch.allclose(network(changed)[:, :, 4:], network(clip)[:, :, 4:])


def test_a_network_saves_loads_and_learns(network, tmp_path):
    network.save_pretrained(tmp_path)
    clip = draw()
    assert torch.equal(ConvLSTMPredictor.from_pretrained(tmp_path)(clip), network(clip))
    still = clip[:, :, :1].expand(-1, -1, 6, -1, -1)
    fresh = ConvLSTMPredictor(patch_size=2, channels=(16,))
    optimizer = torch.optim.Adam(fresh.parameters(), 1e-2)
    errors = []
    for _ in range(150):
        errors.append((fresh(still[:, :, :2], 3) - still[:, :, 1:]).square().mean())
        optimizer.zero_grad()
        errors[-1].backward()
        optimizer.step()
    assert errors[-1] < 0.1 * errors[0]


def test_sides_must_be_multiples_of_the_patch(network):
    with pytest.raises(ValueError, match="multiples of 2"):
        network(draw(size=7))


@torch.no_grad()
def test_the_packaged_checkpoint_predicts_and_is_small():
    folder = find_packaged("vgen/shapes-64-convlstm")
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 2e6
    world = ShapesWorld(split="all", seed=123)
    clips = render([world.scene(number) for number in range(8)], num_frames=17, height=64, width=64, frame_rate=8.0)
    predicted = ConvLSTMPredictor.from_pretrained(folder).predict(clips[:, :, :5], 12).clamp(-1, 1)
    repeated, true = copy_last(clips, 5)[:, :, 5:], clips[:, :, 5:]
    assert psnr(predicted, true).median() > psnr(repeated, true).median() + 2
