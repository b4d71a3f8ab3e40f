import io
import os
import struct
import subprocess
import sys
import tracemalloc
import zlib
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from vgen.data import video_io
from vgen.data.memory_file import MemoryFile
from vgen.data.video_io import (
    VideoWriter,
    iter_video,
    join_videos,
    read_video,
    resampled_length,
    spread_frames,
    video_info,
    write_video,
)
from vgen.io import images

SUFFIXES = (".mp4", ".gif", ".webp", "")


def moving_pattern(num_frames=12, height=32, width=48):
    """Frames that all differ and that a palette of 256 colors holds exactly."""
    i, y, x = np.mgrid[:num_frames, :height, :width]
    return np.stack([(3 * x + 5 * i) % 200 // 16 * 16, 4 * y % 200 // 16 * 16, 10 + 3 * i], -1).astype(np.uint8)


class Pipe:
    """A file that cannot seek, so that lengths are not stored in its header."""

    def __init__(self, path, format):
        self.format, self._file = format, path.open("wb")

    def write(self, data):
        return self._file.write(data)


def encode(path, frames, codec="libx264", pixel_format="yuv420p", *, rate=8, times=None, audio=0, aspect=1, **options):
    """Writes a video with PyAV only; `times` are in milliseconds, `audio` in seconds."""
    clock = 1 / Fraction(rate) if times is None else Fraction(1, 1000)
    target, format = (path, path.format) if isinstance(path, Pipe) else (str(path), None)
    with av.open(target, "w", format=format) as container:
        stream = container.add_stream(codec, rate=rate, options={key: str(value) for key, value in options.items()})
        sound = container.add_stream("libopus", rate=48000, layout="mono") if audio else None
        stream.height, stream.width = frames.shape[1:3]
        stream.codec_context.sample_aspect_ratio = Fraction(aspect)
        stream.pix_fmt = pixel_format
        stream.time_base = stream.codec_context.time_base = clock
        for index, frame in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(frame, format="rgba" if frame.shape[-1] == 4 else "rgb24")
            picture = picture.reformat(format=pixel_format)
            picture.pts, picture.time_base = index if times is None else times[index], clock
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
        for index in range(50 * audio):
            silence = av.AudioFrame.from_ndarray(np.zeros((1, 960), np.float32), format="flt", layout="mono")
            silence.sample_rate, silence.pts, silence.time_base = 48000, 960 * index, Fraction(1, 48000)
            container.mux(sound.encode(silence))
        if audio:
            container.mux(sound.encode(None))
    return path


def mean_error(a, b):
    return np.abs(a.astype(int) - b.astype(int)).mean()


def listing(folder):
    return sorted(entry.name for entry in folder.iterdir())


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("size", [(32, 48), (31, 45), (1, 1), (2, 7)])
def test_read_after_write_gives_the_same_frames(tmp_path, suffix, size):
    frames = moving_pattern(4, *size)[[0, 1, 1, 1, 2, 3, 3]]
    path = tmp_path / f"clip{suffix}"
    odd = suffix == ".mp4" and (size[0] % 2 or size[1] % 2)
    with VideoWriter(path, 10.0, pixel_format="yuv444p" if odd else "yuv420p") as writer:
        writer.append(frames[0])
        writer.append(frames[1:])
        assert writer.num_frames == 7
    read, rate = read_video(path)
    assert read.shape == frames.shape and read.dtype == np.uint8 and rate == pytest.approx(10.0)
    assert mean_error(read, frames) <= (4 if suffix == ".mp4" else 0)
    info = video_info(path)
    assert (info.height, info.width, info.num_frames) == (*size, 7)
    assert info.codec == {".mp4": "h264", "": "png"}.get(suffix, suffix[1:])
    assert info.frame_rate == pytest.approx(10.0) and info.duration == pytest.approx(0.7)
    assert listing(tmp_path) == [path.name]


def test_the_same_frames_give_the_same_file_every_time(tmp_path):
    frames = np.random.default_rng(0).integers(0, 256, (40, 32, 32, 3), np.uint8)
    path, files = tmp_path / "clip.mp4", set()
    for _ in range(40):
        write_video(frames, path, overwrite=True)
        files.add(path.read_bytes())
        read_video(path)  # so that memory is not as it was
    assert len(files) == 1


def test_lower_crf_is_closer_to_the_original(tmp_path):
    frames, path = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8), tmp_path / "clip.mp4"
    errors = []
    for crf in (0, 20, 45):
        write_video(frames, path, crf=crf, overwrite=True)
        errors.append(mean_error(read_video(path)[0], frames))
    assert errors[0] < errors[1] < errors[2]


@pytest.mark.parametrize("rate", [8.0, 23.976, 30000 / 1001, 48.0])
@pytest.mark.parametrize("suffix", [".mp4", ".gif", ".webp", "", ".mkv", ".avi"])
def test_resampling_to_the_stored_rate_changes_nothing(tmp_path, suffix, rate):
    frames, path = moving_pattern(40, 8, 8), tmp_path / f"clip{suffix}"
    if suffix in (".mkv", ".avi"):
        encode(path, frames, "ffv1", "bgr0", rate=Fraction(rate).limit_denominator(1001))
    else:
        write_video(frames, path, rate)
    plain, mean_rate = read_video(path)
    resampled, told_rate = read_video(path, frame_rate=rate)
    assert np.array_equal(plain, resampled) and len(plain) == 40
    assert told_rate == rate and mean_rate == pytest.approx(rate, rel=0.02 if suffix == ".gif" else 1e-3)


@pytest.mark.parametrize("rate", [2.0, 7.3, 24.0])
@pytest.mark.parametrize("start, end", [(None, None), (0.35, None), (0.52, 1.7)])
@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_variable_frame_rate_is_resampled_by_time_stamps(tmp_path, suffix, rate, start, end):
    milliseconds = np.array([0, 40, 80, 500, 520, 1000, 1600, 1640])
    # times count from the first frame
    path = encode(tmp_path / f"clip{suffix}", moving_pattern(8), times=5000 + milliseconds, rate=25, g=3, crf=1)
    stored, mean_rate = read_video(path)
    assert len(stored) == 8 and mean_rate == pytest.approx(8 / 1.68, rel=0.03)
    read, _ = read_video(path, frame_rate=rate, start=start, end=end)
    ticks = (start or 0) + np.arange(1000) / rate
    ticks = ticks[ticks < min(end or 9.0, 1.68) - 1e-3]
    expected = np.searchsorted(milliseconds / 1000, ticks + 5e-3, side="right") - 1
    assert np.array_equal(read, stored[expected])


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_spread_frames_are_those_of_the_whole_video(tmp_path, suffix):
    write_video(moving_pattern(11), tmp_path / f"video{suffix}", frame_rate=7.0)
    frames, _ = read_video(tmp_path / f"video{suffix}")
    for count, expected in ((1, [0]), (3, [0, 5, 10]), (4, [0, 3, 7, 10]), (50, range(11))):
        assert np.array_equal(spread_frames(tmp_path / f"video{suffix}", count), frames[list(expected)])


def test_spread_frames_of_irregular_videos(tmp_path):
    pattern = moving_pattern(5)
    encode(tmp_path / "variable.mkv", pattern, times=[0, 100, 200, 300, 3000])
    frames = spread_frames(tmp_path / "variable.mkv", 3)  # most of the time, the fourth frame is shown
    assert len(frames) == 3 and np.array_equal(frames[1], read_video(tmp_path / "variable.mkv")[0][3])
    (tmp_path / "folder").mkdir()
    for index, frame in enumerate(pattern):
        Image.fromarray(frame).save(tmp_path / f"folder/{index}.png")
    assert np.array_equal(spread_frames(tmp_path / "folder", 3), pattern[[0, 2, 4]])


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".avi", ".mov", ".gif", ".webp", "", "mjpeg.avi", "alpha.webm"])
def test_a_part_equals_the_slice_of_the_whole(tmp_path, suffix):
    path, frames = tmp_path / f"clip{suffix}", moving_pattern(48, 16, 16)
    if suffix in (".gif", ".webp", ""):
        write_video(frames, path, 4.0)
    elif suffix == "mjpeg.avi":
        encode(path, frames, "mjpeg", "yuvj420p", rate=4)
    elif suffix == "alpha.webm":
        encode(path, frames, "libvpx-vp9", "yuva420p", rate=4, g=9, **{"auto-alt-ref": 0})
    else:
        encode(path, frames, "mpeg4" if suffix == ".avi" else "libx264", rate=4, g=9, bf=2)
    whole, _ = read_video(path)
    for start, end in [(0.0, 0.25), (1.0, 2.2), (6.1, 8.0), (7.25, 7.3), (11.5, 99.0), (None, 2.2), (9.0, None)]:
        first, last = int(np.ceil(4 * (start or 0))), 48 if end is None else int(np.ceil(4 * end))
        assert np.array_equal(read_video(path, start=start, end=end)[0], whole[first:last])
    assert np.array_equal(read_video(path, start=10.0, max_frames=3)[0], whole[40:43])


