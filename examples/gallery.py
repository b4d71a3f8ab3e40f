"""An animation of videos with their prompts, without selection, as in the README.

The prompts were chosen before any of these videos was generated. Video i has seed i.

python examples/gallery.py docs/shapes-64.gif
"""

import sys
import textwrap

from vgen import VideoGenPipeline  # before torch, whose idle threads then leave the cores to others
from vgen.data.resize import enlarge

import numpy as np
import torch
from PIL import Image, ImageDraw

COLUMNS, ROWS, SCALE, MARGIN, CAPTION = 3, 2, 4, 4, 40
PROMPTS = [
    "a red circle bounces and a blue star spins",
    "a large yellow star spins and a small cyan circle moves right",
    "a green square bounces and an orange circle moves up left",
    "a purple triangle spins and a white star moves down on a navy background",
    "a large blue square grows and a red triangle bounces",
    "a cyan star spins and a yellow circle bounces on a brown background",
]

generators = [torch.Generator().manual_seed(index) for index in range(len(PROMPTS))]
pipe = VideoGenPipeline.from_pretrained("vgen/shapes-64")
videos = (pipe(PROMPTS, generator=generators).frames * 255).round().astype(np.uint8)  # (b, f, h, w, c)
videos = np.stack([[enlarge(frame, SCALE) for frame in video] for video in videos])

_, num_frames, height, width, _ = videos.shape
cell = (width + 2 * MARGIN, height + 2 * MARGIN + CAPTION)
sheet = Image.new("RGB", (COLUMNS * cell[0], ROWS * cell[1]), "white")
draw = ImageDraw.Draw(sheet)
corners = [(index % COLUMNS * cell[0] + MARGIN, index // COLUMNS * cell[1] + MARGIN) for index in range(len(PROMPTS))]
for (x, y), prompt in zip(corners, PROMPTS, strict=True):
    draw.multiline_text((x, y + height + 2), textwrap.fill(prompt, 36), fill="black", font_size=14, spacing=2)
frames = np.repeat(np.array(sheet)[None], num_frames, axis=0)
for (x, y), video in zip(corners, videos, strict=True):
    frames[:, y : y + height, x : x + width] = video
# one palette for all frames, so that a color does not change from frame to frame
palette = Image.fromarray(frames[::4].reshape(-1, *frames.shape[2:])).quantize(256, Image.Quantize.FASTOCTREE)
images = [Image.fromarray(frame).quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
milliseconds = 1000 / pipe.config.frame_rate
images[0].save(sys.argv[1], save_all=True, append_images=images[1:], duration=milliseconds, loop=0, optimize=True)
