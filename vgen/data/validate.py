"""Validation of a folder of videos before training."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vgen.data.clips import Bucket, Listed, Sampling, Short, actions_of, choose_bucket, count_frames, list_videos
from vgen.data.video_io import iter_video
from vgen.temporal.grid import LatentGrid


def validate_folder(
    folder: Path,
    buckets: Sequence[Bucket],
    frame_rate: float | None = None,
    compression: int = 4,
    batch_size: int = 8,
    stride: int = 1,
    hop: int | None = None,
    short: Short = "skip",
) -> dict[str, Any]:
    """Decodes every video of a folder from start to end and reports which clips it yields.

    Args:
        folder: A folder for `list_videos`.
        buckets: Shapes of the clips.
        frame_rate: Frames per second that videos are resampled to; `None` keeps their own rate.
        compression: Temporal compression of the VAE; valid lengths are `1 + compression * k`.
        batch_size: Clips per batch.
        stride: Step between the frames of a clip; see `Sampling`, also for `hop` and `short`.
        hop: Step between the starts of windows.
        short: How to treat videos with too few frames.

    Returns:
        A JSON-serializable dictionary. `clips` has an entry for each listed video or segment: `path`, `accepted`,
        `reason`, `num_frames`, `height`, `width`, `nearest_length` (longest valid length that fits), `bucket`,
        `num_clips`, `captions`, `actions`. `accepted`, `refused` and `without_caption` are numbers of such entries.
        `buckets` has, for each bucket, its clips and batches per epoch, and the size of a batch of float32 pixels in
        MiB. The `actions` of an entry are `None` without, else their number of `channels`, the `lowest` and `highest`
        value of each, `null` for channels that are unknown everywhere, and whether all are `constant`.

    Raises:
        FileNotFoundError: The folder does not exist.
        ValueError: It lists no videos, or a setting is out of range.
    """
    samplings = {
        bucket: Sampling(num_frames=bucket.num_frames, kind="sliding", stride=stride, hop=hop, short=short)
        for bucket in buckets
    }
    clips = [_entry(one, samplings, frame_rate, compression, stride) for one in list_videos(folder)]
    numbers: Counter[str] = Counter()
    for clip in clips:
        if clip["accepted"]:
            numbers[clip["bucket"]] += clip["num_clips"]
    sizes = {str(bucket): 4 * 3 * bucket.num_frames * bucket.height * bucket.width for bucket in buckets}
    return {
        "clips": clips,
        "accepted": sum(clip["accepted"] for clip in clips),
        "refused": sum(not clip["accepted"] for clip in clips),
        "without_caption": sum(not any(clip["captions"]) for clip in clips),
        "buckets": {
            name: {
                "clips": numbers[name],
                "batches": -(-numbers[name] // batch_size),
                "batch_mib": round(batch_size * size / 2**20, 3),
            }
            for name, size in sizes.items()
        },
    }


def _entry(
    listed: Listed, samplings: dict[Bucket, Sampling], frame_rate: float | None, compression: int, stride: int
) -> dict[str, Any]:
    entry: dict[str, Any] = {"path": str(listed.path), "start": listed.start, "end": listed.end}
    entry |= {"captions": list(listed.captions), "accepted": False, "reason": None, "num_frames": 0}
    entry |= {"height": None, "width": None, "nearest_length": None, "bucket": None, "num_clips": 0}
    entry["actions"] = None
    try:
        info = listed.info()
        count, rate = count_frames(listed, info, frame_rate)
        for frame in iter_video(listed.file(), start=listed.start, end=listed.end, frame_rate=rate):
            entry["num_frames"] += 1
            entry["height"], entry["width"] = frame.shape[:2]
        if entry["num_frames"] != count:
            raise ValueError(f"{listed.path} is damaged: {entry['num_frames']} of {count} frames can be decoded")
        if listed.actions is not None:
            indices = list(range(0, count, stride))
            entry["actions"] = _describe(actions_of(listed, rate, indices, len(indices)))
    except (ValueError, OSError) as error:
        return entry | {"reason": str(error)}
    grid = LatentGrid(compression)
    entry["nearest_length"] = grid.num_frames(grid.num_latents(count))
    bucket = choose_bucket(samplings, count, entry["height"], entry["width"] * info.pixel_aspect_ratio)
    if bucket is None:
        shortest = min(sampling.span for sampling in samplings.values())
        reason = f"{count} frames; the shortest clip needs {shortest}; the nearest valid length is "
        return entry | {"reason": reason + str(entry["nearest_length"])}
    return entry | {"accepted": True, "bucket": str(bucket), "num_clips": samplings[bucket].num_clips(count)}


def _describe(actions: np.ndarray) -> dict[str, Any]:
    """What `validate_folder` says of actions `(f, a)`."""
    columns = [column[np.isfinite(column)].tolist() for column in actions[1:].T]  # that of frame 0 is not read
    lowest, highest = ([pick(column) if column else None for column in columns] for pick in (min, max))
    return {"channels": len(columns), "lowest": lowest, "highest": highest, "constant": lowest == highest}
