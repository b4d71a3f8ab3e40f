"""Reading and writing of video files and folders of frames, streamed with memory that does not depend on the length.

Files in `vgen.data.formats.CONTAINERS` are decoded by PyAV, because imageio's `pyav` plugin gives no time stamps. Gif
and webp are read through imageio's `pillow` plugin, and folders of png or jpg frames as all still images are.

Frames are upright uint8 RGB `(h, w, 3)`: rotations and flips are applied, 10-bit video is converted to 8 bits, BT.2020
to BT.709, and transparent pixels are composited on black. Non-square pixels and interlacing are left as stored. HDR
video (PQ, HLG) raises an error.
"""

import contextlib
import itertools
import json
import math
import os
import re
import struct
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import av
import imageio.v3 as iio
import numpy as np
from av.video.reformatter import ColorPrimaries

from vgen.checks import check_integer, check_number
from vgen.data.containers import structural_damage
from vgen.data.formats import ANIMATION_SUFFIXES, CONTAINERS, IMAGE_SUFFIXES, check_video_input
from vgen.data.memory_file import MemoryFile
from vgen.data.video_writer import (
    DEFAULT_FRAME_RATE,
    METADATA_KEY,
    VideoWriter,
    check_frame_rate,
    join_videos,
    write_video,
)
from vgen.io.images import MAX_PIXELS, check_frame_size, on_black, opened_image, read_image

__all__ = [
    "VideoInfo",
    "VideoWriter",
    "iter_video",
    "join_videos",
    "read_video",
    "resampled_length",
    "video_info",
    "write_video",
]

_ROUNDING = 0.006  # seconds of tolerance for stored times; gif counts in hundredths
_CORRUPT_PACKET = "a packet is corrupt"
_DECODER_THREADS = 0  # FFmpeg chooses by the number of cores; each delays the frames by one
_SEEK_MARGIN = 5.0  # seconds to seek early: FFmpeg seeks by decoding time, which precedes display time
_INDEXED_SEEK_MARGIN = 0.5  # in files that index their keyframes
_INDEXED = ("matroska", "mov")
_UNTIMED_DURATION = 0.1  # seconds, the duration that browsers use for a gif frame of duration 0
_ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}  # FFmpeg's own decoders ignore the alpha of webm
_HDR_TRANSFERS = {16: "PQ (SMPTE ST 2084)", 18: "HLG (ARIB STD-B67)"}

_BT2020_TO_BT709 = np.array(
    [[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]], np.float32
)
_SRGB = np.linspace(0, 1, 256, dtype=np.float32)
_SRGB_TO_LINEAR = np.where(_SRGB <= 0.04045, _SRGB / 12.92, ((_SRGB + 0.055) / 1.055) ** 2.4)
_LINEAR = np.linspace(0, 1, 4096)
_LINEAR_TO_SRGB = np.where(_LINEAR <= 0.0031308, 12.92 * _LINEAR, 1.055 * _LINEAR ** (1 / 2.4) - 0.055)
_LINEAR_TO_SRGB = np.rint(255 * _LINEAR_TO_SRGB).astype(np.uint8)

OnDamage = Callable[[str], None]
"""Receives a line that names a damaged file and its damage."""


