"""What a training sample asks of the denoiser: which window of a clip, and which of its frames are known.

All draws come from a `random.Random` of the sample, and token frames count within the window unless said otherwise.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence

WINDOWS = ("start", "sink", "anywhere")
KNOWN = ("none", "leading", "keyframes", "both")
KEYFRAMES = ("every", "last", "any", "next")
FACTORS = (2, 3, 4, 7, 8, 16)


def draw_window(kind: str, length: int, total: int, sink: int, rng: random.Random) -> list[int]:
    """The token frames of a clip that a sample trains on.

    Args:
        kind: `start`: the first ones; `anywhere`: consecutive ones; `sink`: the first `sink` ones and later ones with
            a gap between, as in a rollout whose cache has lost frames.
        length: Token frames of the window.
        total: Of the clip.
        sink: Frames that a rollout never forgets.
        rng: Of this sample.

    Raises:
        ValueError: The kind is unknown, or the clip is too short for it.
    """
    if kind not in WINDOWS:
        raise ValueError(f"a window of kind {kind!r} is unknown: give one of {', '.join(WINDOWS)}")
    gap = kind == "sink"
    if length + gap > total or length <= least_known(kind, sink):
        raise ValueError(f"a {kind!r} window of {length} token frames does not fit clips of {total} (sink: {sink})")
    if kind == "start":
        return list(range(length))
    if kind == "anywhere":
        first = rng.randint(0, total - length)
        return list(range(first, first + length))
    first = rng.randint(sink + 1, total - (length - sink))
    return [*range(sink), *range(first, first + length - sink)]


def least_known(kind: str, sink: int) -> int:
    """How many token frames of a window are known in any case, given its kind.

    A video begins with an image's latent, so that what does not begin its clip is never generated from nothing; behind
    a gap one frame more than the sink is known.
    """
    return {"start": 0, "anywhere": 1, "sink": sink + 1}[kind]


def draw_num_leading(known: str, length: int, least: int, legal: Collection[int], rng: random.Random) -> int:
    """How many token frames at the start of a window are known: at least `least`, and at least 1 where asked.

    Args:
        known: `none`, `leading`, `keyframes`, or `both` of the last.
        length: Token frames of the window.
        least: See `least_known`.
        legal: Numbers to draw from where leading frames are asked for, as far as the window allows them; empty takes
            any.
        rng: Of this sample.

    Raises:
        ValueError: The kind is unknown, or no number is left.
    """
    if known not in KNOWN:
        raise ValueError(f"known={known!r} is unknown: give one of {', '.join(KNOWN)}")
    asked = known in ("leading", "both")
    least = max(least, int(asked))
    if not least:
        return 0
    numbers = [number for number in range(least, length) if not (asked and legal) or number in legal]
    if not numbers:
        raise ValueError(
            f"num_leading={list(legal)}: a window of {length} token frames allows {least} to {length - 1}"
        )
    return rng.choice(numbers)


def draw_keyframes(kind: str, frames: Sequence[int], compression: int, rng: random.Random) -> list[int]:
    """Which of the pixel frames that could be keyframes are known.

    Args:
        kind: `every` n-th, the `last`, `any`, or those `next` to the known beginning that fill no latent.
        frames: Consecutive pixel frames, counted from the frame before the first known gap: in slow motion by 4,
            frames 4, 8, 12, ... are known.
        compression: Pixel frames a latent.
        rng: Of this sample.

    Raises:
        ValueError: The kind is unknown.
    """
    if kind not in KEYFRAMES:
        raise ValueError(f"keyframes={kind!r} are unknown: give one of {', '.join(KEYFRAMES)}")
    if kind == "next":
        return list(frames[: rng.randint(1, max(1, compression - 1))])
    if kind == "every":
        factor = rng.choice([factor for factor in FACTORS if factor <= len(frames)] or [1])
        return list(frames[factor - 1 :: factor])
    if kind == "any":
        share = rng.uniform(0.05, 0.5)
        chosen = [frame for frame in frames if rng.random() < share]
        if chosen:
            return chosen
    return [frames[-1]]
