import itertools
import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image, ImageDraw

from vgen.data.captions import COLORS, MOTIONS, SHAPES, ShapeDescription
from vgen.data.shapes import (
    BACKGROUND_COLORS,
    OUTLINES,
    Scene,
    ShapeObject,
    ShapesWorld,
    combinations,
    is_held_out,
    make_scene,
    render,
)


def describe(motion="still", color="red", shape="square", **attributes) -> ShapeDescription:
    return ShapeDescription(color=color, shape=shape, motion=motion, **attributes)


def visible(scenes: list[Scene], **options) -> torch.Tensor:
    """Where a clip differs from its background, `(b, f, h, w)`."""
    background = torch.tensor([BACKGROUND_COLORS[scene.background] for scene in scenes]) * 2 - 1
    return (render(scenes, **options) != rearrange(background, "b c -> b c 1 1 1")).any(dim=1)


def border(mask: torch.Tensor) -> torch.Tensor:
    rows = torch.cat([mask[..., 0, :], mask[..., -1, :]], dim=-1)
    columns = torch.cat([mask[..., 0], mask[..., -1]], dim=-1)
    return torch.cat([rows, columns], dim=-1)


def single(scene: Scene, number: int) -> Scene:
    return replace(scene, objects=(scene.objects[number],), background="black")


def test_scenes_depend_only_on_seed_and_index():
    world, again, other = ShapesWorld(seed=1), ShapesWorld(seed=1), ShapesWorld(seed=2)
    backwards = [again.scene(index) for index in reversed(range(50))][::-1]
    assert [world.scene(index) for index in range(50)] == backwards
    assert all(world.scene(index) != other.scene(index) for index in range(50))
    assert len({world.scene(index) for index in range(500)}) == 500
    assert world.caption(7, 3) == again.caption(7, 3)
    with pytest.raises(ValueError, match="negative"):
        world.scene(-1)


def test_scenes_cover_the_world():
    scenes = [ShapesWorld(split="all").scene(index) for index in range(3000)]
    objects = [one for scene in scenes for one in scene.objects]
    assert 0.45 < sum(len(scene.objects) == 2 for scene in scenes) / len(scenes) < 0.55
    assert {(one.color, one.shape, one.motion) for one in objects} == set(combinations("all"))
    assert {one.size for one in objects} == {"small", "medium", "large"}
    assert {one.speed for one in objects} == {"slow", "normal", "quick"}
    assert {scene.background for scene in scenes} == set(BACKGROUND_COLORS)
    assert all(len(ShapesWorld(num_objects=(2,)).scene(index).objects) == 2 for index in range(50))


def test_held_out_tenth_never_occurs_in_training():
    def drawn(split):
        scenes = [ShapesWorld(split=split).scene(index) for index in range(1500)]
        return {(one.color, one.shape, one.motion) for scene in scenes for one in scene.objects}

    train, held_out = drawn("train"), drawn("held_out")
    assert not any(is_held_out(*one) for one in train)
    assert held_out == set(combinations("held_out"))
    assert set(combinations("train")) | held_out == set(combinations("all"))
    assert 0.09 < len(held_out) / len(combinations("all")) < 0.11


def test_every_pair_of_attributes_occurs_in_training():
    train = combinations("train")
    assert {(color, shape) for color, shape, _ in train} == set(itertools.product(COLORS, SHAPES))
    assert {(color, motion) for color, _, motion in train} == set(itertools.product(COLORS, MOTIONS))
    pairs = set(itertools.product(SHAPES, MOTIONS)) - {("circle", "spin")}
    assert {(shape, motion) for _, shape, motion in train} == pairs


