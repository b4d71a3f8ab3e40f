"""The tasks of a pipeline with files as inputs and outputs, for the `vgen` command and for jobs.

Inputs are cropped and resized to the checkpoint's size, and outputs are resized back to the size of the crop. Videos
are streamed, so memory does not grow with their length. The exception is the input of a prediction with a
`keyframe_interval`, which is held in memory. Every function returns entries for a job's manifest: `num_frames`,
`scale` and `content_size` if the file is enlarged, and `fit` if frames were cropped or resized.

Files that were enlarged when they were written are read at their original size. Files store what they were made from.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.utils import logging

from vgen.data.formats import OutputOptions
from vgen.data.resize import Fit, shrink
from vgen.data.video_io import VideoWriter, iter_video, join_videos, video_info
from vgen.data.video_writer import DEFAULT_FRAME_RATE
from vgen.io.atomic import remove_directory
from vgen.io.images import read_image
from vgen.io.pixels import from_pt, to_clip, to_frames
from vgen.pipeline import VideoGenPipeline, load_rollout
from vgen.sampling.options import InterpolationOptions, RolloutOptions
from vgen.sampling.prompts import has_prompt
from vgen.sampling.rollout import is_saved

logger = logging.get_logger(__name__)

_DEFAULTS = ("height", "width", "num_frames", "frame_rate", "num_inference_steps", "guidance_scale")
FRAMES_PER_SLICE = 16
"""Frames of an input video that are converted at once."""


def generate_file(
    pipe: VideoGenPipeline,
    prompt: str,
    output: Path,
    *,
    seed: int = 0,
    image: Path | None = None,
    last_image: Path | None = None,
    written: OutputOptions | None = None,
    overwrite: bool = False,
    metadata: Mapping[str, Any] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Generates a video from a prompt and optionally a first frame, or a first and a last one.

    Args:
        pipe: The pipeline.
        prompt: Describes the video.
        output: Path of the video, as in `VideoWriter`.
        seed: Seed of the noise.
        image: Image file with the first frame.
        last_image: Image file with the last frame, of the same size.
        written: How the file is written; `None` uses the defaults.
        overwrite: Whether to replace an existing output.
        metadata: Entries that the file stores besides its inputs and settings, such as the name of the checkpoint.
        options: Further arguments of `VideoGenPipeline.__call__`.

    Raises:
        ValueError: An image cannot be read, the two differ in size, or as in `VideoGenPipeline.__call__`.
    """
    fit = None
    paths = {0: image, -1: last_image}
    given_frames = {index: read_image(path)[None] for index, path in paths.items() if path is not None}
    if given_frames:
        sizes = {one.shape[1:3] for one in given_frames.values()}
        if len(sizes) > 1:
            raise ValueError(f"{image} and {last_image} must have the same size, got {' and '.join(map(str, sizes))}")
        fit = Fit(sizes.pop(), (pipe.config.height, pipe.config.width))
        given_frames = {index: fit.to_target(one)[0] for index, one in given_frames.items()}
        options = options | {"frames": given_frames}
    rate = options.get("frame_rate") or pipe.config.frame_rate
    given = {name: value for name, value in options.items() if isinstance(value, (str, int, float))}
    settings = {name: pipe.config[name] for name in _DEFAULTS} | given
    images = {"image": _name_of(image)} | ({} if last_image is None else {"last_image": _name_of(last_image)})
    entries = {"task": "generation", "prompt": prompt, **images, "seed": seed} | settings
    generator = torch.Generator().manual_seed(seed)
    with _writer(output, rate, written, {**(metadata or {}), **entries}, overwrite) as writer:
        slices: Iterator[np.ndarray]
        if options.get("groups") is None and "full" not in pipe.denoiser.config.group_modes:  # a rollout
            slices = iter(to_frames(from_pt(pipe(prompt, generator=generator, output_type="pt", **options).frames)))
        else:
            latents = pipe(prompt, generator=generator, output_type="latent", **options).frames
            slices = (frames[0] for frames in pipe.decode_stream(latents))
            if given_frames and not pipe.denoiser.condition_channels:
                slices = _with_given(slices, given_frames)
        for frames in slices:
            writer.append(frames if fit is None else fit.back(frames))
    return _manifest_entries(writer, fit)


def _with_given(slices: Iterator[np.ndarray], given: Mapping[int, np.ndarray]) -> Iterator[np.ndarray]:
    """Slices of a video with the given first (0) and last (-1) frames in their places."""
    previous = next(slices)
    if 0 in given:
        previous[0] = given[0]
    for frames in slices:
        yield previous
        previous = frames
    if -1 in given:
        previous[-1] = given[-1]
    yield previous


