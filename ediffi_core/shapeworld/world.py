"""World: what a scene consists of, and how one is drawn at random.

Positions and lengths are fractions of the image side, x to the right and y down, so a scene has no resolution.
Colours are sRGB in [0, 1] and are averaged in sRGB, as image resizing does.
"""

import math
from dataclasses import dataclass

from numpy.random import Generator

SHAPES = ("circle", "square", "triangle", "star", "cross", "heart")

COLORS = {
    "red": (0.86, 0.10, 0.12),
    "orange": (0.94, 0.50, 0.05),
    "yellow": (0.94, 0.86, 0.12),
    "green": (0.12, 0.62, 0.22),
    "cyan": (0.08, 0.78, 0.84),
    "blue": (0.12, 0.26, 0.86),
    "purple": (0.52, 0.16, 0.72),
    "pink": (0.94, 0.50, 0.74),
}

BACKGROUNDS = {
    "white": (0.95, 0.95, 0.95),
    "gray": (0.56, 0.56, 0.56),
    "black": (0.05, 0.05, 0.05),
    "beige": (0.88, 0.80, 0.66),
}

SIZES = {"small": (0.115, 0.13), "large": (0.185, 0.205)}  # radius, lowest and highest
SIZE_BORDER = 0.155  # small below, large above

PLACES = (
    "top left",
    "top",
    "top right",
    "left",
    "center",
    "right",
    "bottom left",
    "bottom",
    "bottom right",
)
PLACE_BORDERS = (0.37, 0.63)  # between left, centre and right, and between top, centre and bottom

STYLES = ("flat", "striped", "dotted", "hatched", "outlined", "grainy")

REACH = 1.16  # no shape extends further than this many radii from its position
MARGIN = 0.015  # least distance from an object to the frame
GAP = 0.02  # least distance between two objects
JITTER = 0.035


@dataclass(frozen=True)
class SceneObject:
    shape: str
    color: str
    size: str
    place: str
    x: float
    y: float
    radius: float

    def __post_init__(self):
        for name, value, known in (
            ("shape", self.shape, SHAPES),
            ("color", self.color, COLORS),
            ("size", self.size, SIZES),
            ("place", self.place, PLACES),
        ):
            if value not in known:
                raise ValueError(f"{value!r} is not a {name} of Shapeworld. Use one of: {', '.join(known)}.")


@dataclass(frozen=True)
class Scene:
    objects: tuple[SceneObject, ...]
    background: str
    style: str
    seed: int  # of the grain and the paper

    def __post_init__(self):
        for name, value, known in (("background", self.background, BACKGROUNDS), ("style", self.style, STYLES)):
            if value not in known:
                raise ValueError(f"{value!r} is not a {name} of Shapeworld. Use one of: {', '.join(known)}.")


def place_at(x: float, y: float) -> str:
    column = sum(x > border for border in PLACE_BORDERS)
    row = sum(y > border for border in PLACE_BORDERS)
    return PLACES[3 * row + column]


def random_object(rng: Generator, shape: str, color: str, place: str) -> SceneObject:
    size = ("small", "large")[rng.integers(2)]
    radius = rng.uniform(*SIZES[size])
    edge = max(REACH * radius + MARGIN, 0.2)  # small objects keep away from the corners too

    row, column = divmod(PLACES.index(place), 3)
    x, y = (
        (edge + rng.uniform(0, JITTER), 0.5 + rng.uniform(-JITTER, JITTER), 1 - edge - rng.uniform(0, JITTER))[cell]
        for cell in (column, row)
    )
    return SceneObject(shape, color, size, place, float(x), float(y), float(radius))


def apart(a: SceneObject, b: SceneObject) -> bool:
    return math.hypot(a.x - b.x, a.y - b.y) > REACH * (a.radius + b.radius) + GAP


def random_scene(rng: Generator, objects: int | None = None) -> Scene:
    """One to three objects that neither touch nor leave the frame, no two alike in shape and colour."""
    if objects is None:
        objects = int(rng.choice([1, 2, 3], p=[0.45, 0.4, 0.15]))
    if not 1 <= objects <= 3:
        raise ValueError(f"A scene holds one to three objects, got {objects}. Ask for 1, 2 or 3.")

    kinds = [(shape, color) for shape in SHAPES for color in COLORS]
    chosen = [kinds[i] for i in rng.choice(len(kinds), objects, replace=False)]
    placed = []
    while len(placed) < objects:
        places = rng.choice(len(PLACES), objects, replace=False)
        placed = []
        for (shape, color), place in zip(chosen, places, strict=True):
            candidate = random_object(rng, shape, color, PLACES[place])
            if not all(apart(candidate, other) for other in placed):
                break
            placed.append(candidate)

    background = list(BACKGROUNDS)[rng.integers(len(BACKGROUNDS))]
    style = "flat" if rng.random() < 0.5 else STYLES[1 + rng.integers(len(STYLES) - 1)]
    return Scene(tuple(placed), background, style, int(rng.integers(2**31)))