@pytest.mark.parametrize(("height", "width"), [(64, 64), (48, 80)])
def test_nothing_touches_the_border_or_another_object_in_the_default_clip(height, width):
    scenes = [ShapesWorld(split="all", seed=4).scene(index) for index in range(100)]
    calm = [scene for scene in scenes if all(one.motion != "bounce" for one in scene.objects)]
    assert not border(visible(calm, height=height, width=width)).any()

    pairs = [scene for scene in scenes if len(scene.objects) == 2]
    first = visible([single(scene, 0) for scene in pairs], height=height, width=width)
    second = visible([single(scene, 1) for scene in pairs], height=height, width=width)
    assert first.any(dim=(2, 3)).all() and second.any(dim=(2, 3)).all()
    around = F.max_pool2d(second.float(), 3, stride=1, padding=1) > 0
    assert not (first & around).any()


@pytest.mark.parametrize("size", ["small", "medium", "large"])
@pytest.mark.parametrize("speed", ["slow", "quick"])
def test_largest_reach_stays_inside(size, speed):
    """The extremes, which random scenes seldom meet."""
    scenes = [
        make_scene(
            [
                describe(motion, shape="triangle", size=size, speed=speed),
                describe(other, "blue", "star", size=size, speed=speed),
            ],
            "black",
            random.Random(seed),
        )
        for motion, other in itertools.product(["up", "down left", "right", "grow"], ["left", "up right", "grow"])
        for seed in range(3)
    ]
    last = {"num_frames": 1, "start": 2.0}
    assert not border(visible(scenes, **last)).any()
    first, second = (visible([single(scene, number) for scene in scenes], **last) for number in (0, 1))
    assert not (first & second).any()


@pytest.mark.parametrize("companion", [None, describe("up", color="blue", shape="star", speed="quick")])
def test_first_frame_does_not_depend_on_the_motion(companion):
    for seed in range(3):
        scenes = []
        for motion in MOTIONS:
            objects = [describe(motion, size="large", speed="slow"), *([companion] if companion else [])]
            scenes.append(make_scene(objects, "navy", random.Random(seed)))
        first = render(scenes, num_frames=1)
        assert torch.equal(first, first[:1].expand_as(first))
        later = render(scenes, num_frames=1, start=1.0)
        assert len({frame.numpy().tobytes() for frame in later}) == len(MOTIONS)


def test_linear_classifier_of_the_first_frame_is_at_chance_for_motion():
    world = ShapesWorld(split="all", num_objects=(1,))
    scenes = [world.scene(index) for index in range(3000)]
    label = torch.tensor([MOTIONS.index(scene.objects[0].motion) for scene in scenes])
    clip = render(scenes, num_frames=2, frame_rate=0.5, height=32, width=32)

    def accuracy(frames: torch.Tensor) -> float:
        features = F.adaptive_avg_pool2d(frames, 16).flatten(1)
        train, test = features[:2000], features[2000:]
        gram = train.T @ train + 3 * torch.eye(features.shape[1])
        weight = torch.linalg.solve(gram, train.T @ F.one_hot(label[:2000], len(MOTIONS)).float())
        return float(((test @ weight).argmax(dim=1) == label[2000:]).float().mean())

    assert accuracy(clip[:, :, 0]) < 0.11
    assert accuracy(clip[:, :, 1] - clip[:, :, 0]) > 0.25


@pytest.mark.parametrize("num_objects", [1, 2])
def test_bounce_reaches_a_wall_after_5_to_10_intervals_and_never_wraps(num_objects):
    companion = [describe("still", color="blue", shape="star")][: num_objects - 1]
    scenes = [
        make_scene([describe("bounce", shape=shape, size=size, speed=speed), *companion], "black", random.Random(seed))
        for seed, (shape, size, speed) in enumerate(
            itertools.product(SHAPES, ["small", "large"], ["slow", "normal", "quick"])
        )
    ]
    ball = visible([single(scene, 0) for scene in scenes], num_frames=161, frame_rate=40.0)
    hit = border(ball).any(dim=-1)
    first_hit = hit.float().argmax(dim=1) / 40 * 8
    # A soft edge shows in the border's pixels up to a pixel before the wall.
    assert hit.any(dim=1).all() and (first_hit > 3).all() and (first_hit < 10.1).all()
    opposite = (ball[..., 0].any(-1) & ball[..., -1].any(-1)) | (ball[..., 0, :].any(-1) & ball[..., -1, :].any(-1))
    assert not opposite.any()


