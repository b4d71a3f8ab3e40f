"""ShapesWorld: an endless set of captioned clips of moving shapes, rendered in batches on any device.

Lengths are in units of the frame's shorter side, positions are fractions of its width and height, times are in
seconds, and y points down. Axes: `b` scenes, `f` frames, `h w` pixels.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor

from vgen.checks import check_choice, check_integer
from vgen.data.captions import (
    COLORS,
    DIRECTIONS,
    MOTIONS,
    SHAPES,
    SceneDescription,
    ShapeDescription,
    caption,
    parse_caption,
    vocabulary,
)

__all__ = [
    "BACKGROUND_COLORS",
    "OBJECT_COLORS",
    "OUTLINES",
    "Outline",
    "Scene",
    "ShapeDescription",
    "ShapeObject",
    "ShapesWorld",
    "Split",
    "caption",
    "combinations",
    "is_held_out",
    "make_scene",
    "outline_coverage",
    "parse_caption",
    "render",
    "vocabulary",
]

Split = Literal["train", "held_out", "all"]

OBJECT_COLORS = {
    "red": (0.90, 0.10, 0.12),
    "green": (0.10, 0.72, 0.22),
    "blue": (0.16, 0.34, 1.00),
    "yellow": (1.00, 0.90, 0.10),
    "purple": (0.66, 0.18, 0.86),
    "orange": (1.00, 0.50, 0.05),
    "cyan": (0.12, 0.86, 0.92),
    "white": (1.00, 1.00, 1.00),
}
BACKGROUND_COLORS = {
    "black": (0.0, 0.0, 0.0),
    "gray": (0.38, 0.38, 0.38),
    "brown": (0.32, 0.20, 0.09),
    "navy": (0.04, 0.06, 0.28),
}

# The default clip has 17 frames at 8 per second. All motions fit into it, and no shape leaves the frame during it.
CLIP_SECONDS = 2.0
INTERVALS_PER_SECOND = 8.0

PIXEL = 1 / 64
RADIUS = {"small": 6.4 * PIXEL, "medium": 7.7 * PIXEL, "large": 9.0 * PIXEL}
DISPLACEMENT = {"slow": 3.0 * PIXEL, "normal": 4.1 * PIXEL, "quick": 5.2 * PIXEL}
SPIN = {"slow": math.radians(40), "normal": math.radians(80), "quick": math.radians(128)}
GROWTH = {"slow": 1.3, "normal": 1.45, "quick": 1.58}
SHRINKAGE = {"slow": 0.72, "normal": 0.6, "quick": 0.5}
RADIUS_JITTER = 0.03
SPEED_JITTER = 0.05
TILT = math.radians(12)
MARGIN = 1 * PIXEL
SOLO_SCALE = 1.4


@dataclass(frozen=True, kw_only=True)
class ShapeObject(ShapeDescription):
    """A described shape with its position and velocity."""

    position: tuple[float, float]
    """Center at time 0, as fractions of the frame's width and height."""
    radius: float
    """Radius at time 0 of the circle around a triangle or star, in shorter sides. Other shapes are smaller."""
    angle: float
    """Clockwise tilt from upright at time 0, in radians."""
    velocity: tuple[float, float] = (0.0, 0.0)
    """Velocity (right, down) in shorter sides per second; of a bouncing shape in widths and heights per second."""
    spin: float = 0.0
    """Clockwise rotation in radians per second."""
    final_scale: float = 1.0
    """Size at the end of the default clip and afterwards, relative to the size at time 0."""


@dataclass(frozen=True, kw_only=True)
class Scene(SceneDescription):
    """One or two shapes on a background. The first one is on top."""

    objects: tuple[ShapeObject, ...]


def is_held_out(color: str, shape: str, motion: str) -> bool:
    """Whether a combination belongs to the fixed tenth that is never used for training.

    The three indices form a Latin square modulo 10, so that every pair of attributes still occurs in training.
    """
    return (COLORS.index(color) + 3 * SHAPES.index(shape) + 7 * MOTIONS.index(motion)) % 10 == 4


