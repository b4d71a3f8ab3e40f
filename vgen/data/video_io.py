"""Reading and writing of video files and folders of frames, streamed with memory that does not depend on the length.

Files in `vgen.data.formats.CONTAINERS` are decoded by PyAV, because imageio's `pyav` plugin gives no time stamps. Gif,
webp and folders of png or jpg frames are read through imageio's `pillow` plugin.

Frames are upright uint8 RGB `(h, w, 3)`: rotation metadata is applied, 10-bit video is converted to 8 bits, and
transparent pixels are composited on black. Non-square pixels and interlacing are left as stored.
"""

import contextlib
import itertools
import math
import os
import re
import struct
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import av
import imageio.v3 as iio
import numpy as np
from PIL import Image

from vgen.checks import check_integer, check_number
from vgen.data.formats import (
    ANIMATION_SUFFIXES,
    CONTAINERS,
    IMAGE_FORMATS,
    IMAGE_SUFFIXES,
    MAX_PIXELS,
    check_frame_size,
    check_video_input,
)
from vgen.data.memory_file import MemoryFile
from vgen.data.video_writer import (
    DEFAULT_FRAME_RATE,
    VideoWriter,
    check_frame_rate,
    join_videos,
    write_video,
)

__all__ = [
    "VideoInfo",
    "VideoWriter",
    "iter_video",
    "join_videos",
    "read_video",
    "video_info",
    "write_video",
]

_ROUNDING = 0.006  # seconds of tolerance for stored times; gif counts in hundredths
_SEEK_MARGIN = 5.0  # seconds to seek early: FFmpeg seeks by decoding time, which precedes display time
_UNTIMED_DURATION = 0.1  # seconds, the duration that browsers use for a gif frame of duration 0


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
    """Mean number of frames per second; `None` if unknown."""
    num_frames: int | None
    """Number of frames; `None` if only decoding would determine it."""
    duration: float | None
    """Duration in seconds; `None` if unknown."""


def video_info(path: str | os.PathLike) -> VideoInfo:
    """Reads the properties of a video.

    Only the first frame is decoded, except for gif and webp, which store their timing frame by frame.

    Args:
        path: A video file or a folder of frames.

    Raises:
        FileNotFoundError: The file or folder does not exist.
        ValueError: It is not a readable video.
    """
    path = _checked(path)
    with _opened_source(path) as source:
        first = next(source.frames(0.0), None)
        if first is None:
            raise ValueError(f"{path} has no frames")
        height, width, _ = first.load().shape
        return VideoInfo(path=path, codec=source.codec, width=width, height=height, **source.timing())


def iter_video(
    path: str | os.PathLike, *, start: float | None = None, end: float | None = None, frame_rate: float | None = None
) -> Iterator[np.ndarray]:
    """Yields the frames of a video one by one.

    A damaged or truncated file yields its readable frames before it raises.

    Args:
        path: A video file with one of `vgen.data.formats.VIDEO_SUFFIXES`, or a folder of png or jpg frames.
        start: Time of the first frame, in seconds; `None` means the start of the video.
        end: Time in seconds before which to stop; `None` means the end of the video.
        frame_rate: Constant rate to resample to; at each time the latest frame is used. `None` yields the stored
            frames. For a folder without a stored frame rate it is the rate of the folder.

    Yields:
        Frames, uint8 `(h, w, 3)`, all of the same size.

    Raises:
        FileNotFoundError: The file or folder does not exist.
        ValueError: It is not a video, is empty, damaged or truncated, has frames of different sizes, or has no frame
            between `start` and `end`.
    """
    path = _checked(path, start, end, frame_rate)
    return (pixels for _, _, pixels in _frames_between(path, start, end, frame_rate))


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


def _frames_between(
    path: Path, start: float | None, end: float | None, frame_rate: float | None
) -> Generator[tuple[float, float, np.ndarray], None, None]:
    """Yields `(start time, end time, pixels)` of each frame, in seconds."""
    start, end, shape = start or 0.0, math.inf if end is None else end, None
    rounding = _ROUNDING if frame_rate is None else min(_ROUNDING, 0.3 / frame_rate)
    with _opened_source(path, frame_rate) as source:
        frames = source.frames(start)
        if frame_rate is not None:
            frames = _resampled(frames, start, frame_rate, rounding)
        for frame in frames:
            if frame.time >= end - rounding:
                break
            if frame.time < start - rounding:
                continue
            pixels = frame.load()
            shape = shape or pixels.shape
            if pixels.shape != shape:
                raise ValueError(f"all frames of {path} must have the same size, got {shape} and {pixels.shape}")
            yield frame.time, frame.time + frame.duration, pixels
    if shape is None:
        raise ValueError(f"{path} has no frames between {start:g} s and {end:g} s")


