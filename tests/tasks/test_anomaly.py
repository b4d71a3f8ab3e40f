import numpy as np
import pytest

from vgen.data.shapes import ShapesWorld, render
from vgen.io.pixels import to_frames
from vgen.pipeline import VideoGenPipeline
from vgen.tasks.anomaly import find_anomalies


class Repeats:
    """Predicts that nothing moves; what it was given is written down."""

    def __init__(self):
        self.given = []

    def predict(self, video, num_frames, **_):
        self.given.append(video)
        frames = np.repeat(video[-1:], num_frames, axis=0) / 255.0
        return type("Output", (), {"frames": [frames]})


def film(jump=None, f=23):
    rng = np.random.default_rng(0)
    frames = np.full((f, 8, 8, 3), 100.0) + rng.normal(0, 1, (f, 8, 8, 3))
    if jump is not None:
        frames[jump:] += 80
    return frames.round().clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("jump", [9, 14])
def test_a_planted_event_stands_out_where_it_happens(jump):
    pipe = Repeats()
    found = find_anomalies(pipe, film(jump), ahead=1)
    assert found.jumps == [jump] and np.isnan(found.scores[:5]).all() and np.isfinite(found.scores[5:]).all()
    assert found.scores[jump] == pytest.approx((80 / 255) ** 2, rel=0.05)
    assert np.array_equal(pipe.given[2], film(jump)[2:7])  # true frames, not predicted ones


def test_an_event_in_a_piece_marks_its_rest():
    assert find_anomalies(Repeats(), film(14), ahead=4).jumps == [14, 15, 16]  # pieces begin at 5, 9, 13, 17, 21


def test_the_shipped_model_did_not_expect_another_object():
    world = ShapesWorld(num_objects=(1,), seed=7)
    first, second = to_frames(render([world.scene(0), world.scene(1)]))
    video = np.concatenate([first[:11], second[11:]])
    pipe = VideoGenPipeline.from_pretrained("vgen/shapes-64")
    pipe.set_progress_bar_config(disable=True)
    found = find_anomalies(pipe, video, ahead=2, num_inference_steps=4)
    assert found.jumps[0] == 11 and found.scores[11] > 100 * np.nanmedian(found.scores[:11])
    assert find_anomalies(pipe, first, ahead=2, num_inference_steps=4).jumps == []


def test_where_nothing_happens_nothing_stands_out():
    assert find_anomalies(Repeats(), film(), ahead=4).jumps == []
    still = np.full((12, 8, 8, 3), 7, np.uint8)
    found = find_anomalies(Repeats(), still)
    assert found.jumps == [] and found.scores[5:].max() == 0


@pytest.mark.parametrize(("options", "message"), [({"given": 30}, "more than given=30"), ({"ahead": 0}, "ahead=0")])
def test_impossible_settings_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        find_anomalies(Repeats(), film(), **options)


def test_values_other_than_bytes_are_refused():
    with pytest.raises(ValueError, match="float64 values: give uint8"):
        find_anomalies(Repeats(), film() / 255)
