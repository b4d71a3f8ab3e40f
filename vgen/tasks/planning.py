"""The plan of `vgen train`: which public scripts it runs, with which settings, and what that takes on this machine.

A run is one folder. `plan.json` records the options, and for each stage that has begun its settings, its time and
whether it is finished, so the same command goes on after an interruption.
"""

from __future__ import annotations

import io
import itertools
import json
import math
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import redirect_stderr
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

import numpy as np
import psutil
import torch
import yaml
from transformers import AutoConfig

import vgen
from vgen.checks import check_choice, check_integer, check_number
from vgen.data.clips import Listed, count_frames
from vgen.data.inspection import first_reasons, list_originals
from vgen.data.prepare import MIN_FILES, SUMMARY
from vgen.data.video_io import VideoInfo, iter_video, resampled_length
from vgen.hub import locate
from vgen.io.atomic import write_text
from vgen.io.records import read_json
from vgen.io.settings import parse_settings
from vgen.machine import fast_precision, processor
from vgen.models.image_vae import vae_config
from vgen.models.transformer import SpacetimeTransformer
from vgen.models.unet import UNet3D
from vgen.pipeline import VideoGenPipeline
from vgen.temporal.grid import LatentGrid
from vgen.training.needs import COPIES_OF_TRAINED, ClipShape, Step, denoiser_step, vae_step
from vgen.training.throughput import BACKWARD

Preset = Literal["laptop", "gpu-8gb", "gpu-24gb", "gpu-80gb", "gpu-8x80gb"]
Stage = Literal["data", "vae", "latents", "text", "denoiser", "evaluation", "report"]
TrainOnly = Literal["all", "temporal", "lora"]
STAGES: tuple[Stage, ...] = get_args(Stage)
FORMAT = "vgen-train-1"
LEAST_STEPS = 20
"""Fewest optimizer steps of a stage for which a time limit leaves room."""
EVALUATIONS = 20
"""Evaluations during the training of a network."""
MOST_HELD_OUT = 500
"""Most held-out clips that are encoded."""
ENCODING_SHARE = 0.1
"""Fraction of the time in which clips are encoded."""
EVALUATED, NUM_SAMPLES = 24, 8
"""Clips of an evaluation, and predictions of each on held-out videos."""
MOST_REPEATS = 32
"""Most augmented copies of a clip that are encoded."""
FINE_TUNING_RATE = {"all": 2e-4, "temporal": 5e-4, "lora": 1e-3}
"""Learning rates of fine-tuning, with AdamW."""
DIRECTIONS = {
    "left",
    "right",
    "clockwise",
    "counterclockwise",
    "anticlockwise",
    "forward",
    "forwards",
    "backward",
    "backwards",
}
"""Words in captions that flipped or reversed clips would contradict."""
SMALL = 1000
"""Number of clips, end to end, below which training stops early."""
CHECKPOINTS = 12
"""Bytes of checkpoints and results relative to those of the weights in float32."""
MARGIN = 1.5
"""Size of the copies of videos relative to the training clips, which leaves room for random crops."""
_GIB = 2**30
_DECODED = 200.0
"""Frames that are decoded per second, where it was not measured."""
_DECODED_FRAMES = 12
_OVERHEAD = 45.0
"""Seconds that a script takes to start and to save its result."""


@dataclass(kw_only=True)
class TrainOptions:
    """What `vgen train` is asked for."""

    data: str
    """A folder of videos or another source of `vgen.data.sources.open_clips`."""
    output: Path
    """Folder of the run."""
    preset: Preset | None = None
    """Sizes and settings of all stages; by default those for this machine."""
    minutes: float | None = None
    """Time limit of the whole run."""
    held_out: str | None = None
    """Source of the held-out videos; by default a tenth of the videos of `data`."""
    vae: str | None = None
    """Pretrained VAE, instead of training one: a packaged checkpoint, a folder, or a Hub id."""
    text_encoder: str | None = None
    """Pretrained text encoder, instead of a small one for the captions that exist."""
    init: str | None = None
    """Pipeline to fine-tune, with its VAE and text encoder."""
    train_only: TrainOnly = "all"
    """Weights to fine-tune: `all`, `temporal` layers, or `lora` adapters."""
    changes: list[str] = field(default_factory=list)
    """Settings to override, as STAGE.NAME=VALUE in YAML; STAGE may also be `clip`."""

    def check(self) -> None:
        """Checks the options.

        Raises:
            ValueError: An option is out of range, or two of them exclude each other.
        """
        if self.preset is not None:
            check_choice("preset", self.preset, Preset)
        check_choice("train_only", self.train_only, TrainOnly)
        if self.minutes is not None:
            check_number("minutes", self.minutes, above=0)
        if self.init is None and self.train_only != "all":
            raise ValueError(f"--train-only {self.train_only} needs a model to fine-tune: pass --from MODEL")
        if self.init is not None and (self.vae or self.text_encoder):
            raise ValueError(
                "--from keeps the VAE and the text encoder of its model: leave out --vae and --text-encoder"
            )
        if self.train_only == "lora" and find_spec("peft") is None:
            raise ImportError("--train-only lora needs peft: pip install vgen[lora]")
        for source in filter(None, (self.data, self.held_out)):
            if self.output.resolve().is_relative_to(Path(source).resolve()):
                raise ValueError(
                    f"the run {self.output} would be inside of {source}: pass --output, a folder elsewhere"
                )
        for text in self.changes:
            parse_change(text)


