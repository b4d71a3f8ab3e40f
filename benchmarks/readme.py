"""The README's tables and picture: measured, and written from the numbers that docs/results/ keeps.

python benchmarks/readme.py                        write the tables from docs/results/*.json
python benchmarks/readme.py --measure              first measure everything again (hours on a CPU)
python benchmarks/readme.py --measure shapes       first measure that again
python benchmarks/readme.py --check                fail where the README says something else
"""

import argparse
import json
import re
import sys
from typing import Any

from scripts import ROOT, launch

README = ROOT / "README.md"
RESULTS = ROOT / "docs" / "results"
UNET = "vgen/shapes-64-unet"
MEASUREMENTS: dict[str, tuple[str, dict[str, Any]]] = {
    "shapes": ("benchmarks/shapes.py", {}),
    "known_frames": ("benchmarks/known_frames.py", {}),
    "known_frames_prompted": ("benchmarks/known_frames.py", {"prompted": None}),
    "rollout": ("benchmarks/rollout.py", {}),
    "shapes_unet": ("benchmarks/shapes.py", {"model": UNET}),
    "known_frames_unet": ("benchmarks/known_frames.py", {"model": UNET}),
    "known_frames_prompted_unet": ("benchmarks/known_frames.py", {"model": UNET, "prompted": None}),
    "rollout_unet": ("benchmarks/rollout.py", {"model": UNET, "measures": "defaults", "quality-only": None}),
    "denoisers": ("benchmarks/denoisers.py", {}),
    "cold_start": ("benchmarks/cold_start.py", {}),
    "streaming_decode": ("benchmarks/streaming_decode.py", {}),
    "streaming_decode_glibc": ("benchmarks/streaming_decode.py", {"mmap-threshold": 0}),
}
"""For each file of docs/results/, what writes it."""
PICTURE = ("examples/strip.py", ROOT / "docs" / "shapes-64.png")


