import gc
import itertools
import os
import struct
import subprocess
import sys
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from vgen.data.video_io import VideoWriter, iter_video, read_video, video_info, write_video

LOSSY = (".mp4",)
SUFFIXES = (".mp4", ".gif", ".webp", "")


def moving_pattern(num_frames=12, height=32, width=48):
    """Smooth frames that all differ; `frames[i, ..., 2]` is flat and tells i."""
    y, x = np.mgrid[:height, :width]
    frames = [
        np.stack([(3 * x + 5 * i) % 200, 4 * y % 200, np.full_like(x, 10 + 3 * i)], -1) for i in range(num_frames)
    ]
    return np.stack(frames).astype(np.uint8)


def few_colors(num_frames=12, height=32, width=48):
    """Frames that a palette of 256 colours holds exactly."""
    return (
        moving_pattern(num_frames, height, width) // 32 * 32
        + np.arange(num_frames, dtype=np.uint8)[:, None, None, None]
    )


def encode(
    path, frames, codec="libx264", pixel_format="yuv420p", *, rate=8, times=None, clock=None, tags=None, **options
):
    """Writes a video with PyAV alone; `times` are ticks of `clock`."""
    with av.open(str(path), "w", options=options.pop("container", {})) as container:
        stream = container.add_stream(codec, rate=rate, options={k: str(v) for k, v in options.items()})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = pixel_format
        if clock is not None:
            stream.time_base = stream.codec_context.time_base = clock
        for index, frame in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(frame, format="rgba" if frame.shape[-1] == 4 else "rgb24")
            picture = picture.reformat(format=pixel_format, **(tags or {}))
            picture.pts = index if times is None else times[index]
            picture.time_base = Fraction(1, 1) / Fraction(rate) if clock is None else clock
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
    return path


def mean_error(a, b):
    return np.abs(a.astype(int) - b.astype(int)).mean()


def listing(folder):
    return sorted(entry.name for entry in folder.iterdir())


# Round trips


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("size", [(32, 48), (31, 45), (1, 1), (2, 7)])
def test_read_after_write_gives_the_same_video(tmp_path, suffix, size):
    frames = few_colors(6, *size)
    path = tmp_path / f"clip{suffix}"
    write_video(frames, path, 10.0)
    read, rate = read_video(path)
    assert read.shape == frames.shape and read.dtype == np.uint8 and rate == pytest.approx(10.0)
    assert read.flags.c_contiguous and read.flags.writeable
    assert mean_error(read, frames) <= (4 if suffix in LOSSY else 0)
    assert listing(tmp_path) == [path.name]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_equal_frames_stay_separate(tmp_path, suffix):
    frames = few_colors(3).repeat(4, axis=0)
    write_video(frames, tmp_path / f"clip{suffix}")
    assert len(read_video(tmp_path / f"clip{suffix}")[0]) == 12


def test_lower_crf_is_closer_to_the_original(tmp_path):
    frames = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    errors = []
    for crf in (0, 20, 45):
        write_video(frames, tmp_path / "clip.mp4", crf=crf, overwrite=True)
        errors.append(mean_error(read_video(tmp_path / "clip.mp4")[0], frames))
    assert errors[0] < errors[1] < errors[2]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_frames_chunks_and_generators_write_the_same(tmp_path, suffix):
    frames = few_colors()
    with VideoWriter(tmp_path / f"a{suffix}") as writer:
        writer.append(frames[0])
        writer.append(frames[1:9])
        writer.append(frames[9:])
        assert writer.num_frames == 12
    write_video((frame for frame in frames), tmp_path / f"b{suffix}")
    assert np.array_equal(read_video(tmp_path / f"a{suffix}")[0], read_video(tmp_path / f"b{suffix}")[0])


def test_equal_frames_give_equal_files(tmp_path):
    for size in (24, 64, 100):
        files = set()
        for _ in range(12):
            write_video(moving_pattern(12, size, size), tmp_path / "clip.mp4", overwrite=True)
            files.add((tmp_path / "clip.mp4").read_bytes())
        assert len(files) == 1


