"""Clips from a folder of videos: captions, choice of frames, and skipping of damaged files."""

from __future__ import annotations

import hashlib
import itertools
import math
import os
import random
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import torch
from diffusers.utils import logging
from torch import Tensor

from vgen.checks import check_choice
from vgen.data.action_files import ACTION_COLUMN, check_augmentation, cut_actions, find_actions
from vgen.data.augment import Augmentation, augment, draw_offset
from vgen.data.caption_files import (
    CAPTION_COLUMNS,
    METADATA_FILES,
    find_caption,
    find_metadata,
    is_text,
    read_metadata,
    read_text,
    split_lines,
)
from vgen.data.formats import UNREAD_SUFFIXES, VIDEO_SUFFIXES, is_ignored
from vgen.data.memory_file import MemoryFile
from vgen.data.resize import Fit
from vgen.data.video_index import index_of, probe_once
from vgen.data.video_io import VideoInfo, iter_video, resampled_length, video_info
from vgen.io.errors import one_line
from vgen.io.pixels import from_frames

logger = logging.get_logger(__name__)
_skipped: dict[Path, set[str]] = {}
Rate = TypeVar("Rate")
SamplingKind = Literal["random", "uniform", "segments", "sliding"]
Short = Literal["skip", "pad"]


@dataclass(frozen=True, kw_only=True)
class Listed:
    """A video, or a segment of one, as a folder lists it; the file has not been read yet."""

    path: Path
    captions: tuple[str, ...] = ("",)
    """Alternative captions."""
    start: float | None = None
    """Start in seconds; `None` for the start of the file."""
    end: float | None = None
    """End in seconds; `None` for the end of the file."""
    content: Callable[[], bytes] | None = field(default=None, compare=False)
    """Fetches the content of a file that is not stored at `path`; `path` is then only a name."""
    root: Path | None = field(default=None, compare=False)
    """The folder that lists the video and holds its index."""
    actions: Path | None = None
    """File with the actions of all frames of the file; see `vgen.data.action_files`."""
    identity: Hashable = field(default=None, compare=False)
    """Key under which the properties of a fetched file are cached; `None` probes the file each time."""

    def info(self) -> VideoInfo:
        """Describes the file.

        Raises:
            FileNotFoundError: There is no such file.
            OSError: It cannot be fetched.
            ValueError: It cannot be read as a video.
        """
        if self.content is None:
            return video_info(self.path) if self.root is None else index_of(self.root).info(self.path)
        return self._probe() if self.identity is None else probe_once(self.identity, self._probe)

    def _probe(self) -> VideoInfo:
        return replace(video_info(self.file()), path=self.path)

    def file(self) -> Any:
        """The file's path, or the file in memory if it was fetched.

        Raises:
            OSError: It cannot be fetched.
        """
        if self.content is None:
            return self.path
        try:
            return MemoryFile(self.path, self.content())
        except Exception as error:  # of any library that reads from anywhere
            raise OSError(f"the file cannot be fetched: {error}") from error


def save_indices(listed: Iterable[Listed]) -> None:
    """Saves the indices of the folders that list videos, after the videos were described."""
    for root in {one.root for one in listed}:
        if root is not None:
            index_of(root).save()


