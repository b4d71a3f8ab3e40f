"""Trains a video classifier on labeled videos, or on a task of ShapesWorld.

accelerate launch train/train_recognizer.py --data my-videos --score_data my-test-videos --output_dir runs/recognizer
accelerate launch train/train_recognizer.py --task motion --network cnn_gru --output_dir runs/shapes-recognizer

Videos are in one folder for each class, or a metadata file has their labels in its column `label`. The result is
OUTPUT_DIR/recognizer. With --per_frame true, labels have time stamps, and the result says what happens when.
"""

from __future__ import annotations

from vgen.io.spinning import stop_spinning

stop_spinning()  # before torch is imported

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from vgen.checks import check_number
from vgen.data.augment import Augmentation
from vgen.data.clips import Sampling, SamplingKind, Short, stack_clips
from vgen.data.labels import Labeled, classes_of, list_labeled, timelines_of
from vgen.data.shapes_tasks import ShapesTask, ShapesTasks
from vgen.data.views import views_of
from vgen.io.atomic import atomic_directory
from vgen.io.errors import one_line_errors
from vgen.recognition import Recognizer, create_recognizer
from vgen.recognition.detection import Segment, mean_average_precision
from vgen.recognition.objective import classification_loss, classification_scores, frame_loss, mixup
from vgen.tasks.classification import detect, timeline
from vgen.training.feed import Feed
from vgen.training.labeled import LabeledMoments, LabeledShapes, LabeledVideos
from vgen.training.run import Run, RunConfig, config_text, copy_of, parse_config, start
from vgen.training.sources import ClipBatches, consecutive_clips

Source = LabeledShapes | LabeledVideos | LabeledMoments