@dataclass(frozen=True, kw_only=True)
class VideoInfo:
    """Properties of a video."""

    path: Path
    """The file or folder."""
    codec: str
    """Name of the codec, such as `h264`, `gif` or `png`."""
    width: int
    """Width of the upright frames in pixels."""
    height: int
    """Height of the upright frames in pixels."""
    frame_rate: float | None
    """Mean number of frames per second; `None` for a folder that does not store it."""
    num_frames: int
    """Number of frames."""
    duration: float | None
    """Seconds from the start of the first frame to the end of the last; `None` if the frame rate is."""
    pixel_aspect_ratio: float
    """Width of a pixel of the upright frames divided by its height; 1 for square pixels."""
    damage: str | None
    """A line that describes the damage of the file; `None` if reading its packets shows none."""
    metadata: dict[str, Any] = field(default_factory=dict)
    """What `VideoWriter` stored: how the video was made, with which version of `vgen`; empty for other videos."""

    @property
    def scale(self) -> int:
        """Factor by which `VideoWriter` enlarged the frames; 1 if it did not, or if they were resized afterwards."""
        scale, size = self.metadata.get("scale"), self.metadata.get("content_size")
        if type(scale) is not int or scale < 1 or not isinstance(size, list):
            return 1
        padded = [[side * scale + extra for extra in (0, 1)] for side in size if type(side) is int and side > 0]
        actual = [self.height, self.width]
        fits = len(size) == len(padded) == 2 and all(side in two for side, two in zip(actual, padded, strict=True))
        return scale if fits else 1

    @property
    def content_size(self) -> tuple[int, int]:
        """Height and width in pixels before `VideoWriter` enlarged the frames."""
        if self.scale == 1:
            return self.height, self.width
        height, width = self.metadata["content_size"]
        return height, width


def video_info(path: str | os.PathLike) -> VideoInfo:
    """Reads the properties of a video.

    Number and times of frames are those of the packets in the file, not of its header. Frames after the first are
    decoded only where packets do not determine the times, as in gif, webp, avi and VP8.

    Args:
        path: A video file or a folder of frames.

    Raises:
        FileNotFoundError: The file or folder does not exist.
        ValueError: It is not a readable video.
    """
    path = _checked(path)
    damage: list[str] = []
    source = _source(path)
    with contextlib.closing(source.frames(0.0, damage.append)) as frames:
        first = next(frames, None)
        if first is None:
            raise ValueError(damage[0] if damage else f"{path} has no frames")
        height, width, _ = first.load().shape
    aspect = first.pixel_aspect_ratio
    return VideoInfo(path=path, width=width, height=height, pixel_aspect_ratio=aspect, **source.properties())


def iter_video(
    path: str | os.PathLike,
    *,
    start: float | None = None,
    end: float | None = None,
    frame_rate: float | None = None,
    on_damage: OnDamage | None = None,
) -> Iterator[np.ndarray]:
    """Yields the frames of a video one by one.

    A damaged or truncated file yields the frames before the damage and then raises.

    Args:
        path: A video file with one of `vgen.data.formats.VIDEO_SUFFIXES`, or a folder of png or jpg frames.
        start: Time of the first frame, in seconds; `None` means the start of the video.
        end: Time in seconds before which to stop; `None` means the end of the video.
        frame_rate: Constant rate to resample to; at each time the latest frame is used. `None` yields the stored
            frames. For a folder without a stored frame rate it is the rate of the folder.
        on_damage: Called once for a damaged file, instead of the error; all frames that can be decoded are then
            yielded.

    Yields:
        Frames, uint8 `(h, w, 3)`, all of the same size.

    Raises:
        FileNotFoundError: The file or folder does not exist.
        ValueError: It is not a video, is empty, damaged or truncated, has frames of different sizes, or has no frame
            between `start` and `end`.
    """
    path = _checked(path, start, end, frame_rate)
    return (pixels for _, _, pixels in _frames_between(path, start, end, frame_rate, on_damage))


def resampled_length(duration: float, frame_rate: float, start: float = 0.0, end: float = math.inf) -> int:
    """Number of frames of a video that is resampled to a constant rate, as `iter_video` yields them.

    Args:
        duration: Duration of the video in seconds.
        frame_rate: Frames per second to resample to.
        start: Time of the first frame, in seconds.
        end: Time in seconds before which to stop.
    """
    # the end of the last frame is a sum of two rounded numbers
    return _num_ticks(min(duration - _rounding(frame_rate), end) - start, frame_rate)


def _num_ticks(seconds: float, frame_rate: float) -> int:
    return max(0, math.ceil((seconds - _rounding(frame_rate)) * frame_rate))


def _rounding(frame_rate: float | None) -> float:
    return _ROUNDING if frame_rate is None else min(_ROUNDING, 0.3 / frame_rate)


