"""Measures time and peak memory; compares two implementations in alternating calls and in separate processes."""

import argparse
import json
import multiprocessing
import os
import statistics
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path
from shutil import which
from typing import Any

import torch

from vgen.machine import matrix_peak, processor


def machine() -> dict[str, Any]:
    """What numbers depend on: the processor, the GPU, versions, and the speed of square matrix products."""
    cpu = processor()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    return {
        "processor": cpu["name"],
        "instructions": cpu["instructions"],
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "diffusers": version("diffusers"),
        **(_gpu() if device.type == "cuda" else {}),
        "matrix products in TFLOPS": {name: matrix_peak(device, dtype) / 1e12 for name, dtype in dtypes.items()},
    }


def _gpu() -> dict[str, Any]:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    drivers = subprocess.run(query, capture_output=True, text=True, check=True).stdout if which(query[0]) else ""
    properties = torch.cuda.get_device_properties(0)
    return {
        "GPU": properties.name,
        "GPU memory in GiB": properties.total_memory / 2**30,
        "driver": drivers.partition("\n")[0] or "unknown",
        "CUDA": torch.version.cuda,
    }


def peak_mebibytes() -> float:
    """The peak so far in MiB: of CUDA allocations, or on a CPU of the resident set size."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def forget_peak() -> None:
    """Resets the peak."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def seconds(call: Callable[[], Any]) -> float:
    """The wall time of one call, including its CUDA kernels."""
    begin = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def measure(call: Callable[[], Any], num_calls: int, most_seconds: float = 5.0) -> dict[str, float]:
    """Median seconds of a call after a warm-up, and the peak memory in MiB.

    There are no more than `num_calls` timed calls, and none starts after `most_seconds`.
    """
    seconds(call)
    forget_peak()
    times: list[float] = []
    while len(times) < num_calls and sum(times) < most_seconds:
        times.append(seconds(call))
    return {"seconds": statistics.median(times), "MiB": peak_mebibytes()}


def time_ratio(ours: Callable[[], Any], theirs: Callable[[], Any], num_pairs: int) -> tuple[float, float, float]:
    """Median seconds of both over alternating calls, and the median ratio of the pairs."""
    seconds(ours), seconds(theirs)
    pairs = []
    for index in range(num_pairs):
        if index % 2:
            pairs.append((seconds(ours), seconds(theirs)))
        else:
            second = seconds(theirs)
            pairs.append((seconds(ours), second))
    mine, other = zip(*pairs, strict=True)
    return statistics.median(mine), statistics.median(other), statistics.median(a / b for a, b in pairs)


def in_new_process(call: Callable[..., Any], *arguments: Any) -> Any:
    """The result of a call in a new process, with none of this one's memory.

    The processes are forks of a server that has imported torch and vgen, because that takes seconds. The server starts
    at the first call, with the environment of that moment.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pairs", "vgen.pipeline"])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(call, *arguments).result()


def peak_of(build: Callable[[bool], Callable[[], Any]], ours: bool) -> float:
    """The peak memory of the second call of a case in MiB; the first also loads code."""
    call = build(ours)
    call()
    forget_peak()
    loaded = peak_mebibytes()
    call()
    return peak_mebibytes() - loaded


def compare(cases: dict[str, Callable[[bool], Callable[[], Any]]], args: argparse.Namespace) -> None:
    """Prints one line per case.

    Args:
        cases: For each name, a function that builds our call (`True`) or diffusers' (`False`). It can be pickled.
        args: With `num_pairs`, `output`.
    """
    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", "65536")  # see streaming_decode.py; of the new processes
    rows = {}
    print(f"{'case':<40}{'ours':>10}{'theirs':>12}{'time ratio':>12}{'memory ratio':>14}")
    for name, build in cases.items():
        memory = [in_new_process(peak_of, build, ours) for ours in (True, False)]
        mine, other, ratio = time_ratio(build(True), build(False), args.num_pairs)
        rows[name] = {"ours": mine, "theirs": other, "time": ratio, "memory": memory[0] / memory[1]}
        cells = f"{mine:>8.3f} s{other:>10.3f} s{ratio:>12.3f}{memory[0] / memory[1]:>14.3f}"
        print(f"{name:<40}{cells}", flush=True)
    if args.output:
        args.output.write_text(json.dumps(rows, indent=1))


def make_parser(description: str) -> argparse.ArgumentParser:
    """The options that the comparisons share."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-pairs", type=int, default=20)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--output", type=Path, help="write the numbers here as JSON")
    return parser
