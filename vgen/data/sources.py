"""Where training videos come from beside folders: Hugging Face datasets, WebDataset shards, digits."""

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
from vgen.data.moving_mnist import MovingMNIST, digits_from_hub, read_digits
from vgen.data.video_io import VIDEO_SUFFIXES
from vgen.processes import place_among_processes

STOCHASTIC = ":stochastic"
SHUFFLE_BUFFER = 32
"""Videos of a stream that wait to be drawn from."""


class VideoStream:
    """Clips of videos that come one after another, too many to list.

    A video that cannot be used is left out and stands in `refused` with the reason. Where a stream stood is not
    remembered: a run that goes on begins it anew.

    Args:
        videos: Gives the videos of an epoch that are this process's, and in a DataLoader's worker this worker's.
        sampling: Which frames of each make a clip.
        height: Of the frames, in pixels; the middle of a video is cropped to this shape.
        width: Of the frames.
        seed: Of random choices.
        augmentation: What else may change in a clip.
        count_shards: Says how many workers of a DataLoader `videos` can be shared out to; `None` for one.
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
        return self.__dict__ | {"_endless": None}  # a copy in another process begins anew

    @property
    def max_workers(self) -> int:
        """Most workers of a DataLoader that its videos can be shared out to."""
        return 1 if self.count_shards is None else max(1, self.count_shards())

    def sample(self, number: int) -> Clip:
        """The next clip, whatever its number; epochs follow one another, each in an order that a buffer shuffles.

        Raises:
            ValueError: No video of an epoch could be used.
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
                rank, count = place_among_processes()
                share = "" if count == 1 else f" to process {rank} of {count}, which share its videos out"
                raise ValueError(f"the stream gave no clip{share}: {reasons or 'it is empty'}")

    def clips(self, listed: Listed, epoch: int = 0) -> Iterator[Clip]:
        """The clips of one of its videos."""
        try:
            there = replace(listed, path=listed.file(), content=None, root=None)
            folder = VideoFolder([there], self.sampling, *self.size, self.seed, self.augmentation, quiet=True)
            for index in range(len(folder)):
                clip = folder.clip(index, epoch)
                if clip is None:
                    raise ValueError(folder.skipped[there])
                yield clip._replace(source=listed)
        except (ValueError, OSError) as error:
            self.skipped[listed] = str(error)
            warn_skipped(listed, str(error))


def _shuffled(videos: Iterable[Listed], rng: random.Random) -> Iterator[Listed]:
    waiting: list[Listed] = []
    for listed in videos:
        waiting.append(listed)
        if len(waiting) > SHUFFLE_BUFFER:
            yield waiting.pop(rng.randrange(len(waiting)))
    rng.shuffle(waiting)
    yield from waiting


def open_clips(
    data: str,
    sampling: Sampling,
    height: int,
    width: int,
    seed: int = 0,
    augmentation: Augmentation | None = None,
) -> VideoFolder | VideoStream | MovingMNIST:
    """Clips of a source that a user names.

    Args:
        data: A folder as `list_videos` takes it; `hf:NAME` or `hf:NAME:SPLIT` for a Hugging Face dataset (a name on
            the Hub or a local folder), `hf-stream:...` for one that is read as it comes; `shards:PATTERN` for
            WebDataset's tar files, such as `shards:train-{000..099}.tar`; an IDX file of digits for Moving MNIST,
            with `:FIRST:LAST` behind it for some of them, counted from 0, without the last; `hf-digits:NAME:SPLIT` for
            those of a dataset on the Hub. With `:stochastic` at the end, walls throw them back at random.
        sampling: Which frames make a clip.
        height: Of the frames, in pixels.
        width: Of the frames.
        seed: Of random choices.
        augmentation: What else may change in a clip.

    Raises:
        FileNotFoundError: There is no such folder or file.
        ValueError: It holds nothing that can be used.
        ImportError: The library that reads it is not installed.
    """
    kind, _, name = data.partition(":")
    rest = (sampling, height, width, seed, augmentation)
    process = place_among_processes()
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
        raise ValueError(f"Moving MNIST is 64x64 and not augmented: height={height}, width={width}")
    if kind == "hf-digits":
        digits = digits_from_hub(*_split(name.removesuffix(STOCHASTIC)))
    else:
        digits = read_digits(path)[first:last]
    if not len(digits):
        raise ValueError(f"{data} leaves no digits")
    return MovingMNIST(digits, num_frames=sampling.num_frames, stochastic=data.endswith(STOCHASTIC), seed=seed)


