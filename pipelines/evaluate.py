"""Evaluates a checkpoint on a suite of clips, in several processes. The same command resumes an interrupted run.

accelerate launch pipelines/evaluate.py --model vgen/shapes-64 --suite shapes --output_dir runs/evaluation
"""

from vgen.io.spinning import stop_spinning

stop_spinning()  # before torch is imported

import shlex
import sys
from pathlib import Path

from vgen.io.errors import one_line_errors
from vgen.io.settings import parse_settings
from vgen.tasks.evaluation import EvaluationConfig, evaluate


def main(config: EvaluationConfig) -> int:
    """Writes `results.json` and `report.html`; returns the number of clips that failed."""
    results = evaluate(config)
    if results is None:
        return 0
    path = Path(config.output_dir) / "results.json"
    print(f"wrote {path} and report.html; next: vgen compare {shlex.quote(str(path))} ANOTHER/results.json")
    return results["missing"]


if __name__ == "__main__":
    with one_line_errors(Path(__file__).name):
        sys.exit(min(1, main(parse_settings(EvaluationConfig, __doc__))))