@pytest.mark.parametrize("flip", [1, -1])
@pytest.mark.parametrize("a, b, quarters", [(1, 0, 0), (0, 1, 3), (-1, 0, 2), (0, -1, 1)])
def test_frames_are_upright(tmp_path, a, b, quarters, flip):
    """The file is rotated; with `flip=-1`, its columns are flipped first."""
    frames = np.random.default_rng(0).integers(0, 256, (2, 4, 6, 3), np.uint8)
    path = encode(tmp_path / "phone.mov", frames, "qtrle", "rgb24")
    data = bytearray(path.read_bytes())
    matrix = data.find(b"tkhd") + 44
    data[matrix : matrix + 36] = struct.pack(
        ">9i", flip * a << 16, flip * b << 16, 0, -b << 16, a << 16, 0, 0, 0, 1 << 30
    )
    path.write_bytes(data)
    expected = np.rot90(frames[:, :, ::flip], quarters, axes=(1, 2))
    assert np.array_equal(read_video(path)[0], expected)
    assert (video_info(path).height, video_info(path).width) == expected.shape[1:3]


@pytest.mark.parametrize("codec, pixel_format", [("ffv1", "yuv420p10le"), ("prores_ks", "yuv422p10le")])
def test_10_bit_video_becomes_8_bit(tmp_path, codec, pixel_format):
    frames = moving_pattern(3)
    read, _ = read_video(
        encode(tmp_path / f"clip{'.mkv' if codec == 'ffv1' else '.mov'}", frames, codec, pixel_format)
    )
    assert read.dtype == np.uint8 and mean_error(read, frames) < 3


@pytest.mark.parametrize("size, padded", [((32, 48), (32, 48)), ((31, 45), (32, 46)), ((1, 1), (2, 2))])
def test_written_mp4_is_widely_playable_and_tags_its_colors(tmp_path, caplog, size, padded):
    frames = moving_pattern(3, *size)
    write_video(frames, tmp_path / "clip.mp4", crf=0)
    with av.open(str(tmp_path / "clip.mp4")) as container:
        context = container.streams.video[0].codec_context
        assert (context.name, context.pix_fmt, int(context.colorspace)) == ("h264", "yuv420p", 6)  # SMPTE 170M
        assert (context.color_primaries, context.color_trc) == (1, 13)  # BT.709, sRGB
    read, _ = read_video(tmp_path / "clip.mp4")
    expected = np.pad(frames, [(0, 0), (0, padded[0] - size[0]), (0, padded[1] - size[1]), (0, 0)], mode="edge")
    assert read.shape == expected.shape and mean_error(read, expected) < 4
    message = f"clip.mp4: {size[1]}x{size[0]} is written as {padded[1]}x{padded[0]}, because yuv420p needs even sizes"
    assert [message in line for line in caplog.messages] == ([] if size == padded else [True])


