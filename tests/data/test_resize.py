import numpy as np
import pytest
from PIL import Image, ImageOps

from vgen.data.resize import Fit


@pytest.fixture
def frames():
    coarse = np.random.default_rng(0).integers(0, 256, (2, 5, 8, 3), dtype=np.uint8)
    return np.stack([np.array(Image.fromarray(image).resize((64, 36), Image.Resampling.BICUBIC)) for image in coarse])


@pytest.mark.parametrize("target", [(16, 16), (8, 32), (72, 128), (18, 32), (64, 36)])
def test_frames_are_center_cropped_and_resized_as_pillow_does(frames, target):
    fit = Fit(frames.shape[1:3], target)
    expected = [ImageOps.fit(Image.fromarray(frame), target[::-1], Image.Resampling.LANCZOS) for frame in frames]
    difference = abs(fit.to_target(frames).astype(int) - np.stack([np.array(image) for image in expected]))
    assert fit.to_target(frames).shape == (2, *target, 3)
    assert difference.mean() < 2  # pillow crops to fractions of a pixel
    assert fit.back(fit.to_target(frames)).shape == fit.crop(frames).shape == (2, *fit.cropped, 3)
    height, width = fit.cropped
    assert (height == 36 or width == 64) and height <= 36 and width <= 64
    assert height / width == pytest.approx(target[0] / target[1], rel=0.05)


def test_frames_of_the_target_size_do_not_change(frames):
    fit = Fit((36, 64), (36, 64))
    assert fit.to_target(frames) is not None and np.array_equal(fit.to_target(frames), frames)
    assert np.array_equal(fit.back(frames), frames)


def test_a_fit_describes_itself_in_one_line():
    assert (
        str(Fit((36, 64), (16, 16)))
        == "the central 36x36 of 64x36 is resized to 16x16 for the model; the output has 36x36"
    )
    assert str(Fit((32, 32), (16, 16))) == "32x32 is resized to 16x16 for the model; the output has 32x32"


def test_non_square_pixels_become_square():
    fit = Fit((480, 720), (16, 16), 32 / 27)  # PAL widescreen has 64/45, NTSC 4:3 has 8/9, NTSC 16:9 has 32/27
    assert fit.cropped == (480, 405) and fit.output == (480, 480)
    frames = np.zeros((2, 480, 720, 3), np.uint8)
    assert fit.crop(frames).shape == fit.back(fit.to_target(frames)).shape == (2, 480, 480, 3)
    assert "720x480 with pixels of aspect ratio 1.185 is resized to 16x16" in str(fit)


@pytest.mark.parametrize(("offset", "left"), [(0.0, 0), (0.5, 14), (1.0, 28)])
def test_a_crop_can_be_anywhere(frames, offset, left):
    fit = Fit((36, 64), (36, 36), offset=(0.5, offset))
    assert np.array_equal(fit.to_target(frames), frames[:, :, left : left + 36])
    assert str(fit).startswith("the central 36x36 of 64x36" if offset == 0.5 else "a 36x36 part of 64x36")
