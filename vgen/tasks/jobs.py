"""Jobs over many inputs: shared out over processes, with a manifest, skipping what is done.

Each job makes one file in the output folder. `settings.json` says what all files have in common, `manifest.jsonl` has
one line for each. A job is done if its file is there and its line says that it was made from the same inputs; so a
run that was stopped, however hard, is finished by the same command. While processes run, each appends to a manifest of
its own; the last act of a run gathers them.
"""

from __future__ import annotations

import glob
import json
import os
import shutil
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging as diffusers_logging
from tqdm.auto import tqdm
from transformers.utils import logging as transformers_logging

from vgen.data.video_io import VIDEO_SUFFIXES
from vgen.io.atomic import write_text
from vgen.io.fingerprint import digest_json
from vgen.pipeline import VideoGenPipeline
from vgen.processes import this_process

MANIFEST = "manifest.jsonl"
PATIENCE = timedelta(days=30)
"""How long a process that is ready waits for the others, whose share may be much longer."""


@dataclass(frozen=True)
class Job:
    """One file to make."""

    name: str
    """Of the file or folder, in the output folder."""
    inputs: dict[str, Any]
    """What it is made from beside the settings of the run; of JSON's kinds."""

    @property
    def digest(self) -> str:
        """Of the inputs."""
        return digest_json(self.inputs)[:12]


@dataclass(kw_only=True)
class ModelConfig:
    """Settings of everything that runs a checkpoint over many inputs."""

    output_dir: Path
    """Folder of the results."""
    model: str = "vgen/shapes-64"
    """A packaged checkpoint, a folder, or a Hub id."""
    dtype: str = "float32"
    """Precision of the weights."""
    num_inference_steps: int | None = None
    """Denoising steps."""
    guidance_scale: float | None = None
    """Weight of the prompt; 1 is unguided."""
    seed: int = 0
    """Of the noise, which differs from input to input."""


@dataclass(kw_only=True)
class JobConfig(ModelConfig):
    """Settings of every job that writes videos.

    The n-th prompt, from 0, has `seed + n` unless it brings its own; a video has one by its name, wherever it stands.
    """

    suffix: str = ".mp4"
    """Kind of the videos: `.mp4`, `.gif`, `.webp`, or empty for folders of frames."""
    fps: float | None = None
    """Frames per second of the files; those of the content by default."""


