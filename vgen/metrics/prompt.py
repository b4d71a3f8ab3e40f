"""Checks whether a video of ShapesWorld shows what its caption says, from its pixels and without a network.

Each pixel is modeled as a mixture of the background and the color of one object. Its coverage, the share of that
color, is measured along the line between the two colors in RGB, where the palette is spread evenly. Positions are on
a torus, because shapes that leave the frame on one side enter it on the other. Lengths in constants are in units of
the frame's shorter side.

Axes: `f` frames, `k` colors, `p` pixels, `s` the shapes in the order of `SHAPES`, `h w` the pixels of a frame or of a
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
"""Distance from the background, in RGB from 0 to 1, below which a pixel counts as background."""
MAX_COLOR_ERROR = 0.25
"""Largest distance of a pixel from a mixture of the background and a palette color for it to have that color."""
MAX_COLOR_ERROR_NEAR_CORE = 0.4
"""The same limit next to pixels that are known to have the color."""
CORE_COVERAGE = 0.45
MIN_COVERAGE = 0.2
MAX_COVERED = 0.5
"""Largest share of non-background pixels; above it the video counts as noise."""
MIN_AREA = 4 * PIXEL**2
"""Smallest area of an object, averaged over the frames."""
MIN_AREA_IN_FRAME = 2 * PIXEL**2

MIN_CLEAR_FRAMES = 4
NUM_BLURS = 2
"""Number of 3x3 blurs that are tried on the drawn shapes, to match videos that an autoencoder has softened."""
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
    """Attributes of one object, read from the pixels."""

    color: str | None
    """The nearest color of the palette; `None` if the object has no color of the palette."""
    shape: str | None
    """`None` if no shape matches in most frames, or if the object is missing in a frame."""
    motion: str | None
    """`None` if the object is missing in a frame, has several motions or an unknown one."""
    presence: float
    """Fraction of the frames in which the object is visible or hidden by another one."""
    shape_score: float = 0.0
    """Intersection over union with the drawn shape, as a mean over the frames."""
    displacement: tuple[float, float] = (0.0, 0.0)
    """Displacement (right, down) from first to last frame along a fitted line, in shorter sides."""
    wobble: float = 0.0
    """Largest deviation from uniform motion along that line, in shorter sides."""
    reversal: float = 0.0
    """Longest distance along an axis that the object moved back and forth, in shorter sides."""
    growth: float = 1.0
    """Size in the last frames divided by size in the first frames."""
    turn: float = 0.0
    """Clockwise rotation from first to last frame, in radians; NaN if it is erratic."""


@dataclass(frozen=True, kw_only=True)
class ObjectVerdict:
    """Which attributes of one described object match the video."""

    color_correct: bool
    shape_correct: bool
    motion_correct: bool

    @property
    def correct(self) -> bool:
        """Whether all three attributes match."""
        return self.color_correct and self.shape_correct and self.motion_correct


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Result of comparing a video with a caption."""

    objects: tuple[ObjectVerdict, ...]
    """In the order of the caption."""
    number_correct: bool
    background_correct: bool

    @property
    def correct(self) -> bool:
        """Whether all objects match and there are no others, regardless of the background."""
        return self.number_correct and all(verdict.correct for verdict in self.objects)


def check(video: np.ndarray | Tensor, expected: SceneDescription | str) -> Verdict:
    """Compares a video with a scene or caption.

    Args:
        video: uint8 `(f, h, w, c)`, or a float tensor `(3, f, h, w)` in [-1, 1].
        expected: The scene or caption that it should show.

    Raises:
        ValueError: The caption cannot be parsed, or the array is not a video.
    """
    scene = parse_caption(expected) if isinstance(expected, str) else expected
    frames = _to_frames(video)
    readings = _read_objects(frames)
    pairs = _match(scene.objects, readings)
    return Verdict(
        objects=tuple(_compare(described, reading) for described, reading in pairs),
        number_correct=len(readings) == len(scene.objects),
        background_correct=_nearest_background(_background(frames)) == scene.background,
    )


