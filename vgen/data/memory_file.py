"""A video file in memory, such as a row of a dataset."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any


class MemoryFile:
    """Stands in for the path of a file where videos are read.

    Args:
        name: Of the file; its suffix says what it is.
        content: All of its bytes.
    """

    def __init__(self, name: Path, content: bytes):
        self.name, self.suffix, self.content = name.name, name.suffix, content

    def __str__(self) -> str:
        return self.name

    def exists(self) -> bool:
        """Yes."""
        return True

    def is_file(self) -> bool:
        """Yes."""
        return True

    def is_dir(self) -> bool:
        """No."""
        return False

    def stat(self) -> Any:
        """Its size."""
        return SimpleNamespace(st_size=len(self.content))

    def open(self, mode: str = "rb") -> io.BytesIO:
        """A stream of its bytes."""
        return io.BytesIO(self.content)
