"""The `vgen` command, as a user runs it."""

import contextlib
import inspect
import io
import json
import os
import pty
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from tests.data.test_video_io import encode, moving_pattern
from tests.test_pipeline import make_pipeline
from tests.warm import warm_python
from vgen import __version__, cli
from vgen.cli import EvaluationTask, app, main
from vgen.data.video_io import read_video, video_info, write_video
from vgen.hub import packaged_checkpoints
from vgen.pipeline import VideoGenPipeline
from vgen.tasks import evaluation
from vgen.tasks.information import describe_public

PROMPT = "a red circle moves right"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    make_pipeline().save_pretrained(folder)
    return str(folder)


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.mark.parametrize("name", ["video.mp4", "video.gif", "video.webp", "frames"])
def test_generate_writes_every_format(model, tmp_path, name):
    done = run("generate", PROMPT, "-o", tmp_path / name, "--model", model)
    assert done.exit_code == 0, done.output
    frames, _ = read_video(tmp_path / name)
    enlarged = name.endswith((".mp4", ".gif"))
    assert frames.shape == ((9, 256, 256, 3) if enlarged else (9, 16, 16, 3))
    assert ("9 frames, enlarged 16 times (--scale 1 keeps 16x16)" in done.stdout) == enlarged


def test_a_preview_is_shown_on_request(model, tmp_path, monkeypatch):
    monkeypatch.setenv("LINES", "25")
    shown, hidden = (
        run("generate", PROMPT, "--model", model, "-o", tmp_path / "a.mp4", "--overwrite", *extra).stdout.splitlines()
        for extra in (["--preview"], [])
    )
    assert len(hidden) == 1 and shown[-1] == hidden[-1] and hidden[-1].startswith("wrote ")
    # as large as 200 columns and 25 lines allow, without colors because the output is no terminal
    assert len(shown) == 24 and {len(line) for line in shown[:-1]} == {4 * 46 + 3}
    assert set("".join(shown[:-1])) <= set(" .:-=+*#%@")
    for command in ("generate", "animate", "predict", "interpolate", "rollout"):
        assert "preview" in inspect.signature(getattr(cli, command)).parameters


@pytest.mark.parametrize("way", ["default", "--no-preview", "NO_COLOR"])
def test_terminals_show_a_preview(model, tmp_path, way):
    environment = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
    environment |= {"TERM": "xterm-256color", "COLORTERM": "truecolor", "COLUMNS": "83", "LINES": "40"}
    environment |= {"NO_COLOR": "1"} if way == "NO_COLOR" else {}
    words = ["generate", PROMPT, "-o", tmp_path / "a.gif", "--model", model, *([way] if way[:2] == "--" else [])]
    terminal, other_end = pty.openpty()
    command = [warm_python(), "-m", "vgen.cli", *words]
    with subprocess.Popen(command, stdout=other_end, stderr=subprocess.PIPE, env=environment) as process:
        os.close(other_end)
        output = b""
        with contextlib.suppress(OSError):  # raised at the end of a terminal's output
            while part := os.read(terminal, 65536):
                output += part
        os.close(terminal)
        assert process.wait() == 0, process.stderr.read()
    lines = output.decode().splitlines()
    assert lines[-1].startswith("wrote ") and len(lines) == (1 if way == "--no-preview" else 11)
    assert ("\N{UPPER HALF BLOCK}" in lines[0]) == ("\x1b[38;2;" in lines[0]) == (way == "default")


