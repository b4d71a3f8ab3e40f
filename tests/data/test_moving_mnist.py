import gzip
import struct

import numpy as np
import pytest

from vgen.data.moving_mnist import MovingMNIST, read_digits

DIGIT = np.full((1, 28, 28), 200, dtype=np.uint8)


def corners(frames):
    """The upper left corner of the only, solid digit in each frame."""
    return np.array([np.argwhere(frame)[0] for frame in frames])


def test_a_clip_is_a_function_of_its_number():
    world = MovingMNIST(DIGIT, seed=1)
    assert world.frames(3).shape == (20, 64, 64) and world.frames(3).dtype == np.uint8
    assert np.array_equal(world.frames(3), MovingMNIST(DIGIT, seed=1).frames(3))
    assert not np.array_equal(world.frames(3), world.frames(4))
    assert not np.array_equal(world.frames(3), MovingMNIST(DIGIT, seed=2).frames(3))
    given, wanted = world.protocol(3)
    assert np.array_equal(np.concatenate([given, wanted]), world.frames(3)) and len(given) == len(wanted) == 10


def test_digits_move_on_straight_lines_that_walls_reflect():
    world = MovingMNIST(DIGIT, num_digits=1, num_frames=60)
    for index in range(10):
        frames = world.frames(index)
        assert all((frame > 0).sum() == 28 * 28 for frame in frames)  # never cut by the border
        track = corners(frames)
        # reflected at 0 and 36, a line of a tenth of the room a frame; whole pixels are rounded down
        speed = np.abs(np.diff(track, axis=0)).max(0)
        assert np.hypot(*speed) <= 0.1 * 36 * 2**0.5 + 2 and speed.max() > 0
        for axis in (0, 1):
            steps = np.diff(track[:, axis])
            turns = [i for i in range(1, len(steps)) if steps[i - 1] * steps[i] < 0]
            # slower than a pixel a frame, rounding would look like turns: look at digits that move clearly
            if np.abs(steps).max() >= 3:
                assert all(track[i, axis] <= 4 or track[i, axis] >= 32 for i in turns)
                assert {abs(step) for step in steps[np.abs(steps) == np.abs(steps).max()]} == {np.abs(steps).max()}
                assert track[:, axis].max() >= 32 or track[:, axis].min() <= 4  # 60 frames reach a wall


def test_the_stochastic_variant_is_reflected_at_random():
    world = MovingMNIST(DIGIT, num_digits=1, num_frames=200, stochastic=True)
    after = set()
    for index in range(5):
        track = corners(world.frames(index))
        assert track.min() >= 0 and track.max() <= 36 and np.abs(np.diff(track, axis=0)).max() <= 4
        steps = np.diff(track, axis=0)
        for i in range(1, len(steps)):
            if not np.array_equal(steps[i], steps[i - 1]):
                # speeds change only at walls
                assert ((track[i] == 0) | (track[i] == 36)).any() or ((track[i + 1] == 0) | (track[i + 1] == 36)).any()
                after.add(tuple(steps[i]))
    assert len(after) > 20


def test_overlapping_digits_add_up():
    frames = [MovingMNIST(np.full((1, 28, 28), 100, dtype=np.uint8)).frames(index) for index in range(20)]
    assert {0, 100, 200} == set(np.unique(frames))
    bright = [MovingMNIST(DIGIT).frames(index) for index in range(20)]
    assert {0, 200, 255} == set(np.unique(bright))


def test_a_sample_is_a_clip_like_those_of_a_folder():
    world = MovingMNIST(DIGIT)
    clip = world.sample(2)
    assert clip.frames.shape == (20, 64, 64, 3) and clip.real.all() and clip.captions == ("",)
    assert (clip.frames == world.frames(2)[..., None]).all()


def idx(array, code=8):
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, code, array.ndim, *array.shape) + array.tobytes()


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx_files_are_read(tmp_path, suffix):
    pytest.importorskip("idx2numpy")
    digits = np.random.default_rng(0).integers(0, 256, (5, 28, 28), dtype=np.uint8)
    path = tmp_path / f"digits-idx3-ubyte{suffix}"
    path.write_bytes(gzip.compress(idx(digits)) if suffix else idx(digits))
    assert np.array_equal(read_digits(path), digits)


def test_other_files_raise(tmp_path):
    pytest.importorskip("idx2numpy")
    labels, text, cut = (tmp_path / name for name in ("labels", "text", "cut.gz"))
    labels.write_bytes(idx(np.zeros(5, dtype=np.uint8)))
    text.write_text("no digits")
    cut.write_bytes(gzip.compress(idx(DIGIT))[:-9])
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_digits(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="must contain images .* is it a file of labels"):
        read_digits(labels)
    huge = tmp_path / "huge"
    huge.write_bytes(idx(DIGIT)[:4] + b"\x7f\xff\xff\xff" * 3)
    for path in (text, cut, huge):
        with pytest.raises(ValueError, match="is not an IDX file"):
            read_digits(path)
    with pytest.raises(ValueError, match="digits must be uint8"):
        MovingMNIST(np.zeros((3, 28, 28)))
