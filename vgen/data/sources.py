"""Sources of training videos: folders, Hugging Face datasets, WebDataset shards and Moving MNIST."""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from vgen.data.augment import Augmentation
from vgen.data.clips import Clip, Listed, Sampling, VideoFolder, list_videos, warn_skipped
from vgen.data.formats import VIDEO_SUFFIXES
from vgen.data.moving_mnist import MovingMNIST, digits_from_hub, read_digits
from vgen.io.remote import is_url, local_copy
from vgen.processes import rank_and_world_size

STOCHASTIC = ":stochastic"
SHUFFLE_BUFFER = 32
"""Number of videos in the shuffle buffer of a stream."""


class VideoStream:
    """Clips of a stream of videos, for data that is too large to list.

    Unusable videos are skipped, and `skipped` has the reasons. The position in a stream is not saved: a resumed run
    starts the stream from its beginning.

    Args:
        videos: Returns the videos of an epoch that belong to this process and, in a DataLoader, to this worker.
        sampling: Which frames of a video make a clip.
        height: Height of the clips in pixels. Frames are resized and center-cropped to this shape.
        width: Width of the clips in pixels.
        seed: Seed of random choices.
        augmentation: Random augmentation of clips.
        count_shards: Returns how many DataLoader workers `videos` can be split between; `None` means one.
    """

    def __init__(
        self,
        videos: Callable[[int], Iterable[Listed]],
        sampling: Sampling,
        height: int,
        width: int,
        seed: int = 0,
        augmentation: Augmentation | None = None,
        count_shards: Callable[[], int] | None = None,
    ):
        self.videos, self.sampling, self.size = videos, sampling, (height, width)
        self.seed, self.augmentation = seed, augmentation
        self.skipped: dict[Listed, str] = {}
        self.count_shards = count_shards
        self._endless: Iterator[Clip] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_endless": None}  # a copy in another process starts its own stream

    @property
    def max_workers(self) -> int:
        """Maximum number of DataLoader workers that the videos can be split between."""
        return 1 if self.count_shards is None else max(1, self.count_shards())

    def sample(self, number: int) -> Clip:
        """The next clip of an endless sequence of epochs, shuffled by a buffer; `number` is ignored.

        Raises:
            ValueError: No video of an epoch can be used.
        """
        if self._endless is None:
            self._endless = self._epochs()
        return next(self._endless)

    def _epochs(self) -> Iterator[Clip]:
        for epoch in itertools.count():
            rng, empty = random.Random(self.seed * 1_000_003 + epoch), True
            for listed in _shuffled(self.videos(epoch), rng):
                for clip in self.clips(listed, epoch):
                    empty = False
                    yield clip
            if empty:
                reasons = "; ".join(f"{one.path}: {reason}" for one, reason in list(self.skipped.items())[:3])
                rank, count = rank_and_world_size()
                share = "" if count == 1 else f" for process {rank} of {count}, which split its videos"
                raise ValueError(f"the stream has no usable clip{share}: {reasons or 'it is empty'}")

    def clips(self, listed: Listed, epoch: int = 0) -> Iterator[Clip]:
        """The clips of one video of the stream."""
        try:
            fetched = replace(listed, path=listed.file(), content=None, root=None)
            folder = VideoFolder([fetched], self.sampling, *self.size, self.seed, self.augmentation, quiet=True)
            for index in range(len(folder)):
                clip = folder.clip(index, epoch)
                if clip is None:
                    raise ValueError(folder.skipped[fetched])
                yield clip._replace(source=listed)
        except (ValueError, OSError) as error:
            self.skipped[listed] = str(error)
            warn_skipped(listed, str(error))


def _shuffled(videos: Iterable[Listed], rng: random.Random) -> Iterator[Listed]:
    buffer: list[Listed] = []
    for listed in videos:
        buffer.append(listed)
        if len(buffer) > SHUFFLE_BUFFER:
            yield buffer.pop(rng.randrange(len(buffer)))
    rng.shuffle(buffer)
    yield from buffer


