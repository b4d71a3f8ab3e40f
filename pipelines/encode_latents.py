"""Encode clips into latents, for training a denoiser; the same command resumes an interrupted run.

accelerate launch pipelines/encode_latents.py --vae runs/shapes-64-vae/vae --output_dir runs/shapes-64-latents
accelerate launch pipelines/encode_latents.py --vae runs/my-vae/vae --data my-videos --output_dir runs/my-latents

With `--buckets`, the clips of each bucket are written to a subfolder of the output folder.
"""

from __future__ import annotations

from vgen.io.spinning import stop_spinning

stop_spinning()  # before torch is imported

import hashlib
import itertools
import math
import random
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from accelerate import PartialState
from diffusers import AutoencoderKL
from einops import rearrange
from torch import Tensor
from tqdm.auto import tqdm

from vgen.checks import check_choice
from vgen.data.action_files import check_widths
from vgen.data.augment import Augmentation
from vgen.data.clips import (
    Bucket,
    Clip,
    Listed,
    Sampling,
    SamplingKind,
    Short,
    VideoFolder,
    list_videos,
    sort_into_buckets,
    stack_actions,
    stack_clips,
)
from vgen.data.latents import shard_length, write_shard
from vgen.data.moving_mnist import MovingMNIST
from vgen.data.sources import VideoStream, open_clips
from vgen.io.errors import one_line_errors
from vgen.io.fingerprint import encoder_digest, weights_digest
from vgen.io.records import check_settings, read_json
from vgen.io.remote import as_path, local_copy, local_input, local_output
from vgen.io.settings import parse_settings
from vgen.machine import fast_precision, warn_if_slow
from vgen.models.compilation import compile_blocks
from vgen.models.image_encoder import embed_images, load_image_encoder
from vgen.models.image_vae import PerFrameVAE, as_video_vae, load_vae
from vgen.models.prompts import CAPTIONS_PER_BATCH, CutCaptions, embed, load_text_encoder, load_tokenizer, tokenize
from vgen.models.vae import CausalVideoVAE
from vgen.processes import from_main_process, locked_output_dir, this_process
from vgen.sampling.known_frames import encode_condition, still_clips
from vgen.tasks.engine import ENGINE_OPTIONS, Engine, EngineOptions, Worker
from vgen.tasks.ray_engine import ItemError, ray_pool
from vgen.temporal.flow import FlowMethod, measure_motion
from vgen.temporal.grid import LatentGrid
from vgen.training.sources import ShapesSource

NUM_DRAWN = 20000
NOT_IN_SHARDS = (
    "vae", "text_encoder", "image_encoder", "output_dir", "num_clips", "batch_size", "compile", *ENGINE_OPTIONS,
)  # fmt: skip


class Batch(NamedTuple):
    """Clips to encode."""

    pixels: Tensor
    """`(b, 3, f, h, w)` in [-1, 1]."""
    captions: list[list[str]]
    rates: list[float]
    real: Tensor
    """bool `(b, f)`, false for padding of short videos."""
    actions: Tensor | None = None
    """Actions `(b, f, a)`, NaN where they are unknown; `None` without."""