def test_the_same_seed_gives_the_same_file(model, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run("generate", PROMPT, "-o", tmp_path / f"{name}.webp", "--model", model, "--seed", seed)
    a, b, c = ((tmp_path / f"{name}.webp").read_bytes() for name in "abc")
    assert a == b != c


def test_options_reach_the_pipeline(model, tmp_path):
    arguments = ("--num-frames", 5, "--height", 24, "--width", 8, "--steps", 1, "--guidance", 1, "--fps", 4)
    arguments += ("--scale", 1)
    done = run("generate", PROMPT, "-o", tmp_path / "v.mp4", "--model", model, "--groups", "causal", *arguments)
    assert done.exit_code == 0, done.output
    frames, rate = read_video(tmp_path / "v.mp4")
    assert frames.shape == (5, 24, 8, 3) and rate == pytest.approx(4)


@pytest.fixture(scope="module")
def able(tmp_path_factory):
    folder = tmp_path_factory.mktemp("able")
    make_pipeline(tasks=["text", "leading", "keyframes"], window=2, sink=1).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def clip(tmp_path):
    frames = np.random.default_rng(0).integers(0, 256, (6, 24, 40, 3), dtype=np.uint8)
    write_video(frames, tmp_path / "clip", frame_rate=4.0)
    return frames


def first_frame(folder, clip):
    Image.fromarray(clip[0, :16, :16]).save(folder / "first.png")
    return folder / "first.png"


def test_predict_continues_a_video_at_its_size_and_rate(able, tmp_path, clip):
    done = run("predict", tmp_path / "clip", "-o", tmp_path / "future", "--num-frames", 7, "--model", able)
    assert done.exit_code == 0, done.output
    frames, rate = read_video(tmp_path / "future")
    assert frames.shape == (7, 24, 24, 3) and rate == pytest.approx(4)
    assert done.stderr == "the central 24x24 of 40x24 is resized to 16x16 for the model; the output has 24x24\n"
    run("predict", tmp_path / "clip", "-o", tmp_path / "all", "--num-frames", 7, "--model", able, "--with-input")
    everything, _ = read_video(tmp_path / "all")
    assert np.array_equal(everything[:6], clip[:, :, 8:32]) and np.array_equal(everything[6:], frames)


def test_interpolate_keeps_the_frame_rate_without_fps(able, tmp_path, clip):
    for name, fps, arguments in (("slow", 4, []), ("smooth", 12, ["--fps", 12])):
        done = run("interpolate", tmp_path / "clip", "-o", tmp_path / name, "--factor", 3, "--model", able, *arguments)
        assert done.exit_code == 0, done.output
        frames, rate = read_video(tmp_path / name)
        assert frames.shape == (16, 24, 24, 3) and rate == pytest.approx(fps)


def test_rollout_writes_any_number_of_frames_and_changes_the_prompt(able, tmp_path):
    arguments = (PROMPT, "--num-frames", 11, "--model", able, "--guidance", 2)
    done = run("rollout", *arguments, "-o", tmp_path / "same")
    assert done.exit_code == 0 and done.stderr == ""
    run("rollout", *arguments, "-o", tmp_path / "changed", "--at", "5=a blue square")
    run("rollout", *arguments, "-o", tmp_path / "cut", "--at", "5=a blue square", "--prompt-change", "cut")
    same, changed, cut = (read_video(tmp_path / name)[0] for name in ("same", "changed", "cut"))
    assert same.shape == (11, 16, 16, 3) and np.array_equal(same[:5], changed[:5])
    assert np.array_equal(same[:5], cut[:5]) and not np.array_equal(changed, cut)


def test_rollout_continues_a_video_from_coarse_to_fine(able, tmp_path, clip):
    arguments = (
        "--video",
        tmp_path / "clip",
        "--num-frames",
        6,
        "--model",
        able,
        "--keyframe-interval",
        2,
        "--with-input",
    )
    for name, extra in (("plain", []), ("guided", ["--history-guidance", 2])):
        done = run("rollout", PROMPT, *arguments, *extra, "-o", tmp_path / name)
        assert done.exit_code == 0, done.output
    plain, guided = (read_video(tmp_path / name)[0] for name in ("plain", "guided"))
    assert plain.shape == (12, 24, 24, 3) and not np.array_equal(plain, guided)
    assert np.array_equal(plain[:6], clip[:, :, 8:32])


def test_rollout_options_set_the_context(able, tmp_path):
    options = {"chunk_size": 1, "window": 3, "sink": 0}
    words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", value)]
    words += ["--num-frames", 25, "--steps", 1, "--device", "cpu"]
    done = run("rollout", PROMPT, "--model", able, *words, "-o", tmp_path / "v")
    assert done.exit_code == 0, done.output
    pipe = VideoGenPipeline.from_pretrained(able)
    settings = {"num_frames": 25, "num_inference_steps": 1}
    with_options, without = (
        np.concatenate(list(pipe.rollout(PROMPT, generator=torch.Generator().manual_seed(0), **settings, **some)))
        for some in (options, {})
    )
    written, _ = read_video(tmp_path / "v")
    assert np.array_equal(written, with_options) and not np.array_equal(with_options, without)


@pytest.mark.parametrize("suffix", [".mp4", ".gif"])
def test_enlarged_videos_are_continued_at_their_own_size(able, tmp_path, suffix):
    clip = np.random.default_rng(0).integers(0, 256, (6, 16, 16, 3), dtype=np.uint8)
    write_video(clip, tmp_path / "clip")
    enlarged = tmp_path / f"enlarged{suffix}"
    write_video(clip, enlarged, scale=16)
    for name in ("clip", enlarged.name):
        options = ("--num-frames", 4, "--model", able, "--with-input", "--steps", 1)
        done = run("predict", tmp_path / name, "-o", tmp_path / f"{name}-out.mp4", *options)
        assert done.exit_code == 0 and done.stderr == "", done.output
        assert "enlarged 16 times" in done.stdout
    outputs = [read_video(tmp_path / f"{name}-out.mp4")[0].astype(int) for name in ("clip", enlarged.name)]
    assert outputs[0].shape == outputs[1].shape == (10, 256, 256, 3)
    assert np.abs(outputs[0] - outputs[1]).mean() < (2 if suffix == ".mp4" else 4)


def test_the_file_tells_how_it_was_made_and_info_prints_it(able, tmp_path, clip):
    runs = {
        "a.mp4": ("generate", PROMPT, "--num-frames", 5, "--seed", 7, "--steps", 3, "--dtype", "float32"),
        "b.gif": ("predict", tmp_path / "clip", "--num-frames", 4, "--seed", 8, "--steps", 1, "--sink", 0),
        "c": ("interpolate", tmp_path / "clip", "--factor", 3, "--seed", 9, "--steps", 1),
        "d.mp4": ("rollout", PROMPT, "--num-frames", 4, "--at", "2=a blue square", "--steps", 1),
    }
    expected = {
        "a.mp4": {"task": "generation", "prompt": PROMPT, "num_frames": 5, "seed": 7, "num_inference_steps": 3,
                  "guidance_scale": 3.0, "height": 16},
        "b.gif": {"task": "prediction", "video": "clip", "seed": 8, "sink": 0, "window": 2, "guidance_scale": 1.0},
        "c": {"task": "interpolation", "factor": 3, "frame_rate": 4.0},
        "d.mp4": {"task": "rollout", "prompt": {"0": PROMPT, "2": "a blue square"}, "num_frames": 4},
    }  # fmt: skip
    for name, words in runs.items():
        done = run(*words, "-o", tmp_path / name, "--model", able)
        assert done.exit_code == 0, done.output
        stored = video_info(tmp_path / name).metadata
        assert stored["model"] == able and stored["vgen"] == __version__
        assert {key: stored[key] for key in expected[name]} == expected[name]
        told = run("info", tmp_path / name)
        assert told.exit_code == 0, told.output
        for word in (*expected[name], __version__, "frames"):
            assert str(word) in told.stdout


def test_info_of_a_video_of_another_program(tmp_path):
    encode(tmp_path / "video.mkv", moving_pattern(17, 32, 32), rate=25)
    done = run("info", tmp_path / "video.mkv")
    assert done.exit_code == 0 and "17 frames" in done.stdout and "not stored" in done.stdout
    assert run("info", tmp_path / "nosuch.mp4").exit_code == 2
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    assert run("info", tmp_path / "broken.mp4").exit_code == 2


def test_animate_begins_with_the_image(able, tmp_path, clip):
    done = run("animate", first_frame(tmp_path, clip), PROMPT, "-o", tmp_path / "video", "--model", able)
    assert done.exit_code == 0, done.output
    frames, _ = read_video(tmp_path / "video")
    assert frames.shape == (9, 16, 16, 3) and np.array_equal(frames[0], clip[0, :16, :16])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["predict", "clip", "--model", "poor"], "trained for leading"),
        (["predict", "nothing.mp4"], "nothing.mp4"),
        (["predict", "clip", "--num-frames", 0], "num_frames must be an integer of at least 1"),
        (["interpolate", "clip", "--factor", 1], "factor must be an integer of at least 2, got 1"),
        (["interpolate", "clip", "--model", "poor"], "trained for keyframes and leading"),
        (["rollout", PROMPT, "--at", "soon"], "FRAME=PROMPT"),
        (["rollout", PROMPT, "--with-input"], "--with-input needs --video"),
        (["animate", "text.png", PROMPT], "not an image"),
        (["animate", "nothing.png", PROMPT], "nothing.png"),
    ],
)
def test_mistakes_with_known_frames_print_one_line(able, model, tmp_path, clip, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.png").write_text("not pixels")
    arguments = [model if word == "poor" else word for word in arguments]
    chosen = [] if "--model" in arguments else ["--model", able]
    done = run(*arguments, "-o", "out.mp4", *chosen)
    errors = [line for line in done.stderr.splitlines() if "for the model" not in line]
    assert done.exit_code == 2 and len(errors) == 1 and message in errors[0]
    assert not (tmp_path / "out.mp4").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num-frames", 8], "nearest: 9"),
        (["--model", "vgen/nothing"], "no model"),
        (["--steps", 0], "num_inference_steps"),
        (["--fps", 0], "fps must be"),
        (["--device", "nonsense"], "--device nonsense is not available"),
        (["--output", "video.xyz"], ".xyz"),
        (["--output", "no/such/folder/video.mp4"], "does not exist"),
        (["--output", "taken.mp4"], "exists already"),
    ],
)
def test_a_mistake_prints_one_line_and_exits_with_two(model, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken.mp4").write_bytes(b"precious")
    options = {"--output": "video.mp4", "--model": model} | dict(zip(arguments[::2], arguments[1::2], strict=True))
    done = run("generate", PROMPT, *(part for option in options.items() for part in option))
    assert done.exit_code == 2
    assert message in done.stderr and done.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["taken.mp4"]
    assert (tmp_path / "taken.mp4").read_bytes() == b"precious"


def test_overwrite_replaces(model, tmp_path):
    (tmp_path / "taken.mp4").write_bytes(b"old")
    done = run("generate", PROMPT, "-o", tmp_path / "taken.mp4", "--model", model, "--overwrite")
    assert done.exit_code == 0 and len(read_video(tmp_path / "taken.mp4")[0]) == 9


def test_anomaly_plots_and_prints_every_score(able, tmp_path, clip):
    done = run("anomaly", tmp_path / "clip", "-o", tmp_path / "plot.png", "--model", able, "--steps", 1, "--json")
    assert done.exit_code == 0, done.output
    scores = json.loads(done.stdout)["scores"]
    assert scores[:5] == [None] * 5 and all(score > 0 for score in scores[5:]) and len(scores) == len(clip)
    with Image.open(tmp_path / "plot.png") as plot:
        assert plot.width > 300


def test_info_of_a_recognizer():
    done = run("info", "vgen/shapes-64-recognizer")
    assert done.exit_code == 0, done.output
    for text in ("red circle", "num_frames", "multi_label"):
        assert text in done.stdout


def test_info_shows_and_explains_defaults_capabilities_and_sizes(model):
    done = run("info", model)
    assert done.exit_code == 0
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in done.stdout.splitlines() if "│" in line]
    rows = {name: (value, meaning) for name, value, meaning in rows}
    assert rows["num_frames"][0] == "9" and rows["group_modes"][0] == "full, causal, chunk"
    assert rows["vae"][0].startswith("CausalVideoVAE, 0.") and rows["vae"][0].endswith("M parameters")
    assert "rollout_defaults" not in rows and rows["trained_frame_rates"][0] == "None"
    assert all(meaning and len(meaning) < 120 for _, meaning in rows.values())


