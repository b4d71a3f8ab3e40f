"""Encode clips into latents, for training a denoiser; the same command resumes an interrupted run.

accelerate launch pipelines/encode_latents.py --vae runs/shapes-64-vae/vae --output_dir runs/shapes-64-latents
accelerate launch pipelines/encode_latents.py --vae runs/my-vae/vae --data my-videos --output_dir runs/my-latents

With `--buckets`, the clips of each bucket are written to a subfolder of the output folder.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from accelerate import PartialState
from diffusers import AutoencoderKL
from einops import rearrange
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoTokenizer

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
    stack_clips,
)
from vgen.data.latents import shard_length, write_shard
from vgen.data.moving_mnist import MovingMNIST
from vgen.data.sources import VideoStream, open_clips
from vgen.io.fingerprint import encoder_digest, weights_digest
from vgen.io.settings import parse_settings
from vgen.models.image_vae import PerFrameVAE, as_video_vae, load_vae
from vgen.models.prompts import embed, load_text_encoder, tokenize
from vgen.models.vae import CausalVideoVAE
from vgen.processes import this_process
from vgen.tasks.jobs import check_settings
from vgen.temporal.flow import FlowMethod, measure_motion
from vgen.training.run import compile_blocks
from vgen.training.sources import ShapesSource

NUM_DRAWN = 20000
NOT_IN_SHARDS = ("vae", "text_encoder", "output_dir", "num_clips", "batch_size", "compile")


class Batch(NamedTuple):
    """Clips to encode."""

    pixels: Tensor
    """`(b, 3, f, h, w)` in [-1, 1]."""
    captions: list[list[str]]
    rates: list[float]
    real: Tensor
    """bool `(b, f)`, false for padding of short videos."""


@dataclass(kw_only=True)
class EncodeConfig:
    """Settings of the encoding."""

    vae: str
    """Folder or Hub id of a `CausalVideoVAE`, or of an `AutoencoderKL`, which encodes frame by frame."""
    output_dir: Path
    """Folder for the shards."""
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
    flow: FlowMethod | None = None
    """Method of `vgen.temporal.flow.optical_flow` for the motion between latents, which `warping_weight` needs; `None`
    stores no motion."""
    height: int = 64
    """Height of clips in pixels."""
    width: int = 64
    """Width of clips in pixels."""
    mixed_precision: Literal["no", "bf16"] = "bf16"
    """Precision of the encoder: `no` (float32) or `bf16`. `no` is much faster on CPUs without instructions for
    bfloat16."""
    batch_size: int = 16
    """Clips that are encoded at once."""
    shard_size: int = 2000
    """Clips per file."""
    compile: bool = False
    """Whether to compile the VAE's repeated blocks, which takes about a minute at the start."""


@torch.no_grad()
def main(config: EncodeConfig) -> None:
    """Encodes the missing shards, split between processes."""
    process = this_process()
    vae = load_vae(config.vae).to(process.device).eval()
    codec = as_video_vae(vae)
    if config.compile:
        compile_blocks(vae)
    text = TextEncoder(config, process.device) if config.text_encoder else None
    for part, bucket in in_buckets(config):
        clips = open_source(part, bucket)
        if clips is None:
            tqdm.write(f"bucket {bucket} is empty: every video is nearer to another bucket")
            continue
        part.output_dir.mkdir(parents=True, exist_ok=True)
        if process.is_main_process:
            settings = shard_settings(part, vae, text)
            if isinstance(clips, StreamClips):  # the split of its videos depends on the number of processes
                settings["processes"] = process.num_processes
                settings |= {"shared_out": "shards"} if process.num_processes > 1 else {}
            if isinstance(clips, FolderClips):  # an added video would change the order of all others
                settings["videos_sha256"] = clips.digest
            check_settings(part.output_dir, settings, ["*.safetensors"])
        process.wait_for_everyone()
        if isinstance(clips, StreamClips):
            encode_stream(part, codec, text, clips, process)
        else:
            encode_listed(part, codec, text, clips, process)


def in_buckets(config: EncodeConfig) -> Iterator[tuple[EncodeConfig, Bucket | None]]:
    """The settings of each bucket, with its own output folder; without buckets, the unchanged settings.

    Raises:
        ValueError: There are buckets, but the data is not a folder.
    """
    if not config.buckets:
        yield config, None
        return
    if config.data is None or not Path(config.data).is_dir():
        raise ValueError(f"buckets need a folder of videos, got data={config.data}")
    for bucket in map(Bucket.parse, config.buckets):
        folder = config.output_dir / str(bucket)
        yield replace(config, output_dir=folder, **bucket._asdict()), bucket


def encode_listed(
    config: EncodeConfig,
    codec: CausalVideoVAE | PerFrameVAE,
    text: TextEncoder | None,
    clips: WorldClips | DigitClips | FolderClips,
    process: PartialState,
) -> None:
    """Encodes a source of known length. Shards are split between processes, and existing ones are skipped."""
    starts = list(range(0, len(clips), config.shard_size))
    for start in tqdm(starts[process.process_index :: process.num_processes], unit="shard"):
        indices = range(start, min(start + config.shard_size, len(clips)))
        path = config.output_dir / f"{start:08d}-{indices.stop:08d}.safetensors"
        if path.exists():
            continue
        shard = Shard(config, codec, text)
        for begin in range(0, len(indices), config.batch_size):
            shard.add(clips.batch(indices[begin : begin + config.batch_size], process.device))
        shard.write(path)
        for shorter in set(config.output_dir.glob(f"{start:08d}-*.safetensors")) - {path}:
            shorter.unlink()


