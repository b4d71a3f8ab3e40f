"""Measures a checkpoint on a suite, shared out over processes; the same command goes on where it stopped.

accelerate launch pipelines/evaluate.py --model vgen/shapes-64 --suite shapes --output_dir runs/evaluation
"""

from jsonargparse import auto_cli

from vgen.evaluation import EvaluationConfig, evaluate


def main(config: EvaluationConfig) -> None:
    """Writes `results.json` and `report.html`."""
    evaluate(config)


if __name__ == "__main__":
    main(auto_cli(EvaluationConfig))
