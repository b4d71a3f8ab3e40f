"""LatentGrid: one answer to how many frames, latents and token frames there are."""

import pytest

from vgen.temporal.grid import LatentGrid

GRIDS = [(4, 1), (4, 2), (2, 3), (1, 1), (1, 2)]


@pytest.mark.parametrize(("s", "p_t"), GRIDS)
def test_every_frame_belongs_to_exactly_one_latent(s, p_t):
    grid = LatentGrid(s, p_t)
    frames = [frame for latent in range(6) for frame in grid.frames_of(latent)]
    assert frames == list(range(grid.num_frames(6)))
    for latent in range(1, 6):
        for slot, frame in enumerate(grid.frames_of(latent)):
            assert grid.slot(frame) == (latent, slot)


@pytest.mark.parametrize(("s", "p_t"), GRIDS)
def test_lengths_agree_with_counting(s, p_t):
    grid = LatentGrid(s, p_t)
    assert grid.num_latents(0) == 0
    for count in range(1, 40):
        held = [latent for latent in range(count) if grid.frames_of(latent).stop <= count]
        assert grid.num_latents(count) == len(held)
        needed = 1 + max(latent for latent in range(count) if grid.frames_of(latent).start < count)
        assert grid.latents_for(count) == needed
        whole = grid.num_latents(count) == needed and needed % p_t == 0
        assert grid.is_valid(count) == whole
        assert grid.whole_frames(count) == sum(len(grid.frames_of(latent)) for latent in held)
        later = [latent for latent in range(1, count + 1) if grid.frames_of(latent).stop - 1 <= count]
        assert grid.whole_frames(count, started=True) == sum(len(grid.frames_of(latent)) for latent in later)
    assert grid.whole_frames(0) == grid.whole_frames(0, started=True) == 0
    assert grid.num_frames(p_t) == grid.first and grid.num_frames(2 * p_t) == grid.first + grid.unit


@pytest.mark.parametrize(("s", "p_t"), GRIDS)
def test_the_nearest_valid_length_is_named(s, p_t):
    grid = LatentGrid(s, p_t)
    valid = [count for count in range(1, 80) if grid.is_valid(count)]
    for count in range(-3, 60):
        nearest = min(valid, key=lambda other: (abs(other - count), other))
        assert grid.nearest(count) == nearest
        if count in valid:
            grid.check(count)
            continue
        with pytest.raises(
            ValueError, match=rf"length must be {s * p_t}\*k \+ {grid.first}, got {count} .*{nearest}\)"
        ):
            grid.check(count, "length")
    for wrong in (5.0, "5", True, None):
        with pytest.raises(ValueError, match="num_frames must be an integer.*, got"):
            grid.check(wrong)
