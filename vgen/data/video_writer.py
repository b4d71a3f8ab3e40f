"""Video out: mp4, gif, webp and folders of frames, streamed, and there whole or not at all.

Files go through PyAV: imageio's `pyav` plugin takes neither a quality nor other settings of the encoder, and Pillow
holds all frames of a gif or webp in memory and merges equal ones. Folders of frames go through imageio.
"""

import contextlib
import math
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import imageio.v3 as iio
import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

__all__ = ["DEFAULT_FRAME_RATE", "IMAGE_SUFFIXES", "VideoWriter", "check_frame_rate", "join_videos", "write_video"]

DEFAULT_FRAME_RATE = 8.0
DEFAULT_CRF = 16
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")

_MAX_GIF_RATE = 50.0  # browsers slow faster ones down


def check_frame_rate(frame_rate: float) -> None:
    """Raises a `ValueError` unless this is a positive number of frames per second."""
    if not (math.isfinite(frame_rate) and frame_rate > 0):
        raise ValueError(f"frame_rate must be a positive number of frames per second, got {frame_rate}")


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


def join_videos(paths: Sequence[str | os.PathLike], output: str | os.PathLike, *, overwrite: bool = False) -> None:
    """Joins mp4 files into one without encoding their frames again; it appears whole or not at all.

    Args:
        paths: What `VideoWriter` wrote with the same settings and frame sizes, in order.
        output: The joined mp4 file.
        overwrite: Replaces an existing file.

    Raises:
        FileExistsError: The output exists and may not be replaced.
        ValueError: There is nothing to join, or the files are of different kinds.
    """
    output = Path(output)
    if output.exists() and not overwrite:
        raise FileExistsError(f"{output} exists already")
    if not paths:
        raise ValueError(f"{output} was not written: there are no videos to join")
    with tempfile.TemporaryDirectory(prefix=f".{output.stem}-", dir=output.parent) as folder:
        partial = Path(folder, output.name)
        with av.open(str(partial), "w", options={"movflags": "faststart"}) as target:
            stream, kind, num_frames = None, None, 0
            delay = max(map(_decoding_delay, paths))
            for path in paths:
                with av.open(str(path)) as source:
                    video = source.streams.video[0]
                    found = (video.codec_context.extradata, video.time_base, video.average_rate)
                    if stream is None:
                        stream, kind = target.add_stream_from_template(video), found
                    if found != kind:
                        raise ValueError(f"{path} does not join {paths[0]}: its size, rate or quality is another")
                    tick = round(1 / (video.average_rate * video.time_base))
                    packets = [packet for packet in source.demux(video) if packet.dts is not None]  # not the end mark
                    for index, packet in enumerate(packets, num_frames):
                        packet.stream, packet.pts = stream, packet.pts + num_frames * tick
                        packet.dts = index * tick - delay
                        target.mux(packet)
                    num_frames += len(packets)
        partial.replace(output)


def _decoding_delay(path: str | os.PathLike) -> int:
    """By how much the first frame is decoded before it is shown, in the file's unit of time."""
    with av.open(str(path)) as source:
        first = next(source.demux(source.streams.video[0]))
        return (first.pts or 0) - (first.dts or 0)