def list_videos(folder: Path) -> list[Listed]:
    """The videos of a folder and its subfolders with their captions, in a fixed order.

    Captions are read from `metadata.jsonl`, `metadata.csv` or `metadata.parquet`, as in Hugging Face's `videofolder`.
    It lists the videos of its folder and of the subfolders, with the columns `file_name`, `text` or `caption` (in
    jsonl and parquet also a list of alternative captions) and optionally `start` and `end` in seconds. Elsewhere they
    are read from a `.txt` file next to each video, one caption per line. A warning names videos without a caption, and
    videos that are not used. Actions are read from the file that the column `actions` names, or elsewhere from a
    `.npz` or `.npy` file next to each video; see `vgen.data.action_files`.

    Linked folders are searched too. Hidden files and folders and those of the system (`__MACOSX`, `@eaDir`) are not.

    Args:
        folder: The folder.

    Raises:
        FileNotFoundError: The folder does not exist.
        ValueError: There are no videos, a folder has two metadata files, or a row of metadata is invalid.
        ImportError: Reading `metadata.parquet` needs pyarrow.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    folders = files_by_folder(folder)
    tables = {
        parent: table for parent, names in folders.items() if (table := find_metadata(parent, names)) is not None
    }
    rows = [(table.parent, *row) for table in tables.values() for row in read_metadata(table)]
    listed = [listed_row(folder, *row) for row in rows]
    # those of `pipelines/prepare_videos.py`, which has warned already
    stated = {one.path for one, row in zip(listed, rows, strict=True) if isinstance(row[-1].get("text"), list)}
    in_tables = {os.path.abspath(one.path) for one in listed}
    unused, unread, outside = [], [], []
    for parent, names in folders.items():
        texts = {Path(name).stem: name for name in sorted(names) if name.lower().endswith(".txt")}
        has_table = any(above in tables for above in (parent, *parent.parents))
        for path in (parent / name for name in names):
            suffix = path.suffix.lower()
            if suffix in UNREAD_SUFFIXES:
                unread.append(path)
            elif suffix not in VIDEO_SUFFIXES:
                continue
            elif not has_table:
                captions = _captions_in(parent / texts[path.stem]) if path.stem in texts else ()
                actions = find_actions(parent, path.stem, names)
                outside.append(Listed(path=path, captions=captions or ("",), root=folder, actions=actions))
            elif os.path.abspath(path) not in in_tables:
                unused.append(path)
    listed += sorted(outside, key=lambda one: one.path)
    if not listed:
        raise ValueError(f"{folder} contains no videos ({', '.join(VIDEO_SUFFIXES)}) and lists none")
    _warn_about(unread, f"of {folder} are not used, because their format is not supported")
    _warn_about(unused, f"of {folder} are not used, because no metadata file lists them")
    warn_uncaptioned(
        [one for one in listed if one.path not in stated],
        folder,
        f"a row of {METADATA_FILES} with text or caption, or without such a file a .txt file next to each video",
    )
    return listed


def _captions_in(text: Path) -> tuple[str, ...]:
    if not text.is_file():
        raise ValueError(f"{text} is not a file: expected the captions of a video")
    return tuple(split_lines(read_text(text)))


def files_by_folder(folder: Path) -> dict[Path, list[str]]:
    """The names of files in a folder and its subfolders. Each folder is there once, even if links lead to it."""
    found: dict[Path, list[str]] = {}
    seen: set[tuple[int, int]] = set()
    waiting, linked = [folder], list[Path]()
    while waiting or linked:
        parent = waiting.pop() if waiting else linked.pop(0)
        status = parent.stat()
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        found[parent] = []
        for entry in sorted(os.scandir(parent), key=lambda entry: entry.name):
            if is_ignored(entry.name):
                continue
            if entry.is_dir(follow_symlinks=False):
                waiting.append(parent / entry.name)
            elif entry.is_symlink() and os.path.isdir(entry.path):
                linked.append(parent / entry.name)
            else:
                found[parent].append(entry.name)
    return dict(sorted(found.items()))


def warn_uncaptioned(listed: Iterable[Listed], source: object, expected: str) -> None:
    """Warns that videos of a source have no caption, and says where captions are expected."""
    without = dict.fromkeys(one.path for one in listed if not any(one.captions))
    _warn_about(list(without), f"of {source} have no caption: expected {expected}")


def _warn_about(paths: Sequence[Path], what: str) -> None:
    if paths:
        names = ", ".join(str(path) for path in paths[:3]) + (", ..." if len(paths) > 3 else "")
        warn_once(f"{len(paths)} videos {what} ({names})")


@cache
def warn_once(message: str) -> None:
    """Warns, the first time that this process has this message."""
    logger.warning(one_line(message))


def listed_row(folder: Path, parent: Path, place: str, row: Mapping[str, Any]) -> Listed:
    """The video that a row of a metadata file lists.

    Args:
        folder: Folder that is searched for videos.
        parent: Folder of the metadata file.
        place: Place of the row, for errors.
        row: The row.

    Raises:
        ValueError: The row is invalid.
    """
    name, text = row.get("file_name"), find_caption(row)
    if text is None and any(column in row for column in CAPTION_COLUMNS):
        text = ""
    captions = (text,) if isinstance(text, str) else tuple(text) if isinstance(text, list) else ()
    if not isinstance(name, str) or not name or not captions or not all(map(is_text, captions)):
        raise ValueError(f"{place}: file_name and text are required, and must be strings, got {sorted(row)}")
    path = parent / name
    if not Path(os.path.abspath(path)).is_relative_to(os.path.abspath(folder)):
        raise ValueError(f"{place}: {name} is outside of {folder}")
    try:
        start, end = (None if row.get(key) in (None, "") else float(row[key]) for key in ("start", "end"))
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{place}: start and end must be numbers of seconds") from error
    if not 0 <= (start or 0.0) < (math.inf if end is None else end):
        raise ValueError(f"{place}: 0 <= start < end is required, got start={start}, end={end}")
    named = row.get(ACTION_COLUMN)
    if named is not None and (not is_text(named) or not named):
        raise ValueError(f"{place}: {ACTION_COLUMN} must be the name of a file, got {named!r}")
    actions = None if named is None else parent / named
    return Listed(path=path, captions=captions, start=start, end=end, root=folder, actions=actions)


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Which frames of a video make a clip.

    Raises:
        ValueError: A setting is out of range or unknown.
    """

    num_frames: int
    """Frames per clip."""
    kind: SamplingKind = "random"
    """`random`: a window of consecutive frames at a random position. `uniform`: frames spread evenly over the whole
    video. `segments`: one random frame from each of `num_frames` equal parts (temporal segment networks, arXiv
    1608.00859). `sliding`: all windows, `hop` frames apart."""
    frame_rate: float | None = None
    """Frames per second that videos are resampled to, before frames are chosen; `None` keeps a video's own rate."""
    stride: int = 1
    """Step between the frames of a `random` or `sliding` clip."""
    hop: int | None = None
    """Step between the starts of `sliding` windows; `None` puts them end to end."""
    short: Short = "skip"
    """How to treat videos with too few frames: `skip` them, or `pad` them with copies of the last frame, which are
    masked."""

    def __post_init__(self) -> None:
        """Checks the settings."""
        check_choice("kind", self.kind, SamplingKind)
        check_choice("short", self.short, Short)
        if min(self.num_frames, self.stride, 1 if self.hop is None else self.hop) < 1:
            raise ValueError(
                "num_frames, stride and hop must be at least 1, got "
                f"num_frames={self.num_frames}, stride={self.stride}, hop={self.hop}"
            )
        if self.frame_rate is not None and not self.frame_rate > 0:
            raise ValueError(f"frame_rate must be positive, got {self.frame_rate}")

    @property
    def spreads(self) -> bool:
        """Whether a clip is spread over its whole video."""
        return self.kind in ("uniform", "segments")

    @property
    def span(self) -> int:
        """Frames that a video needs for one clip, including those that `stride` skips."""
        return self.num_frames if self.spreads else (self.num_frames - 1) * self.stride + 1

    def clip_rate(self, available: int, frame_rate: float) -> float:
        """The frame rate of a clip from a video with `available` frames at `frame_rate`."""
        if self.spreads:
            return frame_rate * min(1.0, self.num_frames / available)
        return frame_rate / self.stride

    def num_clips(self, available: int) -> int:
        """Number of clips per epoch from a video with `available` frames."""
        if available < 1 or (available < self.span and self.short == "skip"):
            return 0
        if self.kind != "sliding" or available <= self.span:
            return 1
        return (available - self.span) // (self.hop or self.num_frames * self.stride) + 1

    def indices(self, available: int, clip: int = 0, rng: random.Random | None = None) -> tuple[list[int], int]:
        """The indices of a clip's frames, and how many of them are real; the others repeat the last real one.

        Args:
            available: Number of frames of the video, at least 1.
            clip: Index of the `sliding` window.
            rng: Random numbers for `random` and `segments`; `None` takes the middle.
        """
        if available < self.span:
            stride = 1 if self.spreads else self.stride
            real = (available - 1) // stride + 1
            return [min(index, real - 1) * stride for index in range(self.num_frames)], real
        if self.spreads:
            edges = [index * available // self.num_frames for index in range(self.num_frames + 1)]
            if self.kind == "uniform":
                last = max(1, self.num_frames - 1)
                return [round(index * (available - 1) / last) for index in range(self.num_frames)], self.num_frames
            parts = [(low, max(low, high - 1)) for low, high in itertools.pairwise(edges)]
            return [
                (low + high) // 2 if rng is None else rng.randint(low, high) for low, high in parts
            ], self.num_frames
        if self.kind == "sliding":
            first = clip * (self.hop or self.num_frames * self.stride)
        else:
            room = available - self.span
            first = room // 2 if rng is None else rng.randint(0, room)
        return [first + index * self.stride for index in range(self.num_frames)], self.num_frames


def warn_skipped(listed: Listed, reason: str) -> None:
    """Warns once per video and reason that a video is skipped, and counts the skipped videos."""
    reasons = _skipped.setdefault(listed.path, set())
    if reason not in reasons:
        reasons.add(reason)
        logger.warning(one_line(f"skipped ({len(_skipped)} so far): {listed.path}: {reason}"))


class Bucket(NamedTuple):
    """A shape that clips are resized and cropped to."""

    num_frames: int
    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.num_frames}x{self.height}x{self.width}"

    @classmethod
    def parse(cls, text: str) -> Bucket:
        """A bucket from FRAMESxHEIGHTxWIDTH.

        Raises:
            ValueError: The text has another form.
        """
        sides = text.lower().split("x")
        if len(sides) != 3 or not all(side.isdecimal() and int(side) for side in sides):
            raise ValueError(f"a bucket must have the form FRAMESxHEIGHTxWIDTH, such as 17x64x64, got {text}")
        return cls(*map(int, sides))


