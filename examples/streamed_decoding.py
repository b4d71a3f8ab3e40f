"""Encodes and decodes a long video with the VAE, frame by frame, without holding it in memory.

    python examples/streamed_decoding.py clip.mp4 reconstruction.mp4

Memory does not depend on the length of the clip, and the result equals that of a single pass.
"""

import sys
from pathlib import Path

from vgen import CausalVideoVAE, TemporalState  # before torch, whose idle threads then leave the cores to others
from vgen.data.video_io import VideoWriter, iter_video, video_info
from vgen.hub import find_checkpoint
from vgen.io.pixels import from_frames, to_frames

import torch

source, target = map(Path, sys.argv[1:3])
vae = CausalVideoVAE.from_pretrained(find_checkpoint("vgen/shapes-64"), subfolder="vae").eval()
encoding, decoding = TemporalState(), TemporalState()
unit = vae.spatial_compression_ratio

with torch.no_grad(), VideoWriter(target, video_info(source).frame_rate or 8.0, overwrite=True) as writer:
    for frame in iter_video(source):
        height, width = (side // unit * unit for side in frame.shape[:2])
        clip = from_frames(frame[None, None, :height, :width])
        latents = vae.encode(clip, state=encoding).latent_dist.mode()  # zero or one latent
        decoded = vae.decode(latents, state=decoding).sample
        frames = to_frames(decoded)[0]
        if len(frames):
            writer.append(frames)
    waiting = encoding.pending
    print(f"wrote {target}; {0 if waiting is None else waiting.shape[2]} frames at the end did not fill a latent")
