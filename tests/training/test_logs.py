"""Logs are what TensorBoard reads, whatever fails meanwhile."""

import resource

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from vgen.training.logs import Logs


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
