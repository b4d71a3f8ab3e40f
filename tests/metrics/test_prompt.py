from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from vgen.data.captions import COLORS, MOTIONS, SHAPES, SceneDescription
from vgen.data.shapes import Scene, ShapeObject, ShapesWorld, render
from vgen.metrics.prompt import adherence, check, read_video


def draw(indices: Sequence[int], split: str = "all", **options) -> tuple[list[Scene], Tensor]:
    scenes = [ShapesWorld(split=split, seed=11).scene(index) for index in indices]
    return scenes, render(scenes, **options)


def blur(clip: Tensor, sigma: float) -> Tensor:
    taps = torch.exp(-torch.arange(-3.0, 4.0).square() / (2 * sigma**2))
    kernel = (taps / taps.sum()).view(1, 1, 1, -1)
    frames = F.pad(rearrange(clip, "b c f h w -> (b c f) 1 h w"), (3, 3, 3, 3), mode="replicate")
    frames = F.conv2d(F.conv2d(frames, kernel), kernel.mT)
    return rearrange(frames, "(b c f) 1 h w -> b c f h w", b=clip.shape[0], c=clip.shape[1])


def one_object(**attributes) -> ShapeObject:
    start = {
        "color": "red",
        "shape": "square",
        "motion": "right",
        "position": (0.4, 0.5),
        "radius": 0.12,
        "angle": 0.1,
    }
    return ShapeObject(**{**start, "velocity": (0.06, 0.0), **attributes})


def clip_of(*objects: ShapeObject, **options) -> Tensor:
    return render([Scene(objects=objects)], **options)[0]


RED_SQUARE_RIGHT = "a red square moves right"


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_true_videos_are_correct(split):
    scenes, clips = draw(range(50), split)
    assert adherence(clips, scenes) == dict.fromkeys(
        ["correct", "number", "background", "color", "shape", "motion"], 1.0
    )


def test_true_videos_are_correct_by_their_captions():
    world = ShapesWorld(split="all", seed=11)
    _, clips = draw(range(10))
    assert all(check(clip, world.caption(index, 1)).correct for index, clip in enumerate(clips))


@pytest.mark.parametrize(("num_frames", "size"), [(24, (64, 64)), (65, (64, 64)), (17, (48, 80))])
def test_true_videos_of_other_lengths_and_sizes_are_correct(num_frames, size):
    scenes, clips = draw(range(100, 112), num_frames=num_frames, height=size[0], width=size[1])
    assert adherence(clips, scenes)["correct"] == 1


def test_blurred_and_noisy_videos_are_correct():
    scenes, clips = draw(range(200, 260))
    noise = 0.03 * torch.randn(clips.shape, generator=torch.Generator().manual_seed(0))
    assert adherence((blur(clips, 1.0) + noise).clamp(-1, 1), scenes)["correct"] >= 0.98


def with_one_change(scene: Scene, name: str, step: int) -> SceneDescription | None:
    """The scene with another value of an attribute of its last object, if there can be such a scene."""
    values = {"color": COLORS, "shape": SHAPES, "motion": MOTIONS}[name]
    one = scene.objects[-1]
    value = values[(values.index(getattr(one, name)) + step) % len(values)]
    try:
        return SceneDescription(objects=(*scene.objects[:-1], replace(one, **{name: value})))
    except ValueError:
        return None


@pytest.mark.parametrize("name", ["color", "shape", "motion"])
def test_one_wrong_attribute_is_detected(name):
    scenes, clips = draw(range(12))
    for step in (1, 2, 3):
        for scene, clip in zip(scenes, clips, strict=True):
            changed = with_one_change(scene, name, step)
            if changed is None:
                continue
            verdict = check(clip, changed)
            assert not verdict.correct
            others = {"color", "shape", "motion"} - {name}
            assert not getattr(verdict.objects[-1], f"{name}_correct")
            assert all(getattr(verdict.objects[-1], f"{other}_correct") for other in others)
            assert all(one.correct for one in verdict.objects[:-1])


def test_number_and_background_are_checked():
    clip = clip_of(one_object(), one_object(color="blue", motion="left", position=(0.5, 0.85), velocity=(-0.06, 0.0)))
    verdict = check(clip, "a red square moves right and a blue square moves left")
    assert verdict.correct and verdict.background_correct
    fewer = check(clip, "a red square moves right on a navy background")
    assert fewer.objects[0].correct and not fewer.number_correct and not fewer.background_correct and not fewer.correct
    more = check(clip_of(one_object()), "a red square moves right and a blue square moves left")
    assert more.objects[0].correct and not more.objects[1].color_correct and not more.correct


def vanished(clip: Tensor) -> Tensor:
    return torch.cat([clip[:, :8], torch.full_like(clip[:, :1], -1), clip[:, 9:]], dim=1)


def recolored(clip: Tensor) -> Tensor:
    return torch.cat([clip[:, :9], clip_of(one_object(color="purple"))[:, 9:]], dim=1)


def reshaped(clip: Tensor) -> Tensor:
    return torch.cat([clip[:, :8], clip_of(one_object(shape="triangle"))[:, 8:]], dim=1)


def split_in_two(clip: Tensor) -> Tensor:
    return torch.cat([clip[:, :6], torch.maximum(clip, clip.roll(20, 2))[:, 6:]], dim=1)


def twinned(clip: Tensor) -> Tensor:
    return torch.maximum(clip, clip.roll(28, 2))


