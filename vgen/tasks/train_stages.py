"""The settings of the scripts that `vgen train` runs, stage by stage."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vgen.tasks.train_commands import PLANNED, SCRIPTS, Command
from vgen.tasks.train_setup import Setup
from vgen.temporal.grid import LatentGrid

LEAST_STEPS = 20
"""Fewest optimizer steps of a stage for which a time limit leaves room."""
EVALUATIONS, LEAST_BETWEEN = 20, 5
"""Most evaluations during the training of a network, and fewest steps from one to the next."""
MOST_HELD_OUT = 500
"""Most held-out clips that are encoded."""
EVALUATED, NUM_SAMPLES = 24, 8
"""Clips of an evaluation, and predictions of each on held-out videos."""
ONE_STEP = "held_out_one_step"
"""Folder of the evaluation with one denoising step, which predicts the mean of what may follow."""
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


def commands_of(setup: Setup, counts: Mapping[str, int], hop: int, repeats: int) -> dict[str, list[Command]]:
    """The commands of all stages, with the numbers of optimizer steps of those that train."""
    size = {"height": setup.clip.height, "width": setup.clip.width}
    shape = size | {"num_frames": setup.clip.num_frames}
    train, held_out = setup.folder / "data" / "train", setup.folder / "data" / "held_out"
    vae = setup.options.vae or setup.options.init or str(setup.folder / "vae" / "vae")
    rates = {"frame_rates": [setup.frame_rate]}
    found: dict[str, list[tuple[str, dict[str, Any]]]] = {}
    found["data"] = [(
        SCRIPTS["data"],
        {"data": setup.options.data, "output_dir": setup.folder / "data", "held_out": setup.options.held_out}
        | shape | {"frame_rate": setup.frame_rate},
    )]  # fmt: skip
    if setup.codec.source is None:
        found["vae"] = [(
            SCRIPTS["vae"],
            {"data": train, "score_data": held_out, "output_dir": setup.folder / "vae"} | rates
            | {name: min(setup.wanted("vae", name) or value, value) for name, value in shape.items()}
            | schedule(setup, "vae", counts) | {"num_calibration_clips": 256}
            | {"augment": augment(setup)},
        )]  # fmt: skip
    encode: dict[str, Any] = {"vae": vae} | shape | rates | {"keyframes": True}
    if setup.denoiser_model.get("still_keyframes"):
        encode["still_keyframes"] = True
    if setup.pretrained_text is not None:
        encode |= {"text_encoder": setup.pretrained_text}
        encode |= {"max_sequence_length": setup.text_length}
    latents = setup.folder / "latents"
    found["latents"] = [
        (
            SCRIPTS["latents"],
            encode | {"data": train, "output_dir": latents / "train", "hop": hop, "repeats": repeats}
            | ({"augment": augment(setup)} if repeats > 1 else {}),
        ),
        (
            SCRIPTS["latents"],
            encode | {"data": held_out, "output_dir": latents / "held_out", "hop": evaluation_hop(setup)}
            | {"num_clips": MOST_HELD_OUT},
        ),
    ]  # fmt: skip
    if setup.trains_text:
        text = {"data": train, "output_dir": setup.folder / "text", "max_sequence_length": setup.text_length}
        found["text"] = [(SCRIPTS["text"], text)]
    found["denoiser"] = [(SCRIPTS["denoiser"], denoiser_settings(setup, vae, latents, counts))]
    found["evaluation"] = [
        (SCRIPTS["evaluation"], evaluation_settings(setup, held_out, "held_out", NUM_SAMPLES)),
        (SCRIPTS["evaluation"], evaluation_settings(setup, train, "train", 1)),
    ]
    if setup.compares_one_step:
        settings = evaluation_settings(setup, held_out, ONE_STEP, NUM_SAMPLES) | {"num_inference_steps": 1}
        found["evaluation"].append((SCRIPTS["evaluation"], settings))
    commands: dict[str, list[Command]] = {}
    for stage, calls in found.items():
        rest = {} if stage in ("data", "evaluation") else setup.preset.get(stage, {})
        rest = fine_tuning(setup, rest) if stage == "denoiser" and setup.pipe else rest
        processes = setup.preset["processes"] if stage not in ("data", "text") else 1
        commands[stage] = [
            Command(script, plain_settings(stage, _merged(rest, settings, setup.changes_of(stage))), processes)
            for script, settings in calls
        ]
    return commands | {"report": []}


def schedule(setup: Setup, stage: str, counts: Mapping[str, int]) -> dict[str, Any]:
    """Settings that follow from the number of optimizer steps."""
    steps = counts.get(stage, LEAST_STEPS)
    every = min(steps, max(LEAST_BETWEEN, steps // EVALUATIONS))
    return {
        "max_steps": steps,
        "warmup_steps": min(100, max(1, steps // 20)),
        "num_score_clips": EVALUATED,
        "sample_every": every,
        "save_every": every,
        "log_every": min(10, every),
        "patience": 6 if setup.is_small else 0,
    }


def augment(setup: Setup) -> dict[str, float]:
    """The augmentation of training clips: no flips and no reversal if captions tell directions."""
    words = {word for caption in setup.videos.captions for word in re.findall(r"\w+", caption.lower())}
    excluded = {"flip", "reverse"} if words & DIRECTIONS else set()
    return {name: value for name, value in setup.preset["augment"].items() if name not in excluded}


def denoiser_settings(setup: Setup, vae: str, latents: Path, counts: Mapping[str, int]) -> dict[str, Any]:
    """Settings of the denoiser's training that depend on the run."""
    settings: dict[str, Any] = {"init": setup.options.init} if setup.options.init else {"vae": vae}
    if setup.pipe is None:
        steps = setup.wanted("denoiser", "num_inference_steps")
        size = {"height": setup.clip.height, "width": setup.clip.width, "num_frames": setup.clip.num_frames}
        settings |= {"model": setup.denoiser_model, "frame_rate": setup.frame_rate}
        settings |= {"defaults": size | {"num_inference_steps": steps}}
        if setup.captioned:
            settings["text_encoder"] = setup.options.text_encoder or str(setup.folder / "text")
            settings["train_text_encoder"] = setup.trains_text
    else:
        settings["train_only"] = setup.options.train_only
        if setup.options.train_only == "lora":
            settings["ema_decay"] = 0.0
    return (
        settings
        | {"latents_dir": latents / "train", "held_out_latents": latents / "held_out"}
        | {"output_dir": setup.folder / "denoiser"}
        | schedule(setup, "denoiser", counts)
    )