def _resampled(frames: Iterator[_Frame], start: float, frame_rate: float, rounding: float) -> Iterator[_Frame]:
    current, tick = None, 0
    for frame in itertools.chain(frames, [None]):
        if current is not None:
            # the end of the last frame is a sum of two rounded numbers
            until = current.time + current.duration - rounding if frame is None else frame.time
            while (time := start + tick / frame_rate) < until - rounding:
                yield _Frame(time, 1 / frame_rate, current.load)
                tick += 1
        current = frame


@contextlib.contextmanager
def _opened_source(path: Path, frame_rate: float | None = None) -> Iterator["_VideoFile | _Animation | _ImageFolder"]:
    if path.is_dir():
        yield _ImageFolder(path, frame_rate)
    elif path.suffix.lower() in ANIMATION_SUFFIXES:
        yield _Animation(path)
    else:
        try:
            # "file:", because FFmpeg takes what precedes a colon for a protocol
            source = path.open("rb") if isinstance(path, MemoryFile) else f"file:{path}"
            container = av.open(source, options={"format_whitelist": ",".join(CONTAINERS)})
        except (av.FFmpegError, UnicodeError) as error:
            reason = "its container is not supported" if isinstance(error, av.ArgumentError) else error
            raise ValueError(f"{path} is not a readable video, or is truncated: {reason}") from error
        with container:
            yield _VideoFile(path, container)


class _VideoFile:
    """A video file, decoded by FFmpeg."""

    def __init__(self, path: Path, container: Any):
        self._path = path
        self._container = container
        cover = av.stream.Disposition.attached_pic
        streams = [s for s in container.streams.video if s.codec_context and not s.disposition & cover]
        if not streams:
            kinds = ", ".join(sorted({stream.type for stream in container.streams})) or "nothing"
            raise ValueError(f"{path} has no decodable video stream, only: {kinds}")
        self._stream = streams[0]
        check_frame_size(path, self._stream.height, self._stream.width)
        self._stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}  # the size may change later
        self._stream.thread_type = "AUTO"
        self._clock = float(self._stream.time_base)
        self._rate = float(self._stream.average_rate or 0) or None
        self.codec = self._stream.codec_context.name

    def timing(self) -> dict[str, Any]:
        duration = (self._stream.duration or 0) * self._clock or (self._container.duration or 0) / av.time_base
        return {"frame_rate": self._rate, "num_frames": self._stream.frames or None, "duration": duration or None}

    def frames(self, start: float) -> Iterator[_Frame]:
        origin, damage, time, duration = None, None, 0.0, 0.0
        try:
            if start > _SEEK_MARGIN:
                origin = next((frame.pts for frame in self._container.decode(self._stream)), None) or 0
                self._container.seek(origin + int((start - _SEEK_MARGIN) / self._clock), stream=self._stream)
            for packet in self._container.demux():
                if packet.is_corrupt:
                    damage = "a packet is corrupt"
                elif packet.stream.index == self._stream.index:
                    for frame in packet.decode():
                        origin = frame.pts or 0 if origin is None else origin
                        time = time + duration if frame.pts is None else (frame.pts - origin) * self._clock
                        duration = frame.duration * self._clock or 1 / (self._rate or DEFAULT_FRAME_RATE)
                        yield _Frame(time, duration, partial(_decoded_pixels, frame))
        except av.FFmpegError as error:
            damage = error.strerror
        if damage or _is_truncated(self._path):
            raise ValueError(f"{self._path} is damaged or truncated: {damage or 'the end is missing'}")


def _decoded_pixels(frame: av.VideoFrame) -> np.ndarray:
    has_alpha = any(component.is_alpha for component in frame.format.components)
    # one thread: starting a thread pool for each frame costs more than it saves
    pixels = frame.to_ndarray(format="rgba" if has_alpha else "rgb24", threads=1)
    return np.ascontiguousarray(np.rot90(_on_black(pixels), k=round(frame.rotation / 90)))


