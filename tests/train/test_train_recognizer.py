"""Training of classifiers."""

import json

import pytest
import torch

from tests.data.test_clips import write_clip
from vgen.recognition import Recognizer

from .scripts import TINY, launch, logged, trained_alike

SETTINGS = {
    "--network": "cnn_gru", "--model": '{"channels": [8], "dim": 8}', "--num_frames": 5, "--image_size": 16,
    "--batch_size": 4, "--max_steps": 4, "--sample_every": 2, "--num_score_clips": 8,
}  # fmt: skip


def train(output_dir, check=True, processes=1, **options):
    settings = {"--output_dir": output_dir} | SETTINGS | TINY | options
    return launch("train/train_recognizer.py", check=check, processes=processes, **settings)


@pytest.fixture
def folder(tmp_path):
    for name in ("run/a.mp4", "run/b.mp4", "sit/c.mp4"):
        path = tmp_path / "videos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_clip(path, num_frames=12)
    return tmp_path / "videos"


@pytest.mark.parametrize("task", ["motion", "first"])
def test_a_classifier_learns_a_task_of_shapes_and_a_resumed_run_equals_an_uninterrupted_one(task, tmp_path):
    train(tmp_path / "whole", **{"--task": task})
    train(tmp_path / "parts", **{"--task": task, "--max_steps": 2, "--lr_schedule": "constant"})
    train(tmp_path / "whole2", **{"--task": task, "--lr_schedule": "constant"})
    train(tmp_path / "parts", **{"--task": task, "--lr_schedule": "constant"})
    assert trained_alike(tmp_path / "whole2", tmp_path / "parts")
    model = Recognizer.from_pretrained(tmp_path / "whole/recognizer")
    assert model.labels == (["circle", "square"] if task == "first" else model.labels) and model.dtype == torch.float32
    assert [step for step, _ in logged(tmp_path / "whole", "accuracy")] == [2, 4]


def test_videos_train_with_augmentation_balance_mixup_and_smoothing(folder, tmp_path):
    train(
        tmp_path / "run",
        **{
            "--data": folder, "--balance": "true", "--mixup": 0.2, "--label_smoothing": 0.1, "--short": "pad",
            "--augment": '{"flip": 0.5}', "--test_clips": 2, "--test_crops": 2, "--frame_rate": 10,
        },
    )  # fmt: skip
    model = Recognizer.from_pretrained(tmp_path / "run/recognizer")
    assert model.labels == ["run", "sit"] and model.config.frame_rate == 10
    assert 0 <= logged(tmp_path / "run", "accuracy")[-1][1] <= 1
    train(tmp_path / "more", **{"--data": folder, "--init": tmp_path / "run/recognizer"})
    done = train(tmp_path / "other", check=False, **{"--init": tmp_path / "run/recognizer"})
    assert done.returncode == 2 and "the classes of" in done.stderr


def test_videos_with_several_labels_need_the_setting(folder, tmp_path):
    rows = [
        {"file_name": "run/a.mp4", "label": ["run", "dark"]},
        {"file_name": "run/b.mp4", "label": "run"},
        {"file_name": "sit/c.mp4", "label": "dark"},
    ]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    done = train(tmp_path / "run", check=False, **{"--data": folder})
    assert done.returncode == 2 and "has several labels (run, dark): pass --multi_label true" in done.stderr
    train(tmp_path / "run", **{"--data": folder, "--multi_label": "true"})
    assert Recognizer.from_pretrained(tmp_path / "run/recognizer").config.multi_label
    assert logged(tmp_path / "run", "mean_average_precision")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"--network": "c4d"}, "unknown recognizer 'c4d' (nearest: c3d)"),
        ({"--network": "c3d"}, "c3d has no size 'channels'"),
        ({"--balance": "true"}, "balance need videos (--data)"),
        ({"--mixup": -1}, "mixup"),
        ({"--test_clips": 0}, "test_clips must be at least 1, got 0"),
        ({"--data": "VIDEOS", "--classes": '["run", "walk"]'}, "unknown labels: sit; the classes are run, walk"),
        ({"--data": "VIDEOS", "--num_frames": 100}, "none of 3 videos can be used"),
        ({"--data": "nowhere"}, "there is no folder nowhere"),
    ],
)
def test_mistakes_are_reported_in_one_line(folder, tmp_path, options, message):
    options = {name: str(folder) if value == "VIDEOS" else value for name, value in options.items()}
    done = train(tmp_path / "run", check=False, **options)
    assert done.returncode in (1, 2) and message in done.stderr.splitlines()[-1], done.stderr