def combinations(split: Split) -> list[tuple[str, str, str]]:
    """Lists the (color, shape, motion) combinations of a split.

    Raises:
        ValueError: The split is unknown.
    """
    check_choice("split", split, Split)
    possible = [(c, s, m) for c in COLORS for s in SHAPES for m in MOTIONS if (s, m) != ("circle", "spin")]
    return [item for item in possible if split == "all" or is_held_out(*item) == (split == "held_out")]


class ShapesWorld:
    """An endless list of captioned scenes. Each scene depends only on the seed and its index."""

    def __init__(self, *, split: Split = "train", num_objects: Sequence[int] = (1, 2), seed: int = 0):
        """Defines the list of scenes.

        Args:
            split: Which combinations of color, shape and motion occur.
            num_objects: Possible numbers of objects in a scene, drawn uniformly.
            seed: Seed of the scenes, at least 0.

        Raises:
            ValueError: An argument has none of the allowed values.
        """
        if not num_objects or not set(num_objects) <= {1, 2}:
            raise ValueError(f"num_objects must contain only 1 and 2, got {num_objects}")
        check_integer("seed", seed)
        self.split = split
        self.num_objects = tuple(num_objects)
        self.seed = seed
        self._combinations = combinations(split)

    def scene(self, index: int) -> Scene:
        """Returns a scene by its index, 0 or greater."""
        rng = _rng(self.seed, index)
        count = rng.choice(self.num_objects)
        objects: list[ShapeDescription] = []
        while len(objects) < count:
            color, shape, motion = rng.choice(self._combinations)
            size = rng.choice(("small", "medium", "medium", "large"))
            speed = rng.choice(("slow", "normal", "normal", "quick"))
            if all(color != other.color for other in objects):
                objects.append(ShapeDescription(color=color, shape=shape, motion=motion, size=size, speed=speed))
        background = rng.choice(("black", "black", "black", "gray", "brown", "navy"))
        return make_scene(objects, background, rng)

    def caption(self, index: int, variant: int = 0) -> str:
        """Returns a caption of the scene with this index. Every variant, 0 or greater, is worded differently."""
        return caption(self.scene(index), _rng(self.seed, index, variant))


def _rng(*key: int) -> random.Random:
    if min(key) < 0:
        raise ValueError(f"seed, index and variant must not be negative, got {key}")
    number = len(key)
    for part in key:
        number = (number << 64) + part
    return random.Random(number)


def make_scene(objects: Sequence[ShapeDescription], background: str, rng: random.Random) -> Scene:
    """Samples the geometry of a scene with given attributes.

    The content of the first frame is sampled before the motions and independently of them.

    Args:
        objects: One or two descriptions, of different colors. The first one is on top.
        background: One of `BACKGROUND_COLORS`.
        rng: Random generator.
    """
    split_axis = rng.randrange(2)
    halves = [(0.0, 0.5), (0.5, 1.0)]
    rng.shuffle(halves)
    solo = len(objects) == 1
    starts = []
    for number, item in enumerate(objects):
        room = [(0.0, 1.0), (0.0, 1.0)]
        if not solo:
            room[split_axis] = halves[number]
        starts.append(_sample_start(item.size, item.speed, SOLO_SCALE if solo else 1.0, room, rng))
    axes = ((0,), (1,), (0, 1)) if solo else ((1 - split_axis,),)
    placed = tuple(_set_in_motion(item, start, axes, rng) for item, start in zip(objects, starts, strict=True))
    return Scene(objects=placed, background=background)


@dataclass(frozen=True, kw_only=True)
class _Start:
    position: tuple[float, float]
    radius: float
    angle: float
    displacement: float


