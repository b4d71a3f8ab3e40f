import struct
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from vgen.data.formats import OutputOptions
from vgen.data.video_io import read_video, video_info
from vgen.tasks.video_files import generate_file, interpolate_file, predict_file

from ..data.test_video_io import encode, moving_pattern, shuffled, spoil
from ..test_pipeline import PROMPT, make_pipeline


@pytest.fixture(scope="module")
def pipe():
    return make_pipeline(tasks=["text", "leading", "keyframes"], window=2, sink=1)


def test_predict_keeps_the_duration_of_a_variable_frame_rate(pipe, tmp_path):
    """The header states 25 frames per second; the time stamps give 8."""
    path = encode(tmp_path / "clip.mkv", moving_pattern(17, 16, 16), rate=25, times=shuffled(17, 8))
    predict_file(pipe, path, tmp_path / "all", num_frames=1, with_input=True)
    frames, rate = read_video(tmp_path / "all")
    given, duration = frames[:-1], video_info(path).duration
    assert len(given) / rate == pytest.approx(duration, abs=1 / rate)
    assert np.array_equal(given, read_video(path, frame_rate=rate)[0])


@pytest.mark.parametrize("suffix", [".mkv", ".webm", ".mp4", ".gif"])
def test_interpolate_keeps_the_duration_of_a_variable_frame_rate(pipe, tmp_path, suffix):
    """At `factor` times the mean rate, each given frame is shown at the time at which the input shows it."""
    frames, times = moving_pattern(9, 16, 16), [0, 40, 80, 120, 500, 1000, 1500, 1540, 2000]
    if suffix == ".gif":
        stills = [Image.fromarray(frame) for frame in frames]
        durations = np.diff([*times, 2250]).tolist()
        stills[0].save(tmp_path / "clip.gif", save_all=True, append_images=stills[1:], duration=durations, loop=0)
        path = tmp_path / "clip.gif"
    else:
        codec = "libvpx-vp9" if suffix == ".webm" else "libx264"
        path = encode(tmp_path / f"clip{suffix}", frames, codec, rate=25, times=times)
    rate = video_info(path).frame_rate
    assert rate == pytest.approx(4, abs=0.5)  # 9 frames, of which the last one is shown from 2 s on
    interpolate_file(pipe, path, tmp_path / "smooth", factor=3, written=OutputOptions(fps=3 * rate))
    interpolate_file(pipe, path, tmp_path / "slow", factor=3)
    smooth, fast = read_video(tmp_path / "smooth")
    slow, normal = read_video(tmp_path / "slow")
    assert np.array_equal(smooth, slow) and (fast, normal) == pytest.approx((3 * rate, rate))
    stored, given = read_video(path)[0], smooth[::3]
    stamps = np.array(times) / 1000
    shown = [np.searchsorted(stamps, index / rate + 0.006, side="right") - 1 for index in range(len(given))]
    assert np.array_equal(given, stored[shown])
    assert len(given) / rate == pytest.approx(video_info(path).duration, abs=1 / rate)


def test_predict_and_interpolate_write_square_pixels_of_the_same_shape(pipe, tmp_path):
    path = encode(tmp_path / "clip.mov", moving_pattern(5, 32, 24), "qtrle", "rgb24", aspect=Fraction(2))
    predict_file(pipe, path, tmp_path / "all", num_frames=1, with_input=True)
    interpolate_file(pipe, path, tmp_path / "slow.mp4")
    stored = read_video(path)[0][:, :, 4:20]  # 16 columns twice as wide as high are shown as 32
    written = read_video(tmp_path / "all")[0]
    assert written.shape[1:3] == (32, 32) == read_video(tmp_path / "slow.mp4")[0].shape[1:3]
    shown = np.stack([Image.fromarray(frame).resize((32, 32), Image.Resampling.LANCZOS) for frame in stored])
    assert np.array_equal(written[:5], shown)


def test_predict_warns_of_a_damaged_video(pipe, tmp_path, caplog):
    noise = np.random.default_rng(0).integers(0, 256, (48, 32, 32, 3), np.uint8)
    for name, codec in (("a.mp4", "libx264"), ("a.webm", "libvpx-vp9")):
        caplog.clear()
        path = spoil(encode(tmp_path / name, noise, codec, rate=25, g=8))
        predict_file(pipe, path, tmp_path / f"future {name[2:]}", num_frames=1)
        assert len([message for message in caplog.messages if f"{name} is damaged" in message]) == 1


@pytest.mark.parametrize("mode", ["I;16", "F", "P", "RGBA"])
def test_animate_begins_with_any_kind_of_still(pipe, tmp_path, mode):
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    image = {
        "I;16": Image.fromarray(ramp.astype(np.uint16) * 257),
        "F": Image.fromarray(ramp.astype(np.float32) / 255),
        "P": Image.fromarray(ramp).convert("P"),
        "RGBA": Image.merge("RGBA", [Image.fromarray(channel) for channel in (ramp, ramp, ramp, ramp)]),
    }[mode]
    path = tmp_path / ("first.tif" if mode == "F" else "first.png")
    image.save(path)
    generate_file(pipe, PROMPT, tmp_path / "video", image=path)
    expected = np.round(ramp / 255.0 * ramp) if mode == "RGBA" else ramp
    assert np.array_equal(read_video(tmp_path / "video")[0][0], np.repeat(expected[..., None], 3, -1))


def test_mirrored_video_is_predicted_as_it_is_shown(pipe, tmp_path):
    frames = moving_pattern(5, 16, 16)
    path = encode(tmp_path / "clip.mov", frames, "qtrle", "rgb24")
    data = bytearray(path.read_bytes())
    matrix = data.find(b"tkhd") + 44
    data[matrix : matrix + 36] = struct.pack(">9i", -1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    predict_file(pipe, path, tmp_path / "all", num_frames=1, with_input=True)
    assert np.array_equal(read_video(tmp_path / "all")[0][:5], frames[:, :, ::-1])
    with av.open(str(path)) as container:  # as FFmpeg shows it
        assert next(container.decode(video=0)).rotation in (180, -180)
