"""What all recognizers have in common."""

import pytest
import torch

from tests.recognition.test_networks import NAMES, make, random_clip
from vgen.data.shapes_tasks import ShapesTasks
from vgen.hub import find_packaged
from vgen.recognition import Recognizer, create_recognizer, load_recognizer
from vgen.temporal.state import TemporalState

STREAMED = ["causal_cnn", "cnn_lstm", "cnn_gru", "convlstm", "st_lstm", "recurrent_cnn", "frame_difference"]
MASKED = [*STREAMED, "pooled", "divided_attention", "joint_attention", "factorized_attention"]
FIXED_LENGTH = ["late_fusion", "early_fusion", "c3d", "timesformer", "vivit", "videomae", "vjepa2"]


@pytest.mark.parametrize("name", NAMES)
def test_every_recognizer_trains_saves_loads_and_takes_another_length_or_says_that_it_cannot(name, tmp_path):
    model, clip, labels = make(name, labels=["a", "b", "c"], frame_rate=8.0), random_clip(), torch.tensor([0, 2])
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    before = [weight.clone() for weight in model.parameters()]
    for _ in range(2):
        loss = torch.nn.functional.cross_entropy(model(clip).logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    changed = [not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True)]
    assert loss.isfinite() and sum(changed) > len(changed) / 2
    model.eval().save_pretrained(tmp_path)
    loaded = Recognizer.from_pretrained(tmp_path)
    assert loaded.labels == ["a", "b", "c"] and loaded.config.frame_rate == 8.0 and loaded.config.name == name
    with torch.no_grad():
        output = model(clip)
        assert torch.equal(output.logits, loaded(clip).logits)
        assert output.logits.shape == (2, 3) and output.features.ndim == 2
        longer = random_clip(num_frames=24)
        if name in FIXED_LENGTH:
            with pytest.raises(ValueError, match=f"{name} takes clips of 16 frames only, got 24"):
                model(longer)
        else:
            assert model(longer).logits.shape == (2, 3)


