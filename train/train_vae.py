"""Train a causal video VAE: single images first, then clips, then the statistics of its latents.

A small run for a CPU:

    accelerate launch train/train_vae.py --config train/recipes/shapes-64-vae.yaml --output_dir runs/try \
        --image_steps 20 --max_steps 40
"""

from vgen.io.spinning import stop_spinning

stop_spinning()  # before torch is imported

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from diffusers.utils import logging
from torch import Tensor

from vgen.io.atomic import atomic_directory
from vgen.io.errors import one_line_errors
from vgen.io.pixels import to_frames
from vgen.metrics.prompt import adherence
from vgen.metrics.reference import LPIPS, psnr
from vgen.models.compilation import compile_blocks
from vgen.models.image_vae import load_vae
from vgen.models.tiny_vae import TinyCodec, TinyVideoVAE
from vgen.models.vae import CausalVideoVAE
from vgen.temporal.flow import measure_motion
from vgen.training.adversarial import (
    PatchDiscriminator,
    VAEWithDiscriminator,
    adaptive_weight,
    discriminator_loss,
)
from vgen.training.feed import Feed
from vgen.training.run import Run, config_text, copy_of, generators, parse_config, start
from vgen.training.sources import (
    ClipBatches,
    ClipConfig,
    ClipSource,
    ShapesSource,
    masked_mean,
    open_fresh_source,
    open_source,
    plan_clips,
)
from vgen.training.temporal_loss import TemporalLossConfig, temporal_loss

logger = logging.get_logger(__name__)
TRAINING_DATA = "colored shapes that move on a plain background"  # ShapesWorld


@dataclass(kw_only=True)
class VAEConfig(ClipConfig, TemporalLossConfig):
    """Settings for training a VAE."""

    model: dict[str, Any] = field(default_factory=dict)
    """Arguments of `CausalVideoVAE`, with `--distill` of `TinyVideoVAE`, for random weights; ignored with `--init`."""
    distill: str | None = None
    """Folder or Hub id of a VAE. A tiny decoder of its latents is trained instead, for previews; `kl_weight` has no
    effect."""
    freeze_encoder: bool = False
    """Whether to train only the decoder, so that existing latents and denoisers stay valid."""
    score_data: str | None = None
    """Source of the videos that scores are computed on; `None` means other clips of the training data, which say
    nothing about new videos. `patience` watches their PSNR, after the steps on images."""
    mse_weight: float = 1.0
    """Weight of the squared error, which is added to the absolute error; both are means over pixels."""
    kl_weight: float = 1e-5
    """Weight of the KL divergence, a mean over latent elements."""
    lpips_weight: float = 0.0
    """Weight of LPIPS of the frames; needs `lpips` and torchvision."""
    gan_weight: float = 0.0
    """Weight of the generator's adversarial loss, relative to the gradient norm of the reconstruction error."""
    gan_start: int = 0
    """First step in which the discriminator is trained and used; it is never used on single images."""
    num_score_clips: int = 64
    """Number of new clips for a score."""
    num_calibration_clips: int = 512
    """Number of clips for the mean and standard deviation of the latents, which are computed at the end."""

    def check(self) -> None:
        """Checks the settings.

        Raises:
            ValueError: A setting is out of range, or `freeze_encoder` has no `--init`.
        """
        super().check()
        self.check_temporal_loss()
        if self.patience and self.image_steps >= self.max_steps:
            raise ValueError(
                f"patience needs steps on clips: image_steps must be below max_steps={self.max_steps}, got "
                f"{self.image_steps}"
            )
        if min(self.lpips_weight, self.gan_weight, self.gan_start) < 0:
            raise ValueError(
                "lpips_weight, gan_weight and gan_start must be at least 0, got "
                f"lpips_weight={self.lpips_weight}, gan_weight={self.gan_weight}, gan_start={self.gan_start}"
            )
        if (self.gan_weight or self.lpips_weight) and self.short == "pad":
            raise ValueError(
                "short=pad is not supported with lpips_weight or gan_weight, which would see repeated frames: use "
                "short=skip"
            )
        if self.freeze_encoder and not self.init:
            raise ValueError("freeze_encoder needs a pretrained VAE: pass --init")
        if self.distill and (self.freeze_encoder or self.gan_weight):
            raise ValueError("distill trains a decoder by its error alone: leave out freeze_encoder and gan_weight")