def test_bouncing_object_always_stays_in_its_half():
    objects = [describe("bounce"), describe("bounce", color="blue", shape="star", size="large")]
    scenes = [make_scene(objects, "black", random.Random(seed)) for seed in range(8)]
    first, second = (
        visible([single(scene, number) for scene in scenes], num_frames=120, frame_rate=3.0).any(dim=1)
        for number in (0, 1)
    )
    assert not (first & second).any()


def test_reflection_is_elastic():
    ball = ShapeObject(
        color="red",
        shape="circle",
        motion="bounce",
        position=(0.5, 0.25),
        velocity=(0.3, 0.0),
        radius=0.125,
        angle=0.0,
    )
    scene = Scene(objects=(ball,))
    span = 1 - 2 * 0.125 * OUTLINES["circle"].radius
    period = 2 * span / 0.3
    clip = render([scene], num_frames=2, frame_rate=1 / period)[0]
    torch.testing.assert_close(clip[:, 0], clip[:, 1], atol=1e-4, rtol=0)
    # Symmetric in time around the turn.
    turn = span / 2 / 0.3
    before, after = (render([scene], num_frames=1, start=turn + shift) for shift in (-0.4, 0.4))
    torch.testing.assert_close(before, after, atol=1e-4, rtol=0)


def test_movers_leave_on_one_side_and_enter_on_the_other():
    mover = ShapeObject(
        color="red",
        shape="star",
        motion="up right",
        position=(0.5, 0.5),
        velocity=(0.25, -0.25),
        radius=0.125,
        angle=0.2,
    )
    scene = Scene(objects=(mover,))
    clip = render([scene], num_frames=33)[0]
    torch.testing.assert_close(clip[:, 0], clip[:, 32], atol=1e-4, rtol=0)
    amount = (clip[0] + 1).sum(dim=(1, 2))
    torch.testing.assert_close(amount, amount[:1].expand_as(amount), atol=0, rtol=0.01)
    torch.testing.assert_close(clip[:, 16].roll((32, 32), (1, 2)), clip[:, 0], atol=1e-4, rtol=0)


def test_growth_saturates_after_the_default_clip():
    scenes = [make_scene([describe(motion)], "black", random.Random(0)) for motion in ("grow", "shrink")]
    size = (render(scenes, num_frames=33)[:, 0] + 1).sum(dim=(2, 3)).sqrt()
    size = size / size[:, :1]
    assert (size.diff(dim=1)[0, :16] > 0).all() and (size.diff(dim=1)[1, :16] < 0).all()
    torch.testing.assert_close(size[:, 16], torch.tensor([1.45, 0.6]), atol=0.01, rtol=0)
    assert torch.equal(size[:, 17:], size[:, 16:17].expand(-1, 16))


def test_content_is_a_function_of_time():
    scenes = [ShapesWorld(split="all").scene(index) for index in range(6)]
    slow = render(scenes, num_frames=9, frame_rate=8.0)
    assert torch.equal(slow, render(scenes, num_frames=25, frame_rate=24.0)[:, :, ::3])
    assert torch.equal(slow[:, :, 4:], render(scenes, num_frames=5, start=0.5))
    rates = torch.tensor([4.0, 8.0, 12.0, 2.0, 8.0, 30.0])
    together = render(scenes, num_frames=9, frame_rate=rates)
    for number, rate in enumerate(rates.tolist()):
        assert torch.equal(together[number], render(scenes[number : number + 1], num_frames=9, frame_rate=rate)[0])
    with pytest.raises(ValueError, match="positive"):
        render(scenes, frame_rate=0.0)


