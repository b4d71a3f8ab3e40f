"""From files to video files: each task of a pipeline as the command and the jobs run it.

Inputs are cropped and resized to what the checkpoint needs, outputs back to the crop's size. Videos are read and
written as they go, so that memory does not depend on their length (but on that of a video to continue from coarse to
fine). Every function returns what it did, for a record.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from vgen.data.resize import Fit
from vgen.data.video_io import VideoWriter, iter_video, join_videos, video_info
from vgen.data.video_writer import DEFAULT_FRAME_RATE
from vgen.io.pixels import to_clip, to_frames
from vgen.pipeline import VideoGenPipeline, load_rollout
from vgen.sampling.rollout import is_saved

PIECE = 16
"""Frames of a video that are handled at once."""


def generate_file(
    pipe: VideoGenPipeline,
    prompt: str,
    output: Path,
    *,
    seed: int = 0,
    image: Path | None = None,
    fps: float | None = None,
    overwrite: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Turns a sentence, and perhaps a first frame, into a video.

    Args:
        pipe: Generates.
        prompt: What to show.
        output: As for `VideoWriter`.
        seed: Of the noise.
        image: The first frame.
        fps: Frames per second of the file; those of the content if not given.
        overwrite: Whether an existing output is replaced.
        options: Arguments of the pipeline's call.

    Raises:
        ValueError: The image cannot be read, or as the pipeline's call.
    """
    fit = None
    if image is not None:
        first = _read_image(image)[None]
        fit = _fit(pipe, first[0])
        options = options | {"image": fit.to_target(first)[0]}
    rate = options.get("frame_rate") or pipe.config.frame_rate
    with VideoWriter(output, rate if fps is None else fps, overwrite=overwrite) as writer:
        latents = pipe(prompt, generator=torch.Generator().manual_seed(seed), output_type="latent", **options).frames
        pieces = (piece[0] for piece in pipe.decode_stream(latents))
        if fit is not None:
            piece = next(pieces)
            piece[0] = options["image"]
            pieces = (fit.back(piece) for piece in itertools.chain([piece], pieces))
        for piece in pieces:
            writer.append(piece)
    return _facts(writer, fit)


