"""Jobs over many inputs, distributed over processes and resumable.

Each job writes one file in the output folder. `settings.json` holds the settings that all files share, and
`manifest.jsonl` has one line per file. A job is done if its file exists and its line records the same inputs.
Therefore the same command finishes a run that was stopped or killed. During a run, each process appends to its own
manifest. At the end, the main process merges them.
"""

from __future__ import annotations

import gc
import glob
import json
import os
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers.utils import logging as diffusers_logging
from tqdm.auto import tqdm
from transformers.utils import logging as transformers_logging

from vgen.checks import check_choice
from vgen.data.formats import VIDEO_SUFFIXES, OutputSuffix
from vgen.io.atomic import remove_workspaces, write_text
from vgen.io.fingerprint import digest_json
from vgen.pipeline import VideoGenPipeline
from vgen.processes import this_process
from vgen.sampling.options import DenoisingOptions

MANIFEST = "manifest.jsonl"
BARRIER_TIMEOUT = timedelta(days=30)
"""How long a process that has finished its jobs waits for the others, which may take much longer."""
DType = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class Job:
    """One file to write."""

    name: str
    """Name of the file or folder in the output folder."""
    inputs: dict[str, Any]
    """Inputs of this job, in addition to the settings of the run; must be JSON serializable."""

    @property
    def digest(self) -> str:
        """Hash of the inputs, 12 hexadecimal digits."""
        return digest_json(self.inputs)[:12]


@dataclass(kw_only=True)
class ModelConfig(DenoisingOptions):
    """Settings of all scripts that run a checkpoint on many inputs."""

    output_dir: Path
    """Output folder."""
    model: str = "vgen/shapes-64"
    """A packaged checkpoint, a folder, or a Hub id."""
    dtype: DType = "float32"
    """Data type of the weights."""
    seed: int = 0
    """Seed of the noise. Each input gets different noise."""


@dataclass(kw_only=True)
class JobConfig(ModelConfig):
    """Settings of all jobs that write videos.

    The seed of prompt n, counted from 0, is `seed + n`, unless its line sets one. The seed of an input video depends
    on `seed` and its file name, not on the other files.
    """

    suffix: OutputSuffix = ".mp4"
    """Suffix of the videos: `.mp4`, `.gif`, `.webp`, or empty for folders of frames."""
    fps: float | None = None
    """Frames per second of the files; the frame rate of the content if not set."""


