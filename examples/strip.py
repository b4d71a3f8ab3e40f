"""A picture of videos with one row per prompt and every other frame, as in the model card.

python examples/strip.py docs/shapes-64.png
"""

import sys

from vgen import VideoGenPipeline  # before torch, whose idle threads then leave the cores to others

import numpy as np
import torch
from PIL import Image

PROMPTS = [
    "a red circle moves right",
    "a large yellow star spins",
    "a green triangle grows on a navy background",
    "a small blue square moves up slowly and a large white circle bounces",
]

pipe = VideoGenPipeline.from_pretrained("vgen/shapes-64")
generators = [torch.Generator().manual_seed(0) for _ in PROMPTS]
videos = (pipe(PROMPTS, generator=generators).frames * 255).round().astype(np.uint8)
rows = [np.concatenate([np.pad(frame, ((2, 2), (2, 2), (0, 0))) for frame in video[::2]], axis=1) for video in videos]
Image.fromarray(np.concatenate(rows)).save(sys.argv[1])
