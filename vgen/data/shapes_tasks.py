"""Labeled clips of ShapesWorld: tasks that need time in different ways, for classifiers."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Literal, NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from vgen.checks import check_choice, check_integer
from vgen.data.captions import COLORS, DIRECTIONS, MOTIONS, SHAPES, SceneDescription, ShapeDescription, plain_motion
from vgen.data.shapes import CLIP_SECONDS, Scene, ShapesWorld, make_scene, render

ShapesTask = Literal["color", "direction", "motion", "first", "speed", "scene"]
"""`color`: of the shape, which needs no time. `direction`: whether a shape moves left or right. `motion`: which of all
motions. `first`: whether a red or a blue shape moved first, one early and one late in the clip; needs a long memory.
`speed`: whether a shape moves slowly or quickly; needs fine steps. `scene`: the labels of `scene_labels`, several for
each clip, of all scenes of `ShapesWorld`."""
SCENE_LABELS = tuple(
    f"{color} {text}" for color in COLORS for text in (*SHAPES, *(plain_motion(motion) for motion in MOTIONS))
)
_CLASSES = {
    "color": COLORS,
    "direction": ("left", "right"),
    "motion": MOTIONS,
    "first": ("red", "blue"),
    "speed": ("slow", "quick"),
    "scene": SCENE_LABELS,
}
_MOVING = 0.25
"""Fraction of a clip of `first` in which each shape moves."""


class LabeledScene(NamedTuple):
    """A scene with its label. The scene of a clip of `first` differs from frame to frame."""

    frames: tuple[Scene, ...]
    """One scene for all frames, or one still scene for each frame."""
    labels: tuple[int, ...]
    """Indices of the classes: one, except in the task `scene`."""

    @property
    def label(self) -> int:
        """Index of the first class."""
        return self.labels[0]


def scene_labels(scene: SceneDescription) -> tuple[str, ...]:
    """What is to be seen in a scene: the shape and the motion of each object, whose color no other object has.

    `a red circle moves right` has the labels `red circle` and `red moves right`. So clips with the same labels show
    objects of the same colors, shapes and motions.
    """
    return tuple(f"{item.color} {text}" for item in scene.objects for text in (item.shape, plain_motion(item.motion)))


class ShapesTasks:
    """An endless list of labeled clips. Each depends only on the seed and its index.

    Classes are equally likely, except in the task `scene`.

    Args:
        task: What the labels say.
        num_frames: Frames per clip, at 8 per second.
        seed: Seed of the scenes, at least 0.

    Raises:
        ValueError: The task is unknown, or a number is out of range.
    """

    def __init__(self, task: ShapesTask, num_frames: int = 17, seed: int = 0) -> None:
        check_choice("task", task, ShapesTask)
        check_integer("num_frames", num_frames, 1)
        check_integer("seed", seed, 0)
        self.task, self.num_frames, self.seed = task, num_frames, seed
        self.classes: tuple[str, ...] = _CLASSES[task]
        self._world = ShapesWorld(split="all", seed=seed)

    @property
    def multi_label(self) -> bool:
        """Whether clips have several labels."""
        return self.task == "scene"

    def scene(self, index: int) -> LabeledScene:
        """Returns a labeled scene by its index, 0 or greater."""
        if self.task == "scene":
            scene = self._world.scene(index)
            return LabeledScene((scene,), tuple(map(self.classes.index, scene_labels(scene))))
        rng = random.Random(f"{self.task} {self.seed} {index}")
        label = rng.randrange(len(self.classes))
        name = self.classes[label]
        background = rng.choice(("black", "gray", "brown", "navy"))
        if self.task == "first":
            return LabeledScene(self._in_turn(name, background, rng), (label,))
        color, shape = rng.choice(COLORS), rng.choice(SHAPES)
        motion, speed = rng.choice(list(DIRECTIONS)), rng.choice(("slow", "normal", "quick"))
        if self.task == "color":
            color = name
        elif self.task == "speed":
            speed = name
        else:
            motion = name
        if (shape, motion) == ("circle", "spin"):
            shape = rng.choice(SHAPES[1:])
        size = rng.choice(("small", "medium", "large"))
        item = ShapeDescription(color=color, shape=shape, motion=motion, size=size, speed=speed)
        return LabeledScene((make_scene([item], background, rng),), (label,))

    def clips(self, scenes: list[LabeledScene], size: int = 64, device: str | torch.device = "cpu") -> Tensor:
        """Renders labeled scenes to clips `(b, 3, f, size, size)` in [-1, 1]."""
        if self.task != "first":
            whole = [scene.frames[0] for scene in scenes]
            return render(whole, num_frames=self.num_frames, height=size, width=size, device=device)
        stills = [frame for scene in scenes for frame in scene.frames]
        frames = render(stills, num_frames=1, height=size, width=size, device=device)
        return rearrange(frames, "(b f) c 1 h w -> b c f h w", b=len(scenes))

    def _in_turn(self, first: str, background: str, rng: random.Random) -> tuple[Scene, ...]:
        """Still scenes of two shapes that move one after the other, with a pause between.

        Paths of ShapesWorld lead away from where there is most room. Half of them are reversed, so that no position
        shows whether a shape has moved already.
        """
        colors = list(_CLASSES["first"])
        rng.shuffle(colors)  # which of them is on top, and where
        items = [
            ShapeDescription(color=color, shape=rng.choice(SHAPES), motion=rng.choice(list(DIRECTIONS)), speed="quick")
            for color in colors
        ]
        scene = make_scene(items, background, rng)
        starts = {color: 0.0 if color == first else 1 - _MOVING for color in colors}
        is_reversed = {color: rng.random() < 0.5 for color in colors}
        last = max(1, self.num_frames - 1)
        frames = []
        for frame in range(self.num_frames):
            objects = []
            for item in scene.objects:
                share = min(1.0, max(0.0, (frame / last - starts[item.color]) / _MOVING))
                share = 1 - share if is_reversed[item.color] else share
                (x, y), (right, down), time = item.position, item.velocity, CLIP_SECONDS * share
                moved = (x + time * right, y + time * down)  # frames are square
                objects.append(replace(item, position=moved, velocity=(0.0, 0.0)))
            frames.append(replace(scene, objects=tuple(objects)))
        return tuple(frames)
