"""Calls of the public scripts by `vgen train`."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
from contextlib import redirect_stderr
from dataclasses import dataclass, fields
from functools import cache
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any, get_type_hints

import vgen
from vgen.io.allocator import usual_environment
from vgen.io.settings import did_you_mean, parse_settings

SCRIPTS = {
    "data": "pipelines/prepare_videos.py",
    "vae": "train/train_vae.py",
    "latents": "pipelines/encode_latents.py",
    "text": "train/train_text_encoder.py",
    "denoiser": "train/train_vdm.py",
    "evaluation": "pipelines/evaluate.py",
}
"""The script of each stage."""
PLANNED = {"denoiser": ("num_inference_steps",)}
"""Settings of a stage that are for the plan and not for its script."""


def scripts_folder() -> Path:
    """The folder with `train/` and `pipelines/`: the checkout, or the copy in the installed package."""
    package = Path(vgen.__file__).parent
    return package.parent if (package.parent / "train" / "train_vdm.py").is_file() else package / "scripts"


@dataclass(frozen=True)
class Command:
    """A call of a public script."""

    script: str
    """Path of the script in the repository."""
    settings: dict[str, Any]
    processes: int = 1

    def words(self) -> list[str]:
        """The command as words, as they are typed in a checkout."""
        launch = ["python"] if self.processes == 1 else ["accelerate", "launch", *self._launch]
        words = [*launch, str(_shown(scripts_folder() / self.script))]
        for name, value in self.settings.items():
            words += [f"--{name}", _word(value)]
        return words

    @property
    def _launch(self) -> list[str]:
        return [f"--num_processes={self.processes}", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"]

    def run(self) -> bool:
        """Runs the script in a process of its own, which Ctrl-C and SIGTERM stop.

        Returns:
            Whether it ended by itself.

        Raises:
            ValueError: It failed; its own message is on the terminal.
        """
        _, *rest = self.words()
        launcher = [] if self.processes == 1 else ["-m", "accelerate.commands.launch"]
        words = [sys.executable, *launcher, *rest[len(launcher) // 2 :]]
        process = subprocess.Popen(words, env=usual_environment())
        asked: list[int] = []

        def forward(number: int, _: object) -> None:
            asked.append(number)
            process.terminate()  # a terminal sends Ctrl-C to the script too; others may send it to this process alone

        handlers = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            code = process.wait()
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        if code < 0 and not asked:
            name = signal.Signals(-code).name
            hint = " (the system may have run out of memory)" if name == "SIGKILL" else ""
            raise ValueError(f"{self.script} was stopped by {name}{hint}; the same command goes on")
        if code and not asked:
            raise ValueError(f"{self.script} failed, see above; when the cause is mended, the same command goes on")
        return not asked


def check_setting(stage: str, setting: str) -> None:
    """Checks that the script of a stage has a setting.

    Raises:
        ValueError: It does not; the error has the nearest one.
    """
    script = SCRIPTS[stage]
    known = [*(field.name for field in fields(_settings_of(script))), *PLANNED.get(stage, ())]
    name = setting.split(".")[0]
    if name not in known:
        raise ValueError(f"the stage {stage} ({script}) has no setting {setting}{did_you_mean(name, known)}")


def check_command(stage: str, command: Command) -> None:
    """Checks that the settings of a command are those of its script.

    Raises:
        ValueError: They are not; the error names one.
    """
    config_class = _settings_of(command.script)
    errors = io.StringIO()
    words = [f"--{name}={_word(value)}" for name, value in command.settings.items()]
    try:
        with redirect_stderr(errors):
            config: Any = parse_settings(config_class, None, words)
    except SystemExit:
        message = errors.getvalue().strip().partition(": ")[2]
        raise ValueError(f"the stage {stage} ({command.script}): {message}") from None
    if hasattr(config, "check"):
        config.check()


def default_setting(script: str, name: str) -> Any:
    """The default of a script's setting."""
    return getattr(_settings_of(script), name)


@cache
def _settings_of(script: str) -> type:
    """The class of a script's settings."""
    name = f"_script_{Path(script).stem}"
    spec = spec_from_file_location(name, scripts_folder() / script)
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = module_from_spec(spec)  # where annotations are looked up
    spec.loader.exec_module(module)
    return get_type_hints(module.main)["config"]


def _word(value: Any) -> str:
    """A setting as a word of a command."""
    return json.dumps(value) if isinstance(value, (dict, list, bool)) else str(value)


def _shown(path: Path) -> Path:
    """A path relative to the working folder where it is inside of it."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
