"""The tables of README.md, docs/results.md and four other pages, and the README's animation.

python benchmarks/readme.py                        write the tables from docs/results/*.json
python benchmarks/readme.py --measure              first repeat all measurements (hours on a CPU)
python benchmarks/readme.py --measure shapes       first repeat one measurement
python benchmarks/readme.py --check                fail if a page differs from docs/results/*.json
"""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from scripts import ROOT, launch

README = ROOT / "README.md"
PAGE = ROOT / "docs" / "results.md"
CLUSTERS = ROOT / "docs" / "clusters.md"
MODELLING_TIME = ROOT / "docs" / "modelling_time.md"
MEMORY = ROOT / "docs" / "memory.md"
FEW_STEPS = ROOT / "docs" / "few_steps.md"
RESULTS = ROOT / "docs" / "results"
TRANSFORMER, UNET = "vgen/shapes-64", "vgen/shapes-64-unet"
MEASUREMENTS: dict[str, tuple[str, dict[str, Any]]] = {
    "shapes": ("benchmarks/shapes.py", {}),
    "known_frames": ("benchmarks/known_frames.py", {}),
    "known_frames_prompted": ("benchmarks/known_frames.py", {"prompted": None}),
    "rollout": ("benchmarks/rollout.py", {}),
    "shapes_unet": ("benchmarks/shapes.py", {"model": UNET}),
    "known_frames_unet": ("benchmarks/known_frames.py", {"model": UNET}),
    "known_frames_prompted_unet": ("benchmarks/known_frames.py", {"model": UNET, "prompted": None}),
    "rollout_unet": ("benchmarks/rollout.py", {"model": UNET, "measures": "defaults", "quality-only": None}),
    "prompt_change": ("benchmarks/prompt_change.py", {"num-inference-steps": 8}),
    "denoisers": ("benchmarks/denoisers.py", {}),
    "cold_start": ("benchmarks/cold_start.py", {}),
    "cpu": ("benchmarks/cpu.py", {}),
    "scaling": ("benchmarks/scaling.py", {}),
    "memory": ("benchmarks/memory.py", {}),
    "modelling_time": ("benchmarks/modelling_time.py", {"chart": ROOT / "docs" / "modelling_time.png"}),
    "streaming_decode_glibc": ("benchmarks/streaming_decode.py", {"allocator": "glibc"}),
}
"""The script and the settings that write each file of docs/results/."""
ELSEWHERE = ("cpu_avx512", "gpu", "modelling_time_longer", "few_steps", "few_steps_variants", "rollout_speed")
"""Files of docs/results/ that were measured on other machines, with benchmarks/cpu.py and benchmarks/gpu.py, or with
options that their page has.
"""
PICTURES = {
    "animation": ("examples/gallery.py", ROOT / "docs" / "shapes-64.gif"),
    "picture": ("examples/strip.py", ROOT / "docs" / "shapes-64.png"),
}


def main() -> None:
    """Repeats the chosen measurements, then writes or checks the pages."""
    names = [*MEASUREMENTS, *PICTURES]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", nargs="*", choices=names, metavar="NAME")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a page differs from the results")
    args = parser.parse_args()
    if args.measure is not None:
        for name in args.measure or names:
            if name in PICTURES:
                script, path = PICTURES[name]
                launch(script, {}, path)
            else:
                script, settings = MEASUREMENTS[name]
                launch(script, settings | {"output": RESULTS / f"{name}.json"})
    measured = {name: json.loads((RESULTS / f"{name}.json").read_text()) for name in (*MEASUREMENTS, *ELSEWHERE)}
    for path, written in pages(measured).items():
        if not args.check:
            path.write_text(written)
        elif path.read_text() != written:
            sys.exit(f"{path.name} differs from docs/results/*.json: run python benchmarks/readme.py")


