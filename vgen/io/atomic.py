"""Atomic writes: files and folders appear complete or not at all. Locks keep other processes from writing too."""

from __future__ import annotations

import errno
import os
import re
import shutil
import socket
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from uuid import uuid4

from filelock import FileLock, Timeout
from safetensors import SafetensorError


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Makes errors of writing, such as a full disk, name what could not be written.

    Raises:
        OSError: Writing failed.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None or str(path) in str(error):
            raise
        raise OSError(error.errno, f"could not write {path}: {error.strerror}") from error
    except SafetensorError as error:
        if not (number := re.search(r"os error (\d+)", str(error))):
            raise
        raise OSError(int(number[1]), f"could not write {path}: {os.strerror(int(number[1]))}") from error
    except RuntimeError as error:  # of `torch.save`, which does not say why
        if "inline_container" not in str(error):
            raise
        raise OSError(errno.EIO, f"could not write {path}: writing failed, the disk may be full") from error


def _apply_umask(path: Path) -> None:
    """Gives files the user's usual permissions, because safetensors creates them for their owner only."""
    mask = os.umask(0o077)
    os.umask(mask)
    for file in [path, *path.rglob("*")] if path.is_dir() else [path]:
        if file.is_file():
            file.chmod(0o666 & ~mask)


@contextmanager
def atomic_file(path: Path, *, shared: bool = False) -> Iterator[Path]:
    """Yields a path next to `path` to write to; the file written there replaces `path` unless an exception is raised.

    Args:
        path: The file to write.
        shared: Whether several processes may write it at the same time; the last one wins.
    """
    partial = path.with_name(f".{path.name}.{f'{uuid4().hex}.' if shared else ''}partial")
    try:
        with writing(path):
            yield partial
        _apply_umask(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a text file atomically."""
    with atomic_file(path) as partial:
        partial.write_text(text)


def workspace_for(path: Path) -> TemporaryDirectory[str]:
    """A hidden folder next to `path`, for writers that need the name and suffix of the final file.

    The file is written there and then moved to `path`; the folder is deleted with everything left in it.
    """
    return TemporaryDirectory(prefix=f".{path.stem}-", dir=path.parent, ignore_cleanup_errors=True)


def remove_workspaces(folder: Path, names: Iterable[str]) -> None:
    """Deletes the workspaces that killed processes left for files of these names."""
    prefixes = {f".{Path(name).stem}-" for name in names}
    for left in list(folder.glob(".*")):
        if left.name[:-8] in prefixes:  # `tempfile` adds eight characters
            shutil.rmtree(left)


def move_into_place(partial: Path, path: Path, workspace: Path) -> None:
    """Moves a finished file or folder from a workspace to `path`; a folder that is replaced goes to the workspace."""
    if path.is_dir():
        path.rename(workspace / "replaced")
    partial.replace(path)


def partial_path(folder: Path) -> Path:
    """Where `atomic_directory` writes a folder."""
    return folder.with_name(f"{folder.name}.partial")


@contextmanager
def atomic_directory(folder: Path) -> Iterator[Path]:
    """Yields a folder to write into, which replaces `folder` unless an exception is raised.

    Replacing takes two renames. If the process stops between them, the old folder is at `backup_path(folder)`.
    """
    partial = partial_path(folder)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        with writing(folder):
            yield partial
        _apply_umask(partial)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    backup = backup_path(folder)
    if folder.exists():
        shutil.rmtree(backup, ignore_errors=True)
        folder.replace(backup)
    partial.replace(folder)
    shutil.rmtree(backup, ignore_errors=True)


def backup_path(folder: Path) -> Path:
    """Where the old folder is while `atomic_directory` replaces it."""
    return folder.with_name(f".{folder.name}.old")


def restore_backup(folder: Path) -> None:
    """Puts the old folder back if a process was killed between the two renames of `atomic_directory`."""
    if not folder.exists() and backup_path(folder).exists():
        backup_path(folder).replace(folder)


def remove_directory(folder: Path) -> None:
    """Deletes a folder. It is renamed first, so a process that is killed meanwhile never leaves a part of it."""
    renamed = partial_path(folder)
    shutil.rmtree(renamed, ignore_errors=True)
    shutil.rmtree(folder.rename(renamed))


@contextmanager
def locked(folder: Path, path: Path, wait: float = 10.0) -> Iterator[None]:
    """Holds the lock of a folder. The system releases it when the process ends.

    Args:
        folder: What is locked, for the error message.
        path: The lock's file, which is deleted at the end.
        wait: How long to wait for another process, in seconds: the workers of a killed one may take some to end.

    Raises:
        ValueError: Another process holds the lock. The error says which one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(timeout=wait, poll_interval=0.05)
    except Timeout:
        holder = path.read_text(errors="replace").strip() if path.exists() else ""
        raise ValueError(
            f"{folder} is in use by {holder or 'another process'}: wait until it has ended, or choose another folder"
        ) from None
    try:
        path.write_text(f"process {os.getpid()} on {socket.gethostname()} ({' '.join(sys.argv)[:200]})")
        yield
    finally:
        path.unlink(missing_ok=True)  # while it is held: who waits for it checks that the file is still there
        lock.release()