def main(config: VAEConfig) -> None:
    """Trains a VAE; the same call resumes an interrupted run."""
    if config.dry_run:
        print(config_text(config))
        return
    accelerator = start(config)
    torch.backends.cudnn.benchmark = True

    source, fresh = open_source(config), open_fresh_source(config, config.score_data)
    teacher = causal_vae(config.distill).to(accelerator.device).eval() if config.distill else None
    vae: Any
    if teacher is not None:
        vae = TinyVideoVAE.from_pretrained(config.init) if config.init else tiny_decoder(teacher, config.model)
    else:
        vae = causal_vae(config.init) if config.init else CausalVideoVAE(**config.model)
    codec: CausalVideoVAE | TinyCodec = vae if teacher is None else TinyCodec(teacher, vae)
    if config.freeze_encoder:
        vae.encoder.requires_grad_(False)
        vae.quant_conv.requires_grad_(False)
    if config.gradient_checkpointing:
        vae.enable_gradient_checkpointing()
    if config.compile:
        compile_blocks(vae)
        if config.gan_weight:  # the adaptive weight runs a backward pass through a part of the network first
            torch._functorch.config.donated_buffer = False
    model = VAEWithDiscriminator(vae, PatchDiscriminator()) if config.gan_weight else vae
    perceptual = LPIPS().to(accelerator.device) if config.lpips_weight else None
    batches = ClipBatches(source, partial(plan_clips, config))
    # layers for time are not used on single images, nor is the discriminator, which starts late
    partly_used = config.num_frames == 1 or config.image_steps > 0 or config.image_share > 0 or config.gan_weight > 0
    run = Run(config, accelerator, model, batches.name, source.digest, has_unused_weights=partly_used)
    feed = Feed(run, batches, batches.size)
    if run.step and source.is_stream:
        logger.warning(f"{config.output_dir} is not resumed exactly: a stream starts from its beginning")

    for step in run.steps():
        size, images = batches.size(step), batches.plan(step).num_frames == 1
        use_discriminator = config.gan_weight > 0 and step >= config.gan_start and not images
        total: dict[str, Tensor] = {}
        for part in run.parts(size):
            clip, real = source.clips(next(feed), accelerator.device)
            options: dict[str, Any] = {"sample_posterior": True}
            if config.gan_weight:
                options = {"use_discriminator": use_discriminator}  # which samples
            if teacher is None:
                inputs, options = clip, options | {"generator": generators(config.seed, step, part)}
            else:
                with torch.no_grad(), accelerator.autocast():
                    latents = teacher.encode(clip).latent_dist.mode()
                inputs, options = vae.denormalize(teacher.normalize(latents)), {}
            out = run.network(inputs, **options)
            run.count(
                *batch_stats(teacher or vae, clip, use_discriminator),
                lambda network, inputs=inputs, options=options: network(inputs, **options),
            )
            error = out.sample.float() - clip
            l1, mse = (masked_mean(one, real) for one in (error.abs(), error.square()))
            parts, kl = {"l1": l1}, torch.zeros_like(l1)
            if teacher is None:
                parts["kl"] = kl = out.latent_dist.kl().sum() / out.latent_dist.mean.numel()
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
            if use_discriminator:
                generator_loss = -out.generator_logits.float().mean()
                weight = adaptive_weight(error, generator_loss, vae.decoder.conv_out.weight)
                parts["discriminator"] = discriminator_loss(out.real, out.fake)
                loss = loss + config.gan_weight * weight * generator_loss + parts["discriminator"]
            share = (part.stop - part.start) / size
            run.backward(loss * share)
            for name, value in parts.items():
                total[name] = total.get(name, 0) + value.detach() * share
        run.update()
        run.log(**total)
        if run.scores_are_due:  # on fresh clips, and a video of originals over reconstructions
            with run.average:
                scores, pairs = score(codec, fresh, config, accelerator)
            run.report(scores, "psnr" if run.step > config.image_steps else None)
            if pairs is not None:
                run.save_samples(pairs, 8.0)
        run.save()

    def save_result(weights: dict[str, Tensor] | None) -> None:
        result = vae if weights is None else copy_of(vae, weights).to(accelerator.device)
        if teacher is not None:
            with atomic_directory(config.output_dir / "decoder") as folder:
                result.save_pretrained(folder)
            return
        if not config.freeze_encoder:
            calibrate(result, source, config, accelerator.device)
        describe_training(result, source, config, accelerator.device)
        with atomic_directory(config.output_dir / "vae") as folder:
            result.save_pretrained(folder)

    if teacher is not None:
        run.end(save_result, "decoder", "vgen rollout PROMPT --decoder {} -o video.mp4")
        return
    run.end(save_result, "vae", "accelerate launch pipelines/encode_latents.py --vae {} --output_dir ...")