def adherence(videos: Sequence[np.ndarray | Tensor], expected: Sequence[SceneDescription | str]) -> dict[str, float]:
    """Computes the fraction of videos that match their captions, and of objects whose attributes match.

    Args:
        videos: Videos, as for `check`.
        expected: The scene or caption of each video.

    Returns:
        Fractions of videos for `correct`, `number` and `background`, and of objects for `color`, `shape` and `motion`.

    Raises:
        ValueError: The numbers of videos and captions differ or are 0, or as in `check`.
    """
    if len(videos) != len(expected) or not len(videos):
        raise ValueError(f"expected one caption for each video, got {len(videos)} videos and {len(expected)} captions")
    verdicts = [check(video, scene) for video, scene in zip(videos, expected, strict=True)]
    objects = [verdict for scene in verdicts for verdict in scene.objects]
    return {
        "correct": _fraction([verdict.correct for verdict in verdicts]),
        "number": _fraction([verdict.number_correct for verdict in verdicts]),
        "background": _fraction([verdict.background_correct for verdict in verdicts]),
        "color": _fraction([verdict.color_correct for verdict in objects]),
        "shape": _fraction([verdict.shape_correct for verdict in objects]),
        "motion": _fraction([verdict.motion_correct for verdict in objects]),
    }


def read_video(video: np.ndarray | Tensor) -> list[Reading]:
    """Finds the objects of a video and reads their attributes.

    Args:
        video: uint8 `(f, h, w, c)`, or a float tensor `(3, f, h, w)` in [-1, 1].

    Returns:
        One reading per color that differs from the background, the largest object first.

    Raises:
        ValueError: The array is not a video, or is empty.
    """
    return _read_objects(_to_frames(video))


def _fraction(values: Sequence[bool]) -> float:
    return sum(values) / len(values)


def _match(
    described: Sequence[ShapeDescription], readings: Sequence[Reading]
) -> list[tuple[ShapeDescription, Reading | None]]:
    """Pairs each description with the reading of its color, or else with one of a color that is not described."""
    by_color = {reading.color: reading for reading in readings if reading.color}
    colors = {item.color for item in described}
    others = [reading for reading in readings if reading.color not in colors]
    return [(item, by_color.get(item.color) or (others.pop(0) if others else None)) for item in described]


def _compare(described: ShapeDescription, reading: Reading | None) -> ObjectVerdict:
    if reading is None:
        return ObjectVerdict(color_correct=False, shape_correct=False, motion_correct=False)
    return ObjectVerdict(
        color_correct=reading.color == described.color and reading.presence == 1,
        shape_correct=reading.shape == described.shape,
        motion_correct=reading.motion == described.motion,
    )


def _to_frames(video: np.ndarray | Tensor) -> Tensor:
    """Converts a video to float `(f, 3, h, w)` in [0, 1]."""
    if isinstance(video, Tensor) and video.is_floating_point() and video.ndim == 4 and video.shape[0] == 3:
        frames = (rearrange(video.detach().float().cpu(), "c f h w -> f c h w") + 1) / 2
    else:
        array = torch.as_tensor(video).cpu()
        if array.dtype != torch.uint8 or array.ndim != 4 or array.shape[-1] != 3:
            raise ValueError(
                "a video must be uint8 (f, h, w, 3) or a float tensor (3, f, h, w) in [-1, 1], "
                f"got {array.dtype} {tuple(array.shape)}"
            )
        frames = rearrange(array, "f h w c -> f c h w").float() / 255
    if not frames.numel():
        raise ValueError(f"the video must not be empty, got (f, 3, h, w) = {tuple(frames.shape)}")
    return frames.nan_to_num(0.5).clamp(0, 1)


def _background(frames: Tensor) -> Tensor:
    """Color of the background, `(3,)`: the median, because objects never cover half of a frame."""
    return rearrange(frames, "f c h w -> c (f h w)").median(dim=-1).values


def _nearest_background(background: Tensor) -> str:
    palette = torch.tensor([BACKGROUND_COLORS[name] for name in BACKGROUNDS])
    return BACKGROUNDS[int((palette - background).norm(dim=-1).argmin())]


