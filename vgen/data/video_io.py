"""Video in and out: files and folders of frames, streamed with memory that does not depend on their length.

Video files (mp4, mov, mkv, webm, avi) go through PyAV, the library under imageio's `pyav` plugin: the plugin itself
hands out neither time stamps nor rotation and takes no encoder settings. Gif, webp and folders of png or jpg frames
are read through imageio's `pillow` plugin.

Frames are uint8 RGB `(h, w, 3)`, upright (rotation metadata is applied); 10-bit video is converted to 8 bits, and what
is transparent lies on black. Non-square pixels and interlacing are left as they are stored.
"""

import contextlib
import errno
import itertools
import math
import os
import re
import shutil
import struct
import uuid
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import av
import imageio.v3 as iio
import numpy as np
from av.video.reformatter import VideoReformatter
from PIL import GifImagePlugin, Image, ImageChops, PngImagePlugin

__all__ = ["VideoInfo", "VideoWriter", "iter_video", "read_video", "video_info", "write_video"]

DEFAULT_FRAME_RATE = 8.0  # also taken for folders of frames that do not tell theirs
DEFAULT_CRF = 16

_CONTAINERS = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi")
_ANIMATIONS = (".gif", ".webp")
_IMAGES = (".png", ".jpg", ".jpeg")
_WRITABLE = (".mp4", ".gif", ".webp", "")
_READABLE_HINT = f"{', '.join(_CONTAINERS + _ANIMATIONS)} or a folder of {', '.join(_IMAGES)} frames"
_WRITABLE_HINT = "mp4, gif, webp, or no suffix for a folder of png frames"

# FFmpeg chooses the demuxer by content; without this a playlist called .mp4 could open other files and addresses.
_OPEN_OPTIONS = {"format_whitelist": "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi", "protocol_whitelist": "file"}

_COARSEST_CLOCK = 0.01  # seconds, that of gif
_UNTIMED_FRAME_MS = 100  # what browsers do with a gif frame of duration 0
_MAX_GIF_RATE = 50.0  # browsers slow faster ones down


@dataclass(frozen=True, kw_only=True)
class VideoInfo:
    """What a video says about itself."""

    path: Path
    """The file or folder."""
    codec: str
    """Name of the coding, such as `h264`, `gif` or `png`."""
    width: int
    """Width of the upright frames in pixels."""
    height: int
    """Height of the upright frames in pixels."""
    frame_rate: float | None
    """Mean number of frames per second, `None` for a folder of frames that does not tell."""
    num_frames: int | None
    """Number of frames, `None` where only decoding can tell."""
    duration: float | None
    """Seconds, `None` where unknown."""


def video_info(path: str | os.PathLike) -> VideoInfo:
    """Describes a video. Decodes the first frame only, except for gif and webp, whose timing is stored frame by frame.

    Args:
        path: A video file or a folder of frames.

    Raises:
        FileNotFoundError: If there is no such file or folder.
        ValueError: If it is not a video that can be read.
    """
    path = _existing(path)
    with contextlib.closing(_open_source(path)) as source:
        first = next(source.frames(0.0), None)
        if first is None:
            raise ValueError(f"{path} has no frames")
        height, width, _ = first.load().shape
        return VideoInfo(path=path, codec=source.codec, width=width, height=height, **source.timing())


