"""Train a causal video VAE: single images first, then clips, then the statistics of its latents.

A CPU-sized try:

    accelerate launch train/train_vae.py --config train/recipes/shapes-64-vae.yaml --output_dir runs/try \
        --image_steps 20 --max_steps 40
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from diffusers.utils import logging
from torch import Tensor

from vgen.data.augment import Augmentation
from vgen.data.clips import Clip, Sampling, VideoFolder, draw_frame_rates, stack_clips
from vgen.data.shapes import ShapesWorld, render
from vgen.data.sources import VideoStream, open_clips
from vgen.data.video_io import write_video
from vgen.io.atomic import atomic_directory
from vgen.metrics.prompt import adherence
from vgen.metrics.reference import LPIPS, psnr
from vgen.models.image_vae import load_vae
from vgen.models.vae import CausalVideoVAE
from vgen.temporal.flow import measure_motion
from vgen.training.adversarial import (
    JudgedVAE,
    PatchDiscriminator,
    adaptive_weight,
    discriminator_loss,
)
from vgen.training.run import Run, RunConfig, compile_blocks, config_text, copy_of, generators, parse_config, start
from vgen.training.temporal_loss import TemporalLossConfig, temporal_loss

logger = logging.get_logger(__name__)


@dataclass(kw_only=True)
class VAEConfig(RunConfig, TemporalLossConfig):
    """Settings of a VAE's training."""

    model: dict[str, Any] = field(default_factory=dict)
    """Arguments of `CausalVideoVAE` for random weights; `--init` ignores them."""
    freeze_encoder: bool = False
    """Whether only the decoder is trained, so that latents encoded before, and denoisers of them, stay valid."""
    data: str | None = None
    """A folder of videos or another source, as `vgen.data.sources.open_clips` takes it; `None` draws ShapesWorld."""
    score_data: str | None = None
    """Source of the videos that scores are taken on; `None` takes those of training."""
    augment: dict[str, Any] = field(default_factory=dict)
    """Settings of `vgen.data.augment.Augmentation`, for training videos."""
    short: str = "skip"
    """What becomes of videos with too few frames: `skip`, or `pad`, where repeated frames carry no loss."""
    sampling: str = "random"
    """Which frames of a video make a clip: a `kind` of `vgen.data.clips.Sampling`."""
    stride: int = 1
    """From one frame of a `random` or `sliding` clip to the next, at `frame_rates`."""
    frame_rates: list[float] = field(default_factory=list)
    """Frames per second; each clip has one of them, drawn evenly. Videos are resampled to it. With none, videos keep
    their own and ShapesWorld's clips have 8. What is to be shown at lower rates, too, must be learned at them."""
    height: int = 64
    """Pixels."""
    width: int = 64
    """Pixels."""
    num_frames: int = 17
    """Frames a clip."""
    image_steps: int = 0
    """The first steps, which train on single frames."""
    image_share: float = 0.0
    """Share of the later steps that train on single frames, too, between those on clips."""
    image_batch_size: int = 32
    """Samples a step while training on single frames."""
    latest_moment: float = 0.0
    """In every second step ShapesWorld's clips begin at a random moment up to this one, in seconds: long after
    a scene's start shapes cross the frame's border, which they do not before."""
    mse_weight: float = 1.0
    """Weight of the squared error, beside the absolute error; both are means over pixels."""
    kl_weight: float = 1e-5
    """Weight of the divergence, a mean over latent elements."""
    lpips_weight: float = 0.0
    """Weight of LPIPS between frames; needs `lpips` and torchvision."""
    gan_weight: float = 0.0
    """Weight of what fools a discriminator of patches, after it was scaled to pull as hard as the error does."""
    gan_start: int = 0
    """Step from which the discriminator is trained and takes part; never for single images."""
    num_score_clips: int = 64
    """Fresh clips that a score is the mean over."""
    num_calibration_clips: int = 512
    """Clips that the latents' mean and deviation are taken from at the end."""

    def check(self) -> None:
        """Refuses what cannot work.

        Raises:
            ValueError: A setting is out of range, or there is no encoder to keep.
        """
        super().check()
        self.check_temporal_loss()
        Augmentation(**self.augment)
        if min(self.lpips_weight, self.gan_weight, self.gan_start) < 0:
            raise ValueError(
                f"lpips_weight={self.lpips_weight}, gan_weight={self.gan_weight}, gan_start={self.gan_start} must not "
                "be negative"
            )
        if not 0 <= self.image_share < 1:
            raise ValueError(f"image_share={self.image_share} must lie in [0, 1)")
        if any(rate <= 0 for rate in self.frame_rates):
            raise ValueError(f"frame_rates={self.frame_rates} must all be positive")
        if self.augment and not self.data:
            raise ValueError("augment is for videos of --data, ShapesWorld is endless")
        if self.latest_moment < 0:
            raise ValueError(f"latest_moment={self.latest_moment} must not be negative")
        if self.latest_moment and self.data:
            raise ValueError("latest_moment is for ShapesWorld, clips of --data begin as sampling says")
        if (self.gan_weight or self.lpips_weight) and self.short == "pad":
            raise ValueError("short=pad would show LPIPS or the discriminator videos that freeze: give short=skip")
        if self.freeze_encoder and not self.init:
            raise ValueError("freeze_encoder keeps the encoder of --init, which is missing")