@dataclass(kw_only=True)
class EncodeConfig(EngineOptions):
    """Settings of the encoding."""

    vae: str
    """Folder or Hub id of a `CausalVideoVAE`, or of an `AutoencoderKL`, which encodes frame by frame."""
    output_dir: str | Path
    """Folder for the shards, or its URL."""
    data: str | None = None
    """A folder of videos or another source of `vgen.data.sources.open_clips`; `None` generates ShapesWorld."""
    buckets: list[str] = field(default_factory=list)
    """Clip shapes as FRAMESxHEIGHTxWIDTH; each video of a folder is assigned to the nearest one. With an empty list,
    all clips have `num_frames`, `height` and `width`."""
    short: Short = "skip"
    """How to treat videos with too few frames: `skip` them, or `pad` them with copies of the last frame, which
    training masks."""
    augment: dict[str, Any] = field(default_factory=dict)
    """Settings of `vgen.data.augment.Augmentation`."""
    repeats: int = 1
    """How often each clip is encoded, each time with another random augmentation."""
    text_encoder: str | None = None
    """Folder or Hub id of a pipeline whose `text_encoder` and `tokenizer` embed the captions; `None` stores text
    only."""
    max_sequence_length: int = 32
    """Length in tokens that captions are padded or truncated to before they are embedded."""
    condition: list[int] = field(default_factory=list)
    """Frames that a model that makes videos from images is given: `[0]`, or `[0, -1]` for the first and the last one.
    They are stored as such models expect them. With an empty list, they are not."""
    image_encoder: str | None = None
    """Folder or Hub id of a pipeline whose `image_encoder` and `image_processor` embed these frames, as Wan 2.1
    expects; `None` stores no embeddings."""
    sampling: SamplingKind = "sliding"
    """Which frames of a video make clips: a `kind` of `vgen.data.clips.Sampling`. `random` and `segments` are drawn
    again in each of the `repeats`."""
    stride: int = 1
    """Step between the frames of a `random` or `sliding` clip, counted at the clip's frame rate."""
    hop: int | None = None
    """Step between the starts of the clips of a video, in frames; `None` puts clips end to end."""
    num_clips: int | None = None
    """Number of clips of ShapesWorld or Moving MNIST, by default 20,000; for other sources, the maximum number."""
    seed: int = 0
    """Seed of ShapesWorld and of random choices."""
    num_captions: int = 4
    """Number of alternative captions of each clip of ShapesWorld."""
    num_frames: int = 17
    """Frames per clip."""
    frame_rates: list[float] = field(default_factory=lambda: [8.0])
    """Frame rates in frames per second. Each clip of ShapesWorld has a random one of them; videos are
    encoded at all of them."""
    keyframes: bool = False
    """Whether to also encode each frame as an image, for training with keyframes; doubles the time."""
    still_keyframes: bool = False
    """Whether each such frame is encoded as a clip in which it stands still, for denoisers with `still_keyframes`;
    multiplies that time by the length of the clip, one more than the temporal compression."""
    flow: FlowMethod | None = None
    """Method of `vgen.temporal.flow.optical_flow` for the motion between latents, which `warping_weight` needs; `None`
    stores no motion."""
    height: int = 64
    """Height of clips in pixels."""
    width: int = 64
    """Width of clips in pixels."""
    mixed_precision: Literal["auto", "no", "bf16"] = "auto"
    """Precision of the encoder: `no` (float32) or `bf16`. `auto` is the faster one on this machine, or that of the
    shards that the folder has."""
    batch_size: int = 16
    """Clips that are encoded at once."""
    shard_size: int = 2000
    """Clips per file."""
    compile: bool = False
    """Whether to compile the VAE's repeated blocks, which takes about a minute at the start."""


class Source(NamedTuple):
    """A folder of shards to write: that of a bucket, or the only one."""

    config: EncodeConfig
    settings: dict[str, Any]
    """What all its shards have in common."""
    num_clips: int | None
    """`None` for a stream."""


class ShardRange(NamedTuple):
    """The clips of one shard."""

    source: int
    """Index of the source."""
    clips: range


def main(config: EncodeConfig) -> None:
    """Encodes the missing shards, split between processes or Ray actors.

    Raises:
        ValueError: A setting is invalid, a folder has shards with other settings, or a stream is to be encoded on Ray.
    """
    check_choice("engine", config.engine, Engine)
    check_condition(config)
    with locked_output_dir(as_path(config.output_dir)):
        encode_all(config)
    if this_process().is_main_process:
        options = {"latents_dir": config.output_dir, "vae": config.vae}
        words = " ".join(f"--{name} {shlex.quote(str(value))}" for name, value in options.items())
        print(f"wrote {config.output_dir}; next: accelerate launch train/train_vdm.py {words} --text_encoder ...")


