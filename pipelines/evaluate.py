"""Measures a checkpoint on a suite, shared out over processes; the same command goes on where it stopped.

accelerate launch pipelines/evaluate.py --model vgen/shapes-64 --suite shapes --output_dir runs/evaluation
"""

import sys

from jsonargparse import auto_cli

from vgen.evaluation import EvaluationConfig, evaluate


def main(config: EvaluationConfig) -> int:
    """Writes `results.json` and `report.html`; returns how many clips could not be measured."""
    results = evaluate(config)
    return results["missing"] if results else 0


if __name__ == "__main__":
    sys.exit(min(1, main(auto_cli(EvaluationConfig))))