def parse_change(text: str) -> tuple[str, str, Any]:
    """Splits STAGE.NAME=VALUE.

    Raises:
        ValueError: It has another form, or there is no such stage.
    """
    name, equals, value = text.partition("=")
    stage, dot, setting = name.partition(".")
    if not (equals and dot and setting):
        raise ValueError(f"--set must be STAGE.NAME=VALUE, such as vae.max_steps=2000, got {text!r}")
    check_choice("the stage of --set", stage, ("clip", *STAGES[:-1]))
    try:
        return stage, setting, yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ValueError(f"--set {name}: {value!r} is not YAML") from error


@dataclass(frozen=True)
class Machine:
    """What a plan needs to know of a machine."""

    device: str
    """Type of the device that trains."""
    count: int
    """Number of such devices; 1 for CPUs."""
    memory: float
    """Bytes of memory of one device."""
    disk: float
    """Free bytes where the run is written."""
    precision: str
    """The faster precision: `no` (float32) or `bf16`."""
    name: str

    @classmethod
    def here(cls, folder: Path) -> Machine:
        """This machine, with the disk of a folder."""
        existing = next(one for one in (folder.absolute(), *folder.absolute().parents) if one.exists())
        disk = shutil.disk_usage(existing).free
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        if accelerator is None or accelerator.type != "cuda":
            device = torch.device("cpu")
            cpu = processor()
            name = f"{cpu['name']}, {cpu['cores']} cores"
            return cls("cpu", 1, psutil.virtual_memory().available, disk, fast_precision(device), name)
        device = torch.device("cuda", 0)
        count = torch.cuda.device_count()
        memory = torch.cuda.mem_get_info(device)[1]
        return cls("cuda", count, memory, disk, fast_precision(device), f"{count} x {torch.cuda.get_device_name(0)}")


def scripts_folder() -> Path:
    """The folder with `train/` and `pipelines/`: the checkout, or the copy in the installed package."""
    package = Path(vgen.__file__).parent
    return package.parent if (package.parent / "train" / "train_vdm.py").is_file() else package / "scripts"


def read_preset(name: Preset) -> dict[str, Any]:
    """The settings of a preset: `device`, `processes`, `minutes`, `vae_share`, `target_clips`, and those of stages."""
    path = scripts_folder() / "train" / "presets" / f"{name}.yaml"
    return {"processes": 1} | yaml.safe_load(path.read_text(encoding="utf-8"))


def choose_preset(machine: Machine) -> Preset:
    """The largest preset for a machine."""
    if machine.device != "cuda":
        return "laptop"
    gib = machine.memory / _GIB
    if gib >= 70:
        return "gpu-8x80gb" if machine.count >= 8 else "gpu-80gb"
    return "gpu-24gb" if gib >= 20 else "gpu-8gb"