def load_pipeline(config: ModelConfig) -> VideoGenPipeline:
    """Loads the pipeline of a run onto the device of this process.

    Raises:
        ValueError: The data type is not supported, or as in `VideoGenPipeline.from_pretrained`.
    """
    check_choice("dtype", config.dtype, DType)
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    pipe = VideoGenPipeline.from_pretrained(config.model, dtype=getattr(torch, config.dtype))
    pipe.to(this_process(timeout=BARRIER_TIMEOUT).device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run_settings(config: ModelConfig, pipe: VideoGenPipeline, *inputs: str) -> dict[str, Any]:
    """Collects what all files of a run share: the settings, the networks, and the checkpoint's defaults.

    Args:
        config: Settings of the run.
        pipe: The checkpoint.
        inputs: Names of settings to leave out, because they only select the inputs.
    """
    skipped = ("output_dir", "model", "seed", *inputs)
    settings = {name: value for name, value in vars(config).items() if name not in skipped}
    defaults = {name: pipe.config[name] for name in pipe.config if name[0] != "_" and name not in pipe.components}
    return settings | {"model": pipe.fingerprint(), "defaults": defaults}


def prompt_jobs(path: Path, config: JobConfig, *, schedules: bool = False) -> list[Job]:
    """Creates one job per prompt of a file.

    Args:
        path: A text file with one prompt per line, or a `.jsonl` file with one object per line. An object has a
            `prompt`, and optionally a `name` for the output file and a `seed`.
        config: Settings of the run.
        schedules: Whether a prompt may be a schedule by frame, such as `{"0": "...", "64": "..."}`.

    Raises:
        ValueError: The file has no prompts, a line is not such an object, or the suffix is not supported.
    """
    check_choice("suffix", config.suffix, OutputSuffix)
    lines = [line for line in path.read_text().splitlines() if line.strip()]
    prompt_types = (str, dict) if schedules else (str,)
    rows = [
        _parse_row(path, line, prompt_types) if path.suffix == ".jsonl" else {"prompt": line.strip()} for line in lines
    ]
    if not rows:
        raise ValueError(f"{path}: expected at least one prompt, got none")
    return [
        Job(
            row.get("name", f"{index:06d}") + config.suffix,
            {"prompt": row["prompt"], "seed": row.get("seed", config.seed + index)},
        )
        for index, row in enumerate(rows)
    ]


def video_jobs(folder: Path, config: JobConfig) -> list[Job]:
    """Creates one job per video of a folder, sorted by name.

    Args:
        folder: Contains video files and folders of frames. Hidden and other files are ignored.
        config: Settings of the run.

    Raises:
        ValueError: The folder has no videos, or the suffix is not supported.
    """
    check_choice("suffix", config.suffix, OutputSuffix)
    entries = sorted(entry for entry in folder.iterdir() if entry.name[:1] != ".")
    videos = [entry for entry in entries if entry.is_dir() or entry.suffix.lower() in VIDEO_SUFFIXES]
    if not videos:
        raise ValueError(f"{folder}: expected videos ({', '.join(VIDEO_SUFFIXES)}) or folders of frames, got none")
    return [
        Job(
            video.stem + config.suffix,
            {"video": str(video), **_version(video), "seed": config.seed + zlib.crc32(os.fsencode(video.stem))},
        )
        for video in videos
    ]


def _version(video: Path) -> dict[str, Any]:
    """Size and modification time of a file or a folder of frames, to notice if it is replaced; 0 for broken links."""
    stats = [file.stat() for file in (video.iterdir() if video.is_dir() else [video]) if file.exists()]
    return {
        "bytes": sum(stat.st_size for stat in stats),
        "modified": max((stat.st_mtime for stat in stats), default=0),
    }


def run_jobs(
    jobs: Sequence[Job],
    output_dir: Path,
    settings: dict[str, Any],
    make: Callable[[Job, Path], dict[str, Any]],
) -> int:
    """Runs this process's share of the jobs that are not done yet.

    A job that fails with `ValueError`, `OSError` or out of memory is recorded in the manifest and does not stop the
    others. Other errors are raised.

    Args:
        jobs: All jobs, the same in all processes.
        output_dir: Folder of the files.
        settings: The settings that all files share, see `run_settings`.
        make: Writes the file of a job, replacing an older one, and returns entries for the manifest.

    Returns:
        The number of jobs that failed in any process.

    Raises:
        ValueError: Job names are not unique file names, or the folder has files with other settings.
    """
    process = this_process()
    names = [job.name for job in jobs]
    invalid = [name for name, count in sorted(Counter(names).items()) if count > 1]
    invalid += [name for name in names if Path(name).name != name]
    if invalid:
        raise ValueError(f"names of jobs must be unique and have no folder, got {invalid[0]!r}")
    if process.is_main_process:
        output_dir.mkdir(parents=True, exist_ok=True)
        check_settings(output_dir, settings, [glob.escape(name) for name in names])
        remove_workspaces(output_dir, names)
    process.wait_for_everyone()
    lines = read_manifest(output_dir)
    own_manifest = output_dir / f"manifest-{process.process_index:05d}.jsonl"
    own_jobs = jobs[process.process_index :: process.num_processes]
    for job in tqdm(own_jobs, unit="file", disable=not process.is_main_process):
        path = output_dir / job.name
        if is_done(job, lines, output_dir):
            continue
        begin = time.time()
        line: dict[str, Any] = {"name": job.name, "status": "done", **job.inputs}
        try:
            line |= make(job, path)
        except (ValueError, OSError, torch.OutOfMemoryError) as error:
            line |= {"status": "failed", "error": " ".join(str(error).split())}
        if line["status"] == "failed":  # its tensors are in the error's traceback, which is gone by now
            gc.collect()
            if torch.accelerator.is_available():
                torch.accelerator.empty_cache()
        now = time.time()
        append_line(own_manifest, line | {"seconds": round(now - begin, 3), "time": now})
    process.wait_for_everyone()
    lines = read_manifest(output_dir)
    failed = sum(lines.get(job.name, {}).get("status") != "done" for job in jobs)
    process.wait_for_everyone()  # all must have read the manifests before they are merged
    if process.is_main_process:
        merge_manifests(output_dir, lines)
        print(f"{len(jobs) - failed} of {len(jobs)} done, {failed} failed: {output_dir / MANIFEST}")
    return failed


def check_settings(folder: Path, settings: dict[str, Any], patterns: Iterable[str]) -> None:
    """Writes `settings.json` in a folder, or checks that it has the same settings.

    Args:
        folder: Folder of the files.
        settings: Settings of the run. Values that JSON does not support are compared as strings.
        patterns: Glob patterns of the files.

    Raises:
        ValueError: The folder has files with other or unknown settings. The error lists the settings that differ.
    """
    path = folder / "settings.json"
    stored = json.loads(path.read_text()) if path.exists() else None
    settings = json.loads(json.dumps(settings, default=str))
    if stored is None and any(any(folder.glob(pattern)) for pattern in patterns):
        raise ValueError(f"{folder} has files, but no settings.json: choose an empty folder")
    differing = [] if stored is None else [name for name in settings if stored.get(name) != settings[name]]
    if differing:
        raise ValueError(f"{folder} has files with different settings ({', '.join(differing)}): choose another folder")
    write_text(path, json.dumps(settings, indent=1))


def read_manifest(folder: Path) -> dict[str, dict[str, Any]]:
    """Reads the latest line of each job from all manifests of a folder. Truncated lines are ignored."""
    lines: dict[str, dict[str, Any]] = {}
    for path in folder.glob("manifest*.jsonl"):
        for text in path.read_text().splitlines():
            try:
                line = json.loads(text)
            except json.JSONDecodeError:
                continue
            if line["time"] >= lines.get(line["name"], line)["time"]:
                lines[line["name"]] = line
    return lines


def is_done(job: Job, lines: dict[str, dict[str, Any]], folder: Path) -> bool:
    """Whether the file of a job exists and its line in the manifest has the same inputs."""
    line = lines.get(job.name, {})
    same = all(line.get(name) == value for name, value in json.loads(json.dumps(job.inputs)).items())
    return line.get("status") == "done" and same and (folder / job.name).exists()


def append_line(path: Path, line: dict[str, Any]) -> None:
    """Appends a line to a manifest; starts a new line if a killed process left a truncated one."""
    with open(path, "a+b") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 1))
        truncated = file.read(1) not in (b"", b"\n")
        file.write(b"\n" * truncated + json.dumps(line).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def merge_manifests(folder: Path, lines: dict[str, dict[str, Any]]) -> None:
    """Writes one manifest, sorted by name, and removes those of the processes."""
    write_text(folder / MANIFEST, "".join(json.dumps(lines[name]) + "\n" for name in sorted(lines)))
    for path in folder.glob("manifest-*.jsonl"):
        path.unlink()


def _parse_row(path: Path, line: str, prompt_types: tuple[type, ...]) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: expected one JSON object per line, got {line!r}: {error}") from error
    types: dict[str, Any] = {"prompt": prompt_types, "name": str, "seed": int}
    if not isinstance(row, dict) or "prompt" not in row or set(row) - set(types):
        raise ValueError(f"{path}: each line must have a prompt, and optionally a name and a seed, got {line!r}")
    schedule = row["prompt"] if isinstance(row["prompt"], dict) else {}
    if not all(isinstance(value, types[name]) for name, value in row.items()) or not all(
        frame.isdecimal() and isinstance(text, str) for frame, text in schedule.items()
    ):
        raise ValueError(f"{path}: prompt and name must be strings and seed an integer, got {line!r}")
    return row
