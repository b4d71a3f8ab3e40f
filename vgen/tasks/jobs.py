"""Jobs over many inputs, distributed over processes and resumable.

Each job writes one file in the output folder. `settings.json` holds the settings that all files share, and
`manifest.jsonl` has one line per file. A job is done if its file exists and its line records the same inputs.
Therefore the same command finishes a run that was stopped or killed. During a run, each process that knows results
appends to its own manifest: those of `accelerate launch`, or the driver of a Ray cluster. At the end, the main process
merges them.
"""

from __future__ import annotations

import gc
import glob
import json
import os
import time
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from tqdm.auto import tqdm

from vgen.checks import check_choice
from vgen.data.caption_files import numbered_lines, read_text
from vgen.data.formats import VIDEO_SUFFIXES, OutputOptions, OutputSuffix, check_output_options, is_ignored
from vgen.io.allocator import bound_memory
from vgen.io.atomic import remove_workspaces, writing
from vgen.io.errors import describe
from vgen.io.fingerprint import digest_json
from vgen.io.records import check_settings
from vgen.io.remote import as_path, forget_listing, is_url, last_modified, local_output, replace_text
from vgen.pipeline import VideoGenPipeline
from vgen.processes import locked_output_dir, this_process
from vgen.sampling.options import DenoisingOptions, RolloutOptions
from vgen.tasks.engine import ENGINE_OPTIONS, Engine, EngineOptions, Worker
from vgen.tasks.loading import LoadOptions, load_checkpoint

MANIFEST = "manifest.jsonl"
BARRIER_TIMEOUT = timedelta(days=30)
"""How long a process that has finished its jobs waits for the others, which may take much longer."""
PART_LINES = 256
"""Lines per manifest at a URL, where each new line writes the manifest again."""
Make = Callable[["Job", Path], dict[str, Any]]
"""Writes the file of a job to a local path, replacing an older one, and returns entries for the manifest."""


@dataclass(frozen=True)
class Job:
    """One file to write."""

    name: str
    """Name of the file or folder in the output folder."""
    inputs: dict[str, Any]
    """Inputs of this job, in addition to the settings of the run; must be JSON serializable."""
    error: str | None = None
    """Why the inputs are invalid; the job fails with this message."""

    @property
    def digest(self) -> str:
        """Hash of the inputs, 12 hexadecimal digits."""
        return digest_json(self.inputs)[:12]


@dataclass(kw_only=True)
class ModelConfig(EngineOptions, LoadOptions, DenoisingOptions):
    """Settings of all scripts that run a checkpoint on many inputs."""

    output_dir: str | Path
    """Output folder, or its URL."""
    model: str = "vgen/shapes-64"
    """A packaged checkpoint, a folder, or a Hub id."""
    seed: int = 0
    """Seed of the noise. Each input gets different noise."""


@dataclass(kw_only=True)
class JobConfig(OutputOptions, ModelConfig):
    """Settings of all jobs that write videos.

    The seed of prompt n, counted from 0, is `seed + n`, unless its line sets one. The seed of an input video depends
    on `seed` and its file name, not on the other files.
    """

    suffix: OutputSuffix = ".mp4"
    """Suffix of the videos: `.mp4`, `.gif`, `.webp`, or empty for folders of frames."""
    scale: int | None = 1
    """Factor by which the frames of the files are enlarged, with sharp edges; `null` enlarges as the `vgen` command
    does."""


def load_pipeline(config: ModelConfig, device: torch.device | None = None) -> VideoGenPipeline:
    """Loads the pipeline of a run, by default onto the device of this process.

    Raises:
        ValueError: As in `load_checkpoint`.
    """
    bound_memory()
    device = device or this_process(timeout=BARRIER_TIMEOUT).device
    pipe = load_checkpoint(config.model, config, device, streams=isinstance(config, RolloutOptions))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run_settings(config: ModelConfig, pipe: VideoGenPipeline, *inputs: str) -> dict[str, Any]:
    """Collects what all files of a run share: the settings, the networks, and the checkpoint's defaults.

    Args:
        config: Settings of the run.
        pipe: The checkpoint.
        inputs: Names of settings to leave out, because they only select the inputs.
    """
    skipped = ("output_dir", "model", "lora", "seed", *ENGINE_OPTIONS, *inputs)
    settings = {name: value for name, value in vars(config).items() if name not in skipped}
    if config.dtype == "auto":  # on another machine, it may mean another one
        settings["dtype"] = str(pipe.dtype).removeprefix("torch.")
    return settings | {"model": pipe.fingerprint(), "defaults": pipe.defaults}


