"""Captions of ShapesWorld: the attributes of its scenes, and a grammar that turns them into sentences and back.

The grammar is a set of tables of phrases, so that its vocabulary can be listed.
"""

import functools
import itertools
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from vgen.checks import check_choice

COLORS = ("red", "green", "blue", "yellow", "purple", "orange", "cyan", "white")
SHAPES = ("circle", "square", "triangle", "star")
SIZES = ("small", "medium", "large")
SPEEDS = ("slow", "normal", "quick")
BACKGROUNDS = ("black", "gray", "brown", "navy")
DIRECTIONS = {
    "right": (1, 0),
    "left": (-1, 0),
    "up": (0, -1),
    "down": (0, 1),
    "up right": (1, -1),
    "up left": (-1, -1),
    "down right": (1, 1),
    "down left": (-1, 1),
}
MOTIONS = (*DIRECTIONS, "still", "bounce", "spin", "grow", "shrink")


@dataclass(frozen=True, kw_only=True)
class ShapeDescription:
    """Attributes of one shape that a caption can describe. Captions omit the speed of still and bouncing shapes."""

    color: str
    shape: str
    motion: str
    size: str = "medium"
    speed: str = "normal"

    def __post_init__(self):
        allowed = {"color": COLORS, "shape": SHAPES, "motion": MOTIONS, "size": SIZES, "speed": SPEEDS}
        for name, values in allowed.items():
            check_choice(name, getattr(self, name), values)
        if (self.shape, self.motion) == ("circle", "spin"):
            raise ValueError("motion must not be 'spin' for a circle, whose rotation is invisible")


@dataclass(frozen=True, kw_only=True)
class SceneDescription:
    """Attributes of a scene that a caption can describe."""

    objects: Sequence[ShapeDescription]
    background: str = "black"

    def __post_init__(self):
        check_choice("background", self.background, BACKGROUNDS)
        colors = [item.color for item in self.objects]
        if not 1 <= len(colors) <= 2 or len(set(colors)) < len(colors):
            raise ValueError(f"a scene must have one or two objects of different colors, got {colors}")


SHAPE_WORDS = {"circle": ("circle", "ball"), "square": ("square", "box"), "triangle": ("triangle",), "star": ("star",)}
SIZE_WORDS = {"small": ("small", "little", "tiny"), "medium": (), "large": ("large", "big")}
SPEED_WORDS = {"slow": ("slowly", "gently"), "normal": (), "quick": ("quickly", "fast", "rapidly")}
BACKGROUND_WORDS = {"black": ("black",), "gray": ("gray", "grey"), "brown": ("brown",), "navy": ("navy",)}
ARTICLES = ("a", "an", "the")

# Verbs are (finite, participle) pairs. The first phrase of each table is the plain one.
TRAVEL_VERBS = (
    ("moves", "moving"),
    ("goes", "going"),
    ("travels", "traveling"),
    ("drifts", "drifting"),
    ("slides", "sliding"),
    ("flies", "flying"),
)
OTHER_VERBS = {
    "still": (
        ("stays still", "staying still"),
        ("stands still", "standing still"),
        ("is still", "standing still"),
        ("does not move", "not moving"),
        ("stays in place", "staying in place"),
        ("rests", "resting"),
    ),
    "bounce": (("bounces", "bouncing"),),
    "spin": (("spins", "spinning"), ("rotates", "rotating"), ("turns", "turning")),
    "grow": (
        ("grows", "growing"),
        ("expands", "expanding"),
        ("gets bigger", "getting bigger"),
        ("gets larger", "getting larger"),
        ("becomes bigger", "becoming bigger"),
    ),
    "shrink": (
        ("shrinks", "shrinking"),
        ("contracts", "contracting"),
        ("gets smaller", "getting smaller"),
        ("becomes smaller", "becoming smaller"),
    ),
}
STRAIGHT = {
    "right": ("right", "to the right", "rightwards"),
    "left": ("left", "to the left", "leftwards"),
    "up": ("up", "upwards", "to the top"),
    "down": ("down", "downwards", "to the bottom"),
}
DIAGONAL = (
    "{vertical} {side}",
    "{vertical} and to the {side}",
    "{vertical} and {side}",
    "diagonally {vertical} {side}",
    "diagonally {vertical} and to the {side}",
    "to the {corner} {side}",
)
CORNERS = {"up": "upper", "down": "lower"}
COMPLEMENTS = {
    "still": ("",),
    "bounce": ("", "around", "off the walls"),
    "spin": ("", "in place", "around"),
    "grow": ("",),
    "shrink": ("",),
    **STRAIGHT,
    **{
        motion: tuple(
            phrase.format(vertical=motion.split()[0], side=motion.split()[1], corner=CORNERS[motion.split()[0]])
            for phrase in DIAGONAL
        )
        for motion in DIRECTIONS
        if " " in motion
    },
}
PARTICIPLE_OPENINGS = ("", "a video of", "an animation of", "there is")
FINITE_JOINTS = (" and ", ", ", " while ", ", and ")
PARTICIPLE_JOINTS = (" and ", ", ", ", and ")
BACKGROUND_ENDINGS = (
    " on a {color} background",
    " against a {color} background",
    " with a {color} background",
    ", {color} background",
)
BACKGROUND_OPENING = "on a {color} background, "
BLACK_PROBABILITY = 0.1

