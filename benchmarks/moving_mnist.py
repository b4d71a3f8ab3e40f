"""Moving MNIST, 10 known and 10 predicted frames: both denoisers and a ConvLSTM, each trained for the same time.

    pip install -c constraints.txt -e ".[data,evaluation]"
    python benchmarks/moving_mnist.py --digits t10k-images-idx3-ubyte.gz --output-dir runs/moving-mnist

Digits 0 to 7999 are for training, 8000 to 9999 for testing. All networks are trained on the
same kind of clips. Both denoisers use one VAE, whose training time is not counted. A short run of each command
determines the number of steps that take the requested minutes on this machine; encoding the latents is not counted.
Finished parts are skipped. The script writes the tables and figures of docs/moving_mnist.md;
`OUTPUT_DIR/*/evaluation/report.html` has more.
"""

import argparse
import json
import math
from base64 import b64decode
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from statistics import median

from PIL import Image, ImageDraw, ImageFont
from readme import put
from safetensors import safe_open
from scripts import ROOT, launch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from vgen.hub import find_checkpoint
from vgen.metrics.report import summarize
from vgen.tasks.evaluation import MODEL

PIXELS = 64 * 64
TRIAL, WARM = 60, 20
"""Steps of the short run, and how many of them are warm-up and not timed."""
LABEL, GAP = 160, 4
"""Pixels around and between the rows of a picture."""
DOCS = ROOT / "docs"
METRICS = {"mse": PIXELS, "mae": PIXELS, "ssim": 1, "psnr": 1, "sharpness": 1}
"""Columns and their factors: errors are summed over the pixels of a frame, as the field does."""
DENOISERS = {"transformer": "Transformer", "unet": "U-Net"}


