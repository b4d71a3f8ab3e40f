"""Wall time and peak memory of the first commands that a user runs, each in a new process.

    python benchmarks/cold_start.py

diffusers also imports optional packages that are installed, such as peft and torchao. The numbers in docs/results.md
are those of an installation without extras.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

BASE_CLASSES = "from diffusers import DiffusionPipeline, ModelMixin"
MISTAKE = "vgen predict nosuch.mp4"

COMMANDS = {
    'python -c "import vgen"': [sys.executable, "-c", "import vgen"],
    'python -c "import torch"': [sys.executable, "-c", "import torch"],
    f'python -c "{BASE_CLASSES}"': [sys.executable, "-c", BASE_CLASSES],
    "vgen --help": [sys.executable, "-m", "vgen.cli", "--help"],
    "vgen generate": [sys.executable, "-m", "vgen.cli", "generate", "a red circle moves right", "--overwrite", "-o"],
    MISTAKE: [sys.executable, "-m", "vgen.cli", "predict", "nosuch.mp4", "-o"],
}
"""The second and third are what any program built on diffusers pays."""


def run(command: list[str], succeeds: bool) -> tuple[float, float]:
    """Seconds and peak MiB of one process."""
    begin = time.perf_counter()
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(1, 2)
        os.execv(command[0], command)
    _, status, usage = os.wait4(pid, 0)
    assert (status == 0) == succeeds, command
    return time.perf_counter() - begin, usage.ru_maxrss / 1024


def main() -> None:
    """Prints the median of five runs of each command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="write the numbers here as JSON")
    args = parser.parse_args()
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, command in COMMANDS.items():
            command = [*command, str(Path(folder) / "video.mp4")] if command[-1] == "-o" else command
            runs = [run(command, succeeds=name != MISTAKE) for _ in range(5)]
            seconds, memory = (statistics.median(column) for column in zip(*runs, strict=True))
            results[name] = {"seconds": seconds, "MiB": memory}
            print(f"{name:<72} {seconds:6.2f} s {memory:7.0f} MiB")
    if args.output:
        args.output.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
