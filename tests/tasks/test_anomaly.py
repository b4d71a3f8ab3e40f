import numpy as np
import pytest

from vgen.data.shapes import ShapesWorld, render
from vgen.io.pixels import to_frames
from vgen.pipeline import VideoGenPipeline
from vgen.tasks.anomaly import find_anomalies


class Repeats:
    """A pipeline that repeats the last frame, and records its inputs."""

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
def test_an_event_is_marked_at_its_frame(jump):
    pipe = Repeats()
    result = find_anomalies(pipe, film(jump), ahead=1)
    assert (
        result.anomalous_frames == [jump]
        and np.isnan(result.scores[:5]).all()
        and np.isfinite(result.scores[5:]).all()
    )
    assert result.scores[jump] == pytest.approx((80 / 255) ** 2, rel=0.05)
    assert np.array_equal(pipe.given[2], film(jump)[2:7])  # true frames, not predicted ones


def test_an_event_marks_the_rest_of_its_prediction():
    found = find_anomalies(Repeats(), film(14), ahead=4)  # predictions begin at 5, 9, 13, 17, 21
    assert found.anomalous_frames == [14, 15, 16]


def test_the_packaged_checkpoint_marks_a_change_of_the_object():
    world = ShapesWorld(num_objects=(1,), seed=7)
    first, second = to_frames(render([world.scene(0), world.scene(1)]))
    video = np.concatenate([first[:11], second[11:]])
    pipe = VideoGenPipeline.from_pretrained("vgen/shapes-64")
    pipe.set_progress_bar_config(disable=True)
    result = find_anomalies(pipe, video, ahead=2, num_inference_steps=4)
    assert result.anomalous_frames[0] == 11 and result.scores[11] > 100 * np.nanmedian(result.scores[:11])
    assert find_anomalies(pipe, first, ahead=2, num_inference_steps=4).anomalous_frames == []


def test_without_an_event_no_frame_is_marked():
    assert find_anomalies(Repeats(), film(), ahead=4).anomalous_frames == []
    still = np.full((12, 8, 8, 3), 7, np.uint8)
    result = find_anomalies(Repeats(), still)
    assert result.anomalous_frames == [] and result.scores[5:].max() == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [({"given": 30}, "more than given=30"), ({"ahead": 0}, "ahead must be an integer of at least 1, got 0")],
)
def test_invalid_settings_are_an_error(options, message):
    with pytest.raises(ValueError, match=message):
        find_anomalies(Repeats(), film(), **options)


def test_a_video_that_is_not_uint8_is_an_error():
    with pytest.raises(ValueError, match="video must be uint8, got float64"):
        find_anomalies(Repeats(), film() / 255)
