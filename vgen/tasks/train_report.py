"""The report of `vgen train`: what the model can do, compared with simple baselines, and what it cannot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vgen.io.pixels import to_frames
from vgen.io.preview import animations_html

MODEL, TRUE, COPY, BLEND, ALONE = "the model", "true clips", "copy of the last frame", "linear blend", "VAE only"
GOOD_VAE = 27.0
"""PSNR in dB of reconstructions below which details are visibly lost."""
STILL = 0.33
"""Motion of predictions relative to that of the true clips, below which they count as copies of the last frame."""
MEMORIZED = 3.0
"""Gain in dB over copies of the last frame on training videos beyond that on held-out ones, from which on it counts as
memorization."""


class Verdict(NamedTuple):
    """A sentence about the model."""

    good: bool
    text: str


def middle(results: Mapping[str, Any], task: str, method: str, metric: str = "psnr") -> float | None:
    """The median of a metric over clips; `None` if it was not measured."""
    values = results["tasks"].get(task, {}).get(method, {}).get(metric)
    return median(values) if values else None


def judge(
    held_out: Mapping[str, Any], training: Mapping[str, Any], one_step: Mapping[str, Any] | None = None
) -> list[Verdict]:
    """Says what the results mean.

    Args:
        held_out: `results.json` of the evaluation on held-out videos.
        training: That on training videos.
        one_step: That on held-out videos with one denoising step.
    """
    verdicts = []
    vae = middle(held_out, "reconstruction", ALONE)
    if vae is not None:
        good = vae >= GOOD_VAE
        advice = "" if good else f"; below {GOOD_VAE:g} dB details are lost: train the VAE longer or on more videos"
        verdicts.append(Verdict(good, f"The VAE reconstructs held-out clips with {vae:.1f} dB{advice}."))
    verdicts += _judge_prediction(held_out, training)
    ours, blend = (middle(held_out, "interpolation", one) for one in (MODEL, BLEND))
    if ours is not None and blend is not None:
        than = "above" if ours > blend else "not above"
        verdicts.append(
            Verdict(ours > blend, f"Interpolation: {ours:.1f} dB, {than} linear blending ({blend:.1f} dB).")
        )
    return verdicts + ([] if one_step is None else _judge_one_step(one_step))


def _judge_one_step(results: Mapping[str, Any]) -> list[Verdict]:
    """Says how far the mean of what may follow is from the truth, which one denoising step predicts."""
    parts, good = [], True
    for task, baseline, words in (
        ("prediction", COPY, "repeating the last frame"),
        ("interpolation", BLEND, "linear blending"),
    ):
        ours, simple = (middle(results, task, one) for one in (MODEL, baseline))
        if ours is not None and simple is not None:
            good = good and ours > simple
            parts.append(f"{task} {ours:.1f} dB ({words}: {simple:.1f} dB)")
    if not parts:
        return []
    text = f"With one denoising step (--steps 1), which shows a blurred mean of what may be: {', '.join(parts)}."
    return [Verdict(good, text)]


def _judge_prediction(held_out: Mapping[str, Any], training: Mapping[str, Any]) -> list[Verdict]:
    ours, copy = (middle(held_out, "prediction", one) for one in (MODEL, COPY))
    if ours is None or copy is None:
        return []
    than = "above" if ours > copy else "not above"
    verdicts = [
        Verdict(
            ours > copy, f"Prediction: {ours:.1f} dB for one sample, {than} repeating the last frame ({copy:.1f} dB)."
        )
    ]
    means = [name for name in held_out["tasks"]["prediction"] if name.startswith(f"{MODEL}, mean of")]
    if means and (mean := middle(held_out, "prediction", means[0])) is not None:
        count = means[0].removeprefix(f"{MODEL}, mean of ")
        text = f"The mean of {count} predictions has {mean:.1f} dB, {mean - copy:+.1f} dB compared with repeating it."
        verdicts.append(Verdict(mean > copy, text))
    motion, true = (middle(held_out, "prediction", one, "motion") for one in (MODEL, TRUE))
    if motion is not None and true and motion < STILL * true:
        text = (
            f"It mostly repeats the last frame: its predictions move {motion / true:.0%} as much as the true clips. "
            "More videos or longer training of the denoiser may help."
        )
        verdicts.append(Verdict(False, text))
    seen, seen_copy = (middle(training, "prediction", one) for one in (MODEL, COPY))
    if seen is not None and seen_copy is not None:
        gap = (seen - seen_copy) - (ours - copy)
        if gap > MEMORIZED:
            text = (
                f"It has memorized its training videos: there, predictions gain {seen - seen_copy:+.1f} dB over "
                f"repeating the last frame, and {ours - copy:+.1f} dB on held-out ones. More videos help."
            )
            verdicts.append(Verdict(False, text))
    return verdicts


def draw_samples(
    pipe: Any, clips: Tensor, settings: Mapping[str, Any], captions: Sequence[str]
) -> list[tuple[str, str]]:
    """Animations for HTML with their captions: true clips next to predictions and interpolations, and prompts.

    Args:
        pipe: The model.
        clips: Held-out clips `(b, 3, f, h, w)` in [-1, 1].
        settings: Those of the evaluation: `tasks`, `given`, `factor`, and shape and rate of clips.
        captions: Prompts to generate.
    """
    samples = []
    count, given, factor = clips.shape[2], settings["given"], settings["factor"]
    rate = settings["frame_rate"]
    for frames in to_frames(clips):
        generator = torch.Generator().manual_seed(0)
        row, words = [frames], ["a held-out clip"]
        if "prediction" in settings["tasks"]:
            options = {"frame_rate": rate, "generator": generator, "output_type": "np"}
            new = pipe.predict(frames[:given], count - given, **options).frames[0]
            row.append(np.concatenate([frames[:given], to_uint8_frames(new)]))
            words.append(f"its first {given} frames and what the model predicts")
        if "interpolation" in settings["tasks"]:
            options = {"factor": factor, "frame_rate": rate / factor, "generator": generator, "output_type": "np"}
            row.append(to_uint8_frames(pipe.interpolate(frames[::factor], **options).frames[0]))
            words.append(f"every {factor}th frame with what the model puts between")
        length = min(map(len, row))
        samples.append(("; ".join(words), animations_html([np.concatenate([one[:length] for one in row], axis=2)])))
    shape = {name: settings[name] for name in ("height", "width", "num_frames")}
    for caption in captions:
        generator = torch.Generator().manual_seed(0)
        video = pipe(caption, **shape, frame_rate=rate, generator=generator, output_type="np").frames[0]
        samples.append((f"generated from the prompt: {caption}", animations_html([to_uint8_frames(video)])))
    return samples


def to_uint8_frames(frames: np.ndarray) -> np.ndarray:
    """Converts frames in [0, 1] to uint8."""
    return (frames * 255).round().clip(0, 255).astype(np.uint8)


def render(**parts: Any) -> str:
    """The report as HTML."""
    import jinja2

    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = Path(__file__).with_name("train_report.html.jinja").read_text(encoding="utf-8")
    return environment.from_string(template).render(**parts)
