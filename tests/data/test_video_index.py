import json
import math
import os

import numpy as np
import pytest

from vgen.data import video_index
from vgen.data.clips import Bucket, Sampling, VideoFolder, list_videos, sort_into_buckets
from vgen.data.sources import list_dataset, open_clips
from vgen.data.video_index import INDEX, VideoIndex, index_of
from vgen.data.video_io import video_info, write_video


@pytest.fixture
def folder(tmp_path):
    for name in ("a.mp4", "deeper/b.gif"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_video(np.zeros((12, 16, 24, 3), dtype=np.uint8), tmp_path / name, frame_rate=10.0)
    return tmp_path


@pytest.fixture
def probed(monkeypatch):
    """Names of the files that were probed."""
    names = []

    def probe(path):
        names.append(path.name)
        return video_info(path)

    monkeypatch.setattr(video_index, "video_info", probe)
    monkeypatch.setattr("vgen.data.clips.video_info", probe)
    index_of.cache_clear()
    return names


def later():
    """As in another process."""
    index_of.cache_clear()


def test_each_file_is_probed_once_for_all_rates_and_lengths(folder, probed):
    for sampling in (Sampling(num_frames=n, frame_rate=rate) for n in (1, 5) for rate in (None, 5.0, 8.0)):
        VideoFolder(folder, sampling, 16, 16)
        open_clips(str(folder), sampling, 16, 16)
    assert sorted(probed) == ["a.mp4", "b.gif"]
    later()
    samplings = {Bucket(5, 16, 16): Sampling(num_frames=5, frame_rate=5.0)}
    assert len(sort_into_buckets(list_videos(folder), samplings)[Bucket(5, 16, 16)]) == 2
    assert len(VideoFolder(folder, Sampling(num_frames=5), 16, 16)) == 2 and len(probed) == 2
    assert {path.name for path in folder.iterdir()} == {"a.mp4", "deeper", INDEX}


def test_saved_properties_match_the_files(folder, probed):
    for listed in list_videos(folder):
        index_of(folder).info(listed.path)
    index_of(folder).save()
    for path in (folder / "a.mp4", folder / "deeper/b.gif"):
        assert VideoIndex(folder).info(path) == video_info(path)
    assert len(probed) == 2


def test_a_file_that_changes_is_probed_again(folder, probed):
    assert len(VideoFolder(folder, Sampling(num_frames=12), 16, 16)) == 2
    write_video(np.zeros((20, 16, 24, 3), dtype=np.uint8), folder / "a.mp4", frame_rate=10.0, overwrite=True)
    del probed[:]
    for _ in range(2):
        later()
        clips = VideoFolder(folder, Sampling(num_frames=12, kind="sliding", hop=8), 16, 16)
        assert sorted(listed.path.name for listed, *_ in clips.clips) == ["a.mp4", "a.mp4", "b.gif"]
    assert probed == ["a.mp4"]
    status = (folder / "a.mp4").stat()
    os.utime(folder / "a.mp4", ns=(status.st_atime_ns, status.st_mtime_ns + 1))  # of the same size
    VideoFolder(folder, Sampling(num_frames=12), 16, 16)
    assert probed == ["a.mp4"] * 2


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"a.mp4": 1}', '{"a.mp4": {"stamp": 0, "info": {}}}', "\0\xff", "[" * 100_000]
)
def test_a_damaged_index_is_written_anew(folder, probed, content):
    (folder / INDEX).write_bytes(content.encode("latin-1"))
    for _ in range(2):
        later()
        assert len(VideoFolder(folder, Sampling(num_frames=5), 16, 16)) == 2
    assert sorted(probed) == ["a.mp4", "b.gif"]
    assert sorted(json.loads((folder / INDEX).read_text())) == ["a.mp4", "deeper/b.gif"]


@pytest.mark.parametrize(
    ("name", "value"),
    [("width", "a"), ("width", 0), ("height", None), ("duration", "1"), ("duration", math.nan), ("frame_rate", -1.0)],
)
def test_an_index_with_other_values_is_written_anew(folder, probed, name, value):
    VideoFolder(folder, Sampling(num_frames=5), 16, 16)
    entries = json.loads((folder / INDEX).read_text())
    entries["a.mp4"]["info"][name] = value
    (folder / INDEX).write_text(json.dumps(entries))
    later()
    del probed[:]
    assert len(VideoFolder(folder, Sampling(num_frames=5), 16, 16)) == 2
    assert sorted(probed) == ["a.mp4", "b.gif"]


def test_an_index_that_is_a_pipe_is_not_read(folder):
    os.mkfifo(folder / INDEX)
    assert len(VideoFolder(folder, Sampling(num_frames=5), 16, 16)) == 2


def test_a_folder_that_cannot_be_written_is_probed_once_for_each_process(folder, probed):
    (folder / INDEX).mkdir()  # which nothing replaces
    for _ in range(2):
        VideoFolder(folder, Sampling(num_frames=5), 16, 16)
    assert sorted(probed) == ["a.mp4", "b.gif"]
    later()
    VideoFolder(folder, Sampling(num_frames=5), 16, 16)
    assert len(probed) == 4 and not list(folder.glob("*.partial"))


def test_entries_of_another_process_are_kept(folder, probed):
    one, other = VideoIndex(folder), VideoIndex(folder)
    one.info(folder / "a.mp4")
    other.info(folder / "deeper/b.gif")
    one.save()
    other.save()
    assert len(json.loads((folder / INDEX).read_text())) == 2


def test_rows_of_a_dataset_are_fetched_once_to_be_probed(folder, probed):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"video": datasets.Video(decode=False)})
    rows = {"video": [{"bytes": (folder / "a.mp4").read_bytes(), "path": "a.mp4"}] * 3}
    table = datasets.Dataset.from_dict(rows, features=features)
    for rate in (None, 2.0, 5.0):
        assert len(VideoFolder(list_dataset(table), Sampling(num_frames=2, frame_rate=rate), 16, 16)) == 3
    assert sorted(probed) == ["00000000.mp4", "00000001.mp4", "00000002.mp4"]


def test_entries_of_an_older_format_are_probed_again(folder, probed):
    """Earlier entries took the number of frames from the header."""
    status = (folder / "a.mp4").stat()
    info = {"codec": "h264", "width": 24, "height": 16, "frame_rate": 10.0, "num_frames": 99, "duration": 9.9}
    entry = {"stamp": [status.st_size, status.st_mtime_ns], "info": info}
    (folder / INDEX).write_text(json.dumps({"a.mp4": entry}))
    assert VideoIndex(folder).info(folder / "a.mp4").num_frames == 12 and probed == ["a.mp4"]