@dataclass(kw_only=True)
class RecognizerConfig(RunConfig):
    """Settings for training a classifier."""

    data: str | None = None
    """A folder of labeled videos; see `vgen.data.labels.list_labeled`. `None` generates ShapesWorld."""
    score_data: str | None = None
    """A folder of labeled videos for scores; `None` scores the training videos, or new scenes of ShapesWorld."""
    task: ShapesTask = "motion"
    """Task of ShapesWorld: see `vgen.data.shapes_tasks.ShapesTask`."""
    network: str = "cnn_gru"
    """Name of the network: see `vgen.recognition.NETWORKS`. Ignored with `--init`."""
    model: dict[str, Any] = field(default_factory=dict)
    """Further sizes of the network, for `create_recognizer`. Ignored with `--init`."""
    classes: list[str] = field(default_factory=list)
    """Names of the classes in their order; other labels are then errors. An empty list takes all labels."""
    multi_label: bool = False
    """Whether a video may have several labels."""
    per_frame: bool = False
    """Whether labels hold from `start` to `end` in a video only, so that each frame is labeled. This needs a network
    that classifies frames, such as `cnn_gru` or `causal_cnn`; several labels may hold at once."""
    iou_weight: float = 0.0
    """Weight of the temporal IoU loss with `per_frame`."""
    num_frames: int = 17
    """Frames per clip."""
    image_size: int = 64
    """Height and width of clips in pixels."""
    frame_rate: float | None = 8.0
    """Frames per second that videos are resampled to; `None` keeps their own rate."""
    sampling: SamplingKind = "random"
    """Which frames of a video make a clip: a `kind` of `vgen.data.clips.Sampling`."""
    stride: int = 1
    """Step between the frames of a `random` or `sliding` clip."""
    short: Short = "skip"
    """How to treat videos with too few frames: `skip` them, or `pad` them with copies of the last frame. Networks that
    take a mask do not see the copies."""
    augment: dict[str, Any] = field(default_factory=dict)
    """Settings of `vgen.data.augment.Augmentation`, for training videos. All frames of a clip change alike."""
    balance: bool = False
    """Whether to draw all classes equally often, however many videos each has."""
    mixup: float = 0.0
    """Blends clips and labels in shares from Beta(mixup, mixup); 0 blends none."""
    label_smoothing: float = 0.0
    """Share of the targets that is spread over all classes."""
    num_score_clips: int = 256
    """Number of scenes of ShapesWorld for a score."""
    test_clips: int = 4
    """Most clips per video over which probabilities are averaged in scores."""
    test_crops: int = 1
    """Crops of each clip over which probabilities are averaged in scores, from one end of the frame to the other."""

    def check(self) -> None:
        """Checks the settings.

        Raises:
            ValueError: A setting is out of range.
        """
        super().check()
        Augmentation(**self.augment)
        check_number("mixup", self.mixup, 0)
        check_number("label_smoothing", self.label_smoothing, 0, 1)
        for name in ("num_frames", "image_size", "num_score_clips", "test_clips", "test_crops"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        check_number("iou_weight", self.iou_weight, 0)
        if self.per_frame and (self.mixup or self.label_smoothing or self.balance):
            raise ValueError("mixup, label_smoothing and balance do not support per_frame=true")
        if self.iou_weight and not self.per_frame:
            raise ValueError("iou_weight needs per_frame=true")
        if self.data is None:
            ignored = ("score_data", "augment", "classes", "multi_label", "balance", "per_frame")
            wrong = [name for name in ignored if getattr(self, name)]
            if wrong:
                raise ValueError(f"{', '.join(wrong)} need videos (--data)")
        if self.compile or self.gradient_checkpointing:
            raise ValueError("train_recognizer.py does not support compile or gradient_checkpointing")


def main(config: RecognizerConfig) -> None:
    """Trains a classifier; the same call resumes an interrupted run."""
    if config.dry_run:
        print(config_text(config))
        return
    source = open_source(config)
    fresh = open_score_source(config, source.classes)
    accelerator = start(config)
    model = make_model(config, source.classes)
    batches = ClipBatches(source, partial(consecutive_clips, config.batch_size, config.num_frames))
    run = Run(config, accelerator, model, batches.name, data=source.digest)
    feed = Feed(run, batches)
    if config.per_frame:
        loss_of = partial(frame_loss, iou_weight=config.iou_weight)
    else:
        loss_of = partial(classification_loss, multi_label=model.config.multi_label, smoothing=config.label_smoothing)

    for step in run.steps():
        total = torch.zeros((), device=accelerator.device)
        for part in run.parts(config.batch_size):
            batch = next(feed)
            clip, real = source.clips(batch, accelerator.device)
            rng = np.random.default_rng((config.seed, step, part.start))
            clip, targets = mixup(clip, batch["targets"], config.mixup, rng)
            output = run.network(clip, mask=mask_of(model, real, config))
            run.count(len(clip), clip[:, 0].numel(), clip.shape, lambda network, clip=clip: network(clip))
            losses = (
                loss_of(output.frame_logits, targets, real) if config.per_frame else loss_of(output.logits, targets)
            )
            loss = losses.sum() / config.batch_size
            run.backward(loss)
            total += loss.detach()
        run.update()
        run.log(loss=total)
        if run.scores_are_due or (run.is_over and not run.sharded):
            with run.average:
                scores = score(model, fresh, config, accelerator)
            run.report(scores, "mAP" if config.per_frame else next(iter(scores)))
        run.save()

    def save_result(weights: dict[str, Tensor] | None) -> None:
        result = model if weights is None else copy_of(model, weights)
        with atomic_directory(config.output_dir / "recognizer") as folder:
            nn.Module.to(result, torch.float16)  # diffusers would warn
            result.save_pretrained(folder)

    timeline = " --timeline" if config.per_frame else ""
    run.end(save_result, "recognizer", f"vgen classify VIDEO --model {{}}{timeline}")


def make_model(config: RecognizerConfig, classes: list[str]) -> Recognizer:
    """The network with random weights, or with those of `init`.

    Raises:
        ValueError: The classes of `init` are others, or the network does not suit the labels.
    """
    multi_label = (
        config.multi_label or config.per_frame or (config.data is None and ShapesTasks(config.task).multi_label)
    )
    if config.init:
        model = Recognizer.from_pretrained(config.init)
    else:
        size = (len(classes), config.num_frames, config.image_size)
        about = {"labels": classes, "frame_rate": config.frame_rate, "multi_label": multi_label}
        model = create_recognizer(config.network, *size, **config.model, **about)
    if model.labels != classes:
        raise ValueError(
            f"the classes of {config.init} are {', '.join(model.labels)}, those of the data {', '.join(classes)}"
        )
    if model.config.multi_label != multi_label:
        raise ValueError(f"{config.init} has multi_label={model.config.multi_label}, the settings {multi_label}")
    if config.per_frame and not model.network.is_streamed:
        raise ValueError(f"per_frame needs a network that classifies each frame, got {model.config.name}")
    return model


def open_source(config: RecognizerConfig) -> Source:
    """Opens the training data.

    Raises:
        ValueError: There are too few classes.
    """
    if config.data is None:
        return LabeledShapes(config.task, config.num_frames, config.image_size, config.seed)
    videos = list_labeled(Path(config.data))
    classes = classes_of(videos, config.classes or None)
    if len(classes) < 2 and not (config.multi_label or config.per_frame):
        raise ValueError(f"a classifier needs at least two classes, got {', '.join(classes)}")
    return open_videos(config, config.data, videos, classes, Augmentation(**config.augment), config.balance)


def open_score_source(config: RecognizerConfig, classes: list[str]) -> Source:
    """Opens the data for scores: other scenes, or videos without augmentation.

    Raises:
        ValueError: A video has an unknown label.
    """
    if config.data is None:
        return LabeledShapes(config.task, config.num_frames, config.image_size, config.seed + 1)
    folder = config.score_data or config.data
    videos = list_labeled(Path(folder))
    classes_of(videos, classes, complete=False)
    return open_videos(config, folder, videos, classes)


def open_videos(
    config: RecognizerConfig,
    folder: str,
    videos: list[Labeled],
    classes: list[str],
    augmentation: Augmentation | None = None,
    balance: bool = False,
) -> LabeledVideos | LabeledMoments:
    """Opens labeled videos.

    Raises:
        ValueError: A video has several labels without `multi_label`.
    """
    size = (config.image_size, config.seed, augmentation)
    if config.per_frame:
        return LabeledMoments(timelines_of(videos), classes, sampling_of(config), *size)
    several = [one for one in videos if len(one.labels) > 1]
    if several and not config.multi_label:
        path, labels = several[0].video.path, ", ".join(several[0].labels)
        raise ValueError(f"{path} of {folder} has several labels ({labels}): pass --multi_label true")
    return LabeledVideos(videos, classes, sampling_of(config), *size, balance)


def sampling_of(config: RecognizerConfig) -> Sampling:
    """Which frames make a clip."""
    return Sampling(
        num_frames=config.num_frames,
        kind=config.sampling,
        frame_rate=config.frame_rate,
        stride=config.stride,
        short=config.short,
    )


def mask_of(model: Recognizer, real: Tensor, config: RecognizerConfig) -> Tensor | None:
    """The mask of real frames, for networks that take one, if clips may be padded."""
    return real.bool() if config.short == "pad" and model.network.takes_mask else None


@torch.no_grad()
def score(model: Recognizer, source: Source, config: RecognizerConfig, accelerator: Accelerator) -> dict[str, float]:
    """Scores on new scenes or on videos, whose probabilities are averaged over clips and crops.

    The processes divide them among them.
    """
    model.eval()
    here, there = accelerator.process_index, accelerator.num_processes
    if isinstance(source, LabeledMoments):
        scores = score_moments(model, source, here, there)
        model.train()
        return scores
    found: list[tuple[int, Tensor, Tensor]] = []
    if isinstance(source, LabeledShapes):
        for first in range(0, config.num_score_clips, config.batch_size):
            if first // config.batch_size % there == here:
                numbers = range(first, min(first + config.batch_size, config.num_score_clips))
                batch = source.batch(numbers, config.num_frames)
                clip, _ = source.clips(batch, accelerator.device)
                found.append((first, model.probabilities(model(clip).logits).cpu(), batch["targets"]))
    else:
        for number, video in list(enumerate(source.usable()))[here::there]:
            clips = views_of(video, source.folder.sampling, config.image_size, config.test_clips, config.test_crops)
            clip, real = stack_clips(clips, accelerator.device)
            logits = model(clip, mask=mask_of(model, real, config)).logits
            mean = model.probabilities(logits).mean(0, keepdim=True)
            found.append((number, mean.cpu(), source.target(video)[None]))
    model.train()
    found = sorted(gather_object(found), key=lambda one: one[0])
    probabilities, targets = (torch.cat([one[index] for one in found]) for index in (1, 2))
    return classification_scores(probabilities, targets, model.config.multi_label)


def score_moments(model: Recognizer, source: LabeledMoments, here: int, there: int) -> dict[str, float]:
    """Mean average precision of the segments that are detected in whole videos."""
    found = [
        (str(video.path), detect(timeline(model, video.path), model.labels))
        for video in list(source.events)[here::there]
    ]
    true = {str(video.path): [Segment(*event) for event in events] for video, events in source.events.items()}
    return mean_average_precision(dict(gather_object(found)), true)


if __name__ == "__main__":
    with one_line_errors(Path(__file__).name):
        main(parse_config(RecognizerConfig, __doc__))
