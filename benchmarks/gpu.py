"""Tests on a GPU, comparisons with diffusers at the sizes of Wan 2.1, rollouts and training steps, in one table.

    python benchmarks/gpu.py --output docs/results/gpu.json
    python benchmarks/gpu.py --tiny   # tiny sizes, which also run without a GPU

It is made for one GPU with 24 GB and for eight minutes. First come the tests marked `gpu`; if one fails, the exit
status is 1. Each section runs in a process of its own, whose messages go to stderr. An error takes one line.

Weights are random, in bfloat16, with the layouts of Wan 2.1 1.3B and its VAE; `shapes-64` is the packaged checkpoint.
Seconds are the median of up to five calls after a warm-up, memory is the peak, weights included. A training step of
the Transformer is a forward and a backward pass with gradient checkpointing, without an optimizer. A rollout takes 4
steps for each chunk, without guidance, and is measured when its KV cache is full. The training script trains the
recipes' networks on clips of 17 frames, eager. MFU relates the FLOPs of the model, recomputation excluded, to the
fastest square matrix product.
"""

import argparse
import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch
from diffusers import WanTransformer3DModel
from diffusers.models.attention_dispatch import AttentionBackendName
from pairs import machine, measure
from scaling import WAN_1_3B, WAN_LATENTS, step_flops
from scripts import ROOT, launch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from vae import build as build_vae

from vgen.diffusion import make_scheduler
from vgen.hub import find_checkpoint
from vgen.machine import matrix_peak
from vgen.models.transformer import SpacetimeTransformer
from vgen.models.vae import CausalVideoVAE
from vgen.pipeline import VideoGenPipeline
from vgen.training.throughput import BACKWARD

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TIME_LIMIT = 300
"""Seconds that a section may take, so that one that hangs does not stop the others."""
COLUMNS = {"seconds": ".4f", "MiB": ".0f", "frames/s": ".1f", "clips/s": ".1f", "MFU": ".1%"}
"""Columns of the table and their formats."""

Row = dict[str, Any]
"""The numbers of one line of the table, or `error` with the reason why there are none."""
Case = tuple[str, Callable[[], Row]]
"""The name of one line of the table, and the function that measures it."""

# clip: frames, height and width; latents: (b, c, t, h, w); rollout: height and width
FULL: dict[str, Any] = {
    "dtype": "bfloat16", "num_calls": 5, "tests": ["-m", "gpu", "-n", "8"],
    "vae": {"base_dim": 96, "z_dim": 16}, "clip": (33, 480, 832),
    "transformer": WAN_1_3B, "latents": WAN_LATENTS, "rollout": (256, 448), "compilation": {},
    "backends": [one.value for one in AttentionBackendName if one.value != "native" and "hub" not in one.value],
    "encoding": {"num_clips": 128}, "training": {"max_steps": 40, "log_every": 10, "compile": "false"},
}  # fmt: skip
TINY: dict[str, Any] = {
    "dtype": "float32", "num_calls": 1, "tests": ["tests/temporal/test_grid.py"],
    "vae": {"base_dim": 8, "z_dim": 4}, "clip": (9, 32, 48),
    "transformer": {
        "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4, "text_dim": 32,
        "freq_dim": 16, "ffn_dim": 32, "num_layers": 2,
    },
    "latents": (1, 4, 3, 4, 6), "rollout": (32, 48), "compilation": {"backend": "eager"},
    "backends": ["_native_npu", "_native_math"],
    "encoding": {"num_clips": 2, "mixed_precision": "no"},
    "training": {
        "max_steps": 2, "log_every": 1, "batch_size": 2, "mixed_precision": "no", "compile": "false",
        "optimizer": "adamw", "muon_kernels": "false",
    },
}  # fmt: skip


def test_cases(sizes: dict[str, Any]) -> Iterator[Case]:
    """The tests that need a GPU."""

    def run() -> Row:
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder) / "report.xml"
            command = [sys.executable, "-m", "pytest", "-q", *sizes["tests"], f"--junitxml={report}"]
            subprocess.run(command, cwd=ROOT, stdout=sys.stderr, check=False)
            (suite,) = ElementTree.parse(report).getroot()
        failed = [str(case.get("name")) for case in suite if {one.tag for one in case} & {"failure", "error"}]
        skipped = int(suite.get("skipped", 0))
        return {"passed": len(suite) - len(failed) - skipped, "failed": failed, "skipped": skipped}

    yield "pytest", run


def vae_cases(sizes: dict[str, Any]) -> Iterator[Case]:
    """Encoding and decoding. Only vgen has streamed decoding."""

    def run(kind: str, ours: bool) -> Row:
        frames, *size = sizes["clip"]
        call = build_vae(kind, sizes["dtype"], size, frames, None, ours, sizes["vae"])
        return measure(call, sizes["num_calls"])

    for kind in ("encode", "decode"):
        yield f"{kind}, vgen", partial(run, kind, True)
        yield f"{kind}, diffusers", partial(run, kind, False)
    yield "decode_stream, vgen", partial(run, "stream", True)