def pages(measured: dict[str, Any]) -> dict[Path, str]:
    """The text of each page with its tables."""
    tables = {
        README: {"summary": summary(measured)},
        PAGE: {
            "shapes": shapes(measured),
            "known frames": known_frames(measured),
            "rollout": rollout(measured["rollout"], measured["rollout_unet"]),
            "prompt change": prompt_change(measured["prompt_change"]),
            "denoisers": denoisers(measured["denoisers"]),
            "costs": costs(measured),
            "machine": machine(measured["cpu"]["machine"]),
            "cpu": comparisons(measured["cpu"]),
            "machine with AVX512": machine(measured["cpu_avx512"]["machine"]),
            "cpu with AVX512": comparisons(measured["cpu_avx512"]),
            "gpu": gpu(measured["gpu"]),
        },
        CLUSTERS: {"scaling": scaling(measured["scaling"])},
        MEMORY: {"memory": memory(measured["memory"])},
        FEW_STEPS: {
            "few steps": few_steps(measured["few_steps"]),
            "few steps, variants": few_steps(measured["few_steps_variants"]),
            "rollout speed": rollout_speed(measured["rollout_speed"]),
        },
        MODELLING_TIME: {
            "modelling time": modelling_time(measured["modelling_time"]),
            "longer": longer(measured["modelling_time"], measured["modelling_time_longer"]),
        },
    }
    texts = {}
    for path, named in tables.items():
        texts[path] = path.read_text()
        for name, rows in named.items():
            texts[path] = put(texts[path], name, rows)
    return texts


def put(text: str, name: str, rows: list[list[str]]) -> str:
    """Replaces the table between the marks of that name; its first row is the header.

    Raises:
        ValueError: The text does not have exactly one such pair of marks.
    """
    lines = [f"| {' | '.join(row)} |".replace("|  |", "| |").replace("|  |", "| |") for row in rows]
    lines.insert(1, "|" + " --- |" * len(rows[0]))
    table = "\n".join(lines)
    after, count = re.subn(
        rf"(<!-- table: {name} -->\n).*?(<!-- end -->)",
        lambda match: f"{match[1]}{table}\n{match[2]}",
        text,
        flags=re.S,
    )
    if count != 1:
        raise ValueError(f"expected one place for the table {name!r}, got {count}")
    return after


def summary(measured: dict[str, Any]) -> list[list[str]]:
    """The rows of the README's table."""
    suffixes = ("", "_unet")  # of the Transformer's files and the U-Net's
    scores = [measured[f"shapes{suffix}"] for suffix in suffixes]
    known = [measured[f"known_frames_prompted{suffix}"] for suffix in suffixes]
    rolled = [measured[f"rollout{suffix}"]["defaults"] for suffix in suffixes]
    costs = [measured["denoisers"][name] for name in (TRANSFORMER, UNET)]

    def correct(split: str) -> list[str]:
        return [f"{100 * score[f'{split}, 2 object(s), generated, full']['correct']:.1f}%" for score in scores]

    def median(task: str) -> list[str]:
        return [f"{row[f'{task}, the model']['median psnr']:.1f} dB" for row in known]

    return [
        ["", f"`{TRANSFORMER}`", f"`{UNET}`"],
        ["text to video, all objects correct", *correct("train")],
        ["the same, combinations absent from training", *correct("held_out")],
        ["prediction from 5 frames and a caption, PSNR", *median("prediction, 5 known")],
        ["interpolation, every 8th frame and a caption given, PSNR", *median("interpolation, every 8th known")],
        ["rollout, object still correct after 272 frames", *(f"{100 * row['correct at end']:.0f}%" for row in rolled)],
        ["parameters of the denoiser", *(f"{row['parameters'] / 1e6:.1f}M" for row in costs)],
        ["time for a video of 17 frames, 20 steps", *(f"{row['video seconds']:.2f} s" for row in costs)],
    ]


def shapes(measured: dict[str, Any]) -> list[list[str]]:
    """How many videos show what their prompts say."""
    columns = {
        "VAE only (upper bound)": ("shapes", "VAE reconstruction"),
        "Transformer": ("shapes", "generated, full"),
        "Transformer, causal": ("shapes", "generated, causal"),
        "U-Net": ("shapes_unet", "generated, full"),
        "U-Net, causal": ("shapes_unet", "generated, causal"),
    }
    rows = [["combinations", "objects", *columns, "target"]]
    for split, name, target in (
        ("train", "in training", "90% (U-Net 85%)"),
        ("held_out", "not in training", "75%"),
    ):
        for count in (2, 1):
            correct = [
                f"{100 * measured[results][f'{split}, {count} object(s), {videos}']['correct']:.1f}%"
                for results, videos in columns.values()
            ]
            rows.append([name, "1 or 2" if count == 2 else "1", *correct, target if count == 2 else ""])
    return rows


