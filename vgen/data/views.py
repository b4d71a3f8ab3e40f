"""Views of a video: clips and crops over which the predictions of a classifier are averaged."""

from __future__ import annotations

from dataclasses import replace

from vgen.data.clips import Clip, Listed, Sampling, VideoFolder


def views_of(video: Listed, sampling: Sampling, size: int, num_clips: int = 1, num_crops: int = 1) -> list[Clip]:
    """Clips at equal distances over a video, each with crops at equal distances over its longer side.

    Args:
        video: The video.
        sampling: Length and frame rate of the clips. A `uniform` or `segments` clip is spread over the whole video, so
            there is one.
        size: Height and width of the clips in pixels.
        num_clips: Most clips; there are no more than windows of the video.
        num_crops: Crops of each clip; a single one is central.

    Raises:
        ValueError: The video is damaged or too short.
    """
    if not sampling.spreads:
        sampling = replace(sampling, kind="sliding", hop=1)
    folder = VideoFolder([video], sampling, size, size, quiet=True)
    places = [round(place) for place in _spread(min(num_clips, len(folder)), len(folder) - 1)]
    offsets = _spread(num_crops, 1.0)
    found = [folder.clip(place, offset=(offset, offset)) for place in places for offset in offsets]
    usable = [clip for clip in found if clip is not None]
    if not usable:
        raise ValueError(f"{video.path}: {folder.skipped[video]}")
    return usable


def _spread(count: int, last: float) -> list[float]:
    """`count` numbers from 0 to `last` at equal distances; a single one is in the middle."""
    return [last / 2] if count == 1 else [index * last / (count - 1) for index in range(count)]
