"""A folder of one's own videos as clips: captions, which frames of each, and what becomes of damaged ones."""

from __future__ import annotations

import csv
import hashlib
import itertools
import json
import random
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from diffusers.utils import logging
from einops import rearrange
from torch import Tensor

from vgen.data.augment import Augmentation, augment
from vgen.data.memory_file import MemoryFile
from vgen.data.resize import Fit
from vgen.data.video_index import index_of, probe_once
from vgen.data.video_io import VIDEO_SUFFIXES, VideoInfo, iter_video, video_info

logger = logging.get_logger(__name__)
_skipped: set[tuple[Path, str]] = set()
Rate = TypeVar("Rate")
SAMPLINGS = ("random", "uniform", "segments", "sliding")


@dataclass(frozen=True, kw_only=True)
class Listed:
    """A video, or a part of one, as a folder lists it; nothing of it was read yet."""

    path: Path
    captions: tuple[str, ...] = ("",)
    """Wordings of what it shows."""
    start: float | None = None
    """Seconds; `None` for the start of the file."""
    end: float | None = None
    """Seconds; `None` for its end."""
    content: Callable[[], bytes] | None = field(default=None, compare=False)
    """Fetches the file where it does not lie at `path`, which then is a name alone."""
    root: Path | None = field(default=None, compare=False)
    """The folder that lists it, where its index is."""
    identity: Hashable = field(default=None, compare=False)
    """What a fetched file is known by, so that it is probed once; `None` probes it each time."""

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
            raise OSError(f"it cannot be fetched: {error}") from error


def _save_indices(listed: Iterable[Listed]) -> None:
    for root in {one.root for one in listed}:
        if root is not None:
            index_of(root).save()


def list_videos(folder: Path) -> list[Listed]:
    """The videos of a folder with their captions, in a fixed order.

    Captions come from `metadata.jsonl` or `metadata.csv` with `file_name`, `text` (in jsonl also a list of wordings)
    and optionally `start` and `end` in seconds, as in Hugging Face's `videofolder`; without such a file from a `.txt`
    beside each video, one wording a line. A video without one has an empty caption.

    Args:
        folder: Searched with its subfolders where no metadata lists its files.

    Raises:
        FileNotFoundError: There is no such folder.
        ValueError: There are no videos, there is metadata of both kinds, or a row of it cannot be used.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    tables = [folder / name for name in ("metadata.jsonl", "metadata.csv") if (folder / name).is_file()]
    if len(tables) > 1:
        raise ValueError(f"{folder} has metadata.jsonl and metadata.csv: keep the one that counts")
    if tables:
        listed = [_listed_row(folder, tables[0], number, row) for number, row in _rows(tables[0])]
    else:
        paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in VIDEO_SUFFIXES)
        listed = [Listed(path=path, captions=_beside(path), root=folder) for path in paths]
    if not listed:
        raise ValueError(f"{folder} holds no videos ({', '.join(VIDEO_SUFFIXES)}) and lists none")
    return listed


def _rows(table: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows with the numbers of their lines."""
    with table.open(encoding="utf-8-sig", newline="") as file, _named(table):
        if table.suffix == ".csv":
            reader = csv.DictReader(file)
            for row in reader:
                if None in row:
                    raise ValueError(
                        f"{table}, line {reader.line_num}: more fields than the first line names: put text with "
                        "commas in double quotes"
                    )
                yield reader.line_num, row
            return
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{table}, line {number}: this is no JSON ({error})") from error
            if not isinstance(row, dict):
                raise ValueError(f"{table}, line {number}: give an object with file_name and text")
            yield number, row


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Names the file that is no UTF-8."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8: {error}") from error


