"""Summaries of results: means with confidence intervals, comparisons of two results, and a self-contained report."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vgen.metrics.frechet import Distance

FORMAT = "vgen-results-2"
UNITS = {"psnr": "dB", "motion": "px", "warping error": "×10⁻³", "mse": "×10⁻³", "mae": "×10⁻³", "flicker": "×10⁻³"}
"""Units of the columns. Small values are displayed multiplied by 1000."""


class Summary(NamedTuple):
    """Mean of a metric over clips, with its 95% confidence interval (bootstrap over clips)."""

    mean: float
    low: float
    """Lower bound of the interval; NaN for a single clip."""
    high: float
    """Upper bound of the interval; NaN for a single clip."""


def summarize(values: list[float], seed: int = 0) -> Summary:
    """Computes the mean of a metric over clips, with its confidence interval.

    Args:
        values: One value per clip.
        seed: Seed of the bootstrap.

    Raises:
        ValueError: There are no values, or some are not finite.
        ImportError: SciPy is not installed.
    """
    from scipy.stats import bootstrap

    array = np.asarray(values, dtype=np.float64)
    if not array.size or not np.isfinite(array).all():
        raise ValueError(
            f"expected finite values, got {array.size} values with {int((~np.isfinite(array)).sum())} not finite"
        )
    low = high = array.mean() if array.size > 1 else float("nan")
    if np.ptp(array):
        low, high = bootstrap((array,), np.mean, n_resamples=2000, method="percentile", rng=seed).confidence_interval
    return Summary(float(array.mean()), float(low), float(high))


class Difference(NamedTuple):
    """Difference of one metric between two results on the same clips."""

    task: str
    method: str
    metric: str
    first: float
    """Mean in the first result."""
    second: float
    """Mean in the second result."""
    summary: Summary
    """Summary of the differences per clip, second minus first."""

    @property
    def is_significant(self) -> bool:
        """Whether the confidence interval excludes 0."""
        return self.summary.low > 0 or self.summary.high < 0


def compare(first: dict[str, Any], second: dict[str, Any]) -> list[Difference]:
    """Compares two results, for each task, method and metric that both have.

    Args:
        first: Contents of a `results.json`.
        second: Contents of another one.

    Raises:
        ValueError: These are not results of `vgen evaluate`, or they are of other suites, clips or settings. The error
            lists the differences.
    """
    results = (first, second)
    if not all(isinstance(result, dict) and result.get("format") == FORMAT for result in results):
        formats = " and ".join(str(dict(result).get("format")) for result in results)
        raise ValueError(f"expected two results of `vgen evaluate` in the format {FORMAT}, got formats {formats}")
    compared = ("prompted", "num_samples", "rollout_frames", "clips_sha256")
    a, b = (result["suite"] | {name: result["settings"].get(name) for name in compared} for result in results)
    for settings in (a, b):
        settings.pop("data", None)  # the same clips may be stored elsewhere
    # results of earlier versions lack settings that were added with the default None
    wrong = [f"{name} {a.get(name)} and {b.get(name)}" for name in a | b if a.get(name) != b.get(name)]
    if first["numbers"] != second["numbers"]:
        wrong.append("the clips that could be measured")
    if wrong:
        raise ValueError(f"these results cannot be compared, because they differ in {', '.join(wrong)}")
    differences = []
    for task, method, metrics, other in _common(first["tasks"], second["tasks"]):
        for metric in [metric for metric in metrics if metric in other]:
            x, y = np.asarray(metrics[metric]), np.asarray(other[metric])
            differences.append(Difference(task, method, metric, x.mean(), y.mean(), summarize(list(y - x))))
    return differences


def compare_distances(first: dict[str, Any], second: dict[str, Any]) -> list[tuple[str, str, Distance, Distance]]:
    """Pairs the distances between distributions that both results have: `(task, method, first, second)`."""
    pairs = []
    for task, method, measured, other in _common(first["distances"], second["distances"]):
        both = [name for name in measured if name in other]
        pairs += [(task, method, Distance.from_dict(measured[name]), Distance.from_dict(other[name])) for name in both]
    return pairs


def _common(first: dict[str, Any], second: dict[str, Any]) -> Iterator[tuple[str, str, Any, Any]]:
    """Yields `(task, method, first value, second value)` for the methods of the first result."""
    for task, methods in first.items():
        for method, value in methods.items():
            yield task, method, value, second.get(task, {}).get(method, {})


def table(methods: dict[str, dict[str, list[float]]]) -> tuple[list[str], dict[str, list[str]]]:
    """Builds a table of one task.

    Args:
        methods: Values per clip, by method and metric.

    Returns:
        Titles of the columns, and the cells of each method's row.
    """
    metrics = list(dict.fromkeys(itertools.chain.from_iterable(methods.values())))
    rows = {
        method: [format_summary(metric, summarize(values[metric])) if metric in values else "" for metric in metrics]
        for method, values in methods.items()
    }
    return [column_title(metric) for metric in metrics], rows


def column_title(metric: str) -> str:
    """The name of a metric with its unit."""
    return f"{metric}, {UNITS[metric]}" if metric in UNITS else metric


def format_summary(metric: str, summary: Summary) -> str:
    """Formats a mean and its interval in the metric's unit, rounded to the precision that the interval supports."""
    mean, low, high = (display_scale(metric) * value for value in summary)
    spread = high - low if high > low else abs(mean) / 10
    digits = int(np.clip(1 - np.floor(np.log10(spread)), 0, 9)) if spread else 1
    return f"{mean:.{digits}f}" + (f" [{low:.{digits}f}, {high:.{digits}f}]" if np.isfinite(low) else "")