@pytest.mark.parametrize(("height", "width"), [(64, 64), (96, 48), (30, 70)])
def test_frames_of_any_size_show_the_same_scene(height, width):
    scenes = [ShapesWorld(split="all").scene(index) for index in range(4)]
    clip = render(scenes, num_frames=3, height=height, width=width)
    assert clip.shape == (4, 3, 3, height, width)
    assert clip.dtype == torch.float32 and clip.min() >= -1 and clip.max() <= 1
    for scene, frames in zip(scenes, clip, strict=True):
        background = torch.tensor(BACKGROUND_COLORS[scene.background]).view(3, 1, 1) * 2 - 1
        fine = render([scene], num_frames=1, height=256, width=256)[0, :, 0]
        area = float((frames[:, 0] - background).abs().sum()) / min(height, width) ** 2
        assert area == pytest.approx(float((fine - background).abs().sum()) / 256**2, rel=0.05)


def test_first_object_is_on_top():
    common = {"shape": "square", "motion": "still", "position": (0.5, 0.5), "radius": 0.2, "angle": 0.0}
    red, blue = ShapeObject(color="red", **common), ShapeObject(color="blue", **common)
    center = render([Scene(objects=(red, blue)), Scene(objects=(blue, red))], num_frames=1)[:, :, 0, 32, 32]
    assert center[0, 0] > center[0, 2] and center[1, 0] < center[1, 2]


@pytest.mark.parametrize("shape", ["square", "triangle", "star"])
def test_shapes_equal_polygons_drawn_by_pillow(shape):
    outline, angle, zoom = OUTLINES[shape], 0.3, 16
    object_ = ShapeObject(color="white", shape=shape, motion="still", position=(0.4, 0.6), radius=0.2, angle=angle)
    ours = (render([Scene(objects=(object_,))], num_frames=1)[0, 0, 0].numpy() + 1) / 2

    notch = {"square": math.cos(math.pi / 4), "triangle": 0.5, "star": 0.5}[shape]
    points = []
    for step in range(2 * outline.corners):
        radius = 0.2 * 64 * zoom * outline.radius * (1 if step % 2 == 0 else notch)
        direction = angle + outline.upright + math.pi * step / outline.corners
        points.append((0.4 * 64 * zoom + radius * math.cos(direction), 0.6 * 64 * zoom + radius * math.sin(direction)))
    image = Image.new("L", (64 * zoom, 64 * zoom))
    ImageDraw.Draw(image).polygon(points, fill=255)
    theirs = np.asarray(image.resize((64, 64), Image.Resampling.BOX)) / 255
    assert np.abs(ours - theirs).sum() < 0.03 * theirs.sum()
    assert np.abs(ours - theirs).max() < 0.3
    assert abs(ours.sum() - outline.area * (0.2 * 64) ** 2) < 0.02 * ours.sum()


def test_shapes_have_comparable_areas():
    areas = [outline.area for outline in OUTLINES.values()]
    assert max(areas) / min(areas) < 1.6


def test_spin_turns_by_its_speed():
    scene = make_scene([describe("spin", speed="slow")], "black", random.Random(1))
    (one,) = scene.objects
    quarter = math.pi / 2 / abs(one.spin)
    start, turned, between = (render([scene], num_frames=1, start=time) for time in (0.0, quarter, quarter / 2))
    torch.testing.assert_close(start, turned, atol=1e-4, rtol=0)
    assert (start - between).abs().max() > 0.5
    assert math.degrees(abs(one.spin)) / 8 == pytest.approx(5, rel=0.06)


def test_invalid_worlds_raise():
    with pytest.raises(ValueError, match="split must be one of 'train', 'held_out', 'all', got 'test'"):
        ShapesWorld(split="test")
    with pytest.raises(ValueError, match="must contain only 1 and 2"):
        ShapesWorld(num_objects=(1, 3))
