"""Encode clips once, for the denoiser's training; the same command goes on where it stopped.

accelerate launch pipelines/encode_latents.py --vae runs/shapes-64-vae/vae --output_dir runs/shapes-64-latents
accelerate launch pipelines/encode_latents.py --vae runs/my-vae/vae --data my-videos --output_dir runs/my-latents
"""

import hashlib
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from diffusers import AutoencoderKL
from einops import rearrange
from jsonargparse import auto_cli
from torch import Tensor
from tqdm.auto import tqdm

from vgen.data.clips import Sampling, VideoFolder, list_videos
from vgen.data.latents import write_shard
from vgen.data.shapes import ShapesWorld, render
from vgen.jobs import check_settings
from vgen.models.image_vae import FrameByFrame, as_codec, load_vae
from vgen.models.vae import CausalVideoVAE
from vgen.training.run import compile_blocks
from vgen.training.temporal_loss import measure_motion

NOT_IN_SHARDS = ("vae", "output_dir", "num_clips", "batch_size", "compile")


@dataclass(kw_only=True)
class EncodeConfig:
    """What to encode."""

    vae: str
    """Folder or Hub id of a `CausalVideoVAE`, or of an `AutoencoderKL`, which encodes frame by frame."""
    output_dir: Path
    """Folder of the shards."""
    data: Path | None = None
    """Folder of videos, as `vgen.data.clips.list_videos` takes it; `None` draws ShapesWorld."""
    hop: int | None = None
    """Frames from one clip of a video to the next; `None` lets them follow without a gap."""
    num_clips: int = 20000
    """Clips of ShapesWorld; of a folder, the most that are taken."""
    seed: int = 0
    """Of the world."""
    num_captions: int = 4
    """Wordings of each clip."""
    num_frames: int = 17
    """Frames a clip."""
    frame_rates: list[float] = field(default_factory=lambda: [8.0])
    """Frames per second; each clip has one of them, drawn evenly. Videos are resampled to it."""
    keyframes: bool = False
    """Whether to encode each frame alone too, for training with known frames in between; doubles the time."""
    flow: str | None = None
    """Method of `vgen.temporal.flow.optical_flow` for the motion between latents, which `warping_weight` needs."""
    height: int = 64
    """Pixels."""
    width: int = 64
    """Pixels."""
    batch_size: int = 16
    """Clips at once."""
    shard_size: int = 2000
    """Clips a file."""
    compile: bool = False
    """Whether to compile the VAE's repeated blocks, which takes a minute at the start."""