def _sample_start(
    size: str, speed: str, scale: float, room: Sequence[tuple[float, float]], rng: random.Random
) -> _Start:
    """Samples a start from which every motion stays in `room` (low and high per axis) during the default clip."""
    radius = scale * RADIUS[size] * (1 + rng.uniform(-RADIUS_JITTER, RADIUS_JITTER))
    displacement = scale * DISPLACEMENT[speed] * (1 + rng.uniform(-SPEED_JITTER, SPEED_JITTER))
    reach = MARGIN + max(radius + displacement, radius * GROWTH[speed])
    x, y = (rng.uniform(low + reach, high - reach) for low, high in room)
    return _Start(position=(x, y), radius=radius, angle=rng.uniform(-TILT, TILT), displacement=displacement)


def _set_in_motion(
    item: ShapeDescription, start: _Start, bounce_axes: Sequence[tuple[int, ...]], rng: random.Random
) -> ShapeObject:
    velocity, spin, final_scale = (0.0, 0.0), 0.0, 1.0
    if item.motion in DIRECTIONS:
        rate = start.displacement / CLIP_SECONDS
        velocity = (DIRECTIONS[item.motion][0] * rate, DIRECTIONS[item.motion][1] * rate)
    elif item.motion == "bounce":
        velocity = _bounce_velocity(item.shape, start, rng.choice(bounce_axes), rng)
    elif item.motion == "spin":
        spin = rng.choice((-1, 1)) * SPIN[item.speed] * (1 + rng.uniform(-SPEED_JITTER, SPEED_JITTER))
    elif item.motion in ("grow", "shrink"):
        final_scale = (GROWTH if item.motion == "grow" else SHRINKAGE)[item.speed]
    return ShapeObject(
        **{name: getattr(item, name) for name in ShapeDescription.__dataclass_fields__},
        position=start.position,
        radius=start.radius,
        angle=start.angle,
        velocity=velocity,
        spin=spin,
        final_scale=final_scale,
    )


def _bounce_velocity(shape: str, start: _Start, axes: tuple[int, ...], rng: random.Random) -> tuple[float, float]:
    """Velocity toward the nearer wall of each axis that reaches the first wall after 5 to 10 frame intervals."""
    left, right, top, bottom = _extents(shape, start.radius, start.angle)
    signs, distances = [0, 0], []
    for axis, low, high in ((0, left, right), (1, top, bottom)):
        if axis in axes:
            position = start.position[axis]
            signs[axis] = 1 if position > 0.5 else -1
            distances.append(1 - position - high if position > 0.5 else position - low)
    intervals = 5 + 10 * min(distances) * rng.uniform(0.7, 1.1)
    rate = min(distances) * INTERVALS_PER_SECOND / intervals
    return signs[0] * rate, signs[1] * rate


def _extents(shape: str, radius: float, angle: float) -> tuple[float, float, float, float]:
    """Distances from the center of a shape to its left, right, top and bottom ends."""
    outline = OUTLINES[shape]
    radius = radius * outline.radius
    if outline.corners == 1:
        return radius, radius, radius, radius
    directions = [angle + outline.upright + 2 * math.pi * k / outline.corners for k in range(outline.corners)]
    x = [radius * math.cos(direction) for direction in directions]
    y = [radius * math.sin(direction) for direction in directions]
    return -min(x), max(x), -min(y), max(y)