@pytest.mark.parametrize("name", ["vgen/shapes-64", "vgen/shapes-64-unet"])
def test_info_shows_the_frame_rates_of_the_recipe(name):
    line = next(line for line in run("info", name).output.splitlines() if "trained_frame_rates" in line)
    assert "2.0, 32.0" in line


def test_info_shows_rollout_defaults(tmp_path):
    pipe = make_pipeline()
    pipe.register_to_config(rollout_defaults={"history_noise": 0.25})
    pipe.save_pretrained(tmp_path)
    assert '{"history_noise": 0.25}' in run("info", str(tmp_path)).output


def test_models_lists_what_ships():
    done = run("models")
    assert done.exit_code == 0, done.output
    for name in packaged_checkpoints():
        [line] = [line for line in done.stdout.splitlines() if f" {name} " in line]
        for word in ("text to video", "interpolation", "64x64, 8 fps", "17, at most 33", "colored shapes", " MB"):
            assert word in line


def test_models_lists_public_presets():
    lines = run("models").stdout.splitlines()
    for row in describe_public():
        assert any(all(cell in line for cell in row) for line in lines)


@pytest.mark.parametrize("words", [[], ["generate"], ["models"], ["data"], ["data", "validate"]])
def test_help_has_a_short_flag(words):
    done = run(*words, "-h")
    assert done.exit_code == 0 and "Usage:" in done.stdout


