"""SpacetimeTransformer and diffusers' WanTransformer3DModel with the same weights: ratios of time and peak memory.

    python benchmarks/transformer.py

Median of interleaved pairs, of a forward pass and of a training step (forward, backward, AdamW).
"""

from functools import partial

import torch
from pairs import compare, make_parser

from vgen.models.transformer import SpacetimeTransformer

CONFIG = {
    "num_attention_heads": 4,
    "attention_head_dim": 64,
    "in_channels": 8,
    "out_channels": 8,
    "text_dim": 128,
    "freq_dim": 128,
    "ffn_dim": 768,
    "num_layers": 8,
}


def build(kind: str, dtype: str, side: int, batch_size: int, ours: bool):
    """The call of one case."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    network = SpacetimeTransformer(**CONFIG)
    network = (network if ours else network.to_diffusers()).to(device, getattr(torch, dtype))
    latents = torch.randn(batch_size, 8, 5, side, side, device=device).to(network.dtype)
    level = torch.full((batch_size,), 500.0, device=device)
    prompt = torch.randn(batch_size, 32, 128, device=device).to(network.dtype)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True)

    def forward():
        return network(hidden_states=latents, timestep=level, encoder_hidden_states=prompt).sample

    def step():
        forward().float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step if kind == "step" else torch.no_grad()(forward)


def main() -> None:
    """Prints one line per case."""
    parser = make_parser(__doc__)
    parser.add_argument("--sides", type=int, nargs="+", default=[8, 16], help="height and width of the latents")
    parser.add_argument("--batch-size", type=int, default=8)
    args = parser.parse_args()
    cases = {
        f"{kind} {args.batch_size} x 5 x {side} x {side} {dtype}": partial(build, kind, dtype, side, args.batch_size)
        for dtype in args.dtypes
        for side in args.sides
        for kind in ("forward", "step")
    }
    compare(cases, args)


if __name__ == "__main__":
    main()
