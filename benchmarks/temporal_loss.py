"""Effect of the temporal losses: one checkpoint is fine-tuned with each of them and scored on the same clips.

    pip install -c constraints.txt -e ".[evaluation]"
    python benchmarks/temporal_loss.py --output-dir runs/temporal-loss

Every row has the same steps, data and seed; the row `off` is fine-tuned too. The VAE is scored on reconstructions, the
denoiser on videos from captions and on predictions. The denoiser's latents are encoded first, with the optical flow.
Finished parts are skipped. Prints one table for each network, with the training times in seconds.
"""

import argparse
import json
import time
from pathlib import Path

from scripts import launch

from vgen.hub import find_checkpoint
from vgen.metrics.report import column_title, format_summary, summarize
from vgen.models.vae import CausalVideoVAE
from vgen.pipeline import VideoGenPipeline

TERMS = {
    "off": (),
    "difference": ("difference_weight",),
    "warping": ("warping_weight",),
    "both": ("difference_weight", "warping_weight"),
    "matched differences": ("matched_weight",),
}
SCORES = {
    "vae": {"reconstruction": ("psnr", "warping error", "flicker", "correct")},
    "vdm": {"generation": ("correct", "warping error", "flicker", "motion"), "prediction": ("psnr", "warping error")},
}
COMMON = {"ema_decay": 0.99, "lr_schedule": "cosine", "warmup_steps": 20, "sample_every": 100000, "save_every": 100}


def main() -> None:
    """Trains and evaluates everything that is not finished yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vgen/shapes-64")
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--networks", nargs="+", default=["vae", "vdm"], choices=["vae", "vdm"])
    parser.add_argument(
        "--steps", type=int, nargs=2, default=[800, 500], help="training steps of the VAE and of the denoiser"
    )
    parser.add_argument(
        "--weights", type=float, nargs=2, default=[0.2, 0.1], help="loss weight for the VAE and for the denoiser"
    )
    parser.add_argument("--num-clips", type=int, default=64, help="number of clips per score")
    parser.add_argument("--num-latents", type=int, default=4000, help="number of clips to train the denoiser on")
    args = parser.parse_args()
    model = Path(find_checkpoint(args.model))
    for network in args.networks:
        index = ("vae", "vdm").index(network)
        rows = {}
        for row, terms in TERMS.items():
            folder = args.output_dir / network / row.replace(" ", "-")
            weights = {name: args.weights[index] for name in terms}
            seconds = train(network, model, folder, weights, args.steps[index], args)
            rows[row] = score(network, model, folder, args.num_clips) | {"seconds": f"{seconds:.0f}"}
            print_table(network, rows)


def train(network: str, model: Path, folder: Path, weights: dict, steps: int, args: argparse.Namespace) -> float:
    """Runs a fine-tuning unless it exists; returns the seconds that it took."""
    record = folder / "seconds.json"
    if record.exists():
        return json.loads(record.read_text())
    if network == "vae":
        settings = {"init": model / "vae", "kl_weight": 1e-4, "learning_rate": 2e-4, "batch_size": 8}
    else:
        latents = args.output_dir / "latents"
        encode = {"vae": model / "vae", "num_clips": args.num_latents, "num_captions": 6, "flow": "dis"}
        launch("pipelines/encode_latents.py", encode | {"output_dir": latents})
        settings = {
            "init": model, "latents_dir": latents, "batch_size": 32, "learning_rate": 5e-4, "level_shift": 1.5,
            "known": '{"none": 0.8, "leading": 0.2}', "groups": '{"full": 0.6, "chunk": 0.3, "causal": 0.1}',
            "attention_backend": "_native_math",
        }  # fmt: skip
    begin = time.time()
    launch(f"train/train_{network}.py", settings | COMMON | weights | {"output_dir": folder, "max_steps": steps})
    record.write_text(json.dumps(time.time() - begin))
    return time.time() - begin


def score(network: str, model: Path, folder: Path, num_clips: int) -> dict[str, str]:
    """Means over the clips."""
    pipeline = folder / "pipeline"
    if network == "vae":
        vae = CausalVideoVAE.from_pretrained(folder / "vae")
        VideoGenPipeline.from_pretrained(model, vae=vae).save_pretrained(pipeline)
    tasks = json.dumps(list(SCORES[network]))
    settings = {"model": pipeline, "output_dir": folder / "scores", "num_clips": num_clips, "tasks": tasks}
    launch("pipelines/evaluate.py", settings)
    results = json.loads((folder / "scores" / "results.json").read_text())
    scores = {}
    for task, metrics in SCORES[network].items():
        way = next(iter(results["tasks"][task].values()))
        for metric in metrics:
            scores[f"{task}: {column_title(metric)}"] = format_summary(metric, summarize(way[metric]))
    return scores


def print_table(network: str, rows: dict[str, dict[str, str]]) -> None:
    """Writes the table in Markdown."""
    columns = list(next(iter(rows.values())))
    print(f"\n| {network} | {' | '.join(columns)} |\n|{' --- |' * (len(columns) + 1)}")
    for row, cells in rows.items():
        print(f"| {row} | {' | '.join(cells[column] for column in columns)} |", flush=True)


if __name__ == "__main__":
    main()