class VideoWriter:
    """Writes a video frame by frame, with memory that does not depend on its length.

    It is written in a hidden folder beside `path` and moved into place by `close`, so it appears whole or not at all.
    As a context manager it closes at the end of the block and discards on any exception in it. The suffix of `path`
    chooses the format:

    - `.mp4`: H.264, in `yuv420p`, or for odd widths and heights, which that cannot hold, in `yuv444p`.
    - `.gif`: 256 colours per frame, looping. Times are rounded to hundredths of a second, without drift.
    - `.webp`: lossless and looping.
    - none: a folder of numbered, lossless png frames, each of which carries the frame rate.

    Args:
        path: The file or folder to write; its parent must exist.
        frame_rate: Frames per second.
        crf: Constant rate factor of an mp4, 0 (best) to 51; `None` is 16, visually lossless.
        overwrite: Replaces an existing video. It stays untouched until the new one is whole. A folder is replaced only
            if it holds nothing but frames.

    Raises:
        FileExistsError: If `path` exists and may not be replaced.
        OSError: If the video cannot be written there, for instance because the folder is not writable.
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
        self._crf = crf
        self._overwrite = overwrite
        self._check_settings()
        self._check_target()
        with self._telling_the_path():
            self._workspace = tempfile.TemporaryDirectory(
                prefix=f".{self.path.stem}-", dir=self.path.parent, ignore_cleanup_errors=True
            )
        self._partial = Path(self._workspace.name, self.path.name)
        self._sink: _EncodedFile | _ImageFolder | None = None
        self._frame_shape: tuple[int, ...] | None = None
        self._closed = False

    def append(self, frames: np.ndarray) -> None:
        """Adds a frame `(h, w, 3)` or a chunk of frames `(f, h, w, 3)`, uint8.

        Raises:
            OSError: If writing fails, in which case everything written is discarded.
            ValueError: If the writer is closed, or for another type, shape or size than the frames before.
        """
        if self._closed:
            raise ValueError(f"the writer of {self.path} is closed")
        for frame in self._checked(np.asarray(frames)):
            with self._discarding_on_error():
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
        if self._closed:
            return
        with self._discarding_on_error():
            if self._sink is None:
                raise ValueError(f"{self.path} was not written: there is no frame in it")
            self._sink.close()
            self._sink = None
            self._check_target()
            if self.path.is_dir():
                self.path.rename(Path(self._workspace.name, "replaced"))
            self._partial.replace(self.path)
        self.discard()

    def discard(self) -> None:
        """Drops what has no name yet and leaves none of it behind."""
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
        if suffix not in (".mp4", ".gif", ".webp", ""):
            raise ValueError(f"cannot write {self.path}: legal are .mp4, .gif, .webp, or no suffix for a folder")
        check_frame_rate(self.frame_rate)
        if suffix == ".gif" and self.frame_rate > _MAX_GIF_RATE:
            raise ValueError(f"a gif plays at most {_MAX_GIF_RATE:g} frames per second, got {self.frame_rate:g}")
        if self._crf is not None and suffix != ".mp4":
            raise ValueError(f"crf is a setting of mp4 files, it means nothing for {self.path}")
        if self._crf is not None and not 0 <= self._crf <= 51:
            raise ValueError(f"crf must be between 0 and 51, got {self._crf}")

    def _check_target(self) -> None:
        if not os.path.lexists(self.path):
            return
        if not self._overwrite:
            raise FileExistsError(f"{self.path} exists already (overwrite=True replaces it)")
        is_folder = self.path.is_dir()
        if is_folder != (self.path.suffix == ""):
            raise FileExistsError(f"{self.path} is not replaced: it is a {'folder' if is_folder else 'file'}")
        if is_folder and any(entry.suffix.lower() not in IMAGE_SUFFIXES for entry in self.path.iterdir()):
            raise FileExistsError(f"{self.path} is not replaced: it is a folder that holds more than frames")

    def _checked(self, frames: np.ndarray) -> np.ndarray:
        """Frames as `(f, h, w, 3)`, or an error that says what is wrong with them."""
        if frames.dtype != np.uint8:
            raise ValueError(f"frames must be uint8, got {frames.dtype}")
        if frames.ndim not in (3, 4) or frames.shape[-1] != 3 or 0 in frames.shape[-3:]:
            raise ValueError(f"frames must have the shape (h, w, 3) or (f, h, w, 3), got {frames.shape}")
        if self._frame_shape not in (None, frames.shape[-3:]):
            raise ValueError(f"the frames of {self.path} are {self._frame_shape}, got one of {frames.shape[-3:]}")
        return frames if frames.ndim == 4 else frames[None]

    def _open_sink(self, shape: tuple[int, ...]) -> "_EncodedFile | _ImageFolder":
        if self.path.suffix == "":
            return _ImageFolder(self._partial, self.frame_rate)
        return _EncodedFile(self._partial, self.frame_rate, shape, DEFAULT_CRF if self._crf is None else self._crf)

    @contextlib.contextmanager
    def _discarding_on_error(self) -> Iterator[None]:
        try:
            with self._telling_the_path():
                yield
        except BaseException:
            self.discard()
            raise

    @contextlib.contextmanager
    def _telling_the_path(self) -> Iterator[None]:
        """Errors of the system name the path that was asked for, not the hidden one."""
        try:
            yield
        except (OSError, av.FFmpegError) as error:
            if error.errno is None:
                raise
            raise OSError(error.errno, f"could not write {self.path}: {error.strerror}") from error


class _EncodedFile:
    """A file that FFmpeg encodes."""

    def __init__(self, path: Path, frame_rate: float, shape: tuple[int, ...], crf: int):
        height, width, _ = shape
        even = height % 2 == 0 and width % 2 == 0
        # The conversion from RGB uses the BT.601 matrix; saying so makes every player invert just that.
        color = dict.fromkeys(("colorspace", "color_primaries", "color_trc"), "smpte170m") | {"color_range": "tv"}
        chroma = "yuv420p" if even else "yuv444p"
        # x264's macroblock tree takes in undefined memory where the macroblocks are no multiple of its vectors, and
        # the same frames then give another file now and then. Without it files are larger (1.7 times, 720p).
        exact = {} if math.ceil(height / 16) * math.ceil(width / 16) % 16 == 0 else {"mbtree": "0"}
        fast = {"lossless": "1", "compression_level": "0", "quality": "20"}  # where lossless, this is the effort
        codec, pixel_format, options, container_options = {
            ".mp4": ("libx264", chroma, color | exact | {"crf": str(crf)}, {"movflags": "faststart"}),
            ".webp": ("libwebp", "bgra", fast, {"loop": "0"}),
            ".gif": ("gif", "pal8", {}, {"loop": "0"}),
        }[path.suffix.lower()]
        rate = Fraction(frame_rate).limit_denominator(10000)
        self._container = av.open(str(path), "w", options=container_options)
        stream = self._container.add_stream(codec, rate=rate, options=options)
        assert isinstance(stream, av.VideoStream)
        stream.height, stream.width, stream.pix_fmt = height, width, pixel_format
        stream.codec_context.time_base = 1 / rate
        self._stream, self._time_base = stream, 1 / rate
        self._num_frames = 0

    def append(self, frame: np.ndarray) -> None:
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


class _ImageFolder:
    """Numbered png files, each carrying the frame rate as text."""

    def __init__(self, path: Path, frame_rate: float):
        path.mkdir()
        self._path = path
        self._text = PngInfo()
        self._text.add_text("frame_rate", repr(frame_rate))
        self._num_frames = 0

    def append(self, frame: np.ndarray) -> None:
        path = self._path / f"{self._num_frames:06d}.png"
        iio.imwrite(path, frame, plugin="pillow", pnginfo=self._text, compress_level=3)
        self._num_frames += 1

    def close(self) -> None:
        pass
