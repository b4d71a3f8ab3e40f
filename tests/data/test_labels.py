import json

import pytest

from tests.data.test_clips import write_clip
from vgen.data.clips import Listed, Sampling
from vgen.data.labels import Labeled, classes_of, list_labeled, timelines_of
from vgen.data.views import views_of


@pytest.fixture
def folder(tmp_path):
    for name in ("run/a.mp4", "run/b.mp4", "sit/c.gif"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_clip(tmp_path / name)
    return tmp_path


def write_rows(folder, *rows):
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))


def test_the_folder_of_a_video_is_its_label(folder):
    found = list_labeled(folder)
    assert [(one.video.path.name, one.labels) for one in found] == [
        ("a.mp4", ("run",)), ("b.mp4", ("run",)), ("c.gif", ("sit",)),
    ]  # fmt: skip
    assert classes_of(found) == ["run", "sit"] and classes_of(found, ["sit", "run"]) == ["sit", "run"]


def test_metadata_has_labels_of_videos_and_of_segments(folder):
    write_rows(
        folder,
        {"file_name": "run/a.mp4", "label": "jump", "start": 0.5, "end": 1},
        {"file_name": "run/a.mp4", "label": ["run", "jump", "run"], "text": "a man"},
    )
    segment = Listed(path=folder / "run/a.mp4", start=0.5, end=1.0, root=folder)
    whole = Listed(path=folder / "run/a.mp4", captions=("a man",), root=folder)
    assert list_labeled(folder) == [Labeled(segment, ("jump",)), Labeled(whole, ("run", "jump"))]


def test_csv_may_have_labels_without_captions(folder):
    (folder / "metadata.csv").write_text("file_name,label\nrun/a.mp4,jump\n")
    assert [one.labels for one in list_labeled(folder)] == [("jump",)]


def test_videos_without_a_label_are_named(folder, tmp_path):
    write_clip(folder / "d.mp4")
    with pytest.raises(ValueError, match=r"1 of 4 videos of .* have no label: expected a column label .*d\.mp4"):
        list_labeled(folder)
    (folder / "empty").mkdir()
    with pytest.raises(ValueError, match="contains no videos"):
        list_labeled(folder / "empty")
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        list_labeled(folder / "missing")


@pytest.mark.parametrize("label", [3, "", [""], [1], {"a": 1}])
def test_labels_must_be_strings(folder, label):
    write_rows(folder, {"file_name": "run/a.mp4", "label": label})
    with pytest.raises(ValueError, match="line 1: label must be a string or a list of strings, got"):
        list_labeled(folder)


def test_classes_must_be_known_and_have_videos(folder):
    found = list_labeled(folder)
    with pytest.raises(ValueError, match="unknown labels: sit; the classes are run, walk"):
        classes_of(found, ["run", "walk"])
    with pytest.raises(ValueError, match="no video has the label walk"):
        classes_of(found, ["run", "sit", "walk"])
    assert classes_of(found, ["run", "sit", "walk"], complete=False) == ["run", "sit", "walk"]


def test_timelines_have_all_segments_of_a_video(folder):
    write_rows(
        folder,
        {"file_name": "run/a.mp4", "label": "jump", "start": 0.5, "end": 1},
        {"file_name": "run/a.mp4", "label": ["run", "fall"], "start": 1.2},
        {"file_name": "run/b.mp4", "label": "run"},
    )
    assert [(one.video.path.name, one.events) for one in timelines_of(list_labeled(folder))] == [
        ("a.mp4", (("jump", 0.5, 1.0), ("run", 1.2, 2.0), ("fall", 1.2, 2.0))), ("b.mp4", (("run", 0.0, 2.0),)),
    ]  # fmt: skip


@pytest.mark.parametrize("times", [{"start": 0, "end": 3}, {"start": 2.5, "end": 2.6}])
def test_time_stamps_outside_of_the_video_are_named(folder, times):
    write_rows(folder, {"file_name": "run/a.mp4", "label": "run"} | times)
    with pytest.raises(ValueError, match=r"a\.mp4 lasts 2 s, but its label run is for"):
        timelines_of(list_labeled(folder))


def shown(clips):
    return [round(clip.frames[0].mean() / 10) for clip in clips]


def test_views_are_at_equal_distances_from_the_first_frame_to_the_last(folder):
    video, sampling = Listed(path=folder / "run/a.mp4"), Sampling(num_frames=4)
    assert shown(views_of(video, sampling, 16)) == [8]
    assert shown(views_of(video, sampling, 16, num_clips=3)) == [0, 8, 16]
    assert len(views_of(video, sampling, 16, num_clips=100)) == 17
    assert len(views_of(video, Sampling(num_frames=4, kind="uniform"), 16, num_clips=3)) == 1


def test_crops_are_at_equal_distances_over_the_longer_side(tmp_path):
    import numpy as np

    from vgen.data.video_io import write_video

    ramp = np.broadcast_to(np.arange(0, 240, 5, dtype=np.uint8)[None, :, None], (32, 48, 3))
    write_video(np.stack([ramp] * 4), tmp_path / "ramp.mp4", frame_rate=10.0)
    views = views_of(Listed(path=tmp_path / "ramp.mp4"), Sampling(num_frames=4), 32, num_crops=3)
    assert [round(view.frames[0].mean()) for view in views] == pytest.approx([77, 117, 157], abs=3)


def test_a_video_that_is_too_short_has_no_views(folder):
    with pytest.raises(ValueError, match=r"a\.mp4: 20 frames at 10 per second; a clip needs 30"):
        views_of(Listed(path=folder / "run/a.mp4"), Sampling(num_frames=30), 16)