def choose_bucket(samplings: Mapping[Bucket, Sampling], num_frames: int, height: float, width: float) -> Bucket | None:
    """The bucket with the nearest aspect ratio; among equals, the one that uses the most frames of the video.

    Args:
        samplings: The buckets, with the sampling of each.
        num_frames: Number of frames of the video.
        height: Height of its frames. Only the ratio of `height` and `width` matters.
        width: Width of its frames, in the same unit.

    Returns:
        The bucket. If the video is too short for all buckets, `None`; or, with `short="pad"`, a bucket that needs the
        fewest frames.
    """
    needed = {bucket: sampling.span for bucket, sampling in samplings.items()}
    pads = any(sampling.short == "pad" for sampling in samplings.values())
    available = max(num_frames, min(needed.values())) if pads else num_frames
    fitting = [bucket for bucket, span in needed.items() if span <= available]

    def distance(bucket: Bucket) -> tuple[float, int, int]:
        ratio = (bucket.height / bucket.width) / (height / width)
        return max(ratio, 1 / ratio), -needed[bucket], -bucket.height * bucket.width

    return min(fitting, key=distance, default=None)


def sort_into_buckets(listed: Iterable[Listed], samplings: Mapping[Bucket, Sampling]) -> dict[Bucket, list[Listed]]:
    """Assigns each video to a bucket by `choose_bucket`. Unusable videos are skipped with a warning.

    Args:
        listed: Videos from `list_videos`.
        samplings: The buckets, with the sampling of each; all must have the same frame rate.
    """
    found: dict[Bucket, list[Listed]] = {bucket: [] for bucket in samplings}
    rate, listed = next(iter(samplings.values())).frame_rate, list(listed)
    shortest = min(sampling.span for sampling in samplings.values())
    for one in listed:
        try:
            info = one.info()
            available, _ = count_frames(one, info, rate)
        except (ValueError, OSError) as error:
            warn_skipped(one, str(error))
            continue
        bucket = choose_bucket(samplings, available, info.height, info.width * info.pixel_aspect_ratio)
        if bucket is None:
            warn_skipped(one, f"{available} frames; the shortest bucket needs {shortest}")
        else:
            found[bucket].append(one)
    save_indices(listed)
    return found


