import numpy as np
import pytest
from PIL import Image

from vgen.data.clips import Bucket, Sampling, VideoFolder, count_frames, list_videos
from vgen.data.validate import validate_folder

from .test_video_io import encode, moving_pattern, piped, shuffled, spoil

BUCKETS = [Bucket(5, 16, 16)]


@pytest.mark.parametrize("rate", [None, 8.0, 7.3])
def test_validation_and_training_count_the_same_frames(tmp_path, rate):
    encode(tmp_path / "51_at_25.mp4", moving_pattern(51), rate=25)
    encode(tmp_path / "audio_longer.mkv", moving_pattern(24), audio=12, g=6)
    piped(tmp_path / "piped.webm", moving_pattern(24), "libvpx-vp9")
    encode(tmp_path / "wrong_rate.mkv", moving_pattern(33), rate=25, times=shuffled(33, 8))
    encode(tmp_path / "b_frames.avi", moving_pattern(24), "mpeg4", bf=2)
    report = validate_folder(tmp_path, BUCKETS, frame_rate=rate)
    assert report["refused"] == 0
    counted = {str(one.path): count_frames(one, one.info(), rate)[0] for one in list_videos(tmp_path)}
    assert {clip["path"]: clip["num_frames"] for clip in report["clips"]} == counted
    folder = VideoFolder(tmp_path, Sampling(num_frames=5, kind="sliding", hop=1, frame_rate=rate), 16, 16)
    assert all(folder[index] is not None for index in range(len(folder))) and not folder.skipped
    if rate == 8.0:
        assert counted[str(tmp_path / "51_at_25.mp4")] == 17


@pytest.mark.parametrize("name, codec", [("a.mp4", "libx264"), ("a.mkv", "libx264"), ("a.webm", "libvpx-vp9")])
def test_damage_in_the_middle_is_named_and_training_skips_the_file(tmp_path, caplog, name, codec):
    noise = np.random.default_rng(0).integers(0, 256, (48, 32, 32, 3), np.uint8)
    encode(tmp_path / "good.mp4", noise, rate=25)
    spoil(encode(tmp_path / name, noise, codec, rate=25, g=8))
    report = validate_folder(tmp_path, BUCKETS)
    reasons = {clip["path"]: clip["reason"] for clip in report["clips"]}
    assert reasons[str(tmp_path / "good.mp4")] is None and report["refused"] == 1
    assert f"{name} is damaged" in reasons[str(tmp_path / name)]
    folder = VideoFolder(tmp_path, Sampling(num_frames=48), 16, 16)
    sources = [folder.sample(number).source.path.name for number in range(3)]
    assert sources == ["good.mp4"] * 3 and [one.path.name for one in folder.skipped] == [name]
    assert any(name in message and "skipped (" in message for message in caplog.messages)


def test_clips_of_non_square_pixels_have_the_shape_that_is_shown(tmp_path):
    """24 columns of pixels that are twice as wide as high are a wide picture, of which the center is a square."""
    encode(tmp_path / "a.mov", moving_pattern(5, 32, 24), "qtrle", "rgb24", aspect=2)
    wide = Bucket(5, 32, 48)
    assert validate_folder(tmp_path, [Bucket(5, 32, 24), wide])["clips"][0]["bucket"] == str(wide)
    clip = VideoFolder(tmp_path, Sampling(num_frames=5), 32, 16)[0]
    images = [Image.fromarray(frame) for frame in moving_pattern(5, 32, 24)[:, :, 8:16]]
    expected = np.stack([image.resize((16, 32), Image.Resampling.LANCZOS) for image in images])
    assert np.array_equal(clip.frames, expected)
