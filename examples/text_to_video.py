"""Text to video in a few lines."""

from vgen import VideoGenPipeline  # before torch, whose idle threads then leave the cores to others
from vgen.data.video_io import write_video

import torch

pipe = VideoGenPipeline.from_pretrained("vgen/shapes-64")
pipe.to("cuda" if torch.cuda.is_available() else "cpu")
generator = torch.Generator().manual_seed(0)
video = pipe("a red circle moves right", generator=generator).frames[0]  # (f, h, w, c) in [0, 1]
write_video((video * 255).round().astype("uint8"), "circle.mp4", frame_rate=pipe.config.frame_rate, overwrite=True)
