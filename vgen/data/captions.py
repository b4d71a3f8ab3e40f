"""What ShapesWorld can say: the attributes of its scenes, and a grammar that puts them into words and reads them back.

The grammar is tables of phrases, so that its vocabulary can be listed.
"""

import functools
import itertools
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

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
    """What a caption can say about one shape. The speed of a shape that is still or bounces is not said."""

    color: str
    shape: str
    motion: str
    size: str = "medium"
    speed: str = "normal"

    def __post_init__(self):
        legal = {"color": COLORS, "shape": SHAPES, "motion": MOTIONS, "size": SIZES, "speed": SPEEDS}
        for name, values in legal.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name} is {getattr(self, name)!r}; legal are {', '.join(values)}")
        if (self.shape, self.motion) == ("circle", "spin"):
            raise ValueError("a circle cannot spin visibly; give another shape or motion")


@dataclass(frozen=True, kw_only=True)
class SceneDescription:
    """What a caption can say about a scene."""

    objects: Sequence[ShapeDescription]
    background: str = "black"

    def __post_init__(self):
        if self.background not in BACKGROUNDS:
            raise ValueError(f"background is {self.background!r}; legal are {', '.join(BACKGROUNDS)}")
        colors = [one.color for one in self.objects]
        if not 1 <= len(colors) <= 2 or len(set(colors)) < len(colors):
            raise ValueError(f"a scene has one or two objects of different colours, got {colors}")


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
BLACK_IS_SAID = 0.1

# Words that tell a motion wherever they stand in a predicate.
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
    """Puts a scene into words, in about half of all cases the plainest ones.

    Size, speed and background are said unless they are medium, normal and black.
    """
    if rng.random() < 0.5:
        text = " and ".join(_plain_clause(one) for one in scene.objects)
        return text if scene.background == "black" else f"{text} on a {scene.background} background"

    participle, terse = rng.random() < 0.5, rng.random() < 0.3
    clauses = [_clause(one, participle, terse, rng) for one in scene.objects]
    text = rng.choice(PARTICIPLE_JOINTS if participle else FINITE_JOINTS).join(clauses)
    opening = rng.choice(PARTICIPLE_OPENINGS) if participle and not terse else ""
    text = f"{opening} {text}" if opening else text
    return _add_background(text, scene.background, may_open=not opening, rng=rng)


def _plain_clause(one: ShapeDescription) -> str:
    size = "" if one.size == "medium" else one.size
    verb = (TRAVEL_VERBS if one.motion in DIRECTIONS else OTHER_VERBS[one.motion])[0][0]
    speed = SPEED_WORDS[one.speed][0] if _speed_is_said(one) else ""
    subject = _with_article(_join(size, one.color, one.shape))
    return _join(subject, verb, COMPLEMENTS[one.motion][0], speed)


def _clause(one: ShapeDescription, participle: bool, terse: bool, rng: random.Random) -> str:
    size = rng.choice(SIZE_WORDS[one.size]) if SIZE_WORDS[one.size] else ""
    subject = _join(size, one.color, rng.choice(SHAPE_WORDS[one.shape]))
    if not terse:
        subject = f"the {subject}" if rng.random() < 0.2 else _with_article(subject)

    finite, ing = rng.choice(TRAVEL_VERBS if one.motion in DIRECTIONS else OTHER_VERBS[one.motion])
    verb, auxiliary = (ing, "") if participle else rng.choice(((finite, ""), (finite, ""), (ing, "is")))
    complement = rng.choice(COMPLEMENTS[one.motion])
    speed = rng.choice(SPEED_WORDS[one.speed]) if _speed_is_said(one) else ""
    if speed and speed != "fast" and rng.random() < 0.3:
        return _join(subject, auxiliary, speed, verb, complement)
    if rng.random() < 0.5:
        return _join(subject, auxiliary, verb, speed, complement)
    return _join(subject, auxiliary, verb, complement, speed)


def _add_background(text: str, background: str, may_open: bool, rng: random.Random) -> str:
    # Only the half of captions that is not plain comes here.
    if background == "black" and rng.random() >= 2 * BLACK_IS_SAID:
        return text
    color = rng.choice(BACKGROUND_WORDS[background])
    if may_open and rng.random() < 0.25:
        return BACKGROUND_OPENING.format(color=color) + text
    return text + rng.choice(BACKGROUND_ENDINGS).format(color=color)


def _speed_is_said(one: ShapeDescription) -> bool:
    return one.speed != "normal" and one.motion not in ("still", "bounce")


def _with_article(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def _join(*words: str) -> str:
    return " ".join(word for word in words if word)


def parse_caption(text: str) -> SceneDescription:
    """Reads a caption of the grammar.

    Args:
        text: The caption; case and full stops do not matter.

    Returns:
        What it says, with medium size, normal speed and a black background where it is silent.

    Raises:
        ValueError: If it has words that the grammar lacks, or does not say one colour, shape and motion per object.
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
                color=_read_one(adjective, {color: (color,) for color in COLORS}, f"colour of {name!r}"),
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
    background = _read_one(words[max(end - 1, 0) : end], BACKGROUND_WORDS, "colour of the background")
    start = end - 1
    while start > 0 and words[start - 1] in (*ARTICLES, "on", "against", "with"):
        start -= 1
    return background, words[:start] + words[end + 1 :]


def _read_motion(predicate: Sequence[str], name: str) -> str:
    said = [motion for motion, words in MOTION_WORDS.items() if set(words) & set(predicate)]
    motion = " ".join(said)
    if motion not in MOTIONS:
        raise ValueError(f"the caption should say one motion of {name!r}, but says {' and '.join(said) or 'none'}")
    return motion


def _read_one(words: Iterable[str], table: dict[str, tuple[str, ...]], what: str, default: str | None = None) -> str:
    """Finds the one key of `table` that the words name."""
    found = [key for key, synonyms in table.items() if set(synonyms) & set(words)]
    if not found and default is not None:
        return default
    if len(found) != 1:
        raise ValueError(f"the caption should say one {what}, but says {' and '.join(found) or 'none'}")
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
    """Lists every word that captions can contain, and the comma, sorted."""
    return list(_vocabulary())
