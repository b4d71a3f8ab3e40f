"""Peak memory of streamed decoding of a long video, relative to a short one.

    python benchmarks/streaming_decode.py

Each length runs in its own process, on random latents; memory is the peak resident size above that after loading.
glibc's dynamic mmap threshold rises as large blocks are freed, so larger and larger blocks are allocated on the heap,
which fragments: the resident size grows with the number of slices although the live memory does not. The `vgen`
command and the jobs fix the threshold (`vgen.io.allocator`), and so does this script, unless `--allocator glibc` keeps
glibc's default.
"""

import argparse
import json
from pathlib import Path

import torch
from pairs import in_new_process, peak_mebibytes

from vgen.hub import find_checkpoint
from vgen.io.allocator import bound_memory
from vgen.models.vae import CausalVideoVAE


def measure(num_frames: int, size: int, model: str, frames_per_slice: int | None, allocator: str) -> float:
    """Peak memory in MiB, without that of the loaded network."""
    if allocator == "vgen":
        bound_memory()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    vae = CausalVideoVAE.from_pretrained(str(find_checkpoint(model)), subfolder="vae").eval().to(device)
    vae.frames_per_slice = frames_per_slice
    loaded = peak_mebibytes()
    ratio = vae.spatial_compression_ratio
    shape = (1, vae.config.z_dim, vae.grid.num_latents(num_frames), size // ratio, size // ratio)
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)
    frames = 0
    with torch.no_grad():
        for part in vae.decode_stream(latents):
            frames += part.shape[2]
    assert frames == num_frames
    return peak_mebibytes() - loaded


def main() -> None:
    """Prints both peaks and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vgen/shapes-64")
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--num-frames", type=int, nargs="+", default=[17, 257])
    parser.add_argument("--frames-per-slice", type=int, help="by default, it depends on the size")
    parser.add_argument("--allocator", choices=["vgen", "glibc"], default="vgen")
    parser.add_argument("--output", type=Path, help="write the numbers here as JSON")
    args = parser.parse_args()
    peaks = {}
    for num_frames in args.num_frames:
        peak = in_new_process(measure, num_frames, args.size, args.model, args.frames_per_slice, args.allocator)
        peaks[num_frames] = peak
        print(f"{num_frames} frames of {args.size}x{args.size}: {peak:.0f} MiB")
    first, *_, last = peaks.values()
    print(f"ratio: {last / first:.3f}")
    if args.output:
        args.output.write_text(json.dumps(peaks, indent=1))


if __name__ == "__main__":
    main()
