"""Shapeworld: a small world of coloured shapes that can be drawn, described and read back exactly.

A scene is drawn by `render` at any resolution, described by `caption`, and recovered from a picture by `read`;
`score` compares what a caption claims with what a picture shows.
"""

from .captions import Caption, Claims, ObjectClaim, Relation, caption, full_claims, vocabulary
from .reader import ObjectReading, Reading, Score, Tally, read, score
from .render import as_uint8, render
from .world import BACKGROUNDS, COLORS, PLACES, SHAPES, SIZES, STYLES, Scene, SceneObject, place_at, random_scene

__all__ = [
    "BACKGROUNDS",
    "COLORS",
    "PLACES",
    "SHAPES",
    "SIZES",
    "STYLES",
    "Caption",
    "Claims",
    "ObjectClaim",
    "ObjectReading",
    "Reading",
    "Relation",
    "Scene",
    "SceneObject",
    "Score",
    "Tally",
    "as_uint8",
    "caption",
    "full_claims",
    "place_at",
    "random_scene",
    "read",
    "render",
    "score",
    "vocabulary",
]