def display_scale(metric: str) -> float:
    """Factor from values to the unit that they are displayed in."""
    return 1000 if UNITS.get(metric, "").startswith("×") else 1


def make_report(results: dict[str, Any], strips: dict[str, dict[str, str]]) -> str:
    """Renders an HTML page with tables, curves and pictures that needs no other file.

    Args:
        results: Contents of a `results.json`.
        strips: For each title, PNG images in base64 by method.

    Raises:
        ImportError: As in `check_installed`.
    """
    check_installed()
    import jinja2

    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(Path(__file__).with_name("report.html.jinja").read_text())
    return template.render(
        results=results,
        tables={task: table(methods) for task, methods in results["tasks"].items()},
        curves={task: draw_curves(results["frames"][task], lines) for task, lines in results["curves"].items()},
        distances=results["distances"],
        strips=strips,
    )


def draw_curves(frames: list[int], methods: dict[str, dict[str, list[float]]]) -> list[str]:
    """Plots PSNR and SSIM over the frames; returns one SVG element for each."""
    figures = []
    for metric, label in (("psnr", "PSNR, dB"), ("ssim", "SSIM")):
        figure, axis = _subplot()
        for method, values in methods.items():
            axis.plot(frames, values[metric], label=method, marker=".")
        axis.set(xlabel="frame", ylabel=label)
        figure.legend(loc="outside lower center", ncols=2, fontsize="small")
        figures.append(to_svg(figure))
    return figures


def plot_scores(scores: list[float], marked: list[int], label: str) -> Any:
    """Plots scores over frames, with vertical lines at marked frames, as a Matplotlib figure."""
    figure, axis = _subplot()
    axis.plot(scores, marker=".")
    for frame in marked:
        axis.axvline(frame, color="tab:red", alpha=0.4)
    axis.set(xlabel="frame", ylabel=label)
    return figure


def to_svg(figure: Any) -> str:
    """Converts a Matplotlib figure to an SVG element."""
    file = StringIO()
    figure.savefig(file, format="svg", bbox_inches="tight")
    text = file.getvalue()
    return text[text.index("<svg") :]


def check_installed() -> None:
    """Checks that the libraries for summaries and reports are installed.

    Raises:
        ImportError: SciPy, Matplotlib or Jinja2 is not installed.
    """
    try:
        import jinja2  # noqa: F401
        import matplotlib  # noqa: F401
        import scipy  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"this needs SciPy, Matplotlib and Jinja2: pip install vgen[evaluation] ({error})"
        ) from error


def _subplot() -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.5), layout="constrained")
    return figure, figure.subplots()
