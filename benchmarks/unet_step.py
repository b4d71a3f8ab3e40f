"""A training step of UNet3D compared with two other libraries' U-Nets: time and peak memory as ratios.

These are diffusers' UNet3DConditionModel and video-diffusion-pytorch's Unet3D, with the same number of parameters,
resolution and batch size.

    pip install --no-deps video-diffusion-pytorch==0.7.0 einops-exts==0.0.4 rotary-embedding-torch==0.9.1
    python benchmarks/unet_step.py

The channels of UNet3D are chosen for each comparison so that the numbers of parameters agree within 5%. All networks
have three resolutions. video-diffusion-pytorch imports torchvision for a dataset class that is not used here; where
torchvision is not installed, an empty module replaces it.
"""

import importlib.machinery
import itertools
import sys
import types
from collections.abc import Callable
from functools import cache, partial

import diffusers
import torch
from pairs import compare, make_parser
from torch import nn

from vgen.models.unet import UNet3D

CHANNELS, TEXT = 8, 128
BLOCKS = ("DownBlock", "CrossAttnDownBlock", "CrossAttnDownBlock")
UP_BLOCKS = ("CrossAttnUpBlock", "CrossAttnUpBlock", "UpBlock")


def video_diffusion_pytorch() -> type[nn.Module]:
    """Imports the class, with an empty torchvision if it is not installed."""
    for name in ("torchvision", "torchvision.transforms", "torchvision.utils"):
        if name not in sys.modules:
            module = types.ModuleType(name)
            module.__spec__ = importlib.machinery.ModuleSpec(name, None)
            sys.modules[name] = module
    sys.modules["torchvision"].transforms = sys.modules["torchvision.transforms"]
    sys.modules["torchvision"].utils = sys.modules["torchvision.utils"]
    for name in ("ToTensor", "ToPILImage"):  # defaults of arguments
        setattr(sys.modules["torchvision.transforms"], name, object)
    from video_diffusion_pytorch.video_diffusion_pytorch import Unet3D

    return Unet3D


def make_ours(widths: tuple[int, ...]) -> UNet3D:
    """Builds our network."""
    return UNet3D(
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        block_out_channels=widths,
        down_block_types=[f"{name}2D" for name in BLOCKS],
        up_block_types=[f"{name}2D" for name in UP_BLOCKS],
        cross_attention_dim=TEXT,
        attention_head_dim=4,
        temporal_head_dim=16,
        norm_num_groups=16,
    )


def make_theirs(name: str) -> nn.Module:
    """Builds the network of another library."""
    if name == "diffusers":
        return diffusers.UNet3DConditionModel(
            in_channels=CHANNELS,
            out_channels=CHANNELS,
            block_out_channels=(64, 128, 256),
            down_block_types=[f"{name}3D" for name in BLOCKS],
            up_block_types=[f"{name}3D" for name in UP_BLOCKS],
            cross_attention_dim=TEXT,
            attention_head_dim=32,
        )
    return video_diffusion_pytorch()(dim=64, dim_mults=(1, 2, 4), channels=CHANNELS, cond_dim=TEXT)


def count(network: nn.Module) -> int:
    """The number of parameters."""
    return sum(weight.numel() for weight in network.parameters())


@cache
def matching_widths(name: str) -> tuple[int, ...]:
    """Channels per resolution, as near to 1 : 2 : 4 as possible with parameters within 5% of the other network's."""
    with torch.device("meta"):
        target = count(make_theirs(name))
        fitting = {}
        for first, second, third in itertools.product(range(32, 129, 16), range(48, 257, 16), range(96, 513, 16)):
            if not (1.5 <= second / first <= 2.5 and 1.5 <= third / second <= 2.5):
                continue
            widths = (first, second, third)
            if abs(count(make_ours(widths)) / target - 1) <= 0.05:
                fitting[widths] = abs(second / first - 2) + abs(third / second - 2)
    return min(fitting, key=lambda widths: fitting[widths])


def build(name: str, dtype: str, frames: int, side: int, batch_size: int, ours: bool) -> Callable[[], None]:
    """Builds a training step: forward, backward and AdamW, under autocast unless `dtype` is float32."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    network = (make_ours(matching_widths(name)) if ours else make_theirs(name)).to(device)
    latents = torch.randn(batch_size, CHANNELS, frames, side, side, device=device)
    timestep = torch.full((batch_size,), 500, device=device)
    prompt = torch.randn(batch_size, 32, TEXT, device=device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True)

    def predict() -> torch.Tensor:
        if not ours and name == "video-diffusion-pytorch":
            return network(latents, timestep, cond=prompt[:, 0])
        return network(latents, timestep, prompt).sample

    def step() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=dtype != "float32"):
            loss = (predict().float() - latents).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def main() -> None:
    """Prints one line per case."""
    parser = make_parser(__doc__)
    parser.add_argument("--frames", type=int, default=5)
    parser.add_argument("--side", type=int, default=16, help="height and width of the latents")
    parser.add_argument("--batch-size", type=int, default=4)
    libraries = ("diffusers", "video-diffusion-pytorch")
    parser.add_argument("--libraries", nargs="+", choices=libraries, default=libraries)
    args = parser.parse_args()
    size = (args.frames, args.side, args.batch_size)
    cases = {f"{name} {dtype}": partial(build, name, dtype, *size) for name in args.libraries for dtype in args.dtypes}
    for name in args.libraries:
        widths, theirs = matching_widths(name), make_theirs(name)
        print(f"{name}: {count(theirs):,} parameters, ours {count(make_ours(widths)):,} with channels {widths}")
    compare(cases, args)


if __name__ == "__main__":
    main()
