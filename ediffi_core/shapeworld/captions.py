"""Captions: a scene in words, with an exact record of what the words claim.

Text is lower-case ASCII with commas and full stops. Every caption names all objects by shape and colour; size, place,
background and style are claimed only when the text says them. Spans are half-open character ranges.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from numpy.random import Generator

from .world import BACKGROUNDS, COLORS, SHAPES, Scene, SceneObject

Side = Literal["left", "right", "above", "below"]

SIZE_WORDS = {"small": ("small", "little"), "large": ("large", "big")}
PLACE_WORDS = {
    "top left": ("at the top left", "in the upper left corner"),
    "top": ("at the top", "at the upper edge"),
    "top right": ("at the top right", "in the upper right corner"),
    "left": ("on the left", "at the left edge"),
    "center": ("in the center", "in the middle"),
    "right": ("on the right", "at the right edge"),
    "bottom left": ("at the bottom left", "in the lower left corner"),
    "bottom": ("at the bottom", "at the lower edge"),
    "bottom right": ("at the bottom right", "in the lower right corner"),
}
STYLE_WORDS = {
    "flat": ("flat", "plain"),
    "striped": ("striped", "banded"),
    "dotted": ("dotted", "spotted"),
    "hatched": ("hatched", "crosshatched"),
    "outlined": ("outlined", "bordered"),
    "grainy": ("grainy", "speckled"),
}
RELATION_WORDS = {
    "left": ("to the left of", "left of"),
    "right": ("to the right of", "right of"),
    "above": ("above", "higher than"),
    "below": ("below", "lower than"),
}
COUNT_WORDS = (
    ("one shape", "a single shape"),
    ("two shapes", "a pair of shapes"),
    ("three shapes", "a group of three"),
)
EVERYTHING = {"size", "place", "background", "style"}
RELATION_DISTANCE = 0.2  # objects nearer than this along an axis are not compared along it

SHORT_WORDS = 15
SHORT_STYLES = ("a {style} picture of {objects}", "{objects} in a {style} style")
BACKGROUND_TEMPLATES = ("a {background} background", "a {background} backdrop")

LONG_OPENINGS = (
    "this is a picture of {count} on {background}.",
    "the picture shows {count} in front of {background}.",
    "there is {background} with {count} on it.",
)
LONG_OBJECTS = (
    "{object} is {place}.",
    "{place} there is {object}.",
    "{object} can be seen {place}.",
    "we see {object} {place}.",
)
LONG_STYLES = (
    "everything is drawn in a {style} style.",
    "the style of the whole picture is {style}.",
    "all of this is drawn in a {style} way.",
)
LONG_RELATION = "the {subject} is {relation} the {object}."
LONG_ENDINGS = ("nothing else is in the picture.", "there are no other shapes.", "the rest of the picture is empty.")


@dataclass(frozen=True)
class ObjectClaim:
    shape: str
    color: str
    size: str | None
    place: str | None
    span: tuple[int, int] | None = None  # the words naming the object, without article and place


@dataclass(frozen=True)
class Relation:
    """objects[subject] is on this side of objects[object]."""

    subject: int
    side: Side
    object: int


@dataclass(frozen=True)
class Claims:
    objects: tuple[ObjectClaim, ...]
    background: str | None
    style: str | None
    relations: tuple[Relation, ...]


@dataclass(frozen=True)
class Caption:
    text: str
    claims: Claims

    def phrases(self) -> tuple[str, ...]:
        return tuple(self.text[slice(*claim.span)] for claim in self.claims.objects)


def caption(scene: Scene, rng: Generator, form: Literal["short", "long"] = "short") -> Caption:
    if form not in ("short", "long"):
        raise ValueError(f'{form!r} is not a form of caption. Use "short" or "long".')
    return (short_caption if form == "short" else long_caption)(scene, rng)


def short_caption(scene: Scene, rng: Generator) -> Caption:
    """Up to about fifteen words; which of size, place, background and style are said varies."""
    objects = [scene.objects[i] for i in rng.permutation(len(scene.objects))]
    count = len(objects)
    costs = {"size": count, "style": count, "place": 4 * count, "background": 4}
    said, words = set(), 4 * count - 1
    for topic in rng.permutation(list(costs)):
        if words + costs[topic] <= SHORT_WORDS and (rng.random() < 0.6 or words < 5):
            said.add(str(topic))
            words += costs[topic]

    style = pick(STYLE_WORDS[scene.style], rng) if "style" in said else None
    style_of_each = style is not None and rng.random() < 0.6
    phrases = []
    for item in objects:
        adjectives = [style] if style_of_each else []
        phrase = "a " + marked(item, rng, adjectives, with_size="size" in said)
        if "place" in said:
            phrase += " " + pick(PLACE_WORDS[item.place], rng)
        phrases.append(phrase)

    text = listed(phrases)
    if style and not style_of_each:
        text = pick(SHORT_STYLES, rng).format(style=style, objects=text)
    if "background" in said:
        text += " on " + background_phrase(scene, rng)
    return unmarked(text, scene, objects, said, ())


def long_caption(scene: Scene, rng: Generator) -> Caption:
    """Several sentences that say everything; 25 to 60 words."""
    objects = [scene.objects[i] for i in rng.permutation(len(scene.objects))]
    count = len(objects)

    opening = pick(LONG_OPENINGS, rng).format(
        count=pick(COUNT_WORDS[count - 1], rng), background=background_phrase(scene, rng)
    )
    sentences = [
        pick(LONG_OBJECTS, rng).format(
            object="a " + marked(item, rng, [], with_size=True), place=pick(PLACE_WORDS[item.place], rng)
        )
        for item in objects
    ]
    relations = ()
    if count == 2 and rng.random() < 0.6:
        relations = random_relation(objects, rng)
    for relation in relations:
        subject, other = objects[relation.subject], objects[relation.object]
        sentences.append(
            LONG_RELATION.format(
                subject=f"{subject.color} {subject.shape}",
                relation=pick(RELATION_WORDS[relation.side], rng),
                object=f"{other.color} {other.shape}",
            )
        )
    sentences.append(pick(LONG_STYLES, rng).format(style=pick(STYLE_WORDS[scene.style], rng)))
    if count == 1 or (count == 2 and not relations):
        sentences.append(pick(LONG_ENDINGS, rng))

    return unmarked(" ".join([opening, *sentences]), scene, objects, EVERYTHING, relations)


def random_relation(objects: list[SceneObject], rng: Generator) -> tuple[Relation, ...]:
    """One relation that is plain to see between the first two objects, or none."""
    first, second = objects[:2]
    sides = []
    if abs(first.x - second.x) > RELATION_DISTANCE:
        sides.append("left" if first.x < second.x else "right")
    if abs(first.y - second.y) > RELATION_DISTANCE:
        sides.append("above" if first.y < second.y else "below")
    return (Relation(0, pick(sides, rng), 1),) if sides else ()


def pick(options, rng: Generator) -> str:
    return options[rng.integers(len(options))]


def listed(phrases: list[str]) -> str:
    return " and ".join([", ".join(phrases[:-1]), phrases[-1]]) if len(phrases) > 1 else phrases[0]


def background_phrase(scene: Scene, rng: Generator) -> str:
    return pick(BACKGROUND_TEMPLATES, rng).format(background=scene.background)


def marked(item: SceneObject, rng: Generator, adjectives: list[str], with_size: bool) -> str:
    """The words naming an object, in brackets that `unmarked` turns into a span."""
    if with_size:
        adjectives = [*adjectives, pick(SIZE_WORDS[item.size], rng)]
        rng.shuffle(adjectives)
    return f"[{' '.join([*adjectives, item.color, item.shape])}]"


def unmarked(
    text: str, scene: Scene, objects: list[SceneObject], said: set[str], relations: tuple[Relation, ...]
) -> Caption:
    text = re.sub(r"\ba (?=\[?[aeiou])", "an ", text)
    spans = [(m.start() - 2 * i, m.end() - 2 * i - 2) for i, m in enumerate(re.finditer(r"\[[^]]*\]", text))]
    return Caption(re.sub(r"[\[\]]", "", text), claims_about(scene, objects, said, relations, spans))


def claims_about(
    scene: Scene,
    objects: Sequence[SceneObject],
    said: set[str],
    relations: tuple[Relation, ...],
    spans: Sequence[tuple[int, int] | None],
) -> Claims:
    return Claims(
        objects=tuple(
            ObjectClaim(
                shape=item.shape,
                color=item.color,
                size=item.size if "size" in said else None,
                place=item.place if "place" in said else None,
                span=span,
            )
            for item, span in zip(objects, spans, strict=True)
        ),
        background=scene.background if "background" in said else None,
        style=scene.style if "style" in said else None,
        relations=relations,
    )


def full_claims(scene: Scene) -> Claims:
    """Everything there is to say about a scene except relations, which follow from it; without a text, no spans."""
    return claims_about(scene, scene.objects, EVERYTHING, (), [None] * len(scene.objects))


def vocabulary() -> tuple[str, ...]:
    """Every word a caption may use, sorted; commas and full stops are not words."""
    tables = (SIZE_WORDS, PLACE_WORDS, STYLE_WORDS, RELATION_WORDS)
    texts = [
        "a an and on",
        *SHAPES,
        *COLORS,
        *BACKGROUNDS,
        *(words for table in tables for options in table.values() for words in options),
        *(words for options in COUNT_WORDS for words in options),
        *SHORT_STYLES,
        *BACKGROUND_TEMPLATES,
        *LONG_OPENINGS,
        *LONG_OBJECTS,
        *LONG_STYLES,
        LONG_RELATION,
        *LONG_ENDINGS,
    ]
    return tuple(sorted(set(re.findall(r"[a-z]+", re.sub(r"\{\w+\}", " ", " ".join(texts))))))