def iter_video(
    path: str | os.PathLike, *, start: float | None = None, end: float | None = None, frame_rate: float | None = None
) -> Iterator[np.ndarray]:
    """Yields the frames of a video one by one.

    Of a damaged or cut file every readable frame is yielded before the error is raised.

    Args:
        path: A video file (mp4, m4v, mov, mkv, webm, avi, gif, webp) or a folder of png or jpg frames.
        start: Seconds from the first frame on; `None` starts there.
        end: Seconds from the first frame on, itself excluded; `None` goes on to the last frame.
        frame_rate: Resamples to this constant rate: at every instant the latest frame whose time has come, so a
            variable rate is respected. `None` yields the stored frames as they are. For a folder that does not tell
            its rate this is the rate of its frames.

    Yields:
        Frames, uint8 `(h, w, 3)`, all of one size.

    Raises:
        FileNotFoundError: If there is no such file or folder.
        ValueError: If it is not a video, is empty, damaged or cut short, if its frames differ in size, or if no frame
            lies between `start` and `end`.
    """
    path = _existing(path)
    _check_range(start, end, frame_rate)
    return _iterate(path, start, end, frame_rate)


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
        path: As for `iter_video`.
        start: As for `iter_video`.
        end: As for `iter_video`.
        frame_rate: As for `iter_video`.
        max_frames: Stops after this number of frames.

    Returns:
        Frames, uint8 `(f, h, w, 3)`, and the frames per second: `frame_rate` where given, otherwise the mean rate of
        the frames read. Folders that do not tell their rate count as 8 frames per second.

    Raises:
        FileNotFoundError: If there is no such file or folder.
        ValueError: As for `iter_video`.
    """
    path = _existing(path)
    _check_range(start, end, frame_rate)
    if max_frames is not None and max_frames < 1:
        raise ValueError(f"max_frames must be at least 1, got {max_frames}")
    with contextlib.closing(_open_source(path, frame_rate)) as source:
        spans = list(itertools.islice(_frames_between(source, start, end, frame_rate), max_frames))
        if frame_rate is None:
            frame_rate = _mean_rate(len(spans), spans[-1].stop - spans[0].time, source)
    return np.stack([span.pixels for span in spans]), float(frame_rate)


def write_video(
    frames: Iterable[np.ndarray],
    path: str | os.PathLike,
    frame_rate: float = DEFAULT_FRAME_RATE,
    *,
    crf: int | None = None,
    overwrite: bool = False,
) -> None:
    """Writes a video whole or not at all; the arguments and errors are those of `VideoWriter`.

    Args:
        frames: uint8 `(f, h, w, 3)`, or any iterable of frames `(h, w, 3)` or chunks `(f, h, w, 3)`.
        path: As for `VideoWriter`.
        frame_rate: As for `VideoWriter`.
        crf: As for `VideoWriter`.
        overwrite: As for `VideoWriter`.
    """
    with VideoWriter(path, frame_rate, crf=crf, overwrite=overwrite) as writer:
        for chunk in frames:
            writer.append(chunk)


class VideoWriter:
    """Writes a video frame by frame under a temporary name beside `path`, which `close` then renames.

    So the file appears whole or not at all. As a context manager it closes at the end of the block and discards on any
    exception in it. The suffix of `path` chooses the format:

    - `.mp4`: H.264, in `yuv420p`, or for odd widths and heights, which that cannot hold, in `yuv444p`.
    - `.gif`: 256 colours per frame, looping. Times are stored in hundredths of a second, so 8 frames per second
      become delays of 120 and 130 ms in turn, without drift.
    - `.webp`: lossless and looping.
    - none: a folder of numbered, lossless png frames, each of which carries the frame rate.

    Args:
        path: The file or folder to write; its parent must exist.
        frame_rate: Frames per second.
        crf: Constant rate factor of an mp4, 0 (best) to 51; `None` is 16, visually lossless.
        overwrite: Replaces an existing video. It stays untouched until the new one is whole. A folder is replaced only
            if it holds nothing but frames.

    Raises:
        FileExistsError: If `path` exists and `overwrite` is false.
        OSError: If the video cannot be written there, for instance because the disk is full.
        ValueError: For an unknown suffix, an illegal rate or quality.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        frame_rate: float = DEFAULT_FRAME_RATE,
        *,
        crf: int | None = None,
        overwrite: bool = False,
    ):
        self.path = Path(path)
        self.frame_rate = float(frame_rate)
        self.num_frames = 0
        self._overwrite = overwrite
        self._crf = crf
        self._check_settings()
        self._check_target()
        suffix = self.path.suffix.lower()
        self._partial = self.path.with_name(f".{self.path.stem}.{uuid.uuid4().hex[:12]}.partial{suffix}")
        self._sink: _Sink | None = None
        self._frame_shape: tuple[int, ...] | None = None
        # Also covers a writer that is dropped without close, and the end of the interpreter.
        self._remove_partial = weakref.finalize(self, _remove, self._partial, os.getpid())

    def append(self, frames: np.ndarray) -> None:
        """Adds a frame `(h, w, 3)` or a chunk of frames `(f, h, w, 3)`, uint8.

        Raises:
            OSError: If writing fails, in which case everything written is discarded.
            ValueError: If the writer is closed, or for another type, shape or size than the frames before.
        """
        if not self._remove_partial.alive:
            raise ValueError(f"the writer of {self.path} is closed")
        chunk = self._checked(np.asarray(frames))
        with self._discarding_on_error():
            for frame in chunk:
                if self._sink is None:
                    self._frame_shape = frame.shape
                    self._sink = self._open_sink(frame.shape)
                self._sink.append(np.ascontiguousarray(frame))
                self.num_frames += 1

    def close(self) -> None:
        """Finishes the video and gives it its name. A second call does nothing.

        Raises:
            OSError: If writing fails, in which case everything written is discarded.
            ValueError: If no frame was written.
        """
        if not self._remove_partial.alive:
            return
        with self._discarding_on_error():
            if self._sink is None:
                raise ValueError(f"{self.path} was not written: there is no frame in it")
            self._sink.close()
            self._sink = None
            self._check_target()
            _move_into_place(self._partial, self.path)
        self._remove_partial()

    def discard(self) -> None:
        """Drops everything written and leaves no file behind."""
        sink, self._sink = self._sink, None
        try:
            if sink is not None:
                sink.abort()
        finally:
            self._remove_partial()

    def __enter__(self) -> "VideoWriter":
        return self

    def __exit__(self, error_type, error, traceback) -> None:
        if error_type is None:
            self.close()
        else:
            self.discard()

    def _check_settings(self) -> None:
        suffix = self.path.suffix.lower()
        if suffix not in _WRITABLE:
            raise ValueError(f"cannot write {self.path}: '{suffix}' is not one of {_WRITABLE_HINT}")
        _check_rate(self.frame_rate)
        if suffix == ".gif" and self.frame_rate > _MAX_GIF_RATE:
            raise ValueError(f"a gif plays at most {_MAX_GIF_RATE:g} frames per second, got {self.frame_rate:g}")
        if self._crf is not None and suffix != ".mp4":
            raise ValueError(f"crf is a setting of mp4 files, it means nothing for {self.path}")
        if self._crf is not None and not 0 <= self._crf <= 51:
            raise ValueError(f"crf must be between 0 and 51, got {self._crf}")

    def _check_target(self) -> None:
        parent = self.path.parent
        if not parent.is_dir():
            raise FileNotFoundError(f"cannot write {self.path}: there is no folder {parent}")
        if not os.access(parent, os.W_OK | os.X_OK):
            raise PermissionError(f"cannot write {self.path}: the folder {parent} is not writable")
        if not os.path.lexists(self.path):
            return
        if not self._overwrite:
            raise FileExistsError(f"{self.path} exists already (overwrite=True replaces it)")
        if self.path.suffix == "" and not (self.path.is_dir() and _holds_only_frames(self.path)):
            raise FileExistsError(f"{self.path} is not replaced: it is not a folder that holds only frames")
        if self.path.suffix != "" and self.path.is_dir():
            raise FileExistsError(f"{self.path} is not replaced: it is a folder")

    def _checked(self, frames: np.ndarray) -> np.ndarray:
        """Frames as `(f, h, w, 3)`, or an error that says what is wrong with them."""
        if frames.dtype != np.uint8:
            raise ValueError(f"frames must be uint8, got {frames.dtype}")
        if frames.ndim not in (3, 4) or frames.shape[-1] != 3 or 0 in frames.shape[-3:]:
            raise ValueError(f"frames must have the shape (h, w, 3) or (f, h, w, 3), got {frames.shape}")
        if self._frame_shape is not None and frames.shape[-3:] != self._frame_shape:
            raise ValueError(
                f"the frames of {self.path} are {_size(self._frame_shape)}, got one of {_size(frames.shape[-3:])}"
            )
        return frames if frames.ndim == 4 else frames[None]

    def _open_sink(self, shape: tuple[int, ...]) -> "_Sink":
        suffix = self.path.suffix.lower()
        if suffix == ".mp4":
            return _Mp4Sink(self._partial, self.frame_rate, shape, DEFAULT_CRF if self._crf is None else self._crf)
        if suffix == ".webp":
            return _WebpSink(self._partial, self.frame_rate, shape)
        if suffix == ".gif":
            return _GifSink(self._partial, self.frame_rate)
        return _FolderSink(self._partial, self.frame_rate)

    @contextlib.contextmanager
    def _discarding_on_error(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            self.discard()
            if isinstance(error, OSError) and error.errno is not None:
                raise OSError(error.errno, f"could not write {self.path}: {error.strerror}") from error
            if isinstance(error, av.FFmpegError):
                raise ValueError(f"could not write {self.path}: {error}") from error
            raise


# Reading: a source yields its frames with their times, `_with_stops` adds until when each is shown, `_pick` chooses.


class _Frame(NamedTuple):
    time: float  # seconds since the first frame of the video
    duration: float
    load: Callable[[], np.ndarray]  # converting only the frames that are wanted saves most of the time


class _Span(NamedTuple):
    time: float
    stop: float
    pixels: np.ndarray


class _Source(Protocol):
    path: Path
    codec: str
    clock: float  # seconds: the grain of the stored times

    @property
    def frame_rate(self) -> float | None: ...

    def frames(self, start: float) -> Iterator[_Frame]: ...

    def timing(self) -> dict[str, Any]: ...

    def close(self) -> None: ...


def _existing(path: str | os.PathLike) -> Path:
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"there is no file or folder {path}")
    if path.is_dir():
        return path
    if path.suffix.lower() not in _CONTAINERS + _ANIMATIONS:
        raise ValueError(f"{path} is not a video that can be read: legal are {_READABLE_HINT}")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty")
    return path


