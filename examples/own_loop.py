"""A rollout in a custom loop: denoise a chunk with a read-only state, write it to the state, decode it.

python examples/own_loop.py --num_chunks 16 --output loop.mp4
"""

import argparse

from vgen import TemporalState, VideoGenPipeline  # before torch, whose idle threads then leave the cores to others
from vgen.data.video_io import VideoWriter
from vgen.io.pixels import to_frames

import torch


@torch.no_grad()
def main(prompt: str, num_chunks: int, num_inference_steps: int, output: str) -> None:
    """Writes a video of `1 + 4 * (num_chunks - 1)` frames."""
    pipe = VideoGenPipeline.from_pretrained("vgen/shapes-64")
    denoiser, scheduler, vae, scale = pipe.transformer, pipe.scheduler, pipe.vae, pipe.config.guidance_scale
    texts = torch.cat(pipe.encode_prompt(prompt)[::-1])  # negative and positive rows, (2, l, d)
    generator = torch.Generator().manual_seed(0)
    memory, decoder_memory = TemporalState(), TemporalState()  # limits are those of the networks' configs
    with VideoWriter(output, pipe.config.frame_rate) as writer:
        for _ in range(num_chunks):
            latents = torch.randn(1, vae.config.z_dim, 1, 8, 8, generator=generator)  # one token frame of 64x64 pixels
            scheduler.set_timesteps(num_inference_steps)
            for timestep in scheduler.timesteps:
                both = torch.cat([latents, latents])
                out = denoiser(both, timestep.expand(2), texts, frame_rate=8.0, state=memory.frozen()).sample
                negative, positive = out.chunk(2)
                latents = scheduler.step(negative + scale * (positive - negative), timestep, latents).prev_sample
            denoiser(torch.cat([latents, latents]), torch.zeros(2), texts, frame_rate=8.0, state=memory)
            writer.append(to_frames(vae.decode(vae.denormalize(latents), state=decoder_memory).sample)[0])
    print(f"wrote {output}; the state holds {memory.num_frames} token frames in {memory.num_bytes / 2**10:.0f} KiB")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", default="a red circle bounces")
    parser.add_argument("--num_chunks", type=int, default=16)
    parser.add_argument("--num_inference_steps", type=int, default=20)
    parser.add_argument("--output", default="loop.mp4")
    main(**vars(parser.parse_args()))
