"""Reading of still images, the same way for frames of folders, for image files and for Pillow's images."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from vgen.io.errors import one_line

logger = logging.getLogger(__name__)

IMAGE_FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF")
"""Pillow's names of the formats that are read, whatever the suffix. Others may start programs, as EPS does."""
MAX_PIXELS = 2**26
"""Largest number of pixels of a frame, 8192x8192: a file of a few kilobytes can declare far more than memory holds."""
MIN_SHOWN_SIZE = 256
"""Pixels on the longer side below which videos are enlarged, because players and browsers blur tiny ones."""


def shown_scale(height: int, width: int) -> int:
    """The smallest factor that enlarges this size to at least `MIN_SHOWN_SIZE` pixels on the longer side."""
    return math.ceil(MIN_SHOWN_SIZE / max(height, width))


def read_image(path: Path) -> np.ndarray:
    """Reads an image file as uint8 `(h, w, 3)`, upright as its EXIF data says, and otherwise as `image_pixels` does.

    Pillow's warnings, for example of damaged EXIF data, are logged as one line with the name of the file.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: It is not an image, or is damaged or truncated, including its EXIF data and color profile.
    """
    with warnings.catch_warnings(record=True) as caught, opened_image(path, path) as image:
        warnings.simplefilter("always")
        pixels = image_pixels(ImageOps.exif_transpose(image))
    if caught:
        logger.warning(one_line(f"{path}: {caught[0].message}"))
    return pixels


def image_pixels(image: Image.Image) -> np.ndarray:
    """The pixels of an image, uint8 `(h, w, 3)`.

    Transparent pixels are composited on black. 16-bit gray is scaled from [0, 65535], and floats from [0, 1].

    Raises:
        ValueError: The values are out of range.
    """
    if image.mode.startswith(("I", "F")):
        white = 1 if image.mode == "F" else 65535
        values = np.asarray(image, np.float64)
        if not (values.min() >= 0 and values.max() <= white):
            raise ValueError(f"expected gray values in [0, {white}], got {values.min():g} to {values.max():g}")
        return np.repeat(np.rint(values * (255 / white)).astype(np.uint8)[..., None], 3, axis=-1)
    return on_black(np.array(image.convert("RGBA" if image.has_transparency_data else "RGB")))


def on_black(pixels: np.ndarray) -> np.ndarray:
    """Composites RGBA `(..., 4)` on black; returns RGB unchanged."""
    if pixels.shape[-1] == 3:
        return pixels
    color, alpha = pixels[..., :3], pixels[..., 3:].astype(np.uint16)
    return ((color * alpha + 127) // 255).astype(np.uint8)


class FrameSizeError(ValueError):
    """A frame has more than `MAX_PIXELS` pixels."""


def check_frame_size(name: object, height: int, width: int) -> None:
    """Checks the size of a frame before it is decoded.

    Raises:
        ValueError: It has more than `MAX_PIXELS` pixels.
    """
    if height * width > MAX_PIXELS:
        raise FrameSizeError(
            f"{name} has frames of {width}x{height} pixels: at most {MAX_PIXELS} pixels are supported"
        )


@contextmanager
def opened_image(file: Any, name: Any) -> Iterator[Image.Image]:
    """Opens an image with Pillow. Any error in the block is reported as one of the file.

    Args:
        file: Path or open file.
        name: Name for errors.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: It is not an image, is too large, or is damaged or truncated.
    """
    if isinstance(file, Path) and file.exists() and not file.is_file():
        raise ValueError(f"{name} is a pipe, a device or a folder: expected an image")
    try:
        with Image.open(file, formats=IMAGE_FORMATS) as image:
            check_frame_size(name, image.height, image.width)
            yield image
    except (FileNotFoundError, FrameSizeError):
        raise
    except Exception as error:  # Pillow's plugins raise exceptions of many types
        raise ValueError(f"{name} is not an image, or is damaged or truncated: {error}") from error