def transformer_cases(sizes: dict[str, Any]) -> Iterator[Case]:
    """A forward pass and a training step. Each case makes its own network, so that the device holds one at a time."""
    peak = matrix_peak(DEVICE, getattr(torch, sizes["dtype"]))
    with torch.device("meta"):
        step_operations = step_flops(SpacetimeTransformer(**sizes["transformer"]), sizes["latents"])

    def run(network_class: Any, trains: bool) -> Row:
        network = make(network_class, sizes, **sizes["transformer"])
        network.enable_gradient_checkpointing()
        latents = torch.randn(sizes["latents"], device=DEVICE).to(network.dtype)
        level = torch.full((len(latents),), 500.0, device=DEVICE)
        prompt = torch.randn(len(latents), 512, network.config.text_dim, device=DEVICE).to(network.dtype)

        def forward() -> torch.Tensor:
            return network(hidden_states=latents, timestep=level, encoder_hidden_states=prompt).sample

        def step() -> None:
            forward().float().square().mean().backward()
            network.zero_grad()

        row: Row = measure(step if trains else torch.no_grad()(forward), sizes["num_calls"])
        operations = step_operations if trains else step_operations / (1 + BACKWARD)
        return row | {"FLOPs": operations, "MFU": operations / row["seconds"] / peak}

    for kind, trains in (("forward", False), ("training step", True)):
        yield f"{kind}, vgen", partial(run, SpacetimeTransformer, trains)
        yield f"{kind}, diffusers", partial(run, WanTransformer3DModel, trains)


