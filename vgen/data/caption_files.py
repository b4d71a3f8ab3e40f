"""Captions in text files, and captions and labels in files of metadata that list videos."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vgen.data.formats import VIDEO_SUFFIXES
from vgen.io.errors import one_line

CAPTION_COLUMNS = ("text", "caption", "captions")
"""Names of the column of captions, in order of preference."""
LABEL_COLUMN = "label"
"""Name of the column of labels, for classifiers."""
_COLUMNS = ("file_name", *CAPTION_COLUMNS, LABEL_COLUMN, "start", "end")
_METADATA_NAMES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
METADATA_FILES = "metadata.jsonl, metadata.csv or metadata.parquet"
"""The files of metadata, for messages."""


def find_metadata(folder: Path, names: Iterable[str]) -> Path | None:
    """The metadata file among the files of a folder.

    Raises:
        ValueError: There are two.
    """
    tables = [folder / name for name in names if name.lower() in _METADATA_NAMES]
    if len(tables) > 1:
        raise ValueError(f"{folder} has both {tables[0].name} and {tables[1].name}: keep only one of them")
    return tables[0] if tables else None


def read_metadata(table: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a metadata file, each with its place for error messages.

    Raises:
        ValueError: The file or a row is malformed.
        ImportError: Reading parquet needs pyarrow.
    """
    if not table.is_file():
        raise ValueError(f"{table} is not a file: expected a metadata file")
    if table.suffix.lower() == ".parquet":
        yield from _parquet_rows(table)
        return
    with table.open(encoding="utf-8-sig", newline="") as file, _named(table):
        yield from (_csv_rows if table.suffix.lower() == ".csv" else _json_rows)(table, file)


def _json_rows(table: Path, file: Iterable[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        place = f"{table}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{place}: invalid JSON ({error})") from error
        if not isinstance(row, dict):
            raise ValueError(f"{place}: expected a JSON object with file_name and text")
        yield place, row


def _parquet_rows(table: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise ImportError(f"{table} needs pyarrow: pip install vgen[data]") from error
    try:
        with ParquetFile(table) as file:
            columns = file.schema_arrow.names
            rows = file.read(columns=[name for name in columns if name in _COLUMNS]).to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        reason = one_line(str(error))
        raise ValueError(f"{table} is damaged, truncated or not parquet: {reason}") from error
    _check_columns(str(table), columns)
    for number, row in enumerate(rows, start=1):
        yield f"{table}, row {number}", row


def _csv_rows(table: Path, file: Iterable[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    reader, first = csv.DictReader(file, strict=True), 1
    try:
        _check_columns(f"{table}, line 1", reader.fieldnames or [])
        while True:
            first = reader.line_num + 1
            row = next(reader, None)
            if row is None:
                return
            later_lines = [line for key, text in row.items() if key and text for line in text.split("\n")[1:]]
            place = f"{table}, line {reader.line_num - len(later_lines)}"
            fields = [field for line in later_lines for field in line.split(",")]
            if any(Path(field.strip()).suffix.lower() in VIDEO_SUFFIXES for field in fields):
                raise ValueError(f"{place}: a double quote is not closed and swallows the next rows")
            if None in row:
                raise ValueError(f"{place}: more fields than the header has: put text with commas in double quotes")
            yield place, row
    except csv.Error as error:
        raise ValueError(
            f"{table}, from line {first}: invalid CSV ({error}): double quotes around text must be closed, those in "
            "text doubled, and no field may be longer than 128 KiB"
        ) from error


def _check_columns(place: str, columns: Sequence[str]) -> None:
    if "file_name" not in columns or not {*CAPTION_COLUMNS, LABEL_COLUMN}.intersection(columns):
        raise ValueError(f"{place}: expected the columns file_name and text or label, got {list(columns)}")


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Names the file in the error if it is not UTF-8."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error


def find_caption(row: Mapping[str, Any]) -> Any:
    """The value of the first column of `CAPTION_COLUMNS` that a row has; `None` if it has none."""
    return next((row[name] for name in CAPTION_COLUMNS if row.get(name) is not None), None)


def is_text(value: Any) -> bool:
    """Whether a value is a string that can be encoded: JSON may contain halves of surrogate pairs."""
    return isinstance(value, str) and not any("\ud800" <= character <= "\udfff" for character in value)


def split_lines(text: str) -> list[str]:
    """The lines of a text that are not blank, stripped; only line feeds and carriage returns end a line."""
    return [line for _, line in numbered_lines(text)]


def numbered_lines(text: str) -> list[tuple[int, str]]:
    """As `split_lines`, with the number of each line in the text, from 1."""
    lines = enumerate(re.split(r"\r\n?|\n", text), start=1)
    return [(number, line.strip()) for number, line in lines if line.strip()]


def read_text(path: Path) -> str:
    """A UTF-8 text file without a byte-order mark.

    Raises:
        ValueError: The file is not UTF-8.
    """
    with _named(path):
        return path.read_text(encoding="utf-8-sig")