@dataclass(frozen=True, kw_only=True)
class Outline:
    """A shape of equal sectors. Straight edges connect the corner of each sector to the notches on both sides."""

    radius: float
    """Distance of the corners from the center."""
    corners: int
    """Number of corners; 1 for a circle."""
    notch: float
    """Distance of the notches between corners from the center, relative to that of the corners."""
    upright: float
    """Direction of the first corner of an upright shape, in radians."""

    @property
    def normal(self) -> float:
        """Direction of an edge's outer normal relative to the direction of its corner, in radians."""
        half = math.pi / self.corners
        return math.atan2(1 - self.notch * math.cos(half), self.notch * math.sin(half))

    @property
    def numbers(self) -> tuple[float, float, float, float]:
        """The arguments outer, edge, sector and normal of `outline_coverage`."""
        edge = self.radius * math.cos(self.normal) if self.corners > 1 else NO_EDGE
        return self.radius, edge, 2 * math.pi / self.corners, self.normal

    @property
    def area(self) -> float:
        """Area of a shape of radius 1."""
        if self.corners == 1:
            return math.pi * self.radius**2
        return self.corners * self.notch * math.sin(math.pi / self.corners) * self.radius**2


# A circle is a shape whose edges are outside the circle around it.
NO_EDGE = 2.0
# The radii make the areas similar.
OUTLINES = {
    "circle": Outline(radius=0.8, corners=1, notch=1.0, upright=0.0),
    "square": Outline(radius=0.93, corners=4, notch=math.cos(math.pi / 4), upright=math.pi / 4),
    "triangle": Outline(radius=1.0, corners=3, notch=math.cos(math.pi / 3), upright=-math.pi / 2),
    "star": Outline(radius=1.0, corners=5, notch=0.5, upright=-math.pi / 2),
}


@torch.no_grad()
def render(
    scenes: Sequence[Scene],
    *,
    num_frames: int = 17,
    height: int = 64,
    width: int = 64,
    frame_rate: float | Tensor = 8.0,
    start: float = 0.0,
    device: str | torch.device = "cpu",
) -> Tensor:
    """Renders a batch of scenes with anti-aliasing.

    Args:
        scenes: Scenes to render.
        num_frames: Frames per clip.
        height: Height in pixels.
        width: Width in pixels.
        frame_rate: Frames per second, one number or `(b,)`.
        start: Time of the first frame in seconds.
        device: Device to render on.

    Returns:
        Clips `(b, 3, f, h, w)` in [-1, 1].

    Raises:
        ValueError: A size is not a positive integer, or the frame rate is not positive.
    """
    for name, size in (("num_frames", num_frames), ("height", height), ("width", width)):
        check_integer(name, size, 1)
    rate = torch.as_tensor(frame_rate, dtype=torch.float64, device="cpu").expand(len(scenes))
    if not (rate > 0).all():
        raise ValueError(f"frame_rate must be positive, got {frame_rate}")
    times = start + torch.arange(num_frames, dtype=torch.float64) / rate[:, None]
    backgrounds = torch.tensor([BACKGROUND_COLORS[scene.background] for scene in scenes], device=device)
    clip = rearrange(backgrounds, "b c -> b c 1 1 1")
    for number in reversed(range(max(len(scene.objects) for scene in scenes))):
        objects = [scene.objects[number] if number < len(scene.objects) else None for scene in scenes]
        colors = [OBJECT_COLORS[item.color] if item else (0.0, 0.0, 0.0) for item in objects]
        color = rearrange(torch.tensor(colors, device=device), "b c -> b c 1 1 1")
        coverage = _coverage(objects, times, height, width, device)
        clip = torch.lerp(clip, color, rearrange(coverage, "b f h w -> b 1 f h w"))
    return clip.mul_(2).sub_(1)


def _coverage(
    objects: Sequence[ShapeObject | None], times: Tensor, height: int, width: int, device: str | torch.device
) -> Tensor:
    """Fraction of each pixel that an object covers, `(b, f, h, w)`; `None` covers nothing."""
    center, direction, radius, wraps = _trajectory(objects, times, height, width)
    table = torch.tensor([OUTLINES[item.shape if item else "circle"].numbers for item in objects], dtype=torch.float64)
    outer, edge, sector, normal = table.T[..., None]
    per_frame = torch.stack([*center, direction, radius * outer, radius * edge])
    center_x, center_y, direction, outer, edge = rearrange(per_frame.float(), "p b f -> p b f 1 1").to(device)
    per_object = torch.stack([sector, normal, wraps])
    sector, normal, wraps = rearrange(per_object.float(), "p b 1 -> p b 1 1 1").to(device)

    x = torch.arange(width, device=device) + 0.5 - center_x
    y = rearrange(torch.arange(height, device=device), "h -> h 1") + 0.5 - center_y
    x = x - wraps * width * torch.round(x / width)
    y = y - wraps * height * torch.round(y / height)
    return outline_coverage(x, y, direction, outer=outer, edge=edge, sector=sector, normal=normal)


