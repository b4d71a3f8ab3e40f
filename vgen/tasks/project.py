"""Runs the plan of `vgen train`, stage by stage, and reports the result."""

from __future__ import annotations

import itertools
import operator
import shlex
import time
from base64 import b64encode
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from rich.console import Console

from vgen.data.prepare import MIN_FILES, SUMMARY, describe
from vgen.data.video_writer import write_video
from vgen.io.atomic import write_text
from vgen.io.pixels import to_frames
from vgen.io.preview import print_images
from vgen.io.records import read_json
from vgen.machine import GIB
from vgen.metrics.suites import SuiteConfig, open_suite
from vgen.processes import locked_output_dir
from vgen.tasks.loading import LoadOptions, load_checkpoint
from vgen.tasks.planning import Plan, logged_seconds, make_plan, save_record
from vgen.tasks.train_options import TrainOptions
from vgen.tasks.train_report import draw_samples, judge, render
from vgen.tasks.train_stages import ONE_STEP
from vgen.tasks.train_videos import LIMIT

_NAMED = 10  # videos in a table
EXAMPLES = {1: "held_out.mp4", 2: "held_out_every_2nd_frame.mp4"}
"""Held-out clips for the next commands, at the frame rate of training, and with every second frame."""
Show = Callable[[list[Any], str], None]


def train(options: TrainOptions, only: Sequence[str], *, dry_run: bool, show: Show) -> bool:
    """Inspects the videos and the machine, shows the plan and carries it out.

    Args:
        options: What to make from which videos.
        only: Stages to run; by default all.
        dry_run: Whether to print the commands instead.
        show: Prints rows of a table with a title.

    Returns:
        Whether these stages are finished; if not, the same command goes on.

    Raises:
        ValueError: The options, the videos or the machine do not allow the run, or a stage failed.
        OSError: The folder of the run cannot be written.
    """
    plan = make_plan(options)
    show(describe_videos(plan), "videos")
    if plan.videos.pictures:
        print_images(plan.videos.pictures, Console())
    machine = plan.machine
    show(
        [
            ("machine", machine.name),
            ("memory", f"{machine.memory / GIB:.1f} GiB free"),
            ("precision", {"no": "float32"}.get(machine.precision, machine.precision)),
            ("preset", plan.preset_name),
        ],
        "machine",
    )
    show(plan_rows(plan), f"plan: {options.output}")
    for line in warnings_of(plan):
        print(line, flush=True)
    if dry_run:
        for stage, commands in plan.commands.items():
            print(f"\n# {stage}: {MEANINGS[stage]}")
            for command in commands:
                print(shlex.join(command.words()))
        return True
    if not run_plan(plan, only):
        return False
    if not only or "report" in only:
        print(f"wrote {options.output / 'report.html'}; next:")
        print("\n".join(next_commands(plan)))
    return True


def say(line: str) -> None:
    """Prints a line before what the scripts print."""
    print(line, flush=True)


def run_plan(plan: Plan, only: Sequence[str] = (), tell: Callable[[str], None] = say) -> bool:
    """Runs the stages that are not finished.

    Args:
        plan: The plan of `make_plan`, which is made again after each stage with the time that is left.
        only: Stages to run; by default all.
        tell: Prints a line.

    Returns:
        Whether all of them are finished; if not, the same command goes on.

    Raises:
        ValueError: A script failed, or the folder is in use.
    """
    options = plan.options
    options.output.mkdir(parents=True, exist_ok=True)
    with locked_output_dir(options.output):
        while (stage := _next_stage(plan, only)) is not None:
            number = list(plan.commands).index(stage) + 1
            what = ", ".join([stage, *num_steps(plan, stage)])
            tell(
                f"\n== stage {number} of {len(plan.commands)}: {what}: time {expected(plan, stage)}; "
                f"all that is left: about {duration(plan.remaining)}{without(plan)}"
            )
            entry = plan.record.setdefault(stage, {"seconds": 0.0})
            if "commands" not in entry:
                entry |= {"planned": plan.seconds[stage], "commands": [asdict(one) for one in plan.commands[stage]]}
            save_record(plan)
            before, begin = entry["seconds"], time.monotonic()
            try:
                entry["done"] = _run_stage(plan, stage, tell)
            finally:
                entry["seconds"] = round(before + time.monotonic() - begin, 1)
                save_record(plan)
            if not entry["done"]:
                tell("stopped; the same command goes on from there")
                return False
            if stage != "report":
                plan = make_plan(options, plan.machine, corrected(plan, stage))
    return True


