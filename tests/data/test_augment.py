import sys

import numpy as np
import pytest

from vgen.data.augment import Augmentation, _make_steps, augment, draw_offset

pytest.importorskip("kornia")

GEOMETRY = [{"crop": 0.3}, {"flip": 0.5}, {"rotate": 30.0}, {"crop": 0.5, "flip": 0.5, "rotate": 10.0}]
COLOR = {"brightness": 0.5, "contrast": 0.5, "saturation": 0.5, "hue": 0.2}


@pytest.fixture
def still():
    """One textured frame, five times."""
    rng = np.random.default_rng(0)
    frame = np.kron(rng.integers(0, 256, (6, 8, 3)), np.ones((4, 4, 1))).astype(np.uint8)
    return np.repeat(frame[None], 5, axis=0)


def outcomes(clip, augmentation, count=8):
    return [augment(clip, augmentation, seed) for seed in range(count)]


@pytest.mark.parametrize("settings", GEOMETRY)
def test_geometry_is_the_same_for_every_frame_and_differs_between_clips(still, settings):
    augmented = outcomes(still, Augmentation(**settings))
    assert all(one.shape == still.shape and one.dtype == np.uint8 for one in augmented)
    assert all((one == one[:1]).all() for one in augmented)
    assert len({one.tobytes() for one in augmented}) > 1


def test_colors_change_together_or_frame_by_frame(still):
    together = outcomes(still, Augmentation(**COLOR))
    assert all((one == one[:1]).all() for one in together) and len({one.tobytes() for one in together}) == 8
    apart = outcomes(still, Augmentation(**COLOR, color_per_frame=True))
    assert not any((one == one[:1]).all() for one in apart)
    both = outcomes(still, Augmentation(flip=1.0, brightness=0.5, color_per_frame=True))
    for one in both:  # each frame is mirrored, whatever its brightness
        corners = one[:, :, :, 1].astype(float)
        assert all(np.corrcoef(frame.ravel(), still[0, :, ::-1, 1].ravel())[0, 1] > 0.9 for frame in corners)


def test_a_mirrored_clip_is_mirrored_exactly(still):
    assert np.array_equal(augment(still, Augmentation(flip=1.0), 0), still[:, :, ::-1])


def test_nothing_changes_by_default_and_a_seed_repeats(still):
    assert augment(still, Augmentation(), 0) is still
    settings = Augmentation(crop=0.3, hue=0.3)
    assert np.array_equal(augment(still, settings, 3), augment(still, settings, 3))


def test_brightness_changes_by_the_given_fraction(still):
    gray = np.full_like(still, 100)
    levels = {int(one[0, 0, 0, 0]) for one in outcomes(gray, Augmentation(brightness=0.2), 30)}
    assert min(levels) >= 80 and max(levels) <= 120 and max(levels) - min(levels) > 20


@pytest.mark.parametrize(
    "settings",
    [
        {"crop": 0.0},
        {"flip": 1.5},
        {"rotate": -1.0},
        {"hue": 0.7},
        {"contrast": -0.1},
        {"flip": "1"},
        {"reverse": 1.1},
        {"position": -0.5},
        {"hue": float("nan")},
    ],
)
def test_settings_out_of_range_raise(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        Augmentation(**settings)


def test_missing_kornia_raises_with_the_extra(still, monkeypatch):
    _make_steps.cache_clear()
    monkeypatch.setitem(sys.modules, "kornia.augmentation", None)
    with pytest.raises(ImportError, match=r"pip install vgen\[data\]"):
        augment(still, Augmentation(flip=0.123), 0)


@pytest.fixture
def moving():
    """Frame i is i everywhere."""
    return np.arange(5, dtype=np.uint8)[:, None, None, None].repeat(4, 1).repeat(6, 2).repeat(3, 3)


def test_a_reversed_clip_shows_its_real_frames_backwards(moving, monkeypatch):
    _make_steps.cache_clear()
    monkeypatch.setitem(sys.modules, "kornia.augmentation", None)  # not needed
    backwards = augment(moving, Augmentation(reverse=1.0), 0)
    assert np.array_equal(backwards, moving[::-1])
    padded = augment(moving, Augmentation(reverse=1.0), 0, num_real=3)
    assert padded[:, 0, 0, 0].tolist() == [2, 1, 0, 0, 0]  # the padding repeats the last real frame
    first = [int(one[0, 0, 0, 0]) for one in outcomes(moving, Augmentation(reverse=0.3), 200)]
    assert set(first) == {0, 4} and 0.2 < first.count(4) / 200 < 0.4


def test_crops_are_anywhere_within_the_limit():
    offsets = np.array([draw_offset(Augmentation(position=0.5), seed) for seed in range(300)])
    assert 0.25 <= offsets.min() < 0.27 and 0.73 < offsets.max() <= 0.75
    assert abs(np.corrcoef(offsets.T)[0, 1]) < 0.2
    assert draw_offset(Augmentation(position=1.0), 7) == draw_offset(Augmentation(position=1.0), 7)
    assert draw_offset(Augmentation(flip=0.5), 7) == (0.5, 0.5)
