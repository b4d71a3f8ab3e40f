"""Animated previews of videos for notebooks."""

from __future__ import annotations

import io
from base64 import b64encode
from collections.abc import Iterable
from typing import Any

from PIL import Image

from vgen.io.images import shown_scale
from vgen.io.pixels import to_clip, to_frames

PREVIEW_RATE = 8.0
"""Frames per second of previews: an output does not know its own rate."""


def animations_html(videos: Iterable[Any]) -> str:
    """Images for HTML, one lossless animation per video.

    Args:
        videos: Each as `to_clip` takes it.

    Raises:
        ValueError: One is not a video.
    """
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
