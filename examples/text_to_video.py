"""Text to video in a few lines."""

import torch

from vgen import VideoGenPipeline
from vgen.data.video_io import write_video

pipe = VideoGenPipeline.from_pretrained("vgen/shapes-64")
pipe.to("cuda" if torch.cuda.is_available() else "cpu")
video = pipe("a red circle moves right", generator=torch.Generator().manual_seed(0)).frames[
    0
]  # (f, h, w, c) in [0, 1]
write_video((video * 255).round().astype("uint8"), "circle.mp4", frame_rate=pipe.config.frame_rate, overwrite=True)