def prompt_jobs(path: str | Path, config: JobConfig, *, schedules: bool = False) -> list[Job]:
    """Creates one job per prompt of a file. The job of a malformed line fails and does not stop the others.

    Args:
        path: Path or URL of a text file with one prompt per line, or a `.jsonl` file with one object per line. An
            object has a `prompt`, and optionally a `name` for the output file and a `seed`.
        config: Settings of the run.
        schedules: Whether a prompt may be a schedule by frame, such as `{"0": "...", "64": "..."}`.

    Raises:
        ValueError: The file is not UTF-8 or has no prompts, or an option of the output is not supported.
    """
    _check_output(config)
    path = as_path(path)
    lines = numbered_lines(read_text(path))
    if not lines:
        raise ValueError(f"{path}: expected at least one prompt, got none")
    prompt_types = (str, dict) if schedules else (str,)
    jobs: list[Job] = []
    names = set()
    for index, (number, line) in enumerate(lines):
        name, inputs, reason = f"{index:06d}", {"prompt": line, "seed": config.seed + index}, None
        if path.suffix.lower() == ".jsonl":
            try:
                row = _parse_row(line, prompt_types)
                name = row.get("name", name)
                inputs |= {key: row[key] for key in inputs.keys() & row.keys()}
            except ValueError as malformed:
                reason = f"line {number} of {path}: {malformed}"
        if name in names:
            name, reason = f"line-{number}", f"line {number} of {path}: an earlier line has the name {name!r}"
        names.add(name)
        jobs.append(Job(name + config.suffix, inputs, reason))
    return jobs


def video_jobs(folder: str | Path, config: JobConfig) -> list[Job]:
    """Creates one job per video of a folder, sorted by name.

    Args:
        folder: Path or URL of a folder of video files and folders of frames. Hidden and other files are ignored.
        config: Settings of the run.

    Raises:
        ValueError: The folder has no videos, or an option of the output is not supported.
    """
    _check_output(config)
    folder = as_path(folder)
    entries = sorted(entry for entry in folder.iterdir() if not is_ignored(entry.name))
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


def _check_output(config: JobConfig) -> None:
    """Checks how the videos of a run are written, before a checkpoint is loaded."""
    check_choice("suffix", config.suffix, OutputSuffix)
    check_output_options(config, config.suffix)


def _version(video: Path) -> dict[str, Any]:
    """Size and modification time of a file or a folder of frames, to notice if it is replaced; 0 for broken links."""
    files = [file for file in (video.iterdir() if video.is_dir() else [video]) if file.exists()]
    return {
        "bytes": sum(file.stat().st_size for file in files),
        "modified": max(map(last_modified, files), default=0),
    }


def run_jobs(jobs: Sequence[Job], config: EngineOptions, output_dir: str | Path, load: Callable[[], Worker]) -> int:
    """Runs the jobs that are not done yet: this process's share of them, or all of them on a Ray cluster.

    A job that fails with `ValueError`, `OSError` or out of memory is recorded in the manifest and does not stop the
    others. Other errors are raised.

    Args:
        jobs: All jobs, the same in all processes.
        config: What runs the jobs.
        output_dir: Path or URL of the folder of the files.
        load: Creates the worker, see `job_worker`: in this process, or once in each Ray actor.

    Returns:
        The number of jobs that failed in any process.

    Raises:
        ValueError: Job names are not unique file names, the folder has files with other settings or is in use by
            another command, or as in `ray_pool`.
        ImportError: A package for the engine or for a URL is not installed.
    """
    check_choice("engine", config.engine, Engine)
    check_names(jobs)
    folder, process = as_path(output_dir), this_process(timeout=BARRIER_TIMEOUT)
    with locked_output_dir(folder):
        if config.engine == "ray":
            _run_on_ray(jobs, config, folder, load)
        else:
            _run_in_processes(jobs, folder, load())
        process.wait_for_everyone()
        lines = read_manifest(folder)
        failed = sum(lines.get(job.name, {}).get("status") != "done" for job in jobs)
        process.wait_for_everyone()  # all must have read the manifests before they are merged
        if process.is_main_process:
            merge_manifests(folder, lines)
    if process.is_main_process:
        advice = "; the same command tries them again" if failed else ""
        print(f"{len(jobs) - failed} of {len(jobs)} done, {failed} failed{advice}: {folder / MANIFEST}")
    return failed