def main(config: VAEConfig) -> None:
    """Trains; the same call goes on where an interrupted one stopped."""
    if config.dry_run:
        print(config_text(config))
        return
    accelerator = start(config)
    torch.backends.cudnn.benchmark = True

    source: World | Videos
    if config.data:
        source = Videos(config, config.data, augmentation=Augmentation(**config.augment))
        fresh = Videos(config, config.score_data or config.data, seed=1)
    else:
        source, fresh = World(config, "train", config.frame_rates), World(config, "all", seed=1)
    vae = load_vae(config.init) if config.init else CausalVideoVAE(**config.model)
    if not isinstance(vae, CausalVideoVAE):
        raise ValueError(f"{config.init} holds a {type(vae).__name__}: a causal video VAE is trained here")
    if config.freeze_encoder:
        vae.encoder.requires_grad_(False)
        vae.quant_conv.requires_grad_(False)
    if config.gradient_checkpointing:
        vae.enable_gradient_checkpointing()
    if config.compile:
        compile_blocks(vae)
        if config.gan_weight:  # its adaptive weight goes back through a part of the network before all of it does
            torch._functorch.config.donated_buffer = False
    model = JudgedVAE(vae, PatchDiscriminator()) if config.gan_weight else vae
    perceptual = LPIPS().to(accelerator.device) if config.lpips_weight else None
    run = Run(config, accelerator, model, lambda step: source.name(*batch_of(config, step)), source.digest)
    if run.step and source.streams:
        logger.warning(f"{config.output_dir} does not go on exactly: a stream begins again")

    for step in run.steps():
        indices, frames = batch_of(config, step)
        images, size = frames == 1, len(indices)
        moment = moment_of(config, step, images)
        judges = config.gan_weight > 0 and step >= config.gan_start and not images
        total: dict[str, Tensor] = {}
        for part in run.parts(size):
            clip, real = source.draw(indices[part], accelerator.device, frames, moment)
            options = {"judge": judges} if config.gan_weight else {}
            out = run.network(clip, generator=generators(config.seed, step, part), **options)
            run.count(
                *counted(vae, clip, judges), lambda network, clip=clip, options=options: network(clip, **options)
            )
            error = out.sample.float() - clip
            l1, mse = (over_frames(one, real) for one in (error.abs(), error.square()))
            kl = out.latent_dist.kl().sum() / out.latent_dist.mean.numel()
            parts = {"l1": l1, "kl": kl}
            error = l1 + config.mse_weight * mse
            if perceptual is not None:
                parts["lpips"] = perceptual(out.sample.float(), clip).mean()
                error = error + config.lpips_weight * parts["lpips"]
            if config.wants_temporal_loss:
                parts["temporal"] = torch.zeros_like(l1)
                if not images:
                    motion = measure_motion(clip, config.flow) if config.warping_weight else None
                    parts["temporal"] = temporal_loss(config, out.sample.float(), clip, motion, real[:, 1:]).mean()
                error = error + parts["temporal"]
            loss = error + config.kl_weight * kl
            if judges:
                fooling = -out.fooling.float().mean()
                weight = adaptive_weight(error, fooling, vae.decoder.conv_out.weight)
                parts["discriminator"] = discriminator_loss(out.real, out.fake)
                loss = loss + config.gan_weight * weight * fooling + parts["discriminator"]
            share = (part.stop - part.start) / size
            run.backward(loss * share)
            for name, value in parts.items():
                total[name] = total.get(name, 0) + value.detach() * share
        run.update()
        run.log(**total)
        if run.wants_scores:  # on fresh clips, and a video of originals over reconstructions
            with run.average:
                scores, pairs = score(vae, fresh, config, accelerator.device)
            run.report(scores)
            write_video(pairs, config.output_dir / "samples.mp4", frame_rate=8.0, overwrite=True)
        run.save()

    def save_result(weights: dict[str, Tensor] | None) -> None:
        result = vae if weights is None else copy_of(vae, weights).to(accelerator.device)
        if not config.freeze_encoder:
            calibrate(result, source, config, accelerator.device)
        with atomic_directory(config.output_dir / "vae") as folder:
            result.save_pretrained(folder)

    run.end(save_result)


