"""What the pages tell the reader to type, run page by page: Python, and the commands at small size, on the CPU."""

import gzip
import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from accelerate.commands.launch import launch_command_parser
from PIL import Image
from typer.main import get_command

from tests.test_pipeline import make_pipeline
from tests.warm import warm_python
from vgen.cli import app
from vgen.data.video_io import write_video
from vgen.models.convert.presets import read_presets

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    *ROOT.glob("examples/*.md"),
]

# what a page's Python needs and does not make itself
PREPARED = {
    "docs/known_frames.md": """
        from vgen import VideoGenPipeline
        from vgen.data.video_io import VideoWriter, read_video
        pipe = VideoGenPipeline.from_pretrained("vgen/shapes-64")
        clip = read_video("clip.mp4")[0]
        first_frame, a, b, c = clip[0], clip[0], clip[7], clip[16]
        writer = VideoWriter("written.mp4", frame_rate=8.0)
    """,
    "docs/export.md": """
        from pathlib import Path
        from vgen import create_recognizer
        from vgen.tasks.export import recognizer_graph, write_onnx
        write_onnx(recognizer_graph(create_recognizer("frame_difference", 3, 8, 64)), Path("recognizer.onnx"))
    """,
}
EXPORTED = "takes a minute; tests/tasks/test_export.py exports smaller networks"
# shell commands that are not run, and why; those that need public weights are not run either
FINE_TUNED = "is run by tests/train/test_public_conditions.py with tiny networks"
ACTED = "is run by tests/train/test_actions.py with videos that have actions"
NOT_RUN = {
    "accelerate launch pipelines/encode_latents.py --data my-world --sampling sliding --vae runs/vae/vae "
    "--output_dir runs/world-latents": ACTED,
    "accelerate launch train/train_vdm.py --latents_dir runs/world-latents --vae runs/vae/vae --output_dir runs/world "
    '--model {"action_dim": 2, "action_frames": 4} --known {"none": 0.1, "leading": 0.9} --groups {"chunk": 1}': ACTED,
    "accelerate launch pipelines/encode_latents.py --data my-videos --vae MODEL --text_encoder MODEL "
    "--max_sequence_length 512 --num_frames 81 --height 480 --width 832 --frame_rates [16] --output_dir "
    "runs/latents": FINE_TUNED,
    "accelerate launch train/train_vdm.py --init MODEL --latents_dir runs/latents --output_dir runs/mine --train_only "
    'lora --groups {"full": 1} --gradient_checkpointing true': FINE_TUNED,
    "accelerate launch train/train_vae.py --distill vgen/shapes-64 --model "
    '{"decoder_channels": [48, 32, 16]} --max_steps 3000 --learning_rate 0.003 --latest_moment 36 --output_dir '
    "runs/tiny": "takes half an hour; tests/train/test_train_vae.py trains a smaller one",
    "pip install -c constraints.txt -e .": "needs a network, and .ci/run runs it",
    "pip install -c constraints.txt -e .[dev]": "needs a network, and .ci/run runs it",
    "pip install -c constraints.txt -e .[evaluation]": "needs a network",
    "pip install -c constraints.txt -e .[benchmarks,evaluation]": "needs a network",
    "pip install -c constraints.txt -e .[data,evaluation]": "needs a network",
    "pip install vgen[ray]": "needs a network",
    "pip install vgen[remote]": "needs a network",
    "python pipelines/predict.py --videos /shared/clips --output_dir /shared/futures --engine ray "
    "--ray_address auto": "needs a Ray cluster; tests/tasks/test_ray_engine.py runs such commands",
    "accelerate launch pipelines/predict.py --videos s3://bucket/clips --output_dir s3://bucket/futures": "needs S3; "
    "tests/io/test_remote.py has a local server",
    "vgen export runs/my-recognizer/recognizer recognizer.onnx": EXPORTED,
    "vgen export vgen/shapes-64 denoiser.onnx --part denoiser": EXPORTED,
    "vgen export vgen/shapes-64 decoder.onnx --part decoder": EXPORTED,
    "vgen export vgen/shapes-64 encoder.onnx --part encoder --stream": EXPORTED,
    "vgen watch 0 --model runs/my-recognizer/recognizer": "needs a camera; tests/tasks/test_classification.py has one",
    "pre-commit install": "changes the hooks of the repository",
    "bash .ci/run": "runs these tests",
    "python -m pytest -n auto --dist worksteal": "runs these tests",
    "sbatch train/cluster/slurm.sh train/train_vdm.py --config train/recipes/shapes-64.yaml": "needs Slurm",
    "kubectl apply -f train/cluster/kubernetes.yaml": "needs Kubernetes",
    "accelerate launch --config_file train/accelerate/several_machines.yaml --machine_rank 0 --main_process_ip "
    "10.0.0.1 train/train_vdm.py --config train/recipes/shapes-64.yaml": "is run by tests/train/test_machines.py",
    "vgen train my-videos": "is run by tests/tasks/test_project.py",
    "python examples/train_your_own.py runs/own": "is run by tests/test_examples.py",
    "pip install scikit-video": "needs a network",
}
TRAINING = "--max_steps 3 --batch_size 2 --warmup_steps 1 --log_every 1 --sample_every 3 --mixed_precision no"
# options that are added to the other commands, where they override earlier ones
SMALL = {
    "vgen generate": "--steps 2",
    "vgen animate": "--steps 1 --model tiny",
    "vgen predict": "--steps 1 --model tiny",
    "vgen interpolate": "--steps 1 --model tiny",
    "vgen rollout": "--steps 1 --model tiny --num-frames 24",
    "vgen evaluate": "--steps 1 --num-clips 2 --task prediction",
    "vgen classify": "",
    "vgen compare": "",
    "vgen data": "",
    "vgen label": "",
    "vgen doctor": "--no-benchmark",
    "pipelines/encode_latents.py": "--num_clips 4 --height 64 --width 64 --mixed_precision no",
    "pipelines/evaluate.py": "--num_inference_steps 1 --num_clips 2 --dtype float32 --tasks [prediction]",
    "pipelines/text_to_video.py": "--num_inference_steps 1 --model tiny",
    "pipelines/predict.py": "--num_inference_steps 1 --model tiny",
    "pipelines/interpolate.py": "--num_inference_steps 1 --model tiny",
    "pipelines/prepare_videos.py": "--num_frames 5",
    "pipelines/rollout.py": "--num_inference_steps 1 --model tiny --num_frames 24",
    "train/train_vae.py": f"{TRAINING} --compile false --image_steps 1 --image_batch_size 2 --num_score_clips 2 "
    "--num_calibration_clips 2 --model.base_dim 8",
    "train/train_text_encoder.py": f"{TRAINING} --num_score_captions 8 --optimizer adamw",
    "train/train_vdm.py": f"{TRAINING} --compile false --num_score_prompts 2 --defaults.num_inference_steps 1 "
    "--optimizer adamw",
    "train/distill.py": f"{TRAINING} --num_levels 4 --num_score_prompts 2 --num_inference_steps 1",
    "train/train_convlstm.py": f"{TRAINING} --num_score_clips 2 --model.channels [8]",
    "train/train_recognizer.py": f"{TRAINING} --test_clips 1 --model.channels [8]",
    "benchmarks/modelling_time.py": "--seconds 0.2 --entries single_frame --tasks color",
    "benchmarks/few_steps.py": "--parts adherence --num-prompts 1 --steps 1",
    "benchmarks/moving_mnist.py": "--vae-minutes 0 --minutes 0 --num-samples 1",
}

