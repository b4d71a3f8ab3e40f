"""A cache of the properties of video files, so that each file is probed only once."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Hashable
from contextlib import suppress
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from vgen.data.video_io import VideoInfo, video_info
from vgen.io.atomic import atomic_file

INDEX = ".vgen-index.json"
"""Name of the index file in a folder."""


class VideoIndex:
    """The properties of the files in a folder, stored there. An entry is valid while the file is unchanged.

    A damaged index is replaced. In a read-only folder nothing is stored, and each process probes files once.

    Args:
        folder: Folder of the videos.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._entries = self._read()
        self._changed = False

    def info(self, path: Path) -> VideoInfo:
        """Describes a file of the folder; see `video_info`.

        Raises:
            FileNotFoundError: The file does not exist.
            ValueError: It cannot be read as a video.
        """
        if not path.is_file():  # a folder of frames may change without a new mtime
            return video_info(path)
        name, status = os.path.relpath(path, self.folder), path.stat()
        stamp = [status.st_size, status.st_mtime_ns]
        entry = self._entries.get(name)
        if entry is not None and entry["stamp"] == stamp:
            return VideoInfo(path=path, **entry["info"])
        info = video_info(path)
        self._entries[name] = {"stamp": stamp, "info": {k: v for k, v in asdict(info).items() if k != "path"}}
        self._changed = True
        return info

    def save(self) -> None:
        """Writes new entries, merged with those of other processes, if the folder is writable."""
        if not self._changed:
            return
        self._entries = self._read() | self._entries
        with suppress(OSError), atomic_file(self.folder / INDEX, shared=True) as partial:
            partial.write_text(json.dumps(self._entries, indent=0))
            self._changed = False

    def _read(self) -> dict[str, Any]:
        if not (self.folder / INDEX).is_file():
            return {}
        try:
            entries = json.loads((self.folder / INDEX).read_text())
            for entry in entries.values():
                VideoInfo(path=self.folder, **entry["info"])
                size, time = entry["stamp"]
                if not isinstance(size, int) or not isinstance(time, int) or not _is_valid(entry["info"]):
                    return {}
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):  # damaged
            return {}
        return entries


def _is_valid(info: dict[str, Any]) -> bool:
    """Whether the values have the types of the fields of `VideoInfo`, and numbers are positive and finite."""
    types = {
        name: get_origin(one) if get_origin(one) is dict else one for name, one in get_type_hints(VideoInfo).items()
    }
    return all(
        isinstance(value, get_args(types[name]) or types[name])
        and (not isinstance(value, int | float) or 0 < value < math.inf)
        for name, value in info.items()
    )


@lru_cache(maxsize=16)
def index_of(folder: Path) -> VideoIndex:
    """The index of a folder; cached."""
    return VideoIndex(folder)


_PROBED: dict[Hashable, VideoInfo] = {}


def probe_once(key: Hashable, probe: Callable[[], VideoInfo]) -> VideoInfo:
    """Calls `probe`, and caches the result for this key in this process."""
    if key not in _PROBED:
        _PROBED[key] = probe()
    return _PROBED[key]
