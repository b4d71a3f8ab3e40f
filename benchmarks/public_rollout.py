"""A rollout in the layout of Self-Forcing 1.3B at reduced width, compared with the loop of its public code.

    git clone REPOSITORY_OF_SELF_FORCING ../Self-Forcing
    python benchmarks/public_rollout.py --public ../Self-Forcing --output docs/results/public_rollout.json

30 layers and 12 heads as in the checkpoint, of 16 instead of 128 channels; latents of 16x28 instead of 60x104; blocks
of 3 latents, 4 steps and a clean pass, and a window of 21 latents with the current block. Networks are random, in
float32, on one thread, one after the other in processes of their own, with the allocator of the `vgen` command.
Without CUDA, the public code has no attention: it gets PyTorch's here. Neither has a VAE.
"""

import argparse
import json
import subprocess
import sys
import time
import types
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import MagicMock

import torch
from pairs import peak_mebibytes

from vgen.io.allocator import bound_memory

HEADS, HEAD, FFN, LAYERS, TEXT = 12, 16, 1120, 30, 64
CHANNELS, HEIGHT, WIDTH, BLOCK, LOCAL = 16, 16, 28, 3, 21
PER_FRAME = HEIGHT // 2 * WIDTH // 2
STEPS = [1000, 750, 500, 250]


