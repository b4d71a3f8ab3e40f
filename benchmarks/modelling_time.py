"""Methods of modelling time: every recognizer, trained on tasks of ShapesWorld for the same time on one core.

    pip install -c constraints.txt -e ".[benchmarks,evaluation]"
    python benchmarks/modelling_time.py --output docs/results/modelling_time.json --chart docs/modelling_time.png

Tasks: `color` needs no time, `direction` needs the order of frames, `first` (which of two shapes moved first) needs
memory, `speed` needs fine steps. Each network trains once per task on new clips of 17 frames of 32x32, with AdamW and
a cosine schedule over CPU time, and is scored on 512 others. Sizes make the networks similarly small. The same command
goes on where it stopped.
"""

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from pairs import in_new_process
from pairs import measure as cost_of

from vgen.data.shapes_tasks import ShapesTasks
from vgen.recognition import Recognizer, create_recognizer
from vgen.recognition.objective import classification_loss
from vgen.temporal.state import TemporalState
from vgen.training.throughput import count_flops

TASKS = ("color", "direction", "speed", "first")
NUM_FRAMES, SIZE, BATCH, SCORED = 17, 32, 16, 512
SMALL_TRANSFORMER = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 512}
ENTRIES: dict[str, dict[str, Any]] = {
    "single_frame": {},
    "pooled": {},
    "late_fusion": {},
    "early_fusion": {},
    "slow_fusion": {},
    "c3d": {"widths": [16, 32, 64, 64, 64], "dim": 128},
    "i3d": {"width": 0.25},
    "s3d": {"width": 0.25},
    "s3d_channels": {"width": 0.25},
    "r2plus1d": {"widths": [16, 32, 64, 128], "blocks": [1, 1, 1, 1]},
    "causal_cnn": {},
    "cnn_lstm": {},
    "cnn_gru": {},
    "convlstm": {},
    "st_lstm": {},
    "recurrent_cnn": {},
    "divided_attention": {},
    "joint_attention": {},
    "factorized_attention": {},
    "swin3d": {"dim": 48, "depths": [2, 2], "heads": [2, 4], "window": [8, 4, 4]},
    "two_stream": {},
    "tsn": {},
    "slowfast": {"width": 16, "blocks": [1, 1, 1, 1]},
    "frame_difference": {},
    "timesformer": {"config": SMALL_TRANSFORMER | {"patch_size": 8}},
}