def read_video(
    path: str | os.PathLike,
    *,
    start: float | None = None,
    end: float | None = None,
    frame_rate: float | None = None,
    max_frames: int | None = None,
) -> tuple[np.ndarray, float]:
    """Reads a video, or a part of it, into memory.

    Args:
        path: As in `iter_video`.
        start: As in `iter_video`.
        end: As in `iter_video`.
        frame_rate: As in `iter_video`.
        max_frames: Largest number of frames to read; `None` reads all.

    Returns:
        Frames, uint8 `(f, h, w, 3)`, and the frames per second: `frame_rate` if given, otherwise the mean rate of the
        frames that were read. Folders without a stored frame rate count as 8 frames per second.

    Raises:
        FileNotFoundError: The file or folder does not exist.
        ValueError: As in `iter_video`.
    """
    path = _checked(path, start, end, frame_rate)
    if max_frames is not None:
        check_integer("max_frames", max_frames, 1)
    with contextlib.closing(_frames_between(path, start, end, frame_rate)) as frames:
        times, stops, pixels = zip(*itertools.islice(frames, max_frames), strict=True)
    return np.stack(pixels), float(frame_rate or len(pixels) / (stops[-1] - times[0]))


def spread_frames(path: str | os.PathLike, count: int) -> list[np.ndarray]:
    """Reads frames that are evenly spread over a video, the first and the last one included.

    Args:
        path: A video file or a folder of frames.
        count: Number of frames, at least 1; all are read if the video has fewer.

    Returns:
        Frames, uint8 `(h, w, 3)`.

    Raises:
        FileNotFoundError: The file or folder does not exist.
        ValueError: It is not a readable video.
    """
    info = video_info(path)
    rate = info.frame_rate or DEFAULT_FRAME_RATE
    indices = np.linspace(0, info.num_frames - 1, min(count, info.num_frames)).round()
    frames = []
    for start in (indices / rate).tolist():
        with contextlib.closing(_frames_between(Path(path), start, None, rate)) as found:
            frames.append(next(found)[-1])
    return frames


def _checked(
    path: str | os.PathLike, start: float | None = None, end: float | None = None, frame_rate: float | None = None
) -> Path:
    path = cast(Path, path) if isinstance(path, MemoryFile) else Path(path)
    check_video_input(path)
    if start is not None:
        check_number("start", start, 0)
    if end is not None:
        check_number("end", end)
        if end <= (start or 0.0):
            raise ValueError(f"end must be later than start={start or 0:g} s, got {end:g} s")
    if frame_rate is not None:
        check_frame_rate(frame_rate)
    return path


class _Frame(NamedTuple):
    time: float  # seconds since the start of the video
    duration: float
    load: Callable[[], np.ndarray]  # deferred, because converting only the frames that are used saves most of the time
    pixel_aspect_ratio: float = 1.0


def _frames_between(
    path: Path, start: float | None, end: float | None, frame_rate: float | None, on_damage: OnDamage | None = None
) -> Generator[tuple[float, float, np.ndarray], None, None]:
    """Yields `(start time, end time, pixels)` of each frame, in seconds."""
    start, end, shape = start or 0.0, math.inf if end is None else end, None
    with contextlib.closing(_source(path, frame_rate).frames(start, on_damage)) as stored:
        frames = stored if frame_rate is None else _resampled(stored, start, end, frame_rate)
        for frame in frames:
            if frame.time >= end - _rounding(frame_rate):
                break
            if frame.time < start - _rounding(frame_rate):
                continue
            pixels = frame.load()
            shape = shape or pixels.shape
            if pixels.shape != shape:
                raise ValueError(f"all frames of {path} must have the same size, got {shape} and {pixels.shape}")
            yield frame.time, frame.time + frame.duration, pixels
    if shape is None:
        raise ValueError(f"{path} has no frames between {start:g} s and {end:g} s")