def check_condition(config: EncodeConfig) -> None:
    """Checks the settings for models that make videos from images.

    Raises:
        ValueError: They contradict each other.
    """
    if config.condition not in ([], [0], [0, -1]):
        raise ValueError(f"condition must be [], [0] or [0, -1], got {config.condition}")
    if config.image_encoder and not config.condition:
        raise ValueError("image_encoder embeds the frames of condition: pass --condition [0], or [0,-1]")
    if -1 in config.condition and config.short == "pad":
        raise ValueError("condition=[0, -1] needs clips with a last frame: set short=skip")


def encode_all(config: EncodeConfig) -> None:
    """As `main`, in a folder that no other command writes to."""
    if config.engine == "ray":
        with ray_pool(partial(load_worker, config), config) as pool:
            shards = prepare(pool.settings)
            for _, result in tqdm(pool.map(shards), total=len(shards), unit="shard"):
                if isinstance(result, ItemError):
                    raise result
        return
    process = this_process()
    encoder = Encoder(config)
    if process.is_main_process:
        for source in encoder.sources:
            check_folder(source)
    process.wait_for_everyone()
    for index, source in enumerate(encoder.sources):
        clips = encoder.clips[index]
        if isinstance(clips, StreamClips):
            encode_stream(source.config, encoder, clips, process)
        else:
            for shard in tqdm(shards_of(index, source)[process.process_index :: process.num_processes], unit="shard"):
                encoder.encode(shard)
    if encoder.text is not None:
        encoder.text.cut.warn()


def load_worker(config: EncodeConfig) -> Worker:
    """Loads the networks and opens the data, once per Ray actor."""
    encoder = Encoder(config)
    return Worker(encoder.sources, encoder.encode)


def prepare(sources: list[Source]) -> list[ShardRange]:
    """Checks the folders of all sources, and lists their shards.

    Raises:
        ValueError: A source is a stream, whose clips cannot be numbered, or as in `check_settings`.
    """
    for source in sources:
        if source.num_clips is None:
            raise ValueError(
                "engine=ray needs data of known length, because any actor may encode any shard, got the stream "
                f"{source.config.data}: use accelerate launch"
            )
        check_folder(source)
    return [shard for index, source in enumerate(sources) for shard in shards_of(index, source)]


