"""CausalVideoVAE compared with diffusers' AutoencoderKLWan with the same weights: time and peak memory as ratios.

    python benchmarks/vae.py

Median of interleaved pairs. Ours works in slices whose length depends on the size of the frames; diffusers works in
slices of 4 frames. In the cases named `stream`, ours yields its slices and diffusers decodes in one call.
"""

from functools import partial

import torch
from pairs import compare, make_parser

from vgen.models.vae import CausalVideoVAE

CONFIG = {"base_dim": 32, "z_dim": 8, "dim_mult": [1, 2, 2], "temperal_downsample": [True, True]}


def build(
    kind: str, dtype: str, size: tuple[int, int], frames: int, frames_per_slice: int | None, ours: bool, config=CONFIG
):
    """The call of one case, on frames of `size` (height, width)."""
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    vae = CausalVideoVAE(**config).to(device, getattr(torch, dtype)).eval()
    vae.frames_per_slice = frames_per_slice
    network = vae if ours else vae.to_diffusers().to(device, getattr(torch, dtype)).eval()
    clip = torch.rand(1, 3, frames, *size, device=device).to(network.dtype)
    sides = (side // vae.spatial_compression_ratio for side in size)
    latents = torch.randn(1, vae.config.z_dim, vae.grid.num_latents(frames), *sides, device=device).to(network.dtype)
    if kind == "encode":
        return lambda: network.encode(clip)
    if kind == "decode" or not ours:
        return lambda: network.decode(latents)
    return lambda: [None for _ in network.decode_stream(latents)]


def main() -> None:
    """Prints one line per case."""
    parser = make_parser(__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 128])
    parser.add_argument(
        "--frames", type=int, nargs="+", default=[17, 65, 257], help="lengths for streamed decoding, in frames"
    )
    parser.add_argument(
        "--frames-per-slice",
        type=int,
        help="frames per slice of ours, at least 4, which is one latent; by default, it depends on their size",
    )
    args = parser.parse_args()
    cases = {}
    for dtype in args.dtypes:
        for size in args.sizes:
            for kind in ("encode", "decode"):
                cases[f"{kind} 17 frames {size} {dtype}"] = partial(
                    build, kind, dtype, (size, size), 17, args.frames_per_slice
                )
        for frames in args.frames:
            size = args.sizes[0]
            cases[f"stream {frames} frames {size} {dtype}"] = partial(
                build, "stream", dtype, (size, size), frames, args.frames_per_slice
            )
    compare(cases, args)


if __name__ == "__main__":
    main()
