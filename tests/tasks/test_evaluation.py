"""Evaluation of a tiny checkpoint, from Python and from the command line."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import VideoMAEConfig, VideoMAEModel
from typer.testing import CliRunner

from tests.test_pipeline import PROMPT, make_pipeline
from vgen.cli import app
from vgen.data.clips import VideoFolder
from vgen.data.shapes_tasks import SCENE_LABELS
from vgen.data.video_io import write_video
from vgen.io.fingerprint import weights_digest
from vgen.io.settings import parse_settings
from vgen.metrics.suites import SuiteConfig, open_suite
from vgen.models.convlstm import ConvLSTMPredictor
from vgen.pipeline import VideoGenPipeline
from vgen.recognition import create_recognizer
from vgen.tasks.evaluation import EvaluationConfig, evaluate, feature_frames, with_defaults


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    make_pipeline(tasks=["text", "leading", "keyframes"], window=4, sink=1, chunk_size=2).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    for index in range(3):
        frames = np.random.default_rng(index).integers(0, 256, (9, 16, 16, 3), dtype=np.uint8)
        write_video(frames.repeat(2, 1).repeat(2, 2), folder / f"{index}.mp4", frame_rate=8)
        (folder / f"{index}.txt").write_text(PROMPT)
    return str(folder)


SHAPE = {"num_frames": 9, "height": 16, "width": 16, "frame_rate": 8.0}


def settings(model, videos, output_dir, **options):
    return {
        "output_dir": output_dir, "model": model, "suite": "folder", "data": videos, "batch_size": 2,
        "num_inference_steps": 1,
    } | options  # fmt: skip


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_results_include_the_baselines_of_each_task(model, videos, tmp_path):
    torch.manual_seed(0)
    ConvLSTMPredictor(channels=(4,)).save_pretrained(tmp_path / "convlstm")
    config = EvaluationConfig(
        **settings(model, videos, tmp_path / "out", num_samples=2, convlstm=str(tmp_path / "convlstm"))
    )
    results = evaluate(config)
    assert results == json.loads((tmp_path / "out" / "results.json").read_text()) and results["numbers"] == [0, 1, 2]
    assert {task: list(methods) for task, methods in results["tasks"].items()} == {
        "reconstruction": ["VAE only", "true clips"],
        "prediction": [
            "the model", "the model, mean of 2", "the model, best of 2", "ConvLSTM", "copy of the last frame",
            "VAE only", "true clips",
        ],
        "interpolation": [
            "the model", "copy of the last keyframe", "linear blend", "optical flow (DIS)", "VAE only",
            "true clips",
        ],
        "generation": ["the model", "true clips", "VAE only"],
    }  # fmt: skip
    for methods in results["tasks"].values():
        assert all(
            len(values) == 3 and np.isfinite(values).all() for one in methods.values() for values in one.values()
        )
    prediction = results["tasks"]["prediction"]
    assert prediction["the model, mean of 2"]["psnr"] != prediction["the model"]["psnr"]
    assert "psnr" not in prediction["true clips"] and prediction["true clips"]["sharpness"]
    best, single = (prediction[method]["ssim"] for method in ("the model, best of 2", "the model"))
    assert all(a >= b for a, b in zip(best, single, strict=True))
    curve = results["curves"]["prediction"]["copy of the last frame"]["ssim"]
    assert results["frames"]["prediction"] == [5, 6, 7, 8] and len(curve) == 4 and max(curve) < 0.9  # noise
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("<svg") == 6 and "copy of the last frame" in page


def test_a_run_resumes_and_other_settings_are_an_error(model, videos, tmp_path):
    options = settings(model, videos, tmp_path, tasks=["reconstruction"])
    first = evaluate(EvaluationConfig(**options))
    kept, lost = tmp_path / "clips" / "000000.json", tmp_path / "clips" / "000002.json"
    before = kept.stat().st_mtime_ns
    lost.unlink()
    assert evaluate(EvaluationConfig(**options)) == first
    assert kept.stat().st_mtime_ns == before and lost.exists()
    with pytest.raises(ValueError, match=r"different settings \(given\)"):
        evaluate(EvaluationConfig(**options | {"given": 1}))


def test_long_videos_have_drift_and_seams(model, videos, tmp_path):
    torch.manual_seed(0)
    options = settings(model, videos, tmp_path, tasks=["rollout"], rollout_frames=25, num_clips=2)
    results = evaluate(EvaluationConfig(**options))
    scores = results["tasks"]["rollout"]["the model"]
    assert {"brightness drift", "sharpness drift", "contrast, end from start", "seam ratio"} <= set(scores)
    assert all(np.isfinite(values).all() for values in scores.values())
    shapes = {"suite": "shapes", "data": None, "output_dir": tmp_path / "shapes"}
    results = evaluate(EvaluationConfig(**options | shapes))
    assert list(results["tasks"]["rollout"]) == ["the model", "true clips"]  # ShapesWorld renders videos of any length
    assert results["tasks"]["rollout"]["true clips"].keys() == scores.keys()


def test_seams_are_where_the_chunks_of_rollouts_meet(videos, tmp_path):
    ratios = {}
    for size in (1, 2):
        pipe = make_pipeline(tasks=["text", "leading", "keyframes"], window=4, sink=1, chunk_size=2)
        pipe.register_to_config(rollout_defaults={"chunk_size": size})
        pipe.save_pretrained(tmp_path / f"model-{size}")
        options = settings(
            str(tmp_path / f"model-{size}"), videos, tmp_path / str(size), tasks=["rollout"], num_clips=2
        )
        with pytest.raises(ValueError, match=f"rollout_frames must be an integer of at least {4 * size + 2}"):
            evaluate(EvaluationConfig(**options, rollout_frames=4 * size + 1))
        results = evaluate(EvaluationConfig(**options, rollout_frames=17))
        ratios[size] = results["tasks"]["rollout"]["the model"]["seam ratio"]
    assert np.isfinite(ratios[1]).all() and not np.allclose(ratios[1], ratios[2], rtol=1e-3)


def test_distances_between_distributions_carry_their_protocol(model, videos, tmp_path):
    torch.manual_seed(0)
    VideoMAEModel(
        VideoMAEConfig(
            image_size=16,
            patch_size=8,
            num_frames=4,
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=8,
        )  # fmt: skip
    ).save_pretrained(tmp_path / "features")
    options = settings(model, videos, tmp_path / "out", tasks=["prediction"], features=str(tmp_path / "features"))
    results = evaluate(EvaluationConfig(**options))
    measured = results["distances"]["prediction"]
    assert set(measured) == set(results["tasks"]["prediction"]) - {"true clips"}
    distance = measured["copy of the last frame"]["FVD"]
    assert np.isfinite(distance["value"]) and distance["low"] < distance["value"] < distance["high"]
    assert distance["protocol"]["num_frames"] == 4 and distance["protocol"]["known_frames_counted"] is False
    with pytest.raises(ValueError, match="num_frames must be at least 10, because .* needs 4 frames"):
        evaluate(EvaluationConfig(**options | {"given": 6, "output_dir": tmp_path / "other"}))
    path = tmp_path / "out" / "results.json"
    done = run("compare", path, path)
    assert done.exit_code == 0 and "FVD" in done.output and "differs" not in done.output
    done = run(
        "evaluate", model, "-o", tmp_path / "again", "--suite", "folder", "--data", videos, "--steps", 1,
        "--task", "prediction", "--features", tmp_path / "features",
    )  # fmt: skip
    assert f"copy of the last frame: FVD {distance['value']:.3f} [{distance['low']:.3f}" in done.output
    assert "known_frames_counted False, resize bilinear" in done.output


def test_distances_on_the_features_of_a_recognizer(model, videos, tmp_path):
    recognizer = create_recognizer("pooled", 2, 4, 16, channels=[8], dim=8)
    recognizer.save_pretrained(tmp_path / "recognizer")
    options = settings(model, videos, tmp_path / "out", tasks=["prediction"], features=str(tmp_path / "recognizer"))
    results = evaluate(EvaluationConfig(**options))
    protocol = results["distances"]["prediction"]["copy of the last frame"]["FVD"]["protocol"]
    assert protocol["feature_network"] == weights_digest(recognizer) and protocol["values"] == "from -1 to 1"


def test_a_recognizer_says_whether_videos_show_what_was_asked_for(model, videos, tmp_path):
    for name, path in zip("aab", sorted(Path(videos).glob("*.mp4")), strict=True):
        (tmp_path / "data" / name).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, tmp_path / "data" / name)
    torch.manual_seed(0)
    recognizer = create_recognizer("pooled", 2, 4, 16, channels=[8], dim=8, labels=["b", "a"]).eval()
    recognizer.save_pretrained(tmp_path / "recognizer")
    options = {"tasks": ["reconstruction", "prediction"], "recognizer": str(tmp_path / "recognizer")}
    options = settings(model, str(tmp_path / "data"), tmp_path / "out", **options)
    results = evaluate(EvaluationConfig(**options))
    suite = open_suite(SuiteConfig(suite="folder", data=options["data"], **SHAPE))
    expected = []
    for number in results["numbers"]:
        label = recognizer.labels[recognizer(suite.samples(range(number, number + 1)).clips).logits.argmax()]
        expected.append(float(label in suite.labels(number)))
        assert suite.labels(number) == {suite.source.clips[suite.numbers[number]][0].path.parent.name}
    assert results["tasks"]["reconstruction"]["true clips"]["recognized"] == expected
    assert "recognized" not in results["tasks"]["prediction"]["the model"] and "correct" not in str(
        results["agreement"]
    )
    assert (
        results["distances"]["prediction"]["the model"]["FVD"]["protocol"]["feature_network"]
        == (results["settings"]["recognizer_sha256"])
    )
    create_recognizer("pooled", 2, 4, 16, channels=[8], dim=8, labels=["b", "c"]).save_pretrained(tmp_path / "other")
    wrong = options | {"recognizer": str(tmp_path / "other"), "output_dir": tmp_path / "wrong"}
    with pytest.raises(ValueError, match="does not know the label 'a' of the suite folder"):
        evaluate(EvaluationConfig(**wrong))
    with pytest.raises(ValueError, match="have no label"):
        evaluate(EvaluationConfig(**options | {"data": videos, "output_dir": tmp_path / "wrong"}))


def test_the_agreement_of_recognizer_and_checker_is_reported(model, tmp_path):
    sizes = {"channels": [8], "dim": 8, "labels": list(SCENE_LABELS), "multi_label": True}
    create_recognizer("pooled", len(SCENE_LABELS), 9, 16, **sizes).save_pretrained(tmp_path / "recognizer")
    done = run(
        "evaluate", model, "-o", tmp_path / "out", "--steps", 1, "--num-clips", 3, "--num-frames", 9,
        "--task", "generation", "--recognizer", tmp_path / "recognizer",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    values = results["tasks"]["generation"]["true clips"]
    share = np.mean(np.equal(values["correct"], values["recognized"]))
    assert results["agreement"]["generation"]["true clips"] == share
    assert f"true clips: recognizer and checker agree on {share:.1%}" in done.output
    assert "The recognizer and the checker agree on" in (tmp_path / "out" / "report.html").read_text()


def test_distances_of_a_task_do_not_depend_on_the_others():
    config = EvaluationConfig(output_dir=Path(), num_frames=9, given=5)
    network = SimpleNamespace(num_frames=None)
    assert [feature_frames(config, network, task) for task in ("prediction", "generation")] == [4, 9]
    counted = replace(config, count_known_frames=True)
    assert feature_frames(counted, network, "prediction") == 9
    assert feature_frames(replace(config, num_feature_frames=3), network, "generation") == 3


def test_the_packaged_networks_serve_clips_like_their_training_data():
    pipe = SimpleNamespace(config={"num_frames": 17, "height": 64, "width": 64, "frame_rate": 8.0})
    config = EvaluationConfig(output_dir=Path())
    own = with_defaults(config, pipe)
    assert (own.convlstm, own.recognizer) == ("vgen/shapes-64-convlstm", "vgen/shapes-64-recognizer")
    assert own.features == own.recognizer
    assert with_defaults(replace(config, features="other"), pipe).features == "other"
    assert with_defaults(replace(config, tasks=["interpolation"]), pipe).recognizer is None
    off = with_defaults(with_defaults(replace(config, convlstm="none", recognizer="none"), pipe), pipe)
    assert (off.convlstm, off.recognizer, off.features) == ("none", "none", None)
    for other in ({"height": 32}, {"suite": "folder"}, {"frame_rate": 16.0}):
        wrong = with_defaults(replace(config, **other), pipe)
        assert wrong.convlstm is wrong.recognizer is wrong.features is None


def test_results_of_a_folder_reject_clips_of_another_folder(model, videos, tmp_path):
    options = settings(model, videos, tmp_path / "out", tasks=["reconstruction"])
    evaluate(EvaluationConfig(**options))
    more = shutil.copytree(videos, tmp_path / "more")
    shutil.copy(more / "0.mp4", more / "3.mp4")
    with pytest.raises(ValueError, match="clips_sha256"):
        evaluate(EvaluationConfig(**options | {"data": str(more)}))


def test_the_commands_print_tables_and_differences(model, videos, tmp_path):
    common = ["--suite", "folder", "--data", videos, "--steps", 1, "--task", "prediction"]
    for name, extra in (("a", []), ("b", ["--seed", 1]), ("c", ["--given", 1])):
        done = run("evaluate", model, "-o", tmp_path / name, *common, *extra)
        assert done.exit_code == 0, done.output
        assert "copy of the last frame" in done.output and "psnr, dB" in done.output
    a, b, c = (tmp_path / name / "results.json" for name in "abc")
    done = run("compare", a, b)
    assert done.exit_code == 0, done.output
    assert "the model" in done.output and "psnr" in done.output
    done = run("compare", a, c)
    assert done.exit_code == 2 and "cannot be compared, because they differ in given 5 and 1" in done.stderr
    done = run("evaluate", model, "-o", tmp_path / "d", "--suite", "shape")
    assert done.exit_code == 2 and "'shapes'" in done.stderr and "moving-mnist" in done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": ["predict"]}, "tasks must be one of 'reconstruction', 'prediction'"),
        ({"tasks": "prediction"}, "tasks must be a sequence"),
        ({"num_samples": 0}, "num_samples must be an integer of at least 1"),
        ({"features": "a", "torchscript": "b"}, "cannot be used together"),
        ({"num_feature_frames": 0}, "num_feature_frames must be an integer of at least 1"),
        ({"suite": "folder"}, "data must be set"),
        ({"dtype": "float64"}, "dtype must be one of 'auto', 'float32', 'bfloat16', 'float16', got 'float64'"),
    ],
)
def test_invalid_settings_are_an_error_that_names_them(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        evaluate(EvaluationConfig(output_dir=tmp_path, **options))


@pytest.mark.parametrize("words", [["--tasks", "[predict]"], ["--suite", "shape"], ["--dtype", "float64"]])
def test_the_command_line_of_the_script_checks_choices(words, capsys):
    valid = ["--output_dir", "out", "--tasks", "[prediction, rollout]", "--dtype", "float16"]
    config = parse_settings(EvaluationConfig, "", valid)
    assert config.tasks == ["prediction", "rollout"] and config.dtype == "float16" and config.output_dir == "out"
    with pytest.raises(SystemExit):
        parse_settings(EvaluationConfig, "", [*valid, *words])
    assert words[0][2:] in capsys.readouterr().err


def test_unsupported_tasks_are_an_error_unless_they_are_defaults(videos, tmp_path):
    make_pipeline(group_modes=["chunk"]).save_pretrained(tmp_path / "poor")  # also without full attention
    options = settings(str(tmp_path / "poor"), videos, tmp_path / "out")
    with pytest.raises(ValueError, match="trained for leading"):
        evaluate(EvaluationConfig(**options, tasks=["prediction"]))
    assert set(evaluate(EvaluationConfig(**options))["tasks"]) == {"reconstruction", "generation"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": ["generation"], "num_frames": 8}, r"num_frames must be 4\*k \+ 1, got 8"),
        ({"tasks": ["rollout"], "rollout_frames": 9}, "rollout_frames must be an integer of at least 10, got 9"),
        ({"tasks": ["interpolation"], "factor": 1}, "factor must be an integer from 2"),
        ({"features": "somewhere", "num_clips": 1, "tasks": ["prediction"]}, "at least 2 clips, got 1"),
        ({"features": "somewhere", "tasks": ["reconstruction"]}, "one of the tasks prediction, generation"),
    ],
)
def test_settings_that_fail_for_all_clips_are_an_error_before_the_first(model, videos, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        evaluate(EvaluationConfig(**settings(model, videos, tmp_path, **options)))
    assert not (tmp_path / "clips").exists()


def test_damaged_clips_are_counted_and_named(model, videos, tmp_path, monkeypatch):
    def broken(self, index, epoch=0, whole=VideoFolder.clip):
        listed = self.clips[index][0]
        if listed.path.name != "1.mp4":
            return whole(self, index, epoch)
        self.skipped[listed] = "cut off"
        return None

    monkeypatch.setattr(VideoFolder, "clip", broken)
    results = evaluate(EvaluationConfig(**settings(model, videos, tmp_path, tasks=["reconstruction"])))
    assert results["missing"] == 1 and len(results["numbers"]) == 2
    assert "cut off" in (tmp_path / "clips" / "manifest.jsonl").read_text()


def test_the_model_is_conditioned_on_the_frame_rate_of_the_clips(model, videos, tmp_path, monkeypatch):
    rates = []

    def recording(whole):
        def record(self, *args, **options):
            rates.append(options["frame_rate"])
            return whole(self, *args, **options)

        return record

    for name in ("__call__", "predict", "interpolate"):
        monkeypatch.setattr(VideoGenPipeline, name, recording(getattr(VideoGenPipeline, name)))
    evaluate(
        EvaluationConfig(**settings(model, videos, tmp_path, num_clips=1, frame_rate=16.0, num_frames=5, given=1))
    )
    assert rates == [16.0, 4.0, 16.0]  # every fourth frame is given to an interpolation
