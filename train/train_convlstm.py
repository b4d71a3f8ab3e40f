"""Train a ConvLSTM that predicts frames, as a baseline for the diffusion models.

A small run for a CPU:

    accelerate launch train/train_convlstm.py --config train/recipes/shapes-64-convlstm.yaml --output_dir runs/try \
        --max_steps 20
"""

from vgen.io.spinning import stop_spinning

stop_spinning()  # before torch is imported

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from vgen.data.clips import Sampling
from vgen.io.atomic import atomic_directory
from vgen.io.errors import one_line_errors
from vgen.metrics.reference import psnr
from vgen.models.convlstm import ConvLSTMPredictor
from vgen.training.feed import Feed
from vgen.training.run import Run, RunConfig, config_text, copy_of, parse_config, start
from vgen.training.sources import ClipBatches, ClipSource, ShapesSource, VideoSource, consecutive_clips


@dataclass(kw_only=True)
class ConvLSTMConfig(RunConfig):
    """Settings for training a ConvLSTM."""

    data: str | None = None
    """A folder of videos or another source of `vgen.data.sources.open_clips`; `None` generates ShapesWorld."""
    num_frames: int = 17
    """Frames per clip."""
    given: int = 5
    """Number of given frames at the start of a clip; the others are predicted."""
    height: int = 64
    """Height of clips in pixels."""
    width: int = 64
    """Width of clips in pixels."""
    frame_rate: float | None = 8.0
    """Frames per second that videos are resampled to; `None` keeps their own rate."""
    model: dict[str, Any] = field(default_factory=dict)
    """Arguments of `ConvLSTMPredictor` for random weights; ignored with `--init`."""
    num_score_clips: int = 64
    """Number of new clips for a score."""

    def check(self) -> None:
        """Checks the settings.

        Raises:
            ValueError: A setting is out of range.
        """
        super().check()
        if not 1 <= self.given < self.num_frames:
            raise ValueError(
                f"given must be at least 1 and below num_frames={self.num_frames}, got given={self.given}"
            )
        if self.compile or self.gradient_checkpointing:
            raise ValueError("train_convlstm.py does not support compile or gradient_checkpointing")


def main(config: ConvLSTMConfig) -> None:
    """Trains a ConvLSTM; the same call resumes an interrupted run."""
    if config.dry_run:
        print(config_text(config))
        return
    accelerator = start(config)
    source, fresh = (open_source(config, seed) for seed in (config.seed, config.seed + 1))
    if config.init:
        model = ConvLSTMPredictor.from_pretrained(config.init)
    else:
        model = ConvLSTMPredictor(**config.model)
    run = Run(config, accelerator, model)
    batches = ClipBatches(source, partial(consecutive_clips, config.batch_size, config.num_frames))
    feed = Feed(run, batches)

    for _ in run.steps():
        total = torch.zeros((), device=accelerator.device)
        for _ in run.parts(config.batch_size):
            clip, _ = source.clips(next(feed), accelerator.device)
            predicted = run.network(clip[:, :, : config.given], config.num_frames - config.given - 1)
            run.count(len(clip), clip[:, 0].numel(), clip.shape, lambda network, clip=clip: network(clip))
            error = predicted.float() - clip[:, :, 1:]
            loss = (error.abs().mean() + error.square().mean()) * len(clip) / config.batch_size
            run.backward(loss)
            total += loss.detach()
        run.update()
        run.log(loss=total)
        if run.scores_are_due:
            with run.average:
                run.report({"psnr": score(model, fresh, config, accelerator)}, "psnr")
        run.save()

    def save_result(weights: dict[str, Tensor] | None) -> None:
        result = model if weights is None else copy_of(model, weights)
        with atomic_directory(config.output_dir / "convlstm") as folder:
            nn.Module.to(result, torch.float16)  # diffusers would warn
            result.save_pretrained(folder)

    run.end(save_result, "convlstm", "vgen evaluate --task prediction --convlstm {} -o runs/evaluation")


def open_source(config: ConvLSTMConfig, seed: int) -> ClipSource:
    """Opens the training data, or data for scores with another seed."""
    size = {"height": config.height, "width": config.width, "seed": seed}
    if config.data is None:
        return ShapesSource("train", **size, frame_rates=[config.frame_rate or 8.0])
    return VideoSource(config.data, [Sampling(num_frames=config.num_frames)], **size, frame_rates=[config.frame_rate])


@torch.no_grad()
def score(model: ConvLSTMPredictor, source: ClipSource, config: ConvLSTMConfig, accelerator: Accelerator) -> float:
    """Mean PSNR in dB of the frames predicted after the given frames of new clips.

    The processes divide the batches among them.
    """
    found: list[tuple[int, Tensor]] = []
    batches = range(0, config.num_score_clips, config.batch_size)
    for first in batches[accelerator.process_index :: accelerator.num_processes]:
        numbers = range(first, min(first + config.batch_size, config.num_score_clips))
        clip, _ = source.draw(numbers, accelerator.device, config.num_frames)
        predicted = model.predict(clip[:, :, : config.given], config.num_frames - config.given)
        found.append((first, psnr(predicted.clamp(-1, 1), clip[:, :, config.given :]).cpu()))
    values = dict(gather_object(found))
    return torch.cat([values[first] for first in batches]).mean().item()


if __name__ == "__main__":
    with one_line_errors(Path(__file__).name):
        main(parse_config(ConvLSTMConfig, __doc__))