def _resampled(frames: Iterator[_Frame], start: float, end: float, frame_rate: float) -> Iterator[_Frame]:
    current, tick = None, 0
    for frame in itertools.chain(frames, [None]):
        if current is not None:
            if frame is None:
                until = resampled_length(current.time + current.duration, frame_rate, start, end)
            else:
                until = _num_ticks(min(frame.time, end) - start, frame_rate)
            while tick < until:
                yield _Frame(start + tick / frame_rate, 1 / frame_rate, current.load)
                tick += 1
        current = frame


def _source(path: Path, frame_rate: float | None = None) -> "_VideoFile | _Animation | _ImageFolder":
    if path.is_dir():
        return _ImageFolder(path, frame_rate)
    return _Animation(path) if path.suffix.lower() in ANIMATION_SUFFIXES else _VideoFile(path)


def _metadata(text: str | bytes | None) -> dict[str, Any]:
    """Parses what `VideoWriter` stored; a text of another program gives nothing."""
    try:
        entries = json.loads(text or "")
    except (ValueError, RecursionError):
        return {}
    return entries if isinstance(entries, dict) and "vgen" in entries else {}


def _properties(codec: str, num_frames: int, duration: float, damage: list[str]) -> dict[str, Any]:
    """Properties for `VideoInfo`; the mean frame rate follows from the others."""
    rate, first = num_frames / duration, damage[0] if damage else None
    return {"codec": codec, "num_frames": num_frames, "duration": duration, "frame_rate": rate, "damage": first}


