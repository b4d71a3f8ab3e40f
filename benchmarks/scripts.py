"""Benchmarks that run other scripts of this repository before they measure."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def launch(script: str, settings: dict, *arguments: Path) -> None:
    """Runs a script of this repository; a setting whose value is `None` is a flag."""
    words = [str(word) for name, value in settings.items() for word in (f"--{name}", value) if word is not None]
    subprocess.run([sys.executable, ROOT / script, *words, *arguments], check=True)