def fine_tuning(setup: Setup, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a preset that apply to a model that is fine-tuned, limited to what its network supports."""
    model, excluded = setup.denoiser_model, ("denoiser", "model", "level_shift", "optimizer", "weight_decay")
    kept = {name: value for name, value in settings.items() if name not in excluded}
    modes = model.get("group_modes", ["full"])
    kept["groups"] = {mode: weight for mode, weight in kept["groups"].items() if mode in modes}
    if not model.get("keyframe_slots"):
        kept["known"] = {kind: weight for kind, weight in kept["known"].items() if kind in ("none", "leading")}
    return kept | {"learning_rate": FINE_TUNING_RATE[setup.options.train_only]}


def evaluation_hop(setup: Setup) -> int:
    """Frames between the starts of held-out clips."""
    return 1 if setup.is_small else setup.clip.num_frames


def evaluated_tasks(setup: Setup) -> list[str]:
    """The tasks of the evaluation that the model can do; an adapter adds none."""
    tasks = {"leading", "keyframes"} if setup.pipe is None else set(setup.denoiser_model.get("tasks", ["text"]))
    if setup.pipe is not None and setup.options.train_only != "lora":
        tasks |= {"leading"} | ({"keyframes"} if setup.denoiser_model.get("keyframe_slots") else set())
    found = ["reconstruction"]
    found += ["prediction"] if "leading" in tasks else []
    return found + (["interpolation"] if {"leading", "keyframes"} <= tasks else [])


def evaluation_settings(setup: Setup, data: Path, name: str, num_samples: int) -> dict[str, Any]:
    """Settings of an evaluation."""
    lora = setup.options.train_only == "lora"
    settings: dict[str, Any] = {"model": setup.options.init if lora else setup.folder / "denoiser" / "pipeline"}
    if lora:
        settings["lora"] = [str(setup.folder / "denoiser" / "lora")]
    return settings | {
        "suite": "folder", "data": data, "output_dir": setup.folder / "evaluation" / name,
        "tasks": evaluated_tasks(setup), "num_clips": EVALUATED,
        "height": setup.clip.height, "width": setup.clip.width, "num_frames": setup.clip.num_frames,
        "frame_rate": setup.frame_rate, "given": LatentGrid(setup.codec.time).nearest(setup.clip.num_frames // 2 + 1),
        "factor": min(4, setup.clip.num_frames - 1), "num_samples": num_samples, "hop": evaluation_hop(setup),
    }  # fmt: skip


def _merged(*parts: Mapping[str, Any]) -> dict[str, Any]:
    merged = {name: value for part in parts for name, value in part.items()}
    if merged.get("optimizer", "adamw") != "muon":
        merged.pop("muon_kernels", None)
    return merged


def plain_settings(stage: str, settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of a stage's script as JSON values, without those that are only for the plan."""
    planned = PLANNED.get(stage, ())
    return {
        name: str(value) if isinstance(value, Path) else value
        for name, value in settings.items()
        if name not in planned and value is not None
    }
