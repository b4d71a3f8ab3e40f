"""Sources of training videos: folders, Hugging Face datasets, WebDataset shards and Moving MNIST."""

from __future__ import annotations

import itertools
import json
import os
import random
import re
import subprocess
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path, PurePosixPath
from tempfile import NamedTemporaryFile
from typing import Any, NamedTuple

import numpy as np
import torch

from vgen.data.augment import Augmentation
from vgen.data.caption_files import CAPTION_COLUMNS, find_caption, split_lines
from vgen.data.clips import (
    Clip,
    Listed,
    Sampling,
    VideoFolder,
    list_videos,
    warn_once,
    warn_skipped,
    warn_uncaptioned,
)
from vgen.data.formats import VIDEO_SUFFIXES, is_ignored
from vgen.data.moving_mnist import SIZE, MovingMNIST, digits_from_hub, read_digits
from vgen.io.remote import is_url, local_copy, local_input
from vgen.processes import rank_and_world_size

STOCHASTIC = ":stochastic"
SHUFFLE_BUFFER = 32
"""Number of videos in the shuffle buffer of a stream."""
MAX_SHARDS = 1_000_000
"""Largest number of tar files."""
CAPTION_SUFFIXES = (".txt", ".caption", ".json")
"""Members of a tar file that are captions, in order of preference."""
MAX_CAPTION_BYTES = 2**20
"""Size of the largest member that is read as a caption."""


class VideoStream:
    """Clips of a stream of videos, for data that is too large to list.

    Unusable videos are skipped, and `skipped` has the reasons. The position in a stream is not saved: a resumed run
    starts the stream from its beginning.

    Args:
        videos: Returns the videos of an epoch that belong to this process and, in a DataLoader, to this worker.
        sampling: Which frames of a video make a clip.
        height: Height of the clips in pixels. Frames are cropped to this shape's aspect ratio and resized.
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
            seed = self.seed + zlib.crc32(os.fsencode(listed.path))  # its clips are numbered from 0 in each video
            folder = VideoFolder([fetched], self.sampling, *self.size, seed, self.augmentation, quiet=True)
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
    opened = open_videos(data, rank_and_world_size())
    rest = (sampling, height, width, seed, augmentation)
    if isinstance(opened, Stream):
        return VideoStream(opened.videos, *rest, opened.count_shards)
    if isinstance(opened, list):
        return VideoFolder(opened, *rest)
    if (height, width) != (SIZE, SIZE) or augmentation not in (None, Augmentation()):
        raise ValueError(
            "Moving MNIST is 64x64 and does not support augmentation, got "
            f"height={height}, width={width}, augmentation={augmentation}"
        )
    return MovingMNIST(opened.images, sampling.num_frames, stochastic=opened.stochastic, seed=seed)


class Stream(NamedTuple):
    """A stream of videos."""

    videos: Callable[[int], Iterator[Listed]]
    """Returns the videos of an epoch."""
    count_shards: Callable[[], int]
    """Returns how many DataLoader workers they can be split between."""


class Digits(NamedTuple):
    """Digits for Moving MNIST."""

    images: np.ndarray
    """uint8 `(n, 28, 28)`."""
    stochastic: bool


def open_videos(data: str, process: tuple[int, int] = (0, 1)) -> list[Listed] | Stream | Digits:
    """Opens a source by its name: the videos that it lists, a stream of them, or digits to make them of.

    Args:
        data: As in `open_clips`.
        process: Rank of this process, and the number of processes, which share the videos of a stream.

    Raises:
        FileNotFoundError: As in `open_clips`.
        ValueError: As in `open_clips`.
        ImportError: As in `open_clips`.
    """
    if is_url(data):
        data = str(local_copy(data))
    kind, _, name = data.partition(":")
    if kind == "hf":
        return list_dataset(*_split(name))
    if kind == "hf-stream":
        opened = (*_split(name), process)
        return Stream(partial(stream_dataset, *opened), partial(count_dataset_shards, *opened))
    if kind == "shards":
        list_shards(name)
        return Stream(partial(stream_shards, name, process), partial(count_shards, name, process))
    path, first, last = _sliced(data.removesuffix(STOCHASTIC))
    if kind == "hf-digits":
        digits = digits_from_hub(*_split(name.removesuffix(STOCHASTIC)))
    elif path.is_file() and "idx3" in path.name:
        digits = read_digits(path)[first:last]
    else:
        return list_videos(Path(data))
    if not len(digits):
        raise ValueError(f"{data} selects no digits")
    return Digits(digits, data.endswith(STOCHASTIC))


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
            are read from the column `text` or `caption`. A warning names videos without a caption.
        split: Split of the dataset; ignored for a `datasets.Dataset`.

    Raises:
        ValueError: The dataset is damaged, or has no column of videos.
        ImportError: `datasets` is not installed.
    """
    dataset, video = _open_dataset(name, split, streaming=False)
    columns = [column for column in CAPTION_COLUMNS if column in dataset.column_names]
    rows = dataset.select_columns(columns) if columns else [{}] * len(dataset)
    listed = []
    for index, row in enumerate(rows):
        content = partial(_content_of_row, dataset, index, video, name)
        identity = (dataset._fingerprint, index)
        path = Path(f"{index:08d}.mp4")
        captions = _captions(find_caption(row))
        listed.append(Listed(path=path, captions=captions, content=content, identity=identity))
    warn_uncaptioned(listed, _label(name), f"a column text or caption, got {dataset.column_names}")
    return listed


