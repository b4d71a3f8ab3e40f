"""What every command does with expected errors, Ctrl-C and SIGTERM."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from logging import ERROR, getLogger

EXPECTED = (ValueError, OSError, ImportError, FloatingPointError)
"""Errors whose message tells the user what to do."""


def describe(error: Exception) -> str:
    """An error as one line; one of the operating system begins with the name of the file."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        text = f"{error.filename}: {error.strerror}"
    elif isinstance(error, OSError) and error.strerror:
        text = error.strerror
    return one_line(text)


def one_line(text: str) -> str:
    """A text as one line that can be written anywhere: names of files may have line ends, and may not be Unicode."""
    return " ".join(printable(text).split())


def printable(text: str) -> str:
    """A text with escapes for what cannot be encoded, because names of files need not be Unicode."""
    return text.encode("utf-8", "backslashreplace").decode()


@contextmanager
def without_warnings(name: str) -> Iterator[None]:
    """Only lets errors of a logger of another library through."""
    other = getLogger(name)
    level = other.level
    other.setLevel(ERROR)
    try:
        yield
    finally:
        other.setLevel(level)


@contextmanager
def loading(source: object) -> Iterator[None]:
    """Makes errors of libraries that load files name what was loaded.

    Args:
        source: What is loaded, for the message.

    Raises:
        ValueError: It could not be loaded, for example because a config has a wrong type or memory is full.
    """
    try:
        yield
    except EXPECTED:
        raise
    except Exception as error:
        raise ValueError(f"could not load {source}: {type(error).__name__}: {one_line(str(error))}") from error


@contextmanager
def one_line_errors(program: str = "vgen") -> Iterator[None]:
    """Prints an expected error as one line and exits with status 2.

    SIGTERM and Ctrl-C exit with the usual status, 128 plus the signal's number, after working folders are deleted.

    Args:
        program: What the line begins with.
    """
    in_main_thread = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, _exit) if in_main_thread else None
    try:
        yield
    except EXPECTED as error:
        _print(f"{program}: {describe(error)}")
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        _print(f"{program}: interrupted")
        raise SystemExit(128 + signal.SIGINT) from None
    finally:
        if in_main_thread:
            signal.signal(signal.SIGTERM, before)


def _print(message: str) -> None:
    """Prints a line to the standard error, not on the line of a progress bar."""
    from tqdm import tqdm  # takes time to import, and errors are rare

    tqdm.write(message, file=sys.stderr)


def _exit(number: int, _: object) -> None:
    raise SystemExit(128 + number)
