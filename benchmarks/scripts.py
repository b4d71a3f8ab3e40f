"""Benchmarks that train before they measure: the scripts of this repository, started from here."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def launch(script: str, settings: dict) -> None:
    """Runs a script of this repository."""
    words = [str(word) for name, value in settings.items() for word in (f"--{name}", value)]
    subprocess.run([sys.executable, ROOT / script, *words], check=True)
