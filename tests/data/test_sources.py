import gzip
import itertools
import json
import os
import random
import struct
import tarfile
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from tests.fixtures import write_tar
from vgen.data import sources
from vgen.data.augment import Augmentation
from vgen.data.clips import Listed, Sampling, VideoFolder, list_videos
from vgen.data.moving_mnist import MovingMNIST
from vgen.data.sources import (
    SHUFFLE_BUFFER,
    VideoStream,
    _shuffled,
    expand_braces,
    list_dataset,
    list_shards,
    open_clips,
    stream_dataset,
    stream_shards,
)
from vgen.data.video_io import write_video

datasets = pytest.importorskip("datasets")
pyarrow_parquet = pytest.importorskip("pyarrow.parquet")

SAMPLING = Sampling(num_frames=5, kind="sliding")
EVERY_CLIP = [((f"gray {index // 2}",), index // 2) for index in range(6)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three videos of 10 frames, each of one gray, with captions."""
    folder = tmp_path_factory.mktemp("videos")
    for index in range(3):
        frames = np.full((10, 16, 16, 3), 60 * index, dtype=np.uint8)
        write_video(frames, folder / f"clip{index}.mp4", frame_rate=8.0)
    rows = [{"file_name": f"clip{index}.mp4", "text": f"gray {index}"} for index in range(3)]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def parquet(folder):
    """The same as a dataset that stores the files in its table."""
    features = datasets.Features({"video": datasets.Video(decode=False), "text": datasets.Value("string")})
    rows = {
        "video": [
            {"bytes": (folder / f"clip{index}.mp4").read_bytes(), "path": f"clip{index}.mp4"} for index in range(3)
        ],
        "text": [f"gray {index}" for index in range(3)],
    }
    return datasets.Dataset.from_dict(rows, features=features)


@pytest.fixture(scope="module")
def shards(folder, tmp_path_factory):
    """The same as two tar files, the first of which also holds a damaged video."""
    target = tmp_path_factory.mktemp("shards")
    for shard, indices in enumerate(([0, 1], [2])):
        members = {f"clip{index}.mp4": (folder / f"clip{index}.mp4").read_bytes() for index in indices}
        members |= {f"clip{index}.txt": f"gray {index}\nlevel {index}" for index in indices}
        members |= {"damaged.mp4": b"no video"} if shard == 0 else {}
        write_tar(target / f"train-{shard:03d}.tar", members)
    return target


def grays(clips):
    return [(clip.captions, round(float(clip.frames.mean()) / 60)) for clip in clips]


def test_a_dataset_gives_the_same_clips_as_its_folder(folder, parquet):
    here, there = VideoFolder(list_dataset(parquet), SAMPLING, 16, 16), VideoFolder(folder, SAMPLING, 16, 16)
    assert len(here) == len(there) == 6
    for index in range(6):
        assert np.array_equal(here.clip(index).frames, there.clip(index).frames)
        assert here.clip(index).captions == there.clip(index).captions
    assert np.array_equal(here.sample(11).frames, there.sample(11).frames)


def test_a_dataset_is_opened_by_name(folder, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    for data in (f"hf:{folder}", f"hf:{folder}:train"):
        clips = open_clips(data, SAMPLING, 16, 16)
        assert isinstance(clips, VideoFolder)
        assert grays(clips.clip(index) for index in (0, 2, 4)) == [((f"gray {i}",), i) for i in range(3)]
    stream = open_clips(f"hf-stream:{folder}", SAMPLING, 16, 16)
    assert isinstance(stream, VideoStream)
    assert sorted(grays(stream.sample(index) for index in range(6))) == EVERY_CLIP


def test_a_stream_gives_each_video_once_an_epoch(parquet):
    stream = VideoStream(lambda epoch: stream_dataset(parquet.to_iterable_dataset()), SAMPLING, 16, 16)
    for _ in range(2):
        assert sorted(grays(stream.sample(0) for _ in range(6))) == EVERY_CLIP


def test_shards_give_their_videos_and_name_damaged_ones(shards):
    stream = open_clips(f"shards:{shards}/train-{{000..001}}.tar", SAMPLING, 16, 16)
    labels = grays(stream.sample(index) for index in range(6))
    assert sorted(labels) == sorted(((f"gray {i // 2}", f"level {i // 2}"), i // 2) for i in range(6))
    stream.sample(6)  # the next epoch
    assert [one.path.name for one in stream.skipped] == ["damaged.mp4"]


def test_a_truncated_shard_gives_the_samples_before_the_damage(shards, tmp_path, caplog):
    content = (shards / "train-000.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(content[: content.index(b"clip1.mp4") + 600])
    assert [one.path.name for one in stream_shards(str(tmp_path / "cut.tar"))] == ["clip0.mp4"]
    assert any(f"{tmp_path / 'cut.tar'} is damaged" in message for message in caplog.messages)
    assert any("clip1.mp4: the file cannot be fetched" in message for message in caplog.messages)


def test_a_stream_is_shuffled_by_a_buffer_of_bounded_size():
    listed, taken = [Listed(path=Path(f"{index}.mp4")) for index in range(100)], []
    videos = (taken.append(one) or one for one in listed)
    order = []
    for one in _shuffled(videos, random.Random(0)):
        order.append(one)
        assert len(taken) - len(order) <= SHUFFLE_BUFFER
    assert set(order) == set(listed) and order != listed


def test_unusable_files_are_named(tmp_path, folder, monkeypatch):
    with pytest.raises(ValueError, match="has no column of videos, only"):
        list_dataset(datasets.Dataset.from_dict({"text": ["a"]}))
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        open_clips(str(tmp_path / "nowhere"), SAMPLING, 16, 16)
    with monkeypatch.context() as patch:
        patch.setattr("vgen.data.sources.rank_and_world_size", lambda: (1, 2))
        with pytest.raises(ValueError, match="no usable clip for process 1 of 2, which split its videos: it is empty"):
            VideoStream(lambda epoch: iter([]), SAMPLING, 16, 16).sample(0)
    stream = VideoStream(lambda epoch: iter([]), SAMPLING, 16, 16)
    with pytest.raises(ValueError, match="the stream has no usable clip: it is empty"):
        stream.sample(0)
    long = Sampling(num_frames=50)
    stream = VideoStream(lambda epoch: list_videos(folder), long, 16, 16)
    with pytest.raises(ValueError, match="a clip needs 50"):
        stream.sample(0)


def test_digits_and_folders_are_opened_by_path(folder, tmp_path):
    path = tmp_path / "t10k-images-idx3-ubyte.gz"
    digits = np.zeros((3, 28, 28), dtype=np.uint8)
    path.write_bytes(gzip.compress(struct.pack(">BBBB3I", 0, 0, 8, 3, 3, 28, 28) + digits.tobytes()))
    world = open_clips(str(path), SAMPLING, 64, 64, seed=3)
    assert isinstance(world, MovingMNIST) and world.num_frames == 5 and world.seed == 3
    assert len(open_clips(f"{path}:1:3", SAMPLING, 64, 64).digits) == 2
    stochastic = open_clips(f"{path}:1:3:stochastic", SAMPLING, 64, 64)
    assert stochastic.stochastic and len(stochastic.digits) == 2 and not world.stochastic
    with pytest.raises(ValueError, match="selects no digits"):
        open_clips(f"{path}:3:9", SAMPLING, 64, 64)
    with pytest.raises(ValueError, match="Moving MNIST is 64x64"):
        open_clips(str(path), SAMPLING, 32, 32)
    assert isinstance(open_clips(str(folder), SAMPLING, 16, 16), VideoFolder)


def test_digits_of_a_dataset_are_those_of_its_images(tmp_path):
    digits = np.random.default_rng(0).integers(0, 256, (3, 28, 28), dtype=np.uint8)
    features = datasets.Features({"image": datasets.Image()})
    table = datasets.Dataset.from_dict({"image": [Image.fromarray(digit) for digit in digits]}, features=features)
    table.to_parquet(tmp_path / "test.parquet")
    world = open_clips(f"hf-digits:{tmp_path}:test:stochastic", SAMPLING, 64, 64)
    assert world.stochastic and np.array_equal(world.digits, digits)


def test_augmentation_of_a_folder_changes_each_epoch_and_repeats_each_run(folder):
    noisy = Augmentation(brightness=0.5)
    clips = open_clips(str(folder), SAMPLING, 16, 16, augmentation=noisy)
    first, again, later = clips.clip(3), clips.clip(3), clips.clip(3, epoch=1)
    assert np.array_equal(first.frames, again.frames) and not np.array_equal(first.frames, later.frames)


def test_videos_of_a_stream_are_augmented_independently(parquet):
    def videos(epoch):
        return stream_dataset(parquet.to_iterable_dataset())

    whole = Sampling(num_frames=10)
    noisy = Augmentation(brightness=0.5)
    clips = list(videos(0))[1:]  # both are gray, not black
    levels = []
    for settings in (None, noisy, noisy):
        stream = VideoStream(videos, whole, 16, 16, augmentation=settings)
        levels.append([next(stream.clips(one)).frames.mean() for one in clips])
    plain, first, again = np.array(levels)
    assert np.array_equal(first, again)
    assert abs(np.diff(first / plain)) > 0.05


@pytest.fixture
def many(folder, tmp_path):
    """Eight copies of a video, each with its number as caption, in four files of a dataset and in four tar files."""
    content = (folder / "clip0.mp4").read_bytes()
    features = datasets.Features({"video": datasets.Video(decode=False), "text": datasets.Value("string")})
    for shard in range(4):
        numbers = [2 * shard, 2 * shard + 1]
        rows = {"video": [{"bytes": content, "path": "x.mp4"}] * 2, "text": [str(number) for number in numbers]}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / f"train-{shard}.parquet")
        members = {f"{number}.mp4": content for number in numbers} | {
            f"{number}.txt": str(number) for number in numbers
        }
        write_tar(tmp_path / f"{shard}.tar", members)
    files = [str(path) for path in sorted(tmp_path.glob("*.parquet"))]
    table = datasets.load_dataset("parquet", data_files=files, split="train", streaming=True, cache_dir=str(tmp_path))
    return {"dataset": partial(stream_dataset, table), "shards": partial(stream_shards, f"{tmp_path}/{{0..3}}.tar")}


@pytest.mark.parametrize("kind", ["dataset", "shards"])
@pytest.mark.parametrize(("processes", "workers", "own"), [(1, 1, True), (2, 1, True), (2, 2, True), (4, 1, True),
                                                           (3, 2, False), (5, 1, False), (1, 4, True)])  # fmt: skip
def test_each_process_and_worker_has_videos_of_its_own(many, monkeypatch, kind, processes, workers, own):
    labels = []
    for rank, worker in itertools.product(range(processes), range(workers)):
        with monkeypatch.context() as patch:
            info = SimpleNamespace(id=worker, num_workers=workers)
            patch.setattr(torch.utils.data, "get_worker_info", lambda info=info: info if workers > 1 else None)
            patch.setenv("RANK", str(rank))
            patch.setenv("WORLD_SIZE", str(processes))
            labels.append([int(one.captions[0]) for one in many[kind](process=(rank, processes), epoch=0)])
    assert sorted(itertools.chain(*labels)) == list(range(8))  # each video once
    if own:
        assert len({len(one) for one in labels}) == 1
        shards = [{number // 2 for number in numbers} for numbers in labels]
        assert sum(map(len, shards)) == 4  # none is read by two


def test_a_stream_has_a_worker_for_each_of_its_shards_at_most(shards, folder, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    urls = f"shards:{shards}/train-{{000..001}}.tar"
    for processes, expected in ((1, 2), (2, 1), (3, 2)):  # of too few shards, all processes read each
        monkeypatch.setattr("vgen.data.sources.rank_and_world_size", lambda count=processes: (0, count))
        assert open_clips(urls, SAMPLING, 16, 16).max_workers == expected
    assert open_clips(f"hf-stream:{folder}", SAMPLING, 16, 16).max_workers >= 1


def test_videos_that_cannot_be_fetched_are_skipped(folder, caplog):
    def fail():
        raise RuntimeError("the network is gone")

    good = list_videos(folder)[0]
    stream = VideoStream(lambda epoch: iter([Listed(path=Path("gone.mp4"), content=fail), good]), SAMPLING, 16, 16)
    assert stream.sample(0).source == good
    assert any("gone.mp4: the file cannot be fetched: the network is gone" in message for message in caplog.messages)


def captions_in(path, members):
    write_tar(path, members)
    return {one.path.relative_to(path).as_posix(): one.captions for one in stream_shards(str(path))}


def test_captions_in_shards_belong_to_the_name_up_to_the_suffix(tmp_path):
    names = ["Track 2.0 (clean)", "Track 2.1", "a/Track 2.0 (clean)", "./clip.01.final"]
    members = {f"{name}.mp4": b"x" for name in names} | {f"{name}.TXT": f"\ufeff{name}\n" for name in names}
    assert captions_in(tmp_path / "a.tar", members) == {f"{name.removeprefix('./')}.mp4": (name,) for name in names}


def test_captions_in_shards_are_found_in_any_order_and_kind_of_member(tmp_path, caplog):
    members = {
        "1.mp4": b"x", "2.mp4": b"x", "3.MKV": b"x", "4.mp4": b"x", "5.low.mp4": b"x", "6.l.mp4": b"x",
        "6.r.mp4": b"x",
        "7.mp4": b"x", "8.mp4": b"x", "9.mp4": b"x",
        "9.cls": "3", "5.txt": "five", "6.txt": "six", "4.json": json.dumps({"caption": ["four", "vier"]}),
        "3.json": json.dumps({"width": 3}), "3.caption": "three", "2.json": json.dumps({"text": "two"}),
        "1.txt": "one\u2028one\neins", "1.json": json.dumps({"text": "no"}), "7.json": "[" * 100_000, "8.txt": b"\xff",
    }  # fmt: skip
    path = tmp_path / "a.tar"
    found = captions_in(path, members)
    assert found.pop("1.mp4") == ("one\u2028one", "eins") and found.pop("4.mp4") == ("four", "vier")
    assert found.pop("2.mp4") == ("two",) and found.pop("3.MKV") == ("three",) and found.pop("5.low.mp4") == ("five",)
    assert set(found.values()) == {("",)}  # 6.txt could be either's
    (warning,) = [message for message in caplog.messages if "have no caption" in message]
    assert warning.startswith(f"5 videos of {path} have no caption: expected a member of the same name with .txt, ")
    assert ".cls" in warning and f"{path}/6.l.mp4, {path}/6.r.mp4, {path}/7.mp4, ..." in warning
    assert sum("is not a caption" in message for message in caplog.messages) == 2


def test_hidden_and_linked_members_of_shards_are_not_used(tmp_path):
    path = tmp_path / "a.tar"
    write_tar(path, {"._1.mp4": b"x", "__MACOSX/1.mp4": b"x", "1.mp4": b"x"})
    with tarfile.open(path, "a") as tar:
        link = tarfile.TarInfo("2.mp4")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    assert [one.path for one in stream_shards(str(path))] == [path / "1.mp4"]


def test_no_command_is_run_unless_it_is_allowed(tmp_path, shards, monkeypatch):
    source = f"shards:pipe:touch {tmp_path}/run; cat {shards}/train-001.tar"
    with pytest.raises(ValueError, match="would run a shell command: set VGEN_ALLOW_PIPES=1"):
        open_clips(source, SAMPLING, 16, 16)
    assert not (tmp_path / "run").exists()
    monkeypatch.setenv("VGEN_ALLOW_PIPES", "1")
    assert open_clips(source, SAMPLING, 16, 16).sample(0).captions == ("gray 2", "level 2")


def test_names_of_shards_run_no_command(tmp_path, shards, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("'; touch run; '.tar", "$(touch run).tar", "pipe: touch run.tar"):
        (tmp_path / name).write_bytes((shards / "train-001.tar").read_bytes())
        assert len(list(stream_shards(f"./{name}"))) == 1
    assert not (tmp_path / "run").exists()


def test_shards_are_read_from_urls(shards):
    handler = partial(SimpleHTTPRequestHandler, directory=str(shards))
    handler.log_message = lambda *_: None
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/train-001.tar"
        for source in (url, f"file://{shards}/train-001.tar"):
            assert [one.captions for one in stream_shards(source)] == [("gray 2", "level 2")]
        server.shutdown()


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("a.tar", ["a.tar"]),
        ("{000..002}.tar", ["000.tar", "001.tar", "002.tar"]),
        ("{8..10}", ["8", "9", "10"]),
        ("{2..0}", ["2", "1", "0"]),
        ("{0..6..3}", ["0", "3", "6"]),
        ("{a,b}-{0..1}", ["a-0", "a-1", "b-0", "b-1"]),
        ("{x}{}-{a", ["{x}{}-{a"]),
    ],
)
def test_braces_are_expanded_as_by_bash(pattern, expected):
    assert list(expand_braces(pattern)) == expected


@pytest.mark.parametrize(
    "pattern",
    [
        "{0..99999999}.tar",
        "{0..9999}{0..9999}.tar",
        "{a,b}" * 40,
        "{0..999999999999999999}",
        "{{0..9999},{0..99999999}}",
    ],
)
def test_too_many_shards_are_rejected(pattern, monkeypatch):
    assert sources.MAX_SHARDS == 1_000_000
    monkeypatch.setattr(sources, "MAX_SHARDS", 1_000)
    with pytest.raises(ValueError, match="names more than 1000 files"):
        list_shards(pattern)


def test_a_missing_shard_is_named(shards, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no shard .*train-002\.tar"):
        open_clips(f"shards:{shards}/train-{{000..002}}.tar", SAMPLING, 16, 16)
    os.mkfifo(tmp_path / "pipe.tar")
    with pytest.raises(FileNotFoundError, match="there is no shard"):
        open_clips(f"shards:{tmp_path}/pipe.tar", SAMPLING, 16, 16)


def table(columns, **features):
    length = len(next(iter(columns.values())))
    features = datasets.Features({"video": datasets.Video(decode=False)} | features)
    return datasets.Dataset.from_dict(
        {"video": [{"bytes": b"x", "path": "x.mp4"}] * length} | columns, features=features
    )


@pytest.mark.parametrize("streamed", [False, True])
def test_captions_of_a_dataset_may_be_in_a_column_caption(streamed, caplog):
    string = datasets.Value("string")

    def captions(dataset):
        listed = stream_dataset(dataset.to_iterable_dataset()) if streamed else list_dataset(dataset)
        return [one.captions for one in listed]

    assert captions(table({"caption": ["a", "b"]}, caption=string)) == [("a",), ("b",)]
    assert captions(table({"caption": [["a", "b"]]}, caption=datasets.List(string))) == [("a", "b")]
    both = table({"caption": ["a", "b"], "text": [None, "c"]}, caption=string, text=string)
    assert captions(both) == [("a",), ("c",)] and not caplog.messages
    assert captions(table({"title": ["a", "b"]}, title=string)) == [("",), ("",)]
    assert any(
        "have no caption: expected a column text or caption, got ['video', 'title']" in m for m in caplog.messages
    )
    with pytest.raises(ValueError, match="captions must be a string or a list of strings, got 5"):
        captions(table({"text": [5]}, text=datasets.Value("int64")))


@pytest.mark.parametrize("kind", ["hf", "hf-stream"])
def test_rows_of_a_table_open_no_files(tmp_path, monkeypatch, folder, kind, caplog):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(folder)
    content = (folder / "clip2.mp4").read_bytes()
    paths = [str(folder / "clip0.mp4"), "clip1.mp4", f"file://{folder}/clip1.mp4", "../x.mp4"]
    rows = [{"bytes": None, "path": path} for path in paths] + [{"bytes": content, "path": "x.mp4"}]
    rows += [{"bytes": b"ffconcat version 1.0\nfile clip0.mp4\n", "path": "x.mp4"}, None]
    features = datasets.Features({"video": datasets.Video(decode=False)})
    (tmp_path / "data").mkdir()
    rows = datasets.Dataset.from_dict({"video": rows}, features=features)
    pyarrow_parquet.write_table(rows.data.table, tmp_path / "data/train.parquet")  # `to_parquet` would read the files
    clips = open_clips(f"{kind}:{tmp_path}/data", SAMPLING, 16, 16)
    assert {clips.sample(index).source.path.name for index in range(6)} == {"00000004.mp4"}
    reasons = " ".join(clips.skipped.values())
    assert len(clips.skipped) == 6 and reasons.count("which is not part of the dataset") == 4
    assert "its container is not supported" in reasons and "the row has no video" in reasons


@pytest.mark.parametrize("kind", ["hf", "hf-stream"])
def test_a_damaged_table_is_named(tmp_path, monkeypatch, parquet, kind):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    path = tmp_path / "data/train.parquet"
    path.parent.mkdir()
    for damage in ("cut", "noise", "empty"):
        parquet.to_parquet(path)
        content = path.read_bytes()
        middle = len(content) // 2
        noise = content[:middle] + bytes(500) + content[middle + 500 :]
        path.write_bytes({"cut": content[:middle], "noise": noise, "empty": b""}[damage])
        try:
            clips = open_clips(f"{kind}:{path.parent}", SAMPLING, 16, 16)
            clips.sample(0)
        except (ValueError, FileNotFoundError) as error:
            assert str(path.parent) in str(error) or damage == "noise"
        else:
            assert damage == "noise"
