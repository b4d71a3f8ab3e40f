"""File formats of videos, by suffix. Imports nothing heavy, so paths can be checked before a model is loaded."""

from __future__ import annotations

import itertools
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from vgen.checks import check_choice, check_integer, check_number

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")
"""Frames of a folder."""
ANIMATION_SUFFIXES = (".gif", ".webp")
CONTAINERS = {
    "mov,mp4,m4a,3gp,3g2,mj2": (".mp4", ".m4v", ".mov", ".qt", ".3gp", ".3g2", ".f4v"),
    "matroska,webm": (".mkv", ".webm"),
    "avi": (".avi", ".divx"),
    "mpegts": (".ts", ".mts", ".m2ts", ".m2t"),
    "mpeg,mpegvideo": (".mpg", ".mpeg", ".mpe", ".vob"),
    "asf": (".wmv", ".asf"),
    "flv": (".flv",),
    "ogg": (".ogv",),
}
"""FFmpeg's names of the containers that can be read, with their suffixes. Playlists, which open other files, are not
among them."""
VIDEO_SUFFIXES = (*itertools.chain(*CONTAINERS.values()), *ANIMATION_SUFFIXES)
"""Files that can be read."""
UNREAD_SUFFIXES = (".mxf", ".rm", ".rmvb", ".y4m", ".dv", ".m2v", ".swf")
"""Videos that cannot be read."""
_SYSTEM_FOLDERS = ("__MACOSX", "@eaDir", "#recycle", "@Recycle", "$RECYCLE.BIN", "lost+found")
OutputSuffix = Literal[".mp4", ".gif", ".webp", ""]
"""Files that can be written; "" is a folder of frames."""
PixelFormat = Literal["yuv420p", "yuv444p"]
"""Pixel formats of mp4 files."""


@dataclass(kw_only=True)
class OutputOptions:
    """How the `vgen` command and jobs write a video."""

    fps: float | None = None
    """Frames per second of the file; by default that of the content, or of the input video."""
    pixel_format: PixelFormat = "yuv420p"
    """Pixel format of an mp4: `yuv420p`, which every player supports, or `yuv444p`, which keeps all color detail and
    odd sizes."""
    scale: int | None = None
    """Factor by which the frames of the file are enlarged, with sharp edges. By default, mp4 and gif files below 256
    pixels are enlarged, because players blur them."""


def is_ignored(name: str) -> bool:
    """Whether a file or folder of this name is hidden, or was put there by a system, and so is no part of the data."""
    return name.startswith(".") or name in _SYSTEM_FOLDERS


def is_video(path: Path) -> bool:
    """Whether a path has the suffix of a video or is a folder of frames."""
    if path.is_dir():
        return any(entry.suffix.lower() in IMAGE_SUFFIXES for entry in path.iterdir())
    return path.suffix.lower() in VIDEO_SUFFIXES


def check_video_input(path: Path) -> None:
    """Checks the path of a video: a file or a folder of frames.

    Raises:
        FileNotFoundError: The path does not exist.
        ValueError: The file is empty, its suffix is not supported, the folder has no frames, or it is a pipe or a
            device.
    """
    if not path.exists():
        raise FileNotFoundError(f"no such file or folder: {path}")
    if not path.is_file() and not path.is_dir():
        raise ValueError(f"{path} is a pipe or a device: expected a video file or a folder of frames")
    if path.is_dir() and not is_video(path):
        videos = [entry for entry in path.iterdir() if entry.suffix.lower() in VIDEO_SUFFIXES]
        advice = f"; pass the videos in it, such as {min(videos)}" if videos else ""
        raise ValueError(f"the folder {path} has no {', '.join(IMAGE_SUFFIXES)} frames{advice}")
    if path.is_file() and path.suffix.lower() not in VIDEO_SUFFIXES:
        supported = ", ".join(VIDEO_SUFFIXES)
        raise ValueError(f"{path} is not a supported video: expected {supported} or a folder of frames")
    if path.is_file() and path.stat().st_size == 0:
        raise ValueError(f"{path} is empty")


def check_video_output(path: Path, overwrite: bool) -> None:
    """Checks the path of a video to write.

    Raises:
        FileExistsError: The path exists and may not be replaced.
        ValueError: The suffix is not supported.
    """
    if path.suffix.lower() not in get_args(OutputSuffix):
        raise ValueError(f"the suffix must be .mp4, .gif or .webp, or none for a folder, got {path}")
    if not os.path.lexists(path):
        return
    if not overwrite:
        raise FileExistsError(f"{path} already exists (overwrite=True replaces it)")
    is_folder = path.is_dir()
    if is_folder != (path.suffix == ""):
        raise FileExistsError(f"{path} cannot be replaced: it is a {'folder' if is_folder else 'file'}")
    if is_folder and any(entry.suffix.lower() not in IMAGE_SUFFIXES for entry in path.iterdir()):
        raise FileExistsError(f"{path} cannot be replaced: the folder contains more than frames")


def check_output_options(options: OutputOptions, suffix: str) -> None:
    """Checks options for videos with this suffix.

    Raises:
        ValueError: An option is out of range, or not supported for this suffix.
    """
    if options.fps is not None:
        check_number("fps", options.fps, above=0)
    if options.scale is not None:
        check_integer("scale", options.scale, minimum=1)
    check_pixel_format(options.pixel_format, suffix)


def check_pixel_format(pixel_format: str, suffix: str) -> None:
    """Checks the pixel format of videos with this suffix.

    Raises:
        ValueError: There is no such format, or files with this suffix do not have it.
    """
    check_choice("pixel_format", pixel_format, PixelFormat)
    if pixel_format != OutputOptions.pixel_format and suffix.lower() != ".mp4":
        raise ValueError(f"pixel_format={pixel_format} is for .mp4 files, got {suffix or 'a folder of frames'}")