class Clip(NamedTuple):
    """The frames of a clip, with its captions and where it was taken from."""

    frames: np.ndarray
    """uint8 `(f, h, w, 3)`."""
    real: np.ndarray
    """bool `(f,)`, false where the last real frame is repeated."""
    captions: tuple[str, ...]
    frame_rate: float
    """Frames of the clip per second of video."""
    source: Listed
    first: float
    """Time of its first frame in the file, in seconds."""
    actions: np.ndarray | None = None
    """Actions of its frames `(f, a)`, NaN where they are unknown; `None` without."""


def stack_frames(clips: Sequence[Clip]) -> tuple[Tensor, Tensor]:
    """Frames of clips, uint8 `(b, f, h, w, 3)`, and which of them are real, bool `(b, f)`; on the CPU."""
    frames = torch.stack([torch.from_numpy(clip.frames) for clip in clips])
    return frames, torch.stack([torch.from_numpy(clip.real) for clip in clips])


def stack_actions(clips: Sequence[Clip]) -> Tensor | None:
    """Actions `(b, f, a)` of clips, NaN for those without; `None` if all are without."""
    width = next((clip.actions.shape[1] for clip in clips if clip.actions is not None), None)
    if width is None:
        return None
    unknown = np.full((len(clips[0].frames), width), np.nan, dtype=np.float32)
    return torch.stack([torch.from_numpy(unknown if one.actions is None else one.actions) for one in clips])