def causal_vae(source: str) -> CausalVideoVAE:
    """Loads a VAE.

    Raises:
        ValueError: It is of another class.
    """
    vae = load_vae(source)
    if not isinstance(vae, CausalVideoVAE):
        raise ValueError(f"expected a CausalVideoVAE in {source}, got {type(vae).__name__}")
    return vae


def tiny_decoder(teacher: CausalVideoVAE, model: dict[str, Any]) -> TinyVideoVAE:
    """A tiny decoder with random weights for the latents of a VAE, unless `model` has other sizes."""
    config = teacher.config
    halvings = len(config.dim_mult) - 1
    time = [False] * (halvings - sum(config.temperal_downsample)) + [True] * sum(config.temperal_downsample)
    sizes = {
        "latent_channels": config.z_dim, "patch_size": config.patch_size or 1, "encoder_channels": None,
        "decoder_channels": [256, 128, *[64] * (halvings - 1)][: halvings + 1], "decoder_time": time,
    }  # fmt: skip
    return TinyVideoVAE(**sizes | model)


def batch_stats(
    vae: CausalVideoVAE, clip: Tensor, use_discriminator: bool
) -> tuple[int, int, tuple[torch.Size, bool]]:
    """Clips, latent pixels (the tokens of a denoiser with patch size 1), and a key of the number of operations."""
    b, _, f, h, w = clip.shape
    return b, b * vae.grid.num_latents(f) * h * w // vae.spatial_compression_ratio**2, (clip.shape, use_discriminator)


@torch.no_grad()
def score(
    vae: CausalVideoVAE | TinyCodec, source: ClipSource, config: VAEConfig, accelerator: Accelerator
) -> tuple[dict[str, float], np.ndarray | None]:
    """Scores of reconstructions of the posterior's mode, and frames `(f, h, w, 3)` of the first clips.

    `psnr` is the mean in dB. `readable`, for ShapesWorld, is the fraction of scenes in which the checker reads all
    attributes: it detects small shapes that lose their corners, which PSNR does not. The processes divide the batches
    among them; the first one, of the main process, gives the frames.
    """
    vae.eval()
    found: list[tuple[int, dict[str, Tensor]]] = []
    shown = None
    batches = range(0, config.num_score_clips, 8)
    for begin in batches[accelerator.process_index :: accelerator.num_processes]:
        clip, _ = source.draw(range(begin, begin + 8), accelerator.device, config.num_frames)
        decoded = vae.decode(vae.encode(clip).latent_dist.mode()).sample
        values = {"psnr": psnr(decoded, clip).cpu()}
        if isinstance(source, ShapesSource):
            scenes = [source.world.scene(index) for index in range(begin, begin + 8)]
            values["readable"] = torch.tensor([adherence(list(decoded.cpu()), scenes)["correct"]])
        found.append((begin, values))
        if begin == 0:
            pairs = torch.cat([torch.cat(list(x), dim=-1) for x in (clip, decoded)], dim=-2)
            shown = to_frames(pairs[None])[0]
    vae.train()
    gathered = dict(gather_object(found))
    names = gathered[0]
    return {name: torch.cat([gathered[begin][name] for begin in batches]).mean().item() for name in names}, shown


def training_clips(source: ClipSource, config: VAEConfig, count: int, device: torch.device) -> Iterator[Tensor]:
    """Batches with the first `count` clips of the training data, rounded up to whole batches."""
    for begin in range(0, count, 8):
        yield source.draw(range(begin, begin + 8), device, config.num_frames)[0]


@torch.no_grad()
def calibrate(vae: CausalVideoVAE, source: ClipSource, config: VAEConfig, device: torch.device) -> None:
    """Stores the mean and standard deviation of latents of the training data in the VAE's config."""
    vae.eval()
    clips = training_clips(source, config, config.num_calibration_clips, device)
    vae.calibrate(torch.cat([vae.encode(clip).latent_dist.mode() for clip in clips]))


@torch.no_grad()
def describe_training(vae: CausalVideoVAE, source: ClipSource, config: VAEConfig, device: torch.device) -> None:
    """Stores how well the VAE reconstructs its training data, for warnings about videos that it cannot reconstruct."""
    vae.eval()
    clips = training_clips(source, config, config.num_score_clips, device)
    values = [psnr(vae.decode(vae.encode(clip).latent_dist.mode()).sample, clip) for clip in clips]
    data = TRAINING_DATA if config.data is None else None
    vae.register_to_config(training_psnr=round(torch.cat(values).mean().item(), 2), training_data=data)


if __name__ == "__main__":
    with one_line_errors(Path(__file__).name):
        main(parse_config(VAEConfig, __doc__))