def open_clips(
    data: str,
    sampling: Sampling,
    height: int,
    width: int,
    seed: int = 0,
    augmentation: Augmentation | None = None,
) -> VideoFolder | VideoStream | MovingMNIST:
    """Opens a source of clips by its name.

    Args:
        data: One of these: a folder of videos (see `list_videos`), or the URL of one, which is downloaded first;
            `hf:NAME` or `hf:NAME:SPLIT` for a Hugging Face dataset (an id on the Hub or a local folder);
            `hf-stream:NAME` or `hf-stream:NAME:SPLIT` to stream such a dataset; `shards:PATTERN` for WebDataset tar
            files, such as `shards:train-{000..099}.tar`; for Moving MNIST an IDX file of digits, or `FILE:FIRST:LAST`
            for the digits from index FIRST up to but not including LAST; `hf-digits:NAME:SPLIT` for digits from a
            dataset on the Hub. With `:stochastic` at the end, digits bounce off the walls in random directions.
        sampling: Which frames of a video make a clip.
        height: Height of the clips in pixels.
        width: Width of the clips in pixels.
        seed: Seed of random choices.
        augmentation: Random augmentation of clips.

    Raises:
        FileNotFoundError: The folder or file does not exist.
        ValueError: It contains nothing usable.
        ImportError: The library that reads the source is not installed.
    """
    if is_url(data):
        data = str(local_copy(data))
    kind, _, name = data.partition(":")
    rest = (sampling, height, width, seed, augmentation)
    process = rank_and_world_size()
    if kind == "hf":
        return VideoFolder(list_dataset(*_split(name)), *rest)
    if kind == "hf-stream":
        opened = (*_split(name), process)
        return VideoStream(partial(stream_dataset, *opened), *rest, partial(count_dataset_shards, *opened))
    if kind == "shards":
        return VideoStream(partial(stream_shards, name, process), *rest, partial(count_shards, name, process))
    path, first, last = _sliced(data.removesuffix(STOCHASTIC))
    if kind != "hf-digits" and not (path.is_file() and "idx3" in path.name):
        return VideoFolder(list_videos(Path(data)), *rest)
    if (height, width) != (64, 64) or augmentation not in (None, Augmentation()):
        raise ValueError(
            "Moving MNIST is 64x64 and does not support augmentation, got "
            f"height={height}, width={width}, augmentation={augmentation}"
        )
    if kind == "hf-digits":
        digits = digits_from_hub(*_split(name.removesuffix(STOCHASTIC)))
    else:
        digits = read_digits(path)[first:last]
    if not len(digits):
        raise ValueError(f"{data} selects no digits")
    return MovingMNIST(digits, num_frames=sampling.num_frames, stochastic=data.endswith(STOCHASTIC), seed=seed)


def _sliced(data: str) -> tuple[Path, int, int | None]:
    """Splits `FILE:FIRST:LAST` into a path and the range of digits; without a range, all digits are used."""
    found = re.fullmatch(r"(.*):(\d+):(\d+)", data)
    return (Path(found[1]), int(found[2]), int(found[3])) if found else (Path(data), 0, None)


def _split(name: str) -> tuple[str, str]:
    name, _, split = name.partition(":")
    return name, split or "train"


def list_dataset(name: str | Any, split: str = "train") -> list[Listed]:
    """The videos of a Hugging Face dataset, in its order. A video is read when one of its clips is.

    Args:
        name: Id on the Hub, local folder, or `datasets.Dataset`. The dataset must have a column of videos; captions
            are read from the column `text` if there is one.
        split: Split of the dataset; ignored for a `datasets.Dataset`.

    Raises:
        ValueError: The dataset has no column of videos.
        ImportError: `datasets` is not installed.
    """
    dataset, video = _open_dataset(name, split, streaming=False)
    texts = dataset["text"] if "text" in dataset.column_names else [""] * len(dataset)
    listed = []
    for index, text in enumerate(texts):
        content = partial(_content_of_row, dataset, index, video)
        identity = (dataset._fingerprint, index)
        path = Path(f"{index:08d}.mp4")
        listed.append(Listed(path=path, captions=_captions(text), content=content, identity=identity))
    return listed


def _content_of_row(dataset: Any, index: int, video: str) -> bytes:
    return _content(dataset[index][video])


def _content(video: dict[str, Any]) -> bytes:
    """The bytes of a video file."""
    if video["bytes"] is not None:
        return video["bytes"]
    import fsspec

    with fsspec.open(video["path"], "rb") as file:
        return file.read()


