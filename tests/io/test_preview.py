"""Pictures in the terminal."""

import io

import numpy as np
import pytest
from PIL import Image
from rich.ansi import AnsiDecoder
from rich.console import Console

from vgen.io.preview import print_images


def printed(images, **options):
    settings = {"force_terminal": True, "color_system": "truecolor", "width": 35, "height": 40} | options
    console = Console(file=io.StringIO(), legacy_windows=False, _environ={}, **settings)
    print_images(images, console)
    return console.file.getvalue()


def pixels_of(output):
    """What a terminal shows, read back by rich: rows of pairs of pixels, `None` where there is none."""
    for line in AnsiDecoder().decode(output.removesuffix("\n")):
        cells = []
        for segment in line.render(Console(width=999)):
            for character in segment.text.rstrip("\n"):
                assert character in "▀ "
                colors = (segment.style.color, segment.style.bgcolor) if character == "▀" else (None, None)
                cells.append([one and tuple(one.triplet) for one in colors])
        yield cells


def test_pictures_that_fit_are_shown_pixel_by_pixel():
    images = np.random.default_rng(0).integers(0, 256, (4, 6, 8, 3), dtype=np.uint8)
    rows = list(pixels_of(printed(images)))
    assert len(rows) == 3
    for number, image in enumerate(images):
        cells = np.array([row[9 * number : 9 * number + 8] for row in rows])  # rows, columns, halves, colors
        assert np.array_equal(cells.transpose(0, 2, 1, 3).reshape(6, 8, 3), image)
        assert number == 3 or all(row[9 * number + 8] == [None, None] for row in rows)


@pytest.mark.parametrize("size", [(64, 64), (3, 5), (200, 20), (30, 150), (1, 1)])
@pytest.mark.parametrize(("width", "height"), [(80, 24), (200, 50), (40, 12)])
def test_pictures_keep_their_shape_and_fill_the_terminal(size, width, height):
    rows = list(pixels_of(printed([np.full((*size, 3), 200, np.uint8)] * 4, width=width, height=height)))
    columns = sum(color is not None for color, _ in rows[0]) / 4
    assert columns == (width - 3) // 4 or len(rows) == height - 2
    assert max(map(len, rows)) <= width and len(rows) <= height - 2
    assert abs(columns * size[0] / size[1] - 2 * len(rows)) <= 1 + size[0] / size[1] / 2


def test_pictures_of_several_sizes_stand_side_by_side():
    wide, high = np.full((2, 8, 3), 255, np.uint8), np.full((8, 8, 3), 100, np.uint8)
    rows = list(pixels_of(printed([wide, high], width=17)))
    assert [[row[0][0] is not None, row[9][0] is not None] for row in rows] == [[True, True]] + 3 * [[False, True]]


@pytest.mark.parametrize("options", [{"no_color": True}, {"color_system": None}])
def test_without_colors_brightness_is_shown_by_characters(options):
    ramp = np.repeat(np.arange(0, 250, 26, dtype=np.uint8)[None, :, None], 3, 2).repeat(4, 0)
    lines = printed([ramp], width=10, **options).splitlines()
    assert lines == [" .:-=+*#%@"] * 2


def test_a_terminal_of_16_colors_gets_no_others():
    image = np.array(Image.effect_noise((8, 6), 90).convert("RGB"))
    output = printed([image], color_system="standard")
    assert "▀" in output and "38;2" not in output and "38;5" not in output
