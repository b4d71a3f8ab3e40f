"""What a source of videos contains, found without decoding its videos."""

from __future__ import annotations

import hashlib
import itertools
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from vgen.data.clips import Listed, Sampling, count_frames, save_indices
from vgen.data.moving_mnist import MovingMNIST
from vgen.data.sources import Stream, open_videos
from vgen.data.video_io import VideoInfo, write_video
from vgen.io.errors import one_line


class Original(NamedTuple):
    """A video, or a segment of one, from which clips can be taken."""

    listed: Listed
    info: VideoInfo
    """Properties of the whole file."""

    @property
    def file(self) -> str:
        """Name of its file within the source; segments of a file share it."""
        return name_within(self.listed)


def name_within(listed: Listed) -> str:
    """The path of a video within the folder that lists it; the whole path if there is no such folder."""
    return str(listed.path) if listed.root is None else os.path.relpath(listed.path, listed.root)


def list_originals(
    data: str, num_frames: int, max_videos: int | None = None, seed: int = 0, limit: str = "max_videos"
) -> list[Listed] | Iterator[Listed]:
    """The videos of a source: a list, or an iterator over a stream.

    Args:
        data: A source of `vgen.data.sources.open_clips`.
        num_frames: Number of frames of a video of Moving MNIST, which is made of digits.
        max_videos: Maximum number of files: random ones of a list, the first ones of a stream; `None` means all.
        seed: Seed of the random choice, and of Moving MNIST.
        limit: Name of the option that sets `max_videos`, for errors.

    Raises:
        FileNotFoundError: As in `vgen.data.sources.open_clips`.
        ValueError: As there, or Moving MNIST without `max_videos`.
        ImportError: As there.
    """
    opened = open_videos(data)
    if isinstance(opened, Stream):
        return itertools.islice(opened.videos(0), max_videos)
    if isinstance(opened, list):
        chosen = draw_files({name_within(one) for one in opened}, max_videos, f"sample {seed}")
        return [one for one in opened if name_within(one) in chosen]
    if max_videos is None:
        raise ValueError(f"{data} gives any number of videos: choose how many, such as {limit}=1000")
    world = MovingMNIST(opened.images, num_frames, stochastic=opened.stochastic, seed=seed)
    paths = (Path(f"moving-mnist-{number:06d}.webp") for number in range(max_videos))
    return [Listed(path=path, content=partial(_rendered, world, number)) for number, path in enumerate(paths)]


def _rendered(world: MovingMNIST, number: int) -> bytes:
    """A lossless file of Moving MNIST."""
    clip = world.sample(number)
    with TemporaryDirectory(prefix="vgen-") as folder:
        write_video(clip.frames, path := Path(folder, clip.source.path.name + ".webp"), clip.frame_rate)
        return path.read_bytes()


def draw_files(names: Iterable[str], count: int | None, seed: str) -> set[str]:
    """Draws file names. Whether a file is drawn before another depends only on the seed and their names."""

    def rank(name: str) -> bytes:
        return hashlib.sha256(f"{seed} {name}".encode(errors="surrogateescape")).digest()

    return set(sorted(names, key=rank)[:count])


class Survey:
    """Counts the videos that it checks, and keeps the reasons why some are refused.

    Args:
        sampling: Which frames of a video make a clip. Videos without a clip are refused.
    """

    def __init__(self, sampling: Sampling):
        self.sampling = sampling
        self.sizes: Counter[str] = Counter()
        """Number of files by size, such as `1920x1080` (width and height of the upright frames in pixels)."""
        self.frame_rates: Counter[str] = Counter()
        """Number of files by frames per second."""
        self.refused: dict[str, str] = {}
        """Path and reason."""
        self._too_short: dict[str, list[int]] = {}  # frames of each video or segment
        self._seen: set[Path] = set()

    def usable(self, listed: Iterable[Listed]) -> Iterator[Original]:
        """Yields the videos from which clips can be taken. Files are opened as in `Listed.info`."""
        for one in listed:
            try:
                info = one.info()
                available, rate = count_frames(one, info, self.sampling.frame_rate)
            except (ValueError, OSError) as error:
                self.refuse(one, str(error))
                continue
            if one.path not in self._seen:
                self._seen.add(one.path)
                self.sizes[f"{info.width}x{info.height}"] += 1
                self.frame_rates[f"{info.frame_rate or rate:.5g}"] += 1
            if self.sampling.num_clips(available):
                yield Original(one, info)
            else:
                self._too_short.setdefault(str(one.path), []).append(available)
                self.refuse(one, f"{available} frames at {rate:g} per second; a clip needs {self.sampling.span}")

    def refuse(self, listed: Listed, reason: str) -> None:
        """Keeps the reason why a video is not used."""
        path = str(listed.path)
        self.refused[path] = one_line(reason.removeprefix(path)).removeprefix(": ")

    def nothing_usable(self, data: str, listed: Iterable[Listed]) -> ValueError:
        """The error for a source with these videos, all of which are refused."""
        reasons = {str(one.path): self.refused[str(one.path)] for one in listed}
        lengths = [length for path in reasons for length in self._too_short.get(path, [])]
        if reasons and reasons.keys() <= self._too_short.keys():
            return ValueError(
                f"the videos of {data} are too short: {sum(lengths)} frames in all and at most {max(lengths)} in one; "
                f"a clip needs {self.sampling.span} (num_frames)"
            )
        return ValueError(f"none of the videos of {data} can be used: {first_reasons(reasons)}")


def first_reasons(refused: Mapping[str, str]) -> str:
    """The first reasons why videos are refused, in one line."""
    return "; ".join(f"{path}: {reason}" for path, reason in list(refused.items())[:3])


def inspect_source(data: str, sampling: Sampling, max_videos: int | None = None, seed: int = 0) -> dict[str, Any]:
    """Describes the videos of a source. Their files are opened, but not decoded.

    Args:
        data: A source of `vgen.data.sources.open_clips`.
        sampling: Which frames of a video make a clip.
        max_videos: As in `list_originals`.
        seed: As in `list_originals`.

    Returns:
        A JSON-serializable dictionary: numbers of `videos` (files), of those that are `usable`, and of those that
        are `captioned`; `frames` at the frame rate of clips, `seconds` and `clips` (end to end) of the usable ones;
        `sizes` and `frame_rates` with the number of files of each; `refused` with path and reason. Nothing is known
        about streams: their numbers are `None`.

    Raises:
        FileNotFoundError: As in `list_originals`.
        ValueError: As in `list_originals`.
        ImportError: As in `list_originals`.
    """
    listed = list_originals(data, sampling.num_frames, max_videos, seed)
    if not isinstance(listed, list):
        unknown = dict.fromkeys(("videos", "usable", "captioned", "frames", "seconds", "clips"))
        return unknown | {"sizes": {}, "frame_rates": {}, "refused": {}}
    survey = Survey(sampling)
    usable = list(survey.usable(listed))
    save_indices(listed)
    counts = [count_frames(*original, sampling.frame_rate) for original in usable]
    return {
        "videos": len({name_within(one) for one in listed}),
        "usable": len({original.file for original in usable}),
        "captioned": len({name_within(one) for one in listed if any(one.captions)}),
        "frames": sum(count for count, _ in counts),
        "seconds": round(sum(count / rate for count, rate in counts), 3),
        "clips": sum(sampling.num_clips(count) for count, _ in counts),
        "sizes": dict(survey.sizes),
        "frame_rates": dict(survey.frame_rates),
        "refused": survey.refused,
    }
