"""Train a causal video VAE: single images first, then clips, then the statistics of its latents.

A CPU-sized try:

    accelerate launch train/train_vae.py --config train/recipes/shapes-64-vae.yaml --output_dir runs/try \
        --image_steps 20 --max_steps 40
"""

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from diffusers.utils import logging
from torch import Tensor

from vgen.data.video_io import write_video
from vgen.io.atomic import atomic_directory
from vgen.metrics.prompt import adherence
from vgen.metrics.reference import LPIPS, psnr
from vgen.models.image_vae import load_vae
from vgen.models.vae import CausalVideoVAE
from vgen.temporal.flow import measure_motion
from vgen.training.adversarial import (
    PatchDiscriminator,
    VAEWithDiscriminator,
    adaptive_weight,
    discriminator_loss,
)
from vgen.training.feed import Feed
from vgen.training.run import Run, compile_blocks, config_text, copy_of, generators, parse_config, start
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


@dataclass(kw_only=True)
class VAEConfig(ClipConfig, TemporalLossConfig):
    """Settings of a VAE's training."""

    model: dict[str, Any] = field(default_factory=dict)
    """Arguments of `CausalVideoVAE` for random weights; `--init` ignores them."""
    freeze_encoder: bool = False
    """Whether only the decoder is trained, so that latents encoded before, and denoisers of them, stay valid."""
    score_data: str | None = None
    """Source of the videos that scores are taken on; `None` takes those of training."""
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
        if min(self.lpips_weight, self.gan_weight, self.gan_start) < 0:
            raise ValueError(
                f"lpips_weight={self.lpips_weight}, gan_weight={self.gan_weight}, gan_start={self.gan_start} must not "
                "be negative"
            )
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

    source, fresh = open_source(config), open_fresh_source(config, config.score_data)
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
    model = VAEWithDiscriminator(vae, PatchDiscriminator()) if config.gan_weight else vae
    perceptual = LPIPS().to(accelerator.device) if config.lpips_weight else None
    batches = ClipBatches(source, partial(plan_clips, config))
    run = Run(config, accelerator, model, batches.name, source.digest)
    feed = Feed(run, batches, batches.size)
    if run.step and source.is_stream:
        logger.warning(f"{config.output_dir} is not resumed exactly: a stream begins again")

    for step in run.steps():
        size, images = batches.size(step), batches.plan(step).num_frames == 1
        use_discriminator = config.gan_weight > 0 and step >= config.gan_start and not images
        total: dict[str, Tensor] = {}
        for part in run.parts(size):
            clip, real = source.clips(next(feed), accelerator.device)
            options = {"use_discriminator": use_discriminator} if config.gan_weight else {}
            out = run.network(clip, generator=generators(config.seed, step, part), **options)
            run.count(
                *batch_stats(vae, clip, use_discriminator),
                lambda network, clip=clip, options=options: network(clip, **options),
            )
            error = out.sample.float() - clip
            l1, mse = (masked_mean(one, real) for one in (error.abs(), error.square()))
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


def batch_stats(
    vae: CausalVideoVAE, clip: Tensor, use_discriminator: bool
) -> tuple[int, int, tuple[torch.Size, bool]]:
    """Clips, latent pixels (the tokens of a denoiser with patches of one) and what operations a part takes."""
    b, _, f, h, w = clip.shape
    t = 1 + (f - 1) // vae.temporal_compression_ratio
    return b, b * t * h * w // vae.spatial_compression_ratio**2, (clip.shape, use_discriminator)


def caption_accuracy(source: ClipSource, reconstructions: list[Tensor]) -> dict[str, float]:
    """In how many of ShapesWorld's first clips the checker reads what they show; other sources have no checker."""
    if not isinstance(source, ShapesSource):
        return {}
    scenes = [source.world.scene(index) for index in range(len(reconstructions))]
    return {"readable": adherence(reconstructions, scenes)["right"]}


@torch.no_grad()
def score(
    vae: CausalVideoVAE, source: ClipSource, config: VAEConfig, device: torch.device
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
    return {"psnr": torch.cat(values).mean().item()} | caption_accuracy(source, reconstructions), shown


@torch.no_grad()
def calibrate(vae: CausalVideoVAE, source: ClipSource, config: VAEConfig, device: torch.device) -> None:
    """Takes the latents' statistics over clips of the training data into the config."""
    vae.eval()
    latents = []
    for begin in range(0, config.num_calibration_clips, 8):
        clip, _ = source.draw(range(begin, begin + 8), device, config.num_frames)
        latents.append(vae.encode(clip).latent_dist.mode())
    vae.calibrate(torch.cat(latents))


if __name__ == "__main__":
    main(parse_config(VAEConfig, __doc__))
