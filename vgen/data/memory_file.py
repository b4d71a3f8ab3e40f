"""A video file in memory, for example from a row of a dataset."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any


class MemoryFile:
    """Replaces the path of a file in functions that read videos.

    Args:
        name: Name of the file; its suffix gives the format.
        content: Bytes of the file.
    """

    def __init__(self, name: Path, content: bytes):
        self.name, self.suffix, self.content = name.name, name.suffix, content

    def __str__(self) -> str:
        return self.name

    def exists(self) -> bool:
        """Always true."""
        return True

    def is_file(self) -> bool:
        """Always true."""
        return True

    def is_dir(self) -> bool:
        """Always false."""
        return False

    def stat(self) -> Any:
        """The status of the file, with its size."""
        return SimpleNamespace(st_size=len(self.content))

    def open(self, mode: str = "rb") -> io.BytesIO:
        """Opens the file as a stream of bytes."""
        return io.BytesIO(self.content)