def test_even_mp4_is_widely_playable(tmp_path):
    write_video(moving_pattern(), tmp_path / "clip.mp4")
    with av.open(str(tmp_path / "clip.mp4")) as container:
        assert container.streams.video[0].codec_context.pix_fmt == "yuv420p"
        assert container.streams.video[0].codec_context.name == "h264"


# Time


@pytest.mark.parametrize("rate", [8.0, 12.5, 23.976, 24.0, 30000 / 1001, 48.0])
@pytest.mark.parametrize("suffix", [".mp4", ".gif", ".webp", "", ".mkv", ".avi"])
def test_resampling_to_its_own_rate_changes_nothing(tmp_path, suffix, rate):
    frames, path = few_colors(40, 8, 8), tmp_path / f"clip{suffix}"
    if suffix in (".mkv", ".avi"):
        encode(path, frames, "ffv1", "bgr0", rate=Fraction(rate).limit_denominator(1001))
    else:
        write_video(frames, path, rate)
    plain, mean_rate = read_video(path)
    resampled, told_rate = read_video(path, frame_rate=rate)
    assert np.array_equal(plain, resampled) and len(plain) == 40
    assert told_rate == rate and mean_rate == pytest.approx(rate, rel=0.02 if suffix == ".gif" else 1e-3)


def test_gif_delays_do_not_drift(tmp_path):
    write_video(few_colors(16, 8, 8), tmp_path / "clip.gif", 8.0)
    with Image.open(tmp_path / "clip.gif") as image:
        delays = [image.seek(i) or image.info["duration"] for i in range(16)]
        assert image.info["loop"] == 0
    assert set(delays) == {120, 130} and sum(delays) == 2000


def test_another_decoder_reads_the_same_gif(tmp_path):
    frames = few_colors(5)[[0, 1, 1, 2, 3, 3, 3, 4]]
    write_video(frames, tmp_path / "clip.gif")
    with av.open(str(tmp_path / "clip.gif")) as container:
        read = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert np.array_equal(read, frames)


@pytest.mark.parametrize("rate", [2.0, 7.3, 10.0, 24.0])
@pytest.mark.parametrize("start, end", [(None, None), (0.35, None), (0.52, 1.7)])
@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_variable_frame_rate_is_resampled_by_time_stamps(tmp_path, suffix, rate, start, end):
    milliseconds = np.array([0, 40, 80, 500, 520, 1000, 1600, 1640])
    path, frames = tmp_path / f"clip{suffix}", moving_pattern(8)
    encode(path, frames, times=milliseconds, clock=Fraction(1, 1000), rate=25, g=3, crf=1)
    stored, mean_rate = read_video(path)
    assert len(stored) == 8 and mean_rate == pytest.approx(8 / 1.68, rel=0.03)

    read, _ = read_video(path, frame_rate=rate, start=start, end=end)
    ticks = (start or 0) + np.arange(1000) / rate
    ticks = ticks[ticks < min(end or 9.0, 1.68) - 1e-3]
    expected = np.searchsorted(milliseconds / 1000, ticks + 5e-4, side="right") - 1
    assert np.array_equal(read, stored[expected])


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".avi", ".mov", ".gif", ".webp", ""])
def test_a_part_equals_the_slice_of_the_whole(tmp_path, suffix):
    path, frames = tmp_path / f"clip{suffix}", moving_pattern(40, 16, 16)
    if suffix in SUFFIXES and suffix != ".mp4":
        write_video(frames, path, 10.0)
    elif suffix == ".avi":
        encode(path, frames, "mpeg4", rate=10, g=9, bf=2)
    else:
        encode(path, frames, rate=10, g=9, bf=2)
    whole, _ = read_video(path)
    for start, end in [(0.0, 0.1), (0.4, 0.9), (1.75, 1.85), (2.6, None), (3.9, 9.0), (None, 2.2)]:
        first, last = round(np.ceil(10 * (start or 0))), 40 if end is None else int(np.ceil(10 * end))
        assert np.array_equal(read_video(path, start=start, end=end)[0], whole[first:last])
    assert np.array_equal(read_video(path, start=1.0, max_frames=3)[0], whole[10:13])


