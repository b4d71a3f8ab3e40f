"""Folders that are written whole or not at all."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A folder to write into, that then appears whole, in the place of an older one if there is any.

    Where replacing is cut short between its two renamings, the older one is found at `older(folder)`.
    """
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    old = older(folder)
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.replace(old)
    partial.replace(folder)
    shutil.rmtree(old, ignore_errors=True)


def older(folder: Path) -> Path:
    """Where what stood at `folder` is while it is replaced."""
    return folder.with_name(f".{folder.name}.old")
