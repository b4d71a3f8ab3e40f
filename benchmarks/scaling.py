"""Expected scaling of data-parallel training to many GPUs, calculated from the compute and the messages of a step.

    python benchmarks/scaling.py --output docs/results/scaling.json
    python benchmarks/scaling.py --inter-bandwidth 12.5e9   # with 100 Gb/s Ethernet for each GPU

Compute: for the recipes, the throughput that their scripts log (`throughput/clips_per_second`) on one GPU; for the
layout of Wan 2.1 1.3B, the FLOPs of a step divided by `--peak` times `--mfu`, which is an assumption. Messages: the
bytes that each strategy sends, counted on the network. Time of a message: hierarchical rings, first over the GPUs of a
machine, then over the machines, where each GPU sends its share through its own network adapter. The batch of each GPU
is the same for all numbers of GPUs (weak scaling). Not included: data loading, stragglers, checkpoints and scores.
"""

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from scripts import ROOT
from torch import nn

from vgen.models.transformer import SpacetimeTransformer
from vgen.models.vae import CausalVideoVAE
from vgen.training.throughput import BACKWARD, count_flops

NUM_GPUS = (8, 64, 512)
WAN_1_3B = {
    "num_attention_heads": 12, "attention_head_dim": 128, "in_channels": 16, "out_channels": 16, "text_dim": 4096,
    "freq_dim": 256, "ffn_dim": 8960, "num_layers": 30,
}  # fmt: skip
WAN_LATENTS = (1, 16, 21, 60, 104)
"""Latents of one clip of 81 frames at 480x832 pixels: `(b, c, t, h, w)`."""
BUCKET = 25 * 2**20
"""Size in bytes of DDP's messages, the default of PyTorch."""


@dataclass(frozen=True)
class Links:
    """The connections between GPUs. Bandwidths are in bytes per second, in each direction, for each GPU."""

    gpus_per_machine: int = 8
    intra_bandwidth: float = 450e9
    inter_bandwidth: float = 50e9
    intra_latency: float = 5e-6
    inter_latency: float = 10e-6


@dataclass(frozen=True)
class Message:
    """What one strategy sends in a step."""

    kind: Literal["all-reduce", "all-gather", "reduce-scatter"]
    size: float
    """Bytes of the whole tensor, in all messages of this kind together."""
    count: int
    """Number of messages, each of which pays the latency."""

    def seconds(self, num_gpus: int, links: Links) -> float:
        """Time of these messages. An all-reduce is a reduce-scatter and an all-gather."""
        inner = min(num_gpus, links.gpus_per_machine)
        machines = num_gpus // inner
        transfer = (inner - 1) / inner * self.size / links.intra_bandwidth
        transfer += (machines - 1) / machines * self.size / inner / links.inter_bandwidth
        latency = (inner - 1) * links.intra_latency + (machines - 1) * links.inter_latency
        return (2 if self.kind == "all-reduce" else 1) * (transfer + self.count * latency)


def messages(network: nn.Module, strategy: str) -> list[Message]:
    """What a strategy sends in a step: DDP in float32, FSDP2 and DeepSpeed in bf16."""
    weights = sum(weight.numel() for weight in network.parameters())
    if strategy == "DDP":
        return [Message("all-reduce", 4 * weights, -(-4 * weights // BUCKET))]
    if strategy == "ZeRO-2":  # gradients to the owners of their optimizer states, and the new weights back
        count = -(-2 * weights // BUCKET)
        return [Message("reduce-scatter", 2 * weights, count), Message("all-gather", 2 * weights, count)]
    assert strategy == "FSDP2"  # and ZeRO-3: the blocks' weights for each of both passes, the other weights once
    blocks = [module for module in network.modules() if type(module).__name__ in network._repeated_blocks]
    inside = sum(weight.numel() for block in blocks for weight in block.parameters())
    return [
        Message("all-gather", 2 * (weights + inside), 2 * len(blocks) + 1),
        Message("reduce-scatter", 2 * weights, len(blocks) + 1),
    ]


def scaling(compute: float, sent: list[Message], links: Links) -> dict[str, Any]:
    """Step time and efficiency by number of GPUs, without and with full overlap of messages and compute."""
    found = {}
    for num_gpus in NUM_GPUS:
        sending = sum(message.seconds(num_gpus, links) for message in sent)
        found[str(num_gpus)] = {
            "message seconds": sending,
            "step seconds": {"no overlap": compute + sending, "full overlap": max(compute, sending)},
            "efficiency": {
                "no overlap": compute / (compute + sending),
                "full overlap": compute / max(compute, sending),
            },
        }
    return found


def networks(args: argparse.Namespace) -> dict[str, tuple[nn.Module, float, tuple[str, ...]]]:
    """Networks on the meta device, seconds of a step's compute on one GPU, and strategies, by name."""
    recipes = {
        name: yaml.safe_load((ROOT / f"train/recipes/{name}.yaml").read_text())
        for name in ("shapes-64", "shapes-64-vae")
    }
    with torch.device("meta"):
        denoiser = SpacetimeTransformer(text_dim=128, **recipes["shapes-64"]["model"])
        vae = CausalVideoVAE(**recipes["shapes-64-vae"]["model"])
        wan = SpacetimeTransformer(**WAN_1_3B)
    return {
        "shapes-64": (denoiser, recipes["shapes-64"]["batch_size"] / args.denoiser_clips, ("DDP",)),
        "shapes-64-vae": (vae, recipes["shapes-64-vae"]["batch_size"] / args.vae_clips, ("DDP",)),
        "Wan 2.1 1.3B": (wan, step_flops(wan) / (args.peak * args.mfu), ("DDP", "ZeRO-2", "FSDP2")),
    }


def step_flops(network: SpacetimeTransformer, shape: tuple[int, ...] = WAN_LATENTS) -> int:
    """Operations of a training step on latents of a shape. The network is on the meta device."""
    latents = torch.empty(shape, device="meta")
    timestep = torch.empty(shape[0], shape[2], device="meta")
    prompt = torch.empty(shape[0], 512, network.text_dim, device="meta")
    return (1 + BACKWARD) * count_flops(lambda: network(latents, timestep, prompt))


def main() -> None:
    """Prints the results, or writes them to `--output`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in asdict(Links()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    parser.add_argument("--denoiser-clips", type=float, default=573, help="clips/s of shapes-64, measured on an H200")
    parser.add_argument("--vae-clips", type=float, default=103, help="clips/s of shapes-64-vae, measured on an H200")
    parser.add_argument("--peak", type=float, default=989e12, help="peak FLOPS of a GPU; an H100 in bf16, dense")
    parser.add_argument("--mfu", type=float, default=0.4, help="assumed fraction of the peak")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    links = Links(**{name: getattr(args, name) for name in asdict(Links())})
    results: dict[str, Any] = {"assumptions": {k: v for k, v in vars(args).items() if k != "output"}}
    for name, (network, compute, strategies) in networks(args).items():
        for strategy in strategies:
            sent = messages(network, strategy)
            results[f"{name}, {strategy}"] = {
                "parameters": sum(weight.numel() for weight in network.parameters()),
                "compute seconds": compute,
                "messages": [asdict(message) for message in sent],
                "GPUs": scaling(compute, sent, links),
            }
    text = json.dumps(results, indent=1) + "\n"
    if args.output:
        args.output.write_text(text)
    else:
        print(text, end="")


if __name__ == "__main__":
    main()
