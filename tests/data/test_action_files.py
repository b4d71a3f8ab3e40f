"""Actions of videos: the brightness of each frame is its action, so that a clip shows which actions it must have."""

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from vgen.cli import app
from vgen.data.action_files import read_actions_file
from vgen.data.augment import Augmentation
from vgen.data.clips import Bucket, Sampling, VideoFolder, list_videos
from vgen.data.validate import validate_folder
from vgen.data.video_io import write_video

NUM_FRAMES = 20


def write(folder, name, suffix=".npz", count=NUM_FRAMES):
    """A video whose frames get brighter, and its actions."""
    levels = np.arange(NUM_FRAMES) * 12
    frames = np.broadcast_to(levels[:, None, None, None], (NUM_FRAMES, 16, 16, 3)).astype(np.uint8)
    write_video(frames, folder / f"{name}.mp4", frame_rate=8.0)
    actions = np.stack([levels, -levels], axis=1)[:count]
    if suffix == ".npz":
        np.savez(folder / f"{name}.npz", actions=actions, states=actions)
    else:
        np.save(folder / f"{name}.npy", actions)


@pytest.fixture
def videos(tmp_path):
    write(tmp_path, "one")
    write(tmp_path, "two", ".npy")
    write(tmp_path, "without")
    (tmp_path / "without.npz").unlink()
    return tmp_path


@pytest.mark.parametrize(
    "sampling",
    [
        {"num_frames": 5},
        {"num_frames": 5, "kind": "sliding", "hop": 3},
        {"num_frames": NUM_FRAMES, "kind": "uniform"},
        {"num_frames": 5, "frame_rate": 8.0},
    ],
)
def test_a_clip_has_the_actions_of_its_frames(videos, sampling):
    clips = VideoFolder(videos, Sampling(**sampling), 16, 16)
    found = 0
    for index, epoch in ((index, epoch) for index in range(len(clips)) for epoch in range(3)):
        clip = clips.clip(index, epoch)
        if clip.source.path.stem == "without":
            assert clip.actions is None
            continue
        found += 1
        shown = clip.frames.mean((1, 2, 3))
        assert clip.actions.dtype == np.float32 and clip.actions.shape == (len(shown), 2)
        assert np.abs(clip.actions[:, 0] - shown).max() < 5 and (clip.actions[:, 1] == -clip.actions[:, 0]).all()
    assert found


def test_segments_of_a_video_have_theirs_and_padding_has_none(videos):
    rows = [{"file_name": "one.mp4", "text": "", "actions": "one.npz", "start": 1.0, "end": 2.25}]
    (videos / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (clip,) = (VideoFolder(videos, Sampling(num_frames=14, short="pad"), 16, 16)[0],)
    assert clip.real.sum() == 10
    assert np.abs(clip.actions[:10, 0] - clip.frames[:10].mean((1, 2, 3))).max() < 5
    assert clip.actions[0, 0] == 8 * 12 and np.isnan(clip.actions[10:]).all()


def test_metadata_names_the_file(videos):
    (videos / "metadata.jsonl").write_text(json.dumps({"file_name": "two.mp4", "text": "a", "actions": "two.npy"}))
    (listed,) = list_videos(videos)
    assert listed.actions == videos / "two.npy"
    (videos / "metadata.jsonl").write_text(json.dumps({"file_name": "two.mp4", "text": "a", "actions": 3}))
    with pytest.raises(ValueError, match="actions must be the name of a file, got 3"):
        list_videos(videos)


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        ({"num_frames": 5, "frame_rate": 4.0}, "at 8 per second and with stride 1"),
        ({"num_frames": 5, "stride": 2}, "at 8 per second and with stride 1"),
        ({"num_frames": 5, "kind": "segments"}, "at 8 per second and with stride 1"),
    ],
)
def test_clips_that_leave_out_frames_are_skipped_with_a_reason(videos, sampling, message):
    clips = VideoFolder(videos, Sampling(**sampling), 16, 16)
    made = [clips[index] for index in range(len(clips))]
    assert {clip.source.path.stem for clip in made if clip is not None} == {"without"}
    assert all(message in reason for reason in clips.skipped.values()) and len(clips.skipped) == 2


def test_another_number_of_actions_than_frames_is_skipped_with_a_reason(tmp_path):
    write(tmp_path, "short", count=NUM_FRAMES - 1)
    clips = VideoFolder(tmp_path, Sampling(num_frames=5), 16, 16)
    assert clips[0] is None
    assert "has actions for 19 frames, and the video has 20" in next(iter(clips.skipped.values()))


@pytest.mark.parametrize("name", ["flip", "rotate", "reverse"])
def test_augmentation_that_would_change_their_meaning_is_rejected(videos, name):
    with pytest.raises(ValueError, match=f"which would not be changed with the pictures: set {name}=0"):
        VideoFolder(videos, Sampling(num_frames=5), 16, 16, augmentation=Augmentation(**{name: 1.0}))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (np.zeros((2, 3, 4)), r"actions must have shape \(frames, channels\), got \(2, 3, 4\)"),
        (np.full((2, 3), np.inf), "must be finite, or NaN"),
        (np.array(["left", "right"]), "contains no numeric array of actions"),
        (np.array([{}, {}], dtype=object), "contains no numeric array of actions"),
    ],
)
def test_invalid_files_are_one_line(tmp_path, content, message):
    np.savez(tmp_path / "a.npz", actions=content)
    with pytest.raises(ValueError, match=message):
        read_actions_file(tmp_path / "a.npz")


def test_missing_and_other_files_are_one_line(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no file"):
        read_actions_file(tmp_path / "a.npz")
    np.savez(tmp_path / "a.npz", states=np.zeros(3))
    with pytest.raises(ValueError, match="contains no numeric array of actions"):
        read_actions_file(tmp_path / "a.npz")
    (tmp_path / "a.txt").write_text("1 2 3")
    with pytest.raises(ValueError, match="must be one of .npz, .npy"):
        read_actions_file(tmp_path / "a.txt")
    np.save(tmp_path / "one.npy", np.arange(3))
    assert read_actions_file(tmp_path / "one.npy").shape == (3, 1)


def test_validation_describes_actions_and_refuses_videos_with_another_number(videos):
    write(videos, "short", count=NUM_FRAMES - 1)
    write(videos, "still")
    np.savez(videos / "still.npz", actions=np.ones((NUM_FRAMES, 2)))
    entries = {name_of(one): one for one in validate_folder(videos, [Bucket(5, 16, 16)])["clips"]}
    assert entries["without"]["actions"] is None and entries["without"]["accepted"]
    expected = {"channels": 2, "lowest": [12, -228], "highest": [228, -12], "constant": False}
    assert entries["one"]["actions"] == entries["two"]["actions"] == expected
    assert entries["still"]["actions"]["constant"] and entries["still"]["accepted"]
    assert "has actions for 19 frames, and the video has 20" in entries["short"]["reason"]
    report = validate_folder(videos, [Bucket(5, 16, 16)], frame_rate=4.0)
    refused = {name_of(one) for one in report["clips"] if not one["accepted"]}
    assert refused == {"one", "two", "short", "still"}
    done = CliRunner().invoke(app, ["data", "validate", str(videos), "--bucket", "5x16x16"])
    assert "actions: 3 videos have some, with 2 channels; in 1 all are constant" in done.output


def name_of(entry):
    return Path(entry["path"]).stem