# links to what no command of a page makes
LINKS = {
    "docs/evaluation.md": {"runs/mine/pipeline": "../../tiny", "runs/another": "evaluation"},
    "docs/your_videos.md": {"my-videos": "clips", "FOLDER": ROOT / "vgen/checkpoints/shapes-64"},
}
# pages whose commands take seven seconds or more
SLOW = ("evaluation.md", "few_steps.md", "known_frames.md", "moving_mnist.md", "training.md", "your_videos.md")


def blocks(page, *languages):
    """The fenced blocks of a page in some languages."""
    fenced = re.findall(r"^```(\w*)[^\n]*\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    return [code for language, code in fenced if language in languages]


def commands(page):
    """The words of each command in the shell blocks of a page, also of those in one line."""
    for code in blocks(page, "sh", "bash", "console", "shell"):
        for line in code.replace("\\\n", " ").splitlines():
            lexer = shlex.shlex(line.removeprefix("$ "), posix=True, punctuation_chars="&|;")
            lexer.whitespace_split = True
            words = []
            for word in [*lexer, "&&"]:
                if set(word) <= set("&|;"):
                    if words:
                        yield words
                    words = []
                else:
                    words.append(word)


def name_of(page):
    return page.relative_to(ROOT).as_posix()


def needs_public_weights(words):
    """Whether a command downloads public weights, or uses those that another one made."""
    made = "--model" in words and words[words.index("--model") + 1] in read_presets()
    return words[0] == "hf" or made or any(word.startswith("Wan-AI/") for word in words)


def to_run(page):
    """The commands of a page that are not in `NOT_RUN` and need no public weights."""
    return [words for words in commands(page) if " ".join(words) not in NOT_RUN and not needs_public_weights(words)]


def run(*command, **options):
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "MPLBACKEND": "agg"}
    command = [warm_python(), *map(str, command)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, **options)
    assert done.returncode == 0, " ".join(command[1:]) + "\n" + done.stdout[-1000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture
def folder(tmp_path):
    """A folder with the files that snippets name."""
    frames = np.random.default_rng(0).integers(0, 256, (17, 8, 8, 3), dtype=np.uint8).repeat(8, 1).repeat(8, 2)
    write_video(frames, tmp_path / "clip.mp4", frame_rate=8.0)
    Image.fromarray(frames[0]).save(tmp_path / "first.png")
    return tmp_path


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A pipeline with tiny random networks that does every task."""
    path = tmp_path_factory.mktemp("tiny")
    make_pipeline(tasks=["text", "leading", "keyframes"], window=2, sink=1, chunk_size=2).save_pretrained(path)
    return path


@pytest.fixture
def checkout(folder, tiny, page, request):
    """A folder like a checkout, with the files that the commands of a page name and do not make."""
    for name in ("pipelines", "train"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "tiny").symlink_to(tiny)
    (folder / "clips").mkdir()
    for name in ("a", "b"):
        shutil.copy(folder / "clip.mp4", folder / "clips" / f"{name}.mp4")
        (folder / "clips" / f"{name}.txt").write_text("a red circle moves right")
    (folder / "prompts.txt").write_text("a red circle moves right\na blue square moves up\n")
    (folder / "prompts.jsonl").write_text('{"prompt": {"0": "a red circle moves right", "8": "a blue square"}}\n')
    for name, target in LINKS.get(name_of(page), {}).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(target)
    if page.name == "training.md":  # its Python makes what a command needs
        (folder / "stable-diffusion-folder").symlink_to(request.getfixturevalue("stable_diffusion"))
        run("-c", "\n".join(blocks(page, "python")), cwd=folder)
        index = folder / "runs/inflated/model_index.json"
        index.write_text(json.dumps(json.loads(index.read_text()) | {"num_inference_steps": 1}))
    if page.name == "recognition.md":
        for name in (
            "my-videos/run",
            "my-videos/sit",
            "my-test-videos/run",
            "my-test-videos/sit",
            "my-unlabeled-videos",
        ):
            (folder / name).mkdir(parents=True)
            shutil.copy(folder / "clip.mp4", folder / name)
    if page.name == "moving_mnist.md":
        prepare_moving_mnist(folder)
    if page.name in ("few_steps.md", "modelling_time.md"):
        shutil.copytree(ROOT / "benchmarks", folder / "benchmarks")
        (folder / "docs/results").mkdir(parents=True)
    return folder


def prepare_moving_mnist(folder):
    """Copies the benchmark, because it changes its checkout, and adds `SMALL` to the scripts that it runs."""
    digits = np.random.default_rng(0).integers(0, 256, 28 * 28, dtype=np.uint8).tobytes() * 10_000
    header = np.array([0x803, 10_000, 28, 28], dtype=">u4").tobytes()
    (folder / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(header + digits, compresslevel=1))
    shutil.copytree(ROOT / "benchmarks", folder / "benchmarks")
    (folder / "docs").mkdir()
    shutil.copy(ROOT / "docs/moving_mnist.md", folder / "docs")
    benchmark, scripts = folder / "benchmarks/moving_mnist.py", folder / "benchmarks/scripts.py"
    assert "TRIAL, WARM = 60, 20" in benchmark.read_text()
    benchmark.write_text(benchmark.read_text().replace("TRIAL, WARM = 60, 20", "TRIAL, WARM = 3, 1"))
    small = f"""
SMALL = {SMALL}

def launch(script, settings, *arguments, whole=launch):
    without_scores = ["--sample_every=99"] if "sample_every" in settings else []
    whole(script, settings, *arguments, *SMALL[script].split(), *without_scores)
"""
    scripts.write_text(scripts.read_text() + small)


def test_there_are_snippets():
    readme = ROOT / "README.md"
    assert blocks(readme, "python") and {"pip", "vgen"} <= {words[0] for words in commands(readme)}
    assert set(PREPARED) <= {name_of(page) for page in PAGES}


def pages_with_python():
    for page in PAGES:
        if blocks(page, "python"):
            marks = [pytest.mark.slow] if page.name == "known_frames.md" else []
            yield pytest.param(page, id=name_of(page), marks=marks)


@pytest.mark.parametrize("page", pages_with_python())
def test_the_python_of_a_page_runs_from_top_to_bottom(page, folder, request):
    if any("from_stable_diffusion(" in code for code in blocks(page, "python")):
        (folder / "stable-diffusion-folder").symlink_to(request.getfixturevalue("stable_diffusion"))
    prepared = "\n".join(line.strip() for line in PREPARED.get(name_of(page), "").splitlines())
    code = "\n".join([prepared, *blocks(page, "python")])
    code = re.sub(r"(VideoGenPipeline\.from_pretrained\(.*?)\)", r"\1, num_inference_steps=2)", code)
    before = set(folder.iterdir())
    run("-c", code, cwd=folder)
    if page.name == "README.md":
        assert ".mp4" in {path.suffix for path in set(folder.iterdir()) - before}


def pages_with_commands():
    for page in PAGES:
        if to_run(page):
            marks = [pytest.mark.slow] if page.name in SLOW else []
            yield pytest.param(page, id=name_of(page), marks=marks)


@pytest.mark.parametrize("page", pages_with_commands())
def test_the_commands_of_a_page_run_from_top_to_bottom(page, checkout):
    for words in to_run(page):
        kind, program, arguments = understand(words)
        arguments = [re.sub("^500=", "8=", word) for word in arguments]  # a frame before the last one
        assert kind in SMALL, f"{words}: add options to SMALL that make it small"
        run(*program, *arguments, *SMALL[kind].split(), cwd=checkout)
        flags = ("-o", "--output_dir", "--output-dir")
        outputs = [word for flag, word in zip(words, words[1:], strict=False) if flag in flags]
        assert all((checkout / name).exists() for name in outputs), words


def understand(words):
    """What kind of command it is, a key of `SMALL`; what Python runs; and its arguments."""
    if words[0] == "vgen":
        return f"vgen {words[1]}", ["-m", "vgen.cli"], words[1:]
    if words[:2] == ["accelerate", "launch"]:
        launched = launch_command_parser().parse_args(words[2:])
        script, arguments = launched.training_script, launched.training_script_args
    else:
        assert words[0] == "python", f"{words}: run it here, or give a reason in NOT_RUN"
        script, *arguments = words[1:]
    return script, [script], arguments


def test_each_causal_preset_has_its_commands_from_download_to_video():
    """Three commands with the file and the base of the preset, and options that the commands have."""
    parsers = get_command(app).commands
    page = [words for words in commands(ROOT / "docs/public_weights.md") if needs_public_weights(words)]
    for name, preset in read_presets().items():
        if not preset.rollout:
            continue
        repository, file = preset.source.split(", ")
        convert = next(words for words in page if "--preset" in words and words[words.index("--preset") + 1] == name)
        assert convert[1] == "convert" and convert[2] == file and preset.base in convert and convert[-1] == name
        place = page.index(convert)
        assert page[place - 1][:4] == ["hf", "download", repository, file]
        rollout = page[place + 1]
        assert rollout[1] == "rollout" and rollout[rollout.index("--model") + 1] == name
        for words in (convert, rollout):
            parsers[words[1]].make_context(words[1], words[2:])


def test_settings_of_these_tests_are_of_commands_that_there_are():
    found = [words for page in PAGES for words in commands(page)]
    assert set(NOT_RUN) <= {" ".join(words) for words in found}
    assert set(SMALL) == {understand(words)[0] for page in PAGES for words in to_run(page)}


def test_commands_that_are_not_run_name_what_there_is():
    extras = (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]")[1].split("\n[")[0]
    known = set(re.findall(r"^(\w+) = ", extras, flags=re.MULTILINE))
    for command in NOT_RUN:
        asked = re.findall(r"\[([\w,]+)\]", command if command.startswith("pip") else "")
        assert {name for extra in asked for name in extra.split(",")} <= known
        assert all((ROOT / file).is_file() for file in re.findall(r"\S+\.(?:txt|py)|\.ci/\S+", command))