def predict_file(
    pipe: VideoGenPipeline,
    video: Path,
    output: Path,
    prompt: str | Mapping[int, str] | None = None,
    *,
    seed: int = 0,
    with_input: bool = False,
    fps: float | None = None,
    overwrite: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Continues a video; `options` are arguments of `VideoGenPipeline.rollout`, the others those of `generate_file`.

    Args:
        pipe: Continues.
        video: What to continue.
        output: As for `VideoWriter`.
        prompt: What to show.
        seed: Of the noise.
        with_input: Whether the given frames are written too.
        fps: Frames per second of the file; the input's if not given.
        overwrite: Whether an existing output is replaced.
        options: The rest.

    Raises:
        ValueError: The video cannot be read, or as `rollout`.
    """
    fit, frames, rate = _open(pipe, video)
    with VideoWriter(output, rate if fps is None else fps, overwrite=overwrite) as writer:

        def given() -> Iterator[np.ndarray]:
            for frame in frames:
                if with_input:
                    writer.append(fit.crop(frame[None]))
                yield fit.to_target(frame[None])[0]

        generator = torch.Generator().manual_seed(seed)
        options["frame_rate"] = options.get("frame_rate") or rate
        for chunk in pipe.rollout(prompt, given(), generator=generator, **options):
            writer.append(fit.back(chunk))
    return _facts(writer, fit)


def read_given(pipe: VideoGenPipeline, video: Path) -> tuple[np.ndarray, float]:
    """All frames `(f, h, w, 3)` of a video, uint8, as the checkpoint needs them, and their rate.

    Raises:
        ValueError: The video cannot be read, or holds no frames.
    """
    fit, frames, rate = _open(pipe, video)
    return fit.to_target(np.stack(list(frames))), rate


def interpolate_file(
    pipe: VideoGenPipeline,
    video: Path,
    output: Path,
    factor: int = 2,
    prompt: str | None = None,
    *,
    seed: int = 0,
    fps: float | None = None,
    overwrite: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Makes the frames between those of a video.

    Args:
        pipe: Makes them.
        video: What to interpolate.
        output: As for `VideoWriter`.
        factor: Given frames become every `factor`-th.
        prompt: What to show.
        seed: Of the noise.
        fps: Frames per second of the file; the input's if not given, which is slow motion.
        overwrite: Whether an existing output is replaced.
        options: Arguments of `VideoGenPipeline.interpolator`.

    Raises:
        ValueError: The video cannot be read, or as `interpolate`.
    """
    fit, frames, rate = _open(pipe, video)
    generator = torch.Generator().manual_seed(seed)
    options["frame_rate"] = options.get("frame_rate") or rate
    make = pipe.interpolator(factor, prompt, size=fit.target, generator=generator, **options)
    with VideoWriter(output, rate if fps is None else fps, overwrite=overwrite) as writer:
        for piece in make.stream(_clips(fit, frames)):
            writer.append(fit.back(to_frames(piece)[0]))
    return _facts(writer, fit)


def rollout_file(
    pipe: VideoGenPipeline,
    prompt: str | Mapping[int, str],
    output: Path,
    *,
    seed: int = 0,
    fps: float | None = None,
    overwrite: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Writes a rollout from nothing; the arguments are those of `predict_file`."""
    rate = options.get("frame_rate") or pipe.config.frame_rate
    chunks = pipe.rollout(prompt, generator=torch.Generator().manual_seed(seed), **options)
    with VideoWriter(output, rate if fps is None else fps, overwrite=overwrite) as writer:
        for chunk in chunks:
            writer.append(chunk)
    return _facts(writer, None)


def rollout_in_segments(
    pipe: VideoGenPipeline,
    prompt: str | Mapping[int, str],
    output: Path,
    work: Path,
    *,
    seed: int = 0,
    segment_frames: int = 256,
    fps: float | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Writes a rollout as closed segments with its state after each, so that the same call goes on after any stop.

    The finished segments are joined without encoding them again, and replace an older output.

    Args:
        pipe: Makes the video.
        prompt: What to show.
        output: An mp4 file.
        work: A folder of this video's own beside it, for segments and state; it is removed at the end.
        seed: Of the noise.
        segment_frames: Frames of a segment, at least.
        fps: Frames per second of the file.
        options: Arguments of `VideoGenPipeline.rollout`.

    Raises:
        ValueError: The output is no mp4 file, the video has no end, or as `rollout` and `load_rollout`.
    """
    if output.suffix.lower() != ".mp4" or options.get("num_frames") is None:
        raise ValueError(f"{output}: segments join in .mp4 files of a given num_frames only")
    rate = options.get("frame_rate") or pipe.config.frame_rate
    rollout = load_rollout(work / "state", pipe) if is_saved(work / "state") else None
    if rollout is None or not _has_segments(work, rollout.frames_done):
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        rollout = pipe.rollout(prompt, generator=torch.Generator().manual_seed(seed), **options)
    while rollout.frames_done < options["num_frames"]:
        path = work / f"{rollout.frames_done:09d}.mp4"
        with VideoWriter(path, rate if fps is None else fps) as writer:
            while writer.num_frames < segment_frames and (chunk := next(rollout, None)) is not None:
                writer.append(chunk)
        rollout.save(work / "state")
    join_videos(sorted(work.glob("*.mp4")), output, overwrite=True)
    finished = work.with_name(f".{output.stem}-finished")  # so that half of it is never taken for the whole
    shutil.rmtree(finished, ignore_errors=True)
    shutil.rmtree(work.rename(finished))
    return {"num_frames": rollout.frames_done}


def _has_segments(work: Path, num_frames: int) -> bool:
    """Whether the segments hold these frames; what was written behind them, without a state, is removed."""
    position = 0
    for segment in sorted(work.glob("*.mp4")):
        if int(segment.stem) >= num_frames:
            segment.unlink()
        elif int(segment.stem) == position:
            position += video_info(segment).num_frames or 0
    return position == num_frames


def _open(pipe: VideoGenPipeline, video: Path) -> tuple[Fit, Iterator[np.ndarray], float]:
    """How a video's frames come to the checkpoint's size, the frames, and their rate."""
    rate = video_info(video).frame_rate or DEFAULT_FRAME_RATE
    frames = iter_video(video)
    first = next(frames)
    return _fit(pipe, first), itertools.chain([first], frames), rate


def _clips(fit: Fit, frames: Iterator[np.ndarray]) -> Iterator[torch.Tensor]:
    while piece := list(itertools.islice(frames, PIECE)):
        yield to_clip(fit.to_target(np.stack(piece)))[None]


def _fit(pipe: VideoGenPipeline, frame: np.ndarray) -> Fit:
    height, width = frame.shape[:2]
    return Fit((height, width), (pipe.config.height, pipe.config.width))


def _facts(writer: VideoWriter, fit: Fit | None) -> dict[str, Any]:
    facts: dict[str, Any] = {"num_frames": writer.num_frames}
    return facts if fit is None or fit.source == fit.target else facts | {"fit": str(fit)}


def _read_image(path: Path) -> np.ndarray:
    """Pixels `(h, w, 3)`, uint8, of an image file."""
    try:
        with Image.open(path) as image:
            return np.array(ImageOps.exif_transpose(image).convert("RGB"))
    except UnidentifiedImageError as error:
        raise ValueError(f"{path} is no image that can be read") from error