def test_times_count_from_the_first_frame(tmp_path):
    frames = moving_pattern(10)
    path = encode(
        tmp_path / "late.mkv", frames, times=[5000 + 100 * i for i in range(10)], clock=Fraction(1, 1000), rate=10, g=2
    )
    whole, _ = read_video(path)
    assert len(whole) == 10
    assert np.array_equal(read_video(path, start=0.5)[0], whole[5:])
    assert np.array_equal(read_video(path, frame_rate=5)[0], whole[::2])


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_info_agrees_with_the_frames(tmp_path, suffix):
    write_video(few_colors(16, 31, 44), tmp_path / f"clip{suffix}", 8.0)
    info = video_info(tmp_path / f"clip{suffix}")
    assert (info.width, info.height, info.num_frames) == (44, 31, 16)
    assert info.frame_rate == pytest.approx(8.0) and info.duration == pytest.approx(2.0)
    assert info.codec == {".mp4": "h264", "": "png"}.get(suffix, suffix[1:])


def test_info_does_not_guess_what_only_decoding_tells(tmp_path):
    info = video_info(encode(tmp_path / "clip.mkv", moving_pattern()))
    assert info.num_frames is None and info.frame_rate == 8.0


# What cameras and other programs produce


def with_display_matrix(path, a, b, c, d):
    data = bytearray(path.read_bytes())
    header = data.find(b"tkhd") + 44
    assert struct.unpack(">9i", data[header : header + 36]) == (65536, 0, 0, 0, 65536, 0, 0, 0, 1 << 30)
    data[header : header + 36] = struct.pack(">9i", a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    path.write_bytes(data)


@pytest.mark.parametrize(
    "matrix",
    [
        m
        for m in itertools.product((-1, 0, 1), repeat=4)
        if abs(m[0] * m[3] - m[1] * m[2]) == 1 and sum(map(abs, m)) == 2
    ],
)
def test_frames_are_upright(tmp_path, matrix):
    a, b, c, d = matrix
    frames = moving_pattern(2, 4, 6)
    path = encode(tmp_path / "phone.mov", frames, "qtrle", "rgb24")
    with_display_matrix(path, *matrix)
    read, _ = read_video(path)
    y, x = np.mgrid[:4, :6]
    right, down = a * x + c * y, b * x + d * y
    expected = np.zeros((2, np.ptp(down) + 1, np.ptp(right) + 1, 3), np.uint8)
    expected[:, down - down.min(), right - right.min()] = frames
    assert np.array_equal(read, expected)
    info = video_info(path)
    assert (info.height, info.width) == expected.shape[1:3]


@pytest.mark.parametrize(
    "codec, pixel_format", [("ffv1", "yuv420p10le"), ("libx264", "yuv444p10le"), ("prores_ks", "yuv422p10le")]
)
def test_ten_bits_become_eight(tmp_path, codec, pixel_format):
    frames = moving_pattern(3)
    path = encode(tmp_path / f"clip{'.mkv' if codec == 'ffv1' else '.mov'}", frames, codec, pixel_format)
    read, _ = read_video(path)
    assert read.dtype == np.uint8 and mean_error(read, frames) < 3


@pytest.mark.parametrize("matrix", ["ITU709", "ITU601"])
@pytest.mark.parametrize("color_range", ["MPEG", "JPEG"])
def test_colors_follow_the_files_matrix_and_range(tmp_path, matrix, color_range):
    colors = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [30, 90, 160], [250, 250, 250]], np.uint8)
    frames = np.broadcast_to(colors[:, None, None], (5, 16, 16, 3)).copy()
    tags = {"dst_colorspace": matrix, "dst_color_range": color_range}
    space, stored_range = {"ITU709": "bt709", "ITU601": "smpte170m"}[matrix], {"MPEG": "tv", "JPEG": "pc"}[color_range]
    path = tmp_path / "clip.mp4"
    encode(path, frames, pixel_format="yuv444p", tags=tags, colorspace=space, color_range=stored_range, crf=1)
    assert np.abs(read_video(path)[0].astype(int) - frames).max() <= 4