def _open_source(path: Path, frame_rate: float | None = None) -> _Source:
    if path.is_dir():
        return _FolderSource(path, frame_rate)
    return _ContainerSource(path) if path.suffix.lower() in _CONTAINERS else _AnimationSource(path)


def _check_rate(frame_rate: float) -> None:
    if not (math.isfinite(frame_rate) and frame_rate > 0):
        raise ValueError(f"frame_rate must be a positive number of frames per second, got {frame_rate}")


def _check_range(start: float | None, end: float | None, frame_rate: float | None) -> None:
    if start is not None and not (math.isfinite(start) and start >= 0):
        raise ValueError(f"start must be at least 0 seconds, got {start}")
    if end is not None and not end > (start or 0.0):
        raise ValueError(f"end must be later than start, got start={start} and end={end}")
    if frame_rate is not None:
        _check_rate(frame_rate)


def _iterate(path: Path, start: float | None, end: float | None, frame_rate: float | None) -> Iterator[np.ndarray]:
    with contextlib.closing(_open_source(path, frame_rate)) as source:
        for span in _frames_between(source, start, end, frame_rate):
            yield span.pixels


def _frames_between(
    source: _Source, start: float | None, end: float | None, frame_rate: float | None
) -> Iterator[_Span]:
    start, end = start or 0.0, math.inf if end is None else end
    shape = None
    for time, stop, load in _pick(source, start, end, frame_rate):
        pixels = load()
        shape = shape or pixels.shape
        if pixels.shape != shape:
            raise ValueError(f"the frames of {source.path} differ in size: {_size(shape)} and {_size(pixels.shape)}")
        yield _Span(time, stop, pixels)
    if shape is None:
        raise ValueError(f"{source.path} has no frames between {start:g} s and {end:g} s")