def stream_dataset(
    name: str | Any, split: str = "train", process: tuple[int, int] = (0, 1), epoch: int = 0
) -> Iterator[Listed]:
    """Streams a process's share of the videos of a Hugging Face dataset, without downloading all of it.

    If the number of shards is a multiple of the number of processes, each process reads different shards. Otherwise
    each process reads all shards and keeps its share of the videos. The shards of a process are split between its
    DataLoader workers.

    Args:
        name: See `list_dataset`.
        split: See `list_dataset`.
        process: Rank of this process, and the number of processes.
        epoch: Ignored: the order is always that of the dataset.

    Raises:
        ValueError: The dataset has no column of videos.
        ImportError: `datasets` is not installed.
    """
    dataset, video = _open_stream(name, split, process)
    for index, row in enumerate(dataset):
        content = partial(_content, row[video])
        yield Listed(path=Path(f"{index:08d}.mp4"), captions=_captions(row.get("text", "")), content=content)


def count_dataset_shards(name: str | Any, split: str = "train", process: tuple[int, int] = (0, 1)) -> int:
    """Number of shards of a Hugging Face dataset that a process reads."""
    return _open_stream(name, split, process)[0].num_shards


def _open_stream(name: str | Any, split: str, process: tuple[int, int]) -> tuple[Any, str]:
    dataset, video = _open_dataset(name, split, streaming=True)
    if process[1] > 1:
        from datasets.distributed import split_dataset_by_node

        dataset = split_dataset_by_node(dataset, *process)
    return dataset, video


def _open_dataset(name: str | Any, split: str, streaming: bool) -> tuple[Any, str]:
    try:
        from datasets import Video, load_dataset
    except ImportError as error:
        raise ImportError("Hugging Face datasets need the package datasets: pip install vgen[data]") from error
    dataset = load_dataset(name, split=split, streaming=streaming) if isinstance(name, str) else name
    columns = [column for column, feature in (dataset.features or {}).items() if isinstance(feature, Video)]
    if not columns:
        raise ValueError(f"{name} has no column of videos, only {list(dataset.features or {})}")
    return dataset.cast_column(columns[0], Video(decode=False)), columns[0]


def stream_shards(urls: str, process: tuple[int, int] = (0, 1), epoch: int = 0) -> Iterator[Listed]:
    """Streams a process's share of the videos in WebDataset tar files.

    A sample is a video and, optionally, a `.txt` file with one caption per line under the same key. Each process reads
    different shards. If there are fewer shards than processes, each process reads all shards and keeps its share of
    the videos. The shards of a process are split between its DataLoader workers.

    Args:
        urls: Paths or URLs, with `{000..099}` for a range of numbers.
        process: Rank of this process, and the number of processes; must agree with webdataset's.
        epoch: Seed of the order of the shards.

    Raises:
        ImportError: `webdataset` is not installed.
        ValueError: `webdataset` finds another rank or number of processes.
    """
    webdataset = _webdataset()
    shards = webdataset.shardlists.expand_urls(urls)
    random.Random(epoch).shuffle(shards)
    found = webdataset.utils.pytorch_worker_info()[:2]
    if found != tuple(process):
        raise ValueError(
            f"this is process {process[0]} of {process[1]}, but webdataset finds process {found[0]} of {found[1]}: "
            "start the processes with accelerate launch or torchrun"
        )
    shares_shards = len(shards) >= process[1]
    # of a truncated shard, the samples before the damage are used, and webdataset warns
    dataset: Any = webdataset.WebDataset(
        shards,
        shardshuffle=False,
        handler=webdataset.warn_and_continue,
        empty_check=False,
        nodesplitter=webdataset.split_by_node if shares_shards else None,
        workersplitter=webdataset.split_by_worker,
    )
    if not shares_shards:
        dataset = itertools.islice(dataset, process[0], None, process[1])
    for sample in dataset:
        name = next((key for key in sample if f".{key.split('.')[-1].lower()}" in VIDEO_SUFFIXES), None)
        if name is None:
            continue
        captions = _captions(sample.get("txt", b"").decode(errors="replace").splitlines())
        yield Listed(
            path=Path(f"{sample['__key__'].replace('/', '-')}.{name.split('.')[-1]}"),
            captions=captions,
            content=partial(bytes, sample[name]),
        )


def count_shards(urls: str, process: tuple[int, int] = (0, 1)) -> int:
    """Number of WebDataset shards that each process reads; the minimum over processes if it differs."""
    count = len(_webdataset().shardlists.expand_urls(urls))
    return count // process[1] or count


def _webdataset() -> Any:
    try:
        import webdataset
    except ImportError as error:
        raise ImportError("tar shards need the package webdataset: pip install vgen[data]") from error
    return webdataset


def _captions(text: str | Iterable[str] | None) -> tuple[str, ...]:
    lines = [text or ""] if text is None or isinstance(text, str) else [line.strip() for line in text]
    return tuple(line for line in lines if line) or ("",)
