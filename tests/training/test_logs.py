"""Logs are what TensorBoard reads, whatever fails meanwhile."""

import resource
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from vgen.data.video_io import read_video
from vgen.training.logs import Logs, track_video
from vgen.training.run import Run, RunConfig, start


def read(folder):
    """Steps and values by name."""
    found = EventAccumulator(str(folder)).Reload()
    return {name: [(one.step, one.value) for one in found.Scalars(name)] for name in found.Tags()["scalars"]}


@pytest.fixture
def warnings(monkeypatch):
    logged = []
    monkeypatch.setattr("vgen.training.logs.logger.warning", logged.append)
    return logged


def test_logs_of_a_resumed_run_are_those_of_a_summary_writer(tmp_path):
    runs = [(1, range(1, 8)), (5, range(5, 10))]  # the first run was killed after its checkpoint of step 4
    for run, (first, steps) in enumerate(runs):
        ours, theirs = Logs(tmp_path / "ours", first), SummaryWriter(tmp_path / "theirs", purge_step=first)
        for step in steps:
            values = {"loss": 1 / step + run, "throughput/clips_per_second": float(step)}
            ours.write(values, step)
            for name, value in values.items():
                theirs.add_scalar(name, value, step)
        theirs.close()
        assert read(tmp_path / "ours") == read(tmp_path / "theirs")
    assert [step for step, _ in read(tmp_path / "ours")["loss"]] == list(range(1, 10))


def test_entries_are_lost_while_the_disk_is_full_and_the_file_stays_whole(tmp_path, warnings):
    logs, before = Logs(tmp_path / "logs", 1), resource.getrlimit(resource.RLIMIT_FSIZE)
    entries = {f"value {index}": float(index) for index in range(20)}
    logs.write(entries, 1)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (logs.path.stat().st_size + 100, before[1]))  # of this process
        for step in (2, 3):
            logs.write(entries, step)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert warnings == [f"{logs.path} cannot be written, training goes on without logs: File too large"]
    logs.write(entries, 4)
    assert read(tmp_path / "logs") == {name: [(1, value), (4, value)] for name, value in entries.items()}


def test_logs_begin_whole_where_their_first_entries_were_lost(tmp_path, warnings):
    (tmp_path / "logs").write_text("in the way")
    logs = Logs(tmp_path / "logs", 1)
    logs.write({"loss": 1.0}, 1)
    assert len(warnings) == 1 and str(logs.path) in warnings[0]
    (tmp_path / "logs").unlink()
    logs.write({"loss": 2.0}, 2)
    assert read(tmp_path / "logs") == {"loss": [(2, 2.0)]}


def test_a_video_is_an_animation_in_tensorboard(tmp_path):
    frames = np.zeros((5, 16, 24, 3), dtype=np.uint8)
    frames[np.arange(5), :, np.arange(5) * 4] = 255
    Logs(tmp_path / "logs", 1).write_video("samples", frames, 8.0, 3)
    (image,) = EventAccumulator(str(tmp_path / "logs")).Reload().Images("samples")
    assert (image.step, image.height, image.width) == (3, 16, 24)
    (tmp_path / "video.gif").write_bytes(image.encoded_image_string)
    assert np.array_equal(read_video(tmp_path / "video.gif")[0], frames)


class Tracker(GeneralTracker):
    """Keeps what it gets. Its class is registered with accelerate under its name."""

    name, requires_logging_directory, tracker = "kept", False, None

    def __init__(self, run_name, **options):
        super().__init__()
        KEPT.append(("start", run_name, options))

    def store_init_configuration(self, values):
        KEPT.append(("settings", values))

    def log(self, values, step):
        KEPT.append((step, values))

    def log_images(self, values, step):
        KEPT.append((step, values))


KEPT = []


def test_a_tracker_of_accelerate_gets_settings_scalars_and_samples(tmp_path, monkeypatch):
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "kept", Tracker)
    KEPT.clear()
    config = RunConfig(output_dir=tmp_path / "run", log_with="tensorboard, kept", log_every=1, mixed_precision="no")
    run = Run(config, start(config), torch.nn.Linear(2, 1))
    run.count(1, 1, (), lambda network: network(torch.ones(2)))
    run.step = 1
    run.log(loss=torch.tensor(2.0))
    run.report({"psnr": 30.0}, "psnr")
    run.save_samples(np.arange(17 * 8 * 8 * 3, dtype=np.uint8).reshape(17, 8, 8, 3), 8.0)
    run.end(lambda weights: None, "model", "vgen info {}")
    (_, name, _), (_, settings), *rest = KEPT
    assert name == "vgen" and settings["seed"] == 0 and settings["output_dir"] == str(config.output_dir)
    values = {key: value for step, logged in rest for key, value in logged.items() if step == 1}
    assert values["loss"] == 2.0 and values["psnr"] == 30.0 and values["samples"].shape == (6, 8, 8, 3)
    assert read(config.output_dir / "logs")["psnr"] == [(1, 30.0)]


def test_wandb_gets_videos(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(Video=lambda path: f"video {path}"))
    logged = []
    tracker = SimpleNamespace(name="wandb", log=lambda values, step: logged.append((values, step)))
    track_video(tracker, "samples", tmp_path / "samples.mp4", np.zeros((1, 8, 8, 3), np.uint8), 7)
    assert logged == [({"samples": f"video {tmp_path / 'samples.mp4'}"}, 7)]


@pytest.mark.parametrize(("name", "message"), [("nosuch", "got 'nosuch'"), ("aim", "log_with=aim needs the package")])
def test_unknown_and_missing_trackers_are_named(tmp_path, name, message):
    with pytest.raises(ValueError, match=message):
        RunConfig(output_dir=tmp_path, log_with=name).check()