def _pick(
    source: _Source, start: float, end: float, frame_rate: float | None
) -> Iterator[tuple[float, float, Callable[[], np.ndarray]]]:
    # Stored times are rounded to the file's clock: a frame may be due half a tick of it earlier than it says.
    slack = max(min(source.clock, _COARSEST_CLOCK) / 2, 1e-6)
    if frame_rate is None:
        for frame, stop, _ in _with_stops(source.frames(start)):
            if frame.time >= end - slack:
                return
            if frame.time >= start - slack:
                yield frame.time, stop, frame.load
        return
    tick = 0
    for frame, stop, is_last in _with_stops(source.frames(start)):
        if is_last:  # its end is the sum of two rounded numbers
            stop = max(stop - slack, frame.time + 0.6 * frame.duration)
        while (now := start + tick / frame_rate) < min(stop, end) - slack:
            yield now, start + (tick + 1) / frame_rate, frame.load
            tick += 1
        if now >= end - slack:
            return


def _with_stops(frames: Iterator[_Frame]) -> Iterator[tuple[_Frame, float, bool]]:
    """Frames, until when each is shown (the next one, or for the last one its duration) and which is the last."""
    previous, error = None, None
    try:
        for frame in frames:
            if previous is not None:
                yield previous, frame.time, False
            previous = frame
    except ValueError as damage:
        error = damage
    if previous is not None:
        yield previous, previous.time + previous.duration, True
    if error is not None:
        raise error


