"""Does a video show what its caption says? Reads videos of ShapesWorld from their pixels, without any network.

A pixel is a mixture of the background and an object's colour; how much of the colour it holds, its coverage, is
measured along the line between the two in RGB, where the palette is spread evenly. Positions live on the torus, for
shapes that leave on one side enter on the other. Lengths in constants are in units of the frame's shorter side.

Axes: `f` frames, `k` colours, `p` pixels, `s` the shapes in the order of `SHAPES`, `h w` the pixels of a frame or of a
window around an object.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor

from vgen.data.captions import (
    BACKGROUNDS,
    COLORS,
    DIRECTIONS,
    SHAPES,
    SceneDescription,
    ShapeDescription,
    parse_caption,
)
from vgen.data.shapes import BACKGROUND_COLORS, OBJECT_COLORS, OUTLINES, outline_coverage

PIXEL = 1 / 64

MIN_CONTRAST = 0.15
"""Distance from the background, in RGB of range 1, below which a pixel is background."""
MAX_COLOR_ERROR = 0.25
"""Distance from the mixtures of background and a palette colour beyond which a pixel has no colour of the palette."""
MAX_COLOR_ERROR_BESIDE_CORE = 0.4
"""The same where the colour is known to be present."""
CORE_COVERAGE = 0.45
MIN_COVERAGE = 0.2
MAX_COVERED = 0.5
"""More of the frames that is not background is noise rather than objects."""
MIN_AREA = 4 * PIXEL**2
"""Less of a colour, averaged over the frames, is no object."""
MIN_AREA_IN_FRAME = 2 * PIXEL**2

MIN_CLEAR_FRAMES = 4
NUM_BLURS = 2
"""How often the drawn shapes are blurred by 3 x 3 pixels, to resemble what an autoencoder made soft."""
MIN_SHAPE_SCORE = 0.72
MIN_SHAPE_AGREEMENT = 0.75
MIN_DISPLACEMENT = 1.5 * PIXEL
MAX_WOBBLE = 1.2 * PIXEL
MIN_REVERSAL = 1.5 * PIXEL
MAX_WALL_DISTANCE = 4 * PIXEL
MIN_LOG_GROWTH = 0.15
MIN_TURN = math.radians(30)
MIN_COHERENCE = 0.75


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What the pixels say about one object."""

    color: str | None
    """The nearest of the palette; `None` where something else stands out from the background."""
    shape: str | None
    """`None` if no shape fits in most frames, or if the object is missing in one."""
    motion: str | None
    """`None` if the object is missing in a frame, moves in more than one way or in none of the known ones."""
    presence: float
    """Fraction of the frames that show the object or hide it behind another one."""
    shape_score: float = 0.0
    """Intersection over union with the drawn shape, averaged over the frames."""
    displacement: tuple[float, float] = (0.0, 0.0)
    """From first to last frame along a fitted line, to the right and downwards, in shorter sides."""
    wobble: float = 0.0
    """Largest distance from that line's uniform motion, in shorter sides."""
    reversal: float = 0.0
    """Longest way along an axis that was also gone back, in shorter sides."""
    growth: float = 1.0
    """Size in the last frames over size in the first."""
    turn: float = 0.0
    """Clockwise rotation from first to last frame in radians; not a number where it is erratic."""