def known_frames(measured: dict[str, Any]) -> list[list[str]]:
    """Median PSNR and mean SSIM of each method."""
    plain = measured["known_frames"]
    baselines = ["copy of the last frame", "ConvLSTM", "linear blend", "optical flow (DIS)", "VAE only (upper bound)"]
    models = {
        "known_frames": "Transformer",
        "known_frames_prompted": "Transformer, caption",
        "known_frames_unet": "U-Net",
        "known_frames_prompted_unet": "U-Net, caption",
    }
    rows = [["task", *models.values(), *baselines]]
    for task in dict.fromkeys(name.rpartition(", ")[0] for name in plain):
        scores = [measured[name][f"{task}, the model"] for name in models]
        scores += [plain.get(f"{task}, {name}") for name in baselines]
        cells = ["" if row is None else f"{row['median psnr']:.2f} / {row['ssim']:.3f}" for row in scores]
        rows.append([task, *cells])
    return rows


ROLLOUTS = {
    "defaults, these prompts": "defaults, first 24 prompts",
    "chunks of 2": "`chunk_size=2`",
    "sink off": "`sink=0`",
    "window 2": "`window=2`",
    "history noise 0.1": "`history_noise=0.1`",
    "history noise 0.2": "`history_noise=0.2`",
    "history guidance 1.5": "`history_guidance_scale=1.5`",
    "coarse to fine, 4": "`keyframe_interval=4`",
}
"""Names in the table of the rows of benchmarks/rollout.py."""


def rollout(measured: dict[str, Any], unet: dict[str, Any]) -> list[list[str]]:
    """Quality over the length of a rollout."""
    shares = {
        "correct at start": "start",
        "motion at start": "motion",
        "correct windows": "all windows",
        "correct at end": "end",
        "retained": "retained",
    }
    rows = [["rollout", "prompts", *shares.values(), "brightness", "contrast", "seam ratio"]]
    for name, row in [*measured.items(), ("U-Net, defaults", unet["defaults"])]:
        if isinstance(row, dict) and "correct at start" in row:
            correct = [f"{100 * row[part]:.0f}%" if part in row else "" for part in shares]
            slopes = [f"{row[part]:+.4f}" for part in ("brightness", "contrast")]
            cells = [f"{row['prompts']:.0f}", *correct, *slopes, f"{row['seam ratio']:.2f}"]
            rows.append([ROLLOUTS.get(name, name), *cells])
    return rows


PROMPT_CHANGES = {
    "recompute": "`prompt_change=recompute`",
    "defaults": "`prompt_change=redraw` (default)",
    "redraw 0.6": "`prompt_change_strength=0.6`",
    "cut": "`prompt_change=cut`",
}
"""Names in the table of the rows of benchmarks/prompt_change.py."""


def prompt_change(measured: dict[str, Any]) -> list[list[str]]:
    """How often a new prompt is obeyed."""
    shares = ("color", "shape", "object", "motion", "all", "continues")
    rows = [["rollout", "changes", *shares, "jump, pixels"]]
    for name, row in measured.items():
        cells = [f"{100 * row[part]:.0f}%" if part in row else "" for part in shares]
        jump = f"{row['jump']:.1f}" if "jump" in row else ""
        rows.append([PROMPT_CHANGES.get(name, name), f"{row['changes']:.0f}", *cells, jump])
    return rows


def denoisers(measured: dict[str, Any]) -> list[list[str]]:
    """Parameters, FLOPs and time of the shipped denoisers."""
    rows = [["checkpoint", "parameters", "FLOPs", "step, s", "video, s"]]
    for name, row in measured.items():
        cost = [f"{row['parameters'] / 1e6:.1f}M", f"{row['flops'] / 1e9:.1f}G"]
        rows.append([f"`{name}`", *cost, f"{row['step seconds']:.3f}", f"{row['video seconds']:.2f}"])
    return rows