def load_pipeline(config: ModelConfig) -> VideoGenPipeline:
    """The pipeline of a run, on the device of this process.

    Raises:
        ValueError: The precision is unknown, or as `VideoGenPipeline.from_pretrained`.
    """
    if config.dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"dtype={config.dtype!r} must be float32, bfloat16 or float16")
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    pipe = VideoGenPipeline.from_pretrained(config.model, dtype=getattr(torch, config.dtype))
    pipe.to(this_process(timeout=PATIENCE).device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run_settings(config: ModelConfig, pipe: VideoGenPipeline, *inputs: str) -> dict[str, Any]:
    """What all files of a run have in common: its settings, the networks, and what they take for what is not set.

    Where it reads and writes is left out.
    """
    skipped = ("output_dir", "model", "seed", *inputs)
    settings = {name: value for name, value in vars(config).items() if name not in skipped}
    defaults = {name: pipe.config[name] for name in pipe.config if name[0] != "_" and name not in pipe.components}
    return settings | {"model": pipe.fingerprint(), "defaults": defaults}


def prompt_jobs(path: Path, config: JobConfig, *, schedules: bool = False) -> list[Job]:
    """Jobs of a file of prompts: a text file has one a line; a `.jsonl` file has objects.

    An object has a `prompt` and may have a `name` for its file and a `seed`.

    Args:
        path: Of the file.
        config: Of the run.
        schedules: Whether a prompt may be a schedule, such as `{"0": "...", "64": "..."}`.

    Raises:
        ValueError: The file holds no prompts, or a line is no such object.
    """
    lines = [line for line in path.read_text().splitlines() if line.strip()]
    kinds = (str, dict) if schedules else (str,)
    rows = [_parse_row(path, line, kinds) if path.suffix == ".jsonl" else {"prompt": line.strip()} for line in lines]
    if not rows:
        raise ValueError(f"{path} holds no prompts")
    return [
        Job(
            row.get("name", f"{index:06d}") + config.suffix,
            {"prompt": row["prompt"], "seed": row.get("seed", config.seed + index)},
        )
        for index, row in enumerate(rows)
    ]


def video_jobs(folder: Path, config: JobConfig) -> list[Job]:
    """Jobs of a folder of videos: files that can be read, and folders of frames, in the order of their names.

    Raises:
        ValueError: The folder holds no videos.
    """
    entries = sorted(entry for entry in folder.iterdir() if entry.name[:1] != ".")
    videos = [entry for entry in entries if entry.is_dir() or entry.suffix.lower() in VIDEO_SUFFIXES]
    if not videos:
        raise ValueError(f"{folder} holds no videos: {', '.join(VIDEO_SUFFIXES)}, or folders of frames")
    return [
        Job(
            video.stem + config.suffix,
            {"video": str(video), **_version(video), "seed": config.seed + zlib.crc32(os.fsencode(video.stem))},
        )
        for video in videos
    ]


def _version(video: Path) -> dict[str, Any]:
    """Tells a file, or a folder of frames, from what may once take its place; of a broken link there is nothing."""
    found = [file.stat() for file in (video.iterdir() if video.is_dir() else [video]) if file.exists()]
    return {"bytes": sum(one.st_size for one in found), "modified": max((one.st_mtime for one in found), default=0)}


def run_jobs(
    jobs: Sequence[Job],
    output_dir: Path,
    settings: dict[str, Any],
    make: Callable[[Job, Path], dict[str, Any]],
) -> int:
    """Makes what is missing, this process's share of it; returns the number of jobs that failed anywhere.

    A job whose input is bad (`ValueError`, `OSError`, or more than memory holds) is told in the manifest and does not
    stop the others.

    Args:
        jobs: All jobs, the same in all processes.
        output_dir: Folder of the files.
        settings: What all files have in common.
        make: Writes a job's file, over an older one, and returns facts for the manifest.

    Raises:
        ValueError: Two jobs have one name, or the folder holds files that were made with other settings.
    """
    process = this_process()
    names = [job.name for job in jobs]
    double = sorted(name for name, count in Counter(names).items() if count > 1)
    if double or any(Path(name).name != name for name in names):
        raise ValueError(f"each input needs a name of its own without folders in it, got {(double or names)[0]!r}")
    if process.is_main_process:
        output_dir.mkdir(parents=True, exist_ok=True)
        check_settings(output_dir, settings, [glob.escape(name) for name in names])
        hidden = {f".{Path(name).stem}-" for name in names}
        for left in list(output_dir.glob(".*")):  # of a writer that was killed, named by `tempfile`
            if left.name[:-8] in hidden:
                shutil.rmtree(left)
    process.wait_for_everyone()
    lines = read_manifest(output_dir)
    own = output_dir / f"manifest-{process.process_index:05d}.jsonl"
    mine = jobs[process.process_index :: process.num_processes]
    for job in tqdm(mine, unit="file", disable=not process.is_main_process):
        path = output_dir / job.name
        if is_done(job, lines, output_dir):
            continue
        begin = time.time()
        line: dict[str, Any] = {"name": job.name, "status": "done", **job.inputs}
        try:
            line |= make(job, path)
        except (ValueError, OSError, torch.OutOfMemoryError) as error:
            line |= {"status": "failed", "error": " ".join(str(error).split())}
        now = time.time()
        append_line(own, line | {"seconds": round(now - begin, 3), "time": now})
    process.wait_for_everyone()
    lines = read_manifest(output_dir)
    failed = sum(lines.get(job.name, {}).get("status") != "done" for job in jobs)
    process.wait_for_everyone()  # all have read before one gathers
    if process.is_main_process:
        gather(output_dir, lines)
        print(f"{len(jobs) - failed} of {len(jobs)} done, {failed} failed: {output_dir / MANIFEST}")
    return failed


def check_settings(folder: Path, settings: dict[str, Any], patterns: Iterable[str]) -> None:
    """Writes down what the files of a folder were made with, or checks that it is the same.

    Args:
        folder: Of the files.
        settings: Of JSON's kinds.
        patterns: Of the files' names.

    Raises:
        ValueError: The folder holds files of other or unknown settings; what differs is named.
    """
    path = folder / "settings.json"
    found = json.loads(path.read_text()) if path.exists() else None
    settings = json.loads(json.dumps(settings, default=str))
    if found is None and any(any(folder.glob(pattern)) for pattern in patterns):
        raise ValueError(f"{folder} holds files of unknown settings: choose an empty folder")
    differing = [] if found is None else [name for name in settings if found.get(name) != settings[name]]
    if differing:
        raise ValueError(f"{folder} holds files made with another {', '.join(differing)}: choose another folder")
    write_text(path, json.dumps(settings, indent=1))


def read_manifest(folder: Path) -> dict[str, dict[str, Any]]:
    """The latest line of each job, from all manifests of a folder; a line that was cut short does not count."""
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
    """Whether a job's file is there, made from the same inputs."""
    line = lines.get(job.name, {})
    same = all(line.get(name) == value for name, value in json.loads(json.dumps(job.inputs)).items())
    return line.get("status") == "done" and same and (folder / job.name).exists()


def append_line(path: Path, line: dict[str, Any]) -> None:
    """Appends to a manifest, behind whatever a killed process left of its last line."""
    with open(path, "a+b") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 1))
        torn = file.read(1) not in (b"", b"\n")
        file.write(b"\n" * torn + json.dumps(line).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def gather(folder: Path, lines: dict[str, dict[str, Any]]) -> None:
    """Writes one manifest, in the order of names, and removes those of processes."""
    write_text(folder / MANIFEST, "".join(json.dumps(lines[name]) + "\n" for name in sorted(lines)))
    for path in folder.glob("manifest-*.jsonl"):
        path.unlink()


def _parse_row(path: Path, line: str, kinds: tuple[type, ...]) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: {line!r} is not JSON: {error}") from error
    legal: dict[str, Any] = {"prompt": kinds, "name": str, "seed": int}
    if not isinstance(row, dict) or "prompt" not in row or set(row) - set(legal):
        raise ValueError(f"{path}: {line!r} must have a prompt, and may have a name and a seed")
    schedule = row["prompt"] if isinstance(row["prompt"], dict) else {}
    if not all(isinstance(value, legal[name]) for name, value in row.items()) or not all(
        frame.isdecimal() and isinstance(text, str) for frame, text in schedule.items()
    ):
        raise ValueError(f"{path}: {line!r} must have text for its prompt and name, and a whole number for its seed")
    return row