def _label(name: str | Any) -> str:
    return f"the dataset {name}" if isinstance(name, str) else "the dataset"


def _content_of_row(dataset: Any, index: int, video: str, name: str | Any) -> bytes:
    return _content(dataset[index][video], dataset, name)


def _content(video: dict[str, Any] | None, dataset: Any, name: str | Any) -> bytes:
    """The bytes of a video file.

    Raises:
        ValueError: The row has no video, or names a file that is not part of the dataset.
    """
    if video is None or (video["bytes"] is None and not video["path"]):
        raise ValueError("the row has no video")
    if video["bytes"] is not None:
        return video["bytes"]
    # the paths in a table are those of its author, and `None` is a dataset made in Python
    if dataset.info.builder_name not in (None, "videofolder", "webdataset") and not (
        video["path"].startswith((f"hf://datasets/{name}/", f"hf://datasets/{name}@"))
    ):
        raise ValueError(f"the row names the file {video['path']}, which is not part of the dataset")
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
        ValueError: The dataset is damaged, or has no column of videos.
        ImportError: `datasets` is not installed.
    """
    dataset, video = _open_stream(name, split, process)
    uncaptioned = []
    with _one_error(name):
        for index, row in enumerate(dataset):
            content = partial(_content, row[video], dataset, name)
            listed = Listed(path=Path(f"{index:08d}.mp4"), captions=_captions(find_caption(row)), content=content)
            if not any(listed.captions):
                uncaptioned.append(replace(listed, content=None))
                if str(len(uncaptioned)).strip("0") == "1":  # 1, 10, 100, ...
                    warn_uncaptioned(uncaptioned, _label(name), f"a column text or caption, got {list(row)}")
            yield listed


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
    with _one_error(name):
        dataset = load_dataset(name, split=split, streaming=streaming) if isinstance(name, str) else name
    columns = [column for column, feature in (dataset.features or {}).items() if isinstance(feature, Video)]
    if not columns:
        raise ValueError(f"{_label(name)} has no column of videos, only {list(dataset.features or {})}")
    return dataset.cast_column(columns[0], Video(decode=False)), columns[0]


@contextmanager
def _one_error(name: str | Any) -> Iterator[None]:
    """Converts the errors of `datasets` and of pyarrow to one that names the dataset."""
    from datasets.exceptions import DatasetsError

    try:
        yield
    except FileNotFoundError:
        raise
    except (DatasetsError, ValueError, OSError) as error:
        raise ValueError(f"{_label(name)} cannot be read: {error.__cause__ or error}") from error


def stream_shards(urls: str, process: tuple[int, int] = (0, 1), epoch: int = 0) -> Iterator[Listed]:
    """Streams a process's share of the videos in tar files in WebDataset's layout.

    The caption of a video is a member with the same name and the suffix `.txt` or `.caption` (one caption per line) or
    `.json` (with `text` or `caption`), anywhere in the same file. A warning names videos without one. Each process
    reads different shards. If there are fewer shards than processes, each process reads all shards and keeps its share
    of the videos. The shards of a process are split between its DataLoader workers. A shard at a URL is downloaded
    while it is read.

    Args:
        urls: See `list_shards`.
        process: Rank of this process, and the number of processes.
        epoch: Seed of the order of the shards.

    Raises:
        FileNotFoundError: As in `list_shards`.
        ValueError: As in `list_shards`.
    """
    shards, (rank, count) = list_shards(urls), process
    random.Random(epoch).shuffle(shards)
    shares_shards = len(shards) >= count
    if shares_shards:
        shards = shards[rank::count]
    worker = torch.utils.data.get_worker_info()
    if worker is not None:
        shards = shards[worker.id :: worker.num_workers]
    videos = itertools.chain.from_iterable(map(_videos_of_shard, shards))
    yield from videos if shares_shards else itertools.islice(videos, rank, None, count)


def count_shards(urls: str, process: tuple[int, int] = (0, 1)) -> int:
    """Number of shards that each process reads; the minimum over processes if it differs."""
    count = len(list_shards(urls))
    return count // process[1] or count


def list_shards(urls: str) -> list[str]:
    """The shards that a pattern names.

    Args:
        urls: Paths or URLs, separated by `::`, with `{000..099}` for a range of numbers and `{a,b}` for alternatives.
            If the environment variable `VGEN_ALLOW_PIPES` is 1, also `pipe:COMMAND` for the output of a shell command.

    Raises:
        FileNotFoundError: A file does not exist.
        ValueError: There are more than `MAX_SHARDS`, or a pipe is not allowed.
    """
    expanded = itertools.chain.from_iterable(map(expand_braces, urls.split("::")))
    shards = list(itertools.islice(expanded, MAX_SHARDS + 1))
    if len(shards) > MAX_SHARDS:
        raise ValueError(f"shards:{urls} names more than {MAX_SHARDS} files: check the numbers in braces")
    for shard in shards:
        if shard.startswith("pipe:"):
            if os.environ.get("VGEN_ALLOW_PIPES") != "1":
                raise ValueError(f"{shard} would run a shell command: set VGEN_ALLOW_PIPES=1 if you trust it")
        elif not is_url(shard) and not Path(shard).is_file():
            raise FileNotFoundError(f"there is no shard {shard}")
    return list(dict.fromkeys(shards))


def expand_braces(pattern: str) -> Iterator[str]:
    """Expands `{000..099}`, `{0..99..10}` and `{a,b}` in a text as bash does, one text at a time."""
    for braces in re.finditer(r"\{([^{}]*)\}", pattern):
        numbers = re.fullmatch(r"(\d{1,18})\.\.(\d{1,18})(?:\.\.(\d{1,18}))?", braces[1])
        parts: Iterable[str] = braces[1].split(",")
        if numbers:
            first, last, step = int(numbers[1]), int(numbers[2]), int(numbers[3] or 1) or 1
            values = range(first, last + 1, step) if first <= last else range(first, last - 1, -step)
            width = max(map(len, numbers.groups()[:2])) if re.search(r"\b0\d", braces[1]) else 0
            parts = (f"{value:0{width}d}" for value in values)
        elif "," not in braces[1]:
            continue
        for part in parts:
            yield from expand_braces(pattern[: braces.start()] + part + pattern[braces.end() :])
        return
    yield pattern


@contextmanager
def _local_shard(shard: str) -> Iterator[Path]:
    """Yields the path of a shard, or of a temporary copy of one that is not a local file."""
    if not shard.startswith("pipe:"):
        with local_input(shard) as path:
            yield path
        return
    with NamedTemporaryFile(prefix="vgen-") as file:
        subprocess.run(shard.removeprefix("pipe:"), shell=True, stdout=file, check=True)
        yield Path(file.name)


def _videos_of_shard(shard: str) -> Iterator[Listed]:
    """The videos of a shard, up to the place where it is damaged; nothing of one that cannot be fetched."""
    with ExitStack() as stack:
        try:
            tar = stack.enter_context(tarfile.open(stack.enter_context(_local_shard(shard))))
        except Exception as error:  # of any library that reads from anywhere
            warn_once(f"the shard {shard} cannot be read and is skipped: {error}")
            return
        members = []
        try:
            for member in tar:
                parts = PurePosixPath(member.name).parts
                if member.isreg() and not member.issparse() and not any(map(is_ignored, parts)):
                    members.append(member)
        except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
            warn_once(f"the shard {shard} is damaged; only its first {len(members)} members are used: {error}")
        videos = [member for member in members if Path(member.name).suffix.lower() in VIDEO_SUFFIXES]
        captions = _captions_in_shard(shard, tar, members, videos)
        listed = [
            Listed(
                path=Path(shard, member.name),
                captions=captions[member.name],
                content=partial(_read, tar, member),
            )
            for member in videos
        ]
        suffixes = sorted({Path(member.name).suffix for member in members} - set(VIDEO_SUFFIXES))
        looked = f"a member of the same name with {', '.join(CAPTION_SUFFIXES)}, got {suffixes or 'videos only'}"
        warn_uncaptioned(listed, shard, looked)
        for one in listed:
            try:
                content = one.file().content
            except OSError as error:
                warn_skipped(one, str(error))
                continue
            yield replace(one, content=partial(bytes, content))


def _read(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    assert file is not None  # a regular file
    return file.read()


def _captions_in_shard(
    shard: str, tar: tarfile.TarFile, members: Iterable[tarfile.TarInfo], videos: Iterable[tarfile.TarInfo]
) -> dict[str, tuple[str, ...]]:
    """The captions in a shard by the name of the video.

    A caption has the name of its video up to the suffix, or shares WebDataset's key (the name up to the first dot)
    with a single video.
    """
    by_stem: dict[str, tuple[str, ...]] = {}
    by_key: dict[str, tuple[str, ...]] = {}
    for suffix in CAPTION_SUFFIXES:
        for member in members:
            stem, found = os.path.splitext(member.name)
            if found.lower() != suffix or member.size > MAX_CAPTION_BYTES:
                continue
            try:
                text = _read(tar, member).decode("utf-8-sig")
                captions = _captions(_in_json(text)) if suffix == ".json" else tuple(split_lines(text))
            except (ValueError, RecursionError, tarfile.TarError, EOFError, OSError, zlib.error) as error:
                warn_once(f"{member.name} in {shard} is not a caption: {error}")
                continue
            if any(captions):
                by_stem.setdefault(stem, captions)
                by_key.setdefault(_key(stem), captions)
    keys = Counter(_key(member.name) for member in videos)
    by_key = {key: captions for key, captions in by_key.items() if keys[key] == 1}
    return {
        video.name: by_stem.get(os.path.splitext(video.name)[0]) or by_key.get(_key(video.name), ("",))
        for video in videos
    }


def _key(name: str) -> str:
    folder, base = os.path.split(name)
    return os.path.join(folder, base.partition(".")[0])


def _in_json(text: str) -> Any:
    value = json.loads(text)
    return find_caption(value) if isinstance(value, dict) else value if isinstance(value, str) else None


def _captions(text: Any) -> tuple[str, ...]:
    """Captions of a column.

    Raises:
        ValueError: It is neither a string nor a list of strings nor `None`.
    """
    lines = [] if text is None else [text] if isinstance(text, str) else text
    if not isinstance(lines, list) or not all(isinstance(line, str) for line in lines):
        raise ValueError(f"captions must be a string or a list of strings, got {str(text)[:100]}")
    return tuple(line for line in lines if line.strip()) or ("",)
