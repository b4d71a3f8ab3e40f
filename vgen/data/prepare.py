"""Small copies of the videos of any source, in one folder for training and one of held-out videos."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePath
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from vgen.checks import check_integer, check_number
from vgen.data.clips import Listed, Sampling, count_frames, save_indices
from vgen.data.inspection import Original, Survey, draw_files, first_reasons, list_originals
from vgen.data.resize import Fit, enlarge
from vgen.data.video_io import VideoInfo, VideoWriter, iter_video
from vgen.data.video_writer import check_frame_rate
from vgen.io.atomic import atomic_file, remove_workspaces, write_text
from vgen.io.fingerprint import digest_json, file_digest
from vgen.io.records import check_settings
from vgen.io.remote import is_url
from vgen.machine import GIB
from vgen.processes import locked_output_dir, rank_and_world_size

FORMAT = "vgen-videos-1"
SUMMARY = "summary.json"
METADATA = "metadata.jsonl"
MIN_FILES = 5
"""Number of files below which each video is split in time."""
HELD_OUT_TIME = 1 / 5
"""Fraction of the time of each video that is then held out."""
CRF = 12
KEYFRAME_INTERVAL = 12
BYTES_PER_PIXEL = 0.5
"""A rough upper bound for copies; typical are 0.1 to 0.25."""
PICTURE_SIZE = 128
"""Least height and width of each picture of `pictures.png`, in pixels."""
NUM_PICTURES = 4
Side = Literal["train", "held_out"]
SplitKind = Literal["video", "time", "given"]


@dataclass(kw_only=True)
class PrepareConfig:
    """Settings of the copies."""

    data: str
    """A folder of videos or another source of `vgen.data.sources.open_clips`."""
    output_dir: str | Path
    """Folder for the copies, outside of the folder of videos."""
    height: int = 64
    """Height of training clips in pixels."""
    width: int = 64
    """Width of training clips in pixels."""
    num_frames: int = 17
    """Frames per training clip. Shorter videos are not copied."""
    frame_rate: float | None = None
    """Frame rate of training clips in frames per second; `None` keeps that of each video. Copies always keep it."""
    held_out: str | None = None
    """Source of the held-out videos; `None` takes a part of `data`."""
    held_out_share: float = 0.1
    """Fraction of the videos that is held out, at least one."""
    max_videos: int | None = None
    """Maximum number of videos to copy from each source: random ones, or the first ones of a stream; `None` copies
    all."""
    seed: int = 0
    """Seed of random choices: which videos are copied, and which are held out."""
    margin: float = 1.5
    """Size of the copies relative to training clips. Larger copies leave room for random crops."""

    def check(self) -> None:
        """Checks the settings.

        Raises:
            ValueError: A setting is out of range.
        """
        for name in ("height", "width", "num_frames"):
            check_integer(name, getattr(self, name), 1)
        if self.max_videos is not None:
            check_integer("max_videos", self.max_videos, 1)
        if self.frame_rate is not None:
            check_frame_rate(self.frame_rate)
        check_number("held_out_share", self.held_out_share, above=0, below=1)
        check_number("margin", self.margin, 1)
        if is_url(self.output_dir):
            raise ValueError(f"output_dir must be a local folder, got {self.output_dir}")
        for source in filter(None, (self.data, self.held_out)):
            if Path(self.output_dir).resolve().is_relative_to(Path(source).resolve()):
                raise ValueError(
                    f"output_dir={self.output_dir} is in {source}, where copies would count as videos: choose a "
                    "folder outside"
                )


class Part(NamedTuple):
    """What becomes one copy: a video, or a part of one."""

    original: Original
    side: Side
    name: str
    """Name of the copy."""

    @classmethod
    def of(cls, original: Original, side: Side, start: float | None = None, end: float | None = None) -> Part:
        """The part from `start` to `end`; `None` means the start or end of what is listed."""
        listed = original.listed
        key = digest_json([original.file, listed.start, listed.end])[:8]
        stem = re.sub(r"\W+", "-", PurePath(original.file).stem).strip("-_")[:40] or "video"
        start, end = listed.start if start is None else start, listed.end if end is None else end
        return cls(original._replace(listed=replace(listed, start=start, end=end)), side, f"{stem}-{key}.mp4")


def prepare(config: PrepareConfig) -> dict[str, Any]:
    """Writes copies of videos, and `summary.json` and `pictures.png`. A second call with the same settings resumes.

    The folders `train` and `held_out` each have a `metadata.jsonl` with captions and the path of each original. Files
    are split as a whole, at random. With fewer than `MIN_FILES`, the end of each is held out instead.

    Returns:
        The content of `summary.json`: `format`; `settings`; `split` (`video`, `time`, or `given` with `held_out`);
        numbers of `videos` (original files) and `captioned` ones; for each of `train` and `held_out` the numbers of
        `videos` (copies), `captioned` ones, `frames`, `seconds` and `clips` (end to end); `sizes` and `frame_rates` of
        the originals, with the number of files of each; `refused` with path and reason.

    Raises:
        FileNotFoundError: A source does not exist.
        ValueError: A setting is invalid, the folder has copies with other settings, a source has no usable videos, or
            nothing is left to hold out.
        OSError: The folder is not writable, or too small for the copies.
        ImportError: The library that reads a source is not installed.
    """
    config.check()
    if rank_and_world_size()[1] > 1:
        raise ValueError("videos are prepared by one process: start it without a launcher")
    folder = Path(config.output_dir)
    sampling = Sampling(num_frames=config.num_frames, kind="sliding", frame_rate=config.frame_rate)
    survey = Survey(sampling)
    split, parts = plan(config, survey)
    with locked_output_dir(folder):
        for side in get_args(Side):
            (folder / side).mkdir(exist_ok=True)
        settings = {name: value for name, value in vars(config).items() if name != "output_dir"}
        digest = digest_json([_identity(part) for part in parts]) if isinstance(parts, list) else None
        if isinstance(parts, list):
            _check_space(config, folder, parts)
        check_settings(folder, settings | {"split": split, "videos": digest}, ["*/*.mp4"])
        if isinstance(parts, list):
            for side in get_args(Side):
                remove_workspaces(folder / side, {part.name for part in parts})
        copied = list(_copied(config, folder, parts, split, survey))
        if split == "video":
            copied = _split_by_file(config, folder, copied)
        if {part.side for part in copied} != set(get_args(Side)):
            reasons = first_reasons(survey.refused) or "all have the same content"
            raise ValueError(f"too few videos are left to train on some and hold out others: {reasons}")
        copies = {
            side: _write_metadata(folder / side, [part for part in copied if part.side == side])
            for side in get_args(Side)
        }
        _write_pictures(config, folder / "pictures.png", copies["train"])
        files = {part.original.listed.path for part in copied}
        captioned = {part.original.listed.path for part in copied if any(part.original.listed.captions)}
        summary: dict[str, Any] = {"format": FORMAT, "settings": settings, "split": split}
        summary |= {"videos": len(files), "captioned": len(captioned)}
        summary |= {side: _counts(copies[side], sampling) for side in get_args(Side)}
        summary |= {"sizes": survey.sizes, "frame_rates": survey.frame_rates, "refused": survey.refused}
        write_text(folder / SUMMARY, json.dumps(summary, indent=1))
    return summary


def plan(config: PrepareConfig, survey: Survey) -> tuple[SplitKind, Iterable[Part]]:
    """Decides how videos are split and what is copied: a list, or an iterator for streams.

    If they are split by file, all parts are first of `train`, because some may turn out to be damaged.

    Raises:
        ValueError: There are no usable videos, or none of them can be split.
    """
    usable = _usable(config.data, config, survey)
    if config.held_out is not None:
        held_out = _usable(config.held_out, config, survey)
        if isinstance(held_out, list):
            paths = {os.path.realpath(one.listed.path) for one in held_out if one.listed.content is None}
            usable = _without(usable, paths)
        if isinstance(usable, list) and not usable:
            raise ValueError(
                f"all videos of {config.data} are in held_out={config.held_out}: none is left to train on"
            )
        parts = itertools.chain(
            (Part.of(one, "train") for one in usable), (Part.of(one, "held_out") for one in held_out)
        )
        return "given", list(parts) if isinstance(usable, list) and isinstance(held_out, list) else parts
    first = usable if isinstance(usable, list) else list(itertools.islice(usable, MIN_FILES))
    files: dict[str, list[Original]] = {}
    for one in first:
        files.setdefault(one.file, []).append(one)
    if len(files) < MIN_FILES:
        return "time", _split_in_time(files.values(), survey.sampling)
    if isinstance(usable, list):
        return "video", [Part.of(one, "train") for one in usable]
    return "video", (Part.of(one, "train") for one in itertools.chain(first, usable))


def _usable(data: str, config: PrepareConfig, survey: Survey) -> list[Original] | Iterator[Original]:
    """The usable videos of a source, all of them at once unless it is a stream."""
    listed = list_originals(data, config.num_frames, config.max_videos, config.seed)
    if not isinstance(listed, list):
        return survey.usable(listed)
    usable = list(survey.usable(listed))
    save_indices(listed)
    if not usable:
        raise survey.nothing_usable(data, listed)
    return usable


def _without(videos: list[Original] | Iterator[Original], paths: set[str]) -> list[Original] | Iterator[Original]:
    others = (one for one in videos if os.path.realpath(one.listed.path) not in paths)
    return list(others) if isinstance(videos, list) else others


def _split_in_time(files: Iterable[list[Original]], sampling: Sampling) -> list[Part]:
    """Holds out the last part of each file; a file too short for a clip on both sides is only trained on.

    Args:
        files: The segments of each file.
        sampling: Which frames make a clip.

    Raises:
        ValueError: No file is long enough.
    """
    parts = []
    for segments in files:
        cut = _time_to_cut(segments, sampling)
        before = [Part.of(one, "train", end=min(cut, one.listed.end or cut)) for one in segments]
        after = [Part.of(one, "held_out", start=max(cut, one.listed.start or 0.0)) for one in segments]
        before, after = ([part for part in side if _has_clip(part, sampling)] for side in (before, after))
        parts += before + after if before and after else [Part.of(one, "train") for one in segments]
    if all(part.side == "train" for part in parts):
        raise ValueError(
            f"there are fewer than {MIN_FILES} videos, and none is long enough to hold out its end, because a clip of "
            f"{sampling.span} frames (num_frames) must fit into both parts: add videos, or set held_out to others"
        )
    return parts


def _time_to_cut(segments: list[Original], sampling: Sampling) -> float:
    """When the held-out part of a file begins, in seconds: at a frame."""
    info = segments[0].info
    assert info.frame_rate is not None and info.duration is not None  # those of usable videos are known
    begin = min(one.listed.start or 0.0 for one in segments)
    end = max(min(one.listed.end or math.inf, info.duration) for one in segments)
    length = max(HELD_OUT_TIME * (end - begin), sampling.span / (sampling.frame_rate or info.frame_rate))
    return max(0.0, math.floor((end - length) * info.frame_rate + 1e-6) / info.frame_rate)


def _has_clip(part: Part, sampling: Sampling) -> bool:
    (listed, info), begin = part.original, part.original.listed.start or 0.0
    if listed.end is not None and listed.end <= begin or begin >= (info.duration or 0):
        return False
    return sampling.num_clips(count_frames(listed, info, sampling.frame_rate)[0]) > 0


def _identity(part: Part) -> list[Any]:
    """What an interrupted run and the one that resumes it must have in common."""
    listed = part.original.listed
    size = None if listed.content else listed.path.stat().st_size
    return [part.original.file, part.side, listed.start, listed.end, listed.captions, size]


def _check_space(config: PrepareConfig, folder: Path, parts: list[Part]) -> None:
    """Checks that the disk has space for the copies that are missing.

    Raises:
        OSError: It has too little.
    """
    missing = (part for part in parts if not any((folder / side / part.name).exists() for side in get_args(Side)))
    gib = sum(map(partial(_num_bytes, config), missing)) / GIB
    free = shutil.disk_usage(folder).free / GIB
    if gib > free:
        raise OSError(
            f"the copies may need {gib:.3g} GiB, but {folder} has {free:.3g} GiB free: free some, or set max_videos"
        )


def _num_bytes(config: PrepareConfig, part: Part) -> float:
    (listed, info), (height, width) = part.original, copy_size(config, part.original.info)
    num_frames, _ = count_frames(listed, info, info.frame_rate)
    return BYTES_PER_PIXEL * height * width * num_frames


def copy_size(config: PrepareConfig, info: VideoInfo) -> tuple[int, int]:
    """Height and width of a copy in pixels: even, with the aspect ratio of the video, not larger than the video."""
    sides = info.height, info.width * info.pixel_aspect_ratio
    scale = min(1.0, config.margin * max(config.height / sides[0], config.width / sides[1]))
    height, width = (max(2, min(2 * round(side * scale / 2), int(side) // 2 * 2)) for side in sides)
    return height, width


def _copied(
    config: PrepareConfig, folder: Path, parts: Iterable[Part], split: SplitKind, survey: Survey
) -> Iterator[Part]:
    """Writes the copies that are missing, and yields all that can be made. Their `side` is where they are.

    What is yielded does not keep the content of streamed files in memory.
    """
    for part in tqdm(parts, unit="video"):
        sides = get_args(Side) if split == "video" else (part.side,)
        existing = next((side for side in sides if (folder / side / part.name).exists()), None)
        try:
            if existing is None:
                _write_copy(part, folder / part.side / part.name, config)
            listed = replace(part.original.listed, content=None)
            yield part._replace(side=existing or part.side, original=part.original._replace(listed=listed))
        except UnreadableError as error:
            survey.refuse(part.original.listed, str(error))


class UnreadableError(ValueError):
    """An original cannot be read to its end."""


def _write_copy(part: Part, path: Path, config: PrepareConfig) -> None:
    """Writes a copy.

    Raises:
        UnreadableError: The original is damaged, or cannot be fetched.
        OSError: Writing failed.
    """
    listed, info = part.original
    size = copy_size(config, info)
    fit = Fit((info.height, info.width), size, info.pixel_aspect_ratio)
    assert info.frame_rate is not None  # that of usable videos is known
    # yuv420p would halve the color detail of frames that are small already
    options: dict[str, Any] = {"pixel_format": "yuv444p", "crf": CRF, "keyframe_interval": KEYFRAME_INTERVAL}
    with VideoWriter(path, info.frame_rate, **options) as writer:
        for frame in _frames(listed, info.frame_rate):
            writer.append(fit.to_target(frame[None]))


def _frames(listed: Listed, frame_rate: float) -> Iterator[np.ndarray]:
    """The frames of a video or segment, at a constant rate.

    Raises:
        UnreadableError: As in `_write_copy`.
    """
    try:
        yield from iter_video(listed.file(), start=listed.start, end=listed.end, frame_rate=frame_rate)
    except (ValueError, OSError) as error:
        raise UnreadableError(str(error)) from error


def _split_by_file(config: PrepareConfig, folder: Path, copied: list[Part]) -> list[Part]:
    """Moves the copies of some files to the held-out ones. Files with the same content stay on one side."""
    contents: dict[str, list[str]] = {}
    for part in copied:
        contents.setdefault(part.original.file, []).append(file_digest(folder / part.side / part.name))
    names: dict[str, str] = {}  # of the first file with the same content
    first: dict[tuple[str, ...], str] = {}
    for file, digests in sorted(contents.items()):
        names[file] = first.setdefault(tuple(digests), file)
    count = min(max(1, round(config.held_out_share * len(first))), len(first) - 1)
    held_out = draw_files(first.values(), count, f"held out {config.seed}")
    moved = []
    for part in copied:
        side: Side = "held_out" if names[part.original.file] in held_out else "train"
        if side != part.side:
            (folder / part.side / part.name).rename(folder / side / part.name)
        moved.append(part._replace(side=side))
    return moved


def _write_metadata(folder: Path, parts: list[Part]) -> list[Listed]:
    """Writes the captions and originals of the copies in a folder, and returns the copies."""
    lines = []
    for part in parts:
        listed = part.original.listed
        row = {"file_name": part.name, "text": listed.captions, "source": str(listed.path)}
        lines.append(json.dumps(row) + "\n")
    write_text(folder / METADATA, "".join(lines))
    return [Listed(path=folder / p.name, captions=p.original.listed.captions, root=folder) for p in parts]


def _counts(copies: list[Listed], sampling: Sampling) -> dict[str, Any]:
    infos = [copy.info() for copy in copies]
    save_indices(copies)
    lengths = [count_frames(copy, info, sampling.frame_rate)[0] for copy, info in zip(copies, infos, strict=True)]
    return {
        "videos": len(copies),
        "captioned": sum(any(copy.captions) for copy in copies),
        "frames": sum(info.num_frames for info in infos),
        "seconds": round(sum(info.duration or 0.0 for info in infos), 3),
        "clips": sum(map(sampling.num_clips, lengths)),
    }


def _write_pictures(config: PrepareConfig, path: Path, copies: list[Listed]) -> None:
    """Writes the middle frames of a few copies side by side, or with fewer copies frames at other times of them."""
    numbers = [index * len(copies) // NUM_PICTURES for index in range(NUM_PICTURES)]
    pictures = []
    for place, number in enumerate(numbers):
        info, count = copies[number].info(), numbers.count(number)
        time = (info.duration or 0.0) * (place - numbers.index(number) + 0.5) / count
        frame = next(iter(iter_video(info.path, start=time)))
        pictures.append(Fit(frame.shape[:2], (config.height, config.width)).to_target(frame[None])[0])
    scale = -(-PICTURE_SIZE // min(config.height, config.width))
    with atomic_file(path) as partial_file:
        Image.fromarray(enlarge(np.concatenate(pictures, axis=1), scale)).save(partial_file, format="png")


def describe(summary: Mapping[str, Any]) -> list[str]:
    """Describes the result of `prepare` in a few lines."""
    sides = {side: summary[side] for side in get_args(Side)}
    how = {
        "video": "split by video",
        "given": "held-out videos as given",
        "time": f"fewer than {MIN_FILES} videos, so the end of each is held out; scores say little about other videos",
    }[summary["split"]]
    numbers = [f"{name}: {one['videos']} videos, {one['clips']} clips" for name, one in sides.items()]
    captions = f"captions: {summary['captioned']} of {summary['videos']} videos"
    lines = [f"{'; '.join(numbers)} ({how})", captions]
    for name in ("sizes", "frame_rates"):
        kinds = ", ".join(f"{kind} ({count})" for kind, count in list(summary[name].items())[:5])
        lines.append(f"{name.replace('_', ' ')}: {kinds}" + (", ..." if len(summary[name]) > 5 else ""))
    if refused := summary["refused"]:
        lines.append(f"{len(refused)} refused: {first_reasons(refused)}" + ("; ..." if len(refused) > 3 else ""))
    return lines