def main() -> None:
    """Trains and evaluates everything that is not finished yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--digits", type=Path, required=True, help="10,000 digits in MNIST's IDX format")
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--vae-minutes", type=float, default=30)
    parser.add_argument("--minutes", type=float, default=40, help="training time of each other network")
    parser.add_argument("--num-clips", type=int, default=1000, help="number of clips to score")
    parser.add_argument("--num-latents", type=int, default=10000, help="number of clips to train the denoisers on")
    parser.add_argument("--num-samples", type=int, default=8)
    args = parser.parse_args()
    folder, training = args.output_dir, f"{args.digits}:0:8000"
    text = Path(find_checkpoint("vgen/shapes-64"))  # every prompt is empty

    train("vae", folder / "vae", args.vae_minutes, data=training)
    vae = folder / "vae" / "vae"
    latents = {"vae": vae, "output_dir": folder / "latents", "data": training, "num_clips": args.num_latents}
    launch("pipelines/encode_latents.py", latents | {"num_frames": 21, "keyframes": "true"})
    train("convlstm", folder / "convlstm", args.minutes, data=training)
    inputs = {"vae": vae, "text_encoder": text, "latents_dir": folder / "latents"}
    for name in DENOISERS:
        train(name, folder / name, args.minutes, **inputs)
        settings = {
            "model": folder / name / "pipeline", "output_dir": folder / name / "evaluation", "suite": "moving-mnist",
            "data": f"{args.digits}:8000:10000", "tasks": '["prediction"]', "num_frames": 20, "given": 10,
            "num_clips": args.num_clips, "num_samples": args.num_samples, "dtype": "bfloat16",
            "convlstm": folder / "convlstm" / "convlstm",
        }  # fmt: skip
        launch("pipelines/evaluate.py", settings)
    text = (DOCS / "moving_mnist.md").read_text()
    text = put(put(text, "results", results(folder)), "training", trainings(folder))
    (DOCS / "moving_mnist.md").write_text(text)
    for name in DENOISERS:
        first = json.loads((folder / name / "evaluation" / "clips" / "000000.json").read_text())
        draw([shown["prediction"] for shown in first["strips"].values()]).save(DOCS / f"moving_mnist-{name}.png")


def train(name: str, folder: Path, minutes: float, **settings: object) -> None:
    """Trains with a recipe for a given number of minutes."""
    record = folder / "steps.json"
    if not record.exists():
        trial = folder.with_name(f"{folder.name}-trial")
        trial_settings = {"max_steps": TRIAL, "sample_every": 10 * TRIAL}
        if name == "vae":
            trial_settings["image_steps"] = 0  # steps of clips are the slow ones
        run(name, trial, settings | trial_settings)
        events = EventAccumulator(str(trial / "logs")).Reload()
        times = {event.step: event.wall_time for event in events.Scalars(events.Tags()["scalars"][0])}
        seconds = (times[TRIAL] - times[WARM]) / (TRIAL - WARM)
        folder.mkdir(parents=True, exist_ok=True)
        record.write_text(json.dumps({"steps": max(TRIAL, round(60 * minutes / seconds)), "seconds": seconds}))
    plan = json.loads(record.read_text())
    steps = plan["steps"]
    print(f"{name}: {steps} steps", flush=True)
    if "done" in plan:
        return
    decay = {"decay_steps": steps // 3} if name in ("transformer", "unet") else {}
    run(name, folder, settings | decay | {"max_steps": steps, "sample_every": 10 * steps})
    record.write_text(json.dumps(plan | {"done": True}))


def run(name: str, folder: Path, settings: dict) -> None:
    """One call of a training script."""
    script = {"vae": "vae", "convlstm": "convlstm"}.get(name, "vdm")
    recipe = ROOT / "train" / "recipes" / f"moving-mnist-{name}.yaml"
    launch(f"train/train_{script}.py", {"config": recipe, "output_dir": folder} | settings)


def results(folder: Path) -> list[list[str]]:
    """The table of all prediction methods, with half widths of 95% confidence intervals; each baseline once."""
    rows: dict[str, list[str]] = {}
    for name, title in DENOISERS.items():
        measured = json.loads((folder / name / "evaluation" / "results.json").read_text())
        for way, values in measured["tasks"]["prediction"].items():
            cells = []
            for metric, factor in METRICS.items():
                summary = summarize(values[metric]) if metric in values else None
                digits = 1 if factor > 1 else 2 if metric == "psnr" else 3
                half = None if summary is None else factor * (summary.high - summary.low) / 2
                cells.append("" if summary is None else f"{factor * summary.mean:.{digits}f} ± {half:.{digits}f}")
            rows.setdefault(way.replace(MODEL, title), cells)
    ours = [way for way in rows if way.startswith(tuple(DENOISERS.values()))]
    others = [way for way in rows if way not in ours]
    header = ["", "MSE", "MAE", "SSIM", "PSNR, dB", "sharpness"]
    return [header, *([way, *rows[way]] for way in ours + others)]


def trainings(folder: Path) -> list[list[str]]:
    """The table of networks: steps, and their minutes at the median pace that was logged; breaks do not count."""
    rows = [["network", "parameters", "steps", "minutes"]]
    for name, title in {"vae": "VAE", "convlstm": "ConvLSTM", **DENOISERS}.items():
        part = f"pipeline/{name}" if name in DENOISERS else name
        with safe_open(folder / name / part / "diffusion_pytorch_model.safetensors", "pt") as weights:
            count = sum(math.prod(weights.get_slice(key).get_shape()) for key in weights.keys())  # noqa: SIM118
        events = EventAccumulator(str(folder / name / "logs")).Reload()
        logged = events.Scalars(events.Tags()["scalars"][0])
        pace = median((new.wall_time - old.wall_time) / (new.step - old.step) for old, new in pairwise(logged))
        steps = json.loads((folder / name / "steps.json").read_text())["steps"]
        rows.append([title, f"{count / 1e6:.1f}M", f"{steps:,}", f"{steps * pace / 60:.0f}"])
    return rows


def draw(clips: list[dict[str, str]]) -> Image.Image:
    """Some frames of each way to continue some clips, a row each, under one another."""
    strips = {(number, way): data for number, rows in enumerate(clips) for way, data in rows.items()}
    rows = {key: Image.open(BytesIO(b64decode(data))) for key, data in strips.items()}
    width, height = next(iter(rows.values())).size
    picture = Image.new("L", (LABEL + width, len(rows) * (height + GAP) + len(clips) * 4 * GAP), 255)
    pen = ImageDraw.Draw(picture)
    for row, ((number, way), strip) in enumerate(rows.items()):
        top = row * (height + GAP) + number * 4 * GAP
        pen.text((4, top + height / 2), way, 0, ImageFont.load_default(12), anchor="lm")
        picture.paste(strip, (LABEL, top))
    return picture


if __name__ == "__main__":
    main()
