"""What a machine can do: versions, devices, speed, memory, extras that are missing, and a benchmark."""

from __future__ import annotations

import platform
import shutil
import time
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from pathlib import Path
from typing import Any

import psutil
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from vgen.machine import GIB, fast_precision, limit_threads, matrix_peak, processor
from vgen.tasks.loading import LoadOptions, load_checkpoint, operations

PACKAGE = "vgen"
MODEL = "vgen/shapes-64"
NUM_STEPS = 4
_SECONDS = 5.0


def examine(*, benchmark: bool = True) -> dict[str, Any]:
    """Examines this machine, in about ten seconds.

    Args:
        benchmark: Whether to measure how fast `vgen/shapes-64` generates.

    Returns:
        JSON values: `versions` of packages, `processor`, `devices` with their TFLOPS and their `fast_precision`,
        `threads` of a rollout and of a whole video, free memory and disk in GiB, `missing` packages by extra, and
        `frames_per_second` of a rollout with 4 steps.
    """
    names = ["vgen", "torch", "diffusers", "transformers", "accelerate"]
    devices = {"cpu": torch.device("cpu")}
    if (accelerator := torch.accelerator.current_accelerator(check_available=True)) is not None:
        indices = range(torch.accelerator.device_count())
        devices |= {f"{accelerator.type}:{index}": torch.device(accelerator.type, index) for index in indices}
    found: dict[str, Any] = {
        "versions": {"python": platform.python_version()} | {name: version(name) for name in names},
        "processor": processor(),
        "devices": {name: _examine_device(device) for name, device in devices.items()},
        "free_memory_gib": psutil.virtual_memory().available / GIB,
        "free_disk_gib": shutil.disk_usage(Path.cwd()).free / GIB,
        "missing": missing_packages(),
    }
    fastest = list(devices.values())[1 if len(devices) > 1 else 0]
    pipe = load_checkpoint(MODEL, LoadOptions(), fastest)
    found["threads"] = {
        "whole video": limit_threads(operations(pipe, streams=False)),
        "rollout": limit_threads(operations(pipe, streams=True)),
    }
    if benchmark:
        found["frames_per_second"] = _frames_per_second(pipe)
    return found


def _examine_device(device: torch.device) -> dict[str, Any]:
    fast = fast_precision(device)
    dtypes = {"float32": torch.float32}
    if device.type == "cpu" or fast == "bf16":
        dtypes["bfloat16"] = torch.bfloat16
    found: dict[str, Any] = {
        "tflops": {name: matrix_peak(device, dtype) / 1e12 for name, dtype in dtypes.items()},
        "fast_precision": fast,
    }
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        found |= {
            "name": torch.cuda.get_device_name(device), "free_memory_gib": free / GIB, "memory_gib": total / GIB
        }  # fmt: skip
    return found


def missing_packages(package: str = PACKAGE) -> dict[str, list[str]]:
    """The requirements of each extra of an installed package that are not met, for extras that miss some.

    Args:
        package: Name of the package, whose metadata lists the extras.

    Raises:
        ValueError: The package is not installed.
    """
    try:
        extras = metadata(package).get_all("Provides-Extra") or []
        parsed = [Requirement(line) for line in requires(package) or []]
    except PackageNotFoundError as error:
        raise ValueError(f"the package {package} is not installed: pip install -e . in its folder") from error
    unmet = {extra: _unmet(package, parsed, extra) for extra in sorted(extras)}
    return {extra: lines for extra, lines in unmet.items() if lines}


def _unmet(package: str, requirements: list[Requirement], extra: str) -> list[str]:
    lines: list[str] = []
    for one in requirements:
        if one.marker is None or not one.marker.evaluate({"extra": extra}) or one.marker.evaluate({"extra": ""}):
            continue
        if canonicalize_name(one.name) == canonicalize_name(package):  # an extra that includes others
            lines += [line for other in sorted(one.extras) for line in _unmet(package, requirements, other)]
        elif not _is_met(one):
            lines.append(f"{one.name}{one.specifier}")
    return list(dict.fromkeys(lines))


def _is_met(requirement: Requirement) -> bool:
    try:
        return requirement.specifier.contains(version(requirement.name), prereleases=True)
    except PackageNotFoundError:
        return False


def _frames_per_second(pipe: Any) -> float:
    """Speed of a rollout without its first chunks, in which libraries start."""
    pipe.set_progress_bar_config(disable=True)
    chunks = pipe.rollout(
        "a red circle moves right", num_frames=10_000, num_inference_steps=NUM_STEPS,
        generator=torch.Generator().manual_seed(0), overlap="auto",
    )  # fmt: skip
    for _ in range(2):
        next(chunks)
    frames, begin = 0, time.perf_counter()
    while (seconds := time.perf_counter() - begin) < _SECONDS:
        frames += len(next(chunks))
    return frames / seconds


def as_rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    """What `examine` returned as rows of a table: a title and a description."""
    cpu = found["processor"]
    instructions = ", ".join(cpu["instructions"]) or "none of those that matter"
    rows = [
        ("versions", ", ".join(f"{name} {number}" for name, number in found["versions"].items())),
        ("processor", f"{cpu['name']}, {cpu['cores']} cores; instructions: {instructions}"),
    ]
    for name, one in found["devices"].items():
        speeds = ", ".join(f"{dtype} {speed:.3g} TFLOPS" for dtype, speed in one["tflops"].items())
        memory = f"; {one['free_memory_gib']:.1f} of {one['memory_gib']:.1f} GiB free" if "memory_gib" in one else ""
        title = f"{name}, {one['name']}" if "name" in one else name
        rows.append((title, f"{speeds}; fast precision: {one['fast_precision']}{memory}"))
    rows += [
        ("threads", ", ".join(f"{number} for a {use}" for use, number in found["threads"].items()) + f" of {MODEL}"),
        ("free", f"{found['free_memory_gib']:.1f} GiB of memory, {found['free_disk_gib']:.1f} GiB on this disk"),
    ]
    rows += [
        (f"extra {extra}", f"needs {', '.join(lines)}: pip install {PACKAGE}[{extra}]")
        for extra, lines in found["missing"].items()
    ]
    if "frames_per_second" in found:
        speed = f"{found['frames_per_second']:.1f} frames per second"
        rows.append(("benchmark", f"{speed}, rollout of {MODEL} with {NUM_STEPS} steps"))
    return rows
