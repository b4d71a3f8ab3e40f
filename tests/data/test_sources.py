import gzip
import itertools
import json
import random
import struct
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from vgen.data.augment import Augmentation
from vgen.data.clips import Listed, Sampling, VideoFolder, list_videos
from vgen.data.moving_mnist import MovingMNIST
from vgen.data.sources import (
    SHUFFLE_BUFFER,
    VideoStream,
    _shuffled,
    list_dataset,
    open_clips,
    stream_dataset,
    stream_shards,
)
from vgen.data.video_io import write_video

datasets = pytest.importorskip("datasets")
webdataset = pytest.importorskip("webdataset")

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
        with webdataset.TarWriter(str(target / f"train-{shard:03d}.tar")) as tar:
            for index in indices:
                content = (folder / f"clip{index}.mp4").read_bytes()
                tar.write({"__key__": f"clip{index}", "mp4": content, "txt": f"gray {index}\nlevel {index}"})
            if shard == 0:
                tar.write({"__key__": "damaged", "mp4": b"no video"})
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


def test_a_truncated_shard_gives_the_samples_before_the_damage(shards, tmp_path):
    content = (shards / "train-000.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(content[: len(content) // 2])
    with pytest.warns(UserWarning):
        names = [one.path.name for one in stream_shards(str(tmp_path / "cut.tar"))]
    assert names and set(names) < {"clip0.mp4", "clip1.mp4", "damaged.mp4"}


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


@pytest.fixture
def many(folder, tmp_path):
    """Eight copies of a video, each with its number as caption, in four files of a dataset and in four tar files."""
    content = (folder / "clip0.mp4").read_bytes()
    features = datasets.Features({"video": datasets.Video(decode=False), "text": datasets.Value("string")})
    for shard in range(4):
        numbers = [2 * shard, 2 * shard + 1]
        rows = {"video": [{"bytes": content, "path": "x.mp4"}] * 2, "text": [str(number) for number in numbers]}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / f"train-{shard}.parquet")
        with webdataset.TarWriter(str(tmp_path / f"{shard}.tar")) as tar:
            for number in numbers:
                tar.write({"__key__": f"{number}", "mp4": content, "txt": str(number)})
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
    with pytest.raises(ValueError, match="process 0 of 3, but webdataset finds process 0 of 1"):
        open_clips(urls, SAMPLING, 16, 16).sample(0)


def test_videos_that_cannot_be_fetched_are_skipped(folder, caplog):
    def fail():
        raise RuntimeError("the network is gone")

    good = list_videos(folder)[0]
    stream = VideoStream(lambda epoch: iter([Listed(path=Path("gone.mp4"), content=fail), good]), SAMPLING, 16, 16)
    assert stream.sample(0).source == good
    assert any("gone.mp4: the file cannot be fetched: the network is gone" in message for message in caplog.messages)
