"""Random tasks for training samples: the window of a clip, and its known frames.

All random choices use the sample's own `random.Random`. Token frames are counted from the start of the window.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from typing import Literal

from vgen.checks import check_choice

WindowKind = Literal["start", "sink", "anywhere"]
KnownKind = Literal["none", "leading", "keyframes", "both"]
KeyframeKind = Literal["every", "last", "any", "next"]
FACTORS = (2, 3, 4, 7, 8, 16)


def draw_window(kind: WindowKind, length: int, total: int, sink: int, rng: random.Random) -> list[int]:
    """Draws the token frames of a clip that a sample trains on; they are counted from the start of the clip.

    Args:
        kind: `start`: the first token frames; `anywhere`: consecutive token frames; `sink`: the first `sink` token
            frames and, after a gap, later ones, as in a rollout whose KV cache has evicted frames.
        length: Length of the window in token frames.
        total: Length of the clip in token frames.
        sink: Number of token frames in the attention sink, which a rollout never evicts.
        rng: Random numbers of this sample.

    Raises:
        ValueError: The kind is unknown, or the clip is too short.
    """
    check_choice("the kind of a window", kind, WindowKind)
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


def least_known(kind: WindowKind, sink: int) -> int:
    """The minimum number of known leading token frames in a window of a kind.

    The first latent of a video is that of an image, so windows that do not begin with their clip need known frames.
    After a gap, one token frame is known in addition to the sink.
    """
    return {"start": 0, "anywhere": 1, "sink": sink + 1}[kind]


def draw_num_leading(known: KnownKind, length: int, least: int, legal: Collection[int], rng: random.Random) -> int:
    """Draws the number of known token frames at the start of a window.

    Args:
        known: `none`, `leading`, `keyframes`, or `both` (leading frames and keyframes).
        length: Length of the window in token frames.
        least: The minimum; see `least_known`. With `leading` and `both`, it is at least 1.
        legal: Numbers to draw from with `leading` and `both`, if the window allows them; empty allows all numbers.
        rng: Random numbers of this sample.

    Raises:
        ValueError: `known` is unknown, or the window allows none of the numbers.
    """
    check_choice("known", known, KnownKind)
    wants_leading = known in ("leading", "both")
    least = max(least, int(wants_leading))
    if not least:
        return 0
    numbers = [number for number in range(least, length) if not (wants_leading and legal) or number in legal]
    if not numbers:
        raise ValueError(
            f"num_leading={list(legal)}: a window of {length} token frames allows {least} to {length - 1}"
        )
    return rng.choice(numbers)


def draw_keyframes(kind: KeyframeKind, frames: Sequence[int], compression: int, rng: random.Random) -> list[int]:
    """Draws the known keyframes from the pixel frames that can be keyframes.

    Args:
        kind: `every` n-th frame, the `last` frame, `any` random frames, or the ones `next` to the leading known
            frames, which do not fill a latent.
        frames: Indices of consecutive pixel frames, of which the first follows a known frame. In slow motion by a
            factor of 4, frames 4, 8, 12, ... after that known frame are keyframes.
        compression: Pixel frames per latent.
        rng: Random numbers of this sample.

    Raises:
        ValueError: The kind is unknown.
    """
    check_choice("the kind of keyframes", kind, KeyframeKind)
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