def encode_stream(
    config: EncodeConfig,
    codec: CausalVideoVAE | PerFrameVAE,
    text: TextEncoder | None,
    clips: StreamClips,
    process: PartialState,
) -> None:
    """Encodes this process's share of a stream of videos, and skips the videos in existing shards.

    The name of a shard has the rank of its process and the range of its videos. A video is never split between shards.
    """
    names = f"stream-{process.process_index:04d}-of-{process.num_processes:04d}"
    shards = sorted(config.output_dir.glob(f"{names}-*.safetensors"))
    first = int(shards[-1].stem.split("-")[-1]) if shards else 0
    left = math.inf if config.num_clips is None else -(-config.num_clips // process.num_processes)
    left -= sum(shard_length(path) for path in shards)
    shard, waiting, bar = Shard(config, codec, text), [], tqdm(unit="clip")

    def flush(stop: int) -> None:
        nonlocal shard, first
        shard.add(to_batch(waiting, process.device))
        waiting.clear()
        shard.write(config.output_dir / f"{names}-{first:08d}-{stop:08d}.safetensors")
        shard, first = Shard(config, codec, text), stop

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

    def __init__(self, config: EncodeConfig, codec: CausalVideoVAE | PerFrameVAE, text: TextEncoder | None):
        self.config, self.codec, self.text = config, codec, text
        self.latents: list[Tensor] = []
        self.frames: list[Tensor] = []
        self.motion: list[Tensor] = []
        self.real: list[Tensor] = []
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
        if config.short == "pad":
            s = self.codec.temporal_compression_ratio
            self.real.append(torch.cat([batch.real[:, :1], batch.real[:, 1:].unflatten(1, (-1, s)).all(2)], dim=1))
        self.latents.append(encode(self.codec, clip, config.mixed_precision))
        if config.keyframes:
            alone = rearrange(clip[:, :, 1:], "b c f h w -> (b f) c 1 h w").split(4 * config.batch_size)
            images = torch.cat([encode(self.codec, images, config.mixed_precision) for images in alone])
            self.frames.append(rearrange(images, "(b f) c 1 h w -> b f c h w", b=len(clip)))
        if config.flow:  # from the last frame of each latent to that of the next one
            motion = measure_motion(clip[:, :, :: self.codec.temporal_compression_ratio], config.flow)
            scaled = motion.scaled_down(clip.shape[-1] // self.latents[-1].shape[-1])
            self.motion.append(torch.cat([scaled.flow, scaled.visible], dim=1))

    def write(self, path: Path) -> None:
        """Writes the file, unless there are no clips."""
        if not self.captions:
            return
        extra: dict[str, Any] = {"frames": self.frames, "motion": self.motion, "real": self.real}
        extra = {name: torch.cat(parts) for name, parts in extra.items() if parts}
        if self.text is not None:
            extra["embeddings"] = self.text([caption for one in self.captions for caption in one])
            extra["no_prompt"] = self.text([""])[0]
        write_shard(path, torch.cat(self.latents), self.captions, self.rates, **extra)


class TextEncoder:
    """Embeds captions, for training with a frozen text encoder."""

    def __init__(self, config: EncodeConfig, device: torch.device):
        assert config.text_encoder is not None
        self.network = load_text_encoder(config.text_encoder).to(device).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(config.text_encoder, subfolder="tokenizer")
        self.config = config

    def __call__(self, captions: list[str]) -> Tensor:
        """Embeddings `(n, l, d)` on the CPU in half precision."""
        found = []
        for begin in range(0, len(captions), 64):
            batch = tokenize(self.tokenizer, captions[begin : begin + 64], self.config.max_sequence_length)
            input_ids, mask = (x.to(self.network.device) for x in batch)
            found.append(embed(self.network, input_ids, mask).half().cpu())
        return torch.cat(found)


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


@lru_cache
def sorted_videos(data: str, samplings: tuple[tuple[Bucket, Sampling], ...]) -> dict[Bucket, list[Listed]]:
    """The videos of a folder by bucket; cached, so that each file is probed once and not once per bucket."""
    return sort_into_buckets(list_videos(Path(data)), dict(samplings))


def to_batch(clips: list[Clip], device: torch.device) -> Batch:
    """Stacks clips into a batch."""
    if not clips:
        return Batch(torch.empty(0), [], [], torch.empty(0))
    pixels, real = stack_clips(clips, device)
    return Batch(pixels, [list(clip.captions) for clip in clips], [clip.frame_rate for clip in clips], real)


def encode(vae: CausalVideoVAE | PerFrameVAE, clip: Tensor, mixed_precision: str) -> Tensor:
    """Encodes clips to normalized latents, on the CPU in half precision."""
    with torch.autocast(clip.device.type, torch.bfloat16, enabled=mixed_precision == "bf16"):
        posterior = vae.encode(clip).latent_dist
    return vae.normalize(posterior.mode().float()).half().cpu()


def shard_settings(
    config: EncodeConfig, vae: CausalVideoVAE | AutoencoderKL, text: TextEncoder | None
) -> dict[str, Any]:
    """The settings that all shards of a folder must have in common."""
    settings = {name: value for name, value in vars(config).items() if name not in NOT_IN_SHARDS}
    settings["vae_sha256"] = encoder_digest(vae)
    return settings | ({} if text is None else {"text_encoder_sha256": weights_digest(text.network)})


if __name__ == "__main__":
    main(parse_settings(EncodeConfig, __doc__))