def _mean_rate(num_frames: int, seconds: float, source: _Source) -> float:
    """Frames per second; what the file declares wherever the times, rounded to its clock, agree with that."""
    declared = source.frame_rate
    if declared and (seconds <= 0 or abs(num_frames / declared - seconds) <= source.clock + 1e-6):
        return declared
    return num_frames / seconds if seconds > 0 else DEFAULT_FRAME_RATE


class _ContainerSource:
    """A video file, decoded by FFmpeg."""

    def __init__(self, path: Path):
        self.path = path
        # An own reformatter: PyAV's shared one keeps threads that outlive it and block a later fork.
        self._reformatter = VideoReformatter()
        self._open()
        self.codec = self._stream.codec_context.name
        self.clock = float(self._stream.time_base or 0)
        self.frame_rate = float(self._stream.average_rate) if self._stream.average_rate else None

    def _open(self) -> None:
        try:
            self._container = av.open(str(self.path), options=_OPEN_OPTIONS, metadata_errors="replace")
        except av.FFmpegError as error:
            if isinstance(error, PermissionError):
                raise
            raise ValueError(f"{self.path} is not a video that can be read: {self._reason(error)}") from error
        streams = [s for s in self._container.streams.video if not s.disposition & av.stream.Disposition.attached_pic]
        if not streams or streams[0].codec_context is None:
            kinds = ", ".join(sorted({stream.type for stream in self._container.streams})) or "nothing"
            self._container.close()
            raise ValueError(f"{self.path} has no video that can be decoded, only: {kinds}")
        self._stream: Any = streams[0]
        self._stream.thread_type = "AUTO"

    def _reason(self, error: av.FFmpegError) -> str:
        missing = _missing_bytes(self.path)
        return f"{missing} bytes are missing at its end" if missing else str(error.strerror)

    def timing(self) -> dict[str, Any]:
        if self._stream.duration is not None:
            duration = float(self._stream.duration * self._stream.time_base)
        elif self._container.duration is not None:
            duration = self._container.duration / av.time_base
        else:
            duration = None
        return {"frame_rate": self.frame_rate, "num_frames": self._stream.frames or None, "duration": duration}

    def frames(self, start: float) -> Iterator[_Frame]:
        time, duration, count = 0.0, 0.0, 0
        try:
            for frame, origin in self._decode_from(start):
                time = time + duration if frame.pts is None else self._time(frame) - origin
                duration = self._duration(frame)
                count += 1
                yield _Frame(time, duration, partial(self._pixels, frame))
        except av.FFmpegError as error:
            raise self._broken(count, start, self._reason(error)) from error
        if missing := _missing_bytes(self.path):
            raise self._broken(count, start, f"{missing} bytes are missing at its end")

    def _broken(self, count: int, start: float, reason: str) -> ValueError:
        where = f" from about {start:g} s on" if start > 0 else ""
        return ValueError(f"{self.path} is damaged or cut short, {count} frames can be read{where}: {reason}")

    def _time(self, frame: av.VideoFrame) -> float:
        # Not `frame.time`, which the last frames out of the decoder lack.
        return float(frame.pts * self._stream.time_base)

    def _duration(self, frame: av.VideoFrame) -> float:
        if frame.duration:
            return frame.duration * self.clock
        return 1 / (self.frame_rate or DEFAULT_FRAME_RATE)

    def _decode_from(self, start: float) -> Iterator[tuple[av.VideoFrame, float]]:
        """Frames from the last key frame at or before `start` on, each with the time of the video's first frame."""
        frames = self._decode()
        first = next(frames, None)
        if first is None:
            return
        origin = 0.0 if first.pts is None else self._time(first)
        if start > 0 and first.pts is not None:
            sought = self._decode_after_seek(origin + start)
            candidate = next(sought, None)
            if candidate is not None and candidate.pts is not None and self._time(candidate) <= origin + start:
                first, frames = candidate, sought
            else:
                self.close()
                self._open()
                frames = self._decode()
                first = next(frames)
        yield first, origin
        for frame in frames:
            yield frame, origin

    def _decode_after_seek(self, time: float) -> Iterator[av.VideoFrame]:
        try:
            self._container.seek(int(time / self._stream.time_base), stream=self._stream)
        except av.FFmpegError:
            return iter(())
        return self._decode()

    def _decode(self) -> Iterator[av.VideoFrame]:
        try:
            for packet in self._container.demux(self._stream):
                if packet.is_corrupt:
                    raise av.error.InvalidDataError(errno.EIO, "a frame is incomplete")
                yield from packet.decode()
        except av.FFmpegError:
            # The decoder still holds good frames from before the damage.
            with contextlib.suppress(av.FFmpegError):
                yield from self._stream.codec_context.decode(None)
            raise

    def _pixels(self, frame: av.VideoFrame) -> np.ndarray:
        has_alpha = frame.format.name == "pal8" or any(part.is_alpha for part in frame.format.components)
        pixels = self._reformatter.reformat(frame, format="rgba" if has_alpha else "rgb24").to_ndarray()
        return np.ascontiguousarray(_upright(_on_black(pixels), frame))

    def close(self) -> None:
        self._container.close()


