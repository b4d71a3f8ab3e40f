"""Training of classifiers."""

import json

import pytest
import torch

from tests.data.test_clips import write_clip
from vgen.data.clips import Sampling
from vgen.data.labels import list_labeled, timelines_of
from vgen.data.shapes_tasks import SCENE_LABELS
from vgen.recognition import Recognizer
from vgen.tasks.classification import events_of, timeline
from vgen.training.labeled import LabeledMoments

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
    assert model.labels == (["red", "blue"] if task == "first" else model.labels) and model.dtype == torch.float32
    assert [step for step, _ in logged(tmp_path / "whole", "accuracy")] == [2, 4]


def test_a_classifier_learns_all_labels_of_scenes_in_half_precision(tmp_path):
    train(tmp_path, **{"--task": "scene", "--mixed_precision": "bf16"})
    model = Recognizer.from_pretrained(tmp_path / "recognizer")
    assert model.labels == list(SCENE_LABELS) and model.config.multi_label
    assert [step for step, _ in logged(tmp_path, "exact_match")] == [2, 4]


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
    (tmp_path / "test/run").mkdir(parents=True)  # a class may be missing among the videos for scores
    write_clip(tmp_path / "test/run/a.mp4", num_frames=12)
    train(tmp_path / "tested", **{"--data": folder, "--score_data": tmp_path / "test"})
    done = train(tmp_path / "wrong", check=False, **{
        "--data": folder, "--init": tmp_path / "run/recognizer", "--multi_label": "true",
    })  # fmt: skip
    assert done.returncode == 2 and "has multi_label=False, the settings True" in done.stderr
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


@pytest.fixture
def moments(tmp_path):
    """Videos that become brighter; the bright part is labeled."""
    (tmp_path / "moments").mkdir()
    for name in ("a.mp4", "b.mp4"):
        write_clip(tmp_path / "moments" / name)
    rows = [{"file_name": name, "label": "bright", "start": 1.0, "end": 2.0} for name in ("a.mp4", "b.mp4")]
    (tmp_path / "moments" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path / "moments"


def test_labels_of_frames_are_learned_and_detected(moments, tmp_path):
    options = {
        "--data": moments, "--per_frame": "true", "--iou_weight": 1.0, "--frame_rate": 10, "--num_frames": 8,
        "--max_steps": 60, "--sample_every": 60, "--learning_rate": 0.01, "--save_every": 100, "--log_every": 20,
        "--ema_decay": 0, "--network": "causal_cnn",
    }  # fmt: skip
    train(tmp_path / "run", **options)
    assert logged(tmp_path / "run", "mAP@0.5")[-1][1] == 1
    model = Recognizer.from_pretrained(tmp_path / "run/recognizer").eval()
    (event,) = events_of(timeline(model, moments / "a.mp4"), model)
    assert (
        event.label == "bright" and event.start == pytest.approx(1, abs=0.3) and event.end == pytest.approx(2, abs=0.3)
    )


def test_the_targets_of_a_clip_are_those_of_its_frames(moments):
    source = LabeledMoments(
        timelines_of(list_labeled(moments)), ["dark", "bright"], Sampling(num_frames=6, frame_rate=10.0), 16
    )
    seen = set()
    for index in range(8):
        batch = source.batch(range(index, index + 1), 6)
        bright = batch["frames"][0].float().mean((1, 2, 3)) > 95  # frame i has 10 i
        assert batch["targets"].shape == (1, 6, 2) and torch.equal(batch["targets"][0, :, 1] > 0, bright)
        seen |= set(bright.tolist())
    assert seen == {True, False}


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
        (
            {"--data": "VIDEOS", "--classes": '["run", "sit"]', "--per_frame": "true", "--network": "pooled"},
            "per_frame needs a network that classifies each frame, got pooled",
        ),
        ({"--data": "VIDEOS", "--per_frame": "true", "--sampling": "uniform"}, "need sampling=random or sliding"),
        ({"--per_frame": "true"}, "per_frame need videos (--data)"),
        ({"--iou_weight": 1}, "iou_weight needs per_frame=true"),
    ],
)
def test_mistakes_are_reported_in_one_line(folder, tmp_path, options, message):
    options = {name: str(folder) if value == "VIDEOS" else value for name, value in options.items()}
    done = train(tmp_path / "run", check=False, **options)
    assert done.returncode in (1, 2) and message in done.stderr.splitlines()[-1], done.stderr
