"""Options are spelled once: what is a field appears wherever options are taken, shown, saved and defaulted."""

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.warm import warm_python
from vgen import InterpolationOptions, RolloutOptions, VideoGenPipeline
from vgen.cli import app
from vgen.sampling.options import help_of

from ..test_pipeline import PROMPT, seeded
from .test_rollout import build

ROOT = Path(__file__).parents[2]

LOAD = """
import importlib.util, runpy, sys
for name in [name for name in sys.modules if name.split(".")[0] == "vgen"]:
    del sys.modules[name]
spec = importlib.util.spec_from_file_location("vgen.sampling.options", sys.argv.pop(1))
sys.modules[spec.name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules[spec.name])
"""


def flags(text):
    return set(re.findall(r"--[a-z][a-z_-]+", text))


@pytest.mark.parametrize(
    ("options", "commands", "script"),
    [
        (RolloutOptions, ("rollout", "predict"), "rollout.py"),
        (RolloutOptions, (), "predict.py"),
        (InterpolationOptions, ("interpolate",), "interpolate.py"),
    ],
)
def test_every_option_is_in_the_help_of_commands_and_jobs(options, commands, script, monkeypatch, capsys):
    for command in commands:
        shown = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200", "TERM": "dumb"}).output
        assert {f"--{name.replace('_', '-')}" for name in options.names()} <= flags(shown)
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    with pytest.raises(SystemExit):
        runpy.run_path(str(ROOT / "pipelines" / script), run_name="__main__")
    shown = capsys.readouterr().out
    assert {f"--{name}" for name in options.names()} <= flags(shown)
    assert all(help_of(options).values())


def test_a_new_option_needs_one_file(tmp_path):
    """A field that is added to the dataclass reaches both helps, a checkpoint's defaults and the saved state."""
    source = (ROOT / "vgen/sampling/options.py").read_text()
    mark = "    chunk_size: int | None = None\n"
    assert source.count(mark) == 1
    new = '    brand_new: int | None = None\n    """A new option."""\n'
    (tmp_path / "options.py").write_text(source.replace(mark, new + mark))

    def run(code, *words):
        environment = {"COLUMNS": "200", "TERM": "dumb", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        command = [warm_python(), "-c", LOAD + code, tmp_path / "options.py", *map(str, words)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "--brand-new" in run("from vgen.cli import main; main()", "rollout", "--help")
    shown = run(f"runpy.run_path({str(ROOT / 'pipelines/rollout.py')!r}, run_name='__main__')", "--help")
    assert "--brand_new" in shown and "A new option" in shown
    code = """
import torch
from vgen import VideoGenPipeline
pipe = VideoGenPipeline.from_pretrained("vgen/shapes-64")
pipe.register_to_config(rollout_defaults={"brand_new": 7})
rollout = pipe.rollout("a red circle", num_inference_steps=1)
rollout.save(sys.argv[1])
given = pipe.rollout("a red circle", brand_new=9)
print(rollout.state.options.brand_new, given.state.options.brand_new)
"""
    assert run(code, tmp_path / "saved").split() == ["7", "9"]
    assert json.loads((tmp_path / "saved/rollout.json").read_text())["options"]["brand_new"] == 7


def test_defaults_come_from_the_checkpoints_rollouts_then_its_pipeline_then_its_denoiser(randomize):
    pipe = build(randomize)
    own = {"chunk_size": 2, "window": 1, "history_noise": 0.25, "keyframe_interval": 1, "negative_prompt": "a square"}
    pipe.register_to_config(rollout_defaults=own)
    options = pipe.rollout(PROMPT, generator=seeded()).state.options
    assert {name: getattr(options, name) for name in own} == own
    assert options.sink == pipe.denoiser.config.sink
    assert options.frame_rate == pipe.config.frame_rate and options.guidance_scale == pipe.config.guidance_scale
    assert None not in options.to_json().values()
    assert RolloutOptions.from_json(json.loads(json.dumps(options.to_json()))) == options
    with pytest.raises(ValueError, match="options must be some of .*, got stride"):
        RolloutOptions.from_json({"stride": 2})


def test_signatures_name_every_option():
    import inspect

    for method, options in (
        (VideoGenPipeline.rollout, RolloutOptions),
        (VideoGenPipeline.predict, RolloutOptions),
        (VideoGenPipeline.interpolate, InterpolationOptions),
        (VideoGenPipeline.interpolator, InterpolationOptions),
    ):
        assert set(options.names()) <= set(inspect.signature(method).parameters)
