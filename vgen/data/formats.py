"""File formats of videos, by suffix. Imports nothing heavy, so paths can be checked before a model is loaded."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal, get_args

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")
"""Frames of a folder."""
ANIMATION_SUFFIXES = (".gif", ".webp")
VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", *ANIMATION_SUFFIXES)
"""Files that can be read."""
OutputSuffix = Literal[".mp4", ".gif", ".webp", ""]
"""Files that can be written; "" is a folder of frames."""


def check_video_input(path: Path) -> None:
    """Checks the path of a video: a file or a folder of frames.

    Raises:
        FileNotFoundError: The path does not exist.
        ValueError: The file is empty, or its suffix is not supported.
    """
    if not path.exists():
        raise FileNotFoundError(f"no such file or folder: {path}")
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
