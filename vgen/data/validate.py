"""What a folder of videos is good for, before anything is trained on it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vgen.data.clips import Bucket, Listed, Sampling, choose_bucket, list_videos
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
    short: str = "skip",
) -> dict[str, Any]:
    """Decodes every video of a folder from start to end and says what comes of it.

    Args:
        folder: As `list_videos` takes it.
        buckets: Shapes of clips that are wanted.
        frame_rate: Frames per second that videos are resampled to; `None` takes their own.
        compression: Frames per latent; valid lengths are `1 + compression * k`.
        batch_size: Clips of a step.
        stride: As in `Sampling`, for every window of a video, like the two that follow.
        hop: From one window to the next.
        short: What becomes of videos with too few frames.

    Returns:
        Of JSON's kinds: `clips`, one entry for each listed video or part (`path`, `accepted`, `reason`, `num_frames`,
        `height`, `width`, `nearest_length`, `bucket`, `num_clips`, `captions`; the nearest length is the longest legal
        one that it has); `accepted` and `refused`, their numbers; `without_caption`; `buckets`, for each its clips,
        batches an epoch, and the memory of a batch of pixels in float32, in MiB.

    Raises:
        FileNotFoundError: There is no such folder.
        ValueError: It lists no videos, or a setting is out of range.
    """
    samplings = {
        bucket: Sampling(num_frames=bucket.num_frames, kind="sliding", stride=stride, hop=hop, short=short)
        for bucket in buckets
    }
    clips = [_entry(one, samplings, frame_rate, compression) for one in list_videos(folder)]
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
    listed: Listed, samplings: dict[Bucket, Sampling], frame_rate: float | None, compression: int
) -> dict[str, Any]:
    entry: dict[str, Any] = {"path": str(listed.path), "start": listed.start, "end": listed.end}
    entry |= {"captions": list(listed.captions), "accepted": False, "reason": None, "num_frames": 0}
    entry |= {"height": None, "width": None, "nearest_length": None, "bucket": None, "num_clips": 0}
    try:
        rate = frame_rate or listed.info().frame_rate
        for frame in iter_video(listed.path, start=listed.start, end=listed.end, frame_rate=rate):
            entry["num_frames"] += 1
            entry["height"], entry["width"] = frame.shape[:2]
    except (ValueError, OSError) as error:
        return entry | {"reason": str(error)}
    count = entry["num_frames"]
    grid = LatentGrid(compression)
    entry["nearest_length"] = grid.num_frames(grid.num_latents(count))
    bucket = choose_bucket(samplings, count, entry["height"], entry["width"])
    if bucket is None:
        shortest = min(sampling.span for sampling in samplings.values())
        reason = f"{count} frames; the shortest clip needs {shortest}; the nearest valid length is "
        return entry | {"reason": reason + str(entry["nearest_length"])}
    return entry | {"accepted": True, "bucket": str(bucket), "num_clips": samplings[bucket].num_clips(count)}
