import random
from dataclasses import replace

import pytest

from vgen.data.captions import (
    MOTIONS,
    SceneDescription,
    ShapeDescription,
    caption,
    parse_caption,
    vocabulary,
)
from vgen.data.shapes import ShapesWorld


def what_is_said(scene: SceneDescription) -> SceneDescription:
    """The scene without geometry and without the speeds that captions keep to themselves."""
    objects = tuple(
        ShapeDescription(
            color=one.color,
            shape=one.shape,
            motion=one.motion,
            size=one.size,
            speed="normal" if one.motion in ("still", "bounce") else one.speed,
        )
        for one in scene.objects
    )
    return SceneDescription(objects=objects, background=scene.background)


def test_captions_parse_back_to_their_scene():
    world = ShapesWorld(split="all", seed=3)
    for index in range(1500):
        expected = what_is_said(world.scene(index))
        for variant in range(4):
            text = world.caption(index, variant)
            assert parse_caption(text) == expected, text


def test_vocabulary_is_exactly_what_captions_use():
    world = ShapesWorld(split="all")
    texts = [world.caption(index, variant) for index in range(4000) for variant in range(3)]
    used = {word for text in texts for word in text.replace(",", " , ").split()}
    assert sorted(used) == vocabulary()
    assert len(used) < 120
    assert all(word == "," or word.isalpha() for word in used)


def test_half_of_the_captions_are_plain_and_variants_differ():
    scene = SceneDescription(
        objects=(
            ShapeDescription(color="blue", shape="square", motion="up", size="small", speed="slow"),
            ShapeDescription(color="orange", shape="triangle", motion="still", size="large"),
        ),
        background="gray",
    )
    plain = "a small blue square moves up slowly and a large orange triangle stays still on a gray background"
    texts = [caption(scene, random.Random(seed)) for seed in range(1000)]
    assert 0.45 < texts.count(plain) / len(texts) < 0.55
    assert len(set(texts)) > 300


def test_some_captions_mention_black_backgrounds():
    scene = SceneDescription(objects=(ShapeDescription(color="orange", shape="star", motion="grow"),))
    texts = [caption(scene, random.Random(seed)) for seed in range(1000)]
    assert "an orange star grows" in texts
    assert 0.07 < sum("black background" in text for text in texts) / len(texts) < 0.13


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Red circle moving right.", ("red", "circle", "right", "medium", "normal")),
        ("a tiny white ball drifts slowly up and to the right", ("white", "circle", "up right", "small", "slow")),
        ("the big green box quickly goes to the lower left", ("green", "square", "down left", "large", "quick")),
        ("a video of a cyan star spinning in place", ("cyan", "star", "spin", "medium", "normal")),
        ("there is a purple triangle that does not move", None),
        ("a yellow star does not move", ("yellow", "star", "still", "medium", "normal")),
        ("a blue circle gets bigger rapidly", ("blue", "circle", "grow", "medium", "quick")),
        ("a blue circle bounces off the walls", ("blue", "circle", "bounce", "medium", "normal")),
    ],
)
def test_sentences_that_a_user_types(text, expected):
    if expected is None:
        with pytest.raises(ValueError, match="unknown words: that"):
            parse_caption(text)
        return
    (item,) = parse_caption(text).objects
    assert (item.color, item.shape, item.motion, item.size, item.speed) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a pink circle hovers", "unknown words: hovers, pink"),
        ("a circle moves right", "color of 'a circle'"),
        ("a red circle", "one motion of 'a red circle'"),
        ("a red square spins and moves right", "one motion"),
        ("a red circle moves left and right", "one motion"),
        ("moves right", "one or two objects"),
        ("a red circle moves up and a red star moves up", "different colors"),
        ("a red circle spins", "must not be 'spin' for a circle"),
        ("a red circle moves up on a background", "color of the background"),
    ],
)
def test_incomplete_or_ambiguous_captions_raise(text, message):
    with pytest.raises(ValueError, match=message):
        parse_caption(text)


def test_unknown_attributes_raise_with_the_allowed_ones():
    item = ShapeDescription(color="red", shape="square", motion="up")
    for name in ("color", "shape", "motion", "size", "speed"):
        with pytest.raises(ValueError, match=f"{name} must be one of .*, got 'odd'"):
            replace(item, **{name: "odd"})
    with pytest.raises(ValueError, match="background must be one of .*, got 'odd'"):
        SceneDescription(objects=(item,), background="odd")
    assert len(MOTIONS) == 13