class _Animation:
    """A gif or webp, decoded by Pillow."""

    def __init__(self, path: Path):
        self._path = path
        self.codec = path.suffix.lower()[1:]

    def timing(self) -> dict[str, Any]:
        durations = [frame.duration for frame in self.frames(0.0)]
        num_frames, duration = len(durations), sum(durations)
        return {"frame_rate": num_frames / duration, "num_frames": num_frames, "duration": duration}

    def frames(self, start: float) -> Iterator[_Frame]:
        time = 0.0
        with _opened_image(self._path) as file:
            for index in itertools.count():
                try:
                    check_frame_size(self._path, *file.properties(index=index).shape[:2])  # a gif may grow
                except EOFError:
                    break
                pixels = file.read(index=index, mode="RGBA")
                duration = file.metadata(index=index).get("duration", 0) / 1000 or _UNTIMED_DURATION
                yield _Frame(time, duration, partial(_on_black, pixels))
                time += duration
        if _is_truncated(self._path):
            raise ValueError(f"{self._path} is truncated: the end is missing")


class _ImageFolder:
    """A folder of images in natural order of their names."""

    def __init__(self, path: Path, frame_rate: float | None):
        images = [entry for entry in path.iterdir() if entry.suffix.lower() in IMAGE_SUFFIXES]
        self._images = sorted((image for image in images if image.name[0] != "."), key=_natural_order)
        if not self._images:
            raise ValueError(f"the folder {path} has no {', '.join(IMAGE_SUFFIXES)} frames")
        self.codec = self._images[0].suffix.lower()[1:]
        with _opened_image(self._images[0]) as file:
            rate = file.metadata(index=0).get("frame_rate")
        self._stored_rate = float(rate) if rate else None
        self._frame_rate = self._stored_rate or frame_rate or DEFAULT_FRAME_RATE

    def timing(self) -> dict[str, Any]:
        num_frames, rate = len(self._images), self._stored_rate
        return {"frame_rate": rate, "num_frames": num_frames, "duration": num_frames / rate if rate else None}

    def frames(self, start: float) -> Iterator[_Frame]:
        for index, image in enumerate(self._images):
            yield _Frame(index / self._frame_rate, 1 / self._frame_rate, partial(_image_pixels, image))


def _natural_order(path: Path) -> list[tuple[int, int | str]]:
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in re.split(r"([0-9]+)", path.name.lower())]


@contextlib.contextmanager
def _opened_image(path: Path) -> Iterator[Any]:
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is a pipe, a device or a folder: expected an image")
    try:
        with path.open("rb") as header, Image.open(header, formats=IMAGE_FORMATS) as image:
            check_frame_size(path, image.height, image.width)
        with iio.imopen(path.content if isinstance(path, MemoryFile) else path, "r", plugin="pillow") as file:
            yield file
    # the exceptions that Pillow raises
    except (OSError, SyntaxError, EOFError, IndexError, struct.error, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} is not an image, or is damaged or truncated: {error.__cause__ or error}") from error


def _image_pixels(path: Path) -> np.ndarray:
    with _opened_image(path) as file:
        if file.metadata(index=0)["mode"].startswith("I"):  # 16-bit gray
            gray = (file.read(index=0, rotate=True) >> 8).astype(np.uint8)
            return np.repeat(gray[..., None], 3, axis=-1)
        return _on_black(file.read(index=0, mode="RGBA", rotate=True))


def _on_black(pixels: np.ndarray) -> np.ndarray:
    """Composites RGBA on black; returns RGB unchanged."""
    if pixels.shape[-1] == 3:
        return pixels
    color, alpha = pixels[..., :3], pixels[..., 3:].astype(np.uint16)
    return ((color * alpha + 127) // 255).astype(np.uint8)


def _is_truncated(path: Path) -> bool:
    """Whether a gif, avi, mkv or webm is truncated. FFmpeg and Pillow may treat the cut as the end of the video."""
    with path.open("rb") as file:
        head = file.read(4096)
        size = file.seek(0, os.SEEK_END)
        if head.startswith(b"GIF"):
            file.seek(max(size - 64, 0))
            return not file.read().rstrip(b"\0").endswith(b";")
    if head.startswith(b"RIFF"):
        return 8 + int.from_bytes(head[4:8], "little") > size
    # Matroska: one segment, then its length in eight bytes, all ones if it is unknown.
    segment = head.find(b"\x18\x53\x80\x67\x01")
    if not head.startswith(b"\x1a\x45\xdf\xa3") or segment < 0:
        return False
    length = int.from_bytes(head[segment + 5 : segment + 12], "big")
    return length != 2**56 - 1 and segment + 12 + length > size
