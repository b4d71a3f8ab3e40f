"""Seconds of one training step of the shipped denoiser, by attention backend, with and without compilation.

    python benchmarks/denoiser_step.py --batch-size 64

bf16 autocast, AdamW, random latents; the median of the steps after the first two.
"""

import argparse
import statistics

import torch
from pairs import seconds

from vgen.hub import find_checkpoint
from vgen.models.transformer import SpacetimeTransformer


def step_seconds(backend: str, compiled: bool, args: argparse.Namespace) -> float:
    """The median of one setting."""
    network = SpacetimeTransformer.from_pretrained(find_checkpoint(args.model), subfolder="transformer").train()
    network.set_attention_backend(backend)
    if compiled:
        network.compile_repeated_blocks(dynamic=False)
    config = network.config
    latents = torch.randn(args.batch_size, config.in_channels, config.trained_token_frames, 8, 8)
    timestep = torch.rand(args.batch_size, config.trained_token_frames) * 1000
    prompt = torch.randn(args.batch_size, 32, config.text_dim)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            out = network(latents, timestep, prompt, frame_rate=8.0).sample
        out.float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return statistics.median([seconds(step) for _ in range(args.num_steps + 2)][2:])


def main() -> None:
    """Prints one line per setting."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vgen/shapes-64")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--num-steps", type=int, default=8)
    parser.add_argument("--backends", nargs="+", default=["native", "_native_math"])
    args = parser.parse_args()
    for backend in args.backends:
        for compiled in (False, True):
            kind = "compiled" if compiled else "eager"
            print(f"{backend:<14}{kind:<10}{step_seconds(backend, compiled, args):.3f} s", flush=True)


if __name__ == "__main__":
    main()