def main() -> None:
    """Measures what is asked for, then writes or checks the README."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", nargs="*", choices=[*MEASUREMENTS, "picture"], metavar="NAME")
    parser.add_argument("--check", action="store_true", help="write nothing; fail where the README differs")
    args = parser.parse_args()
    if args.measure is not None:
        for name in args.measure or [*MEASUREMENTS, "picture"]:
            if name == "picture":
                launch(PICTURE[0], {}, PICTURE[1])
            else:
                script, settings = MEASUREMENTS[name]
                launch(script, settings | {"output": RESULTS / f"{name}.json"})
    measured = {name: json.loads((RESULTS / f"{name}.json").read_text()) for name in MEASUREMENTS}
    before = README.read_text()
    after = before
    for name, table in (
        ("shapes", shapes(measured)),
        ("known frames", known_frames(measured)),
        ("rollout", rollout(measured["rollout"], measured["rollout_unet"])),
        ("denoisers", denoisers(measured["denoisers"])),
        ("costs", costs(measured)),
    ):
        after = put(after, name, table)
    if args.check and after != before:
        sys.exit("the README's tables are not those of docs/results: run python benchmarks/readme.py")
    README.write_text(after)


def put(text: str, name: str, rows: list[list[str]]) -> str:
    """The text with the table of that name replaced; its first row is the header.

    Raises:
        ValueError: The text has no place for it, or several.
    """
    lines = [f"| {' | '.join(row)} |".replace("|  |", "| |").replace("|  |", "| |") for row in rows]
    lines.insert(1, "|" + " --- |" * len(rows[0]))
    table = "\n".join(lines)
    after, count = re.subn(
        rf"(<!-- table: {name} -->\n).*?(<!-- end -->)",
        lambda found: f"{found[1]}{table}\n{found[2]}",
        text,
        flags=re.S,
    )
    if count != 1:
        raise ValueError(f"{count} places for the table {name!r}")
    return after


def shapes(measured: dict[str, Any]) -> list[list[str]]:
    """How often videos show what their prompts say."""
    ways = {
        "VAE (ceiling)": ("shapes", "VAE reconstruction"),
        "Transformer": ("shapes", "generated, full"),
        "causal": ("shapes", "generated, causal"),
        "U-Net": ("shapes_unet", "generated, full"),
        "U-Net, causal": ("shapes_unet", "generated, causal"),
    }
    rows = [["combinations", "objects", *ways, "target"]]
    for split, name, target in (("train", "seen in training", "90%, U-Net 85%"), ("held_out", "never seen", "75%")):
        for count in (2, 1):
            right = [
                f"{100 * measured[results][f'{split}, {count} object(s), {made}']['right']:.1f}%"
                for results, made in ways.values()
            ]
            rows.append([name, "1 or 2" if count == 2 else "1", *right, target if count == 2 else ""])
    return rows


def known_frames(measured: dict[str, Any]) -> list[list[str]]:
    """Median PSNR and mean SSIM of each way."""
    plain = measured["known_frames"]
    ways = ["copy of the last frame", "ConvLSTM", "linear blend", "optical flow (DIS)", "ceiling: VAE alone"]
    models = {
        "known_frames": "Transformer",
        "known_frames_prompted": "with the caption",
        "known_frames_unet": "U-Net",
        "known_frames_prompted_unet": "U-Net, with the caption",
    }
    rows = [["task", *models.values(), *ways[:-1], "VAE alone (ceiling)"]]
    for task in dict.fromkeys(name.rpartition(", ")[0] for name in plain):
        found = [measured[name][f"{task}, the model"] for name in models]
        found += [plain.get(f"{task}, {way}") for way in ways]
        rows.append([task, *("" if one is None else f"{one['median psnr']:.2f} / {one['ssim']:.3f}" for one in found)])
    return rows


def rollout(measured: dict[str, Any], unet: dict[str, Any]) -> list[list[str]]:
    """What becomes of long rollouts."""
    shares = {
        "right at start": "right at the start",
        "motion at start": "its motion",
        "right windows": "all the time",
        "right at end": "at the end",
        "still right": "still right",
    }
    rows = [["", "prompts", *shares.values(), "brightness", "contrast", "seam ratio"]]
    for name, row in [*measured.items(), ("U-Net, defaults", unet["defaults"])]:
        if isinstance(row, dict) and "right at start" in row:
            right = [f"{100 * row[part]:.0f}%" if part in row else "" for part in shares]
            slopes = [f"{row[part]:+.4f}" for part in ("brightness", "contrast")]
            rows.append([name, f"{row['prompts']:.0f}", *right, *slopes, f"{row['seam ratio']:.2f}"])
    return rows


def denoisers(measured: dict[str, Any]) -> list[list[str]]:
    """What the shipped denoisers cost."""
    rows = [["", "parameters", "FLOPs of an evaluation", "seconds of an evaluation", "of a video"]]
    for name, row in measured.items():
        cost = [f"{row['parameters'] / 1e6:.1f}M", f"{row['flops'] / 1e9:.1f}G"]
        rows.append([f"`{name}`", *cost, f"{row['step seconds']:.3f}", f"{row['video seconds']:.2f}"])
    return rows


def costs(measured: dict[str, Any]) -> list[list[str]]:
    """Seconds, memory and quality beside their targets."""
    names = ('python -c "import vgen"', "vgen --help", "vgen generate")
    imported, helped, generated = (measured["cold_start"][name] for name in names)
    rolled = measured["rollout"]
    chunk, memory = rolled["seconds a chunk"], rolled["memory, MiB"]
    rows = [["measured on 2 CPU cores", "", "target", "command"]]
    rows += [
        ["VAE, mean PSNR of 256 fresh clips", f"{measured['shapes']['psnr']:.2f} dB", "34 dB", command("shapes")],
        [
            "`vgen generate`, cold start, defaults",
            f"{generated['seconds']:.1f} s, {generated['MiB']:.0f} MiB",
            "15 s, 2 GB",
            command("cold_start"),
        ],
        [f"`{names[0]}`", f"{imported['seconds']:.2f} s", "0.3 s", "the same"],
        [f"`{names[1]}`", f"{helped['seconds']:.2f} s", "1 s", "the same"],
        [
            "a chunk of a rollout, 2 steps: its time 200 chunks after the window was filled, over that just after",
            f"{chunk['ratio']:.2f} ({chunk['200 chunks later']:.3f} s)",
            "1.05",
            command("rollout"),
        ],
        [
            "rollout: peak memory after loading, of 1,000 chunks over 50, with `MALLOC_MMAP_THRESHOLD_=65536`",
            f"{memory['1000'] / memory['50']:.2f} ({memory['1000']:.1f} and {memory['50']:.1f} MiB)",
            "1.02",
            "the same",
        ],
        [
            "rollout: a step of a chunk that computes the window again, over one with the cache",
            f"{rolled['speed-up of the cache']:.1f}",
            "",
            "the same",
        ],
    ]
    for name, setting in (
        ("streaming_decode", "with `MALLOC_MMAP_THRESHOLD_=65536`"),
        ("streaming_decode_glibc", "with glibc's own settings"),
    ):
        short, long = (measured[name][length] for length in ("17", "257"))
        rows.append(
            [
                f"streamed decoding at 256x256: peak memory of 257 frames over 17, {setting}",
                f"{long / short:.2f} ({long:.0f} and {short:.0f} MiB)",
                "1.1" if name == "streaming_decode" else "",
                command(name),
            ]
        )
    same = "same weights as `AutoencoderKLWan` and `WanTransformer3DModel`"
    return [*rows, [same, "at most 1e-4 apart", "1e-4", "`pytest tests/models`"]]


def command(name: str) -> str:
    """What a reader types to measure it."""
    script, settings = MEASUREMENTS[name]
    words = [word for key, value in settings.items() for word in (f"--{key}", value) if word is not None]
    return f"`python {' '.join(map(str, [script, *words]))}`"


if __name__ == "__main__":
    main()