def test_a_folder_of_videos_is_validated(tmp_path):
    for name, count in (("long.mp4", 40), ("short.mp4", 9)):
        frames = np.random.default_rng(0).integers(0, 256, (count, 32, 48, 3), dtype=np.uint8)
        write_video(frames, tmp_path / name, frame_rate=8.0)
    whole = (tmp_path / "long.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "long.txt").write_text("noise")
    sizes = ["--bucket", "17x64x64", "--bucket", "17x64x96", "--batch-size", "1"]
    done = run("data", "validate", tmp_path, *sizes)
    assert done.exit_code == 0, done.output
    assert "long.mp4: 40 frames of 48x32, valid length 37, 2 clips of 17x64x96" in done.output
    assert "short.mp4: skipped: 9 frames; the shortest clip needs 17; the nearest valid length is 9" in done.output
    assert "cut.mp4: skipped: " in done.output
    assert "17x64x96: 2 clips, 2 batches of 1, 1.195 MiB of pixels each" in done.output
    assert "1 videos are usable, 2 are not, 2 have no caption" in done.output
    report = json.loads(run("data", "validate", tmp_path, *sizes, "--frame-rate", "4", "--json").stdout)
    assert {Path(clip["path"]).name: clip["num_frames"] for clip in report["clips"] if clip["accepted"]} == {
        "long.mp4": 20
    }
    assert report["buckets"]["17x64x96"] == {"clips": 1, "batches": 1, "batch_mib": 1.195}
    lengths = {Path(clip["path"]).name: clip["nearest_length"] for clip in report["clips"]}
    assert lengths == {"long.mp4": 17, "short.mp4": 5, "cut.mp4": None}
    for options, clips in (
        (("--hop", 3), 8), (("--stride", 2), 1), (("--stride", 3), 0), (("--short", "pad"), 3),
        (("--stride", 2, "--hop", 1), 8), (("--stride", 3, "--short", "pad"), 2),
    ):  # fmt: skip
        report = json.loads(run("data", "validate", tmp_path, *sizes, "--json", *options).stdout)
        assert sum(one["clips"] for one in report["buckets"].values()) == clips, options
    assert run("data", "validate", tmp_path, "--short", "loop").exit_code == 2


def test_folders_without_usable_videos_and_invalid_buckets_are_errors(tmp_path):
    assert run("data", "validate", tmp_path).exit_code == 2
    (tmp_path / "empty.mp4").write_bytes(b"")
    assert run("data", "validate", tmp_path).exit_code == 1
    assert run("data", "validate", tmp_path, "--bucket", "17x64").exit_code == 2
    done = run("data", "validate", tmp_path, "--bucket", "18x64x64")
    assert done.exit_code == 2 and "--bucket must have 4*k + 1 frames, got 18x64x64 (nearest: 17)" in done.stderr


def test_evaluate_takes_the_tasks_of_the_evaluation():
    assert [one.value for one in EvaluationTask] == list(get_args(evaluation.Task))
    done = run("evaluate", "vgen/shapes-64", "-o", "folder", "--task", "prophecy")
    assert done.exit_code == 2 and "'--task'" in done.stderr and "prophecy" in done.stderr


MISTAKES = {
    "generate ok -o video.txt": "the suffix must be .mp4",
    "generate ok -o no/video.mp4": "does not exist",
    "generate ok -o there.mp4": "there.mp4 exists already",
    "generate ok -o video.mp4 --model nowhere": "no model 'nowhere'",
    "generate ok -o video.mp4 --steps 0": "num_inference_steps must be an integer of at least 1",
    "generate ok -o video.mp4 --height -8": "height must be an integer of at least 1",
    "generate ok -o video.mp4 --fps 0": "fps must be a finite number above 0",
    "generate ok -o video.mp4 --groups none": "--groups",
    "generate ok -o video.gif --pixel-format yuv444p": "pixel_format=yuv444p is for .mp4 files, got .gif",
    "animate nosuch.png ok -o video.mp4": "no such file: nosuch.png",
    "predict nosuch.mp4 -o video.mp4": "no such file or folder: nosuch.mp4",
    "predict script.py -o video.mp4": "script.py is not a supported video",
    "predict videos -o video.mp4": "frames; pass the videos in it, such as videos/a.mp4",
    "train nowhere": "there is no folder nowhere",
    "predict empty.mp4 -o video.mp4": "empty.mp4 is empty",
    "predict frames -o video.mp4 --window 0": "window must be an integer of at least 1, got 0",
    "predict frames -o video.mp4 --history-noise 2": "history_noise must be",
    "interpolate frames -o video.mp4 --factor 1": "factor must be an integer of at least 2, got 1",
    "interpolate nosuch.mp4 -o video.mp4": "no such file or folder",
    "rollout ok -o video.mp4 --at 5": "--at must be FRAME=PROMPT",
    "rollout ok -o video.mp4 --with-input": "--with-input needs --video",
    "rollout ok -o video.mp4 --num-frames 0": "num_frames must be an integer of at least 1",
    "rollout ok -o video.mp4 --video nosuch.mp4": "no such file or folder",
    "anomaly nosuch.mp4 -o plot.png": "no such file or folder",
    "anomaly frames -o plot.txt": "must be a .png, .svg or .pdf",
    "info nowhere": "no model 'nowhere'",
    "train frames --train-only lora": "needs a model to fine-tune: pass --from",
    "train frames --stage oven": "stage must be one of 'data', 'vae'",
    "train frames --set vae": "--set must be STAGE.NAME=VALUE",
}
TRY_ALL = """
import json, sys, time
from typer.testing import CliRunner
from vgen.cli import app
results = {}
for words in json.loads(sys.argv[1]):
    begin = time.process_time()  # without the time that other programs take
    done = CliRunner().invoke(app, words.split())
    results[words] = [done.exit_code, done.stderr, time.process_time() - begin, "torch" in sys.modules]
print(json.dumps(results))
"""


def test_mistakes_in_arguments_are_reported_before_torch_is_imported(tmp_path):
    for folder in ("frames", "videos"):
        (tmp_path / folder).mkdir()
    files = {"frames/1.png": "x", "videos/a.mp4": "x", "there.mp4": "x", "script.py": "x", "empty.mp4": ""}
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    command = [sys.executable, "-c", TRY_ALL, json.dumps(list(MISTAKES))]
    begin = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    results = json.loads(done.stdout)
    assert results.keys() == MISTAKES.keys()
    for words, (code, errors, seconds, imported) in results.items():
        assert code == 2 and MISTAKES[words] in errors and not imported, (words, errors)
        assert seconds < 0.5
    assert time.perf_counter() - begin < 5  # measured: 1 s with the interpreter's start


def test_import_and_help_load_nothing_heavy():
    code = "import sys, vgen, vgen.cli; print([m for m in ('torch', 'diffusers', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-m", "vgen.cli", "--help"], capture_output=True, check=True)
    assert time.perf_counter() - begin < 5  # measured: well under 1 s; the bound only catches a heavy import


