"""An animation of videos with their prompts, without selection, as in the README.

The prompts are the first captions of ShapesWorld's held-out split, so their combinations of color, shape and motion
do not occur in the training data. Video i has seed i.

python examples/gallery.py docs/shapes-64.gif
"""

import sys
import textwrap

import numpy as np
import torch
from PIL import Image, ImageDraw

from vgen import VideoGenPipeline
from vgen.data.shapes import ShapesWorld
from vgen.metrics.suites import WORLD_SEED

COLUMNS, ROWS, SCALE, MARGIN, CAPTION = 4, 2, 2, 4, 56

world = ShapesWorld(split="held_out", seed=WORLD_SEED)
prompts = [world.caption(index) for index in range(COLUMNS * ROWS)]
generators = [torch.Generator().manual_seed(index) for index in range(len(prompts))]
pipe = VideoGenPipeline.from_pretrained("vgen/shapes-64")
videos = (pipe(prompts, generator=generators).frames * 255).round().astype(np.uint8)  # (b, f, h, w, c)
videos = videos.repeat(SCALE, axis=2).repeat(SCALE, axis=3)

_, num_frames, height, width, _ = videos.shape
cell = (width + 2 * MARGIN, height + 2 * MARGIN + CAPTION)
sheet = Image.new("RGB", (COLUMNS * cell[0], ROWS * cell[1]), "white")
draw = ImageDraw.Draw(sheet)
corners = [(index % COLUMNS * cell[0] + MARGIN, index // COLUMNS * cell[1] + MARGIN) for index in range(len(prompts))]
for (x, y), prompt in zip(corners, prompts, strict=True):
    draw.multiline_text((x, y + height + 2), textwrap.fill(prompt, 28), fill="black", font_size=9, spacing=1)
frames = np.repeat(np.array(sheet)[None], num_frames, axis=0)
for (x, y), video in zip(corners, videos, strict=True):
    frames[:, y : y + height, x : x + width] = video
# one palette for all frames, so that a color does not change from frame to frame
palette = Image.fromarray(frames[::4].reshape(-1, *frames.shape[2:])).quantize(256, Image.Quantize.FASTOCTREE)
images = [Image.fromarray(frame).quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
milliseconds = 1000 / pipe.config.frame_rate
images[0].save(sys.argv[1], save_all=True, append_images=images[1:], duration=milliseconds, loop=0, optimize=True)