def stack_clips(clips: Sequence[Clip], device: torch.device) -> tuple[Tensor, Tensor]:
    """Stacks clips into a batch: pixels `(b, 3, f, h, w)` in [-1, 1], and which frames are real, bool `(b, f)`."""
    frames, real = stack_frames(clips)
    return from_frames(frames.to(device)), real.to(device)


class VideoFolder:
    """Clips of a folder of videos, indexed by number.

    On construction, each file that is not in the folder's index is opened to read its length. Files that cannot be
    read are skipped, and `skipped` has the reason. If a file turns out to be damaged later, it is added to `skipped`,
    and its clips are `None`.

    Args:
        folder: A folder for `list_videos`, or a list of videos.
        sampling: Which frames of a video make a clip.
        height: Height of the clips in pixels. Frames are cropped to this shape's aspect ratio and resized.
        width: Width of the clips in pixels.
        seed: Seed of random choices. A clip depends only on the seed, the epoch and its number.
        augmentation: Random augmentation of clips.
        quiet: Whether to skip files without a warning.

    Raises:
        FileNotFoundError: The folder does not exist.
        ValueError: It lists no videos, or none of them can be used; the message has the first reasons.
    """

    def __init__(
        self,
        folder: Path | Iterable[Listed],
        sampling: Sampling,
        height: int,
        width: int,
        seed: int = 0,
        augmentation: Augmentation | None = None,
        quiet: bool = False,
    ) -> None:
        listed = list_videos(folder) if isinstance(folder, Path) else list(folder)
        self.sampling, self.size, self.seed, self.augmentation = sampling, (height, width), seed, augmentation
        self.quiet = quiet
        self.skipped: dict[Listed, str] = {}
        # with its number in the video, and frames, rate and aspect ratio of pixels of that
        self.clips: list[tuple[Listed, int, int, float, float]] = []
        for one in listed:
            if one.actions is not None:
                check_augmentation(augmentation or Augmentation(), one.actions)
            try:
                info = one.info()
                available, frame_rate = count_frames(one, info, sampling.frame_rate)
            except (ValueError, OSError) as error:
                self._skip(one, str(error))
                continue
            count = sampling.num_clips(available)
            if not count:
                reason = f"{available} frames at {frame_rate:g} per second; a clip needs {sampling.span}"
                self._skip(one, reason)
            aspect = info.pixel_aspect_ratio
            self.clips += [(one, number, available, frame_rate, aspect) for number in range(count)]
        save_indices(listed)
        if not self.clips:
            reasons = "; ".join(f"{one.path}: {reason}" for one, reason in list(self.skipped.items())[:3])
            raise ValueError(f"none of {len({one.path for one in listed})} videos can be used: {reasons}")

    def __len__(self) -> int:
        return len(self.clips)

    @property
    def digest(self) -> str:
        """Digest of the names of the videos and their numbers of clips, which decide what clip a number refers to."""
        names = [f"{listed.path.name} {number}" for listed, number, *_ in self.clips]
        return hashlib.sha256("\n".join(names).encode(errors="surrogateescape")).hexdigest()

    def __getitem__(self, index: int) -> Clip | None:
        """A clip of epoch 0."""
        return self.clip(index)

    def clip(self, index: int, epoch: int = 0, offset: tuple[float, float] | None = None) -> Clip | None:
        """A clip, or `None` if its file is damaged; `skipped` then has the reason.

        Args:
            index: Number of the clip.
            epoch: Epoch, for random choices.
            offset: Position of the crop as in `Fit`; `None` leaves it to the augmentation.
        """
        listed, number, available, frame_rate, aspect = self.clips[index]
        rng = random.Random((self.seed * 1_000_003 + epoch) * 1_000_003 + index)
        indices, real = self.sampling.indices(available, number, rng)
        begin = (listed.start or 0.0) + indices[0] / frame_rate
        wanted, last = {place - indices[0] for place in indices}, indices[-1] - indices[0]
        found: dict[int, np.ndarray] = {}
        try:
            frames = iter_video(listed.file(), start=begin, end=listed.end, frame_rate=frame_rate)
            for place, frame in enumerate(itertools.islice(frames, last + 1)):
                if place in wanted:
                    found[place] = frame
        except (ValueError, OSError) as error:
            self._skip(listed, str(error))
            return None
        missing = wanted - set(found)
        if missing and (self.sampling.short == "skip" or not found):
            self._skip(listed, "it has fewer frames than its header says")
            return None
        real = sum(1 for place in indices[:real] if place - indices[0] in found)
        kept = [found.get(place - indices[0], found[max(found)]) for place in indices]
        augmentation, seed = self.augmentation or Augmentation(), rng.getrandbits(62)
        fit = Fit(kept[0].shape[:2], self.size, aspect, offset or draw_offset(augmentation, seed))
        pixels = augment(fit.to_target(np.stack(kept)), augmentation, seed, real)
        rate = self.sampling.clip_rate(available, frame_rate)
        try:
            actions = None if listed.actions is None else actions_of(listed, frame_rate, indices, real)
        except (ValueError, OSError) as error:
            self._skip(listed, str(error))
            return None
        return Clip(pixels, np.arange(len(indices)) < real, listed.captions, rate, listed, begin, actions)

    def _skip(self, listed: Listed, reason: str) -> None:
        self.skipped[listed] = reason
        if not self.quiet:
            warn_skipped(listed, reason)

    def sample(self, number: int) -> Clip:
        """The `number`-th clip of an endless sequence of epochs, each of which is shuffled.

        Raises:
            ValueError: All files have turned out to be damaged.
        """
        epoch, place = divmod(number, len(self))
        order = _order(len(self), self.seed, epoch)
        for index in itertools.chain(order[place:], order[:place]):  # the next clip replaces a damaged one
            clip = self.clip(int(index), epoch)
            if clip is not None:
                return clip
        raise ValueError(f"none of {len(self)} clips can be read: {next(iter(self.skipped.values()))}")