class _AnimationSource:
    """A gif or webp, decoded by Pillow."""

    frame_rate: float | None = None

    def __init__(self, path: Path):
        self.path = path
        self.codec = path.suffix.lower()[1:]
        self.clock = 0.01 if self.codec == "gif" else 0.001
        self._file: Any = None

    def timing(self) -> dict[str, Any]:
        num_frames, duration = 0, 0.0
        for frame in self.frames(0.0):
            num_frames, duration = num_frames + 1, frame.time + frame.duration
        return {"frame_rate": num_frames / duration, "num_frames": num_frames, "duration": duration}

    def frames(self, start: float) -> Iterator[_Frame]:
        count, milliseconds = 0, 0
        try:
            self.close()
            self._file = iio.imopen(self.path, "r", plugin="pillow")
            for pixels in self._file.iter(mode="RGBA"):
                duration = self._file.metadata(index=count).get("duration") or _UNTIMED_FRAME_MS
                yield _Frame(milliseconds / 1000, duration / 1000, partial(_on_black, pixels))
                milliseconds += duration
                count += 1
        except (OSError, SyntaxError, EOFError) as error:
            raise self._broken(count, str(error.__cause__ or error)) from error
        if missing := _missing_bytes(self.path):
            raise self._broken(count, f"at least {missing} bytes are missing at its end")

    def _broken(self, count: int, reason: str) -> ValueError:
        return ValueError(
            f"{self.path} is not a {self.codec}, damaged or cut short, {count} frames can be read: {reason}"
        )

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


class _FolderSource:
    """A folder of numbered images."""

    clock = 0.0

    def __init__(self, path: Path, frame_rate: float | None):
        self.path = path
        self._images = sorted(_images_in(path), key=_natural_order)
        if not self._images:
            raise ValueError(f"the folder {path} has no {', '.join(_IMAGES)} frames")
        self.codec = self._images[0].suffix.lower()[1:]
        self._stored_rate = _stored_rate(self._images[0])
        self.frame_rate = self._stored_rate or frame_rate or DEFAULT_FRAME_RATE

    def timing(self) -> dict[str, Any]:
        num_frames, rate = len(self._images), self._stored_rate
        return {"frame_rate": rate, "num_frames": num_frames, "duration": num_frames / rate if rate else None}

    def frames(self, start: float) -> Iterator[_Frame]:
        first = min(int(start * self.frame_rate), len(self._images))
        for index, image in enumerate(self._images[first:], first):
            yield _Frame(index / self.frame_rate, 1 / self.frame_rate, partial(_image_pixels, image))

    def close(self) -> None:
        pass


def _images_in(folder: Path) -> list[Path]:
    return [entry for entry in folder.iterdir() if entry.suffix.lower() in _IMAGES and not entry.name.startswith(".")]


def _natural_order(path: Path) -> list[tuple[int, int | str]]:
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in re.split(r"([0-9]+)", path.name.lower())]


@contextlib.contextmanager
def _opened_image(path: Path) -> Iterator[Any]:
    try:
        with iio.imopen(path, "r", plugin="pillow") as file:
            yield file
    except (OSError, SyntaxError) as error:
        if isinstance(error, PermissionError):
            raise
        raise ValueError(f"{path} is not an image that can be read: {error.__cause__ or error}") from error


def _stored_rate(image: Path) -> float | None:
    with _opened_image(image) as file:
        rate = file.metadata(index=0).get("frame_rate")
    try:
        return float(rate) if rate is not None and float(rate) > 0 else None
    except ValueError:
        return None