def memory(measured: dict[str, Any]) -> list[list[str]]:
    """Memory of the presets of public models, and the smallest cards that have it."""
    cards = (6, 8, 12, 16, 24, 32, 48, 80)
    names = ("weights", "denoiser", "decoder", "resident", "model_offloading", "smallest")
    heads = ("weights", "denoiser", "decoder", "all on the GPU", "one network at a time", "one block, tiling")
    rows = [["preset", *heads, "cards"]]
    for model, row in measured.items():
        least = [next((f"{card}" for card in cards if card > row[name] + 1), "more than 80") for name in names[3:]]
        rows.append([f"`{model}`", *(f"{row[name]:.1f}" for name in names), " / ".join(least)])
    return rows


def few_steps(measured: dict[str, Any]) -> list[list[str]]:
    """Quality by model and number of steps, with standard errors."""
    shares = {
        "adherence, seen": "seen",
        "adherence, new": "new",
        "adherence, causal": "causal",
        "start": "start",
        "end": "end",
        "motion energy": "motion energy",
        "diversity": "diversity",
    }
    decibels = ("prediction", "interpolation")
    rows = [["model", *list(shares.values())[:3], *decibels, *list(shares.values())[3:]]]
    for name, row in measured.items():
        percent = [
            f"{100 * row[part]['value']:.0f}% ± {100 * row[part]['error']:.0f}" if part in row else ""
            for part in shares
        ]
        known = [f"{row[part]['value']:.1f} ± {row[part]['error']:.1f}" if part in row else "" for part in decibels]
        rows.append([name.replace(" 1 steps", " 1 step"), *percent[:3], *known, *percent[3:]])
    return rows


def rollout_speed(measured: dict[str, Any]) -> list[list[str]]:
    """Frames per second of rollouts by variant."""
    variants = {name: row for name, row in measured.items() if name not in ("machine", "long")}
    counts = list(next(iter(variants.values())))
    rows = [["variant", *(f"{count} step{'s' * (count != '1')}" for count in counts), "first frame"]]
    for name, row in variants.items():
        rates = [f"{row[count]['frames/s']:.0f}" if count in row else "" for count in counts]
        rows.append([name, *rates, f"{min(one['first'] for one in row.values()):.2f} s"])
    return rows


def modelling_time(measured: dict[str, Any]) -> list[list[str]]:
    """Accuracies and costs of the recognizers."""
    entries = measured["entries"]
    tasks = list(next(iter(entries.values()))["accuracy"])
    rows = [["network", *tasks, "steps", "parameters", "FLOPs per clip", "ms per clip", "ms per new frame", "MiB"]]
    for name, row in entries.items():
        steps = sorted(row["steps"].values())
        rows.append([
            f"`{name}`",
            *(f"{row['accuracy'][task]:.1%}" for task in tasks),
            f"{steps[0]:,} to {steps[-1]:,}",
            f"{row['parameters'] / 1e6:.2f}M",
            f"{row['flops per clip'] / 1e9:.2f}G",
            f"{row['milliseconds per clip']:.1f}",
            f"{row['milliseconds per new frame']:.1f}" + ("" if row["streams"] else " (whole clip)"),
            f"{row['MiB']:.0f}",
        ])  # fmt: skip
    return rows


def longer(short: dict[str, Any], measured: dict[str, Any]) -> list[list[str]]:
    """Accuracies of some recognizers after a longer training."""
    times = [f"after {one['settings']['seconds']:.0f} s" for one in (short, measured)]
    rows = [["network", "task", *times, "steps"]]
    for name, row in measured["entries"].items():
        before = short["entries"][name]["accuracy"]
        rows += [
            [f"`{name}`", task, f"{before[task]:.1%}", f"{accuracy:.1%}", f"{row['steps'][task]:,}"]
            for task, accuracy in row["accuracy"].items()
        ]
    return rows