@pytest.mark.parametrize("name", STREAMED)
@pytest.mark.parametrize("parts", [[1] * 6, [2, 4], [3, 1, 2]])
def test_a_streamed_clip_has_the_scores_of_the_whole_clip(name, parts):
    model, clip = make(name).eval(), random_clip(num_frames=6)
    state, frame_logits = TemporalState(), []
    with torch.no_grad():
        whole = model(clip)
        for part in clip.split(parts, dim=2):
            output = model(part, state=state)
            frame_logits.append(output.frame_logits)
    torch.testing.assert_close(torch.cat(frame_logits, dim=1), whole.frame_logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(output.logits, whole.logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", STREAMED)
def test_no_score_of_a_frame_depends_on_later_frames(name):
    model, clip = make(name).eval(), random_clip(num_frames=6)
    other = torch.cat([clip[:, :, :4], -clip[:, :, 4:]], dim=2)
    with torch.no_grad():
        first, second = model(clip).frame_logits, model(other).frame_logits
    torch.testing.assert_close(first[:, :4], second[:, :4])
    assert not torch.allclose(first[:, 4:], second[:, 4:])


@pytest.mark.parametrize("name", MASKED)
def test_padding_under_a_mask_does_not_change_the_scores(name):
    model = make(name, num_frames=6).eval()
    clip, mask = random_clip(num_frames=6), torch.arange(6) < torch.tensor([[6], [4]])
    other = clip.clone()
    other[1, :, 4:] = 0.5
    with torch.no_grad():
        masked, padded = model(clip, mask=mask).logits, model(other, mask=mask).logits
        assert not torch.allclose(model(clip).logits[1], model(other).logits[1])
    torch.testing.assert_close(masked, padded)


@pytest.mark.parametrize("name", [name for name in MASKED if not name.endswith("attention")])
def test_a_masked_clip_has_the_scores_of_the_shorter_clip(name):
    model, clip = make(name, num_frames=6).eval(), random_clip(1, num_frames=6)
    with torch.no_grad():
        masked, short = model(clip, mask=torch.arange(6)[None] < 4), model(clip[:, :, :4])
    torch.testing.assert_close(masked.logits, short.logits)


@pytest.mark.parametrize("name", sorted(set(NAMES) - set(STREAMED)))
def test_networks_that_see_whole_clips_refuse_a_stream(name):
    with pytest.raises(ValueError, match=f"{name} sees whole clips and cannot run over a stream"):
        make(name)(random_clip(), state=TemporalState())


@pytest.mark.parametrize("name", sorted(set(NAMES) - set(MASKED)))
def test_networks_without_masks_refuse_one(name):
    with pytest.raises(ValueError, match=f"{name} does not take a mask"):
        make(name)(random_clip(), mask=torch.ones(2, 16, dtype=torch.bool))


def test_a_state_belongs_to_one_recognizer():
    state, clip = TemporalState(), random_clip(num_frames=1)
    make("cnn_lstm")(clip, state=state)
    with pytest.raises(ValueError, match="belongs to"):
        make("cnn_gru")(clip, state=state)


def test_several_labels_have_independent_probabilities():
    logits = torch.tensor([[0.0, 2.0, -1.0]])
    torch.testing.assert_close(make("tsn").probabilities(logits), logits.softmax(-1))
    torch.testing.assert_close(make("tsn", multi_label=True).probabilities(logits), logits.sigmoid())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("c4d", 3, 16, 32), r"unknown recognizer 'c4d' \(nearest: c3d\); available: single_frame, "),
        (("c3d", 0, 16, 112), "num_classes must be"),
        (("c3d", 3, 8, 112), "c3d needs at least 16 frames, got 8"),
        (("c3d", 3, 16, 16), "c3d needs frames of at least 32 pixels per side, got 16"),
        (("slow_fusion", 3, 9, 32), "slow_fusion needs at least 10 frames, got 9"),
        (("two_stream", 3, 10, 32), "two_stream needs at least 11 frames, got 10"),
        (("divided_attention", 3, 16, 36), "image_size must be a multiple of patch_size=8, got 36"),
    ],
)
def test_networks_that_cannot_be_made_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        create_recognizer(*arguments)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"width": 3}, "cnn_lstm has no size 'width'; it has channels, dim, grid, num_layers"),
        ({"cell": "gru"}, "cnn_lstm has no size 'cell'"),
        ({"labels": ["a"]}, "labels must name all 3 classes, got 1"),
    ],
)
def test_unknown_sizes_and_missing_labels_are_named(sizes, message):
    with pytest.raises(ValueError, match=message):
        create_recognizer("cnn_lstm", 3, 16, 32, **sizes)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("tsn", (2, 3, 32, 32), r"clip must be \(b, 3, f, h, w\), got \(2, 3, 32, 32\)"),
        ("cnn_gru", (2, 3, 0, 32, 32), r"got \(2, 3, 0, 32, 32\)"),
        ("tsn", (2, 1, 16, 32, 32), r"got \(2, 1, 16, 32, 32\)"),
        ("tsn", (2, 3, 2, 32, 32), "tsn needs at least 3 frames, got 2"),
        ("tsn", (2, 3, 16, 4, 32), "tsn needs frames of at least 8 pixels per side, got 4"),
        ("joint_attention", (2, 3, 16, 32, 40), "joint_attention takes frames of 32x32 only, got 32x40"),
        ("i3d", (2, 3, 4, 32, 32), "i3d needs at least 5 frames, got 4"),
        ("r2plus1d", (2, 3, 16, 8, 8), "r2plus1d needs frames of at least 16 pixels per side, got 8"),
    ],
)
def test_clips_of_a_wrong_shape_are_refused(name, shape, message):
    with pytest.raises(ValueError, match=message):
        make(name)(torch.zeros(shape))


def test_a_stage_without_a_place_for_a_non_local_block_is_refused():
    with pytest.raises(ValueError, match="non_local must be stages from 0 to 4, got 5"):
        make("c3d", non_local=[5])


@torch.no_grad()
def test_the_packaged_recognizer_names_what_moves_and_is_small():
    folder = find_packaged("vgen/shapes-64-recognizer")
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 3e6
    model, tasks = load_recognizer("vgen/shapes-64-recognizer"), ShapesTasks("scene", 17, seed=123)
    scenes = [tasks.scene(number) for number in range(8)]
    rows = model.probabilities(model(tasks.clips(scenes)).logits).tolist()
    for scene, row in zip(scenes, rows, strict=True):
        assert set(model.seen(row)) == {tasks.classes[label] for label in scene.labels}