class _VideoFile:
    """A video file, decoded by FFmpeg."""

    def __init__(self, path: Path):
        self._path = path

    @contextlib.contextmanager
    def _opened(self) -> Iterator[tuple[Any, Any]]:
        """The container and its video stream."""
        path = self._path
        try:
            # "file:", because FFmpeg takes what precedes a colon for a protocol
            source = path.open("rb") if isinstance(path, MemoryFile) else f"file:{path}"
            container: Any = av.open(source, options={"format_whitelist": ",".join(CONTAINERS)})
        except (av.FFmpegError, UnicodeError) as error:
            reason = "its container is not supported" if isinstance(error, av.ArgumentError) else error
            raise ValueError(f"{path} is not a readable video, or is truncated: {reason}") from error
        with container:
            cover = av.stream.Disposition.attached_pic
            streams = [s for s in container.streams.video if s.codec_context and not s.disposition & cover]
            if not streams:
                kinds = ", ".join(sorted({stream.type for stream in container.streams})) or "nothing"
                raise ValueError(f"{path} has no decodable video stream, only: {kinds}")
            check_frame_size(path, streams[0].height, streams[0].width)
            streams[0].codec_context.options = {"max_pixels": str(MAX_PIXELS)}  # the size may change later
            streams[0].thread_type, streams[0].codec_context.thread_count = "AUTO", _DECODER_THREADS
            yield container, streams[0]

    def properties(self) -> dict[str, Any]:
        shown, first, damage = [], None, []
        with self._opened() as (container, stream):
            codec, clock, rate = stream.codec_context.name, float(stream.time_base), float(stream.average_rate or 0)
            metadata = _metadata(container.metadata.get(METADATA_KEY))
            timed = _shows_every_packet(container, stream)
            has_gaps = _container_name(container) not in ("matroska", "mov")  # whose structure is checked
            try:
                for packet in container.demux(stream):
                    if packet.is_corrupt:
                        damage.append(self._damage("a packet is corrupt"))
                    first = packet.pts if first is None and packet.is_keyframe else first
                    if packet.size and not packet.is_discard:
                        shown.append((packet.pts, packet.duration or 0))
            except av.FFmpegError as error:
                damage.append(self._damage(str(error.strerror)))
        stamps = {pts for pts, _ in shown}
        timed = timed and first is not None and None not in stamps and len(stamps) == len(shown)
        if timed and (shown := sorted(packet for packet in shown if packet[0] >= first)):
            times = [(pts - shown[0][0]) * clock for pts, _ in shown]
            duration = _shown_for(shown[-1][1] * clock, times[-1] - times[max(-2, -len(times))], rate)
        else:
            times, duration = [], 0.0
            for frame in self.frames(0.0, damage.append):
                times.append(frame.time)
                duration = frame.duration
        if problem := structural_damage(self._path) or (has_gaps and _gap(times)):
            damage.append(self._damage(problem))
        end = times[-1] + duration
        exact = rate and abs(len(times) / rate - end) < _ROUNDING  # the mean of rounded times is less accurate
        found = _properties(codec, len(times), end, damage) | {"metadata": metadata}
        return found | ({"frame_rate": rate} if exact else {})

    def frames(self, start: float, on_damage: OnDamage | None = None) -> Generator[_Frame, None, None]:
        time = duration = 0.0
        reports: list[str] = []

        def report(problem: str) -> None:
            if on_damage is None:
                raise ValueError(self._damage(problem, time))
            if not reports:
                on_damage(self._damage(problem, time))
            reports.append(problem)

        with self._opened() as (container, stream):
            clock, rate = float(stream.time_base), float(stream.average_rate or 0)
            origin = None
            margins = [_INDEXED_SEEK_MARGIN] if _container_name(container) in _INDEXED else []
            begins = [start - margin for margin in (*margins, _SEEK_MARGIN) if margin < start]
            if begins:
                origin = next((frame.pts for frame in self._decoded(container, stream, reports.append)), None) or 0
                reports.clear()
                decoded = self._decoded_from(container, stream, origin, start, begins, report)
            else:
                decoded = self._decoded(container, stream, report)
            previous = rotation = None
            for frame in decoded:
                if frame.color_trc in _HDR_TRANSFERS:
                    raise ValueError(
                        f"{self._path} is HDR video, {_HDR_TRANSFERS[frame.color_trc]}, which is not supported: "
                        "convert it to SDR first, for example with the filters zscale and tonemap of ffmpeg"
                    )
                origin = frame.pts or 0 if origin is None else origin
                time = time + duration if frame.pts is None else (frame.pts - origin) * clock
                duration = _shown_for(frame.duration * clock, 0 if previous is None else time - previous, rate)
                if frame.rotation != rotation:  # not for each frame, because its side data refer back to it
                    rotation, orientation = frame.rotation, _orientation(frame)
                aspect = float(stream.sample_aspect_ratio or 1) ** (-1 if orientation.transposed else 1)
                yield _Frame(time, duration, partial(_decoded_pixels, frame, orientation), aspect)
                previous = time
            if container.format.name == "avi" and (stated := (stream.duration or 0) * clock) > time + 4 * duration:
                report(f"the header states {stated:.2f} s")  # Xvid's delay is up to two frames
        if broken := structural_damage(self._path):
            report(broken)

    def _decoded_from(
        self, container: Any, stream: Any, origin: int, start: float, begins: list[float], report: OnDamage
    ) -> Iterator[av.VideoFrame]:
        """Decodes frames from one at or before `start`: sought at each of `begins`, and else the first of the file."""
        clock = float(stream.time_base)
        for begin in (*begins, -_SEEK_MARGIN):
            container.seek(origin + int(begin / clock), stream=stream)
            decoded = self._decoded(container, stream, report)
            first = next(decoded, None)
            if first is not None and first.pts is not None and (first.pts - origin) * clock <= start:
                break
        return itertools.chain([] if first is None else [first], decoded)

    def _decoded(self, container: Any, stream: Any, report: OnDamage) -> Iterator[av.VideoFrame]:
        """Decodes frames, and drops those that precede the first keyframe, because they refer to missing frames."""
        decoder, first = self._decoder(stream), None
        waiting: set[int | None] = set()  # times of the packets whose frames are still to come
        timed = _shows_every_packet(container, stream)
        intact: set[int | None] | None = None  # times of the packets before a corrupt one; threads still decode them
        try:
            for packet in container.demux(stream):
                if packet.is_corrupt and intact is None:
                    intact = waiting - {None}
                first = packet.pts if first is None and packet.is_keyframe else first
                if first is None and packet.size:
                    continue
                if packet.size and not packet.is_discard:
                    timed = timed and packet.pts is not None and packet.pts not in waiting
                    waiting.add(packet.pts)
                try:
                    frames = decoder.decode(packet if packet.size else None)
                except av.FFmpegError as error:
                    report(str(error.strerror))
                    continue
                for frame in frames:
                    waiting.discard(frame.pts)
                    if frame.pts is None or frame.pts >= first:
                        if intact is not None and frame.pts not in intact:
                            report(_CORRUPT_PACKET)
                        if frame.is_corrupt:
                            report("a frame is corrupt")
                        yield frame
        except av.FFmpegError as error:
            report(str(error.strerror))
        if intact is not None:
            report(_CORRUPT_PACKET)
        if timed and first is not None and (lost := sum(pts >= first for pts in waiting)):
            report(f"{lost} frames cannot be decoded")

    def _decoder(self, stream: Any) -> Any:
        name = stream.codec_context.name
        if stream.metadata.get("alpha_mode") == "1" and name in _ALPHA_DECODERS:
            try:
                decoder = av.CodecContext.create(_ALPHA_DECODERS[name], "r")
            except av.codec.codec.UnknownCodecError as error:
                raise ValueError(
                    f"{self._path} has transparent {name} video, which needs FFmpeg's decoder "
                    f"{_ALPHA_DECODERS[name]}: install PyAV's own wheel"
                ) from error
            decoder.options = dict(stream.codec_context.options)
            return decoder
        if name == "mjpeg":  # does not mark frames as corrupt
            stream.codec_context.options |= {"err_detect": "explode"}
        return stream.codec_context

    def _damage(self, problem: str | None, time: float | None = None) -> str:
        place = "" if time is None else f" near {time:.2f} s"
        return f"{self._path} is damaged or truncated{place}: {problem}"


