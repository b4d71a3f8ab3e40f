import numpy as np
import pytest
from PIL import Image

from vgen.data.video_io import read_video
from vgen.io.images import image_pixels, read_image
from vgen.io.pixels import to_pixels

RAMP = np.arange(0, 256, 4, dtype=np.uint8).reshape(8, 8)
TRANSPARENT = np.where(np.arange(8) < 4, 0, 255).astype(np.uint8) * np.ones((8, 1), np.uint8)


def palette():
    image = Image.fromarray(RAMP).convert("P")
    image.putpalette([level for index in range(256) for level in (index,) * 3])
    image.putdata([min(int(level), 200) for level in RAMP.ravel()])
    image.info["transparency"] = 200
    return image


# How to make it, the file to save it in, and the gray levels that it shows.
STILLS = {
    "L": (Image.fromarray(RAMP), "a.png", RAMP),
    "1": (Image.fromarray(RAMP >= 128), "a.png", 255 * (RAMP >= 128)),
    "I;16": (Image.fromarray(RAMP.astype(np.uint16) * 257), "a.png", RAMP),
    "I": (Image.fromarray(RAMP.astype(np.int32) * 257), "a.tif", RAMP),
    "F": (Image.fromarray(RAMP.astype(np.float32) / 255), "a.tif", RAMP),
    "LA": (Image.merge("LA", [*map(Image.fromarray, (RAMP, TRANSPARENT))]), "a.png", RAMP * (TRANSPARENT > 0)),
    "RGBA": (
        Image.merge("RGBA", [Image.fromarray(RAMP)] * 3 + [Image.fromarray(TRANSPARENT)]),
        "a.png",
        RAMP * (TRANSPARENT > 0),
    ),
    "P with transparency": (palette(), "a.png", np.where(RAMP >= 200, 0, RAMP)),
    "CMYK": (
        Image.merge("CMYK", [Image.fromarray(255 - RAMP)] * 3 + [Image.fromarray(0 * RAMP)]), "a.tif", RAMP
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", STILLS)
def test_stills_of_any_kind_show_the_same_everywhere(tmp_path, kind):
    image, name, expected = STILLS[kind]
    path = tmp_path / name
    image.save(path)
    read = read_image(path)
    assert read.dtype == np.uint8 and np.array_equal(read, np.repeat(expected[..., None], 3, -1))
    with Image.open(path) as opened:
        assert np.array_equal(image_pixels(opened), read)
        assert np.array_equal(((to_pixels(opened) + 1) * 127.5).round().movedim(0, -1).numpy(), read)
    if path.suffix == ".png":
        assert np.array_equal(read_video(tmp_path)[0][0], read)


def test_stills_are_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate clockwise to view
    Image.fromarray(np.rot90(RAMP)).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(read_image(tmp_path / "a.png")[..., 0], RAMP)
    assert np.array_equal(read_video(tmp_path)[0][0, ..., 0], RAMP)


def truncated(path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:500])


DAMAGED = {
    "trunc.png": truncated,
    "trunc.jpg": truncated,
    "text.png": lambda path: path.write_text("no image" * 99),
    "hdr.tif": lambda path: Image.fromarray(RAMP.astype(np.float32)).save(path),
    "nan.tif": lambda path: Image.fromarray(np.full((8, 8), np.nan, np.float32)).save(path),
    "empty.jpg": lambda path: path.touch(),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_stills_raise_one_line_with_their_name(tmp_path, name):
    DAMAGED[name](tmp_path / name)
    with pytest.raises(ValueError, match=name) as raised:
        read_image(tmp_path / name)
    assert "\n" not in str(raised.value)
    if not name.endswith(".tif"):
        with pytest.raises(ValueError, match=name):
            read_video(tmp_path)


@pytest.mark.parametrize("name", ["a.jpg", "a.png"])
def test_damaged_exif_data_gives_one_line_with_the_name_of_the_file(tmp_path, caplog, recwarn, name):
    path, cut = tmp_path / name, b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\x01" * 40
    Image.fromarray(RAMP).save(path, exif=cut)
    assert np.abs(read_image(path)[..., 0].astype(int) - RAMP).max() < 12
    assert [f"{path}: Corrupt EXIF data" in message and "\n" not in message for message in caplog.messages] == [True]
    assert not recwarn.list
    if name == "a.png":
        Image.fromarray(RAMP).save(path, exif=b"garbage" * 9)
        with pytest.raises(ValueError, match=r"a\.png is not an image, or is damaged"):
            read_image(path)


def test_a_missing_still_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.png"):
        read_image(tmp_path / "nothing.png")