def test_validation_counts_files_and_names_those_without_a_caption(tmp_path):
    for name in ("a", "b"):
        write_video(np.zeros((8, 16, 16, 3), dtype=np.uint8), tmp_path / f"{name}.mp4", frame_rate=8.0)
    rows = [{"file_name": "a.mp4", "text": "x", "start": start, "end": start + 0.2} for start in (0, 0.2, 0.4)]
    rows += [{"file_name": f"{name}.mp4", "text": ""} for name in ("b", "missing", "missing")]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    done = run("data", "validate", tmp_path, "--bucket", "5x16x16")
    assert "1 videos are usable, 2 are not, 2 have no caption" in done.output


def test_a_damaged_file_does_not_stop_the_validation(tmp_path):
    write_video(np.zeros((8, 16, 16, 3), dtype=np.uint8), tmp_path / "a.mp4", frame_rate=8.0)
    gif = bytearray(b"GIF89a" + struct.pack("<HH", 60_000, 60_000) + b"\0\0\0\x2c" + bytes(40) + b";")
    (tmp_path / "huge.gif").write_bytes(gif)
    (tmp_path / "list.mp4").write_text("ffconcat version 1.0\nfile a.mp4\n")
    os.mkfifo(tmp_path / "pipe.mp4")
    done = run("data", "validate", tmp_path, "--bucket", "5x16x16")
    assert done.exit_code == 0 and "1 videos are usable, 3 are not" in done.output
    assert "pipe.mp4: skipped: " in done.output and "is a pipe" in done.output