def _container_name(container: Any) -> str:
    return container.format.name.split(",")[0]


def _shows_every_packet(container: Any, stream: Any) -> bool:
    """Whether each packet has the time of one frame. VP8 stores hidden frames as packets; avi stores no times."""
    return stream.codec_context.name != "vp8" and container.format.name != "avi"


def _shown_for(duration: float, gap: float, rate: float) -> float:
    """Duration of a frame, in seconds: the stored one, otherwise that of the frame before it, or of the mean rate."""
    return duration or gap or 1 / (rate or DEFAULT_FRAME_RATE)


def _gap(times: list[float]) -> str | None:
    """Where frames are missing from a video of constant rate: less than 5% of its intervals differ, one by a lot."""
    intervals = np.diff(times)
    usual = np.median(intervals) if len(intervals) else 0.0
    if len(intervals) == 0 or intervals.max() < 3.5 * usual or np.mean(intervals > 1.5 * usual) > 0.05:
        return None
    before = intervals.argmax()
    return f"there are no frames between {times[before]:.2f} s and {times[before + 1]:.2f} s"


class _Orientation(NamedTuple):
    """What makes a frame upright: a transposition of rows and columns, then flips of the columns and of the rows."""

    transposed: bool
    columns_flipped: bool
    rows_flipped: bool


def _orientation(frame: av.VideoFrame) -> _Orientation:
    matrix: Any = frame.side_data.get("DISPLAYMATRIX")
    # the pixel at (x, y) is shown at (a x + c y, b x + d y)
    a, b, _, c, d, *_ = (1, 0, 0, 0, 1) if matrix is None else struct.unpack("=9i", bytes(matrix))
    return _Orientation(False, a < 0, d < 0) if abs(a) >= abs(b) else _Orientation(True, c < 0, b < 0)


