"""Writing of mp4, gif, webp and folders of frames, streamed and atomically.

Files are encoded by PyAV, because Pillow keeps all frames of a gif or webp in memory and merges equal ones. Folders of
frames are written by Pillow.
"""

import contextlib
import json
import logging
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from vgen import __version__
from vgen.checks import check_integer, check_number
from vgen.data.formats import PixelFormat, check_pixel_format, check_video_output
from vgen.data.resize import enlarge
from vgen.io.atomic import move_into_place, workspace_for
from vgen.io.images import shown_scale

DEFAULT_FRAME_RATE = 8.0
DEFAULT_CRF = 16
METADATA_KEY = "comment"
"""Where files store their metadata: a tag of an mp4, a comment of a gif, a text of a png."""

logger = logging.getLogger(__name__)
_MAX_GIF_RATE = 50.0  # browsers play faster gifs more slowly


def check_frame_rate(frame_rate: float) -> None:
    """Checks a number of frames per second.

    Raises:
        ValueError: It is not a positive finite number.
    """
    check_number("frame_rate", frame_rate)
    if frame_rate <= 0:
        raise ValueError(f"frame_rate must be positive, got {frame_rate}")


def write_video(
    frames: Iterable[np.ndarray],
    path: str | os.PathLike,
    frame_rate: float = DEFAULT_FRAME_RATE,
    *,
    crf: int | None = None,
    pixel_format: PixelFormat = "yuv420p",
    overwrite: bool = False,
    scale: int | None = 1,
    metadata: Mapping[str, Any] | None = None,
    keyframe_interval: int | None = None,
) -> None:
    """Writes a video atomically. The arguments and errors are those of `VideoWriter`.

    Args:
        frames: uint8 `(f, h, w, 3)`, or an iterable of frames `(h, w, 3)` or chunks `(f, h, w, 3)`.
        path: As in `VideoWriter`.
        frame_rate: As in `VideoWriter`.
        crf: As in `VideoWriter`.
        pixel_format: As in `VideoWriter`.
        overwrite: As in `VideoWriter`.
        scale: As in `VideoWriter`.
        metadata: As in `VideoWriter`.
        keyframe_interval: As in `VideoWriter`.
    """
    options: dict[str, Any] = {"pixel_format": pixel_format, "overwrite": overwrite, "metadata": metadata}
    options["keyframe_interval"] = keyframe_interval
    with VideoWriter(path, frame_rate, crf=crf, scale=scale, **options) as writer:
        for chunk in frames:
            writer.append(chunk)


def join_videos(paths: Sequence[str | os.PathLike], output: str | os.PathLike, *, overwrite: bool = False) -> None:
    """Concatenates mp4 files without encoding their frames again. The output is written atomically.

    It has the metadata of the files, if it is the same in all of them.

    Args:
        paths: Files, in order, that `VideoWriter` wrote with the same settings and frame size.
        output: The mp4 file to write.
        overwrite: Whether to replace an existing file.

    Raises:
        FileExistsError: The output exists and cannot be replaced.
        ValueError: `paths` is empty, or the files have different settings.
    """
    output = Path(output)
    check_video_output(output, overwrite)
    if not paths:
        raise ValueError(f"{output} was not written: expected at least one video to join, got none")
    with workspace_for(output) as folder:
        partial = Path(folder, output.name)
        with av.open(f"file:{partial}", "w", options={"movflags": "faststart"}) as target:
            if len(stored := set(map(_stored_text, paths))) == 1:
                target.metadata[METADATA_KEY] = stored.pop()
            stream, expected, num_frames = None, None, 0
            delay = max(map(_decoding_delay, paths))
            for path in paths:
                with av.open(f"file:{path}") as source:
                    video = source.streams.video[0]
                    settings = (video.codec_context.extradata, video.time_base, video.average_rate)
                    if stream is None:
                        stream, expected = target.add_stream_from_template(video), settings
                    if settings != expected:
                        raise ValueError(
                            f"{path} cannot be joined to {paths[0]}: its size, frame rate or quality differs"
                        )
                    tick = round(1 / (video.average_rate * video.time_base))
                    packets = [packet for packet in source.demux(video) if packet.dts is not None]  # no end marker
                    for index, packet in enumerate(packets, num_frames):
                        packet.stream, packet.pts = stream, packet.pts + num_frames * tick
                        packet.dts = index * tick - delay
                        target.mux(packet)
                    num_frames += len(packets)
        check_video_output(output, overwrite)
        move_into_place(partial, output, Path(folder))