def _next_stage(plan: Plan, only: Sequence[str]) -> str | None:
    """The first stage that is not finished, of those to run.

    Raises:
        ValueError: This run has no such stage, or one before it is not finished.
    """
    unknown = [stage for stage in only if stage not in plan.commands]
    if unknown:
        raise ValueError(f"this run has no stage {unknown[0]}: its stages are {', '.join(plan.commands)}")
    left = (stage for stage in plan.commands if not plan.is_done(stage))
    before: list[str] = []
    for stage in left:
        if not only or stage in only:
            if before:
                raise ValueError(f"the stage {stage} needs {', '.join(before)} first: leave out --stage")
            return stage
        before.append(stage)
    return None


def _run_stage(plan: Plan, stage: str, tell: Callable[[str], None]) -> bool:
    """Runs the commands of a stage; returns whether it has its result."""
    if stage == "report":
        write_report(plan)
        return True
    for command in plan.commands[stage]:
        tell(f"$ {shlex.join(command.words())}")
        if not command.run():
            return False
    output = Path(plan.commands[stage][-1].settings["output_dir"])
    last = {"vae": "vae", "text": "tokenizer", "denoiser": "lora" if plan.adapter else "pipeline"}
    return (output / last[stage]).exists() if stage in last else True


def corrected(plan: Plan, stage: str) -> dict[str, float]:
    """Seconds per step, after the VAE's training has shown how far they were wrong on this machine."""
    if stage != "vae" or (seconds := logged_seconds(plan.folder / "vae")) is None:
        return plan.per_step
    factor = seconds / plan.per_step["vae"]
    compiled = {name: plan.commands[name][0].settings.get("compile", False) for name in ("vae", "denoiser")}
    alike = compiled["vae"] == compiled["denoiser"]
    return (
        plan.per_step
        | {"vae": factor * plan.per_step["vae"]}
        | ({"denoiser": factor * plan.per_step["denoiser"]} if alike else {})
    )


