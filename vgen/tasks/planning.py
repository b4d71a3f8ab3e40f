"""The plan of `vgen train`: which public scripts it runs, with which settings, and what that takes on this machine.

A run is one folder. `plan.json` records the options, and for each stage that has begun its settings, its time and
whether it is finished, so the same command goes on after an interruption.
"""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import vgen
from vgen.data.inspection import list_originals
from vgen.io.atomic import write_text
from vgen.io.records import read_json
from vgen.tasks.train_commands import Command, check_command, check_setting
from vgen.tasks.train_costs import Costs
from vgen.tasks.train_machine import Machine, check_disk, check_machine, check_memory, choose_preset, read_preset
from vgen.tasks.train_options import TrainOptions, parse_change
from vgen.tasks.train_setup import Setup, check_fine_tuning, choose_codec, choose_shape, read_pipeline
from vgen.tasks.train_stages import commands_of, plain_settings
from vgen.tasks.train_videos import LIMIT, check_captions, check_videos, choose_rate, inspect_videos
from vgen.training.needs import ClipShape

FORMAT = "vgen-train-1"
LOGGED = "throughput/clips_per_second"
"""A scalar of each entry in the logs of a run."""


@dataclass(kw_only=True)
class Plan(Setup):
    """The stages of a run, with their commands and what they need."""

    commands: dict[str, list[Command]]
    """Commands of each stage, in order; none for the report."""
    seconds: dict[str, float]
    """Estimated time of each stage."""
    memory: dict[str, float]
    """Calculated bytes of memory of the stages that train."""
    per_step: dict[str, float]
    """Seconds per optimizer step of `vae` and `denoiser`."""
    disk: float
    """Estimated bytes that the run writes."""

    @property
    def model(self) -> str:
        """The checkpoint that the run makes, or for `lora` the one that its adapter is for."""
        lora = self.options.train_only == "lora"
        return str(self.options.init if lora else self.folder / "denoiser" / "pipeline")

    @property
    def adapter(self) -> Path | None:
        """The adapter that the run makes, with `lora`."""
        return self.folder / "denoiser" / "lora" if self.options.train_only == "lora" else None

    def is_done(self, stage: str) -> bool:
        """Whether a stage is finished."""
        return bool(self.record.get(stage, {}).get("done"))

    @property
    def unknown(self) -> tuple[str, ...]:
        """Stages whose time and size are unknown until the videos of a stream are copied."""
        return ("data", "latents") if self.videos.is_stream else ()

    @property
    def remaining(self) -> float:
        """Estimated seconds of the stages that are not finished, without the unknown ones."""
        return sum(
            self.seconds[stage] for stage in self.commands if not self.is_done(stage) and stage not in self.unknown
        )


def make_plan(options: TrainOptions, machine: Machine | None = None, measured: dict[str, float] | None = None) -> Plan:
    """Inspects the videos and the machine, and plans the run or what is left of it. Writes nothing.

    Args:
        options: What to make from which videos.
        machine: The machine; by default this one.
        measured: Seconds per optimizer step of `vae` and `denoiser`. By default they are measured, in some seconds.

    Raises:
        ValueError: The options, the videos or the machine do not allow the run; the error says what would.
    """
    options.check()
    stored = load_record(options)
    record = stored.get("stages", {})
    machine = machine or Machine.here(options.output)
    name = options.preset or stored.get("preset") or choose_preset(machine)
    preset = read_preset(name)
    check_machine(name, preset, machine)
    changes: dict[str, dict[str, Any]] = {}
    for stage, setting, value in map(parse_change, options.changes):
        if stage != "clip":
            check_setting(stage, setting)
        changes.setdefault(stage, {})[setting] = value
    pipe = read_pipeline(options.init) if options.init else None
    codec = choose_codec(options, preset, changes)
    shape = choose_shape(preset, pipe, changes.get("clip", {}), codec, record)
    clip = ClipShape(height=shape["height"], width=shape["width"], num_frames=shape["num_frames"])
    is_copied = record.get("data", {}).get("done", False)
    source = str(options.output / "data" / "train") if is_copied else options.data
    max_videos = changes.get("data", {}).get("max_videos")
    videos = inspect_videos(source, clip.num_frames, max_videos)
    rate = shape["frame_rate"] if "data" in record else choose_rate(videos, shape["frame_rate"], clip.num_frames)
    check_videos(videos, clip, rate, is_split=is_copied or options.held_out is not None)
    if options.held_out is not None:
        list_originals(options.held_out, clip.num_frames, max_videos, limit=LIMIT)  # raises if there is no such source
    if is_copied:
        check_captions(options.output / "data", videos)
    if options.text_encoder and not videos.num_captioned and not videos.is_stream:
        raise ValueError(
            f"--text-encoder {options.text_encoder} has no effect, because no video has a caption: leave it out, or "
            "give captions to the videos, such as a .txt file next to each"
        )
    if pipe is not None:
        check_fine_tuning(options, pipe, videos)
    setup = Setup(
        options=options, preset_name=name, preset=preset, machine=machine, changes=changes, codec=codec, pipe=pipe,
        videos=videos, clip=clip, frame_rate=rate, record=record,
    )  # fmt: skip
    plan = _plan_stages(setup, measured or stored.get("per_step"))
    for stage, commands in plan.commands.items():
        for command in commands:
            check_command(stage, command)
    return plan


