"""What `vgen train` needs to know of the videos, mostly from their headers."""

from __future__ import annotations

import itertools
import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vgen.data.clips import Sampling, count_frames
from vgen.data.inspection import Original, Survey, first_reasons, list_originals
from vgen.data.prepare import MIN_FILES, SUMMARY
from vgen.data.video_io import iter_video, resampled_length
from vgen.io.records import read_json
from vgen.training.needs import ClipShape

_DECODED = 200.0
"""Frames that are decoded per second, where it was not measured."""
_DECODED_FRAMES = 12
_NUM_PICTURES = 4
LIMIT = "--set data.max_videos"
"""The option that limits the number of videos."""


@dataclass(frozen=True)
class Videos:
    """What the headers of a source's videos say."""

    paths: list[str]
    """Path of each readable video; segments of a file have the same."""
    seconds: list[float]
    """Length of each readable video."""
    frame_rates: list[float]
    """Frame rate of each readable video."""
    sizes: list[tuple[int, int]]
    """Height and width of each readable video in pixels."""
    captions: list[str]
    """All captions that are not empty."""
    num_captioned: int
    refused: dict[str, str]
    """Videos that cannot be read, with the reasons."""
    decoded_per_second: float
    """Frames that were decoded per second."""
    pictures: list[np.ndarray]
    """Frames of up to four of them."""
    is_stream: bool = False
    """Whether the videos are streamed, so that nothing else is known."""

    @property
    def num_frames(self) -> float:
        """Frames of all videos, at their own rates."""
        return sum(seconds * rate for seconds, rate in zip(self.seconds, self.frame_rates, strict=True))

    def num_clips(self, clip: ClipShape, frame_rate: float, hop: int) -> int:
        """Number of clips that begin `hop` frames apart."""
        frames = self.lengths(frame_rate)
        return sum((count - clip.num_frames) // hop + 1 for count in frames if count >= clip.num_frames)

    def lengths(self, frame_rate: float) -> list[int]:
        """Number of frames of each readable video at a frame rate."""
        return [resampled_length(seconds, frame_rate) for seconds in self.seconds]


def inspect_videos(data: str, num_frames: int, max_videos: int | None = None) -> Videos:
    """Reads the headers of a source's videos, and decodes frames of four of them.

    Raises:
        FileNotFoundError: There is no such source.
        ValueError: None of its videos can be read.
    """
    listed = list_originals(data, num_frames, max_videos, limit=LIMIT)
    if not isinstance(listed, list):
        return Videos([], [], [], [], [], 0, {}, _DECODED, [], is_stream=True)
    survey = Survey(Sampling(num_frames=1))
    found = list(survey.usable(listed))
    found, pictures, decoded_per_second = _decode_some(found, survey)
    if not found:
        raise survey.nothing_usable(data, listed)
    lengths = [count_frames(*one, None) for one in found]
    return Videos(
        [str(one.listed.path) for one in found],
        [count / rate for count, rate in lengths],
        [rate for _, rate in lengths],
        [(one.info.height, one.info.width) for one in found],
        [text for one in found for text in one.listed.captions if text],
        sum(any(one.listed.captions) for one in found),
        survey.refused,
        decoded_per_second,
        pictures,
    )


def _decode_some(videos: list[Original], survey: Survey) -> tuple[list[Original], list[np.ndarray], float]:
    """Decodes frames of a few videos that are spread over the list, and refuses those that are damaged.

    Returns:
        The videos without the damaged ones, a frame of each decoded one, and the number of frames decoded per second.
    """
    step = max(1, -(-len(videos) // _NUM_PICTURES))
    order = sorted(range(len(videos)), key=lambda index: index % step)  # every step-th one, then those after them
    pictures: list[np.ndarray] = []
    damaged: set[int] = set()
    decoded, seconds = 0, 0.0
    for index in order:
        if len(pictures) == _NUM_PICTURES:
            break
        listed, begin = videos[index].listed, time.monotonic()
        count, rate = count_frames(*videos[index], None)
        start = (listed.start or 0.0) + count / rate / 3
        try:
            frames = list(itertools.islice(iter_video(listed.file(), start=start, end=listed.end), _DECODED_FRAMES))
        except (ValueError, OSError) as error:
            survey.refuse(listed, str(error))
            damaged.add(index)
            continue
        pictures.append(frames[0])
        decoded += len(frames)
        seconds += time.monotonic() - begin
    usable = [one for index, one in enumerate(videos) if index not in damaged]
    return usable, pictures, decoded / seconds if decoded else _DECODED


def choose_rate(videos: Videos, wanted: float, num_frames: int) -> float:
    """The frame rate of training clips: the wanted one, but no higher than that of half of the videos.

    Where more than a fifth of the videos is too short for a clip at that rate, it is raised so that four fifths are
    long enough, as far as their own rates allow.
    """
    if videos.is_stream:
        return wanted
    own = sorted(videos.frame_rates)[len(videos.frame_rates) // 2]
    short = sorted(videos.seconds)[len(videos.seconds) // 5]
    return min(own, max(wanted, math.ceil(1000 * num_frames / short) / 1000))


def check_videos(videos: Videos, clip: ClipShape, rate: float, *, is_split: bool) -> None:
    """Checks that there are enough videos to train on some and to hold some out.

    Args:
        videos: The videos.
        clip: Shape of the clips.
        rate: Frame rate of the clips.
        is_split: Whether others are held out, so that these are only trained on.

    Raises:
        ValueError: There are not; the error says what is missing.
    """
    if videos.is_stream:
        return
    lengths = videos.lengths(rate)
    enough = max(lengths) >= clip.num_frames
    if not is_split:
        several = sum(length >= clip.num_frames for length in lengths)
        enough = several >= MIN_FILES or max(lengths) >= 2 * clip.num_frames
    if not enough:
        refused = f" (not usable: {len(videos.refused)}, such as {first_reasons(videos.refused)})"
        raise ValueError(
            f"too little video: {len(lengths)} with {sum(lengths)} frames at {rate:g} per second, at most "
            f"{max(lengths)} in one{refused if videos.refused else ''}. A clip has {clip.num_frames}, and one of "
            f"{MIN_FILES} videos or the end of a longer one is held out. Add videos, or take shorter clips: --set "
            "clip.num_frames=N"
        )


def check_captions(folder: Path, videos: Videos) -> None:
    """Checks that there are captions to train on, if held-out videos have some.

    Raises:
        ValueError: There are none.
    """
    if not videos.num_captioned and read_json(folder / SUMMARY)["held_out"]["captioned"]:
        raise ValueError(
            "only held-out videos have captions, so prompts cannot be learned: give captions to more videos, or to "
            "none, and choose another --output"
        )