# Words that identify a motion anywhere in a predicate.
MOTION_WORDS = {
    "still": ("still", "not", "stays", "staying", "stands", "standing", "rests", "resting"),
    "bounce": ("bounces", "bouncing"),
    "spin": ("spins", "spinning", "rotates", "rotating", "turns", "turning"),
    "grow": ("grows", "growing", "expands", "expanding", "bigger", "larger"),
    "shrink": ("shrinks", "shrinking", "contracts", "contracting", "smaller"),
    "up": ("up", "upwards", "top", "upper"),
    "down": ("down", "downwards", "bottom", "lower"),
    "right": ("right", "rightwards"),
    "left": ("left", "leftwards"),
}


def caption(scene: SceneDescription, rng: random.Random) -> str:
    """Writes a caption of a scene. About half of all captions use the plainest words.

    Size, speed and background are omitted if they are medium, normal and black.
    """
    if rng.random() < 0.5:
        text = " and ".join(_plain_clause(item) for item in scene.objects)
        return text if scene.background == "black" else f"{text} on a {scene.background} background"

    participle, terse = rng.random() < 0.5, rng.random() < 0.3
    clauses = [_clause(item, participle, terse, rng) for item in scene.objects]
    text = rng.choice(PARTICIPLE_JOINTS if participle else FINITE_JOINTS).join(clauses)
    opening = rng.choice(PARTICIPLE_OPENINGS) if participle and not terse else ""
    text = f"{opening} {text}" if opening else text
    return _add_background(text, scene.background, may_open=not opening, rng=rng)


def plain_motion(motion: str) -> str:
    """The plainest words for a motion, such as `moves up right`."""
    verb = (TRAVEL_VERBS if motion in DIRECTIONS else OTHER_VERBS[motion])[0][0]
    return _join(verb, COMPLEMENTS[motion][0])


def _plain_clause(item: ShapeDescription) -> str:
    size = "" if item.size == "medium" else item.size
    speed = SPEED_WORDS[item.speed][0] if _mentions_speed(item) else ""
    subject = _with_article(_join(size, item.color, item.shape))
    return _join(subject, plain_motion(item.motion), speed)


def _clause(item: ShapeDescription, participle: bool, terse: bool, rng: random.Random) -> str:
    size = rng.choice(SIZE_WORDS[item.size]) if SIZE_WORDS[item.size] else ""
    subject = _join(size, item.color, rng.choice(SHAPE_WORDS[item.shape]))
    if not terse:
        subject = f"the {subject}" if rng.random() < 0.2 else _with_article(subject)

    finite, ing = rng.choice(TRAVEL_VERBS if item.motion in DIRECTIONS else OTHER_VERBS[item.motion])
    verb, auxiliary = (ing, "") if participle else rng.choice(((finite, ""), (finite, ""), (ing, "is")))
    complement = rng.choice(COMPLEMENTS[item.motion])
    speed = rng.choice(SPEED_WORDS[item.speed]) if _mentions_speed(item) else ""
    if speed and speed != "fast" and rng.random() < 0.3:
        return _join(subject, auxiliary, speed, verb, complement)
    if rng.random() < 0.5:
        return _join(subject, auxiliary, verb, speed, complement)
    return _join(subject, auxiliary, verb, complement, speed)