def jumped(clip: Tensor) -> Tensor:
    return torch.cat([clip[:, :9], clip.roll(8, 2)[:, 9:]], dim=1)


def reversed_in_time(clip: Tensor) -> Tensor:
    return clip.flip(1)


def turned_back_away_from_a_wall(clip: Tensor) -> Tensor:
    return torch.cat([clip[:, :9], clip[:, :8].flip(1)], dim=1)


def smeared(clip: Tensor) -> Tensor:
    return torch.maximum(clip, torch.stack([clip.roll(shift, 3) for shift in range(-8, 9, 2)]).amax(dim=0))


def shuffled(clip: Tensor) -> Tensor:
    return clip[:, torch.randperm(17, generator=torch.Generator().manual_seed(0))]


def grown(clip: Tensor) -> Tensor:
    return clip_of(one_object(final_scale=1.5))


def spun(clip: Tensor) -> Tensor:
    return clip_of(one_object(spin=1.0))


def accompanied(clip: Tensor) -> Tensor:
    clip = clip.clone()
    clip[:, :, 4:12, 50:58] = torch.tensor([0.3, -0.4, 0.1]).view(3, 1, 1, 1)
    return clip


DEFECTS = [vanished, recolored, reshaped, split_in_two, twinned, jumped, reversed_in_time]
DEFECTS += [turned_back_away_from_a_wall, smeared, shuffled, grown, spun, accompanied]


@pytest.mark.parametrize("defect", DEFECTS)
def test_defects_are_wrong(defect):
    clip = clip_of(one_object())
    assert check(clip, RED_SQUARE_RIGHT).correct
    assert not check(defect(clip), RED_SQUARE_RIGHT).correct


def test_noise_and_blank_videos_are_wrong():
    generator = torch.Generator().manual_seed(0)
    videos = [
        torch.randn(3, 17, 64, 64, generator=generator).clamp(-1, 1),
        0.2 * torch.randn(3, 17, 64, 64, generator=generator),
        torch.rand(3, 2, 9, 7, generator=generator),
        torch.full((3, 17, 64, 64), -1.0),
        torch.full((3, 3, 64, 64), torch.nan),
    ]
    for video in videos:
        assert not check(video, RED_SQUARE_RIGHT).correct


def test_object_hidden_by_another_one_is_not_missing():
    front = one_object(shape="circle", motion="still", velocity=(0.0, 0.0), position=(0.6, 0.5), radius=0.22)
    behind = one_object(color="blue", position=(0.14, 0.5), radius=0.09, velocity=(0.1, 0.0))
    clip = clip_of(front, behind, num_frames=65)
    assert not ((clip[2] > 0.5) & (clip[0] < 0)).any(dim=(1, 2)).all(), "the scene should hide the blue square"
    assert check(clip, "a red circle stays still and a blue square moves right").correct
    gone = clip.clone()
    gone[:, 3] = clip_of(front, num_frames=1)[:, 0]
    assert not check(gone, "a red circle stays still and a blue square moves right").correct


def test_measured_values_are_those_of_the_scene():
    mover = one_object(motion="down left", velocity=(-0.05, 0.05), position=(0.03, 0.95))
    (reading,) = read_video(clip_of(mover))
    assert (reading.color, reading.shape, reading.motion, reading.presence) == ("red", "square", "down left", 1.0)
    assert reading.displacement == pytest.approx((-0.1, 0.1), abs=0.005)
    assert reading.shape_score > 0.95

    spinner = one_object(shape="star", motion="spin", velocity=(0.0, 0.0), spin=-1.2)
    (reading,) = read_video(clip_of(spinner))
    assert reading.turn == pytest.approx(-2.4, abs=0.1)

    grower = one_object(shape="triangle", motion="grow", velocity=(0.0, 0.0), final_scale=1.5)
    (reading,) = read_video(clip_of(grower))
    assert reading.growth == pytest.approx(1.45, abs=0.06)


def test_bytes_and_floats_give_equal_readings():
    scenes, clips = draw(range(6))
    for scene, clip in zip(scenes, clips, strict=True):
        video = rearrange((clip + 1) * 127.5, "c f h w -> f h w c").round().byte()
        assert check(video.numpy(), scene) == check(clip, scene)
        assert check(video, scene).correct


def test_invalid_input_raises():
    with pytest.raises(ValueError, match="a video must be uint8"):
        read_video(np.zeros((4, 64, 64, 3), dtype=np.float32))
    with pytest.raises(ValueError, match="a video must be uint8"):
        read_video(torch.zeros(1, 3, 4, 64, 64))
    with pytest.raises(ValueError, match="must not be empty"):
        read_video(torch.zeros(3, 0, 64, 64))
    with pytest.raises(ValueError, match="unknown words: hovers"):
        check(torch.zeros(3, 1, 64, 64), "a red circle hovers")
    with pytest.raises(ValueError, match="one caption for each video"):
        adherence([], [])


def test_adherence_counts_videos_and_objects():
    right, still = clip_of(one_object()), clip_of(one_object(motion="still", velocity=(0.0, 0.0)))
    result = adherence([right, still, right, right], [RED_SQUARE_RIGHT] * 3 + ["a blue circle moves right"])
    assert result == {"correct": 0.5, "number": 1, "background": 1, "color": 0.75, "shape": 0.75, "motion": 0.75}