def test_a_written_mp4_keeps_all_color_detail_on_request(tmp_path, caplog):
    frames = np.random.default_rng(0).integers(0, 256, (3, 31, 45, 3), np.uint8)
    write_video(frames, tmp_path / "clip.mp4", crf=0, pixel_format="yuv444p")
    assert mean_error(read_video(tmp_path / "clip.mp4")[0], frames) < 2 and not caplog.messages
    for name, pixel_format in (("a.mp4", "rgb24"), ("a.gif", "yuv444p")):
        with pytest.raises(ValueError, match="pixel_format"):
            VideoWriter(tmp_path / name, pixel_format=pixel_format)


@pytest.mark.parametrize("suffix", [".mov", ".webp", ".gif"])
def test_transparent_pixels_are_composited_on_black(tmp_path, suffix):
    rgba = np.full((2, 8, 8, 4), 255, np.uint8)
    rgba[0, :, :4, 3] = 0 if suffix == ".gif" else 51
    rgba[1, 4:, :, :3] = 100
    path, (first, second) = tmp_path / f"clip{suffix}", map(Image.fromarray, rgba)
    if suffix == ".mov":
        encode(path, rgba, "qtrle", "argb")
    else:
        first.save(path, save_all=True, append_images=[second], duration=100, lossless=True, exact=True, disposal=2)
    expected = np.round(rgba[..., :3] * (rgba[..., 3:] / 255)).astype(int)
    assert np.abs(read_video(path)[0] - expected).max() <= 1


@pytest.mark.parametrize(
    "name, codec, pixel_format",
    [("a.webm", "libvpx-vp9", "yuva420p"), ("b.webm", "libvpx", "yuva420p"), ("a.mkv", "ffv1", "yuva444p"),
     ("a.mov", "png", "rgba"), ("b.mov", "prores_ks", "yuva444p10le")],
)  # fmt: skip
def test_hidden_colors_of_transparent_video_are_black(tmp_path, name, codec, pixel_format):
    rgba = np.full((3, 16, 32, 4), 255, np.uint8)
    rgba[:, :, :16] = (200, 40, 40, 0)
    options = {"auto-alt-ref": 0} if "vpx" in codec else {}  # libvpx does not support both
    read, _ = read_video(encode(tmp_path / name, rgba, codec, pixel_format, **options))
    assert mean_error(read[:, :, :12], np.zeros(1)) < 3 and mean_error(read[:, :, 20:], np.full(1, 255)) < 3


@pytest.mark.parametrize("transfer, name", [("smpte2084", "PQ"), ("arib-std-b67", "HLG")])
def test_hdr_video_is_an_error_that_names_the_format(tmp_path, transfer, name):
    color = {"color_trc": transfer, "color_primaries": "bt2020", "colorspace": "bt2020nc"}
    path = encode(tmp_path / "clip.mkv", moving_pattern(2), "ffv1", "yuv420p10le", **color)
    for call in (video_info, read_video):
        with pytest.raises(ValueError, match=f"clip.mkv is HDR video, {name} .*convert it to SDR"):
            call(path)


def test_wide_gamut_video_is_converted_to_the_primaries_of_srgb(tmp_path):
    color = {"color_trc": "iec61966-2-1", "color_primaries": "bt2020"}
    colors = np.array([[160, 120, 90], [110, 150, 120], [80, 90, 160], [128, 128, 128]], np.uint8)
    path = encode(tmp_path / "clip.mkv", np.tile(colors.repeat(8, 0), (1, 16, 1, 1)), "ffv1", "bgr0", **color)
    stored = colors / 255
    linear = np.where(stored <= 0.04045, stored / 12.92, ((stored + 0.055) / 1.055) ** 2.4)
    bt709 = linear @ np.array([[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]]).T
    expected = 255 * (1.055 * bt709 ** (1 / 2.4) - 0.055)  # ITU-R BT.2087
    assert np.abs(read_video(path)[0][0, 8, 4::8] - expected).max() < 1.5


def test_the_shape_of_pixels_is_reported(tmp_path):
    path = encode(tmp_path / "clip.mov", moving_pattern(2), aspect=Fraction(4, 3))
    assert video_info(path).pixel_aspect_ratio == pytest.approx(4 / 3)
    data = bytearray(path.read_bytes())
    matrix = data.find(b"tkhd") + 44
    data[matrix : matrix + 36] = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30)  # turned
    path.write_bytes(data)
    assert video_info(path).pixel_aspect_ratio == pytest.approx(3 / 4)


def piped(path, *arguments, **options):
    pipe = Pipe(path, {".mkv": "matroska", ".webm": "webm"}[path.suffix])
    encode(pipe, *arguments, **options)
    pipe._file.close()
    return path


def cut(path, first, frames, **options):
    """An mp4 whose edit list hides the first frames."""
    whole = encode(path.with_name("whole.mp4"), frames, **options)
    with av.open(str(whole)) as source, av.open(str(path), "w") as target:
        video = source.streams.video[0]
        stream = target.add_stream_from_template(video)
        tick = round(1 / (video.average_rate * video.time_base))
        for packet in source.demux(video):
            if packet.dts is not None:
                packet.pts, packet.dts, packet.stream = packet.pts - first * tick, packet.dts - first * tick, stream
                target.mux(packet)
    whole.unlink()
    return path


def shuffled(num_frames, rate):
    """Irregular times in milliseconds with this mean rate."""
    times = np.round(1000 * (np.arange(num_frames) + 0.4 * np.sin(np.arange(num_frames))) / rate).astype(int)
    return np.maximum(times, 0).tolist()