def _add_background(text: str, background: str, may_open: bool, rng: random.Random) -> str:
    # this function gets only the half of captions that are not plain
    if background == "black" and rng.random() >= 2 * BLACK_PROBABILITY:
        return text
    color = rng.choice(BACKGROUND_WORDS[background])
    if may_open and rng.random() < 0.25:
        return BACKGROUND_OPENING.format(color=color) + text
    return text + rng.choice(BACKGROUND_ENDINGS).format(color=color)


def _mentions_speed(item: ShapeDescription) -> bool:
    return item.speed != "normal" and item.motion not in ("still", "bounce")


def _with_article(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def _join(*words: str) -> str:
    return " ".join(word for word in words if word)


def parse_caption(text: str) -> SceneDescription:
    """Parses a caption of the grammar.

    Args:
        text: The caption. Case and full stops are ignored.

    Returns:
        The described scene. Size, speed and background default to medium, normal and black.

    Raises:
        ValueError: A word is not part of the grammar, or an object has no color, shape or motion or several.
    """
    words = text.lower().replace(",", " ").replace(".", " ").split()
    known = set(vocabulary())
    if unknown := sorted({word for word in words if word not in known}):
        raise ValueError(f"{text!r} has unknown words: {', '.join(unknown)}")
    background, words = _take_background(words)

    shapes = {word: shape for shape, synonyms in SHAPE_WORDS.items() for word in synonyms}
    nouns = [index for index, word in enumerate(words) if word in shapes]
    adjectives = {*COLORS, *ARTICLES, *itertools.chain(*SIZE_WORDS.values())}
    starts = []
    for noun in nouns:
        start = noun
        while start > 0 and words[start - 1] in adjectives:
            start -= 1
        starts.append(start)
    objects = []
    for start, noun, end in zip(starts, nouns, [*starts, len(words)][1:], strict=True):
        adjective, predicate = words[start:noun], words[noun + 1 : end]
        name = _join(*adjective, words[noun])
        objects.append(
            ShapeDescription(
                color=_read_one(adjective, {color: (color,) for color in COLORS}, f"color of {name!r}"),
                shape=shapes[words[noun]],
                motion=_read_motion(predicate, name),
                size=_read_one(adjective, SIZE_WORDS, f"size of {name!r}", default="medium"),
                speed=_read_one(predicate, SPEED_WORDS, f"speed of {name!r}", default="normal"),
            )
        )
    return SceneDescription(objects=tuple(objects), background=background)


def _take_background(words: list[str]) -> tuple[str, list[str]]:
    if "background" not in words:
        return "black", words
    end = words.index("background")
    background = _read_one(words[max(end - 1, 0) : end], BACKGROUND_WORDS, "color of the background")
    start = end - 1
    while start > 0 and words[start - 1] in (*ARTICLES, "on", "against", "with"):
        start -= 1
    return background, words[:start] + words[end + 1 :]


def _read_motion(predicate: Sequence[str], name: str) -> str:
    found = [motion for motion, words in MOTION_WORDS.items() if set(words) & set(predicate)]
    motion = " ".join(found)
    if motion not in MOTIONS:
        raise ValueError(f"the caption must name one motion of {name!r}, got {' and '.join(found) or 'none'}")
    return motion


def _read_one(words: Iterable[str], table: dict[str, tuple[str, ...]], what: str, default: str | None = None) -> str:
    """Finds the only key of `table` that one of the words stands for."""
    found = [key for key, synonyms in table.items() if set(synonyms) & set(words)]
    if not found and default is not None:
        return default
    if len(found) != 1:
        raise ValueError(f"the caption must name one {what}, got {' and '.join(found) or 'none'}")
    return found[0]


@functools.cache
def _vocabulary() -> tuple[str, ...]:
    phrases = itertools.chain(
        *SHAPE_WORDS.values(),
        *SIZE_WORDS.values(),
        *SPEED_WORDS.values(),
        *BACKGROUND_WORDS.values(),
        *TRAVEL_VERBS,
        *itertools.chain(*OTHER_VERBS.values()),
        *COMPLEMENTS.values(),
        (*COLORS, *ARTICLES, *PARTICIPLE_OPENINGS, *FINITE_JOINTS, "is"),
        (phrase.format(color="") for phrase in (*BACKGROUND_ENDINGS, BACKGROUND_OPENING)),
    )
    return tuple(sorted({word for phrase in phrases for word in phrase.replace(",", " , ").split()}))


def vocabulary() -> list[str]:
    """Lists all words that captions can contain, and the comma, sorted."""
    return list(_vocabulary())