@dataclass(frozen=True)
class _Layer:
    """One color of a video, with the share of each pixel that it covers."""

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
    """Separates the frames into one layer per color, and one for pixels without a color of the palette."""
    size = (len(frames), *frames.shape[2:])
    background = _background(frames)
    offset = rearrange(frames - rearrange(background, "c -> c 1 1"), "f c h w -> c (f h w)")
    pixel_index = (reduce(offset.square(), "c p -> p", "sum") > MIN_CONTRAST**2).nonzero()[:, 0]
    if len(pixel_index) > MAX_COVERED * math.prod(size):
        return [_Layer(None, _paint(torch.ones(1, len(pixel_index)), pixel_index, size)[0])]
    palette = torch.tensor([OBJECT_COLORS[color] for color in COLORS])
    amount, error = _unmix(offset[:, pixel_index], palette - background)
    min_pixels = MIN_AREA * min(size[1:]) ** 2 * size[0]
    present = _cores(amount, error, MAX_COLOR_ERROR).sum(dim=1) >= min_pixels

    # The color of edges and blurred pixels is ambiguous: they belong to a present color next to them.
    amount, error = amount[present], error[present]
    cores = _paint(_cores(amount, error, MAX_COLOR_ERROR_NEAR_CORE), pixel_index, size)
    around = F.max_pool2d(F.pad(cores, (2, 2, 2, 2), mode="circular"), 5, 1).flatten(1)[:, pixel_index] > 0
    own = _lowest(error.masked_fill(~around, math.inf)) & around & (error < MAX_COLOR_ERROR_NEAR_CORE)
    coverage = _paint(amount * (own & (amount > MIN_COVERAGE)), pixel_index, size)
    colors = [color for color, is_present in zip(COLORS, present.tolist(), strict=True) if is_present]
    layers = [_Layer(color, part) for color, part in zip(colors, coverage, strict=True)]

    rest = ~own.any(dim=0)
    if int(rest.sum()) >= min_pixels:
        layers.append(_Layer(None, _paint(rest[None], pixel_index, size)[0]))
    return layers


def _paint(values: Tensor, pixel_index: Tensor, size: tuple[int, int, int]) -> Tensor:
    """Writes `values` `(k, p)` to the pixel indices `pixel_index` of empty frames, `(k, f, h, w)`."""
    canvas = torch.zeros(len(values), math.prod(size))
    canvas[:, pixel_index] = values.float()
    return canvas.unflatten(1, size)


def _unmix(offset: Tensor, colors: Tensor) -> tuple[Tensor, Tensor]:
    """Fits mixtures of background and each color: the share of the color, and the distance, both `(k, p)`.

    Args:
        offset: Pixels minus background, `(3, p)`.
        colors: Colors minus background, `(k, 3)`.
    """
    product = colors @ offset
    square = colors.square().sum(dim=1, keepdim=True)
    amount = (product / square).clamp_(0, 1)
    error = (amount * square).sub_(product, alpha=2).mul_(amount).add_(offset.square().sum(dim=0))
    return amount, error.clamp_(min=0).sqrt_()


def _cores(amount: Tensor, error: Tensor, max_error: float) -> Tensor:
    """Mask `(k, p)` of pixels that clearly have one color."""
    return _lowest(error) & (amount > CORE_COVERAGE) & (error < max_error)


def _lowest(error: Tensor) -> Tensor:
    return error == error.amin(dim=0) if len(error) else torch.zeros_like(error, dtype=torch.bool)


def _read_layer(layer: _Layer, touched: Tensor) -> Reading:
    """Reads one object. Frames in which it touches another one are used only to track its position."""
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
    """Mask of frames in which the object is hidden by another one: those between frames where the two touch."""
    hidden = ~seen
    visible = seen.nonzero()[:, 0].tolist()
    for frame in hidden.nonzero()[:, 0].tolist():
        before = [index for index in visible if index < frame][-1:]
        after = [index for index in visible if index > frame][:1]
        hidden[frame] = bool(before or after) and all(touched[index] for index in before + after)
    return hidden


@dataclass(frozen=True)
class _Windows:
    """Square windows around an object, one per frame."""

    coverage: Tensor  # (f, h, w)
    center: Tensor  # (f, 2), x and y of the object in the frame, in pixels
    x: Tensor  # (f, 1, w), pixels from the object's center
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
    """Circular mean `(f,)` of the indices with weights `(f, n)`."""
    length = weight.shape[1]
    angle = torch.arange(length) * (2 * math.pi / length)
    mean = torch.atan2((weight * angle.sin()).sum(dim=1), (weight * angle.cos()).sum(dim=1))
    return mean * (length / (2 * math.pi))