def _plan_stages(setup: Setup, measured: dict[str, float] | None) -> Plan:
    """The plan, after its memory, its disk and its time have been checked.

    Raises:
        ValueError: One of them is not enough.
    """
    costs = Costs(setup, measured)
    check_memory(setup.preset_name, costs.memory, setup.machine)
    check_disk(costs.disk, setup.machine, setup.folder)
    seconds = costs.other_seconds()
    for stage, entry in setup.record.items():
        seconds[stage] = 0.0 if entry.get("done") else _seconds_left(setup.folder / stage, entry)
    counts = costs.share_time(setup.limit - costs.spent - sum(seconds.values()))
    for stage, count in counts.items():
        seconds[stage] = costs.training_seconds(stage, count)
    commands = commands_of(setup, counts, *costs.hop_and_repeats)
    for stage, entry in setup.record.items():  # what has begun keeps its settings, except those of --set
        begun = [Command(**one) for one in entry["commands"]]
        changes = {} if entry.get("done") else setup.changes_of(stage)
        commands[stage] = [replace(one, settings=plain_settings(stage, one.settings | changes)) for one in begun]
    return Plan(
        **vars(setup), commands=commands, seconds=seconds, memory=costs.memory, per_step=costs.per_step,
        disk=costs.disk,
    )  # fmt: skip


def _seconds_left(folder: Path, entry: dict[str, Any]) -> float:
    """Estimated time of a stage that has begun: of the steps that are left, as the others were logged or planned."""
    found = [re.fullmatch(r"checkpoint-(\d+)", path.name) for path in folder.glob("checkpoint-*")]
    steps = max((int(one[1]) for one in found if one), default=0)
    total = entry["commands"][0]["settings"].get("max_steps")
    if not steps or total is None:
        return max(entry["planned"] - entry["seconds"], 0.0)
    return (logged_seconds(folder) or entry["planned"] / total) * max(total - steps, 0)


def logged_seconds(folder: Path) -> float | None:
    """Median seconds per step between entries in the logs of a run, or `None` before the second entry.

    This leaves out the first steps, which compile, and most entries are not interrupted by an evaluation.
    """
    if not (folder / "logs").exists():
        return None
    events = EventAccumulator(str(folder / "logs"))
    events.Reload()
    logged = events.Scalars(LOGGED) if LOGGED in events.Tags()["scalars"] else []
    each = [(b.wall_time - a.wall_time) / (b.step - a.step) for a, b in itertools.pairwise(logged) if b.step > a.step]
    return median(each) if each else None


def load_record(options: TrainOptions) -> dict[str, Any]:
    """Reads `plan.json` of a run that was begun; empty for a new one.

    Raises:
        ValueError: The run was begun with other options.
    """
    path = options.output / "plan.json"
    if not path.exists():
        return {}
    stored = read_json(path)
    if stored.get("format") != FORMAT:
        raise ValueError(f"{path} was written by another version of vgen: choose another --output")
    given, begun = _recorded(options), stored["options"]
    wrong = [f"{name}={begun.get(name)!r}, not {value!r}" for name, value in given.items() if begun.get(name) != value]
    if wrong:
        raise ValueError(
            f"{options.output} was begun with {'; '.join(wrong)}: pass the same options, or choose another --output"
        )
    return stored


def save_record(plan: Plan) -> None:
    """Writes `plan.json`."""
    content = {
        "format": FORMAT,
        "vgen": vgen.__version__,
        "preset": plan.preset_name,
        "options": _recorded(plan.options),
    }
    content |= {"per_step": plan.per_step, "stages": plan.record}
    write_text(plan.folder / "plan.json", json.dumps(content, indent=1))


def _recorded(options: TrainOptions) -> dict[str, Any]:
    """The options that a run keeps; its time limit may change."""
    values = {name: value for name, value in asdict(options).items() if name not in ("output", "minutes", "changes")}
    for name in ("data", "held_out"):
        if values[name] is not None and Path(values[name]).exists():
            values[name] = str(Path(values[name]).resolve())
    return json.loads(json.dumps(values, default=str))
