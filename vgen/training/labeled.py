"""Sources of labeled clips, for training classifiers."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vgen.data.augment import Augmentation
from vgen.data.clips import Clip, Listed, Sampling, VideoFolder, stack_frames
from vgen.data.labels import Labeled, Timeline
from vgen.data.shapes_tasks import ShapesTask, ShapesTasks
from vgen.training.sources import ClipSource, DecodedSource


class LabeledShapes(ClipSource):
    """Labeled clips of ShapesWorld, without end. The batches also have `targets` `(b, k)`.

    Args:
        task: What the labels say.
        num_frames: Frames per clip.
        size: Height and width in pixels.
        seed: Seed of the scenes.
    """

    def __init__(self, task: ShapesTask, num_frames: int, size: int, seed: int = 0) -> None:
        self.tasks = ShapesTasks(task, num_frames, seed)
        self.classes, self.size = list(self.tasks.classes), size

    def batch(self, indices: range, num_frames: int, start: float = 0.0) -> dict[str, Any]:
        """Scenes that are not yet rendered, and targets."""
        scenes = [self.tasks.scene(index) for index in indices]
        targets = torch.zeros(len(scenes), len(self.classes))
        for row, scene in zip(targets, scenes, strict=True):
            row[list(scene.labels)] = 1.0
        return {"scenes": scenes, "targets": targets}

    def clips(self, batch: Mapping[str, Any], device: torch.device) -> tuple[Tensor, Tensor]:
        """Renders the scenes."""
        clip = self.tasks.clips(batch["scenes"], self.size, device)
        return clip, torch.ones(len(clip), clip.shape[2], device=device)

    def name(self, indices: range, num_frames: int) -> str:
        """Names the scenes."""
        tasks = self.tasks
        return f"scenes {indices.start} to {indices.stop - 1} of ShapesTasks({tasks.task}, seed={tasks.seed})"


class LabeledMoments(DecodedSource):
    """Clips of videos whose labels have time stamps. The batches also have `targets` `(b, f, k)` for each frame.

    Args:
        videos: The videos with their labeled segments.
        classes: Names of the classes.
        sampling: Which frames of a video make a clip; they must be consecutive.
        size: Height and width of the clips in pixels.
        seed: Seed of random choices.
        augmentation: Random augmentation of clips, except `reverse`.

    Raises:
        ValueError: No video can be used, or a setting does not suit labels of frames.
    """

    def __init__(
        self,
        videos: Sequence[Timeline],
        classes: Sequence[str],
        sampling: Sampling,
        size: int,
        seed: int = 0,
        augmentation: Augmentation | None = None,
    ) -> None:
        if sampling.spreads or (augmentation and augmentation.reverse):
            raise ValueError("labels of frames need sampling=random or sliding, and no reverse in augment")
        self.classes, self.events = list(classes), {one.video: one.events for one in videos}
        self.folder = VideoFolder(list(self.events), sampling, size, size, seed, augmentation)
        self.digest = self.folder.digest

    def batch(self, indices: range, num_frames: int, start: float = 0.0) -> dict[str, Any]:
        """Decoded frames, and targets."""
        samples = [self.folder.sample(index) for index in indices]
        frames, real = stack_frames(samples)
        return {"frames": frames, "real": real, "targets": torch.stack([self.targets(one) for one in samples])}

    def name(self, indices: range, num_frames: int) -> str:
        """Describes the files that the clips are taken from."""
        return ", ".join(f"{one.source.path} at {one.first:.2f} s" for one in map(self.folder.sample, indices))

    def targets(self, clip: Clip) -> Tensor:
        """1 for the labels of each frame and 0 for others, `(f, k)`. A segment includes its start, not its end."""
        times = clip.first + torch.arange(len(clip.frames)) / clip.frame_rate
        found = torch.zeros(len(times), len(self.classes))
        for label, start, end in self.events[clip.source]:
            found[(times >= start - 1e-6) & (times < end - 1e-6), self.classes.index(label)] = 1.0
        return found


class LabeledVideos(DecodedSource):
    """Clips of labeled videos, repeated for any number of epochs. The batches also have `targets` `(b, k)`.

    Args:
        videos: The videos.
        classes: Names of the classes.
        sampling: Which frames of a video make a clip.
        size: Height and width of the clips in pixels.
        seed: Seed of random choices.
        augmentation: Random augmentation of clips.
        balance: Whether classes are drawn equally often, instead of clips.

    Raises:
        ValueError: No video can be used, or none of those with some label.
    """

    def __init__(
        self,
        videos: Sequence[Labeled],
        classes: Sequence[str],
        sampling: Sampling,
        size: int,
        seed: int = 0,
        augmentation: Augmentation | None = None,
        balance: bool = False,
    ) -> None:
        self.classes, self.seed, self.balance = list(classes), seed, balance
        self.labels: dict[Listed, set[str]] = {}
        for video, labels in videos:
            self.labels.setdefault(video, set()).update(labels)
        self.folder = VideoFolder(list(self.labels), sampling, size, size, seed, augmentation)
        self.digest = self.folder.digest
        self._by_class: dict[str, list[int]] = {
            label: [] for labels in self.labels.values() for label in sorted(labels)
        }
        for index, (listed, *_) in enumerate(self.folder.clips):
            for label in self.labels[listed]:
                self._by_class[label].append(index)
        empty = [name for name, clips in self._by_class.items() if not clips]
        if empty:
            raise ValueError(f"no video of {', '.join(empty[:5])} can be used: all are damaged or too short")

    def batch(self, indices: range, num_frames: int, start: float = 0.0) -> dict[str, Any]:
        """Decoded frames, and targets."""
        samples = [self._sample(index) for index in indices]
        frames, real = stack_frames(samples)
        return {"frames": frames, "real": real, "targets": torch.stack([self.target(one.source) for one in samples])}

    def name(self, indices: range, num_frames: int) -> str:
        """Describes the files that the clips are taken from."""
        return ", ".join(f"{one.source.path} at {one.first:.2f} s" for one in map(self._sample, indices))

    def usable(self) -> list[Listed]:
        """The videos that are long enough and not known to be damaged."""
        return list(dict.fromkeys(listed for listed, *_ in self.folder.clips))

    def target(self, video: Listed) -> Tensor:
        """1 for the labels of a video and 0 for others, `(k,)`."""
        return torch.tensor([float(name in self.labels[video]) for name in self.classes])

    def _sample(self, number: int) -> Clip:
        if not self.balance:
            return self.folder.sample(number)
        rng = random.Random(f"balance {self.seed} {number}")
        epoch, clips = number // len(self.folder), self._by_class[rng.choice(sorted(self._by_class))]
        clip = self.folder.clip(rng.choice(clips), epoch)
        return self.folder.sample(number) if clip is None else clip  # the file is damaged