def _angular_moments(windows: _Windows) -> Tensor:
    """Complex moments `(f, s)`: strength (at most 1) and direction of the n-fold symmetry of each shape."""
    z = torch.complex(windows.x.expand_as(windows.coverage), windows.y.expand_as(windows.coverage))
    power, moments = windows.coverage, {}
    for corners in range(1, 1 + max(outline.corners for outline in OUTLINES.values())):
        power = power * z
        moments[corners] = power.sum(dim=(1, 2)) / power.abs().sum(dim=(1, 2)).clamp(min=1e-6)
    return torch.stack([moments[OUTLINES[shape].corners] for shape in SHAPES], dim=1)


def _read_shape(windows: _Windows, moments: Tensor, area: Tensor, clear: Tensor) -> tuple[str | None, float]:
    """Compares every frame with each shape, drawn at the measured position, size and angle."""
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

    # Frames count by squared area, because the shape is hard to recognize after it has shrunk.
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
    """Unwraps centers `(f, 2)`: removes the jumps where an object leaves on one side and enters on the other."""
    length = torch.tensor([size[1], size[0]], dtype=center.dtype)
    step = center.diff(dim=0)
    step = step - length * torch.round(step / length)
    return torch.cat([center[:1], center[:1] + step.cumsum(dim=0)])


def _fit_line(frame: Tensor, track: Tensor, num_frames: int) -> tuple[tuple[float, float], float]:
    """Fits uniform motion: the displacement over the clip, and the largest deviation from it."""
    time = frame.float() - frame.float().mean()
    slope = (time[:, None] * track).sum(dim=0) / time.square().sum().clamp(min=1e-6)
    wobble = (track - track.mean(dim=0) - time[:, None] * slope).norm(dim=1).max()
    x, y = (slope * (num_frames - 1)).tolist()
    return (x, y), float(wobble)


def _find_reversal(track: Tensor, windows: _Windows, clear: Tensor, size: tuple[int, int]) -> tuple[float, bool]:
    """The longest distance moved back and forth, and whether the object was at a wall when it turned."""
    longest, hits_wall = 0.0, False
    index = clear.nonzero()[:, 0]
    for axis in (0, 1):
        for sign in (1, -1):
            position = sign * track[:, axis]
            forth = position - position.cummin(dim=0).values
            back = position - position.flip(0).cummin(dim=0).values.flip(0)
            distance, turn = torch.minimum(forth, back).max(dim=0)
            if float(distance) > longest:
                longest = float(distance)
                hits_wall = _wall_distance(windows, int(index[turn]), axis, sign, size) < MAX_WALL_DISTANCE
    return longest, hits_wall


def _wall_distance(windows: _Windows, frame: int, axis: int, sign: int, size: tuple[int, int]) -> float:
    """Distance between the object and the wall ahead, in shorter sides."""
    pixels = windows.coverage[frame].amax(dim=0 if axis == 0 else 1) > CORE_COVERAGE
    offsets = (windows.x[frame, 0] if axis == 0 else windows.y[frame, :, 0])[pixels]
    if not len(offsets):
        return math.inf
    length = size[1 - axis]
    center = float(windows.center[frame, axis]) % length
    front = center + float(offsets.max() if sign > 0 else offsets.min())
    return (length - front if sign > 0 else front) / min(size)


def _growth(area: Tensor) -> float:
    """Size at the end divided by size at the start."""
    count = max(1, len(area) // 8)
    return float((area[-count:].mean() / area[:count].mean()).sqrt())


def _turn(frame: Tensor, moments: Tensor, shape: str | None, num_frames: int) -> float:
    """Rotation over the clip, from the frequency at which the direction of the corners is most coherent."""
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
    motions: list[str | None] = []
    distance = math.hypot(*displacement)
    if reversal > MIN_REVERSAL:
        motions.append("bounce" if hits_wall else None)
    elif wobble > MAX_WOBBLE + 0.1 * distance:
        motions.append(None)
    elif distance > MIN_DISPLACEMENT:
        motions.append(_nearest_direction(*displacement))
    if abs(math.log(growth)) > MIN_LOG_GROWTH:
        motions.append("grow" if growth > 1 else "shrink")
    if not abs(turn) < MIN_TURN:
        motions.append(None if math.isnan(turn) else "spin")
    return motions[0] if len(motions) == 1 else None if motions else "still"


def _nearest_direction(x: float, y: float) -> str:
    def cosine(name: str) -> float:
        dx, dy = DIRECTIONS[name]
        return (x * dx + y * dy) / math.hypot(dx, dy)

    return max(DIRECTIONS, key=cosine)