def _listed_row(folder: Path, table: Path, number: int, row: dict[str, Any]) -> Listed:
    name, text = row.get("file_name"), row.get("text")
    captions = (text,) if isinstance(text, str) else tuple(text) if isinstance(text, list) else ()
    if not name or not captions or not all(isinstance(caption, str) for caption in captions):
        raise ValueError(f"{table}, line {number}: file_name and text are needed, got {sorted(row)}")
    path = (folder / name).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise ValueError(f"{table}, line {number}: {name} lies outside {folder}")
    try:
        start, end = (None if row.get(key) in (None, "") else float(row[key]) for key in ("start", "end"))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{table}, line {number}: start and end must be seconds") from error
    if (start or 0.0) < 0 or (end is not None and end <= (start or 0.0)):
        raise ValueError(f"{table}, line {number}: start={start}, end={end} is no part of a video")
    return Listed(path=folder / name, captions=captions, start=start, end=end, root=folder)


def _beside(path: Path) -> tuple[str, ...]:
    text = path.with_suffix(".txt")
    with _named(text):
        lines = text.read_text(encoding="utf-8").splitlines() if text.is_file() else []
    return tuple(line.strip() for line in lines if line.strip()) or ("",)


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Which frames of a video make a clip.

    Raises:
        ValueError: A setting is out of range or unknown.
    """

    num_frames: int
    """Of a clip."""
    kind: str = "random"
    """`random`: consecutive ones from a random place. `uniform`: evenly over the whole video. `segments`: one at
    random from each of `num_frames` equal parts (temporal segment networks, arXiv 1608.00859). `sliding`: every
    window."""
    frame_rate: float | None = None
    """Frames per second that a video is resampled to before its frames are counted; `None` takes its own."""
    stride: int = 1
    """From one frame of a `random` or `sliding` clip to the next."""
    hop: int | None = None
    """From one `sliding` window to the next; `None` lets them follow without a gap."""
    short: str = "skip"
    """What becomes of videos with too few frames: `skip`, or `pad`, which repeats the last one under a mask."""

    def __post_init__(self) -> None:
        """Refuses what cannot work."""
        if self.kind not in SAMPLINGS or self.short not in ("skip", "pad"):
            raise ValueError(
                f"kind={self.kind!r}, short={self.short!r}: give one of {', '.join(SAMPLINGS)}; skip or pad"
            )
        if min(self.num_frames, self.stride, 1 if self.hop is None else self.hop) < 1:
            raise ValueError(f"num_frames={self.num_frames}, stride={self.stride}, hop={self.hop} must be at least 1")
        if self.frame_rate is not None and not self.frame_rate > 0:
            raise ValueError(f"frame_rate={self.frame_rate} must be positive")

    @property
    def spreads(self) -> bool:
        """Whether a clip is spread over its whole video."""
        return self.kind in ("uniform", "segments")

    @property
    def span(self) -> int:
        """Frames that a clip needs, those between its own included."""
        return self.num_frames if self.spreads else (self.num_frames - 1) * self.stride + 1

    def clip_rate(self, available: int, frame_rate: float) -> float:
        """Frames of a clip per second of what it shows, of a video of so many frames at a rate."""
        if self.spreads:
            return frame_rate * min(1.0, self.num_frames / available)
        return frame_rate / self.stride

    def num_clips(self, available: int) -> int:
        """How many clips a video of so many frames gives in an epoch."""
        if available < 1 or (available < self.span and self.short == "skip"):
            return 0
        if self.kind != "sliding" or available <= self.span:
            return 1
        return (available - self.span) // (self.hop or self.num_frames * self.stride) + 1

    def indices(self, available: int, clip: int = 0, rng: random.Random | None = None) -> tuple[list[int], int]:
        """The frames of a clip, and how many of them are real; the rest repeats the last real one.

        Args:
            available: Frames of the video, at least 1.
            clip: Which `sliding` window.
            rng: For `random` and `segments`; `None` takes the middle.
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
    """Names a video that cannot be used, each one once, with how many there are by now."""
    if (listed.path, reason) not in _skipped:
        _skipped.add((listed.path, reason))
        logger.warning(f"skipped ({len(_skipped)} so far): {listed.path}: {reason}")


