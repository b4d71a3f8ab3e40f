"""What the pages tell the reader to type: Python runs page by page, commands are parsed, and cheap ones run."""

import functools
import os
import re
import shlex
import subprocess
from pathlib import Path

import numpy as np
import pytest
from accelerate.commands.launch import launch_command_parser
from PIL import Image
from typer.main import get_command

from tests.warm import warm_python
from vgen.cli import app
from vgen.data.video_io import write_video

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
}
# replaced in Python, so that it is cheap
SHRUNK = {"num_frames=1000": "num_frames=64"}
# commands of `vgen` that are only parsed
COSTLY = {"evaluate", "compare", "anomaly", "data", "convert"}
# programs that are not this project's
OTHERS = {"pip", "pre-commit", "mkdocs", "bash", "cd", "tensorboard", "pytest"}


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


COMMANDS = [
    pytest.param(words, id=f"{name_of(page)}: {' '.join(words)}"[:90]) for page in PAGES for words in commands(page)
]


def run(*command, **options):
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "MPLBACKEND": "agg"}
    command = [warm_python(), *map(str, command)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, **options)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture
def folder(tmp_path):
    """A folder with the files that snippets name."""
    frames = np.random.default_rng(0).integers(0, 256, (17, 8, 8, 3), dtype=np.uint8).repeat(8, 1).repeat(8, 2)
    write_video(frames, tmp_path / "clip.mp4", frame_rate=8.0)
    Image.fromarray(frames[0]).save(tmp_path / "first.png")
    return tmp_path


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
    for word, small in SHRUNK.items():
        code = code.replace(word, small)
    code = re.sub(r"(VideoGenPipeline\.from_pretrained\(.*?)\)", r"\1, num_inference_steps=2)", code)
    before = set(folder.iterdir())
    run("-c", code, cwd=folder)
    if page.name == "README.md":
        assert ".mp4" in {path.suffix for path in set(folder.iterdir()) - before}


@pytest.mark.parametrize("words", COMMANDS)
def test_a_command_is_understood(words, folder):
    program, *rest = words
    if program == "pip" and rest[0] == "install":
        extras = (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]")[1].split("\n[")[0]
        known = set(re.findall(r"^(\w+) = ", extras, flags=re.MULTILINE))
        asked = re.findall(r"\[([\w,]+)\]", " ".join(rest))
        assert {name for extra in asked for name in extra.split(",")} <= known
        assert all((ROOT / file).is_file() for flag, file in zip(rest, rest[1:], strict=False) if flag in ("-c", "-r"))
    elif program == "vgen":
        run_vgen(rest, folder)
    elif program == "accelerate" and rest[0] == "launch":
        launched = launch_command_parser().parse_args(rest[1:])
        understands(launched.training_script, launched.training_script_args)
    elif program in ("python", "python3"):
        if rest[0] == "-m":
            assert rest[1] in OTHERS
        elif rest[0] != "-c":
            understands(rest[0], rest[1:])
    else:
        assert program in OTHERS, f"{program} is unknown to this test: add it to OTHERS"
        assert program != "bash" or (ROOT / rest[0]).is_file()


def run_vgen(words, folder):
    """Parses a command of `vgen`, and runs it where it is cheap and its files are here."""
    context = get_command(app).make_context("vgen", list(words), resilient_parsing=False)
    command, rest = context.command, [*context._protected_args, *context.args]
    while hasattr(command, "resolve_command"):
        name, command, rest = command.resolve_command(context, rest)
        context = command.make_context(name, rest, parent=context)
        rest = [*context._protected_args, *context.args]
    inputs = [word for word in words if re.search(r"\.(mp4|png|gif)$|^runs/", word)]
    outputs = [word for flag, word in zip(words, words[1:], strict=False) if flag in ("-o", "--output")]
    if words[0] in COSTLY or not all((folder / name).exists() for name in set(inputs) - set(outputs)):
        return
    lengths = {index + 1 for index, word in enumerate(words) if word == "--num-frames"}
    words = ["16" if index in lengths and int(word) > 16 else word for index, word in enumerate(words)]
    words = [re.sub(r"^500=", "8=", word) for word in words]
    run("-m", "vgen.cli", *words, "--steps", "2", cwd=folder)
    assert all((folder / name).exists() for name in outputs)


@functools.cache
def help_of(script):
    return run(script, "--help", cwd=ROOT)


def understands(script, words):
    """Whether a script knows all options of a command and accepts their values."""
    assert (ROOT / script).is_file(), script
    listed = help_of(script)
    given = [word.split("=")[0] for word in words if word.startswith("--")]
    unknown = [option for option in given if not re.search(rf"(?<![\w-]){option}(?![\w-])", listed)]
    assert not unknown, f"{script} has no {unknown}"
    checks = [check for check in ("--dry_run", "--print_config") if check in listed]
    if checks:
        run(script, *words, checks[0], cwd=ROOT)
