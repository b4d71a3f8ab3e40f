"""Labels of videos: of whole videos, and over time."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch.nn import functional as F
from tqdm.auto import tqdm

from vgen.data.clips import Listed, Sampling, VideoFolder, list_videos, stack_clips
from vgen.data.resize import Fit
from vgen.data.video_io import iter_video, video_info
from vgen.data.views import views_of
from vgen.io.atomic import write_text
from vgen.io.pixels import from_frames, to_uint8
from vgen.recognition import Recognizer
from vgen.recognition.detection import DETECTION_THRESHOLDS, Segment, segments_of
from vgen.temporal.state import TemporalState


class Moment(NamedTuple):
    """The probabilities of the classes for a part of a video."""

    start: float
    """Seconds from the start of the video."""
    end: float
    probabilities: list[float]


@torch.no_grad()
def classify(model: Recognizer, video: Path | Listed, num_clips: int = 4, num_crops: int = 1) -> dict[str, float]:
    """The probability of each label for a video, in descending order.

    Args:
        model: The classifier, in evaluation mode.
        video: The file, or a listed segment of one.
        num_clips: Most clips over which probabilities are averaged, at equal distances.
        num_crops: Crops of each clip over which they are averaged, from one end of the frame to the other.

    Raises:
        ValueError: The video is damaged or too short.
    """
    video = Listed(path=video) if isinstance(video, Path) else video
    views = views_of(video, _sampling(model), model.config.image_size, num_clips, num_crops)
    clip, _ = stack_clips(views, model.device)
    probabilities = torch.cat([model.probabilities(model(one[None]).logits) for one in clip]).mean(0)
    found = dict(zip(model.labels, probabilities.tolist(), strict=True))
    return dict(sorted(found.items(), key=lambda item: -item[1]))


@torch.no_grad()
def timeline(model: Recognizer, video: Path) -> list[Moment]:
    """The probabilities of the labels over time, without gaps.

    Networks that run over streams classify each frame from itself and earlier ones. Others classify windows of their
    length, a quarter of it apart. A window stands for the time around its middle, halfway to the next ones; the first
    and the last one reach to the ends of the video.

    Args:
        model: The classifier, in evaluation mode.
        video: The file.

    Raises:
        ValueError: The video is damaged or too short.
    """
    return list(_frames(model, video) if model.network.is_streamed else _windows(model, video))


def _frames(model: Recognizer, video: Path) -> Iterator[Moment]:
    state, rate, aspect = TemporalState(), _rate(model, video), video_info(video).pixel_aspect_ratio
    for number, frame in enumerate(iter_video(video, frame_rate=rate)):
        yield Moment(number / rate, (number + 1) / rate, _classify_frame(model, frame, state, aspect))


def _classify_frame(model: Recognizer, frame: np.ndarray, state: TemporalState, aspect: float = 1.0) -> list[float]:
    """Probabilities of the next frame `(h, w, 3)` of a stream, with the aspect ratio of its pixels."""
    size = (model.config.image_size,) * 2
    pixels = from_frames(torch.from_numpy(Fit(frame.shape[:2], size, aspect).to_target(frame[None]))[None])
    output = model(pixels.to(model.device), state=state)
    return model.probabilities(output.frame_logits)[0, 0].tolist()


@torch.no_grad()
def watch(model: Recognizer, source: str) -> Iterator[Moment]:
    """Classifies the frames of a camera, a network stream or a file as they come, with OpenCV.

    Frames between those of the model's frame rate are dropped. The times of cameras and network streams are those at
    which frames arrive.

    Args:
        model: A classifier that runs over streams, in evaluation mode.
        source: Number of a camera, URL, or file.

    Raises:
        ValueError: The classifier sees whole clips, or the source cannot be opened.
        ImportError: OpenCV is not installed.
    """
    if not model.network.is_streamed:
        raise ValueError(f"{model.config.name} sees whole clips: choose a network that streams, such as cnn_gru")
    try:
        import cv2
    except ImportError as error:
        raise ImportError("this needs OpenCV: pip install vgen[flow]") from error
    capture = cv2.VideoCapture(int(source) if source.isdecimal() else source)
    if not capture.isOpened():
        raise ValueError(f"cannot open {source}: expected the number of a camera, a URL or a file")
    is_live = source.isdecimal() or "://" in source
    state, due = TemporalState(), 0.0
    period = 1 / model.config.frame_rate if model.config.frame_rate else 0.0
    begin = None
    try:
        while capture.grab():
            begin = time.monotonic() if begin is None else begin
            now = time.monotonic() - begin if is_live else capture.get(cv2.CAP_PROP_POS_MSEC) / 1000
            if now < due - period / 8:  # times are rounded
                continue
            due = max(due, now - period) + period
            found, frame = capture.retrieve()
            if found:
                pixels = cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)
                yield Moment(now, now + period, _classify_frame(model, pixels, state))
    finally:
        capture.release()


def draw_timeline(moments: Sequence[Moment], model: Recognizer, most: int = 6) -> Any:
    """Plots the probabilities over time as a Matplotlib figure: of the labels that reach the highest ones.

    Args:
        moments: The probabilities over time, at least one.
        model: The classifier.
        most: Most labels to plot.
    """
    from matplotlib.figure import Figure

    columns = list(zip(*(moment.probabilities for moment in moments), strict=True))
    ranked = sorted(range(len(columns)), key=lambda label: -max(columns[label]))
    figure: Any = Figure(figsize=(8, 3), layout="constrained")
    axis = figure.subplots()
    for label in sorted(ranked[:most]):
        axis.stairs(columns[label], _edges(moments), baseline=None, label=model.labels[label])
    axis.set(xlabel="time, s", ylabel="probability", ylim=(0, 1))
    figure.legend(loc="outside right", fontsize="small")
    return figure


def _edges(moments: Sequence[Moment]) -> list[float]:
    """The times between which the moments are."""
    return [*(moment.start for moment in moments), moments[-1].end]


def _windows(model: Recognizer, video: Path) -> Iterator[Moment]:
    sampling = _sampling(model)
    length, rate = sampling.num_frames, _rate(model, video)
    size = model.config.image_size
    windows = VideoFolder([Listed(path=video)], replace(sampling, kind="sliding", hop=max(1, length // 4)), size, size)
    starts: list[float] = []
    found: list[list[float]] = []
    for number in range(len(windows)):
        window = windows[number]
        if window is None:
            raise ValueError(f"{video}: {windows.skipped[Listed(path=video)]}")
        clip, _ = stack_clips([window], model.device)
        starts.append(window.first)
        found += model.probabilities(model(clip).logits).tolist()
    between = [(one + next_one + length / rate) / 2 for one, next_one in pairwise(starts)]
    for span, probabilities in zip(pairwise([0.0, *between, starts[-1] + length / rate]), found, strict=True):
        yield Moment(*span, probabilities)


def _sampling(model: Recognizer) -> Sampling:
    return Sampling(num_frames=model.config.num_frames, frame_rate=model.config.frame_rate)


def _rate(model: Recognizer, video: Path) -> float:
    rate = model.config.frame_rate or video_info(video).frame_rate
    if rate is None:
        raise ValueError(f"{video}: its frame rate is unknown")
    return rate


@torch.no_grad()
def draw_attention(model: Recognizer, video: Path, most_frames: int = 9) -> Image.Image:
    """Draws frames of the middle clip, and below each the same frame, dark where the recognizer does not look.

    Args:
        model: A classifier with attention, in evaluation mode.
        video: The file.
        most_frames: Most frames to draw, at equal distances.

    Raises:
        ValueError: The classifier has no attention, or the video is damaged or too short.
    """
    clip, _ = stack_clips(views_of(Listed(path=video), _sampling(model), model.config.image_size), model.device)
    weights = model(clip).attention
    if weights is None:
        raise ValueError(
            f"{model.config.name} has no attention: expected st_lstm, or one of the names with _attention"
        )
    frames = rearrange(clip[0], "c f h w -> f c h w").cpu()
    brightness = weights[0, :, None].cpu() / weights.amax()
    brightness = F.interpolate(brightness, size=frames.shape[-2:], mode="bilinear", align_corners=False)
    brightness = brightness.repeat_interleave(len(frames) // len(brightness), dim=0)
    chosen = torch.linspace(0, len(brightness) - 1, min(most_frames, len(brightness))).round().long()
    darkened = (frames[chosen] + 1) * brightness[chosen] - 1
    pixels = rearrange(torch.stack([frames[chosen], darkened]), "r f c h w -> (r h) (f w) c")
    return Image.fromarray(to_uint8(pixels).numpy())


def label_folder(
    model: Recognizer, folder: Path, output: Path, num_clips: int = 4, threshold: float = 0.5
) -> tuple[int, dict[Path, str]]:
    """Labels all videos of a folder and writes a metadata file that training reads, atomically.

    Rows have `file_name`, `text` (the captions that the video has, or else its labels), `label`, and `probability`.

    Args:
        model: The classifier, in evaluation mode.
        folder: Folder of videos; its captions are kept.
        output: File to write, `.jsonl`, in the folder or above it.
        num_clips: Most clips per video.
        threshold: Least probability of a label, for classifiers of several labels. Others give the most probable one.

    Returns:
        The number of labeled videos, and the reason for each video that cannot be read.

    Raises:
        ValueError: There are no videos, or none can be read.
    """
    videos = list_videos(folder)
    rows, failed = [], {}
    for video in tqdm(videos, unit="video"):
        try:
            found = classify(model, video, num_clips)
        except (ValueError, OSError) as error:
            failed[video.path] = str(error)
            continue
        seen = model.seen([found[label] for label in model.labels], threshold)
        captions = [caption for caption in video.captions if caption]
        row = {"file_name": os.path.relpath(video.path, output.parent), "text": captions or list(seen) or [""]}
        row |= {"label": list(seen), "probability": [round(probability, 4) for probability in seen.values()]}
        times = {"start": video.start, "end": video.end}
        rows.append(row | {name: time for name, time in times.items() if time is not None})
    if not rows:
        raise ValueError(f"none of {len(videos)} videos can be read: {next(iter(failed.values()))}")
    write_text(output, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return len(rows), failed


def events_of(moments: list[Moment], model: Recognizer) -> list[Segment]:
    """What happens when: spans of time with one most probable label.

    With several labels at once, they are spans in which the probability of a label is at least 0.5.

    Args:
        moments: The probabilities over time, at least one.
        model: The classifier.

    Returns:
        Segments in order of time, with the mean probability as score.
    """
    labels = model.labels
    if model.config.multi_label:
        return sorted(detect(moments, labels, (0.5,)), key=lambda one: (one.start, one.label))
    best = [max(range(len(labels)), key=moment.probabilities.__getitem__) for moment in moments]
    events, begin = [], 0
    for label, group in groupby(best):
        count = len(list(group))
        span = moments[begin : begin + count]
        mean = sum(one.probabilities[label] for one in span) / count
        events.append(Segment(labels[label], span[0].start, span[-1].end, mean))
        begin += count
    return events


def detect(
    moments: list[Moment], labels: list[str], thresholds: Sequence[float] = DETECTION_THRESHOLDS
) -> list[Segment]:
    """Detections from the probabilities over time; see `vgen.recognition.detection.segments_of`.

    Args:
        moments: The probabilities over time, at least one.
        labels: Names of the classes.
        thresholds: Probabilities from which a label may occur; with one, segments of a label do not overlap.
    """
    probabilities = torch.tensor([moment.probabilities for moment in moments])
    return segments_of(_edges(moments), probabilities, labels, thresholds)