# Videos whose header does not give their number of frames or their duration: how to make it, frames, seconds.
MISLEADING = {
    "audio_longer.mkv": (lambda path: encode(path, moving_pattern(24), rate=8, audio=12, g=6), 24, 3.0),
    "audio_longer.webm": (lambda path: encode(path, moving_pattern(24), "libvpx-vp9", rate=8, audio=12), 24, 3.0),
    "piped.webm": (lambda path: piped(path, moving_pattern(24), "libvpx-vp9", rate=8), 24, 3.0),
    "piped.mkv": (lambda path: piped(path, moving_pattern(24), rate=8), 24, 3.0),
    "hidden_frames.webm": (
        lambda path: encode(path, moving_pattern(40), "libvpx", **{"auto-alt-ref": 1, "lag-in-frames": 16}), 40, 5.0
    ),
    "superframes.webm": (lambda path: encode(path, moving_pattern(40), "libvpx-vp9", **{"auto-alt-ref": 1}), 40, 5.0),
    "b_frames.avi": (lambda path: encode(path, moving_pattern(24), "mpeg4", bf=2), 24, 3.0),
    "wrong_rate.mkv": (lambda path: encode(path, moving_pattern(33), rate=25, times=shuffled(33, 8)), 33, 4.05),
    "wrong_rate.mp4": (lambda path: encode(path, moving_pattern(33), rate=25, times=shuffled(33, 8)), 33, 4.1),
    "fragmented.mp4": (
        lambda path: encode(path, moving_pattern(24), movflags="frag_keyframe+empty_moov", g=6), 24, 3.0
    ),
    "edit_list.mp4": (lambda path: cut(path, 5, moving_pattern(24), g=12, bf=2), 19, 19 / 8),
    "51_at_25.mp4": (lambda path: encode(path, moving_pattern(51), rate=25), 51, 2.04),
    "ntsc.mkv": (lambda path: encode(path, moving_pattern(30), rate=Fraction(30000, 1001)), 30, 1.001),
}  # fmt: skip


@pytest.mark.parametrize("name", MISLEADING)
def test_number_and_times_of_frames_are_those_that_reading_gives(tmp_path, name):
    make, num_frames, duration = MISLEADING[name]
    path = make(tmp_path / name)
    info = video_info(path)
    assert (info.num_frames, info.damage) == (num_frames, None)
    assert info.duration == pytest.approx(duration, abs=0.06 if "wrong" in name else 2e-3)
    assert info.frame_rate == pytest.approx(num_frames / info.duration, rel=1e-3)
    assert sum(1 for _ in iter_video(path)) == num_frames
    for rate in (2.0, 7.3, 8.0, 25.0, info.frame_rate):
        assert sum(1 for _ in iter_video(path, frame_rate=rate)) == resampled_length(info.duration, rate)
    for start, end in ((0.3, 0.9), (0.6, 9.0)):
        read, _ = read_video(path, start=start, end=end, frame_rate=8.0)
        assert len(read) == resampled_length(info.duration, 8.0, start, end)


def test_a_rate_that_the_header_states_exactly_is_kept(tmp_path):
    path = encode(tmp_path / "clip.mkv", moving_pattern(30), rate=Fraction(30000, 1001))
    assert video_info(path).frame_rate == 30000 / 1001
    assert resampled_length(2.04, 8.0) == 17


