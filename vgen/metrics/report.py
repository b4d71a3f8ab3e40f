"""Results as people read them: means with confidence intervals, differences, and a page that opens offline."""

from __future__ import annotations

import itertools
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vgen.metrics.frechet import Distance

FORMAT = "vgen-results-1"
UNITS = {"psnr": "dB", "motion": "px", "warping error": "×10⁻³", "mse": "×10⁻³", "mae": "×10⁻³", "flicker": "×10⁻³"}
"""Of the columns; small values are shown a thousandfold."""


class Summary(NamedTuple):
    """Of one metric over clips."""

    mean: float
    low: float
    """Of the 95% confidence interval of the mean, over other choices of clips (bootstrap); NaN of a single clip."""
    high: float


def summarize(values: list[float], seed: int = 0) -> Summary:
    """The mean over clips with its interval.

    Raises:
        ValueError: There are no values, or some are not finite.
        ImportError: SciPy is not installed.
    """
    from scipy.stats import bootstrap

    array = np.asarray(values, dtype=np.float64)
    if not array.size or not np.isfinite(array).all():
        raise ValueError(f"{array.size} values, of which {int((~np.isfinite(array)).sum())} are not finite")
    low = high = array.mean() if array.size > 1 else float("nan")
    if np.ptp(array):
        low, high = bootstrap((array,), np.mean, n_resamples=2000, method="percentile", rng=seed).confidence_interval
    return Summary(float(array.mean()), float(low), float(high))


class Difference(NamedTuple):
    """How a model's metric differs from another's on the same clips."""

    task: str
    way: str
    metric: str
    first: float
    second: float
    summary: Summary
    """Of the second minus the first, clip by clip."""

    @property
    def is_told_apart(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.summary.low > 0 or self.summary.high < 0


def compare(first: dict[str, Any], second: dict[str, Any]) -> list[Difference]:
    """What differs between two results, for each task, way and metric that both have.

    Args:
        first: As `results.json` has them.
        second: The same.

    Raises:
        ValueError: They are no results, of other suites or clips, or were told other things; what differs is named.
    """
    if not all(isinstance(one, dict) and one.get("format") == FORMAT for one in (first, second)):
        raise ValueError("these are no results of `vgen evaluate`, or of another version of it")
    told = ("prompted", "num_samples", "rollout_frames")
    mine, theirs = (
        one["suite"] | {name: one["settings"].get(name) for name in (*told, "clips_sha256")} for one in (first, second)
    )
    for one in (mine, theirs):
        one.pop("data", None)  # the same clips may lie elsewhere
    wrong = [f"{name} {mine[name]} and {theirs[name]}" for name in mine if mine[name] != theirs[name]]
    if first["numbers"] != second["numbers"]:
        wrong.append("the clips that could be measured")
    if wrong:
        raise ValueError(f"these results cannot be compared: {', '.join(wrong)}")
    found = []
    for task, ways in first["tasks"].items():
        for way, metrics in ways.items():
            other = second["tasks"].get(task, {}).get(way, {})
            for metric in metrics:
                if metric in other:
                    a, b = np.asarray(metrics[metric]), np.asarray(other[metric])
                    found.append(Difference(task, way, metric, a.mean(), b.mean(), summarize(list(b - a))))
    return found


def compare_distances(first: dict[str, Any], second: dict[str, Any]) -> list[tuple[str, str, Distance, Distance]]:
    """The distances between distributions that both results have: task, way, and one of each."""
    found = []
    for task, ways in first["distances"].items():
        for way, measured in ways.items():
            other = second["distances"].get(task, {}).get(way, {})
            both = [name for name in measured if name in other]
            found += [(task, way, Distance.read(measured[name]), Distance.read(other[name])) for name in both]
    return found


def table(ways: dict[str, dict[str, list[float]]]) -> tuple[list[str], dict[str, list[str]]]:
    """Column names, and for each way the cells of its row."""
    metrics = list(dict.fromkeys(itertools.chain.from_iterable(ways.values())))
    rows = {}
    for way, values in ways.items():
        rows[way] = [tell(metric, summarize(values[metric])) if metric in values else "" for metric in metrics]
    return [name_of(metric) for metric in metrics], rows


def name_of(metric: str) -> str:
    """With its unit."""
    return f"{metric}, {UNITS[metric]}" if metric in UNITS else metric


def tell(metric: str, summary: Summary) -> str:
    """A mean and its interval in the metric's unit, with the digits that the interval supports."""
    mean, low, high = (scale_of(metric) * value for value in summary)
    spread = high - low if high > low else abs(mean) / 10
    digits = int(np.clip(1 - np.floor(np.log10(spread)), 0, 9)) if spread else 1
    return f"{mean:.{digits}f}" + (f" [{low:.{digits}f}, {high:.{digits}f}]" if np.isfinite(low) else "")


def scale_of(metric: str) -> float:
    """From values to the unit that they are shown in."""
    return 1000 if UNITS.get(metric, "").startswith("×") else 1


def make_report(results: dict[str, Any], strips: dict[str, dict[str, str]]) -> str:
    """One page of HTML with tables, curves and pictures, which needs no other file.

    Args:
        results: As `results.json` has them.
        strips: For each title, PNGs in base64 by way.

    Raises:
        ImportError: As `check_installed`.
    """
    check_installed()
    import jinja2

    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(Path(__file__).with_name("report.html.jinja").read_text())
    return template.render(
        results=results,
        tables={task: table(ways) for task, ways in results["tasks"].items()},
        curves={task: draw_curves(results["frames"][task], ways) for task, ways in results["curves"].items()},
        distances=results["distances"],
        strips=strips,
    )


def draw_curves(frames: list[int], ways: dict[str, dict[str, list[float]]]) -> list[str]:
    """PSNR and SSIM of each frame, an SVG each."""
    found = []
    for metric, label in (("psnr", "PSNR, dB"), ("ssim", "SSIM")):
        figure, axis = _subplot()
        for way, values in ways.items():
            axis.plot(frames, values[metric], label=way, marker=".")
        axis.set(xlabel="frame", ylabel=label)
        figure.legend(loc="outside lower center", ncols=2, fontsize="small")
        found.append(to_svg(figure))
    return found


def plot_scores(scores: list[float], marked: list[int], label: str) -> Any:
    """A curve over frames, some of which are marked, as a Matplotlib figure."""
    figure, axis = _subplot()
    axis.plot(scores, marker=".")
    for frame in marked:
        axis.axvline(frame, color="tab:red", alpha=0.4)
    axis.set(xlabel="frame", ylabel=label)
    return figure


def to_svg(figure: Any) -> str:
    """A figure as an SVG element."""
    file = StringIO()
    figure.savefig(file, format="svg", bbox_inches="tight")
    text = file.getvalue()
    return text[text.index("<svg") :]


def check_installed() -> None:
    """Says early what is missing.

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