@dataclass(frozen=True, kw_only=True)
class ObjectVerdict:
    """Which attributes of one described object the video shows."""

    color_right: bool
    shape_right: bool
    motion_right: bool

    @property
    def right(self) -> bool:
        """Whether all three are."""
        return self.color_right and self.shape_right and self.motion_right


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Whether a video shows what a caption says."""

    objects: tuple[ObjectVerdict, ...]
    """In the order of the caption."""
    number_right: bool
    background_right: bool

    @property
    def right(self) -> bool:
        """Whether all objects are right and there is no other; the background has its own field."""
        return self.number_right and all(one.right for one in self.objects)


def check(video: np.ndarray | Tensor, expected: SceneDescription | str) -> Verdict:
    """Compares a video with a scene or caption.

    Args:
        video: As `read_video` takes it.
        expected: What it should show.

    Raises:
        ValueError: If the caption cannot be read or the array is no video.
    """
    scene = parse_caption(expected) if isinstance(expected, str) else expected
    frames = _to_frames(video)
    readings = _read_objects(frames)
    pairs = _match(scene.objects, readings)
    return Verdict(
        objects=tuple(_judge(one, reading) for one, reading in pairs),
        number_right=len(readings) == len(scene.objects),
        background_right=_nearest_background(_background(frames)) == scene.background,
    )


def adherence(videos: Sequence[np.ndarray | Tensor], expected: Sequence[SceneDescription | str]) -> dict[str, float]:
    """Fractions of what is right: of all videos, and of all objects for `color`, `shape` and `motion`."""
    if len(videos) != len(expected) or not len(videos):
        raise ValueError(f"{len(videos)} videos cannot be compared with {len(expected)} captions")
    verdicts = [check(video, one) for video, one in zip(videos, expected, strict=True)]
    objects = [one for verdict in verdicts for one in verdict.objects]
    return {
        "right": _fraction([verdict.right for verdict in verdicts]),
        "number": _fraction([verdict.number_right for verdict in verdicts]),
        "background": _fraction([verdict.background_right for verdict in verdicts]),
        "color": _fraction([one.color_right for one in objects]),
        "shape": _fraction([one.shape_right for one in objects]),
        "motion": _fraction([one.motion_right for one in objects]),
    }


def read_video(video: np.ndarray | Tensor) -> list[Reading]:
    """Finds the objects of a video and reads their attributes.

    Args:
        video: uint8 `(f, h, w, c)`, or a float tensor `(3, f, h, w)` in [-1, 1].

    Returns:
        One reading per colour that stands out from the background, the largest object first.
    """
    return _read_objects(_to_frames(video))


def _fraction(values: Sequence[bool]) -> float:
    return sum(values) / len(values)


def _match(
    described: Sequence[ShapeDescription], readings: Sequence[Reading]
) -> list[tuple[ShapeDescription, Reading | None]]:
    """Gives each description the reading of its colour, or else one that no other description claims."""
    by_color = {reading.color: reading for reading in readings if reading.color}
    claimed = {one.color for one in described}
    left = [reading for reading in readings if reading.color not in claimed]
    return [(one, by_color.get(one.color) or (left.pop(0) if left else None)) for one in described]


def _judge(one: ShapeDescription, reading: Reading | None) -> ObjectVerdict:
    if reading is None:
        return ObjectVerdict(color_right=False, shape_right=False, motion_right=False)
    return ObjectVerdict(
        color_right=reading.color == one.color and reading.presence == 1,
        shape_right=reading.shape == one.shape,
        motion_right=reading.motion == one.motion,
    )


def _to_frames(video: np.ndarray | Tensor) -> Tensor:
    """Any accepted video as float `(f, 3, h, w)` in [0, 1]."""
    if isinstance(video, Tensor) and video.is_floating_point() and video.ndim == 4 and video.shape[0] == 3:
        frames = (rearrange(video.detach().float().cpu(), "c f h w -> f c h w") + 1) / 2
    else:
        array = torch.as_tensor(video).cpu()
        if array.dtype != torch.uint8 or array.ndim != 4 or array.shape[-1] != 3:
            raise ValueError(
                "a video is uint8 (f, h, w, 3) or a float tensor (3, f, h, w) in [-1, 1], "
                f"got {array.dtype} {tuple(array.shape)}"
            )
        frames = rearrange(array, "f h w c -> f c h w").float() / 255
    if not frames.numel():
        raise ValueError(f"the video is empty: {tuple(frames.shape)} (f, 3, h, w)")
    return frames.nan_to_num(0.5).clamp(0, 1)


def _background(frames: Tensor) -> Tensor:
    """Colour of the background, `(3,)`: the median, for objects never cover half of a frame."""
    return rearrange(frames, "f c h w -> c (f h w)").median(dim=-1).values


def _nearest_background(background: Tensor) -> str:
    palette = torch.tensor([BACKGROUND_COLORS[name] for name in BACKGROUNDS])
    return BACKGROUNDS[int((palette - background).norm(dim=-1).argmin())]


@dataclass(frozen=True)
class _Layer:
    """One colour of a video: how much of each pixel it covers."""

    color: str | None
    coverage: Tensor  # (f, h, w)


def _read_objects(frames: Tensor) -> list[Reading]:
    layers = sorted(_find_layers(frames), key=lambda layer: -float(layer.coverage.sum()))
    near = [F.max_pool2d((layer.coverage > CORE_COVERAGE).float(), 3, 1, 1) > 0 for layer in layers]
    readings = []
    for number, layer in enumerate(layers):
        touched = torch.zeros(len(frames), dtype=torch.bool)
        for other in near[:number] + near[number + 1 :]:
            touched |= (other & near[number]).any(dim=(1, 2))
        readings.append(_read_layer(layer, touched))
    return readings


def _find_layers(frames: Tensor) -> list[_Layer]:
    """Separates the frames into one layer per colour; what has no colour of the palette is a layer of its own."""
    size = (len(frames), *frames.shape[2:])
    background = _background(frames)
    offset = rearrange(frames - rearrange(background, "c -> c 1 1"), "f c h w -> c (f h w)")
    place = (reduce(offset.square(), "c p -> p", "sum") > MIN_CONTRAST**2).nonzero()[:, 0]
    if len(place) > MAX_COVERED * math.prod(size):
        return [_Layer(None, _paint(torch.ones(1, len(place)), place, size)[0])]
    amount, error = _unmix(offset[:, place], torch.tensor([OBJECT_COLORS[color] for color in COLORS]) - background)
    min_pixels = MIN_AREA * min(size[1:]) ** 2 * size[0]
    present = _cores(amount, error, MAX_COLOR_ERROR).sum(dim=1) >= min_pixels

    # Edges and blurred spots are ambiguous alone: they belong to a colour that is present and next to them.
    amount, error = amount[present], error[present]
    cores = _paint(_cores(amount, error, MAX_COLOR_ERROR_BESIDE_CORE), place, size)
    around = F.max_pool2d(F.pad(cores, (2, 2, 2, 2), mode="circular"), 5, 1).flatten(1)[:, place] > 0
    own = _lowest(error.masked_fill(~around, math.inf)) & around & (error < MAX_COLOR_ERROR_BESIDE_CORE)
    coverage = _paint(amount * (own & (amount > MIN_COVERAGE)), place, size)
    colors = [color for color, there in zip(COLORS, present.tolist(), strict=True) if there]
    layers = [_Layer(color, one) for color, one in zip(colors, coverage, strict=True)]

    rest = ~own.any(dim=0)
    if int(rest.sum()) >= min_pixels:
        layers.append(_Layer(None, _paint(rest[None], place, size)[0]))
    return layers


def _paint(values: Tensor, place: Tensor, size: tuple[int, int, int]) -> Tensor:
    """Puts `values` `(k, p)` at the pixels `place` of empty frames, `(k, f, h, w)`."""
    canvas = torch.zeros(len(values), math.prod(size))
    canvas[:, place] = values.float()
    return canvas.unflatten(1, size)


def _unmix(offset: Tensor, colors: Tensor) -> tuple[Tensor, Tensor]:
    """How much of each colour a pixel holds, at most 1, and how far it is from that mixture, both `(k, p)`.

    Args:
        offset: Pixels minus background, `(3, p)`.
        colors: Colours minus background, `(k, 3)`.
    """
    product = colors @ offset
    square = colors.square().sum(dim=1, keepdim=True)
    amount = (product / square).clamp_(0, 1)
    error = (amount * square).sub_(product, alpha=2).mul_(amount).add_(offset.square().sum(dim=0))
    return amount, error.clamp_(min=0).sqrt_()


def _cores(amount: Tensor, error: Tensor, max_error: float) -> Tensor:
    """Where a pixel is clearly of one colour, `(k, p)`."""
    return _lowest(error) & (amount > CORE_COVERAGE) & (error < max_error)


def _lowest(error: Tensor) -> Tensor:
    return error == error.amin(dim=0) if len(error) else torch.zeros_like(error, dtype=torch.bool)


def _read_layer(layer: _Layer, touched: Tensor) -> Reading:
    """Reads one object; frames in which it touches another one serve only to follow it."""
    num_frames, height, width = layer.coverage.shape
    side = min(height, width)
    area = reduce(layer.coverage, "f h w -> f", "sum")
    seen = area >= MIN_AREA_IN_FRAME * side**2
    presence = float((seen | _hidden(seen, touched)).float().mean())
    if presence < 1 or layer.color is None:
        return Reading(color=layer.color, shape=None, motion=None, presence=presence)

    frame = seen.nonzero()[:, 0]
    windows = _cut_windows(layer.coverage[frame])
    clear = ~touched[frame]
    if clear.sum() < MIN_CLEAR_FRAMES:
        clear = torch.ones_like(clear)
    moments = _angular_moments(windows)
    shape, score = _read_shape(windows, moments, area[frame], clear)
    track = _track(windows.center, (height, width))[clear] / side
    frame = frame[clear]
    displacement, wobble = _fit_line(frame, track, num_frames)
    reversal, hits_wall = _find_reversal(track, windows, clear, (height, width))
    growth = _growth(area[seen][clear])
    turn = _turn(frame, area[frame, None] * moments[clear], shape, num_frames)
    motion = _name_motion(displacement, wobble, reversal, hits_wall, growth, turn)
    return Reading(
        color=layer.color,
        shape=shape,
        motion=motion,
        presence=presence,
        shape_score=score,
        displacement=displacement,
        wobble=wobble,
        reversal=reversal,
        growth=growth,
        turn=turn,
    )


def _hidden(seen: Tensor, touched: Tensor) -> Tensor:
    """Frames without the object between frames where another one touches it: there it is behind that one."""
    hidden = ~seen
    shown = seen.nonzero()[:, 0].tolist()
    for frame in hidden.nonzero()[:, 0].tolist():
        before = [one for one in shown if one < frame][-1:]
        after = [one for one in shown if one > frame][:1]
        hidden[frame] = bool(before or after) and all(touched[one] for one in before + after)
    return hidden


@dataclass(frozen=True)
class _Windows:
    """Square cut-outs around an object, one per frame."""

    coverage: Tensor  # (f, h, w)
    center: Tensor  # (f, 2), x and y of the object in the frame, in pixels
    x: Tensor  # (f, 1, w), pixels from the object's centre
    y: Tensor  # (f, h, 1)


def _cut_windows(coverage: Tensor) -> _Windows:
    height, width = coverage.shape[1:]
    most = float(reduce(coverage, "f h w -> f", "sum").max())
    radius = math.sqrt(most / min(outline.area for outline in OUTLINES.values()))
    half = min(math.ceil(1.1 * radius) + 4, min(height, width) // 2)
    reach = torch.arange(-half, half)
    column = _circular_mean(reduce(coverage, "f h w -> f w", "sum")).round().long()[:, None] + reach
    row = _circular_mean(reduce(coverage, "f h w -> f h", "sum")).round().long()[:, None] + reach
    frame = torch.arange(len(coverage)).view(-1, 1, 1)
    cut = coverage[frame, row[:, :, None] % height, column[:, None, :] % width]
    total = reduce(cut, "f h w -> f", "sum").clamp(min=1e-6)
    center_x = torch.einsum("fhw,fw->f", cut, column + 0.5) / total
    center_y = torch.einsum("fhw,fh->f", cut, row + 0.5) / total
    x = rearrange(column + 0.5 - center_x[:, None], "f w -> f 1 w")
    y = rearrange(row + 0.5 - center_y[:, None], "f h -> f h 1")
    return _Windows(cut, torch.stack([center_x, center_y], dim=1), x, y)


def _circular_mean(weight: Tensor) -> Tensor:
    """Index of the mean on a circle, `(f,)`, of weights `(f, n)`."""
    length = weight.shape[1]
    angle = torch.arange(length) * (2 * math.pi / length)
    mean = torch.atan2((weight * angle.sin()).sum(dim=1), (weight * angle.cos()).sum(dim=1))
    return mean * (length / (2 * math.pi))


def _angular_moments(windows: _Windows) -> Tensor:
    """Complex `(f, s)`: strength and direction of the n-fold symmetry of each shape, at most 1 in magnitude."""
    z = torch.complex(windows.x.expand_as(windows.coverage), windows.y.expand_as(windows.coverage))
    power, moments = windows.coverage, {}
    for corners in range(1, 1 + max(outline.corners for outline in OUTLINES.values())):
        power = power * z
        moments[corners] = power.sum(dim=(1, 2)) / power.abs().sum(dim=(1, 2)).clamp(min=1e-6)
    return torch.stack([moments[OUTLINES[shape].corners] for shape in SHAPES], dim=1)


def _read_shape(windows: _Windows, moments: Tensor, area: Tensor, clear: Tensor) -> tuple[str | None, float]:
    """Compares every frame with each shape drawn at the measured place, size and angle."""
    corners = torch.tensor([OUTLINES[shape].corners for shape in SHAPES])
    radius = (area[:, None] / torch.tensor([OUTLINES[shape].area for shape in SHAPES])).sqrt()
    outer, edge, sector, normal = torch.tensor([OUTLINES[shape].numbers for shape in SHAPES]).T
    drawn = outline_coverage(
        rearrange(windows.x, "f 1 w -> f 1 1 w"),
        rearrange(windows.y, "f h 1 -> f 1 h 1"),
        rearrange(moments.angle() / corners, "f s -> f s 1 1"),
        outer=rearrange(radius * outer, "f s -> f s 1 1"),
        edge=rearrange(radius * edge, "f s -> f s 1 1"),
        sector=rearrange(sector, "s -> s 1 1"),
        normal=rearrange(normal, "s -> s 1 1"),
    )
    scores = torch.zeros_like(radius)
    for _ in range(1 + NUM_BLURS):
        scores = torch.maximum(scores, _overlap(windows.coverage, drawn, area))
        drawn = F.avg_pool2d(drawn, 3, stride=1, padding=1)

    # A shape that shrinks is hard to tell in the end.
    weight = area.square() * clear / (area.square() * clear).sum()
    mean = (scores * weight[:, None]).sum(dim=0)
    best = int(mean.argmax())
    steady = F.avg_pool1d(scores.T, 5, stride=1, padding=2, count_include_pad=False)
    agreement = float(weight[steady.argmax(dim=0) == best].sum())
    fits = float(weight[scores[:, best] > MIN_SHAPE_SCORE].sum())
    legible = agreement > MIN_SHAPE_AGREEMENT and fits > MIN_SHAPE_AGREEMENT
    return SHAPES[best] if legible else None, float(mean[best])


def _overlap(coverage: Tensor, drawn: Tensor, area: Tensor) -> Tensor:
    """Intersection over union `(f, s)` of an object `(f, h, w)` with drawn shapes `(f, s, h, w)`."""
    drawn = drawn * (drawn > MIN_COVERAGE)
    common = torch.minimum(drawn, rearrange(coverage, "f h w -> f 1 h w")).sum(dim=(2, 3))
    return common / (area[:, None] + drawn.sum(dim=(2, 3)) - common)


def _track(center: Tensor, size: tuple[int, int]) -> Tensor:
    """Centres `(f, 2)` without the jumps from one side of the frame to the other."""
    length = torch.tensor([size[1], size[0]], dtype=center.dtype)
    step = center.diff(dim=0)
    step = step - length * torch.round(step / length)
    return torch.cat([center[:1], center[:1] + step.cumsum(dim=0)])


def _fit_line(frame: Tensor, track: Tensor, num_frames: int) -> tuple[tuple[float, float], float]:
    """Displacement over the clip and the largest distance from uniform motion."""
    time = frame.float() - frame.float().mean()
    slope = (time[:, None] * track).sum(dim=0) / time.square().sum().clamp(min=1e-6)
    wobble = (track - track.mean(dim=0) - time[:, None] * slope).norm(dim=1).max()
    x, y = (slope * (num_frames - 1)).tolist()
    return (x, y), float(wobble)


def _find_reversal(track: Tensor, windows: _Windows, clear: Tensor, size: tuple[int, int]) -> tuple[float, bool]:
    """The longest way that was also gone back, and whether the object was at a wall when it turned."""
    longest, hits_wall = 0.0, False
    index = clear.nonzero()[:, 0]
    for axis in (0, 1):
        for sign in (1, -1):
            way = sign * track[:, axis]
            out = way - way.cummin(dim=0).values
            back = way - way.flip(0).cummin(dim=0).values.flip(0)
            both, turn = torch.minimum(out, back).max(dim=0)
            if float(both) > longest:
                longest = float(both)
                hits_wall = _wall_distance(windows, int(index[turn]), axis, sign, size) < MAX_WALL_DISTANCE
    return longest, hits_wall


def _wall_distance(windows: _Windows, frame: int, axis: int, sign: int, size: tuple[int, int]) -> float:
    """Space between the object and the wall ahead, in shorter sides."""
    pixels = windows.coverage[frame].amax(dim=0 if axis == 0 else 1) > CORE_COVERAGE
    places = (windows.x[frame, 0] if axis == 0 else windows.y[frame, :, 0])[pixels]
    if not len(places):
        return math.inf
    length = size[1 - axis]
    center = float(windows.center[frame, axis]) % length
    front = center + float(places.max() if sign > 0 else places.min())
    return (length - front if sign > 0 else front) / min(size)


def _growth(area: Tensor) -> float:
    """Size at the end over size at the start."""
    few = max(1, len(area) // 8)
    return float((area[-few:].mean() / area[:few].mean()).sqrt())


def _turn(frame: Tensor, moments: Tensor, shape: str | None, num_frames: int) -> float:
    """Rotation over the clip: the frequency at which the corners' direction is most coherent."""
    if shape is None or OUTLINES[shape].corners == 1:
        return 0.0
    signal = torch.zeros(num_frames, dtype=torch.complex64)
    signal[frame] = moments[:, SHAPES.index(shape)]
    num_frequencies = 16 * num_frames
    spectrum = torch.fft.fft(signal, n=num_frequencies).abs()
    peak = int(spectrum.argmax())
    if spectrum[peak] < MIN_COHERENCE * signal.abs().sum():
        return math.nan
    frequency = float(torch.fft.fftfreq(num_frequencies)[peak])
    return 2 * math.pi * frequency * (num_frames - 1) / OUTLINES[shape].corners


def _name_motion(
    displacement: tuple[float, float], wobble: float, reversal: float, hits_wall: bool, growth: float, turn: float
) -> str | None:
    found: list[str | None] = []
    distance = math.hypot(*displacement)
    if reversal > MIN_REVERSAL:
        found.append("bounce" if hits_wall else None)
    elif wobble > MAX_WOBBLE + 0.1 * distance:
        found.append(None)
    elif distance > MIN_DISPLACEMENT:
        found.append(_nearest_direction(*displacement))
    if abs(math.log(growth)) > MIN_LOG_GROWTH:
        found.append("grow" if growth > 1 else "shrink")
    if not abs(turn) < MIN_TURN:
        found.append(None if math.isnan(turn) else "spin")
    return found[0] if len(found) == 1 else None if found else "still"


def _nearest_direction(x: float, y: float) -> str:
    def cosine(name: str) -> float:
        dx, dy = DIRECTIONS[name]
        return (x * dx + y * dy) / math.hypot(dx, dy)

    return max(DIRECTIONS, key=cosine)
