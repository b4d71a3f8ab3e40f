import errno
import signal
import subprocess
import time
from pathlib import Path

import pytest
from tqdm import tqdm

from tests.warm import warm_python
from vgen.io.errors import describe, loading, one_line_errors

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("a\n  b"), "a b"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "a.mp4"), "a.mp4: No such file or directory"),
        (OSError(errno.ENOSPC, "could not write a: No space left"), "could not write a: No space left"),
        (FloatingPointError("the loss is not finite"), "the loss is not finite"),
        (ImportError("pip install peft"), "pip install peft"),
    ],
)
def test_an_expected_error_is_one_line_and_status_two(capsys, error, line):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stop, one_line_errors("train.py"):
        raise error
    assert describe(error) == line and capsys.readouterr().err == f"train.py: {line}\n"
    assert stop.value.code == 2 and signal.getsignal(signal.SIGTERM) == before


def test_an_error_has_a_line_of_its_own_below_a_progress_bar(capsys):
    with pytest.raises(SystemExit), tqdm(total=2) as bar, one_line_errors("train.py"):
        bar.update()
        raise ValueError("wrong")
    assert "\rtrain.py: wrong\n" in capsys.readouterr().err


def test_other_errors_keep_their_traceback():
    with pytest.raises(AssertionError), one_line_errors():
        raise AssertionError


def test_an_error_while_loading_names_what_was_loaded_and_blames_nothing():
    with pytest.raises(ValueError, match="^could not load a/vae: RuntimeError: no accelerator$"), loading("a/vae"):
        raise RuntimeError("no\n accelerator")


WRITE = """
import sys, time
import numpy as np
from vgen.data.video_io import VideoWriter
from vgen.io.errors import one_line_errors

with one_line_errors(), VideoWriter(sys.argv[1]) as writer:
    writer.append(np.zeros((2, 16, 16, 3), np.uint8))
    print("writing", flush=True)
    for _ in range(600):  # a signal just before a long sleep would be handled after it
        time.sleep(0.1)
"""


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stopped_command_leaves_no_hidden_folder(tmp_path, number, status):
    command = [warm_python(), "-c", WRITE, str(tmp_path / "a.mp4")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "writing\n" and len(list(tmp_path.iterdir())) == 1
        begin = time.monotonic()
        process.send_signal(number)
        _, errors = process.communicate()
    assert process.returncode == status and time.monotonic() - begin < 30
    assert "Traceback" not in errors and not list(tmp_path.iterdir())


WRONG = {
    "train/train_vae.py": (["--output_dir=out", "--batch_size=0"], "batch_size must be at least 1, got 0"),
    "train/train_vdm.py": (["--output_dir=out", "--latents_dir=a", "--ema_decay=2"], "ema_decay must be in [0, 1)"),
    "train/train_text_encoder.py": (["--output_dir=out", "--keep_last=0"], "keep_last must be at least 1"),
    "train/distill.py": (["--output_dir=out", "--latents_dir=a"], "needs a pipeline to start from: pass init"),
    "train/train_convlstm.py": (["--output_dir=out", "--save_every=0"], "save_every must be at least 1"),
    "train/train_recognizer.py": (["--output_dir=out", "--mixup=-1"], "mixup must be"),
    "pipelines/encode_latents.py": (["--output_dir=out", "--vae=missing", "--data=missing"], "missing"),
    "pipelines/evaluate.py": (["--output_dir=out", "--model=missing"], "missing"),
    "pipelines/interpolate.py": (["--output_dir=out", "--videos=missing"], "missing: No such file or directory"),
    "pipelines/predict.py": (["--output_dir=out", "--videos=missing"], "missing: No such file or directory"),
    "pipelines/prepare_videos.py": (["--output_dir=out", "--data=missing"], "there is no folder missing"),
    "pipelines/rollout.py": (["--output_dir=out", "--prompts=missing"], "missing: No such file or directory"),
    "pipelines/text_to_video.py": (["--output_dir=out", "--prompts=missing"], "missing: No such file or directory"),
}


def test_every_script_is_checked():
    scripts = {
        str(path.relative_to(ROOT)) for folder in ("train", "pipelines") for path in (ROOT / folder).glob("*.py")
    }
    assert scripts == WRONG.keys()


@pytest.mark.parametrize("script", WRONG)
def test_a_script_prints_a_mistake_as_one_line(tmp_path, script):
    arguments, message = WRONG[script]
    command = [warm_python(), str(ROOT / script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 2 and last.startswith(f"{Path(script).name}: ") and message in last, done.stderr
    assert "Traceback" not in done.stderr
