"""Attention with frame groups run by run, compared with one call with a dense mask: time and peak memory as ratios.

    python benchmarks/frame_groups.py

`ours` is a block's self-attention as the Transformer runs it: long sequences without a mask. `theirs` is the same
layer with the mask. Groups: `image` is one known frame before the others, `chunks` are 3 frames each.
"""

from functools import partial

import torch
from pairs import compare, make_parser

from vgen.temporal.attention import (
    RotaryPositions,
    SpacetimeAttention,
    attention_mask,
    group_runs,
    make_groups,
    runs_mask,
)

GROUPS = {
    "image": lambda n: make_groups("full", n, num_leading=1),
    "causal": lambda n: make_groups("causal", n),
    "chunks": lambda n: make_groups("chunk", n, chunk_size=3),
}


def build(groups: str, dtype: str, frames: int, tokens: int, heads: int, ours: bool):
    """The call of one case: a forward pass, the mask included."""
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    layer = SpacetimeAttention(heads * 64, heads, 64).to(device, getattr(torch, dtype))
    x = torch.randn(1, frames * tokens, heads * 64, device=device).to(layer.to_q.weight.dtype)
    rotary = RotaryPositions(64)(torch.arange(frames, device=device), tokens, 1)
    row = tuple(GROUPS[groups](frames))

    def call():
        if ours:
            mask = attention_mask((row,), layer.processor.takes_mask, x, tokens=tokens)
        else:
            mask = runs_mask((group_runs(row, tokens=tokens),), x)
        return layer(x, attention_mask=mask, rotary_emb=rotary)

    return call


def main() -> None:
    """Prints one line per case."""
    parser = make_parser(__doc__)
    parser.add_argument("--frames", type=int, default=21)
    parser.add_argument("--tokens", type=int, nargs="+", default=[400], help="tokens per frame; 1560 are 480x832")
    parser.add_argument("--heads", type=int, default=2)
    args = parser.parse_args()
    cases = {
        f"{groups} {args.frames} x {tokens} {dtype}": partial(build, groups, dtype, args.frames, tokens, args.heads)
        for dtype in args.dtypes
        for tokens in args.tokens
        for groups in GROUPS
    }
    compare(cases, args)


if __name__ == "__main__":
    main()