def main() -> None:
    """Runs both sides and prints their times and memory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--public", type=Path, required=True, help="checkout of the public Self-Forcing code")
    parser.add_argument("--blocks", type=int, default=60, help="blocks of 3 latents")
    parser.add_argument("--output", type=Path, help="write the numbers here as JSON")
    parser.add_argument("--side", choices=["ours", "public"], help="run one side in this process; used by the script")
    args = parser.parse_args()
    bound_memory()
    torch.set_num_threads(1)
    if args.side:
        print(json.dumps(ours(args.blocks) if args.side == "ours" else public(args.public.resolve(), args.blocks)))
        return
    found: dict[str, Any] = {"blocks": args.blocks}
    for side in ("ours", "public"):
        words = [sys.executable, __file__, "--public", args.public, "--blocks", str(args.blocks), "--side", side]
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        found[side] = summary(json.loads(done.stdout.splitlines()[-1]))
        print(side, {name: round(value, 2) for name, value in found[side].items()})
    if args.output:
        args.output.write_text(json.dumps(found, indent=1) + "\n")


def summary(run: dict[str, list[float]]) -> dict[str, float]:
    """Early and late times: medians of the first twenty blocks with a full window, and of the last twenty."""
    seconds, memory, full = run["seconds"], run["MiB"], LOCAL // BLOCK
    early, late = median(seconds[full : full + 20]), median(seconds[-20:])
    return {
        "seconds per block, early": early,
        "seconds per block, late": late,
        "late to early": late / early,
        "MiB, early": memory[full],
        "MiB, late": memory[-1],
    }


def record(times: list[float], memory: list[float], begin: float) -> float:
    """Adds the time of a block and the peak so far; returns the time now."""
    now = time.perf_counter()
    times.append(now - begin)
    memory.append(peak_mebibytes())
    return now


@torch.no_grad()
def ours(blocks: int) -> dict[str, list[float]]:
    """Times and peaks of this package."""
    from diffusers import FlowMatchLCMScheduler

    from vgen import SpacetimeTransformer, VideoGenPipeline

    torch.manual_seed(0)
    network = SpacetimeTransformer(
        num_attention_heads=HEADS, attention_head_dim=HEAD, ffn_dim=FFN, num_layers=LAYERS, text_dim=TEXT,
        tasks=["text", "leading"], group_modes=["chunk"], chunk_size=BLOCK, window=LOCAL - BLOCK,
    ).eval()  # fmt: skip
    sigmas = [step / 1000 for step in STEPS]
    pipe = VideoGenPipeline(FlowMatchLCMScheduler(shift=5.0), transformer=network, sigmas=sigmas, guidance_scale=1.0)
    rollout = pipe.rollout(
        prompt_embeds=torch.zeros(1, 512, TEXT), height=HEIGHT, width=WIDTH, first_chunk_size=BLOCK,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    times, memory, begin = [], [], time.perf_counter()
    for _ in range(blocks):
        rollout.step()
        begin = record(times, memory, begin)
    return {"seconds": times, "MiB": memory}


@torch.no_grad()
def public(folder: Path, blocks: int) -> dict[str, list[float]]:
    """Times and peaks of the public code."""
    sys.path.insert(0, str(folder))
    # what asks for a GPU or for torchvision when it is imported, and is not used
    package = types.ModuleType("wan")
    package.__path__ = [str(folder / "wan")]
    sys.modules |= {"demo_utils.memory": MagicMock(), "wan": package}
    torch.cuda.current_device = lambda: 0  # type: ignore[assignment]  # a default argument
    from pipeline.causal_inference import CausalInferencePipeline
    from utils import wan_wrapper
    from wan.modules import causal_model, model

    def attend(q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> Any:
        parts = (one.transpose(1, 2) for one in (q, k, v))
        return torch.nn.functional.scaled_dot_product_attention(*parts).transpose(1, 2)

    causal_model.attention = model.flash_attention = attend
    torch.manual_seed(0)
    network = causal_model.CausalWanModel(
        dim=HEADS * HEAD, ffn_dim=FFN, num_heads=HEADS, num_layers=LAYERS, text_dim=TEXT, local_attn_size=LOCAL
    ).eval()
    for block in network.blocks:
        block.self_attn.max_attention_size = LOCAL * PER_FRAME
    wrapper: Any = wan_wrapper.WanDiffusionWrapper.__new__(wan_wrapper.WanDiffusionWrapper)
    torch.nn.Module.__init__(wrapper)
    wrapper.model, wrapper.uniform_timestep, wrapper.seq_len = network, False, 32760
    wrapper.scheduler = wan_wrapper.FlowMatchScheduler(shift=5.0, sigma_min=0.0, extra_one_step=True)
    wrapper.scheduler.set_timesteps(1000, training=True)
    wrapper.post_init()

    class Loop(CausalInferencePipeline):
        """The public loop, with caches of the sizes of this network."""

        def _initialize_kv_cache(self, batch_size: int, dtype: torch.dtype, device: Any) -> None:
            self.kv_cache1 = [self._cache(LOCAL * PER_FRAME) for _ in range(LAYERS)]

        def _initialize_crossattn_cache(self, batch_size: int, dtype: torch.dtype, device: Any) -> None:
            self.crossattn_cache = [self._cache(512) | {"is_init": False} for _ in range(LAYERS)]

        def _cache(self, tokens: int) -> dict[str, Any]:
            ends = {name: torch.tensor([0]) for name in ("global_end_index", "local_end_index")}
            return {name: torch.zeros(1, tokens, HEADS, HEAD) for name in "kv"} | ends

    settings = types.SimpleNamespace(
        denoising_step_list=STEPS, warp_denoising_step=True, num_frame_per_block=BLOCK, independent_first_frame=False,
        context_noise=0,
    )  # fmt: skip
    vae = types.SimpleNamespace(decode_to_pixel=lambda latents, use_cache: latents[:, :1])
    loop = Loop.__new__(Loop)
    torch.nn.Module.__init__(loop)
    loop.__dict__.update(vae=vae, text_encoder=lambda text_prompts: {"prompt_embeds": torch.zeros(1, 512, TEXT)})
    CausalInferencePipeline.__init__(loop, settings, "cpu", wrapper, loop.text_encoder, loop.vae)
    loop.num_transformer_blocks, loop.frame_seq_length = LAYERS, PER_FRAME
    times, memory, calls, begin = [], [], 0, time.perf_counter()

    def count(*_: Any) -> None:
        nonlocal calls, begin
        calls += 1
        if calls % (len(STEPS) + 1) == 0:  # the clean pass ends a block
            begin = record(times, memory, begin)

    wrapper.register_forward_hook(count)
    loop.inference(torch.randn(1, blocks * BLOCK, CHANNELS, HEIGHT, WIDTH), [""])
    return {"seconds": times, "MiB": memory}


if __name__ == "__main__":
    main()