def test_written_colors_are_right_for_every_reader(tmp_path):
    colors = np.array([[200, 30, 30], [30, 200, 30], [30, 30, 200]], np.uint8)
    write_video(np.broadcast_to(colors[:, None, None], (3, 16, 16, 3)), tmp_path / "clip.mp4")
    with av.open(str(tmp_path / "clip.mp4")) as container:
        for frame, color in zip(container.decode(video=0), colors, strict=True):
            assert int(frame.colorspace) == 6  # SMPTE 170M
            luma, blue, red = (frame.to_ndarray(format="yuv444p").reshape(3, -1).mean(1) - [16, 128, 128]) / [
                219,
                224,
                224,
            ]
            rgb = 255 * np.array([luma + 1.402 * red, luma - 0.344136 * blue - 0.714136 * red, luma + 1.772 * blue])
            assert np.abs(rgb - color).max() < 5


@pytest.mark.parametrize("suffix", [".mov", ".webp", ".gif", ""])
def test_transparency_lies_on_black(tmp_path, suffix):
    rgba = np.full((2, 8, 8, 4), 255, np.uint8)
    rgba[0, :, :4, 3] = 0 if suffix == ".gif" else 51
    rgba[1, 4:, :, :3] = 100
    path = tmp_path / f"clip{suffix}"
    images = [Image.fromarray(frame) for frame in rgba]
    if suffix == ".mov":
        encode(path, rgba, "qtrle", "argb")
    elif suffix:
        images[0].save(
            path, save_all=True, append_images=images[1:], duration=100, lossless=True, exact=True, disposal=2
        )
    else:
        path.mkdir()
        for index, image in enumerate(images):
            image.save(path / f"{index}.png")
    expected = np.round(rgba[..., :3] * (rgba[..., 3:] / 255)).astype(int)
    assert np.abs(read_video(path)[0] - expected).max() <= 1


def test_folders_are_read_in_natural_order_whatever_else_lies_there(tmp_path):
    frames = moving_pattern(12)
    for index, frame in enumerate(frames):
        Image.fromarray(frame).save(tmp_path / f"frame{index}.{'png' if index else 'PNG'}")
    (tmp_path / "caption.txt").write_text("a pattern")
    (tmp_path / ".frame0.png").write_bytes(b"not a frame")
    read, rate = read_video(tmp_path)
    assert np.array_equal(read, frames) and rate == 8.0
    assert video_info(tmp_path).frame_rate is None
    assert np.array_equal(read_video(tmp_path, frame_rate=4.0, start=1.0)[0], frames[4:])


