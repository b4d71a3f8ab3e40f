"""JSON files, and folders of files that notice when one of them was damaged or their settings change."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vgen.io.fingerprint import digest_json, file_digest
from vgen.io.remote import replace_text


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object from a file.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is not a JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"no such file: {path}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} must be a JSON object, got something else: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must be a JSON object, got {type(value).__name__}")
    return value


def check_settings(folder: Path, settings: dict[str, Any], patterns: Iterable[str]) -> None:
    """Writes `settings.json` in a folder, or checks that it has the same settings.

    Args:
        folder: Folder of the files.
        settings: Settings of the run. Values that JSON does not support are compared as strings.
        patterns: Glob patterns of the files.

    Raises:
        ValueError: The folder has files with other or unknown settings. The error lists the settings that differ.
    """
    path = folder / "settings.json"
    stored = read_json(path) if path.exists() else None
    settings = json.loads(json.dumps(settings, default=str))
    if stored is None and any(any(folder.glob(pattern)) for pattern in patterns):
        raise ValueError(f"{folder} has files, but no settings.json: choose an empty folder")
    differing = [] if stored is None else [name for name in settings if stored.get(name) != settings[name]]
    if differing:
        raise ValueError(f"{folder} has files with different settings ({', '.join(differing)}): choose another folder")
    replace_text(path, json.dumps(settings, indent=1))


def seal(folder: Path, name: str, record: dict[str, Any]) -> None:
    """Writes a record to a folder as JSON, with the SHA-256 of itself and of all other files.

    Args:
        folder: A folder whose other files are complete.
        name: Name of the record's file.
        record: A JSON-serializable dictionary.
    """
    sealed = json.loads(json.dumps(record)) | {"files": _digests(folder)}
    (folder / name).write_text(json.dumps(sealed | {"sha256": digest_json(sealed)}, indent=1))


def check_seal(folder: Path, name: str) -> dict[str, Any]:
    """Reads a record that `seal` wrote.

    Raises:
        ValueError: The record or another file was changed since, or is missing. The error names it.
    """
    try:
        record = read_json(folder / name)
    except FileNotFoundError:
        raise ValueError(f"{name} is missing") from None
    digest = record.pop("sha256", None)
    if digest != digest_json(record) or not isinstance(record.get("files"), dict):
        raise ValueError(f"{name} was changed")
    found = _digests(folder)
    wrong = [file for file, digest in record["files"].items() if found.get(file) != digest]
    if wrong:
        raise ValueError(f"missing or changed files: {', '.join(wrong)}")
    return record


def _digests(folder: Path) -> dict[str, str]:
    """The SHA-256 of each file in a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): file_digest(path) for path in files}