class Bucket(NamedTuple):
    """A shape that clips are brought to."""

    num_frames: int
    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.num_frames}x{self.height}x{self.width}"

    @classmethod
    def parse(cls, text: str) -> Bucket:
        """A bucket from FRAMESxHEIGHTxWIDTH.

        Raises:
            ValueError: It has another form.
        """
        sides = text.lower().split("x")
        if len(sides) != 3 or not all(side.isdecimal() and int(side) for side in sides):
            raise ValueError(f"bucket {text} is no FRAMESxHEIGHTxWIDTH, such as 17x64x64")
        return cls(*map(int, sides))


def choose_bucket(samplings: Mapping[Bucket, Sampling], num_frames: int, height: int, width: int) -> Bucket | None:
    """The bucket of the nearest shape of frame, and of those the one that takes the longest stretch of a video.

    Args:
        samplings: What there is, and how its clips are taken.
        num_frames: Of the video.
        height: Of its frames, in pixels; like `width` it counts as a ratio.
        width: Of its frames.

    Returns:
        `None` if all need more frames; where such a video may be padded, one that needs the fewest.
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
    """The videos for which `choose_bucket` chooses each one; those that cannot be used are nobody's, and are told.

    Args:
        listed: As `list_videos` gives them.
        samplings: As there, all at one frame rate.
    """
    found: dict[Bucket, list[Listed]] = {bucket: [] for bucket in samplings}
    rate, listed = next(iter(samplings.values())).frame_rate, list(listed)
    shortest = min(sampling.span for sampling in samplings.values())
    for one in listed:
        try:
            info, available = one.info(), count_frames(one, rate)[0]
        except (ValueError, OSError) as error:
            warn_skipped(one, str(error))
            continue
        bucket = choose_bucket(samplings, available, info.height, info.width)
        if bucket is None:
            warn_skipped(one, f"{available} frames; the shortest bucket needs {shortest}")
        else:
            found[bucket].append(one)
    _save_indices(listed)
    return found


class Clip(NamedTuple):
    """Frames for training, and what is known of them."""

    frames: np.ndarray
    """uint8 `(f, h, w, 3)`."""
    real: np.ndarray
    """bool `(f,)`, false where the last real frame is repeated."""
    captions: tuple[str, ...]
    frame_rate: float
    """Frames of the clip per second of what it shows."""
    source: Listed
    first: float
    """Seconds from the start of the file to its first frame."""


def stack_frames(clips: Sequence[Clip]) -> tuple[Tensor, Tensor]:
    """Frames of clips as uint8 `(b, f, h, w, 3)`, and bool `(b, f)`, which of them are real; on the CPU."""
    frames = torch.stack([torch.from_numpy(clip.frames) for clip in clips])
    return frames, torch.stack([torch.from_numpy(clip.real) for clip in clips])


def frames_to_pixels(frames: Tensor) -> Tensor:
    """Pixels `(b, 3, f, h, w)` in [-1, 1] of frames `(b, f, h, w, 3)`, uint8."""
    return rearrange(frames, "b f h w c -> b c f h w").float() / 127.5 - 1


def stack_clips(clips: Sequence[Clip], device: torch.device) -> tuple[Tensor, Tensor]:
    """Clips as one batch: pixels `(b, 3, f, h, w)` in [-1, 1], and bool `(b, f)`, which frames are real."""
    frames, real = stack_frames(clips)
    return frames_to_pixels(frames.to(device)), real.to(device)


class VideoFolder:
    """Clips of a folder of videos, by number.

    Opening it reads the first frame of each file, for its length, unless the folder's index has it from an earlier
    time. A file that cannot be read is left out and stands in `refused` with the reason; so does one that turns out to
    be damaged later, and its clips are `None`.

    Args:
        folder: As `list_videos` takes it, or the list.
        sampling: Which frames make a clip.
        height: Of the frames, in pixels; the middle of a video is cropped to this shape.
        width: Of the frames.
        seed: Of random choices: a clip is a function of the seed, the epoch and its number alone.
        augmentation: What else may change in a clip.
        quiet: Whether no warning names a file that is left out.

    Raises:
        FileNotFoundError: There is no such folder.
        ValueError: It lists no videos, or none of them can be used; the first reasons are named.
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
        self.clips: list[tuple[Listed, int, int, float]] = []  # with its number in the video, frames and rate of that
        for one in listed:
            try:
                available, frame_rate = count_frames(one, sampling.frame_rate)
            except (ValueError, OSError) as error:
                self._skip(one, str(error))
                continue
            count = sampling.num_clips(available)
            if not count:
                reason = f"{available} frames at {frame_rate:g} per second; a clip needs {sampling.span}"
                self._skip(one, reason)
            self.clips += [(one, number, available, frame_rate) for number in range(count)]
        _save_indices(listed)
        if not self.clips:
            reasons = "; ".join(f"{one.path}: {reason}" for one, reason in list(self.skipped.items())[:3])
            raise ValueError(f"none of {len(listed)} videos can be used: {reasons}")

    def __len__(self) -> int:
        return len(self.clips)

    @property
    def digest(self) -> str:
        """Of the videos' names and of how many clips each has, on which depends what a number stands for."""
        names = [f"{listed.path.name} {number}" for listed, number, *_ in self.clips]
        return hashlib.sha256("\n".join(names).encode()).hexdigest()

    def __getitem__(self, index: int) -> Clip | None:
        """A clip of epoch 0."""
        return self.clip(index)

    def clip(self, index: int, epoch: int = 0) -> Clip | None:
        """A clip, or `None` where its file is damaged; then `refused` tells why."""
        listed, number, available, frame_rate = self.clips[index]
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
            self._skip(listed, "it has fewer frames than it says it has")
            return None
        real = sum(1 for place in indices[:real] if place - indices[0] in found)
        kept = [found.get(place - indices[0], found[max(found)]) for place in indices]
        pixels = Fit(kept[0].shape[:2], self.size).to_target(np.stack(kept))
        if self.augmentation is not None:
            pixels = augment(pixels, self.augmentation, rng.getrandbits(62))
        rate = self.sampling.clip_rate(available, frame_rate)
        return Clip(pixels, np.arange(len(indices)) < real, listed.captions, rate, listed, begin)

    def _skip(self, listed: Listed, reason: str) -> None:
        self.skipped[listed] = reason
        if not self.quiet:
            warn_skipped(listed, reason)

    def sample(self, number: int) -> Clip:
        """The clip that is drawn as the `number`-th when epochs, each in an order of its own, follow one another.

        Raises:
            ValueError: Every file is damaged by now.
        """
        epoch, place = divmod(number, len(self))
        order = _order(len(self), self.seed, epoch)
        for index in itertools.chain(order[place:], order[:place]):  # the next one stands in for a damaged one
            clip = self.clip(int(index), epoch)
            if clip is not None:
                return clip
        raise ValueError(f"none of {len(self)} clips can be read any more: {next(iter(self.skipped.values()))}")


@lru_cache(maxsize=4)
def _order(size: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(size)


def draw_frame_rates(frame_rates: Sequence[Rate], seed: int, indices: Iterable[int]) -> list[Rate]:
    """One of the frame rates for each clip, drawn evenly; its number decides."""
    return [random.Random(seed * 1_000_003 + index).choice(frame_rates) for index in indices]


def count_frames(listed: Listed, frame_rate: float | None) -> tuple[int, float]:
    """Frames of a listed part at a rate, its own by default, and that rate.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It cannot be read, does not tell its length, or ends before the part begins.
    """
    info = listed.info()
    rate = frame_rate or info.frame_rate
    if rate is None or info.duration is None:
        raise ValueError(f"{listed.path} tells no frame rate or length")
    begin, end = listed.start or 0.0, min(info.duration, info.duration if listed.end is None else listed.end)
    if begin >= info.duration:
        raise ValueError(f"{listed.path} ends at {info.duration:g} s, before this part begins at {begin:g} s")
    return max(1, round((end - begin) * rate - 1e-6)), rate