@torch.no_grad()
def main(config: EncodeConfig) -> None:
    """Encodes the shards that are missing, shared out over processes."""
    process = PartialState()
    config.output_dir.mkdir(parents=True, exist_ok=True)
    vae = load_vae(config.vae).to(process.device).eval()
    codec = as_codec(vae)
    if config.compile:
        compile_blocks(vae)
    clips = FolderClips(config) if config.data else WorldClips(config)
    if process.is_main_process:
        check_settings(config.output_dir, shard_settings(config, vae), ["*.safetensors"])
    process.wait_for_everyone()
    starts = list(range(0, len(clips), config.shard_size))
    for start in tqdm(starts[process.process_index :: process.num_processes], unit="shard"):
        indices = range(start, min(start + config.shard_size, len(clips)))
        path = config.output_dir / f"{start:08d}-{indices.stop:08d}.safetensors"
        if path.exists():
            continue
        latents, frames, motions, captions, rates = [], [], [], [], []
        for begin in range(0, len(indices), config.batch_size):
            clip, texts, told = clips.batch(indices[begin : begin + config.batch_size], process.device)
            if not texts:
                continue
            captions += texts
            rates += told
            latents.append(encode(codec, clip))
            if config.keyframes:
                alone = rearrange(clip[:, :, 1:], "b c f h w -> (b f) c 1 h w").split(4 * config.batch_size)
                images = torch.cat([encode(codec, images) for images in alone])
                frames.append(rearrange(images, "(b f) c 1 h w -> b f c h w", b=len(clip)))
            if config.flow:  # from the last frame of each latent to that of the next one
                motion = measure_motion(clip[:, :, :: codec.temporal_compression_ratio], config.flow)
                scaled = motion.scaled_down(clip.shape[-1] // latents[-1].shape[-1])
                motions.append(torch.cat([scaled.flow, scaled.visible], dim=1))
        if latents:
            extra = [torch.cat(parts) if parts else None for parts in (frames, motions)]
            write_shard(path, torch.cat(latents), captions, rates, *extra)
        for shorter in set(config.output_dir.glob(f"{start:08d}-*.safetensors")) - {path}:
            shorter.unlink()


class WorldClips:
    """Clips of ShapesWorld."""

    def __init__(self, config: EncodeConfig):
        self.config = config
        self.world = ShapesWorld(split="train", seed=config.seed)

    def __len__(self) -> int:
        return self.config.num_clips

    def batch(self, indices: range, device: torch.device) -> tuple[Tensor, list[list[str]], list[float]]:
        """Pixels `(b, 3, f, h, w)` in [-1, 1], captions and rates."""
        config = self.config
        rates = [random.Random(config.seed * 1_000_003 + index).choice(config.frame_rates) for index in indices]
        size = {"num_frames": config.num_frames, "height": config.height, "width": config.width}
        scenes = [self.world.scene(index) for index in indices]
        clip = render(scenes, frame_rate=torch.tensor(rates), device=device, **size)
        captions = [
            [self.world.caption(index, variant) for variant in range(config.num_captions)] for index in indices
        ]
        return clip, captions, rates


class FolderClips:
    """Clips of a folder of videos, at each of the frame rates; those of damaged files are left out and told."""

    def __init__(self, config: EncodeConfig):
        assert config.data is not None
        listed = list_videos(config.data)
        folders = []
        for rate in config.frame_rates:
            sampling = Sampling(num_frames=config.num_frames, kind="sliding", frame_rate=rate, hop=config.hop)
            folders.append(VideoFolder(listed, sampling, config.height, config.width, config.seed))
        self.clips = [(folder, index) for folder in folders for index in range(len(folder))]
        random.Random(config.seed).shuffle(self.clips)
        del self.clips[config.num_clips :]
        self.told: set[str] = set()
        for folder in folders:
            self.tell(folder)

    def __len__(self) -> int:
        return len(self.clips)

    def tell(self, folder: VideoFolder) -> None:
        """Names each file that is left out once."""
        for listed, reason in folder.refused.items():
            line = f"left out: {listed.path}: {reason}"
            if line not in self.told:
                tqdm.write(line)
            self.told.add(line)

    def batch(self, indices: range, device: torch.device) -> tuple[Tensor, list[list[str]], list[float]]:
        """Pixels `(b, 3, f, h, w)` in [-1, 1], captions and rates; fewer than asked for where files are damaged."""
        found = []
        for index in indices:
            folder, place = self.clips[index]
            clip = folder.clip(place)
            self.tell(folder)
            if clip is not None:
                found.append(clip)
        if not found:
            return torch.empty(0), [], []
        pixels = torch.stack([torch.from_numpy(clip.frames) for clip in found]).to(device)
        clip = rearrange(pixels, "b f h w c -> b c f h w").float() / 127.5 - 1
        return clip, [list(one.captions) for one in found], [one.frame_rate for one in found]


def encode(vae: CausalVideoVAE | FrameByFrame, clip: Tensor) -> Tensor:
    """Normalised latents of clips, on the CPU in half precision."""
    with torch.autocast(clip.device.type, torch.bfloat16):
        posterior = vae.encode(clip).latent_dist
    return vae.normalize(posterior.mode().float()).half().cpu()


def shard_settings(config: EncodeConfig, vae: CausalVideoVAE | AutoencoderKL) -> dict[str, Any]:
    """What all shards of a folder have in common."""
    settings = {name: value for name, value in vars(config).items() if name not in NOT_IN_SHARDS}
    digest = hashlib.sha256(str(sorted(vae.config.items())).encode())
    for _, weight in sorted(vae.state_dict().items()):
        digest.update(weight.detach().cpu().float().numpy().tobytes())
    return settings | {"vae_sha256": digest.hexdigest()}


if __name__ == "__main__":
    main(auto_cli(EncodeConfig))