def check_names(jobs: Sequence[Job]) -> None:
    """Checks that the names of jobs are unique file names.

    Raises:
        ValueError: They are not.
    """
    names = [job.name for job in jobs]
    invalid = [name for name, count in sorted(Counter(names).items()) if count > 1]
    invalid += [name for name in names if Path(name).name != name]
    if invalid:
        raise ValueError(f"names of jobs must be unique and have no folder, got {invalid[0]!r}")


def job_worker(make: Make, output_dir: str | Path, settings: dict[str, Any]) -> Worker:
    """What works on jobs.

    Args:
        make: Writes the file of a job.
        output_dir: As in `run_jobs`.
        settings: The settings that all files share, see `run_settings`.
    """
    folder = as_path(output_dir)
    return Worker(settings, lambda job: run_job(job, folder, make))


def run_job(job: Job, folder: Path, make: Make) -> dict[str, Any]:
    """Writes the file of a job and returns its line of the manifest."""
    begin = time.time()
    line: dict[str, Any] = {"name": job.name, "status": "done", **job.inputs}
    try:
        if job.error is not None:
            raise ValueError(job.error)
        with local_output(folder / job.name) as path:
            line |= make(job, path)
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        line |= _failure(error)
    if line["status"] == "failed":  # its tensors are in the error's traceback, which is gone by now
        gc.collect()
        if torch.accelerator.is_available():
            torch.accelerator.empty_cache()
    now = time.time()
    return line | {"seconds": round(now - begin, 3), "time": now}


def _failure(error: Exception) -> dict[str, Any]:
    return {"status": "failed", "error": describe(error)}


def _run_in_processes(jobs: Sequence[Job], folder: Path, worker: Worker) -> None:
    """Runs this process's share of the jobs."""
    process = this_process()
    if process.is_main_process:
        prepare_folder(folder, worker.settings, jobs)
    process.wait_for_everyone()
    lines, manifest = read_manifest(folder), ManifestWriter(folder, process.process_index)
    own_jobs = jobs[process.process_index :: process.num_processes]
    for job in tqdm(own_jobs, unit="file", disable=not process.is_main_process):
        if not is_done(job, lines, folder):
            manifest.append(worker.work(job))


def _run_on_ray(jobs: Sequence[Job], config: EngineOptions, folder: Path, load: Callable[[], Worker]) -> None:
    """Runs all jobs on a Ray cluster. The actors write the files, and this process the manifest."""
    from vgen.tasks.ray_engine import ItemError, ray_pool

    folder.mkdir(parents=True, exist_ok=True)
    lines, manifest = read_manifest(folder), ManifestWriter(folder, 0)
    to_do = [job for job in jobs if not is_done(job, lines, folder)]
    with ray_pool(load, config, max_actors=len(to_do)) as pool:
        prepare_folder(folder, pool.settings, jobs)
        for job, line in tqdm(pool.map(to_do), total=len(to_do), unit="file"):
            if isinstance(line, ItemError):
                line = {"name": job.name, "status": "failed", **job.inputs} | _failure(line)
                line |= {"seconds": None, "time": time.time()}
            manifest.append(line)
    if not is_url(folder):
        remove_workspaces(folder, [job.name for job in jobs])  # of actors that died