def main() -> None:
    """Measures all entries, then draws the chart."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60, help="CPU time for training each network on each task")
    parser.add_argument("--entries", nargs="*", default=list(ENTRIES), choices=ENTRIES, metavar="NAME")
    parser.add_argument("--tasks", nargs="*", default=list(TASKS), choices=TASKS, metavar="TASK")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--output", type=Path, help="write the numbers here as JSON")
    parser.add_argument("--chart", type=Path, help="draw accuracies against times per clip here")
    args = parser.parse_args()
    settings = {"seconds": args.seconds, "learning rate": args.learning_rate}
    found: dict[str, Any] = {"settings": settings, "entries": {}}
    if args.output and args.output.exists():
        before = json.loads(args.output.read_text())
        found = before if before["settings"] == settings else found
    for name in args.entries:
        row = found["entries"].setdefault(name, {"accuracy": {}, "steps": {}})
        if "parameters" not in row:
            row |= in_new_process(costs, name)
        for task in args.tasks:
            if task in row["accuracy"]:
                continue
            row["accuracy"][task], row["steps"][task] = in_new_process(
                train, name, task, args.seconds, args.learning_rate
            )
            if args.output:
                args.output.write_text(json.dumps(found, indent=1) + "\n")
        accuracies = "  ".join(f"{task} {accuracy:.1%}" for task, accuracy in row["accuracy"].items())
        print(f"{name:<22}{accuracies}  {row['milliseconds per clip']:.1f} ms", flush=True)
    if args.chart:
        draw(found["entries"], args.chart)


def make(name: str, task: ShapesTasks) -> Recognizer:
    """An entry for a task."""
    torch.manual_seed(0)
    return create_recognizer(name, len(task.classes), NUM_FRAMES, SIZE, **ENTRIES[name])


def costs(name: str) -> dict[str, Any]:
    """Costs of an entry."""
    torch.set_num_threads(1)
    model = make(name, ShapesTasks("color", NUM_FRAMES)).eval()
    clip = torch.zeros(1, 3, NUM_FRAMES, SIZE, SIZE)
    with torch.no_grad():
        measured = cost_of(lambda: model(clip), 20)
        per_clip = 1000 * measured["seconds"]
        return {
            "parameters": sum(weight.numel() for weight in model.parameters()),
            "flops per clip": count_flops(lambda: model(clip)),
            "milliseconds per clip": per_clip,
            "milliseconds per new frame": per_frame(model, clip) if model.network.is_streamed else per_clip,
            "MiB": measured["MiB"],
            "streams": model.network.is_streamed,
        }


def per_frame(model: Recognizer, clip: torch.Tensor) -> float:
    """Milliseconds for the next frame of a stream."""
    state = TemporalState()
    model(clip, state=state)
    return 1000 * cost_of(lambda: model(clip[:, :, :1], state=state), 20)["seconds"]


def train(name: str, task: str, seconds: float, learning_rate: float) -> tuple[float, int]:
    """Trains for a CPU time, with that of making clips; returns the accuracy on new clips and the number of steps."""
    torch.set_num_threads(1)
    world = ShapesTasks(task, NUM_FRAMES)  # type: ignore[arg-type]
    model = make(name, world)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01)
    model.train()
    begin, step = time.process_time(), 0
    while (share := (time.process_time() - begin) / seconds) < 1:
        for group in optimizer.param_groups:  # 50 steps of warmup, then a cosine over time
            group["lr"] = learning_rate * min(1, (step + 1) / 50) * (1 + math.cos(math.pi * share)) / 2
        clip, labels = batch(world, range(step * BATCH, (step + 1) * BATCH))
        targets = torch.nn.functional.one_hot(labels, len(world.classes)).float()
        loss = classification_loss(model(clip).logits, targets).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
    fresh, right = ShapesTasks(task, NUM_FRAMES, seed=1), 0  # type: ignore[arg-type]
    model.eval()
    with torch.no_grad():
        for first in range(0, SCORED, BATCH):
            clip, labels = batch(fresh, range(first, first + BATCH))
            right += int((model(clip).logits.argmax(1) == labels).sum())
    return right / SCORED, step


def batch(world: ShapesTasks, indices: range) -> tuple[torch.Tensor, torch.Tensor]:
    """Clips and labels."""
    scenes = [world.scene(index) for index in indices]
    return world.clips(scenes, SIZE), torch.tensor([scene.label for scene in scenes])


def draw(entries: dict[str, Any], path: Path) -> None:
    """Draws the accuracy of each entry in each task, the fastest at the top, and chance as a line."""
    from matplotlib.figure import Figure

    rows = sorted(entries.items(), key=lambda entry: -entry[1]["milliseconds per clip"])
    figure = Figure(figsize=(12, 7), layout="constrained")
    names = [f"{name}, {row['milliseconds per clip']:.1f} ms" for name, row in rows]
    colors = ["tab:blue" if row["streams"] else "tab:gray" for _, row in rows]
    tasks = [task for task in TASKS if all(task in row["accuracy"] for _, row in rows)]
    for axes, task in zip(figure.subplots(1, len(tasks), sharey=True, squeeze=False)[0], tasks, strict=True):
        axes.barh(names, [100 * row["accuracy"][task] for _, row in rows], color=colors)
        chance = 100 / len(ShapesTasks(task, NUM_FRAMES).classes)  # type: ignore[arg-type]
        axes.axvline(chance, color="black", linestyle="--", linewidth=1)
        axes.set(xlabel="accuracy in %", title=task, xlim=(0, 100))
    figure.suptitle("time per clip with one thread; blue: also frame by frame; dashed: chance")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