def _decoded_pixels(frame: av.VideoFrame, orientation: _Orientation) -> np.ndarray:
    has_alpha = frame.format.has_palette or any(component.is_alpha for component in frame.format.components)
    # one thread: starting a thread pool for each frame costs more than it saves
    pixels = on_black(frame.to_ndarray(format="rgba" if has_alpha else "rgb24", threads=1))
    if frame.color_primaries == ColorPrimaries.BT2020:
        pixels = _bt2020_to_bt709(pixels)
    pixels = pixels.swapaxes(0, 1) if orientation.transposed else pixels
    return np.ascontiguousarray(
        pixels[:: -1 if orientation.rows_flipped else 1, :: -1 if orientation.columns_flipped else 1]
    )


def _bt2020_to_bt709(pixels: np.ndarray) -> np.ndarray:
    """Converts the primaries (ITU-R BT.2087). FFmpeg's scaler does so too, but takes seconds to prepare."""
    linear = _SRGB_TO_LINEAR[pixels] @ _BT2020_TO_BT709.T
    return _LINEAR_TO_SRGB[np.rint(4095 * linear.clip(0, 1)).astype(np.uint16)]


class _Animation:
    """A gif or webp, decoded by Pillow."""

    def __init__(self, path: Path):
        self._path = path

    def properties(self) -> dict[str, Any]:
        damage: list[str] = []
        num_frames, end = 0, 0.0
        for frame in self.frames(0.0, damage.append):
            num_frames, end = num_frames + 1, frame.time + frame.duration
        with self._path.open("rb") as file, opened_image(file, self._path) as image:
            metadata = _metadata(image.info.get(METADATA_KEY))
        return _properties(self._path.suffix.lower()[1:], num_frames, end, damage) | {"metadata": metadata}

    def frames(self, start: float, on_damage: OnDamage | None = None) -> Generator[_Frame, None, None]:
        time, path = 0.0, self._path
        try:
            with path.open("rb") as header, opened_image(header, path):  # of a supported format and size
                source = path.content if isinstance(path, MemoryFile) else path
                file: Any
                with iio.imopen(source, "r", plugin="pillow") as file:
                    for index in itertools.count():
                        try:
                            check_frame_size(path, *file.properties(index=index).shape[:2])  # a gif may grow
                        except EOFError:
                            break
                        pixels = file.read(index=index, mode="RGBA")  # and with it a webp's duration
                        duration = file.metadata(index=index).get("duration", 0) / 1000 or _UNTIMED_DURATION
                        yield _Frame(time, duration, partial(on_black, pixels))
                        time += duration
            if broken := structural_damage(path):
                raise ValueError(f"{path} is damaged or truncated: {broken}")
        except ValueError as error:
            if on_damage is None or time == 0:
                raise
            on_damage(str(error))


class _ImageFolder:
    """A folder of images in natural order of their names."""

    def __init__(self, path: Path, frame_rate: float | None):
        images = [entry for entry in path.iterdir() if entry.suffix.lower() in IMAGE_SUFFIXES]
        self._images = sorted((image for image in images if image.name[0] != "."), key=_natural_order)
        if not self._images:
            raise ValueError(f"the folder {path} has no {', '.join(IMAGE_SUFFIXES)} frames")
        with opened_image(self._images[0], self._images[0]) as image:
            self._stored_rate = float(image.info.get("frame_rate", 0))
            self._metadata = _metadata(image.info.get(METADATA_KEY))
        self._frame_rate = self._stored_rate or frame_rate or DEFAULT_FRAME_RATE

    def properties(self) -> dict[str, Any]:
        num_frames = len(self._images)
        found = _properties(self._images[0].suffix.lower()[1:], num_frames, num_frames / self._frame_rate, [])
        found["metadata"] = self._metadata
        return found if self._stored_rate else found | {"frame_rate": None, "duration": None}

    def frames(self, start: float, on_damage: OnDamage | None = None) -> Generator[_Frame, None, None]:
        for index, image in enumerate(self._images):
            yield _Frame(index / self._frame_rate, 1 / self._frame_rate, partial(read_image, image))


def _natural_order(path: Path) -> list[tuple[int, int | str]]:
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in re.split(r"([0-9]+)", path.name.lower())]