def prepare_folder(folder: Path, settings: dict[str, Any], jobs: Sequence[Job]) -> None:
    """Checks the settings of an output folder, and removes what killed processes left.

    Raises:
        ValueError: As in `check_settings`.
    """
    names = [job.name for job in jobs]
    folder.mkdir(parents=True, exist_ok=True)
    check_settings(folder, settings, [glob.escape(name) for name in names])
    if not is_url(folder):
        remove_workspaces(folder, names)


def read_manifest(folder: Path) -> dict[str, dict[str, Any]]:
    """Reads the latest line of each job from all manifests of a folder. Truncated and malformed lines are ignored."""
    forget_listing(folder)
    lines: dict[str, dict[str, Any]] = {}
    for path in folder.glob("manifest*.jsonl"):
        for text in path.read_bytes().split(b"\n"):
            try:
                line = json.loads(text)
                name, written = str(line["name"]), float(line["time"])
            except (ValueError, TypeError, KeyError, RecursionError):
                continue
            if written >= float(lines.get(name, line)["time"]):
                lines[name] = line
    return lines


def is_done(job: Job, lines: dict[str, dict[str, Any]], folder: Path) -> bool:
    """Whether the file of a job exists and its line in the manifest has the same inputs."""
    line = lines.get(job.name, {})
    same = all(line.get(name) == value for name, value in json.loads(json.dumps(job.inputs)).items())
    return line.get("status") == "done" and same and (folder / job.name).exists()


class ManifestWriter:
    """Appends lines to the manifest of a process.

    At URLs, where nothing can be appended, each line replaces the manifest, and a new one begins after `PART_LINES`.

    Args:
        folder: The output folder.
        index: Index of the process.
    """

    def __init__(self, folder: Path, index: int):
        self.folder, self.index = folder, index
        self.lines: list[str] = []

    def append(self, line: dict[str, Any]) -> None:
        """Appends a line; it is stored when this returns."""
        if not is_url(self.folder):
            append_line(self.folder / f"manifest-{self.index:05d}.jsonl", line)
            return
        if len(self.lines) % PART_LINES == 0:
            self.lines.clear()
            self.part = self.folder / f"manifest-{self.index:05d}-{uuid4().hex}.jsonl"
        self.lines.append(json.dumps(line) + "\n")
        replace_text(self.part, "".join(self.lines))


def append_line(path: Path, line: dict[str, Any]) -> None:
    """Appends a line to a manifest; starts a new line if a killed process left a truncated one."""
    with writing(path), open(path, "a+b") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 1))
        truncated = file.read(1) not in (b"", b"\n")
        file.write(b"\n" * truncated + json.dumps(line).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def merge_manifests(folder: Path, lines: dict[str, dict[str, Any]]) -> None:
    """Writes one manifest, sorted by name, and removes those of the processes."""
    replace_text(folder / MANIFEST, "".join(json.dumps(lines[name]) + "\n" for name in sorted(lines)))
    for path in folder.glob("manifest-*.jsonl"):
        path.unlink()


def _parse_row(line: str, prompt_types: tuple[type, ...]) -> dict[str, Any]:
    """Reads a line of a `.jsonl` file of prompts.

    Raises:
        ValueError: It is malformed.
    """
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"expected one JSON object per line, got {line[:200]!r}: {error}") from error
    types = {"prompt": prompt_types, "name": (str,), "seed": (int,)}
    if not isinstance(row, dict) or "prompt" not in row or set(row) - set(types):
        raise ValueError(f"each line must have a prompt, and optionally a name and a seed, got {line[:200]!r}")
    schedule = row["prompt"] if isinstance(row["prompt"], dict) else {}
    if not all(type(value) in types[name] for name, value in row.items()) or not all(  # a bool is no integer
        frame.isdecimal() and isinstance(text, str) for frame, text in schedule.items()
    ):
        raise ValueError(f"prompt and name must be strings and seed an integer, got {line[:200]!r}")
    name, seed = row.get("name", "name"), row.get("seed", 0)
    if name in ("", ".", "..") or Path(name).name != name or not name.isprintable():
        raise ValueError(f"name must be a file name without a folder, got {name!r}")
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed must be at least 0 and below 2**63, got {seed}")
    return row