def _stored_text(path: str | os.PathLike) -> str:
    with av.open(f"file:{path}") as source:
        return source.metadata.get(METADATA_KEY, "")


def _decoding_delay(path: str | os.PathLike) -> int:
    """Time between decoding and display of the first frame, in the file's time base."""
    with av.open(f"file:{path}") as source:
        first = next(source.demux(source.streams.video[0]))
        return (first.pts or 0) - (first.dts or 0)


class VideoWriter:
    """Writes a video frame by frame, with memory that does not depend on its length.

    The video is written in a hidden folder next to `path` and moved into place by `close`, so it appears complete or
    not at all. As a context manager, the writer closes at the end of the block and discards the video if the block
    raises. The suffix of `path` selects the format:

    - `.mp4`: H.264 in `yuv420p`, which every player supports. It needs even sizes: the last row or column of an odd
      size is repeated, with a warning. Colors are tagged as sRGB with the primaries of BT.709.
    - `.gif`: 256 colors per frame, looping. Times are rounded to hundredths of a second, without drift.
    - `.webp`: lossless and looping.
    - none: a folder of numbered, lossless png frames that store the frame rate.

    Args:
        path: The file or folder to write; its parent folder must exist.
        frame_rate: Frames per second.
        crf: Constant rate factor of an mp4, from 0 (best) to 51; `None` means 16, visually lossless.
        pixel_format: Pixel format of an mp4. `yuv444p` keeps odd sizes and all color detail; few players support it.
        overwrite: Whether to replace an existing video, which stays until the new one is complete. A folder is
            replaced only if it contains nothing but frames.
        scale: Factor by which frames are enlarged, with sharp edges: each pixel becomes a square. `None` enlarges mp4
            and gif files to at least 256 pixels on the longer side. The attribute `scale` is the factor.
        metadata: Entries to store as JSON, together with the version of vgen and the scale, for `video_info`. A webp
            stores none.
        keyframe_interval: Largest number of frames of an mp4 from one keyframe to the next. Reading from the middle
            decodes from a keyframe, so a small number makes that fast, and the file larger. `None` means 250.

    Raises:
        FileExistsError: `path` exists and cannot be replaced.
        OSError: The video cannot be written there, for instance because the folder is not writable.
        ValueError: The suffix, the frame rate, the quality or the pixel format is unsupported.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        frame_rate: float = DEFAULT_FRAME_RATE,
        *,
        crf: int | None = None,
        pixel_format: PixelFormat = "yuv420p",
        overwrite: bool = False,
        scale: int | None = 1,
        metadata: Mapping[str, Any] | None = None,
        keyframe_interval: int | None = None,
    ):
        self.path = Path(path)
        check_frame_rate(frame_rate)
        self.frame_rate = float(frame_rate)
        self.num_frames = 0
        self.scale = scale
        self._metadata = dict(metadata or {})
        self._crf = crf
        self._keyframe_interval = keyframe_interval
        self._pixel_format = pixel_format
        self._overwrite = overwrite
        check_video_output(self.path, overwrite)
        self._check_settings()
        with self._errors_naming_the_path():
            self._workspace = workspace_for(self.path)
        self._partial = Path(self._workspace.name, self.path.name)
        self._sink: _EncodedFile | _ImageFolder | None = None
        self._frame_shape: tuple[int, ...] | None = None
        self._closed = False

    @property
    def content_size(self) -> tuple[int, int] | None:
        """Height and width of the frames before they are enlarged; `None` before the first one."""
        return None if self._frame_shape is None else (self._frame_shape[0], self._frame_shape[1])

    def append(self, frames: np.ndarray) -> None:
        """Adds a frame `(h, w, 3)` or a chunk of frames `(f, h, w, 3)`, uint8.

        Raises:
            OSError: Writing failed. The video is discarded.
            ValueError: The writer is closed, or the frames have another type, shape or size than earlier ones.
        """
        if self._closed:
            raise ValueError(f"the writer of {self.path} is closed")
        for frame in self._checked(np.asarray(frames)):
            with self._discarding_on_error():
                if self._sink is None:
                    self._frame_shape = frame.shape
                    self.scale = self._default_scale(frame.shape) if self.scale is None else self.scale
                    self._sink = self._open_sink(frame.shape)
                assert self.scale is not None
                self._sink.append(np.ascontiguousarray(enlarge(frame, self.scale)))
                self.num_frames += 1

    def close(self) -> None:
        """Finishes the video and moves it to its path. A second call does nothing.

        Raises:
            OSError: Writing failed. The video is discarded.
            ValueError: No frame was written.
        """
        if self._closed:
            return
        with self._discarding_on_error():
            if self._sink is None:
                raise ValueError(f"{self.path} was not written: expected at least one frame, got none")
            self._sink.close()
            self._sink = None
            check_video_output(self.path, self._overwrite)
            move_into_place(self._partial, self.path, Path(self._workspace.name))
        self.discard()

    def discard(self) -> None:
        """Deletes an unfinished video. After `close` it does nothing."""
        self._closed = True
        with contextlib.suppress(OSError, av.FFmpegError):
            if self._sink is not None:
                self._sink.close()
        self._sink = None
        self._workspace.cleanup()

    def __enter__(self) -> "VideoWriter":
        return self

    def __exit__(self, error_type, error, traceback) -> None:
        if error_type is None:
            self.close()
        else:
            self.discard()

    def _check_settings(self) -> None:
        suffix = self.path.suffix.lower()
        if suffix == ".gif" and self.frame_rate > _MAX_GIF_RATE:
            raise ValueError(f"frame_rate must be at most {_MAX_GIF_RATE:g} for a gif, got {self.frame_rate:g}")
        if (self._crf is not None or self._keyframe_interval is not None) and suffix != ".mp4":
            raise ValueError(f"crf and keyframe_interval are supported for mp4 files only, got {self.path}")
        if self._crf is not None:
            check_integer("crf", self._crf, 0, 51)
        if self._keyframe_interval is not None:
            check_integer("keyframe_interval", self._keyframe_interval, 1)
        if self.scale is not None:
            check_integer("scale", self.scale, 1)
        check_pixel_format(self._pixel_format, suffix)

    def _checked(self, frames: np.ndarray) -> np.ndarray:
        """Checks frames and returns them as `(f, h, w, 3)`."""
        if frames.dtype != np.uint8:
            raise ValueError(f"frames must be uint8, got {frames.dtype}")
        if frames.ndim not in (3, 4) or frames.shape[-1] != 3 or 0 in frames.shape[-3:]:
            raise ValueError(f"frames must be (h, w, 3) or (f, h, w, 3), got {frames.shape}")
        if self._frame_shape not in (None, frames.shape[-3:]):
            raise ValueError(f"all frames of {self.path} must be {self._frame_shape}, got {frames.shape[-3:]}")
        return frames if frames.ndim == 4 else frames[None]

    def _default_scale(self, shape: tuple[int, ...]) -> int:
        return shown_scale(*shape[:2]) if self.path.suffix.lower() in (".mp4", ".gif") else 1

    def _stored_text(self, shape: tuple[int, ...]) -> str | None:
        """The text of the metadata. The size of the content tells whether the file was resized later."""
        enlarged = {} if self.scale == 1 else {"scale": self.scale, "content_size": shape[:2]}
        entries = self._metadata | enlarged
        return json.dumps({"vgen": __version__} | entries) if entries else None

    def _open_sink(self, shape: tuple[int, ...]) -> "_EncodedFile | _ImageFolder":
        assert self.scale is not None
        text = self._stored_text(shape)
        if self.path.suffix == "":
            return _ImageFolder(self._partial, self.frame_rate, text)
        exact = height, width = shape[0] * self.scale, shape[1] * self.scale
        if self.path.suffix.lower() == ".mp4" and self._pixel_format == "yuv420p" and (height % 2 or width % 2):
            height, width = height + height % 2, width + width % 2
            logger.warning(
                f"{self.path}: {exact[1]}x{exact[0]} is written as {width}x{height}, because yuv420p needs even sizes "
                "(pixel_format yuv444p does not)"
            )
        x264 = {"crf": str(DEFAULT_CRF if self._crf is None else self._crf)}
        if self._keyframe_interval is not None:
            x264["g"] = str(self._keyframe_interval)
        return _EncodedFile(self._partial, self.frame_rate, (height, width), x264, self._pixel_format, text)

    @contextlib.contextmanager
    def _discarding_on_error(self) -> Iterator[None]:
        try:
            with self._errors_naming_the_path():
                yield
        except BaseException:
            self.discard()
            raise

    @contextlib.contextmanager
    def _errors_naming_the_path(self) -> Iterator[None]:
        """Makes system errors name the requested path instead of the hidden one."""
        try:
            yield
        except (OSError, av.FFmpegError) as error:
            if error.errno is None:
                raise
            raise OSError(error.errno, f"could not write {self.path}: {error.strerror}") from error


class _EncodedFile:
    """A video file, encoded by FFmpeg."""

    def __init__(
        self,
        path: Path,
        frame_rate: float,
        size: tuple[int, int],
        x264: dict[str, str],
        chroma: PixelFormat,
        text: str | None,
    ):
        height, width = size
        # The conversion from RGB uses the BT.601 matrix. Tagging it makes every player invert that matrix.
        color = {
            "colorspace": "smpte170m",
            "color_primaries": "bt709",
            "color_trc": "iec61966-2-1",
            "color_range": "tv",
        }
        # x264's macroblock tree reads undefined memory if the number of macroblocks is not a multiple of its vector
        # length, so that equal frames occasionally give different files. Without it files are larger (720p: 1.7x).
        exact = {} if math.ceil(height / 16) * math.ceil(width / 16) % 16 == 0 else {"mbtree": "0"}
        fast = {"lossless": "1", "compression_level": "0", "quality": "20"}  # quality is the effort here
        codec, pixel_format, options, container_options = {
            ".mp4": ("libx264", chroma, color | exact | x264, {"movflags": "faststart"}),
            ".webp": ("libwebp", "bgra", fast, {"loop": "0"}),
            ".gif": ("gif", "pal8", {}, {"loop": "0"}),
        }[path.suffix.lower()]
        rate = Fraction(frame_rate).limit_denominator(10000)
        self._container = av.open(f"file:{path}", "w", options=container_options)
        self._path, self._comment = path, text if path.suffix.lower() == ".gif" else None
        if text is not None:
            self._container.metadata[METADATA_KEY] = text
        stream = self._container.add_stream(codec, rate=rate, options=options)
        assert isinstance(stream, av.VideoStream)
        stream.height, stream.width, stream.pix_fmt = height, width, pixel_format
        stream.codec_context.time_base = 1 / rate
        self._stream, self._time_base = stream, 1 / rate
        self._num_frames = 0

    def append(self, frame: np.ndarray) -> None:
        padding = self._stream.height - frame.shape[0], self._stream.width - frame.shape[1]
        if any(padding):
            frame = np.pad(frame, [(0, padding[0]), (0, padding[1]), (0, 0)], mode="edge")
        picture = self._to_picture(frame)
        picture.pts, picture.time_base = self._num_frames, self._time_base
        self._container.mux(self._stream.encode(picture))
        self._num_frames += 1

    def _to_picture(self, frame: np.ndarray) -> av.VideoFrame:
        if self._stream.pix_fmt != "pal8":
            return av.VideoFrame.from_ndarray(frame).reformat(format=self._stream.pix_fmt, threads=1)
        image = Image.fromarray(frame).quantize(256)
        colors = np.array(image.getpalette()).reshape(-1, 3)
        palette = np.full((256, 4), 255, np.uint8)  # alpha, red, green, blue
        palette[: len(colors), 1:] = colors
        indices_and_palette: Any = (np.asarray(image), palette)
        return av.VideoFrame.from_ndarray(indices_and_palette, format="pal8")

    def close(self) -> None:
        try:
            self._container.mux(self._stream.encode(None))
        finally:
            self._container.close()
        if self._comment is not None:
            _insert_gif_comment(self._path, self._comment.encode())


def _insert_gif_comment(path: Path, comment: bytes) -> None:
    """Stores a comment in a gif, which FFmpeg does not: an extension block after the header and its colors."""
    blocks = (comment[begin : begin + 255] for begin in range(0, len(comment), 255))
    extension = b"\x21\xfe" + b"".join(bytes([len(block)]) + block for block in blocks) + b"\x00"
    commented = path.with_suffix(".commented")
    with path.open("rb") as source, commented.open("wb") as target:
        header = source.read(13)
        num_colors = 2 << (header[10] & 7) if header[10] & 0x80 else 0
        target.write(header + source.read(3 * num_colors) + extension)
        shutil.copyfileobj(source, target)
    commented.replace(path)


class _ImageFolder:
    """A folder of numbered png files that store the frame rate and the metadata as text."""

    def __init__(self, path: Path, frame_rate: float, text: str | None):
        path.mkdir()
        self._path = path
        self._text = PngInfo()
        self._text.add_text("frame_rate", repr(frame_rate))
        if text is not None:
            self._text.add_text(METADATA_KEY, text)
        self._num_frames = 0

    def append(self, frame: np.ndarray) -> None:
        path = self._path / f"{self._num_frames:06d}.png"
        Image.fromarray(frame).save(path, pnginfo=self._text, compress_level=3)
        self._num_frames += 1

    def close(self) -> None:
        pass