def actions_of(listed: Listed, frame_rate: float, indices: list[int], real: int) -> np.ndarray:
    """The actions of a clip of a video or segment, whose frames have these indices; see `cut_actions`."""
    assert listed.actions is not None
    info, first = listed.info(), round((listed.start or 0.0) * frame_rate)
    return cut_actions(listed.actions, info.num_frames, info.frame_rate, frame_rate, first, indices, real)


@lru_cache(maxsize=4)
def _order(size: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(size)


def draw_frame_rates(frame_rates: Sequence[Rate], seed: int, indices: Iterable[int]) -> list[Rate]:
    """Draws a frame rate for each clip, all equally likely; the result depends only on the seed and its number."""
    return [random.Random(seed * 1_000_003 + index).choice(frame_rates) for index in indices]


def count_frames(listed: Listed, info: VideoInfo, frame_rate: float | None) -> tuple[int, float]:
    """The number of frames of a listed video or segment at a frame rate (by default its own), and that frame rate.

    Raises:
        ValueError: The file is damaged, its frame rate is unknown, or it ends before the segment begins.
    """
    if info.damage is not None:
        raise ValueError(info.damage)
    rate = frame_rate or info.frame_rate
    if rate is None or info.duration is None:
        raise ValueError(f"{listed.path}: its frame rate is unknown")
    start = listed.start or 0.0
    if start >= info.duration:
        raise ValueError(f"{listed.path} ends at {info.duration:g} s, before the listed segment begins at {start:g} s")
    return resampled_length(info.duration, rate, start, math.inf if listed.end is None else listed.end), rate