def batch_of(config: VAEConfig, step: int) -> tuple[range, int]:
    """The numbers of a step's samples, of which none comes twice among those of as many frames, and their frames."""
    images = min(step, config.image_steps)
    rng = random.Random(config.seed * 1_000_003 + step + 0.5)
    if step < config.image_steps or rng.random() < config.image_share:
        return range(step * config.image_batch_size, (step + 1) * config.image_batch_size), 1
    first = images * config.image_batch_size + (step - images) * config.batch_size
    return range(first, first + config.batch_size), config.num_frames


def moment_of(config: VAEConfig, step: int, images: bool) -> float:
    """When a step's samples begin, in seconds after the start of their scenes."""
    rng = random.Random(config.seed * 1_000_003 + step)
    if images:
        return rng.uniform(0, 4)
    return rng.uniform(0, config.latest_moment) if step % 2 else 0.0


def over_frames(error: Tensor, real: Tensor) -> Tensor:
    """The mean over clips of the mean over each one's real frames, of errors `(b, c, f, h, w)`."""
    frames = error.mean(dim=(1, 3, 4))
    return ((frames * real).sum(1) / real.sum(1)).mean()


def counted(vae: CausalVideoVAE, clip: Tensor, judges: bool) -> tuple[int, int, tuple[torch.Size, bool]]:
    """Clips, latent pixels (the tokens of a denoiser with patches of one) and what operations a part takes."""
    b, _, f, h, w = clip.shape
    t = 1 + (f - 1) // vae.temporal_compression_ratio
    return b, b * t * h * w // vae.spatial_compression_ratio**2, (clip.shape, judges)