def _sliced(data: str) -> tuple[Path, int, int | None]:
    """A path and which of the digits in its file: all without `:FIRST:LAST`."""
    found = re.fullmatch(r"(.*):(\d+):(\d+)", data)
    return (Path(found[1]), int(found[2]), int(found[3])) if found else (Path(data), 0, None)


def _split(name: str) -> tuple[str, str]:
    name, _, split = name.partition(":")
    return name, split or "train"


def list_dataset(name: str | Any, split: str = "train") -> list[Listed]:
    """The videos of a Hugging Face dataset, in its order; each is read when its clips are.

    Args:
        name: On the Hub, a local folder, or a `datasets.Dataset`. It has a column of videos and may have one `text`.
        split: Of a named one.

    Raises:
        ValueError: It has no column of videos.
        ImportError: Datasets is not installed.
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
    """The file of a video that was not decoded."""
    if video["bytes"] is not None:
        return video["bytes"]
    import fsspec

    with fsspec.open(video["path"], "rb") as file:
        return file.read()


def stream_dataset(
    name: str | Any, split: str = "train", process: tuple[int, int] = (0, 1), epoch: int = 0
) -> Iterator[Listed]:
    """A process's videos of a Hugging Face dataset as they come, without the whole of it on disk.

    Where the number of processes divides that of the dataset's shards, each reads shards of its own; elsewhere each
    reads all and keeps its share of the videos. Workers of a DataLoader share the shards of their process.

    Args:
        name: As for `list_dataset`.
        split: As for `list_dataset`.
        process: Number of this process, and how many there are.
        epoch: Has no effect: the order is the dataset's.

    Raises:
        ValueError: It has no column of videos.
        ImportError: Datasets is not installed.
    """
    dataset, video = _open_stream(name, split, process)
    for index, row in enumerate(dataset):
        content = partial(_content, row[video])
        yield Listed(path=Path(f"{index:08d}.mp4"), captions=_captions(row.get("text", "")), content=content)


def count_dataset_shards(name: str | Any, split: str = "train", process: tuple[int, int] = (0, 1)) -> int:
    """Shards that a process reads of a Hugging Face dataset."""
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
        raise ImportError("Hugging Face datasets need datasets: pip install vgen[data]") from error
    dataset = load_dataset(name, split=split, streaming=streaming) if isinstance(name, str) else name
    columns = [column for column, feature in (dataset.features or {}).items() if isinstance(feature, Video)]
    if not columns:
        raise ValueError(f"{name} has no column of videos, only {list(dataset.features or {})}")
    return dataset.cast_column(columns[0], Video(decode=False)), columns[0]


def stream_shards(urls: str, process: tuple[int, int] = (0, 1), epoch: int = 0) -> Iterator[Listed]:
    """A process's videos of WebDataset's tar files: a video and, with the same key, a `.txt` of its wordings.

    Each process reads shards of its own; where there are fewer shards than processes, each reads all and keeps its
    share of the videos. Workers of a DataLoader share the shards that their process reads.

    Args:
        urls: Paths or addresses, `{000..099}` for a range of numbers.
        process: Number of this process, and how many there are, as webdataset counts them.
        epoch: Shards come in another order each time.

    Raises:
        ImportError: Webdataset is not installed.
        ValueError: Webdataset counts other processes.
    """
    webdataset = _webdataset()
    shards = webdataset.shardlists.expand_urls(urls)
    random.Random(epoch).shuffle(shards)
    found = webdataset.utils.pytorch_worker_info()[:2]
    if found != tuple(process):
        raise ValueError(
            f"this is process {process[0]} of {process[1]}, but webdataset takes it for {found[0]} of {found[1]}: "
            "start processes by accelerate launch or torchrun"
        )
    shares_shards = len(shards) >= process[1]
    # a shard that breaks off gives what came before, with a warning by webdataset
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
    """Shards that a process reads of WebDataset's tar files, the fewest of any."""
    count = len(_webdataset().shardlists.expand_urls(urls))
    return count // process[1] or count


def _webdataset() -> Any:
    try:
        import webdataset
    except ImportError as error:
        raise ImportError("tar shards need webdataset: pip install vgen[data]") from error
    return webdataset


def _captions(text: str | Iterable[str] | None) -> tuple[str, ...]:
    lines = [text or ""] if text is None or isinstance(text, str) else [line.strip() for line in text]
    return tuple(line for line in lines if line) or ("",)