def predict_file(
    pipe: VideoGenPipeline,
    video: Path,
    output: Path,
    prompt: str | Mapping[int, str] | None = None,
    *,
    seed: int = 0,
    with_input: bool = False,
    written: OutputOptions | None = None,
    overwrite: bool = False,
    metadata: Mapping[str, Any] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Continues a video.

    Args:
        pipe: The pipeline.
        video: The video to continue: a file or a folder of frames.
        output: Path of the new video, as in `VideoWriter`.
        prompt: Describes the new frames, or a schedule of prompts by new frame; `None` is unconditional.
        seed: Seed of the noise.
        with_input: Whether to write the input frames before the new ones.
        written: How the file is written; `None` uses the defaults.
        overwrite: Whether to replace an existing output.
        metadata: Entries that the file stores besides its inputs and settings, such as the name of the checkpoint.
        options: Further arguments of `VideoGenPipeline.rollout`.

    Raises:
        ValueError: The video cannot be read, or as in `VideoGenPipeline.rollout`.
    """
    fit, frames, rate = _open(pipe, video)
    options["frame_rate"] = options.get("frame_rate") or rate
    entries = {
        "task": "prediction",
        "prompt": prompt,
        "video": _name_of(video),
        "with_input": with_input,
        "seed": seed,
    }
    entries |= _rollout_settings(pipe, prompt, options)
    with _writer(output, rate, written, {**(metadata or {}), **entries}, overwrite) as writer:

        def given() -> Iterator[np.ndarray]:
            for frame in frames:
                if with_input:
                    writer.append(fit.crop(frame[None]))
                yield fit.to_target(frame[None])[0]

        generator = torch.Generator().manual_seed(seed)
        for chunk in pipe.rollout(prompt, given(), generator=generator, overlap="auto", **options):
            writer.append(fit.back(chunk))
    return _manifest_entries(writer, fit)


def read_fitted(pipe: VideoGenPipeline, video: Path) -> tuple[np.ndarray, float]:
    """Reads a whole video, cropped and resized to the checkpoint's size.

    Args:
        pipe: The pipeline.
        video: A video file or a folder of frames.

    Returns:
        Frames, uint8 `(f, h, w, 3)`, and the frames per second.

    Raises:
        ValueError: The video cannot be read, or has no frames.
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
    written: OutputOptions | None = None,
    overwrite: bool = False,
    metadata: Mapping[str, Any] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Generates the frames between those of a video: slow motion, unless `written` sets another frame rate.

    Args:
        pipe: The pipeline.
        video: The video to interpolate: a file or a folder of frames.
        output: Path of the new video, as in `VideoWriter`.
        factor: Interpolation factor N: input frames become every N-th output frame.
        prompt: Describes the video; `None` is unconditional.
        seed: Seed of the noise.
        written: How the file is written; `None` uses the defaults.
        overwrite: Whether to replace an existing output.
        metadata: Entries that the file stores besides its inputs and settings, such as the name of the checkpoint.
        options: Further arguments of `VideoGenPipeline.interpolator`.

    Raises:
        ValueError: The video cannot be read, or as in `VideoGenPipeline.interpolator`.
    """
    fit, frames, rate = _open(pipe, video)
    generator = torch.Generator().manual_seed(seed)
    options["frame_rate"] = options.get("frame_rate") or rate
    interpolator = pipe.interpolator(factor, prompt, size=fit.target, generator=generator, **options)
    settings = InterpolationOptions(factor=factor, **options).resolve(pipe.config, prompted=prompt is not None)
    entries = {"task": "interpolation", "prompt": prompt, "video": _name_of(video), "seed": seed} | settings.to_json()
    with _writer(output, rate, written, {**(metadata or {}), **entries}, overwrite) as writer:
        for clip in interpolator.stream(_clips(fit, frames)):
            writer.append(fit.back(to_frames(clip)[0]))
    return _manifest_entries(writer, fit)


def rollout_file(
    pipe: VideoGenPipeline,
    prompt: str | Mapping[int, str],
    output: Path,
    *,
    seed: int = 0,
    written: OutputOptions | None = None,
    overwrite: bool = False,
    metadata: Mapping[str, Any] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Generates a video of any length without input frames; arguments as in `predict_file`."""
    rate = options.get("frame_rate") or pipe.config.frame_rate
    generator = torch.Generator().manual_seed(seed)
    chunks = pipe.rollout(prompt, generator=generator, overlap="auto", **options)
    entries = {"task": "rollout", "prompt": prompt, "seed": seed} | _rollout_settings(pipe, prompt, options)
    with _writer(output, rate, written, {**(metadata or {}), **entries}, overwrite) as writer:
        for chunk in chunks:
            writer.append(chunk)
    return _manifest_entries(writer, None)


def rollout_in_segments(
    pipe: VideoGenPipeline,
    prompt: str | Mapping[int, str],
    output: Path,
    work: Path,
    *,
    seed: int = 0,
    segment_frames: int = 256,
    written: OutputOptions | None = None,
    metadata: Mapping[str, Any] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Generates a long video in segments and saves the rollout's state after each.

    The same call resumes after an interruption. At the end, the segments are joined without encoding them again, and
    replace an older output.

    Args:
        pipe: The pipeline.
        prompt: Describes the video, or a schedule of prompts by frame.
        output: Path of an mp4 file.
        work: Folder for the segments and the state of this video, in the folder of `output`. It is removed at the end.
        seed: Seed of the noise.
        segment_frames: Minimum number of frames per segment.
        written: How the file is written; `None` uses the defaults.
        metadata: As in `generate_file`.
        options: Further arguments of `VideoGenPipeline.rollout`. `num_frames` is required.

    Raises:
        ValueError: The output is not an mp4 file, `num_frames` is `None`, or as in `VideoGenPipeline.rollout` and
            `load_rollout`.
    """
    if output.suffix.lower() != ".mp4":
        raise ValueError(f"the output must be an .mp4 file, which can be joined from segments, got {output}")
    if options.get("num_frames") is None:
        raise ValueError("num_frames must be set for a rollout in segments, got None")
    rate = options.get("frame_rate") or pipe.config.frame_rate
    rollout = load_rollout(work / "state", pipe, overlap="auto") if is_saved(work / "state") else None
    if rollout is None or not _has_segments(work, rollout.frames_done):
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        rollout = pipe.rollout(prompt, generator=torch.Generator().manual_seed(seed), overlap="auto", **options)
    entries = {"task": "rollout", "prompt": prompt, "seed": seed} | _rollout_settings(pipe, prompt, options)
    while rollout.frames_done < options["num_frames"]:
        path = work / f"{rollout.frames_done:09d}.mp4"
        with _writer(path, rate, written, {**(metadata or {}), **entries}) as writer:
            while writer.num_frames < segment_frames and (chunk := next(rollout, None)) is not None:
                writer.append(chunk)
        rollout.save(work / "state")
    join_videos(sorted(work.glob("*.mp4")), output, overwrite=True)
    remove_directory(work)
    info = video_info(output)
    return {"num_frames": rollout.frames_done} | _enlargement(info.scale, info.content_size)


def _has_segments(work: Path, num_frames: int) -> bool:
    """Whether the segments have exactly `num_frames` frames. Removes later segments, whose state was not saved."""
    position = 0
    for segment in sorted(work.glob("*.mp4")):
        if int(segment.stem) >= num_frames:
            segment.unlink()
        elif int(segment.stem) == position:
            position += video_info(segment).num_frames
    return position == num_frames


def _open(pipe: VideoGenPipeline, video: Path) -> tuple[Fit, Iterator[np.ndarray], float]:
    """Opens a video: the crop and resize to the checkpoint's size, the frames, and the frames per second.

    A variable frame rate is resampled to its mean, so that time passes as in the file. Damage is warned about. What
    was enlarged when it was written is read at its original size.
    """
    info = video_info(video)
    rate = info.frame_rate or DEFAULT_FRAME_RATE
    if info.damage is not None:
        logger.warning(info.damage)
    frames = iter_video(video, frame_rate=rate, on_damage=logger.warning if info.damage is None else lambda _: None)
    size = info.content_size
    if info.scale > 1:
        frames = (shrink(frame, info.scale, size) for frame in frames)
    return Fit(size, (pipe.config.height, pipe.config.width), info.pixel_aspect_ratio), frames, rate


def _writer(
    path: Path, rate: float, written: OutputOptions | None, entries: Mapping[str, Any], overwrite: bool = False
) -> VideoWriter:
    """The writer of a file with these options, by default at a rate in frames per second and at its own size."""
    options = written or OutputOptions(scale=1)
    return VideoWriter(
        path,
        rate if options.fps is None else options.fps,
        pixel_format=options.pixel_format,
        overwrite=overwrite,
        scale=options.scale,
        metadata={name: value for name, value in entries.items() if value is not None},
    )


def _rollout_settings(pipe: VideoGenPipeline, prompt: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a rollout for the metadata, with the checkpoint's defaults."""
    own = {name: value for name, value in options.items() if name in RolloutOptions.names()}
    filled = RolloutOptions(**own).filled(pipe.config, pipe.denoiser.config, prompted=has_prompt(prompt))
    return {"num_frames": options.get("num_frames")} | filled.to_json()


def _name_of(path: Path | None) -> str | None:
    """The name of an input for the metadata, without its folder, because videos are passed on."""
    return None if path is None else path.name


def _clips(fit: Fit, frames: Iterator[np.ndarray]) -> Iterator[torch.Tensor]:
    while part := list(itertools.islice(frames, FRAMES_PER_SLICE)):
        yield to_clip(fit.to_target(np.stack(part)))[None]


def _manifest_entries(writer: VideoWriter, fit: Fit | None) -> dict[str, Any]:
    assert writer.scale is not None and writer.content_size is not None
    entries = {"num_frames": writer.num_frames} | _enlargement(writer.scale, writer.content_size)
    return entries if fit is None or fit.source == fit.output == fit.target else entries | {"fit": str(fit)}


def _enlargement(scale: int, size: tuple[int, int]) -> dict[str, Any]:
    return {} if scale == 1 else {"scale": scale, "content_size": f"{size[1]}x{size[0]}"}
