"""Previews of videos: animations for notebooks, pictures for terminals."""

from __future__ import annotations

import io
from base64 import b64encode
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from vgen.io.images import shown_scale

if TYPE_CHECKING:
    from rich.console import Console
    from rich.segment import Segment

PREVIEW_RATE = 8.0
"""Frames per second of animations: an output does not know its own rate."""
_SHADES = " .:-=+*#%@"  # from dark to bright, for terminals without colors


def animations_html(videos: Iterable[Any]) -> str:
    """Images for HTML, one lossless animation per video.

    Args:
        videos: Each as `to_clip` takes it.

    Raises:
        ValueError: One is not a video.
    """
    from vgen.io.pixels import to_clip, to_frames

    return "\n".join(_animation(to_frames(to_clip(video)[None])[0]) for video in videos)


def _animation(frames: Any) -> str:
    first, *others = map(Image.fromarray, frames)
    file = io.BytesIO()
    options: dict[str, Any] = {"duration": round(1000 / PREVIEW_RATE), "loop": 0, "lossless": True}
    first.save(file, format="webp", save_all=True, append_images=others, **options)
    scale = shown_scale(first.height, first.width)
    content = b64encode(file.getvalue()).decode()
    size = f'width="{first.width * scale}" height="{first.height * scale}"'
    return f'<img src="data:image/webp;base64,{content}" {size} style="image-rendering: pixelated">'


def print_images(images: Sequence[np.ndarray], console: Console) -> None:
    """Prints images side by side, as large as the terminal allows.

    A character is two pixels, one above the other. Without colors, as with the environment variable `NO_COLOR`, it is
    one of a few shades.

    Args:
        images: uint8 `(h, w, 3)`, of any sizes.
        console: Where to print.
    """
    from rich.segment import Segment, Segments

    width = max(1, (console.width - len(images) + 1) // len(images))
    height = 2 * max(1, console.height - 2)  # leaves lines for a message and the prompt
    with_colors = console.color_system is not None and not console.no_color and not console.options.ascii_only
    draw = _half_blocks if with_colors else _shades
    columns = [list(draw(_fitted(image, width, height))) for image in images]
    segments: list[Segment] = []
    for row in range(max(map(len, columns))):
        for index, column in enumerate(columns):
            if index:
                segments.append(Segment(" "))
            segments += column[row] if row < len(column) else [Segment(" " * len(column[0]))]
        segments.append(Segment.line())
    console.print(Segments(segments), end="")


def _fitted(image: np.ndarray, width: int, height: int) -> np.ndarray:
    """Resizes an image to the largest size within these bounds; the number of rows is even."""
    scale = min(width / image.shape[1], height / image.shape[0])
    size = max(1, round(scale * image.shape[1])), 2 * max(1, round(scale * image.shape[0] / 2))
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BOX))


def _half_blocks(image: np.ndarray) -> Iterator[list[Segment]]:
    """Lines of an image whose characters have one pixel in the foreground and the one below in the background."""
    from rich.color import Color
    from rich.segment import Segment
    from rich.style import Style

    for rows in zip(image[::2].tolist(), image[1::2].tolist(), strict=True):
        pairs = zip(*rows, strict=True)
        styles = (Style.from_color(*(Color.from_rgb(*color) for color in pair)) for pair in pairs)
        yield [Segment("\N{UPPER HALF BLOCK}", style) for style in styles]


def _shades(image: np.ndarray) -> Iterator[list[Segment]]:
    """Lines of an image whose characters are as bright as two pixels, one above the other."""
    from rich.segment import Segment

    brightness = np.asarray(Image.fromarray(image).convert("L"), dtype=int)
    for row in (brightness[::2] + brightness[1::2]) * len(_SHADES) // 512:
        yield [Segment("".join(_SHADES[shade] for shade in row))]
