import random
from typing import get_args

import pytest

from vgen.training.mixture import KeyframeKind, KnownKind, draw_keyframes, draw_num_leading, draw_window, least_known


def draws(draw, *args, count=300):
    return [draw(*args, random.Random(seed)) for seed in range(count)]


def test_windows_are_at_their_stated_positions():
    assert draws(draw_window, "start", 3, 9, 1, count=5) == [[0, 1, 2]] * 5
    anywhere = draws(draw_window, "anywhere", 3, 9, 1)
    assert {window[0] for window in anywhere} == set(range(7))
    assert all(window == list(range(window[0], window[0] + 3)) for window in anywhere)
    for sink in (1, 2):
        following = draws(draw_window, "sink", 4, 9, sink)
        assert all(window[:sink] == list(range(sink)) for window in following)
        assert {window[sink] for window in following} == set(range(sink + 1, 9 - (4 - sink) + 1))
        assert all(b - a == 1 for window in following for a, b in zip(window[sink:], window[sink + 1 :], strict=False))


@pytest.mark.parametrize(
    ("kind", "length", "total", "sink"),
    [("start", 4, 3, 0), ("sink", 3, 3, 1), ("sink", 2, 9, 2), ("anywhere", 1, 9, 0)],
)
def test_a_window_that_does_not_fit_is_rejected(kind, length, total, sink):
    with pytest.raises(ValueError, match="does not fit"):
        draw_window(kind, length, total, sink, random.Random(0))


def test_some_frames_always_remain_to_generate():
    for known in get_args(KnownKind):
        for least in (0, 2):
            numbers = set(draws(draw_num_leading, known, 5, least, []))
            first = max(least, int(known in ("leading", "both")))
            assert numbers == (set(range(first, 5)) if first else {0})


def test_the_number_of_leading_frames_is_the_requested_one():
    assert set(draws(draw_num_leading, "both", 5, 0, [2, 3])) == {2, 3}
    assert set(draws(draw_num_leading, "leading", 5, 3, [2, 3])) == {3}
    assert set(draws(draw_num_leading, "keyframes", 5, 0, [2, 3])) == {0}
    assert set(draws(draw_num_leading, "none", 5, 1, [3])) == {1, 2, 3, 4}  # a window that is not the clip's start
    with pytest.raises(ValueError, match="num_leading=.5.: a window of 5 token frames allows 1 to 4"):
        draw_num_leading("leading", 5, 0, [5], random.Random(0))


def test_only_the_start_of_a_clip_is_generated_without_context():
    assert [least_known(kind, 2) for kind in ("start", "anywhere", "sink")] == [0, 1, 3]


def test_keyframes_are_spaced_last_scattered_or_next():
    frames = range(5, 17)
    every, last, scattered, following = (draws(draw_keyframes, kind, frames, 4) for kind in get_args(KeyframeKind))
    chosen = every + last + scattered + following
    assert all(one and set(one) <= set(frames) and one == sorted(one) for one in chosen)
    assert last == [[16]] * len(last)
    assert [8, 12, 16] in every and [6, 8, 10, 12, 14, 16] in every and [11] in every and [12] in every
    assert len({tuple(one) for one in scattered}) > 50
    assert {tuple(one) for one in following} == {(5,), (5, 6), (5, 6, 7)}  # 4 would be a latent
    assert all(one == [3] for kind in get_args(KeyframeKind) for one in draws(draw_keyframes, kind, range(3, 4), 4))


def test_unknown_names_are_rejected():
    with pytest.raises(ValueError, match="'start', 'sink', 'anywhere'"):
        draw_window("middle", 1, 1, 0, random.Random(0))
    with pytest.raises(ValueError, match="'none', 'leading', 'keyframes'"):
        draw_num_leading("all", 2, 0, [], random.Random(0))
    with pytest.raises(ValueError, match="'every', 'last', 'any', 'next'"):
        draw_keyframes("first", range(3), 4, random.Random(0))