def _image_pixels(path: Path) -> np.ndarray:
    with _opened_image(path) as file:
        if file.metadata(index=0)["mode"].startswith("I"):
            gray = (file.read(index=0, rotate=True) >> 8).astype(np.uint8)
            return np.repeat(gray[..., None], 3, axis=-1)
        return _on_black(file.read(index=0, mode="RGBA", rotate=True))


def _on_black(pixels: np.ndarray) -> np.ndarray:
    """Composites RGBA on black; RGB stays as it is."""
    if pixels.shape[-1] == 3:
        return pixels
    color, alpha = pixels[..., :3], pixels[..., 3:]
    if alpha.min() == 255:
        return np.ascontiguousarray(color)
    return ((color.astype(np.uint16) * alpha + 127) // 255).astype(np.uint8)


def _upright(pixels: np.ndarray, frame: av.VideoFrame) -> np.ndarray:
    """Applies the display matrix `(a, b, u, c, d, v, x, y, w)`: quarter turns and mirrorings."""
    matrix: Any = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return pixels
    a, b, _, c, d, *_ = struct.unpack("=9i", bytes(matrix)[:36])
    if abs(b) > abs(a):
        pixels, right, down = pixels.swapaxes(0, 1), c, b
    else:
        right, down = a, d
    return pixels[:: -1 if down < 0 else 1, :: -1 if right < 0 else 1]


def _missing_bytes(path: Path) -> int:
    """How much shorter a file is than its own structure says; FFmpeg ends such files without an error."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(12)
        if head[:4] == b"RIFF":
            declared = 8 + int.from_bytes(head[4:8], "little")
            return max(declared - size, 0) if declared < 2**32 else 0
        if head[:3] == b"GIF":
            file.seek(max(size - 64, 0))
            return 0 if file.read().rstrip(b"\0").endswith(b";") else 1
        if head[:4] == b"\x1a\x45\xdf\xa3":
            return max(_matroska_size(file) - size, 0)
        return max(_mp4_size(file, size) - size, 0)


def _matroska_size(file: Any) -> int:
    """End of the segment, 0 where its length is left open."""
    file.seek(4)
    file.seek(_matroska_length(file) or 0, os.SEEK_CUR)
    if file.read(4) != b"\x18\x53\x80\x67":
        return 0
    length = _matroska_length(file)
    return 0 if length is None else file.tell() + length


def _matroska_length(file: Any) -> int | None:
    """An integer of variable size: as many bytes as the first has leading zeros, plus one; all ones mean unknown."""
    first = int.from_bytes(file.read(1), "big")
    num_bytes = 9 - first.bit_length()
    value = int.from_bytes(bytes([first]) + file.read(num_bytes - 1), "big") - (1 << 7 * num_bytes)
    return None if value == (1 << 7 * num_bytes) - 1 else value


def _mp4_size(file: Any, size: int) -> int:
    """End of the last box of an mp4 or mov."""
    position = 0
    while position + 8 <= size:
        file.seek(position)
        length, kind = struct.unpack(">I4s", file.read(8))
        if length == 1:
            length = int.from_bytes(file.read(8), "big")
        if length < 8 or not kind.isalnum():
            return 0
        position += length
    return position


# Writing: one sink a format.


class _Sink(Protocol):
    def append(self, frame: np.ndarray) -> None: ...

    def close(self) -> None: ...

    def abort(self) -> None: ...


class _EncoderSink:
    """A file that FFmpeg encodes."""

    def __init__(self, path: Path, container_options: dict[str, str]):
        self._container = av.open(str(path), "w", options=container_options)
        self._reformatter = VideoReformatter()
        self._num_frames = 0
        self._stream: Any = None

    def _add_stream(
        self, codec: str, frame_rate: float, shape: tuple[int, ...], pixel_format: str, options: dict[str, str]
    ) -> None:
        rate = Fraction(frame_rate).limit_denominator(10000)
        self._stream = self._container.add_stream(codec, rate=rate, options=options)
        self._stream.height, self._stream.width = shape[:2]
        self._stream.pix_fmt = pixel_format
        self._time_base = 1 / rate
        self._stream.codec_context.time_base = self._time_base

    def append(self, frame: np.ndarray) -> None:
        picture = self._reformatter.reformat(av.VideoFrame.from_ndarray(frame), format=self._stream.pix_fmt)
        picture.pts, picture.time_base = self._num_frames, self._time_base
        self._container.mux(self._stream.encode(picture))
        self._num_frames += 1

    def close(self) -> None:
        self._container.mux(self._stream.encode(None))
        self._container.close()

    def abort(self) -> None:
        # The file is about to be removed; writing its end may fail as the frame before did.
        with contextlib.suppress(av.FFmpegError, OSError):
            self._container.close()


class _Mp4Sink(_EncoderSink):
    def __init__(self, path: Path, frame_rate: float, shape: tuple[int, ...], crf: int):
        super().__init__(path, {"movflags": "+faststart"})
        even = shape[0] % 2 == 0 and shape[1] % 2 == 0
        # The conversion from RGB uses the BT.601 matrix; saying so makes every player invert just that.
        color = dict.fromkeys(("colorspace", "color_primaries", "color_trc"), "smpte170m") | {"color_range": "tv"}
        options = {"crf": str(crf)} | color
        if min(shape[:2]) < 128:  # there x264 estimates this from unset memory: no two files would be the same
            options["x264-params"] = "mbtree=0"
        self._add_stream("libx264", frame_rate, shape, "yuv420p" if even else "yuv444p", options)


class _WebpSink(_EncoderSink):
    """Each frame is coded alone: the joint encoder holds the file in memory and merges equal frames."""

    def __init__(self, path: Path, frame_rate: float, shape: tuple[int, ...]):
        super().__init__(path, {"loop": "0"})
        options = {"lossless": "1", "compression_level": "0", "quality": "20"}  # the effort, not the quality
        self._add_stream("libwebp", frame_rate, shape, "bgra", options)


class _GifSink:
    """Written block by block, since Pillow's `save` collects all frames and merges equal ones."""

    def __init__(self, path: Path, frame_rate: float):
        self._file = path.open("wb")
        self._frame_rate = frame_rate
        self._previous: Image.Image | None = None
        self._num_frames = 0

    def append(self, frame: np.ndarray) -> None:
        image = Image.fromarray(frame)
        # Only the part that changed; a frame without changes still needs a pixel to carry its time.
        changed = self._previous and (ImageChops.difference(image, self._previous).getbbox() or (0, 0, 1, 1))
        part = (image.crop(changed) if changed else image).quantize(256)
        if changed is None:
            self._file.writelines(GifImagePlugin.getheader(part.copy(), info={"loop": 0})[0])
        offset = changed[:2] if changed else (0, 0)
        blocks = GifImagePlugin.getdata(part, offset, duration=self._delay(), include_color_table=True)
        self._file.writelines(blocks)
        self._previous = image
        self._num_frames += 1

    def _delay(self) -> int:
        """Milliseconds in whole hundredths of a second, such that rounding does not add up over the frames."""
        begin, end = (round(100 * n / self._frame_rate) for n in (self._num_frames, self._num_frames + 1))
        return 10 * (end - begin)

    def close(self) -> None:
        self._file.write(b";")
        self._file.close()

    def abort(self) -> None:
        with contextlib.suppress(OSError):
            self._file.close()


class _FolderSink:
    """Numbered png files, each carrying the frame rate as text."""

    def __init__(self, path: Path, frame_rate: float):
        path.mkdir()
        self._path = path
        text = PngImagePlugin.PngInfo()
        text.add_text("frame_rate", repr(frame_rate))
        self._settings: dict[str, Any] = {"pnginfo": text, "compress_level": 3}
        self._num_frames = 0

    def append(self, frame: np.ndarray) -> None:
        iio.imwrite(self._path / f"{self._num_frames:06d}.png", frame, plugin="pillow", **self._settings)
        self._num_frames += 1

    def close(self) -> None:
        pass

    def abort(self) -> None:
        pass


def _size(shape: tuple[int, ...]) -> str:
    return f"{shape[1]}x{shape[0]}"


def _holds_only_frames(folder: Path) -> bool:
    return len(_images_in(folder)) == len(list(folder.iterdir()))


def _move_into_place(partial_path: Path, path: Path) -> None:
    if not path.is_dir():
        os.replace(partial_path, path)
        return
    old = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.old")
    os.rename(path, old)
    try:
        os.rename(partial_path, path)
    except BaseException:
        os.rename(old, path)
        raise
    shutil.rmtree(old)


def _remove(path: Path, process: int) -> None:
    if os.getpid() != process:  # a forked child must not remove what its parent is writing
        return
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
