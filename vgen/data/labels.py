"""Labels of videos, for classifiers: from a metadata file, or from the names of folders."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vgen.data.caption_files import LABEL_COLUMN, METADATA_FILES, find_caption, find_metadata, is_text, read_metadata
from vgen.data.clips import Listed, files_by_folder, listed_row
from vgen.data.formats import VIDEO_SUFFIXES

_TOLERANCE = 0.1  # seconds by which time stamps may be rounded up


class Labeled(NamedTuple):
    """A video, or a segment of one, with its labels."""

    video: Listed
    labels: tuple[str, ...]


def list_labeled(folder: Path) -> list[Labeled]:
    """The videos of a folder and its subfolders with their labels, in a fixed order.

    Labels are the column `label` of a `metadata.jsonl`, `metadata.csv` or `metadata.parquet`: a string, or in jsonl
    and parquet also a list of several. With `start` and `end` in seconds, a row labels a segment. Without such a file,
    the label of a video is the name of its folder: `CLASS/VIDEO.mp4`.

    Args:
        folder: The folder.

    Raises:
        FileNotFoundError: The folder does not exist.
        ValueError: There are no videos, or a video has no label. The error names some.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    folders = files_by_folder(folder)
    found: list[Labeled] = []
    tables = {parent: find_metadata(parent, names) for parent, names in folders.items()}
    for parent, names in folders.items():
        if (table := tables[parent]) is not None:
            found += [_labeled_row(folder, parent, *row) for row in read_metadata(table)]
        elif not any(tables.get(above) for above in parent.parents):
            label = () if parent == folder else (parent.name,)
            videos = (parent / file for file in sorted(names) if Path(file).suffix.lower() in VIDEO_SUFFIXES)
            found += [Labeled(Listed(path=path, root=folder), label) for path in videos]
    if not found:
        raise ValueError(f"{folder} contains no videos ({', '.join(VIDEO_SUFFIXES)}) and lists none")
    without = [str(one.video.path) for one in found if not one.labels]
    if without:
        examples = ", ".join(without[:3]) + (", ..." if len(without) > 3 else "")
        raise ValueError(
            f"{len(without)} of {len(found)} videos of {folder} have no label: expected a column {LABEL_COLUMN} in "
            f"{METADATA_FILES}, or one folder for each class ({examples})"
        )
    return found


class Timeline(NamedTuple):
    """A whole video, and what happens in it when."""

    video: Listed
    events: tuple[tuple[str, float, float], ...]
    """Label, start and end in seconds."""


def timelines_of(videos: Iterable[Labeled]) -> list[Timeline]:
    """Videos with all their labeled segments, in the same order.

    Args:
        videos: Labeled segments, as `list_labeled` lists them. Without `start` or `end`, a segment begins or ends with
            its video.

    Raises:
        ValueError: A segment does not end within its video, whose duration must be known.
        OSError: A file cannot be read.
    """
    events: dict[Listed, list[tuple[str, float, float]]] = {}
    for video, labels in videos:
        duration = video.info().duration
        end = duration if video.end is None else video.end
        if duration is None or end is None:
            raise ValueError(f"{video.path}: its duration is unknown")
        if (video.start or 0.0) >= duration or end > duration + _TOLERANCE:
            span = f"{video.start or 0:g} to {end:g} s"
            raise ValueError(f"{video.path} lasts {duration:g} s, but its label {labels[0]} is for {span}")
        whole = Listed(path=video.path, root=video.root)
        events.setdefault(whole, []).extend((label, video.start or 0.0, end) for label in labels)
    return [Timeline(whole, tuple(found)) for whole, found in events.items()]


def _labeled_row(folder: Path, parent: Path, place: str, row: dict[str, Any]) -> Labeled:
    value = row.get(LABEL_COLUMN)
    labels = [value] if isinstance(value, str) else [] if value is None else value
    if not isinstance(labels, list) or not all(is_text(label) and label for label in labels):
        raise ValueError(f"{place}: {LABEL_COLUMN} must be a string or a list of strings, got {value!r}")
    caption = find_caption(row)
    return Labeled(listed_row(folder, parent, place, {**row, "text": caption or ""}), tuple(dict.fromkeys(labels)))


def classes_of(videos: Iterable[Labeled], classes: Sequence[str] | None = None, complete: bool = True) -> list[str]:
    """The names of the classes of labeled videos, in alphabetical order.

    Args:
        videos: The videos.
        classes: Names that labels must have, in their order; `None` takes those that occur.
        complete: Whether each of these names must occur.

    Raises:
        ValueError: A label is unknown, or a class has no video.
    """
    counts = Counter(label for one in videos for label in one.labels)
    if classes is None:
        return sorted(counts)
    unknown = sorted(set(counts) - set(classes))
    if unknown:
        raise ValueError(f"unknown labels: {', '.join(unknown[:5])}; the classes are {', '.join(classes)}")
    missing = [name for name in classes if name not in counts]
    if missing and complete:
        raise ValueError(f"no video has the label {', '.join(missing[:5])}")
    return list(classes)