@dataclass(frozen=True)
class Command:
    """A call of a public script."""

    script: str
    """Path of the script in the repository."""
    settings: dict[str, Any]
    processes: int = 1

    def words(self) -> list[str]:
        """The command as words, as they are typed in a checkout."""
        launch = ["python"] if self.processes == 1 else ["accelerate", "launch", *self._launch]
        words = [*launch, str(_shown(scripts_folder() / self.script))]
        for name, value in self.settings.items():
            words += [f"--{name}", _word(value)]
        return words

    @property
    def _launch(self) -> list[str]:
        return [f"--num_processes={self.processes}", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"]

    def run(self) -> bool:
        """Runs the script in a process of its own, to which Ctrl-C and SIGTERM are left.

        Returns:
            Whether it ended by itself.

        Raises:
            ValueError: It failed; its own message is on the terminal.
        """
        _, *rest = self.words()
        launcher = [] if self.processes == 1 else ["-m", "accelerate.commands.launch"]
        process = subprocess.Popen([sys.executable, *launcher, *rest[len(launcher) // 2 :]])
        asked: list[int] = []

        def forward(number: int, _: object) -> None:
            asked.append(number)
            if number == signal.SIGTERM:  # a terminal sends Ctrl-C to the script too
                process.terminate()

        handlers = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            code = process.wait()
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        if code and not asked:
            raise ValueError(f"{self.script} failed, see above; when the cause is mended, the same command goes on")
        return not asked


def _word(value: Any) -> str:
    """A setting as a word of a command."""
    return json.dumps(value) if isinstance(value, (dict, list, bool)) else str(value)


def _shown(path: Path) -> Path:
    """A path relative to the working folder where it is inside of it."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


@dataclass
class Plan:
    """The stages of a run, with their commands and what they need."""

    options: TrainOptions
    preset: str
    machine: Machine
    videos: Videos
    clip: ClipShape
    frame_rate: float
    """Frame rate of training clips in frames per second."""
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
    record: dict[str, Any]
    """What `plan.json` has about the stages that have begun."""

    @property
    def folder(self) -> Path:
        """The folder of the run."""
        return self.options.output

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
    def remaining(self) -> float:
        """Estimated seconds of the stages that are not finished."""
        return sum(self.seconds[stage] for stage in self.commands if not self.is_done(stage))


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
    content = {"format": FORMAT, "vgen": vgen.__version__, "preset": plan.preset, "options": _recorded(plan.options)}
    content |= {"per_step": plan.per_step, "stages": plan.record}
    write_text(plan.folder / "plan.json", json.dumps(content, indent=1))


def _recorded(options: TrainOptions) -> dict[str, Any]:
    """The options that a run keeps; its time limit may change."""
    values = {name: value for name, value in asdict(options).items() if name not in ("output", "minutes", "changes")}
    for name in ("data", "held_out"):
        if values[name] is not None and Path(values[name]).exists():
            values[name] = str(Path(values[name]).resolve())
    return json.loads(json.dumps(values, default=str))


@dataclass(frozen=True)
class Videos:
    """What the headers of a source's videos say."""

    seconds: list[float]
    """Length of each readable video."""
    frame_rates: list[float]
    """Frame rate of each readable video."""
    sizes: list[tuple[int, int]]
    """Height and width of each readable video in pixels."""
    captions: list[str]
    """All captions that are not empty."""
    num_captioned: int
    refused: dict[str, str]
    """Videos that cannot be read, with the reasons."""
    decoded_per_second: float
    """Frames of one of them that were decoded per second."""
    pictures: list[np.ndarray]
    """Frames of up to four of them."""
    is_stream: bool = False
    """Whether the videos are streamed, so that nothing else is known."""

    @property
    def num_frames(self) -> float:
        """Frames of all videos, at their own rates."""
        return sum(seconds * rate for seconds, rate in zip(self.seconds, self.frame_rates, strict=True))

    def num_clips(self, clip: ClipShape, frame_rate: float, hop: int) -> int:
        """Number of clips that begin `hop` frames apart."""
        frames = [resampled_length(seconds, frame_rate) for seconds in self.seconds]
        return sum((count - clip.num_frames) // hop + 1 for count in frames if count >= clip.num_frames)


def inspect_videos(data: str, num_frames: int, max_videos: int | None = None) -> Videos:
    """Reads the headers of a source's videos, and decodes frames of four of them.

    Raises:
        FileNotFoundError: There is no such source.
        ValueError: None of its videos can be read.
    """
    listed = list_originals(data, num_frames, max_videos)
    if not isinstance(listed, list):
        return Videos([], [], [], [], 0, {}, _DECODED, [], is_stream=True)
    found: list[tuple[Listed, VideoInfo]] = []
    refused: dict[str, str] = {}
    for one in listed:
        try:
            count_frames(one, info := one.info(), None)
        except (ValueError, OSError) as error:
            refused[str(one.path)] = str(error).removeprefix(f"{one.path}: ")
        else:
            found.append((one, info))
    if not found:
        raise ValueError(f"none of the videos of {data} can be used: {first_reasons(refused)}")
    pictures, begin, decoded = [], time.monotonic(), 0
    for one, info in found[:: -(-len(found) // 4)]:
        start = (one.start or 0.0) + _length(one, info) / 3
        frames = list(itertools.islice(iter_video(one.file(), start=start, end=one.end), _DECODED_FRAMES))
        pictures.append(frames[0])
        decoded += len(frames)
    return Videos(
        [_length(*one) for one in found],
        [info.frame_rate or 1.0 for _, info in found],
        [(info.height, info.width) for _, info in found],
        [text for one, _ in found for text in one.captions if text],
        sum(any(one.captions) for one, _ in found),
        refused,
        decoded / (time.monotonic() - begin),
        pictures,
    )


def _length(listed: Listed, info: VideoInfo) -> float:
    count, rate = count_frames(listed, info, None)
    return count / rate


def choose_rate(videos: Videos, wanted: float, num_frames: int) -> float:
    """The frame rate of training clips: the wanted one, but no higher than that of half of the videos.

    Where more than a fifth of the videos is too short for a clip at that rate, it is raised so that four fifths are
    long enough, as far as their own rates allow.
    """
    if videos.is_stream:
        return wanted
    own = sorted(videos.frame_rates)[len(videos.frame_rates) // 2]
    short = sorted(videos.seconds)[len(videos.seconds) // 5]
    return min(own, max(wanted, math.ceil(1000 * num_frames / short) / 1000))


@dataclass
class _Codec:
    """The VAE of a run: its arguments, its compression and its channels."""

    source: str | None
    """A pretrained one; `None` if the run trains it."""
    model: dict[str, Any]

    @property
    def time(self) -> int:
        return 2 ** sum(self.model.get("temperal_downsample", []))

    @property
    def space(self) -> int:
        return 2 ** (len(self.model["dim_mult"]) - 1) * (self.model.get("patch_size") or 1)

    @property
    def channels(self) -> int:
        return self.model["z_dim"]


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
        changes.setdefault(stage, {})[setting] = value
    pipe = read_pipeline(options.init) if options.init else None
    codec = choose_codec(options, preset, changes)
    shape = choose_shape(preset, pipe, changes.get("clip", {}), codec, record)
    clip = ClipShape(height=shape["height"], width=shape["width"], num_frames=shape["num_frames"])
    is_copied = record.get("data", {}).get("done", False)
    source = str(options.output / "data" / "train") if is_copied else options.data
    videos = inspect_videos(source, clip.num_frames, changes.get("data", {}).get("max_videos"))
    rate = shape["frame_rate"] if "data" in record else choose_rate(videos, shape["frame_rate"], clip.num_frames)
    check_videos(videos, clip, rate, is_split=is_copied or options.held_out is not None)
    if options.held_out is not None:
        list_originals(options.held_out, clip.num_frames)  # raises if there is no such source
    if is_copied:
        check_captions(options.output / "data", videos)
    if pipe is not None:
        check_fine_tuning(options, pipe, videos)
    measured = measured or stored.get("per_step")
    plan = _Planner(options, name, preset, machine, changes, codec, pipe, clip, rate, videos, record, measured).plan()
    for stage, commands in plan.commands.items():
        for command in commands:
            check_command(stage, command)
    return plan


def choose_shape(
    preset: Mapping[str, Any],
    pipe: Mapping[str, Any] | None,
    changes: Mapping[str, Any],
    codec: _Codec,
    record: Mapping[str, Any],
) -> dict[str, Any]:
    """`height`, `width`, `num_frames` and `frame_rate` of training clips; those of a run that has begun are kept.

    Raises:
        ValueError: A change has an unknown name, is not a positive number, or comes too late.
    """
    shape = dict(preset["clip"]) | (clip_of(pipe) if pipe else {})
    for name, value in changes.items():
        check_choice("the setting of --set clip", name, tuple(shape))
        if name == "frame_rate":
            check_number("--set clip.frame_rate", value, above=0)
        else:
            check_integer(f"--set clip.{name}", value, 5 if name == "num_frames" else 1)
    shape |= changes
    shape["num_frames"] = LatentGrid(codec.time).nearest(shape["num_frames"])
    if "data" in record:
        begun = {name: record["data"]["commands"][0]["settings"][name] for name in shape}
        late = [name for name in changes if begun[name] != shape[name]]
        if late:
            raise ValueError(
                f"the run was begun with {late[0]}={begun[late[0]]}: choose another --output to change it"
            )
        return begun
    return shape


class _Planner:
    """Builds a plan; see `make_plan`."""

    def __init__(
        self,
        options: TrainOptions,
        name: str,
        preset: dict[str, Any],
        machine: Machine,
        changes: dict[str, dict[str, Any]],
        codec: _Codec,
        pipe: dict[str, Any] | None,
        clip: ClipShape,
        rate: float,
        videos: Videos,
        record: dict[str, Any],
        measured: dict[str, float] | None = None,
    ):
        self.options, self.name, self.preset, self.machine, self.changes = options, name, preset, machine, changes
        self.codec, self.pipe, self.clip, self.rate, self.videos, self.record = codec, pipe, clip, rate, videos, record
        self.measured, self.folder = measured, options.output
        self.device = torch.device(machine.device)
        self.captioned = videos.num_captioned > 0 or videos.is_stream

    def plan(self) -> Plan:
        """The plan, after its memory and its time have been checked.

        Raises:
            ValueError: The memory or the time is not enough.
        """
        steps = {"vae": self.vae_step(), "denoiser": self.denoiser_step()}
        needs = {stage: self.needs_of(stage, step) for stage, step in steps.items() if self.is_trained(stage)}
        memory = {stage: one["memory"] for stage, one in needs.items()}
        check_memory(self.name, memory, self.machine)
        self.per_step = self.measured or {
            stage: step.seconds(self.device, self.precision(stage)) * self.parts(stage)
            for stage, step in steps.items()
        }
        needed = self.disk({stage: one["weights"] for stage, one in needs.items()})
        if needed > self.machine.disk:
            raise ValueError(
                f"the run needs about {needed / _GIB:.1f} GiB on disk, and {self.machine.disk / _GIB:.1f} are free at "
                f"{self.folder}: choose another --output"
            )
        seconds = self.other_seconds()
        for stage, entry in self.record.items():
            seconds[stage] = 0.0 if entry.get("done") else max(entry["planned"] - entry["seconds"], 0.0)
        counts = self.share_time(self.limit - self.spent - sum(seconds.values()))
        for stage, count in counts.items():
            seconds[stage] = self.training_seconds(stage, count)
        commands = self.commands(counts)
        for stage, entry in self.record.items():  # what has begun keeps its settings, except those of --set
            begun = [Command(**one) for one in entry["commands"]]
            changes = {} if entry.get("done") else self.changes_of(stage)
            commands[stage] = [replace(one, settings=_plain(one.settings | changes)) for one in begun]
        return Plan(
            self.options, self.name, self.machine, self.videos, self.clip, self.rate, commands, seconds, memory,
            self.per_step, needed, self.record,
        )  # fmt: skip

    def is_trained(self, stage: str) -> bool:
        """Whether the run trains this network."""
        return stage == "denoiser" or self.codec.source is None

    @property
    def limit(self) -> float:
        """Seconds that the whole run may take."""
        return 60.0 * (self.options.minutes or self.preset["minutes"])

    @property
    def spent(self) -> float:
        """Seconds that the run has taken so far."""
        return sum(entry["seconds"] for entry in self.record.values())

    def share_time(self, available: float) -> dict[str, int]:
        """Numbers of optimizer steps of the stages that have not begun.

        Raises:
            ValueError: A new run does not have the time for a few.
        """
        shares = {"vae": self.preset["vae_share"], "denoiser": 1 - self.preset["vae_share"]}
        shares = {
            stage: share for stage, share in shares.items() if self.is_trained(stage) and stage not in self.record
        }
        counts: dict[str, int] = {}
        for stage in shares:
            if (count := self.changes.get(stage, {}).get("max_steps")) is not None:
                check_integer(f"--set {stage}.max_steps", count, 1)
                counts[stage] = count
                available -= self.training_seconds(stage, count)
        shares = {stage: share for stage, share in shares.items() if stage not in counts}
        missing = 0.0
        for stage, share in shares.items():
            part = share / sum(shares.values())
            steps = int((available * part - self.training_seconds(stage, 0)) / self.per_step[stage])
            missing = max(missing, (LEAST_STEPS - steps) * self.per_step[stage] / part)
            counts[stage] = min(self.preset[stage]["max_steps"], max(LEAST_STEPS, steps))
        if missing and not self.record:
            needed = self.limit + missing / (1 - ENCODING_SHARE)  # a part of more time goes to the latents
            raise ValueError(
                f"{self.limit / 60:g} minutes are not enough on this machine: pass --minutes "
                f"{math.ceil(needed / 60) + 1} or more"
            )
        return counts

    def training_seconds(self, stage: str, steps: int) -> float:
        """Estimated time of a stage that trains, with `EVALUATIONS` evaluations on the way."""
        batch = self.wanted(stage, "batch_size")
        passes = EVALUATED / batch  # of the VAE
        if stage == "denoiser":  # losses on two sets of clips, and sample videos
            passes = (2 * EVALUATED + 4 * self.num_inference_steps) / batch
        return _OVERHEAD + self.per_step[stage] * (steps + EVALUATIONS * passes / (1 + BACKWARD))

    @property
    def num_inference_steps(self) -> int:
        """Denoising steps of a video."""
        own = (self.pipe or {}).get("num_inference_steps")
        return own or self.wanted("denoiser", "num_inference_steps")

    @property
    def encoding(self) -> float:
        """Seconds in which the VAE encodes or decodes a clip."""
        frames = self.clip.num_frames / min(self.wanted("vae", "num_frames") or math.inf, self.clip.num_frames)
        return frames * self.per_step["vae"] / self.wanted("vae", "batch_size") / (1 + BACKWARD) / 2

    def wanted(self, stage: str, name: str) -> Any:
        """A setting of a stage: that of `--set`, or else of the preset."""
        return self.changes.get(stage, {}).get(name, self.preset[stage].get(name))

    def changes_of(self, stage: str) -> dict[str, Any]:
        """The settings of `--set` for the commands of a stage; the denoiser's `model` is completed elsewhere."""
        changes = self.changes.get(stage, {})
        return {name: value for name, value in changes.items() if (stage, name) != ("denoiser", "model")}

    def precision(self, stage: str) -> str:
        """The precision of a stage's forward pass."""
        wanted = self.wanted(stage, "mixed_precision") or "auto"
        return self.machine.precision if wanted == "auto" else wanted

    def parts(self, stage: str) -> int:
        """Forward passes per optimizer step of each process."""
        return self.wanted(stage, "gradient_accumulation_steps") or 1

    def part_size(self, stage: str) -> int:
        """Clips per forward pass."""
        return max(1, self.wanted(stage, "batch_size") // (self.parts(stage) * self.preset["processes"]))

    def vae_step(self) -> Step:
        """A step of the VAE."""
        checkpointing = bool(self.wanted("vae", "gradient_checkpointing"))
        names = ("height", "width", "num_frames")
        whole = {name: getattr(self.clip, name) for name in names}
        clip = ClipShape(**{name: min(self.wanted("vae", name) or size, size) for name, size in whole.items()})
        return vae_step(self.codec.model, clip, self.part_size("vae"), checkpointing)

    def denoiser_step(self) -> Step:
        """A step of the denoiser."""
        kind = "transformer" if self.pipe is None else self.pipe["denoiser"]
        kind = kind if self.pipe is not None else self.wanted("denoiser", "denoiser") or kind
        text = (self.text_length, self.text_dim)
        compression = (self.codec.time, self.codec.space)
        checkpointing = bool(self.wanted("denoiser", "gradient_checkpointing"))
        size = self.part_size("denoiser")
        return denoiser_step(kind, self.denoiser_model, self.clip, compression, size, text, checkpointing)

    @property
    def denoiser_model(self) -> dict[str, Any]:
        """Arguments of the denoiser."""
        if self.pipe is not None:
            return self.pipe["model"]
        channels = {"in_channels": self.codec.channels, "out_channels": self.codec.channels}
        changes = self.changes.get("denoiser", {})
        own = {} if "denoiser" in changes else self.preset["denoiser"]["model"]
        return channels | {"keyframe_slots": self.codec.time} | own | changes.get("model", {})

    @property
    def text_length(self) -> int:
        """Tokens per prompt."""
        if self.pipe is not None:
            return self.pipe["max_sequence_length"]
        return self.wanted("denoiser", "max_sequence_length") or 32

    @property
    def text_dim(self) -> int:
        """Channels of the prompts' embeddings."""
        if self.pipe is not None:
            return self.denoiser_model.get("text_dim") or self.denoiser_model["cross_attention_dim"]
        return text_dim_of(self.options.text_encoder) if self.options.text_encoder else self.preset["text"]["dim"]

    def needs_of(self, stage: str, step: Step) -> dict[str, float]:
        """Bytes of memory and of weights of a step."""
        needs = step.needs(self.precision(stage))
        if stage == "denoiser" and self.options.train_only == "lora":  # no gradients and moments of the weights
            needs["memory"] -= COPIES_OF_TRAINED * needs["weights"]
        return needs

    @property
    def hop_and_repeats(self) -> tuple[int, int]:
        """Frames between encoded clips, and copies of each with another augmentation, for `target_clips` in all."""
        most = self.videos.num_clips(self.clip, self.rate, 1)
        if self.videos.is_stream or not most:
            return self.clip.num_frames, 1
        wanted = max(1, min(self.preset["target_clips"], round(ENCODING_SHARE * self.limit / (2 * self.encoding))))
        return max(1, most // wanted), max(1, min(MOST_REPEATS, wanted // most))

    @property
    def augment(self) -> dict[str, float]:
        """The augmentation of training clips: no flips and no reversal if captions tell directions."""
        words = {word for caption in self.videos.captions for word in re.findall(r"\w+", caption.lower())}
        excluded = {"flip", "reverse"} if words & DIRECTIONS else set()
        return {name: value for name, value in self.preset["augment"].items() if name not in excluded}

    @property
    def encoded(self) -> int:
        """Number of training clips that are encoded."""
        hop, repeats = self.hop_and_repeats
        return self.videos.num_clips(self.clip, self.rate, hop) * repeats

    def other_seconds(self) -> dict[str, float]:
        """Estimated time of the stages that do not train a large network."""
        denoising = self.per_step["denoiser"] / self.wanted("denoiser", "batch_size") / (1 + BACKWARD)
        denoising *= self.num_inference_steps
        video = denoising + 2 * self.encoding
        return {
            "data": _OVERHEAD + self.videos.num_frames / self.videos.decoded_per_second,
            "latents": 2 * _OVERHEAD + 2 * self.encoding * self.encoded,  # frames are encoded alone too
            **({"text": 2 * _OVERHEAD} if self.trains_text else {}),
            "evaluation": 2 * _OVERHEAD + EVALUATED * (NUM_SAMPLES + 3) * video,
            "report": _OVERHEAD + 8 * video,
        }

    @property
    def trains_text(self) -> bool:
        """Whether the run trains a text encoder of its own."""
        return self.captioned and self.pipe is None and self.options.text_encoder is None

    def disk(self, weights: dict[str, float]) -> float:
        """Estimated bytes that the run will write: copies of the videos, latents and checkpoints."""
        pixels = self.clip.height * self.clip.width * MARGIN**2
        latents: float = self.codec.channels * self.clip.num_frames * self.clip.height * self.clip.width
        latents *= 2 * (1 + 1 / self.codec.time) / self.codec.space**2
        needed = {"data": 0.25 * pixels * self.videos.num_frames, "latents": (self.encoded + MOST_HELD_OUT) * latents}
        needed |= {stage: CHECKPOINTS * weights[stage] for stage in weights}
        return sum(size for stage, size in needed.items() if stage not in self.record)

    def commands(self, counts: Mapping[str, int]) -> dict[str, list[Command]]:
        """The commands of all stages, with the numbers of optimizer steps of those that train."""
        size = {"height": self.clip.height, "width": self.clip.width}
        shape = size | {"num_frames": self.clip.num_frames}
        train, held_out = self.folder / "data" / "train", self.folder / "data" / "held_out"
        vae = self.options.vae or self.options.init or str(self.folder / "vae" / "vae")
        rates = {"frame_rates": [self.rate]}
        hop, repeats = self.hop_and_repeats
        found: dict[str, list[tuple[str, dict[str, Any]]]] = {}
        found["data"] = [(
            "pipelines/prepare_videos.py",
            {"data": self.options.data, "output_dir": self.folder / "data", "held_out": self.options.held_out}
            | shape | {"frame_rate": self.rate},
        )]  # fmt: skip
        if self.codec.source is None:
            found["vae"] = [(
                "train/train_vae.py",
                {"data": train, "score_data": held_out, "output_dir": self.folder / "vae"} | rates
                | {name: min(self.wanted("vae", name) or value, value) for name, value in shape.items()}
                | self.schedule("vae", counts) | {"num_calibration_clips": 256}
                | {"augment": self.augment},
            )]  # fmt: skip
        encode: dict[str, Any] = {"vae": vae} | shape | rates | {"keyframes": True}
        if self.captioned and not self.trains_text:
            encode |= {"text_encoder": self.options.text_encoder or self.options.init}
            encode |= {"max_sequence_length": self.text_length}
        latents = self.folder / "latents"
        found["latents"] = [
            (
                "pipelines/encode_latents.py",
                encode | {"data": train, "output_dir": latents / "train", "hop": hop, "repeats": repeats}
                | ({"augment": self.augment} if repeats > 1 else {}),
            ),
            (
                "pipelines/encode_latents.py",
                encode | {"data": held_out, "output_dir": latents / "held_out", "hop": self.evaluation_hop}
                | {"num_clips": MOST_HELD_OUT},
            ),
        ]  # fmt: skip
        if self.trains_text:
            text = {"data": train, "output_dir": self.folder / "text", "max_sequence_length": self.text_length}
            found["text"] = [("train/train_text_encoder.py", text)]
        found["denoiser"] = [("train/train_vdm.py", self.denoiser_settings(vae, latents, counts))]
        found["evaluation"] = [
            ("pipelines/evaluate.py", self.evaluation_settings(held_out, "held_out", NUM_SAMPLES)),
            ("pipelines/evaluate.py", self.evaluation_settings(train, "train", 1)),
        ]
        commands: dict[str, list[Command]] = {}
        for stage, calls in found.items():
            rest = {} if stage in ("data", "evaluation") else self.preset.get(stage, {})
            rest = self.fine_tuning(rest) if stage == "denoiser" and self.pipe else rest
            processes = self.preset["processes"] if stage not in ("data", "text") else 1
            commands[stage] = [
                Command(script, _plain(_merged(rest, settings, self.changes_of(stage))), processes)
                for script, settings in calls
            ]
        return commands | {"report": []}

    @property
    def is_small(self) -> bool:
        """Whether there are so few clips that a network learns them by heart."""
        return not self.videos.is_stream and self.videos.num_clips(self.clip, self.rate, self.clip.num_frames) < SMALL

    def schedule(self, stage: str, counts: Mapping[str, int]) -> dict[str, Any]:
        """Settings that follow from the number of optimizer steps."""
        steps = counts.get(stage, LEAST_STEPS)
        every = max(1, steps // EVALUATIONS)
        return {
            "max_steps": steps,
            "warmup_steps": min(100, max(1, steps // 20)),
            "num_score_clips": EVALUATED,
            "sample_every": every,
            "save_every": every,
            "log_every": min(10, every),
            "patience": 6 if self.is_small else 0,
        }

    def denoiser_settings(self, vae: str, latents: Path, counts: Mapping[str, int]) -> dict[str, Any]:
        """Settings of the denoiser's training that depend on the run."""
        settings: dict[str, Any] = {"init": self.options.init} if self.options.init else {"vae": vae}
        if self.pipe is None:
            steps = self.wanted("denoiser", "num_inference_steps")
            size = {"height": self.clip.height, "width": self.clip.width, "num_frames": self.clip.num_frames}
            settings |= {"model": self.denoiser_model, "frame_rate": self.rate}
            settings |= {"defaults": size | {"num_inference_steps": steps}}
            if self.captioned:
                settings["text_encoder"] = self.options.text_encoder or str(self.folder / "text")
                settings["train_text_encoder"] = self.trains_text
        else:
            settings["train_only"] = self.options.train_only
            if self.options.train_only == "lora":
                settings["ema_decay"] = 0.0
        return (
            settings
            | {"latents_dir": latents / "train", "held_out_latents": latents / "held_out"}
            | {"output_dir": self.folder / "denoiser"}
            | self.schedule("denoiser", counts)
        )

    def fine_tuning(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """The settings of a preset that apply to a model that is fine-tuned, limited to what its network supports."""
        model, excluded = self.denoiser_model, ("denoiser", "model", "level_shift", "optimizer", "weight_decay")
        kept = {name: value for name, value in settings.items() if name not in excluded}
        modes = model.get("group_modes", ["full"])
        kept["groups"] = {mode: weight for mode, weight in kept["groups"].items() if mode in modes}
        if not model.get("keyframe_slots"):
            kept["known"] = {kind: weight for kind, weight in kept["known"].items() if kind != "keyframes"}
        return kept | {"learning_rate": FINE_TUNING_RATE[self.options.train_only]}

    @property
    def evaluation_hop(self) -> int:
        """Frames between the starts of held-out clips."""
        return 1 if self.is_small else self.clip.num_frames

    @property
    def evaluated_tasks(self) -> list[str]:
        """The tasks of the evaluation that the model can do; an adapter adds none."""
        tasks = {"leading", "keyframes"} if self.pipe is None else set(self.denoiser_model.get("tasks", ["text"]))
        if self.pipe is not None and self.options.train_only != "lora":
            tasks |= {"leading"} | ({"keyframes"} if self.denoiser_model.get("keyframe_slots") else set())
        found = ["reconstruction"]
        found += ["prediction"] if "leading" in tasks else []
        return found + (["interpolation"] if {"leading", "keyframes"} <= tasks else [])

    def evaluation_settings(self, data: Path, name: str, num_samples: int) -> dict[str, Any]:
        """Settings of an evaluation."""
        lora = self.options.train_only == "lora"
        settings: dict[str, Any] = {"model": self.options.init if lora else self.folder / "denoiser" / "pipeline"}
        if lora:
            settings["lora"] = [str(self.folder / "denoiser" / "lora")]
        return settings | {
            "suite": "folder", "data": data, "output_dir": self.folder / "evaluation" / name,
            "tasks": self.evaluated_tasks, "num_clips": EVALUATED,
            "height": self.clip.height, "width": self.clip.width, "num_frames": self.clip.num_frames,
            "frame_rate": self.rate, "given": LatentGrid(self.codec.time).nearest(self.clip.num_frames // 2 + 1),
            "factor": min(4, self.clip.num_frames - 1), "num_samples": num_samples, "hop": self.evaluation_hop,
        }  # fmt: skip


def _merged(*parts: Mapping[str, Any]) -> dict[str, Any]:
    merged = {name: value for part in parts for name, value in part.items()}
    if merged.get("optimizer", "adamw") != "muon":
        merged.pop("muon_kernels", None)
    return merged


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of a script as JSON values, without those that are only for the plan."""
    return {
        name: str(value) if isinstance(value, Path) else value
        for name, value in settings.items()
        if name != "num_inference_steps" and value is not None
    }


def text_dim_of(source: str) -> int:
    """Channels of the embeddings of a text encoder, from its config."""
    return int(AutoConfig.from_pretrained(locate(source), subfolder="text_encoder").hidden_size)


def choose_codec(options: TrainOptions, preset: Mapping[str, Any], changes: Mapping[str, Any]) -> _Codec:
    """The VAE of a run: a pretrained one by its config, or the preset's."""
    source = options.vae or options.init
    if source is None:
        return _Codec(None, changes.get("vae", {}).get("model", preset["vae"]["model"]))
    config = vae_config(source)
    if "temperal_downsample" not in config:
        raise ValueError(
            f"{source} has an {config['_class_name']}, which vgen train does not support: it needs a CausalVideoVAE "
            "or an AutoencoderKLWan"
        )
    return _Codec(source, {name: value for name, value in config.items() if not name.startswith("_")})


def read_pipeline(source: str) -> dict[str, Any]:
    """Defaults of a pipeline, and the kind (`denoiser`) and arguments (`model`) of its denoiser, from its configs."""
    place = locate(source)
    index = VideoGenPipeline.load_config(place)
    kind = "unet" if index.get("unet", [None])[0] else "transformer"
    network = UNet3D if kind == "unet" else SpacetimeTransformer
    model = {name: value for name, value in network.load_config(place, subfolder=kind).items() if name[0] != "_"}
    defaults = {name: value for name, value in index.items() if not name.startswith("_")}
    return {"max_sequence_length": 512, **defaults, "denoiser": kind, "model": model}


def clip_of(pipe: Mapping[str, Any]) -> dict[str, Any]:
    """The clips that a pipeline makes by default."""
    return {name: pipe[name] for name in ("height", "width", "num_frames", "frame_rate") if pipe.get(name)}


def check_machine(name: str, preset: Mapping[str, Any], machine: Machine) -> None:
    """Checks that a machine has the devices of a preset.

    Raises:
        ValueError: It has not.
    """
    if preset["device"] != "cpu" and machine.device == "cpu":
        raise ValueError(f"--preset {name} needs a GPU, and PyTorch finds none here: leave it out, or take laptop")
    if preset["processes"] > machine.count:
        raise ValueError(f"--preset {name} needs {preset['processes']} GPUs, and this machine has {machine.count}")


def check_memory(name: str, memory: Mapping[str, float], machine: Machine) -> None:
    """Checks that the stages of a preset fit into the memory.

    Raises:
        ValueError: One does not.
    """
    for stage, needed in memory.items():
        if needed > machine.memory:
            raise ValueError(
                f"preset {name}: the {stage} needs about {needed / _GIB:.1f} GiB of memory, and {machine.name} has "
                f"{machine.memory / _GIB:.1f}: choose a smaller preset, or halve {stage}.batch_size with --set"
            )


def check_videos(videos: Videos, clip: ClipShape, rate: float, *, is_split: bool) -> None:
    """Checks that there are enough videos to train on some and to hold some out.

    Args:
        videos: The videos.
        clip: Shape of the clips.
        rate: Frame rate of the clips.
        is_split: Whether others are held out, so that these are only trained on.

    Raises:
        ValueError: There are not; the error says what is missing.
    """
    if videos.is_stream:
        return
    lengths = [resampled_length(seconds, rate) for seconds in videos.seconds]
    enough = max(lengths) >= clip.num_frames
    if not is_split:
        several = sum(length >= clip.num_frames for length in lengths)
        enough = several >= MIN_FILES or max(lengths) >= 2 * clip.num_frames
    if not enough:
        raise ValueError(
            f"too little video: {len(lengths)} videos with {sum(lengths)} frames at {rate:g} per second, at most "
            f"{max(lengths)} in one. A clip has {clip.num_frames}, and one of {MIN_FILES} videos or the end of a "
            "longer one is held out. Add videos, or take shorter clips: --set clip.num_frames=N"
        )


def check_captions(folder: Path, videos: Videos) -> None:
    """Checks that there are captions to train on, if held-out videos have some.

    Raises:
        ValueError: There are none.
    """
    if not videos.num_captioned and read_json(folder / SUMMARY)["held_out"]["captioned"]:
        raise ValueError(
            "only held-out videos have captions, so prompts cannot be learned: give captions to more videos, or to "
            "none, and choose another --output"
        )


def check_fine_tuning(options: TrainOptions, pipe: Mapping[str, Any], videos: Videos) -> None:
    """Checks that a model can be fine-tuned on these videos.

    Raises:
        ValueError: It cannot.
    """
    if videos.num_captioned and not pipe.get("text_encoder", [None])[0]:
        raise ValueError(f"{options.init} has no text encoder, but videos have captions: pass videos without captions")
    divided = pipe["denoiser"] == "unet" or pipe["model"].get("attention") == "divided"
    if options.train_only == "temporal" and not divided:
        raise ValueError(
            f"{options.init} attends to space and time jointly, so it has no temporal layers: pass --train-only lora"
        )


@cache
def _settings_of(script: str) -> type:
    """The class of a script's settings."""
    name = f"_script_{Path(script).stem}"
    spec = spec_from_file_location(name, scripts_folder() / script)
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = module_from_spec(spec)  # where annotations are looked up
    spec.loader.exec_module(module)
    return get_type_hints(module.main)["config"]


def check_command(stage: str, command: Command) -> None:
    """Checks that the settings of a command are those of its script.

    Raises:
        ValueError: They are not; the error names one.
    """
    config_class = _settings_of(command.script)
    errors = io.StringIO()
    words = [f"--{name}={_word(value)}" for name, value in command.settings.items()]
    try:
        with redirect_stderr(errors):
            config: Any = parse_settings(config_class, None, words)
    except SystemExit:
        message = errors.getvalue().strip().partition(": ")[2]
        raise ValueError(f"the stage {stage} ({command.script}): {message}") from None
    if hasattr(config, "check"):
        config.check()