def costs(measured: dict[str, Any]) -> list[list[str]]:
    """Time, memory and reconstruction quality, next to their targets."""
    rolled = measured["rollout"]
    chunk, memory = rolled["seconds a chunk"], rolled["memory, MiB"]
    targets = {
        'python -c "import vgen"': "0.3 s",
        "vgen --help": "0.5 s",
        "vgen predict nosuch.mp4": "0.5 s",
        "vgen generate": "3.5 s",
    }
    rows = [["measurement", "value", "target", "command"]]
    rows += [
        [f"`{name}`", f"{row['seconds']:.2f} s, {row['MiB']:.0f} MiB", targets.get(name, ""), command("cold_start")]
        for name, row in measured["cold_start"].items()
    ]
    rows += [
        ["VAE, mean PSNR of 256 new clips", f"{measured['shapes']['psnr']:.2f} dB", "34 dB", command("shapes")],
        [
            "rollout: time of a chunk 200 chunks after the window was full, relative to just after it was full",
            f"{chunk['ratio']:.2f} ({chunk['200 chunks later']:.3f} s)",
            "1.05",
            command("rollout"),
        ],
        [
            "rollout: peak memory of 1,000 chunks relative to 50",
            f"{memory['1000'] / memory['50']:.2f} ({memory['1000']:.1f} and {memory['50']:.1f} MiB)",
            "1.02",
            command("rollout"),
        ],
        [
            "rollout: time of a step without the KV cache relative to one with it",
            f"{rolled['speed-up of the cache']:.1f}",
            "",
            command("rollout"),
        ],
    ]
    default, glibc = measured["cpu"]["streamed decoding"], measured["streaming_decode_glibc"]
    for name, setting, row in (("cpu", "", default), ("streaming_decode_glibc", ", glibc's default malloc", glibc)):
        short, long = (row[length] for length in ("17", "257"))
        rows.append(
            [
                f"streamed decoding: peak memory of 257 frames relative to 17{setting}",
                f"{long / short:.2f} ({long:.0f} and {short:.0f} MiB)",
                "" if setting else "1.05",
                command(name),
            ]
        )
    same = "largest difference from `AutoencoderKLWan` and `WanTransformer3DModel` with the same weights"
    return [*rows, [same, "at most 1e-4", "1e-4", "`pytest tests/models`"]]


def machine(measured: dict[str, Any]) -> list[list[str]]:
    """What the numbers of benchmarks/cpu.py depend on."""
    speed = ", ".join(f"{name} {value:.3g}" for name, value in measured["matrix products in TFLOPS"].items())
    cells = {**measured, "instructions": ", ".join(measured["instructions"]), "matrix products in TFLOPS": speed}
    return [[*cells], [str(cell) for cell in cells.values()]]


def comparisons(measured: dict[str, Any]) -> list[list[str]]:
    """Time and memory relative to diffusers, and of frame groups relative to one call with a mask."""
    rows = [["work", "vgen, s", "the other, s", "time, ratio", "memory, ratio"]]
    for name in ("transformer", "vae", "unet", "frame groups"):
        for case, row in measured[name].items():
            seconds = [f"{row['ours']:.3f}", f"{row['theirs']:.3f}"]
            rows.append([f"{name}: {case}", *seconds, f"{row['time']:.2f}", f"{row['memory']:.2f}"])
    return rows


def gpu(measured: dict[str, Any]) -> list[list[str]]:
    """What benchmarks/gpu.py measured."""
    formats = {"seconds": ".4f", "MiB": ",.0f", "frames/s": ".1f", "clips/s": ".0f", "MFU": ".1%"}
    rows = [["work", *formats]]
    for section in ("VAE", "Transformer", "rollout", "training"):
        for case, row in measured[section].items():
            cells = [format(row[column], form) if column in row else "" for column, form in formats.items()]
            rows.append([f"{section}: {case}", *cells])
    return rows


def scaling(measured: dict[str, Any]) -> list[list[str]]:
    """Compute, messages and the bounds of the efficiency by number of GPUs."""
    found = {name: row for name, row in measured.items() if name != "assumptions"}
    counts = next(iter(found.values()))["GPUs"]
    rows = [["network and strategy", "compute, s", "messages, GB", *(f"{count} GPUs" for count in counts)]]
    for name, row in found.items():
        size = sum(message["size"] for message in row["messages"]) / 1e9
        bounds = [[f"{100 * share:.1f}%" for share in row["GPUs"][count]["efficiency"].values()] for count in counts]
        rows.append([name, f"{row['compute seconds']:.3f}", f"{size:.3f}", *(" to ".join(pair) for pair in bounds)])
    return rows


def command(name: str) -> str:
    """The command that repeats a measurement."""
    script, settings = MEASUREMENTS[name]
    words = [word for key, value in settings.items() for word in (f"--{key}", value) if word is not None]
    return f"`python {' '.join(map(str, [script, *words]))}`"


if __name__ == "__main__":
    main()
