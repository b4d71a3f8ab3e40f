from collections import Counter
from typing import get_args

import numpy as np
import pytest
import torch

from vgen.data.captions import COLORS, SHAPES, parse_caption
from vgen.data.shapes import ShapesWorld, combinations
from vgen.data.shapes_tasks import SCENE_LABELS, ShapesTask, ShapesTasks, scene_labels


@pytest.mark.parametrize("task", [task for task in get_args(ShapesTask) if task != "scene"])
def test_scenes_depend_on_seed_and_index_only_and_have_all_classes_equally_often(task):
    tasks = ShapesTasks(task)
    assert tasks.scene(7) == ShapesTasks(task).scene(7) != ShapesTasks(task, seed=1).scene(7)
    counts = Counter(tasks.scene(index).label for index in range(60 * len(tasks.classes)))
    assert sorted(counts) == list(range(len(tasks.classes))) and min(counts.values()) > 30
    clips = tasks.clips([tasks.scene(index) for index in range(2)], size=32)
    assert clips.shape == (2, 3, 17, 32, 32)


def test_the_labels_of_a_scene_are_what_its_caption_says():
    assert scene_labels(parse_caption("a big red ball flies to the upper right and a cyan star is still")) == (
        "red circle", "red moves up right", "cyan star", "cyan stays still"
    )  # fmt: skip
    tasks, world = ShapesTasks("scene", seed=3), ShapesWorld(split="all", seed=3)
    assert tasks.multi_label and len(SCENE_LABELS) == len(set(SCENE_LABELS)) == 8 * (4 + 13)
    for index in range(20):
        labels = [tasks.classes[label] for label in tasks.scene(index).labels]
        assert sorted(labels) == sorted(scene_labels(parse_caption(world.caption(index))))
    several = {frozenset(scene_labels(parse_caption(f"a {c} {s} moves up"))) for c in COLORS for s in SHAPES}
    assert len(several) == 8 * 4 and len(combinations("all")) == 8 * (4 * 13 - 1)


def moving(clip):
    """Whether each frame differs from the one before."""
    return (clip[:, 1:] - clip[:, :-1]).abs().amax((0, 2, 3)) > 0.02


def test_the_shapes_of_first_move_one_early_and_one_late():
    tasks = ShapesTasks("first")
    for index in range(20):
        scene = tasks.scene(index)
        starts = [{item.color: item.position for item in frame.objects} for frame in scene.frames]
        first, second = tasks.classes[scene.label], tasks.classes[1 - scene.label]
        assert starts[4][first] != starts[0][first] and starts[4][first] == starts[16][first]
        assert starts[12][second] == starts[0][second] != starts[16][second]
        clip = tasks.clips([scene])[0]
        assert moving(clip).tolist() == [True] * 4 + [False] * 8 + [True] * 4


def test_a_single_frame_does_not_show_which_shape_moved_first():
    """Both orders of the same scene have the same first frame, and the same last one."""
    tasks = ShapesTasks("first")
    scene = next(one for one in map(tasks.scene, range(100)))
    ends = {item.color: item.position for item in scene.frames[-1].objects}
    assert {item.color: item.position for item in scene.frames[0].objects}.keys() == ends.keys()
    assert all(frame.objects[0].velocity == (0.0, 0.0) for frame in scene.frames)


def test_where_the_shapes_are_in_the_middle_does_not_show_which_one_moved_first():
    tasks = ShapesTasks("first")
    from_center = []
    for scene in map(tasks.scene, range(400)):
        middle = {item.color: item.position for item in scene.frames[8].objects}
        first, second = (middle[tasks.classes[index]] for index in (scene.label, 1 - scene.label))
        away = [min(abs(one - center) for center in (0.25, 0.5, 0.75)) for one in (*first, *second)]
        from_center.append(sum(away[:2]) - sum(away[2:]))
    mean, deviation = np.mean(from_center), np.std(from_center) / 20
    assert abs(mean) < 3 * deviation


def test_directions_are_those_of_the_rendered_shapes():
    tasks = ShapesTasks("direction")
    for index in range(10):
        scene = tasks.scene(index)
        clip = tasks.clips([scene])[0]
        background = clip[:, 0, 0, 0]
        shape = (clip - background.view(3, 1, 1, 1)).abs().amax(0) > 0.1
        centers = [mask.nonzero()[:, 1].float().mean() for mask in (shape[0], shape[-1])]
        assert (centers[1] > centers[0]) == (tasks.classes[scene.label] == "right")


def test_unknown_tasks_are_refused():
    with pytest.raises(ValueError, match="task must be"):
        ShapesTasks("colour")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="seed"):
        ShapesTasks("color", seed=-1)
    assert torch.equal(*(ShapesTasks("speed").clips([ShapesTasks("speed").scene(3)]) for _ in range(2)))