def check_folder(source: Source) -> None:
    """Creates the folder of a source, or checks that it has the same settings."""
    folder = as_path(source.config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    check_settings(folder, source.settings, ["*.safetensors"])


def shards_of(index: int, source: Source) -> list[ShardRange]:
    """The shards of a source of known length."""
    assert source.num_clips is not None
    clips, size = range(source.num_clips), source.config.shard_size
    return [ShardRange(index, clips[first : first + size]) for first in clips[::size]]


class Encoder:
    """The networks, and the open sources of clips."""

    def __init__(self, config: EncodeConfig):
        self.device = this_process().device
        if config.mixed_precision == "auto":
            config = replace(config, mixed_precision=from_main_process(self.resolve_precision(config)))
        warn_if_slow(self.device, config.mixed_precision, "--mixed_precision no")
        vae = load_vae(config.vae).to(self.device).eval()
        self.codec = as_video_vae(vae)
        if config.compile:
            compile_blocks(vae)
        self.text = TextEncoder(config, self.device) if config.text_encoder else None
        self.images = ImageEncoder(config, self.codec, self.device) if config.condition else None
        self.sources: list[Source] = []
        self.clips: list[WorldClips | DigitClips | FolderClips | StreamClips] = []
        for part, bucket in in_buckets(config):
            clips = open_source(part, bucket)
            if clips is None:
                tqdm.write(f"bucket {bucket} is empty: every video is nearer to another bucket")
                continue
            length = None if isinstance(clips, StreamClips) else len(clips)
            self.sources.append(Source(part, shard_settings(part, vae, self.text, self.images, clips), length))
            self.clips.append(clips)

    def resolve_precision(self, config: EncodeConfig) -> Literal["no", "bf16"]:
        """The precision that `auto` stands for: that of the folder's shards, or else the faster one."""
        for part, _ in in_buckets(config):
            path = as_path(part.output_dir) / "settings.json"
            if path.exists() and (kept := read_json(path).get("mixed_precision")):
                return kept
        return fast_precision(self.device)

    @torch.no_grad()
    def encode(self, shard: ShardRange) -> None:
        """Encodes a shard, unless it exists, and replaces one that begins with the same clip and is shorter."""
        config, clips = self.sources[shard.source].config, self.clips[shard.source]
        assert not isinstance(clips, StreamClips)
        folder, (first, stop) = as_path(config.output_dir), (shard.clips.start, shard.clips.stop)
        path = folder / f"{first:08d}-{stop:08d}.safetensors"
        if path.exists():
            return
        written = Shard(config, self.codec, self.text, self.images, getattr(clips, "action_dim", 0))
        for begin in range(first, stop, config.batch_size):
            written.add(clips.batch(range(begin, min(begin + config.batch_size, stop)), self.device))
        written.write(path)
        for shorter in set(folder.glob(f"{first:08d}-*.safetensors")) - {path}:
            shorter.unlink()


def in_buckets(config: EncodeConfig) -> Iterator[tuple[EncodeConfig, Bucket | None]]:
    """The settings of each bucket, with its own output folder; without buckets, the unchanged settings.

    Raises:
        ValueError: There are buckets, but the data is not a folder.
    """
    if not config.buckets:
        yield config, None
        return
    if config.data is None or not as_path(config.data).is_dir():
        raise ValueError(f"buckets need a folder of videos, got data={config.data}")
    for bucket in map(Bucket.parse, config.buckets):
        folder = as_path(config.output_dir) / str(bucket)
        yield replace(config, output_dir=folder, **bucket._asdict()), bucket


@torch.no_grad()
def encode_stream(config: EncodeConfig, encoder: Encoder, clips: StreamClips, process: PartialState) -> None:
    """Encodes this process's share of a stream of videos, and skips the videos in existing shards.

    The name of a shard has the rank of its process and the range of its videos. A video is never split between shards.
    """
    names = f"stream-{process.process_index:04d}-of-{process.num_processes:04d}"
    folder = as_path(config.output_dir)
    shards = sorted(folder.glob(f"{names}-*.safetensors"))
    first = int(shards[-1].stem.split("-")[-1]) if shards else 0
    left = math.inf if config.num_clips is None else -(-config.num_clips // process.num_processes)
    for path in shards:
        with local_input(path) as local:
            left -= shard_length(local)
    networks = encoder.codec, encoder.text, encoder.images
    shard, waiting, bar = Shard(config, *networks), [], tqdm(unit="clip")

    def flush(stop: int) -> None:
        nonlocal shard, first
        shard.add(to_batch(waiting, process.device))
        waiting.clear()
        shard.write(folder / f"{names}-{first:08d}-{stop:08d}.safetensors")
        shard, first = Shard(config, *networks), stop

    stop = first
    for stop, listed in enumerate(itertools.islice(clips.videos(), first, None), start=first + 1):
        if left <= 0:
            stop -= 1
            break
        for clip in clips.clips(listed):
            if left <= 0:
                break
            left -= 1
            bar.update()
            waiting.append(clip)
            if len(waiting) == config.batch_size:
                shard.add(to_batch(waiting, process.device))
                waiting.clear()
        if len(shard) + len(waiting) >= config.shard_size:
            flush(stop)
    flush(stop)


class Shard:
    """The clips of one file, which are encoded batch by batch."""

    def __init__(
        self,
        config: EncodeConfig,
        codec: CausalVideoVAE | PerFrameVAE,
        text: TextEncoder | None,
        images: ImageEncoder | None,
        action_dim: int = 0,
    ):
        self.config, self.codec, self.text, self.images = config, codec, text, images
        self.action_dim = action_dim
        self.latents: list[Tensor] = []
        self.frames: list[Tensor] = []
        self.motion: list[Tensor] = []
        self.condition: list[Tensor] = []
        self.image_embeds: list[Tensor] = []
        self.real: list[Tensor] = []
        self.actions: list[Tensor] = []
        self.captions: list[list[str]] = []
        self.rates: list[float] = []

    def __len__(self) -> int:
        return len(self.captions)

    def add(self, batch: Batch) -> None:
        """Encodes a batch of clips."""
        if not batch.captions:
            return
        config, clip = self.config, batch.pixels
        self.captions += batch.captions
        self.rates += batch.rates
        if self.action_dim:
            unknown = torch.full((*batch.real.shape, self.action_dim), torch.nan)
            self.actions.append(unknown if batch.actions is None else batch.actions)
        if config.short == "pad":
            s = self.codec.temporal_compression_ratio
            self.real.append(torch.cat([batch.real[:, :1], batch.real[:, 1:].unflatten(1, (-1, s)).all(2)], dim=1))
        self.latents.append(encode(self.codec, clip, config.mixed_precision))
        if self.images is not None:
            condition, embeds = self.images(clip)
            self.condition.append(condition)
            self.image_embeds += embeds
        if config.keyframes:
            alone = rearrange(clip[:, :, 1:], "b c f h w -> (b f) c 1 h w")
            if config.still_keyframes:
                alone = still_clips(alone, self.codec.temporal_compression_ratio)
            parts = alone.split(4 * config.batch_size)
            images = torch.cat([encode(self.codec, part, config.mixed_precision)[:, :, -1] for part in parts])
            self.frames.append(rearrange(images, "(b f) c h w -> b f c h w", b=len(clip)))
        if config.flow:  # from the last frame of each latent to that of the next one
            motion = measure_motion(clip[:, :, :: self.codec.temporal_compression_ratio], config.flow)
            scaled = motion.scaled_down(clip.shape[-1] // self.latents[-1].shape[-1])
            self.motion.append(torch.cat([scaled.flow, scaled.visible], dim=1))

    def write(self, path: Path) -> None:
        """Writes the file, unless there are no clips."""
        if not self.captions:
            return
        extra: dict[str, Any] = {"frames": self.frames, "motion": self.motion, "real": self.real}
        extra |= {"condition": self.condition, "image_embeds": self.image_embeds, "actions": self.actions}
        extra = {name: torch.cat(parts) for name, parts in extra.items() if parts}
        if self.text is not None:
            extra["embeddings"] = self.text([caption for one in self.captions for caption in one])
            extra["no_prompt"] = self.text([""])[0]
        with local_output(path) as local:
            write_shard(local, torch.cat(self.latents), self.captions, self.rates, **extra)


class TextEncoder:
    """Embeds captions, for training with a frozen text encoder."""

    def __init__(self, config: EncodeConfig, device: torch.device):
        assert config.text_encoder is not None
        self.network = load_text_encoder(config.text_encoder).to(device).eval()
        self.tokenizer = load_tokenizer(config.text_encoder)
        self.config = config
        self.cut = CutCaptions(self.tokenizer, config.max_sequence_length)

    def __call__(self, captions: list[str]) -> Tensor:
        """Embeddings `(n, l, d)` on the CPU in half precision."""
        self.cut.add(captions)
        if not self.cut.num_reported:  # not only at the end
            self.cut.warn()
        found = []
        for begin in range(0, len(captions), CAPTIONS_PER_BATCH):
            part = captions[begin : begin + CAPTIONS_PER_BATCH]
            batch = tokenize(self.tokenizer, part, self.config.max_sequence_length)
            input_ids, mask = (x.to(self.network.device) for x in batch)
            found.append(embed(self.network, input_ids, mask).half().cpu())
        return torch.cat(found)


class ImageEncoder:
    """Encodes the frames that a model that makes videos from images is given."""

    def __init__(self, config: EncodeConfig, codec: CausalVideoVAE | PerFrameVAE, device: torch.device):
        self.config, self.codec = config, codec
        self.networks = None
        if config.image_encoder:
            encoder, processor = load_image_encoder(config.image_encoder)
            self.networks = encoder.to(device).eval(), processor

    def __call__(self, clip: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The condition `(b, s + c, t, h, w)` of clips, and tokens `(b, k, d)`, if there is an encoder; on the CPU."""
        num_frames = clip.shape[2]
        frames = {index % num_frames: clip[:, :, index] for index in self.config.condition}
        grid = LatentGrid(self.codec.temporal_compression_ratio)
        with torch.autocast(clip.device.type, torch.bfloat16, enabled=self.config.mixed_precision == "bf16"):
            condition = encode_condition(frames, num_frames, grid, self.codec).half().cpu()
        if self.networks is None:
            return condition, []
        return condition, [embed_images(*self.networks, frames.values()).half().cpu()]


class WorldClips:
    """Clips of ShapesWorld."""

    def __init__(self, config: EncodeConfig):
        self.config = config
        self.source = ShapesSource("train", config.height, config.width, config.frame_rates, config.seed)

    def __len__(self) -> int:
        return NUM_DRAWN if self.config.num_clips is None else self.config.num_clips

    def batch(self, indices: range, device: torch.device) -> Batch:
        """The clips with these numbers."""
        config = self.config
        world, drawn = self.source.world, self.source.batch(indices, config.num_frames)
        clip, real = self.source.clips(drawn, device)
        captions = [[world.caption(index, variant) for variant in range(config.num_captions)] for index in indices]
        return Batch(clip, captions, drawn["frame_rate"].tolist(), real.bool())


class DigitClips:
    """Clips of Moving MNIST."""

    def __init__(self, config: EncodeConfig, world: MovingMNIST):
        self.config, self.world = config, world

    def __len__(self) -> int:
        return NUM_DRAWN if self.config.num_clips is None else self.config.num_clips

    def batch(self, indices: range, device: torch.device) -> Batch:
        """The clips with these numbers, without captions."""
        return to_batch([self.world.sample(index) for index in indices], device)


class FolderClips:
    """Clips of listed videos, at each of the frame rates; damaged files are skipped."""

    def __init__(self, config: EncodeConfig, folders: list[VideoFolder]):
        self.clips = [
            (folder, index, epoch)
            for epoch in range(config.repeats)
            for folder in folders
            for index in range(len(folder))
        ]
        random.Random(config.seed).shuffle(self.clips)
        self.clips = self.clips[: config.num_clips]
        self.digest = hashlib.sha256("".join(folder.digest for folder in folders).encode()).hexdigest()
        """Digest of the videos and their numbers of clips, which decide the order of the clips."""
        acted = {listed.actions for folder in folders for listed, *_ in folder.clips if listed.actions is not None}
        self.action_dim = check_widths(acted)
        """Channels of the actions of their frames; 0 without actions."""

    def __len__(self) -> int:
        return len(self.clips)

    def batch(self, indices: range, device: torch.device) -> Batch:
        """The clips with these numbers, without those of damaged files."""
        found = [folder.clip(place, epoch) for folder, place, epoch in (self.clips[index] for index in indices)]
        return to_batch([clip for clip in found if clip is not None], device)


class StreamClips:
    """Clips of a stream of videos, at each of the frame rates."""

    def __init__(self, config: EncodeConfig, streams: list[VideoStream]):
        self.config, self.streams = config, streams

    def videos(self) -> Iterator[Listed]:
        """The videos of this process, in order."""
        return iter(self.streams[0].videos(0))

    def clips(self, listed: Listed) -> Iterator[Clip]:
        """The clips of one video."""
        for epoch, stream in itertools.product(range(self.config.repeats), self.streams):
            yield from stream.clips(listed, epoch)


def open_source(
    config: EncodeConfig, bucket: Bucket | None
) -> WorldClips | DigitClips | FolderClips | StreamClips | None:
    """Opens the source of clips; with buckets, only the videos of one bucket, or `None` if it has no videos."""
    if config.data is None:
        return WorldClips(config)
    augmentation, size = Augmentation(**config.augment), (config.height, config.width)
    sources = []
    for rate in config.frame_rates:
        sampling = Sampling(
            num_frames=config.num_frames, kind=config.sampling, frame_rate=rate, stride=config.stride, hop=config.hop,
            short=config.short,
        )  # fmt: skip
        if bucket is not None:
            buckets = map(Bucket.parse, config.buckets)
            each = tuple((one, replace(sampling, num_frames=one.num_frames)) for one in buckets)
            listed = sorted_videos(config.data, each)[bucket]
            if listed:
                sources.append(VideoFolder(listed, sampling, *size, config.seed, augmentation))
            continue
        source = open_clips(config.data, sampling, *size, config.seed, augmentation)
        if isinstance(source, MovingMNIST):
            return DigitClips(config, source)
        sources.append(source)
    if not sources:
        return None
    return (StreamClips if isinstance(sources[0], VideoStream) else FolderClips)(config, sources)


def sorted_videos(data: str, samplings: tuple[tuple[Bucket, Sampling], ...]) -> dict[Bucket, list[Listed]]:
    """The videos of a folder by bucket; cached, so that each file is probed once and not once per bucket."""
    if (data, samplings) not in _SORTED:
        _SORTED[data, samplings] = sort_into_buckets(list_videos(local_copy(data)), dict(samplings))
    return _SORTED[data, samplings]


_SORTED: dict[Any, dict[Bucket, list[Listed]]] = {}  # Ray cannot send functions of scripts with an `lru_cache`


def to_batch(clips: list[Clip], device: torch.device) -> Batch:
    """Stacks clips into a batch."""
    if not clips:
        return Batch(torch.empty(0), [], [], torch.empty(0))
    pixels, real = stack_clips(clips, device)
    captions, rates = [list(clip.captions) for clip in clips], [clip.frame_rate for clip in clips]
    return Batch(pixels, captions, rates, real, stack_actions(clips))


def encode(vae: CausalVideoVAE | PerFrameVAE, clip: Tensor, mixed_precision: str) -> Tensor:
    """Encodes clips to normalized latents, on the CPU in half precision."""
    with torch.autocast(clip.device.type, torch.bfloat16, enabled=mixed_precision == "bf16"):
        posterior = vae.encode(clip).latent_dist
    return vae.normalize(posterior.mode().float()).half().cpu()


def shard_settings(
    config: EncodeConfig,
    vae: CausalVideoVAE | AutoencoderKL,
    text: TextEncoder | None,
    images: ImageEncoder | None,
    clips: WorldClips | DigitClips | FolderClips | StreamClips,
) -> dict[str, Any]:
    """The settings that all shards of a folder must have in common."""
    settings = {name: value for name, value in vars(config).items() if name not in NOT_IN_SHARDS}
    settings["vae_sha256"] = encoder_digest(vae)
    if text is not None:
        settings["text_encoder_sha256"] = weights_digest(text.network)
    if images is not None and images.networks is not None:
        settings["image_encoder_sha256"] = weights_digest(images.networks[0])
    if isinstance(clips, StreamClips):  # the split of its videos depends on the number of processes
        settings["processes"] = this_process().num_processes
        settings |= {"shared_out": "shards"} if settings["processes"] > 1 else {}
    if isinstance(clips, FolderClips):  # an added video would change the order of all others
        settings["videos_sha256"] = clips.digest
    return settings


if __name__ == "__main__":
    with one_line_errors(Path(__file__).name):
        main(parse_settings(EncodeConfig, __doc__))
