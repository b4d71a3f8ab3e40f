"""Files and folders at URLs such as `s3://bucket/folder`, read and written with fsspec.

`as_path` gives such a URL the interface of `pathlib.Path`. Videos are read and written locally: `local_input`
downloads them, and `local_output` uploads them.
"""

from __future__ import annotations

import atexit
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

from vgen.io.atomic import write_text

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
_COLLAPSED = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/[^/]")  # what `pathlib` makes of a URL
_PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs"}


def is_url(location: object) -> bool:
    """Whether a location is a URL, rather than a local path."""
    return _URL.match(str(location)) is not None


def as_path(location: str | Path) -> Path:
    """Converts a location to a path.

    Args:
        location: A local path, or a URL of a file system that fsspec supports.

    Returns:
        A `pathlib.Path`, or for a URL a `upath.UPath`, which has the same interface.

    Raises:
        ImportError: The package for the file system is not installed.
        ValueError: The scheme is unknown, or the location is a `pathlib.Path` of a URL, which has lost a slash.
    """
    if isinstance(location, Path) and _COLLAPSED.match(str(location)):
        raise ValueError(f"a URL must be a string, because pathlib removes a slash of it, got Path({str(location)!r})")
    if not isinstance(location, str):
        return location
    if not is_url(location):
        return Path(location)
    from fsspec import get_filesystem_class
    from upath import UPath

    scheme = location.partition("://")[0]
    try:
        get_filesystem_class(scheme)
    except ValueError as error:
        raise ValueError(f"no file system for {scheme}:// is known, got {location}") from error
    except ImportError as error:
        package = _PACKAGES.get(scheme)
        hint = f"pip install {package}" if package else str(error)
        raise ImportError(f"{scheme}:// needs another package: {hint}") from error
    return cast(Path, UPath(location))


def replace_text(path: Path, text: str) -> None:
    """Writes a text file atomically; object stores replace an object as a whole."""
    if is_url(path):
        path.write_text(text)
    else:
        write_text(path, text)


def forget_listing(folder: Path) -> None:
    """Drops what fsspec remembers of a folder, so that files of other processes are seen."""
    if is_url(folder):
        _file_system(folder).invalidate_cache()


def last_modified(path: Path) -> float:
    """Time at which a file was last written, in seconds since the epoch."""
    if is_url(path):
        return _file_system(path).modified(_key(path)).timestamp()
    return path.stat().st_mtime


@contextmanager
def local_input(location: str | Path) -> Iterator[Path]:
    """Yields the local path of a file or folder; one at a URL is downloaded, and the copy deleted at the end.

    Raises:
        FileNotFoundError: There is nothing at the URL.
    """
    path = as_path(location)
    if not is_url(path):
        yield path
        return
    with TemporaryDirectory(prefix="vgen-") as folder:
        copy = Path(folder, path.name)
        if not path.exists():
            raise FileNotFoundError(f"no such file or folder: {path}")
        _file_system(path).get(_key(path), str(copy), recursive=path.is_dir())
        yield copy


@lru_cache
def local_copy(location: str | Path) -> Path:
    """As `local_input`, but downloads once and keeps the copy until the end of this process."""
    stack = ExitStack()
    atexit.register(stack.close)
    return stack.enter_context(local_input(location))


@contextmanager
def local_output(path: Path) -> Iterator[Path]:
    """Yields a local path to write a file or folder to; for a URL, what was written there is uploaded at the end.

    An uploaded file appears complete or not at all. A folder does not, and replaces an older one file by file.
    """
    if not is_url(path):
        yield path
        return
    with TemporaryDirectory(prefix="vgen-") as folder:
        written = Path(folder, path.name)
        yield written
        system = _file_system(path)
        if written.is_dir():
            if path.exists():
                system.rm(_key(path), recursive=True)
            for file in sorted(written.iterdir()):
                system.put_file(str(file), f"{_key(path)}/{file.name}")
        elif written.exists():
            system.put_file(str(written), _key(path))


def _file_system(path: Path) -> Any:
    return cast(Any, path).fs


def _key(path: Path) -> str:
    """The path within its file system."""
    return cast(Any, path).path