def duration(seconds: float) -> str:
    """A time for people: seconds, minutes, or hours and minutes."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min"


def write_report(plan: Plan) -> None:
    """Writes `report.html` with samples, what the model can do and cannot, and the next commands with their videos."""
    folder = plan.folder
    results = {path.parent.name: read_json(path) for path in folder.glob("evaluation/*/results.json")}
    held_out = results["held_out"]
    settings = plan.commands["evaluation"][0].settings
    suite = open_suite(
        SuiteConfig(**{one.name: settings[one.name] for one in fields(SuiteConfig) if one.name in settings})
    )
    samples = suite.samples(range(min(2, len(suite))))
    lora = [str(plan.adapter)] if plan.adapter else []
    pipe = load_checkpoint(plan.model, LoadOptions(lora=lora), plan.machine.device)
    pipe.set_progress_bar_config(disable=True)
    prompts = list(dict.fromkeys(plan.videos.captions))[:2]
    pictures = folder / "data" / "pictures.png"
    for step, path in EXAMPLES.items():
        frames = to_frames(samples.clips[:1, :, ::step])[0]
        write_video(frames, folder / path, plan.frame_rate / step, overwrite=True)
    html = render(
        title=f"{folder.name}: trained on {plan.options.data}",
        verdicts=judge(held_out, results["train"], results.get(ONE_STEP)),
        num_clips=len(held_out["numbers"]),
        one_step=ONE_STEP if ONE_STEP in results else None,
        commands=next_commands(plan),
        samples=draw_samples(pipe, samples.clips, settings, prompts),
        pictures=b64encode(pictures.read_bytes()).decode() if pictures.exists() else None,
        data=describe(read_json(folder / "data" / SUMMARY)),
        stages=[
            (
                stage,
                duration(entry["planned"]),
                duration(entry["seconds"]),
                [shlex.join(command.words()) for command in plan.commands[stage]],
            )
            for stage, entry in plan.record.items()
            if stage != "report"
        ],
    )
    write_text(folder / "report.html", html)


def next_commands(plan: Plan) -> list[str]:
    """Three commands that use the model."""
    options = f"--model {shlex.quote(plan.model)}" + (
        f" --lora {shlex.quote(str(plan.adapter))}" if plan.adapter else ""
    )
    whole, every_second = (shlex.quote(str(plan.folder / name)) for name in EXAMPLES.values())
    caption = next(iter(plan.videos.captions), None)
    tasks = plan.commands["evaluation"][0].settings["tasks"]
    first = "" if caption is None else f"vgen generate {shlex.quote(caption)} {options} -o generated.mp4"
    others = [
        f"vgen predict {whole} {options} --with-input -o predicted.mp4",
        *([f"vgen interpolate {every_second} {options} -o interpolated.mp4"] if "interpolation" in tasks else []),
        f"vgen predict {whole} {options} --num-frames 64 -o long.mp4",
    ]
    return [first, *others[:2]] if first else others


def describe_videos(plan: Plan) -> list[tuple[str, str]]:
    """What is known of the videos, as rows of a table."""
    videos, clip, rate = plan.videos, plan.clip, plan.frame_rate
    if videos.is_stream:
        text = f"a stream: number, lengths and captions are unknown until they are copied; {LIMIT}=N limits the number"
        return [("videos", text)]
    enough = [length >= clip.num_frames for length in videos.lengths(rate)]
    short = list(dict.fromkeys(itertools.compress(videos.paths, map(operator.not_, enough))))
    usable = list(itertools.compress(videos.seconds, enough))
    held_out = plan.options.held_out or "a tenth of the videos"
    if plan.options.held_out is None and len(set(itertools.compress(videos.paths, enough))) < MIN_FILES:
        held_out = f"the end of each video, because there are fewer than {MIN_FILES}"
    if plan.is_done("data"):
        held_out = str(plan.folder / "data" / "held_out")
    rows = [("videos", f"{len(usable)} usable, {duration(sum(usable))} in all")]
    rows += [
        ("sizes", _counted(f"{width}x{height}" for height, width in videos.sizes)),
        ("frame rates", _counted(f"{one:g}" for one in videos.frame_rates) + " per second"),
        ("captions", f"{videos.num_captioned} of {len(videos.seconds)} videos have one"),
        ("held out", held_out),
        (
            "clips",
            f"{videos.num_clips(clip, rate, clip.num_frames)} end to end, of {clip.num_frames} frames of "
            f"{clip.width}x{clip.height} at {rate:g} per second",
        ),
    ]
    if short:
        names = ", ".join(short[:_NAMED]) + (", ..." if len(short) > _NAMED else "")
        rows.append(
            ("too short", f"{len(short)}, with fewer than {clip.num_frames} frames at {rate:g} per second: {names}")
        )
    rows += [("not usable", f"{path}: {reason}") for path, reason in list(videos.refused.items())[:_NAMED]]
    if len(videos.refused) > _NAMED:
        rows.append(("not usable", f"and {len(videos.refused) - _NAMED} more"))
    return rows


def _counted(values: Iterable[str]) -> str:
    return ", ".join(f"{value} ({count})" for value, count in Counter(values).most_common(5))


def expected(plan: Plan, stage: str) -> str:
    """The estimated time of a stage, in words."""
    return "unknown" if stage in plan.unknown else f"about {duration(plan.seconds[stage])}"


def num_steps(plan: Plan, stage: str) -> list[str]:
    """The numbers of steps of a stage, in words."""
    return [f"{one.settings['max_steps']} steps" for one in plan.commands[stage] if "max_steps" in one.settings]


def without(plan: Plan) -> str:
    """The stages that sums leave out, in words."""
    return f" without {' and '.join(plan.unknown)}" if plan.unknown else ""


def plan_rows(plan: Plan) -> list[tuple[str, str, str]]:
    """Stage, time and what it does, as rows of a table."""
    rows = []
    for stage in plan.commands:
        text = "done" if plan.is_done(stage) else expected(plan, stage)
        steps = num_steps(plan, stage)
        memory = [f"{plan.memory[stage] / GIB:.1f} GiB of memory"] if stage in plan.memory else []
        captions = ["if there are any"] if stage == "text" and plan.videos.is_stream else []
        rows.append((stage, text, ", ".join([MEANINGS[stage], *captions, *steps, *memory])))
    left_out = without(plan)
    rows.append(("all", f"about {duration(plan.remaining)}{left_out}", f"{plan.disk / GIB:.2f} GiB on disk{left_out}"))
    return rows


FEW_STEPS = 100
"""Steps below which a network hardly learns anything."""


def warnings_of(plan: Plan) -> list[str]:
    """What a plan that can be carried out will not achieve."""
    steps = {
        stage: command.settings["max_steps"]
        for stage in ("vae", "denoiser")
        for command in plan.commands.get(stage, [])
        if not plan.is_done(stage) and command.settings.get("max_steps", FEW_STEPS) < FEW_STEPS
    }
    warnings = [
        f"{count} steps of the {stage} are too few to learn much: give it more --minutes, or stop other programs, "
        "which slow this machine down"
        for stage, count in steps.items()
    ]
    spent = sum(entry["seconds"] for entry in plan.record.values())
    if plan.record and spent + plan.remaining > 1.2 * plan.limit:
        warnings.append(
            f"this takes {duration(spent + plan.remaining)} in all, not {duration(plan.limit)}, because stages that "
            "have begun keep their settings: --set STAGE.max_steps=N makes one shorter"
        )
    return warnings


MEANINGS: dict[str, str] = {
    "data": "small copies of the videos, and which of them are held out",
    "vae": "the network that compresses clips to latents",
    "latents": "encoded clips",
    "text": "a small text encoder for the captions",
    "denoiser": "the network that makes latents out of noise",
    "evaluation": "compared with simple baselines",
    "report": "report.html, with samples",
}