def test_folder_images_of_any_kind_become_rgb(tmp_path):
    gray = np.arange(0, 256, 4, dtype=np.uint8).reshape(8, 8)
    Image.fromarray(gray).save(tmp_path / "0.png")
    Image.fromarray(gray.astype(np.uint16) * 257).save(tmp_path / "1.png")
    Image.fromarray(gray).convert("P").save(tmp_path / "2.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate clockwise to view
    Image.fromarray(np.rot90(gray)).convert("RGB").save(tmp_path / "3.jpg", exif=exif, quality=100)
    read, _ = read_video(tmp_path)
    assert np.abs(read.astype(int) - gray[..., None]).max() <= 4


# What is not a whole video


def audio_only(path):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def folder_without_frames(path):
    path.mkdir()
    (path / "readme.txt").write_text("no frames here")


PLAYLIST = "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n/etc/hostname\n#EXT-X-ENDLIST\n"
NOT_VIDEOS = {
    "audio.mp4": (audio_only, "audio"),
    "empty.mp4": (lambda path: path.touch(), "empty"),
    "empty.gif": (lambda path: path.touch(), "empty"),
    "text.mp4": (lambda path: path.write_text("this is no video" * 99), "not a video"),
    "text.gif": (lambda path: path.write_text("this is no video" * 99), "not a gif"),
    "text.webp": (lambda path: path.write_text("this is no video" * 99), "not a webp"),
    "playlist.mp4": (lambda path: path.write_text(PLAYLIST), "not a video"),
    "image.mp4": (lambda path: Image.new("RGB", (8, 8)).save(path, "png"), "not a video"),
    "notes.txt": (lambda path: path.write_text("hello"), "legal are .mp4"),
    "folder": (folder_without_frames, "no .png"),
}


@pytest.mark.parametrize("name", NOT_VIDEOS)
@pytest.mark.parametrize("call", [video_info, read_video, lambda path: list(iter_video(path))])
def test_what_is_no_video_is_refused_by_name_and_reason(tmp_path, name, call):
    make, reason = NOT_VIDEOS[name]
    make(tmp_path / name)
    with pytest.raises(ValueError, match=reason) as error:
        call(tmp_path / name)
    assert name in str(error.value)


@pytest.mark.parametrize("call", [video_info, read_video, iter_video])
def test_a_missing_file_is_named(tmp_path, call):
    with pytest.raises(FileNotFoundError, match="missing.mp4"):
        call(tmp_path / "missing.mp4")


def whole_file(path):
    frames = np.random.default_rng(0).integers(0, 256, (48, 32, 48, 3), dtype=np.uint8)
    if path.suffix in (".gif", ".webp"):
        write_video(frames, path)
    elif path.stem == "streamable":
        write_video(frames, path)
    else:
        encode(path, frames, "mpeg4" if path.suffix == ".avi" else "libx264", g=6)
    return path


def packet_positions(path):
    if path.suffix == ".webp":
        return []
    with av.open(str(path)) as container:
        return [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]


@pytest.mark.parametrize("fraction", [0.5, 0.97])
@pytest.mark.parametrize(
    "name", ["streamable.mp4", "clip.mp4", "clip.mov", "clip.mkv", "clip.avi", "clip.gif", "clip.webp"]
)
def test_a_cut_file_gives_its_good_frames_and_then_an_error(tmp_path, name, fraction):
    path = whole_file(tmp_path / name)
    whole, data = read_video(path)[0], path.read_bytes()
    packets = packet_positions(path)
    cut = int(fraction * len(data))
    path.write_bytes(data[:cut])
    complete = sum(position + size <= cut for position, size in packets)
    frames = []
    with pytest.raises(ValueError, match=f"{name}.*(cut short|missing)") as error:
        for frame in iter_video(path):
            frames.append(frame)
    with pytest.raises(ValueError, match=name):
        read_video(path)
    assert f"{len(frames)} frames can be read" in str(error.value) or not frames
    if name in ("streamable.mp4", "clip.mkv"):
        assert len(frames) >= complete
    # The very last one may be damaged.
    assert np.array_equal(np.array(frames[:-1]), whole[: max(len(frames) - 1, 0)]) or not frames[:-1]


def test_the_good_part_of_a_cut_file_can_be_read(tmp_path):
    path = whole_file(tmp_path / "clip.mkv")
    whole, data = read_video(path)[0], path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    assert np.array_equal(read_video(path, max_frames=8)[0], whole[:8])
    assert np.array_equal(read_video(path, end=1.0)[0], whole[:8])


def test_frames_of_different_size_are_refused(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    Image.new("RGB", (8, 6)).save(tmp_path / "1.png")
    with pytest.raises(ValueError, match="8x8 and 8x6"):
        read_video(tmp_path)
    Image.new("RGB", (8, 8)).save(tmp_path / "1.png")
    (tmp_path / "2.png").write_bytes((tmp_path / "1.png").read_bytes()[:48])
    with pytest.raises(ValueError, match="2.png"):
        read_video(tmp_path)


@pytest.mark.parametrize(
    "arguments",
    [
        {"start": -1},
        {"start": 2, "end": 2},
        {"end": 0},
        {"frame_rate": 0},
        {"frame_rate": float("nan")},
        {"max_frames": 0},
        {"start": 99},
    ],
)
def test_illegal_ranges_are_refused(tmp_path, arguments):
    write_video(few_colors(), tmp_path / "clip.gif")
    with pytest.raises(ValueError, match=next(iter(arguments)) if arguments != {"start": 99} else "no frames"):
        read_video(tmp_path / "clip.gif", **arguments)


# Whole or not at all


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("exists", [False, True])
def test_an_interrupted_write_leaves_things_as_they_were(tmp_path, suffix, error, exists):
    path, old, new = tmp_path / f"clip{suffix}", few_colors(4), few_colors(7)
    if exists:
        write_video(old, path)
    before = listing(tmp_path)

    def interrupted():
        yield from new
        raise error

    with pytest.raises(error):
        write_video(interrupted(), path, overwrite=exists)
    assert listing(tmp_path) == before
    assert not exists or len(read_video(path)[0]) == 4


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_the_old_video_stays_until_the_new_one_is_whole(tmp_path, suffix):
    path, old, new = tmp_path / f"clip{suffix}", few_colors(4), few_colors(7)
    write_video(old, path)
    with pytest.raises(FileExistsError, match="overwrite"):
        VideoWriter(path)
    with VideoWriter(path, overwrite=True) as writer:
        writer.append(new)
        assert len(read_video(path)[0]) == 4
    assert len(read_video(path)[0]) == 7
    assert listing(tmp_path) == [path.name]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_forgotten_writer_leaves_nothing(tmp_path, suffix):
    writer = VideoWriter(tmp_path / f"clip{suffix}")
    writer.append(few_colors(80))  # more than the encoder looks ahead
    assert listing(tmp_path) != []
    del writer
    gc.collect()
    assert listing(tmp_path) == []


def test_files_that_are_no_frames_are_never_deleted(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("years of work")
    (tmp_path / "run.mp4").mkdir()
    (tmp_path / "plain").write_text("a file")
    for name in ("run", "run.mp4", "plain"):
        with pytest.raises(FileExistsError, match="not replaced"):
            write_video(few_colors(), tmp_path / name, overwrite=True)
    assert (tmp_path / "run" / "thesis.tex").exists() and listing(tmp_path) == ["plain", "run", "run.mp4"]


def test_a_video_that_appears_meanwhile_is_not_replaced(tmp_path):
    with pytest.raises(FileExistsError):
        with VideoWriter(tmp_path / "clip.gif") as writer:
            writer.append(few_colors())
            (tmp_path / "clip.gif").write_text("someone else's")
    assert (tmp_path / "clip.gif").read_text() == "someone else's" and listing(tmp_path) == ["clip.gif"]


FULL_DISK = """
import resource, sys
import numpy as np
from vgen.data.video_io import write_video
noise = np.random.default_rng(0).integers(0, 256, (200, 48, 64, 3), dtype=np.uint8)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)
try:
    write_video(noise, sys.argv[1])
except OSError as error:
    print(type(error).__name__, error)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits the file size as Linux does")
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_full_disk_is_an_oserror_and_leaves_nothing(tmp_path, suffix):
    limit = 2000 if suffix == "" else 300_000
    result = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path / f"clip{suffix}"), str(limit)], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert f"could not write {tmp_path / 'clip'}{suffix}: File too large" in result.stdout
    assert listing(tmp_path) == []


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_wrong_frames_are_refused_and_nothing_is_left(tmp_path, suffix):
    frames = few_colors()
    wrong = {
        "uint8": frames / 255,
        r"\(h, w, 3\)": frames[..., :1],
        r"got \(0, 8, 3\)": np.zeros((0, 8, 3), np.uint8),
        "48x32, got one of 32x48": frames.swapaxes(1, 2),
    }
    for message, bad in wrong.items():
        with pytest.raises(ValueError, match=message):
            write_video([frames, bad], tmp_path / f"clip{suffix}")
    with pytest.raises(ValueError, match="no frame"):
        write_video([], tmp_path / f"clip{suffix}")
    with pytest.raises(ValueError, match="no frame"):
        write_video(frames[:0], tmp_path / f"clip{suffix}")
    assert listing(tmp_path) == []


def test_a_closed_writer_takes_no_more(tmp_path):
    with VideoWriter(tmp_path / "clip.gif") as writer:
        writer.append(few_colors())
    writer.close()
    with pytest.raises(ValueError, match="closed"):
        writer.append(few_colors())


def test_illegal_targets_and_settings_are_refused_before_the_first_frame(tmp_path):
    with pytest.raises(ValueError, match="mp4, gif, webp"):
        VideoWriter(tmp_path / "clip.xyz")
    with pytest.raises(FileNotFoundError, match="no folder"):
        VideoWriter(tmp_path / "missing" / "clip.mp4")
    with pytest.raises(ValueError, match="at most 50"):
        VideoWriter(tmp_path / "clip.gif", 60.0)
    with pytest.raises(ValueError, match="crf"):
        VideoWriter(tmp_path / "clip.gif", crf=10)
    with pytest.raises(ValueError, match="between 0 and 51"):
        VideoWriter(tmp_path / "clip.mp4", crf=52)
    for rate in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="frame_rate"):
            VideoWriter(tmp_path / "clip.mp4", rate)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_write_permission_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError, match="not writable"):
        VideoWriter(tmp_path / "clip.mp4")


# Resources

STREAM = """
import sys
import numpy as np
from vgen.data.video_io import VideoWriter, iter_video
y, x = np.mgrid[:96, :128]
def peak():  # getrusage would tell the peak of the parent process where that is higher
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))

peaks = []
for n, name in ((60, "short"), (1000, "long")):
    with VideoWriter(f"{sys.argv[1]}/{name}{sys.argv[2]}") as writer:
        for i in range(n):
            writer.append(np.stack([x + i, y, y + 2 * i], -1).astype(np.uint8) & 224)
    peaks.append(peak())
for name in ("short", "long"):
    count = sum(1 for _ in iter_video(f"{sys.argv[1]}/{name}{sys.argv[2]}"))
    peaks.append(peak())
assert count == 1000
print(*peaks)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="measures with /proc")
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_memory_does_not_depend_on_the_number_of_frames(tmp_path, suffix):
    result = subprocess.run([sys.executable, "-c", STREAM, str(tmp_path), suffix], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    short_write, long_write, short_read, long_read = map(float, result.stdout.split())
    all_frames = 940 * 96 * 128 * 3 / 1024
    assert long_write - short_write < all_frames / 4
    assert long_read - short_read < all_frames / 4


FORK = """
import gc, os, sys
from vgen.data.video_io import iter_video, read_video, video_info
for call in (read_video, video_info, lambda path: list(iter_video(path))):
    call(sys.argv[1])
child = os.fork()
if child == 0:
    read_video(sys.argv[1])
    gc.collect()
    os._exit(7)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_data_loader_workers_can_be_forked_after_reading(tmp_path):
    write_video(moving_pattern(12, 240, 320), tmp_path / "clip.mp4")
    command = [sys.executable, "-c", FORK, str(tmp_path / "clip.mp4")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert result.stdout.strip() == "7", result.stderr