def outline_coverage(
    x: Tensor, y: Tensor, direction: Tensor, *, outer: Tensor, edge: Tensor, sector: Tensor, normal: Tensor
) -> Tensor:
    """Computes the fraction of a pixel that an outline covers, from the signed distance of the pixel's center.

    All arguments broadcast. The last four are `Outline.numbers`, with lengths multiplied by the shape's radius.

    Args:
        x: Horizontal offset of the pixel's center from the shape's center, in pixels.
        y: Vertical offset, downwards, in pixels.
        direction: Direction of the shape's first corner, in radians.
        outer: Radius of the circle around the outline, in pixels.
        edge: Distance of the edges' lines from the center, in pixels.
        sector: Angle between adjacent corners, in radians.
        normal: Direction of an edge's outer normal relative to the direction of its corner, in radians.
    """
    distance = torch.sqrt(x.square() + y.square())
    angle = torch.atan2(y, x).sub(direction)
    angle = angle.sub(torch.round(angle / sector).mul_(sector)).abs_()
    to_edge = angle.sub_(normal).cos_().mul_(distance).sub_(edge)
    return torch.maximum(to_edge, distance.sub(outer)).neg_().add_(0.5).clamp_(0, 1)


def _trajectory(
    objects: Sequence[ShapeObject | None], times: Tensor, height: int, width: int
) -> tuple[tuple[Tensor, Tensor], Tensor, Tensor, Tensor]:
    """Centers, corner directions and radii `(b, f)` in pixels and radians, and a flag `(b, 1)` for wrapping around."""
    side = min(height, width)
    rows = [_numbers(item) if item else (0.5, 0.5, 0.0, 0.0, -1.0, 0.0, 0.0, 1.0, 1.0) for item in objects]
    px, py, vx, vy, radius, angle, spin, final_scale, wraps = torch.tensor(rows, dtype=torch.float64).T[..., None]
    progress = torch.sin(times.clamp(0, CLIP_SECONDS) * (math.pi / 2 / CLIP_SECONDS))
    size = radius * side * final_scale**progress
    direction = angle + spin * times

    extents = [_extents(item.shape, item.radius, item.angle) if item else (0.0,) * 4 for item in objects]
    left, right, top, bottom = torch.tensor(extents, dtype=torch.float64).T[..., None] * side
    center_x = torch.where(wraps > 0, px * width + vx * side * times, _reflect(px, vx, times, left, right, width))
    center_y = torch.where(wraps > 0, py * height + vy * side * times, _reflect(py, vy, times, top, bottom, height))
    return (center_x, center_y), direction, size, wraps


def _numbers(item: ShapeObject) -> tuple[float, ...]:
    wraps = float(item.motion != "bounce")
    direction = item.angle + OUTLINES[item.shape].upright
    return (*item.position, *item.velocity, item.radius, direction, item.spin, item.final_scale, wraps)


def _reflect(position: Tensor, velocity: Tensor, times: Tensor, low: Tensor, high: Tensor, length: int) -> Tensor:
    """Position between walls at 0 and `length` of a shape with extents `low` and `high` around its center."""
    span = (length - low - high).clamp(min=1e-6)
    traveled = torch.remainder(position * length - low + velocity * length * times, 2 * span)
    return low + span - (traveled - span).abs()