class World:
    """ShapesWorld, endless; where no frame rate is given, at the one that the checker reads."""

    digest, streams = None, False

    def __init__(self, config: VAEConfig, split: str, frame_rates: Sequence[float] = (), seed: int = 0):
        self.seed, self.frame_rates = config.seed, list(frame_rates) or [8.0]
        self.world = ShapesWorld(split=split, seed=config.seed + seed)
        self.size = {"height": config.height, "width": config.width}

    def draw(
        self, indices: range, device: torch.device, num_frames: int, moment: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """Clips `(b, 3, f, h, w)` of these numbers, from a moment on, and 1 for each real frame, `(b, f)`."""
        scenes = [self.world.scene(index) for index in indices]
        rates = torch.tensor(draw_frame_rates(self.frame_rates, self.seed, indices))
        clip = render(scenes, num_frames=num_frames, frame_rate=rates, start=moment, device=device, **self.size)
        return clip, torch.ones(len(clip), num_frames, device=device)

    def name(self, indices: range, num_frames: int) -> str:
        """What these numbers are."""
        return f"scenes {indices.start} to {indices.stop - 1} of ShapesWorld(seed={self.world.seed})"

    def readable(self, reconstructions: list[Tensor]) -> dict[str, float]:
        """In how many of the first clips' reconstructions the checker reads what they show."""
        scenes = [self.world.scene(index) for index in range(len(reconstructions))]
        return {"readable": adherence(reconstructions, scenes)["right"]}


class Videos:
    """Real videos, again and again."""

    def __init__(self, config: VAEConfig, data: str, seed: int = 0, augmentation: Augmentation | None = None):
        self.config = config
        self.frame_rates: Sequence[float | None] = config.frame_rates or [None]
        rest = (config.height, config.width, config.seed + seed, augmentation)
        clips = {"kind": config.sampling, "stride": config.stride, "num_frames": config.num_frames}
        images = config.image_steps or config.image_share
        self.clips: dict[tuple[int, float | None], Any] = {}
        """By number of frames and frame rate."""
        for rate in dict.fromkeys(self.frame_rates):
            for kind in [clips, {"num_frames": 1}] if images else [clips]:
                sampling = Sampling(**kind, frame_rate=rate, short=config.short)
                self.clips[sampling.num_frames, rate] = open_clips(data, sampling, *rest)

    def _samples(self, indices: range, num_frames: int) -> list[Clip]:
        rates = draw_frame_rates(self.frame_rates, self.config.seed, indices)
        return [self.clips[num_frames, rate].sample(index) for index, rate in zip(indices, rates, strict=True)]

    def draw(
        self, indices: range, device: torch.device, num_frames: int, moment: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """Clips `(b, 3, f, h, w)` of these numbers, from any moment, and 1 for each real frame, `(b, f)`."""
        pixels, real = stack_clips(self._samples(indices, num_frames), device)
        return pixels, real.float()

    @property
    def streams(self) -> bool:
        """Whether videos come one after another."""
        return any(isinstance(clips, VideoStream) for clips in self.clips.values())

    @property
    def digest(self) -> str | None:
        """Of the lists of videos, one a frame rate, if there are any."""
        longest = [clips for (num_frames, _), clips in self.clips.items() if num_frames == self.config.num_frames]
        return " ".join(clips.digest for clips in longest if isinstance(clips, VideoFolder)) or None

    def name(self, indices: range, num_frames: int) -> str:
        """The files that these numbers are cut from."""
        if self.streams:
            return "videos of a stream, which are not numbered"
        samples = self._samples(indices, num_frames)
        return ", ".join(f"{one.source.path} at {one.first:.2f} s" for one in samples)

    def readable(self, reconstructions: list[Tensor]) -> dict[str, float]:
        """Nothing: only ShapesWorld has a checker."""
        return {}


@torch.no_grad()
def score(
    vae: CausalVideoVAE, source: World | Videos, config: VAEConfig, device: torch.device
) -> tuple[dict[str, float], np.ndarray]:
    """Scores of clamped float32 reconstructions of the mode, and frames `(f, h, w, 3)` of the first ones.

    `psnr` is a mean in dB, `readable` the fraction in which the checker reads what the originals show: small shapes
    can lose their corners without a trace in the PSNR.
    """
    vae.eval()
    values, reconstructions, shown = [], [], None
    for begin in range(0, config.num_score_clips, 8):
        clip, _ = source.draw(range(begin, begin + 8), device, config.num_frames)
        decoded = vae.decode(vae.encode(clip).latent_dist.mode()).sample
        values.append(psnr(decoded, clip))
        reconstructions.extend(decoded.cpu())
        if shown is None:
            pairs = torch.cat([torch.cat(list(x), dim=-1) for x in (clip, decoded)], dim=-2)
            shown = pairs.add(1).mul(127.5).round().byte().movedim(0, -1).cpu().numpy()
    vae.train()
    assert shown is not None
    return {"psnr": torch.cat(values).mean().item()} | source.readable(reconstructions), shown


@torch.no_grad()
def calibrate(vae: CausalVideoVAE, source: World | Videos, config: VAEConfig, device: torch.device) -> None:
    """Takes the latents' statistics over clips of the training data into the config."""
    vae.eval()
    latents = []
    for begin in range(0, config.num_calibration_clips, 8):
        clip, _ = source.draw(range(begin, begin + 8), device, config.num_frames)
        latents.append(vae.encode(clip).latent_dist.mode())
    vae.calibrate(torch.cat(latents))


if __name__ == "__main__":
    main(parse_config(VAEConfig, __doc__))
