"""Measures a checkpoint on a suite, shared out over processes; the same command goes on where it stopped.

accelerate launch pipelines/evaluate.py --model vgen/shapes-64 --suite shapes --output_dir runs/evaluation
"""

import sys

from vgen.io.settings import parse_settings
from vgen.tasks.evaluation import EvaluationConfig, evaluate


def main(config: EvaluationConfig) -> int:
    """Writes `results.json` and `report.html`; returns how many clips could not be measured."""
    results = evaluate(config)
    return results["missing"] if results else 0


if __name__ == "__main__":
    sys.exit(min(1, main(parse_settings(EvaluationConfig, __doc__))))