def test_a_name_that_is_no_unicode_can_be_printed(tmp_path, monkeypatch):
    write_video(np.zeros((8, 16, 16, 3), dtype=np.uint8), tmp_path / "a.mp4", frame_rate=8.0)
    os.rename(tmp_path / "a.mp4", os.fsencode(tmp_path) + b"/\xff.mp4")
    monkeypatch.setattr(sys, "argv", ["vgen", "data", "validate", str(tmp_path), "--bucket", "5x16x16"])
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "utf-8"))
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 0 and b"udcff.mp4: 8 frames" in sys.stdout.buffer.getvalue()


@pytest.mark.parametrize("text", [None, "{", "[" * 100_000, "[]", "\x00"])
def test_comparing_what_is_not_a_result_names_the_file(tmp_path, text):
    path = tmp_path / "results.json"
    if text is not None:
        path.write_text(text)
    done = run("compare", path, path)
    assert done.exit_code == 2 and done.stderr.startswith("vgen: ") and str(path) in done.stderr
    assert "Errno" not in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize("text", ["{}", '{"format": 1}', '{"format": "vgen-results-2", "suite": [], "settings": 1}'])
def test_comparing_malformed_results_prints_one_line(tmp_path, text):
    path = tmp_path / "results.json"
    path.write_text(text)
    done = run("compare", path, path)
    assert done.exit_code == 2 and "`vgen evaluate`" in done.stderr and done.stderr.count("\n") == 1
