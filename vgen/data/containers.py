"""Checks of the structure of video files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any


def structural_damage(path: Path) -> str | None:
    """Damage of a gif, avi, mkv or webm that FFmpeg and Pillow may pass over without an error."""
    with path.open("rb") as file:
        head = file.read(12)
        size = file.seek(0, os.SEEK_END)
        if head.startswith(b"GIF"):
            file.seek(max(size - 64, 0))
            complete = file.read().rstrip(b"\0").endswith(b";")
        elif head.startswith(b"RIFF"):
            complete = 8 + int.from_bytes(head[4:8], "little") <= size
        else:
            return _matroska_damage(file, size) if head.startswith(b"\x1a\x45\xdf\xa3") else None
    return None if complete else "the end is missing"


_MATROSKA_PARENTS = {0x18538067, 0x1F43B675}  # Segment and Cluster
_MATROSKA_ELEMENTS = _MATROSKA_PARENTS | {
    0x1A45DFA3, 0x114D9B74, 0x1549A966, 0x1654AE6B, 0x1C53BB6B, 0x1941A469, 0x1043A770, 0x1254C367, 0xEC, 0xBF,  # top
    0xE7, 0xA3, 0xA0, 0xAB, 0xA7, 0xAF, 0x5854,  # parts of a Cluster
}  # fmt: skip


def _matroska_damage(file: Any, size: int) -> str | None:
    """Walks over the elements of a Matroska file (RFC 9559): each must be known and start where the last one ends."""
    position = 0
    while position < size:
        file.seek(position)
        head = file.read(12).ljust(12, b"\0")
        id_length = 9 - head[0].bit_length()
        if id_length > 4 or int.from_bytes(head[:id_length], "big") not in _MATROSKA_ELEMENTS:
            return f"there is no valid element at byte {position}"
        length = 9 - head[id_length].bit_length()
        content = int.from_bytes(head[id_length : id_length + length], "big") & ((1 << 7 * length) - 1)
        unknown = content == (1 << 7 * length) - 1
        position += id_length + length
        if not unknown and position + content > size:
            return "the end is missing"
        if int.from_bytes(head[:id_length], "big") not in _MATROSKA_PARENTS:
            position += content
    return None