def test_frames_before_the_first_keyframe_are_left_out(tmp_path):
    """An open group of pictures, cut at a keyframe: the first frames on display refer to a frame that is gone."""
    options = {"x264-params": "open-gop=1:scenecut=0:b-adapt=0", "g": 12, "bf": 3}
    whole, path = encode(tmp_path / "whole.mp4", moving_pattern(36), **options), tmp_path / "clip.mp4"
    with av.open(str(whole)) as source, av.open(str(path), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        packets = [packet for packet in source.demux(video=0) if packet.dts is not None]
        second = [packet.is_keyframe for packet in packets].index(True, 1)
        assert any(packet.pts < packets[second].pts for packet in packets[second:])
        for packet in packets[second:]:
            packet.stream = stream
            target.mux(packet)
    info, read = video_info(path), read_video(path)[0]
    assert info.damage is None and info.num_frames == len(read) < len(packets) - second
    assert np.array_equal(read, read_video(whole)[0][-len(read) :])


def spoil(path, fraction=0.5, length=2000):
    """Overwrites a part of the file with noise."""
    data = bytearray(path.read_bytes())
    first = int(fraction * len(data))
    length = min(length, len(data) // 8)
    data[first : first + length] = np.random.default_rng(0).bytes(length)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("fraction", [0.4, 0.6])
@pytest.mark.parametrize(
    "name, codec",
    [("a.mp4", "libx264"), ("a.mkv", "libx264"), ("a.webm", "libvpx-vp9"), ("b.webm", "libvpx"), ("b.mp4", "mpeg4"),
     ("a.avi", "mpeg4"), ("b.avi", "mjpeg"), ("b.mkv", "ffv1"), ("c.mp4", "libsvtav1"), ("c.mkv", "mpeg2video")],
)  # fmt: skip
def test_damage_in_the_middle_is_reported_and_gives_no_wrong_frames(tmp_path, caplog, name, codec, fraction):
    if codec not in av.codecs_available:
        pytest.skip(f"this PyAV has no {codec}")
    size = 64 if "av1" in codec else 32  # small packets: VP8 and VP9 notice only damage beyond the content of a frame
    noise = np.random.default_rng(0).integers(0, 256, (24, size, size, 3), np.uint8)
    pixel_format = "yuvj420p" if codec == "mjpeg" else "yuv420p"
    path = encode(tmp_path / name, noise.repeat(2, 0), codec, pixel_format, rate=25, g=8)
    whole = read_video(path)[0]
    spoil(path, fraction)
    read, reports = [], []
    with pytest.raises(ValueError, match=f"{name} is damaged"):
        read.extend(iter_video(path))
    if (damage := video_info(path).damage) is None:  # then each frame before the error is right
        assert np.array_equal(read, whole[: len(read)])
    else:
        assert f"{name} is damaged" in damage
    assert len(list(iter_video(path, on_damage=reports.append))) >= len(read) and len(reports) == 1


def test_a_gap_in_a_constant_frame_rate_is_damage_where_the_container_has_no_structure(tmp_path):
    steady, paused = 40 * np.arange(60), 40 * np.arange(60) + 800 * (np.arange(60) > 30)
    uneven = np.cumsum(np.where(np.arange(60) % 3, 40, 120))
    for times, damage in ((steady, None), (uneven, None), (paused, "no frames between 1.20 s and 2.04 s")):
        path = encode(tmp_path / "clip.ts", moving_pattern(60), times=times.tolist(), rate=25)
        found = video_info(path).damage
        assert found is None if damage is None else damage in found


def test_folders_are_read_in_natural_order_without_other_files(tmp_path):
    frames = moving_pattern(12)
    for index, frame in enumerate(frames):
        Image.fromarray(frame).save(tmp_path / f"frame{index}.{'png' if index else 'PNG'}")
    (tmp_path / "caption.txt").write_text("a pattern")
    (tmp_path / ".frame0.png").write_bytes(b"not a frame")
    read, rate = read_video(tmp_path)
    assert np.array_equal(read, frames) and rate == 8.0 and video_info(tmp_path).frame_rate is None
    assert np.array_equal(read_video(tmp_path, frame_rate=4.0, start=1.0)[0], frames[4:])


def audio_only(path):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


NOT_VIDEOS = {
    "audio.mp4": (audio_only, "only: audio"),
    "empty.mp4": (Path.touch, "empty"),
    "text.mp4": (lambda path: path.write_text("no video" * 99), "not a readable video"),
    "text.gif": (lambda path: path.write_text("no video" * 99), "not an image"),
    "notes.txt": (lambda path: path.write_text("no video" * 99), "expected .mp4"),
    "folder": (Path.mkdir, "no .png"),
}


@pytest.mark.parametrize("name", NOT_VIDEOS)
def test_other_files_raise_errors_with_name_and_reason(tmp_path, name):
    make, reason = NOT_VIDEOS[name]
    make(tmp_path / name)
    for call in (video_info, read_video, lambda path: list(iter_video(path))):
        with pytest.raises(FileNotFoundError, match="missing.mp4"):
            call(tmp_path / "missing.mp4")
        with pytest.raises(ValueError, match=f"{name}.*{reason}"):
            call(tmp_path / name)


def test_a_name_with_a_colon_is_not_a_protocol(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("10:30.mp4", "http:clip.mp4"):
        write_video(moving_pattern(3), name)
        assert len(read_video(name)[0]) == 3


@pytest.mark.parametrize("threads", [1, 16])
@pytest.mark.parametrize("fraction", [0.6, 0.9])
@pytest.mark.parametrize("name", ["fast.mp4", "a.mp4", "a.mov", "a.mkv", "a.webm", "a.avi", "a.gif", "a.webp"])
def test_a_truncated_file_gives_its_good_frames_and_then_an_error(tmp_path, monkeypatch, name, fraction, threads):
    monkeypatch.setattr("vgen.data.video_io._DECODER_THREADS", threads)
    path, codecs = tmp_path / name, {".avi": "mpeg4", ".webm": "libvpx-vp9"}
    noise = np.random.default_rng(0).integers(0, 256, (24, 32, 48, 3), dtype=np.uint8)
    if name in ("fast.mp4", "a.gif", "a.webp"):
        write_video(noise, path)
    else:
        encode(path, noise, codecs.get(path.suffix, "libx264"), g=6)
    whole, data = read_video(path)[0], path.read_bytes()
    path.write_bytes(data[: int(fraction * len(data))])
    with pytest.raises(ValueError, match=f"{name}.*truncated"):
        read_video(path)
    if name in ("fast.mp4", "a.mkv", "a.webm", "a.avi", "a.gif"):
        assert np.array_equal(read_video(path, max_frames=3)[0], whole[:3])


def test_frames_of_different_size_raise(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    Image.new("RGB", (8, 6)).save(tmp_path / "1.png")
    with pytest.raises(ValueError, match="must have the same size"):
        read_video(tmp_path)
    (tmp_path / "1.png").write_bytes((tmp_path / "0.png").read_bytes()[:48])
    with pytest.raises(ValueError, match="1.png"):
        read_video(tmp_path)


def test_invalid_ranges_raise(tmp_path):
    write_video(moving_pattern(), tmp_path / "clip.gif")
    for arguments in ({"start": -1}, {"end": 0}, {"end": 2, "start": 2}, {"frame_rate": 0}, {"max_frames": 0},
                      {"start": "1"}, {"end": float("nan")}, {"frame_rate": "8"}, {"max_frames": 2.0}):  # fmt: skip
        with pytest.raises(ValueError, match=f"{next(iter(arguments))} must be"):
            read_video(tmp_path / "clip.gif", **arguments)
    with pytest.raises(ValueError, match="no frames between 99 s"):
        read_video(tmp_path / "clip.gif", start=99)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_video_stays_until_the_new_one_is_complete(tmp_path, suffix, error):
    def interrupted():
        yield from moving_pattern(7)
        assert read_video(path)[0].shape[0] == 4
        raise error

    path, other = tmp_path / f"clip{suffix}", tmp_path / f"other{suffix}"
    write_video(moving_pattern(4), path)
    for target in (path, other):
        with pytest.raises(error):
            write_video(interrupted(), target, overwrite=True)
    with pytest.raises(FileExistsError, match="overwrite"):
        VideoWriter(path)
    assert len(read_video(path)[0]) == 4 and listing(tmp_path) == [path.name]
    write_video(moving_pattern(7), path, overwrite=True)
    assert len(read_video(path)[0]) == 7 and listing(tmp_path) == [path.name]


def test_other_files_and_those_that_appear_meanwhile_are_not_replaced(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("years of work")
    (tmp_path / "run.mp4").mkdir()
    (tmp_path / "plain").write_text("a file")
    for name in ("run", "run.mp4", "plain"):
        with pytest.raises(FileExistsError, match="cannot be replaced"):
            write_video(moving_pattern(), tmp_path / name, overwrite=True)
    with pytest.raises(FileExistsError):
        with VideoWriter(tmp_path / "clip.gif") as writer:
            writer.append(moving_pattern())
            (tmp_path / "clip.gif").write_text("someone else's")
    assert (tmp_path / "run" / "thesis.tex").exists() and (tmp_path / "clip.gif").read_text() == "someone else's"
    assert listing(tmp_path) == ["clip.gif", "plain", "run", "run.mp4"]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_invalid_frames_raise_and_leave_no_files(tmp_path, suffix):
    path, frames = tmp_path / f"clip{suffix}", moving_pattern()
    for wrong in (frames / 255, frames[..., :1], np.zeros((0, 8, 3), np.uint8), frames.swapaxes(1, 2)):
        with pytest.raises(ValueError, match="frames (must be|of .* must be)"):
            write_video([frames, wrong], path)
    for nothing in ([], frames[:0]):
        with pytest.raises(ValueError, match="at least one frame"):
            write_video(nothing, path)
    with VideoWriter(path) as writer:
        writer.append(frames)
        writer.close()
        with pytest.raises(ValueError, match="closed"):
            writer.append(frames)
    assert listing(tmp_path) == [path.name]


def test_invalid_targets_and_settings_raise_before_the_first_frame(tmp_path):
    with pytest.raises(FileNotFoundError, match="missing/clip.mp4"):
        VideoWriter(tmp_path / "missing" / "clip.mp4")
    invalid = [
        ("clip.xyz", {}, "suffix must be .mp4"),
        ("clip.gif", {"crf": 10}, "crf"),
        ("clip.mp4", {"crf": 52}, "crf"),
    ]
    invalid += [
        ("clip.mp4", {"frame_rate": rate}, "frame_rate") for rate in (0.0, -1.0, float("inf"), float("nan"), "8")
    ]
    invalid += [("clip.mp4", {"crf": 16.0}, "crf must be an integer from 0 to 51, got 16.0")]
    for name, settings, message in [*invalid, ("clip.gif", {"frame_rate": 60.0}, "at most 50")]:
        with pytest.raises(ValueError, match=message):
            VideoWriter(tmp_path / name, **settings)
    if os.name == "posix" and os.geteuid() != 0:  # root may write everywhere
        tmp_path.chmod(0o500)
        with pytest.raises(PermissionError, match="clip.mp4"):
            VideoWriter(tmp_path / "clip.mp4")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_full_disk_raises_one_clear_error_and_leaves_no_files(tmp_path, suffix):
    resource = pytest.importorskip("resource")
    noise = np.random.default_rng(0).integers(0, 256, (4, 48, 64, 3), dtype=np.uint8)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        with pytest.raises(OSError, match=f"could not write {tmp_path / 'clip'}{suffix}: File too large"):
            write_video(noise, tmp_path / f"clip{suffix}")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert listing(tmp_path) == []


STREAM = """
import sys
import numpy as np
from vgen.data.video_io import VideoWriter, iter_video
y, x = np.mgrid[:96, :128]
for num_frames in (150, 550):
    with VideoWriter(f"{sys.argv[1]}/{num_frames}.mp4") as writer:
        for i in range(num_frames):
            writer.append(np.stack([x + i, y, y + 2 * i], -1).astype(np.uint8))
    assert sum(1 for _ in iter_video(writer.path)) == num_frames
    print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def test_joined_videos_contain_the_packets_of_their_parts(tmp_path):
    lengths, paths, frames = (9, 1, 30, 2), [], []
    for index, length in enumerate(lengths):
        paths.append(tmp_path / f"{index}.mp4")
        write_video(moving_pattern(length), paths[-1], frame_rate=12.5)
        frames.append(read_video(paths[-1])[0])

    def packets(path):
        with av.open(str(path)) as container:
            return [bytes(packet) for packet in container.demux(video=0) if packet.size]

    join_videos(paths, tmp_path / "whole.mp4")
    assert packets(tmp_path / "whole.mp4") == [packet for path in paths for packet in packets(path)]
    joined, rate = read_video(tmp_path / "whole.mp4")
    assert np.array_equal(joined, np.concatenate(frames)) and rate == pytest.approx(12.5)
    with pytest.raises(FileExistsError):
        join_videos(paths, tmp_path / "whole.mp4")
    (tmp_path / "folder.mp4").mkdir()
    with pytest.raises(FileExistsError, match="it is a folder"):
        join_videos(paths, tmp_path / "folder.mp4", overwrite=True)
    (tmp_path / "folder.mp4").rmdir()
    write_video(moving_pattern(3, 16, 16), tmp_path / "other.mp4", frame_rate=12.5)
    with pytest.raises(ValueError, match="other.mp4 cannot be joined"):
        join_videos([paths[0], tmp_path / "other.mp4"], tmp_path / "whole.mp4", overwrite=True)
    with pytest.raises(ValueError, match="at least one video"):
        join_videos([], tmp_path / "new.mp4")
    assert len(read_video(tmp_path / "whole.mp4")[0]) == sum(lengths)
    assert {path.name for path in tmp_path.iterdir()} == {*(path.name for path in paths), "whole.mp4", "other.mp4"}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="measures with /proc")
def test_memory_does_not_depend_on_the_number_of_frames(tmp_path):
    output = subprocess.run([sys.executable, "-c", STREAM, str(tmp_path)], capture_output=True, check=True).stdout
    short, long = map(int, output.split())
    assert long - short < 400 * 96 * 128 * 3 / 1024 / 2


CONTAINER_CODECS = {
    "ts": "libx264", "mts": "libx264", "m2ts": "mpeg2video", "m2t": "libx264", "mpg": "mpeg2video",
    "MPEG": "mpeg2video",
    "mpe": "mpeg2video", "vob": "mpeg2video", "wmv": "wmv2", "asf": "wmv2", "flv": "flv", "3gp": "libx264",
    "3g2": "libx264", "ogv": "libvpx", "mov": "libx264", "qt": "libx264", "f4v": "libx264", "divx": "mpeg4",
}  # fmt: skip
FORMATS = {"ts": "mpegts", "mts": "mpegts", "m2t": "mpegts", "MPEG": "mpeg", "mpe": "mpeg", "qt": "mov", "divx": "avi"}


@pytest.mark.parametrize("suffix", CONTAINER_CODECS)
def test_every_container_is_read(tmp_path, suffix):
    path, rate = tmp_path / f"clip.{suffix}", 25
    with av.open(str(path), "w", format=FORMATS.get(suffix)) as container:
        stream = container.add_stream(CONTAINER_CODECS[suffix], rate=rate)
        stream.height, stream.width, stream.pix_fmt = 32, 48, "yuv420p"
        for frame in moving_pattern():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame)))
        container.mux(stream.encode(None))
    frames, read_rate = read_video(path)
    assert frames.shape == (12, 32, 48, 3) and mean_error(frames, moving_pattern()) < 25
    assert read_rate == pytest.approx(rate, rel=0.05)
    assert (video_info(path).height, video_info(path).width) == (32, 48)


@pytest.mark.parametrize("name", ["10:30", "sub:clip", "http:clip", "pipe:0", "concat:a|b", "%03d", "-y", "a b"])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_any_name_is_that_of_a_file(tmp_path, monkeypatch, name, suffix):
    monkeypatch.chdir(tmp_path)
    frames = moving_pattern(4)
    write_video(frames, f"{name}{suffix}")
    assert read_video(f"{name}{suffix}")[0].shape == frames.shape
    assert video_info(f"{name}{suffix}").num_frames == 4
    if suffix == ".mp4":
        join_videos([f"{name}.mp4"] * 2, f"{name}-joined.mp4")
        assert len(read_video(tmp_path / f"{name}-joined.mp4")[0]) == 8


PLAYLISTS = {
    "ffconcat": "ffconcat version 1.0\nfile other.mp4\n",
    "hls": "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:1,\nother.mp4\n#EXT-X-ENDLIST\n",
    "dash": '<?xml version="1.0"?>\n<MPD xmlns="urn:mpeg:DASH:schema:MPD:2011" type="static"/>\n',
    "sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\nc=IN IP4 127.0.0.1\nm=video 5004 RTP/AVP 96\n",
}


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".ts"])
@pytest.mark.parametrize("kind", PLAYLISTS)
@pytest.mark.parametrize("in_memory", [False, True])
def test_a_playlist_opens_no_other_file(tmp_path, monkeypatch, kind, suffix, in_memory):
    monkeypatch.chdir(tmp_path)
    write_video(moving_pattern(), "other.mp4")
    path = tmp_path / f"clip{suffix}"
    path.write_text(PLAYLISTS[kind])
    with pytest.raises(ValueError, match=rf"clip{suffix} is not a readable video"):
        read_video(MemoryFile(path, path.read_bytes()) if in_memory else path)


@pytest.mark.parametrize("name", ["clip.mp4", "clip.gif", "folder/0.png"])
def test_a_pipe_is_no_video(tmp_path, name):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / name)
    path = tmp_path / "folder" if name.startswith("folder") else tmp_path / name
    with pytest.raises(ValueError, match=f"{name} is a pipe"):
        read_video(path)


def declared_size(kind, side):
    """A small file that declares frames of this width and height."""
    with io.BytesIO() as file:
        color = Image.new("L", (8, 8)).convert("P" if kind == "gif" else "RGB")
        color.save(file, kind)
        content = bytearray(file.getvalue())
    if kind == "gif":
        content[6:10] = struct.pack("<HH", side, side)
    elif kind == "png":
        content[16:24] = struct.pack(">II", side, side)
        content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    elif kind == "jpeg":
        start = content.index(b"\xff\xc0")
        content[start + 5 : start + 9] = struct.pack(">HH", side, side)
    return bytes(content)


@pytest.mark.parametrize("side", [9_000, 12_000, 60_000])
@pytest.mark.parametrize("kind", ["gif", "png", "jpeg"])
def test_huge_images_are_rejected_before_they_are_decoded(tmp_path, kind, side):
    path = tmp_path / (f"clip.{kind}" if kind == "gif" else f"0.{kind}")
    path.write_bytes(declared_size(kind, side))
    tracemalloc.start()
    with pytest.raises(ValueError, match=rf"{path.name} .*({side}x{side} pixels: at most|exceeds limit)"):
        read_video(path if kind == "gif" else tmp_path)
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()


def test_a_gif_that_grows_is_rejected_before_it_is_decoded(tmp_path):
    path = tmp_path / "grows.gif"
    frames = [Image.new("P", (8, 8), color) for color in (0, 1)]
    frames[0].save(path, save_all=True, append_images=frames[1:])
    content = bytearray(path.read_bytes())
    last = content.rindex(b"\x2c\0\0\0\0\x08\0\x08\0")  # the descriptor of the last frame
    content[last + 5 : last + 9] = struct.pack("<HH", 9_000, 9_000)
    path.write_bytes(content)
    with pytest.raises(ValueError, match="9000x9000 pixels: at most"):
        read_video(path)


@pytest.mark.parametrize("suffix", [".mp4", ".webp", ""])
def test_the_largest_frame_is_that_of_8192_by_8192_pixels(tmp_path, monkeypatch, suffix):
    assert images.MAX_PIXELS == 8192 * 8192
    write_video(moving_pattern(), tmp_path / f"clip{suffix}")
    monkeypatch.setattr(images, "MAX_PIXELS", 32 * 48)
    assert len(read_video(tmp_path / f"clip{suffix}")[0]) == 12
    monkeypatch.setattr(images, "MAX_PIXELS", 32 * 48 - 1)
    with pytest.raises(ValueError, match="48x32 pixels: at most 1535 pixels are supported"):
        video_info(tmp_path / f"clip{suffix}")


def test_images_that_start_programs_are_not_opened(tmp_path):
    (tmp_path / "0.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")
    with Image.open(tmp_path / "0.png") as image:
        assert image.format == "EPS"  # which Pillow would read with Ghostscript
    with pytest.raises(ValueError, match=r"0\.png is not an image"):
        read_video(tmp_path)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_an_enlarged_video_is_sharp_and_tells_its_scale(tmp_path, suffix):
    frames, path = moving_pattern(5, 22, 33), tmp_path / f"video{suffix}"
    write_video(frames, path, scale=3)
    info = video_info(path)
    height, width = (66, 100) if suffix == ".mp4" else (66, 99)  # an mp4 has even sizes
    assert (info.height, info.width) == (height, width)
    expected = np.stack([np.kron(frame, np.ones((3, 3, 1), np.uint8)) for frame in frames])
    read = read_video(path)[0][:, :66, :99]
    assert mean_error(read, expected) < 2 and (suffix == ".mp4" or np.array_equal(read, expected))
    stored = suffix != ".webp"
    assert (info.scale, info.content_size) == ((3, (22, 33)) if stored else (1, (height, width)))


def test_small_videos_are_enlarged_to_a_size_that_players_show_well(tmp_path):
    for name, size, expected in (
        ("a.mp4", (48, 64), (192, 256)), ("b.gif", (100, 60), (300, 180)), ("c.mp4", (256, 20), (256, 20)),
        ("d.webp", (48, 64), (48, 64)), ("e", (8, 8), (8, 8)),
    ):  # fmt: skip
        write_video(moving_pattern(2, *size), tmp_path / name, scale=None)
        info = video_info(tmp_path / name)
        assert (info.height, info.width) == expected and info.content_size == size
    write_video(moving_pattern(2, 48, 64), tmp_path / "plain.mp4")
    assert video_info(tmp_path / "plain.mp4").width == 64
    with pytest.raises(ValueError, match="scale must be an integer of at least 1"):
        VideoWriter(tmp_path / "f.mp4", scale=0)


def test_a_scale_is_not_believed_after_the_video_was_resized(tmp_path):
    write_video(moving_pattern(5, 32, 32), tmp_path / "video.mp4", scale=4)
    with av.open(str(tmp_path / "video.mp4")) as source:
        comment = source.metadata["comment"]
    for index, text in enumerate((comment, "a comment of mine", "[1]", '{"scale": 4, "content_size": [16, 16]}',
                                  '{"vgen": "1", "scale": "4", "content_size": 3}', "[" * 100_000)):  # fmt: skip
        path = encode(tmp_path / f"{index}.mp4", moving_pattern(5, 64, 64))
        with av.open(str(path)) as source, av.open(str(tmp_path / f"tagged-{index}.mp4"), "w") as target:
            stream = target.add_stream_from_template(source.streams.video[0])
            target.metadata["comment"] = text
            for packet in source.demux(video=0):
                if packet.dts is not None:
                    packet.stream = stream
                    target.mux(packet)
        info = video_info(tmp_path / f"tagged-{index}.mp4")
        assert (info.scale, info.content_size) == (1, (64, 64))


@pytest.mark.parametrize("suffix", [".mp4", ".gif", ""])
def test_metadata_of_any_length_and_script_are_read_back(tmp_path, suffix):
    metadata = {
        "prompt": 'ein roter Kreis, \u8d64\u3044\u5186 "quoted"\n' * 40,
        "seed": 2**63 - 1,
        "options": {"a": [1.5, None]},
    }
    write_video(moving_pattern(), tmp_path / f"video{suffix}", metadata=metadata)
    info = video_info(tmp_path / f"video{suffix}")
    assert info.metadata.pop("vgen") and info.metadata == metadata
    if suffix == ".gif":
        assert np.array_equal(read_video(tmp_path / "video.gif")[0], moving_pattern())


def test_joined_videos_keep_the_metadata_that_they_share(tmp_path):
    for index, seed in enumerate((1, 1, 2)):
        write_video(moving_pattern(), tmp_path / f"{index}.mp4", scale=2, metadata={"seed": seed})
    paths = [tmp_path / f"{index}.mp4" for index in range(3)]
    join_videos(paths[:2], tmp_path / "same.mp4")
    join_videos(paths, tmp_path / "mixed.mp4")
    same = video_info(tmp_path / "same.mp4")
    assert same.metadata["seed"] == 1 and same.scale == 2 and same.num_frames == 24
    assert video_info(tmp_path / "mixed.mp4").metadata == {}


def test_keyframes_are_as_near_as_requested(tmp_path):
    write_video(moving_pattern(30), tmp_path / "near.mp4", keyframe_interval=4)
    with av.open(str(tmp_path / "near.mp4")) as container:
        keys = [packet.is_keyframe for packet in container.demux(video=0) if packet.size]
    places = np.flatnonzero(keys)
    assert len(keys) == 30 and places[0] == 0 and np.diff(places).max() <= 4
    for path, interval in (("a.gif", 4), ("a.mp4", 0)):
        with pytest.raises(ValueError, match="keyframe_interval"):
            write_video(moving_pattern(), tmp_path / path, keyframe_interval=interval)


@pytest.mark.parametrize("suffix", [".ts", ".mp4"])
def test_a_part_of_a_file_with_a_single_keyframe_is_found(tmp_path, suffix):
    frames = np.repeat(np.arange(40, dtype=np.uint8), 16 * 16 * 3).reshape(40, 16, 16, 3)
    path = encode(tmp_path / f"clip{suffix}", frames, rate=2, g=40, bf=3, sc_threshold=0)
    whole = read_video(path)[0]
    for first in (1, 4, 21, 39):  # in FFmpeg's transport streams, seeking ends after the only keyframe
        assert np.array_equal(read_video(path, start=first / 2)[0], whole[first:])


def test_reading_from_the_middle_decodes_few_frames(tmp_path, monkeypatch):
    write_video(moving_pattern(250, 16, 16), tmp_path / "clip.mp4", frame_rate=25.0, keyframe_interval=12)
    decoded, whole = [], video_io._VideoFile._decoded

    def counting(self, *arguments):
        for frame in whole(self, *arguments):
            decoded.append(frame.pts)
            yield frame

    monkeypatch.setattr(video_io._VideoFile, "_decoded", counting)
    assert len(read_video(tmp_path / "clip.mp4", start=8.0, max_frames=5)[0]) == 5
    assert len(decoded) < 40  # of 205