def rollout_cases(sizes: dict[str, Any]) -> Iterator[Case]:
    """Rollouts with compiled blocks, and with all attention backends that do not download their kernels."""
    height, width = sizes["rollout"]

    def shapes() -> tuple[VideoGenPipeline, dict[str, Any]]:
        pipe = VideoGenPipeline.from_pretrained("vgen/shapes-64", dtype=getattr(torch, sizes["dtype"]))
        return pipe.to(DEVICE), {"prompt": "a red circle bounces"}

    def wan() -> tuple[VideoGenPipeline, dict[str, Any]]:
        causal = {"tasks": ["text", "leading"], "group_modes": ["chunk"], "chunk_size": 3, "window": 6, "sink": 1}
        transformer = make(SpacetimeTransformer, sizes, **sizes["transformer"], **causal)
        vae = make(CausalVideoVAE, sizes, **sizes["vae"])
        prompt = torch.randn(1, 512, transformer.text_dim, device=DEVICE).to(transformer.dtype)
        pipe = VideoGenPipeline(make_scheduler("flow"), vae=vae, transformer=transformer)
        return pipe, {"prompt_embeds": prompt, "height": height, "width": width}

    def run(load: Callable[[], tuple[VideoGenPipeline, dict[str, Any]]], backend: str, compiles: bool) -> Row:
        torch.compiler.reset()  # drops the compiled code of the case before, and what it holds
        pipe, arguments = load()
        pipe.denoiser.set_attention_backend(backend)
        if compiles:
            pipe.denoiser.compile_repeated_blocks(dynamic=False, **sizes["compilation"])
        generator = torch.Generator().manual_seed(0)
        rollout = pipe.rollout(**arguments, generator=generator, num_inference_steps=4, guidance_scale=1.0)
        options = rollout.state.options
        for _ in range(2 + (options.window + options.sink) // options.chunk_size):  # until the KV cache is full
            frames = rollout.step().shape[2]
        row: Row = measure(rollout.step, sizes["num_calls"])
        return row | {"frames/s": frames / row["seconds"]}

    models = {"shapes-64": shapes, f"Wan 1.3B, {height}x{width}": wan}
    for compiles in (False, True):
        for name, load in models.items():
            yield f"{name}, native{', compiled' if compiles else ''}", partial(run, load, "native", compiles)
    name, load = models.popitem()  # the smaller network spends little time in attention
    with torch.device("meta"):
        probe = SpacetimeTransformer(**sizes["transformer"])
    for backend in sizes["backends"]:
        try:
            probe.set_attention_backend(backend)
        except RuntimeError as error:
            yield backend, partial(dict, error=str(error))
            continue
        yield f"{name}, {backend}", partial(run, load, backend, False)


def training_cases(sizes: dict[str, Any]) -> Iterator[Case]:
    """Training steps of both denoisers' recipes; the numbers are those of the last entry in the logs."""
    checkpoint = find_checkpoint("vgen/shapes-64")

    def run(settings: dict[str, Any]) -> Row:
        launch("train/train_vdm.py", settings)
        logs = EventAccumulator(str(settings["output_dir"] / "logs")).Reload()
        tags = {"clips/s": "clips_per_second", "MFU": "flops_utilization"}
        return {column: logs.Scalars(f"throughput/{tag}")[-1].value for column, tag in tags.items()}

    with tempfile.TemporaryDirectory() as folder:
        data = {"vae": checkpoint / "vae", "latents_dir": Path(folder) / "latents"}
        encoding = {"vae": data["vae"], "output_dir": data["latents_dir"], "keyframes": "true"}
        launch("pipelines/encode_latents.py", encoding | sizes["encoding"])
        for recipe in ("shapes-64", "shapes-64-unet"):
            settings = {"config": f"train/recipes/{recipe}.yaml", "output_dir": Path(folder) / recipe} | data | {
                "text_encoder": checkpoint, "more_latents": "{}", "windows": '{"start": 1.0}', "window_lengths": "[5]",
                "decay_steps": 1, "warmup_steps": 1, "sample_every": 10**6,
            }  # fmt: skip
            yield recipe, partial(run, settings | sizes["training"])


def make(network_class: Any, sizes: dict[str, Any], **config: Any) -> Any:
    """A network with random weights."""
    torch.manual_seed(0)
    with DEVICE:
        return network_class(**config).to(getattr(torch, sizes["dtype"]))


SECTIONS: dict[str, Callable[[dict[str, Any]], Iterator[Case]]] = {
    "tests": test_cases,
    "VAE": vae_cases,
    "Transformer": transformer_cases,
    "rollout": rollout_cases,
    "training": training_cases,
}


def run_section(name: str, sizes: dict[str, Any], output: Path) -> None:
    """Measures all cases of a section. The file always has the rows so far, in case the process is killed."""
    rows: dict[str, Row] = {}
    for case, run in SECTIONS[name](sizes):
        try:
            rows[case] = run()
        except Exception as error:  # the next cases do not depend on this one
            rows[case] = {"error": f"{type(error).__name__}: {error}"}
        output.write_text(json.dumps(rows))
        gc.collect()
        torch.cuda.empty_cache()


def start_section(name: str, *arguments: str) -> dict[str, Row]:
    """The rows of a section, which runs in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "rows.json"
        command = [sys.executable, __file__, "--section", name, "--output", str(output), *arguments]
        process = subprocess.Popen(command, stdout=sys.stderr, start_new_session=True)
        try:
            code = process.wait(TIME_LIMIT)
            reason = f"exit status {code}, see the messages above" if code else None
        except subprocess.TimeoutExpired:
            reason = f"not done after {TIME_LIMIT} s"
        finally:
            with suppress(ProcessLookupError):  # and what it has started
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        rows = json.loads(output.read_text()) if output.exists() else {}
    return rows | ({"stopped": {"error": reason}} if reason else {})


def show(name: str, row: Row) -> None:
    """Prints one line of the table."""
    text = "".join(f"{row[key]:>10{form}}" if key in row else " " * 10 for key, form in COLUMNS.items())
    if "error" in row:
        text = "  " + " ".join(row["error"].split())[:200]
    elif "passed" in row:
        counts = f"{row['passed']} passed, {row['skipped']} skipped, {len(row['failed'])} failed"
        text = " ".join([" ", counts, *row["failed"]])
    print(f"{name:<52}{text.rstrip()}", flush=True)


def main() -> None:
    """Runs the sections and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, which also run without a GPU")
    parser.add_argument("--output", type=Path, help="write the numbers here as JSON")
    parser.add_argument("--section", choices=SECTIONS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    sizes = TINY if args.tiny else FULL
    if args.section:
        run_section(args.section, sizes, args.output)
        return
    if DEVICE.type == "cpu" and not args.tiny:
        sys.exit("benchmarks/gpu.py needs a CUDA device, and PyTorch finds none; --tiny also runs on a CPU")
    results: dict[str, Any] = {"sizes": sizes, "machine": machine(), "minutes": {}}
    print(f"{'':<52}" + "".join(f"{column:>10}" for column in COLUMNS))
    for name in SECTIONS:
        begin = time.time()
        results[name] = start_section(name, *(["--tiny"] if args.tiny else []))
        results["minutes"][name] = (time.time() - begin) / 60
        for case, row in results[name].items():
            show(f"{name}: {case}", row)
        print(f"{name}: {results['minutes'][name]:.1f} minutes", flush=True)
        if args.output:  # after each section, in case the next one is interrupted
            args.output.write_text(json.dumps(results, indent=1))
    print(json.dumps(results["machine"], indent=1))
    sys.exit(0 if results["tests"].get("pytest", {}).get("failed") == [] else 1)


if __name__ == "__main__":
    main()
