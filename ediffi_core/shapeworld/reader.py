"""Reader: what a picture shows, and whether a caption's claims hold in it.

Reading happens at 64 pixels, to which any picture is averaged: background from the frame, objects as connected
regions, each shape as the drawn one that overlaps best, the style as the drawn pattern that explains the brightness
inside the objects. Pictures may be noisy, blurred or wrong; what cannot be told is None.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import permutations
from typing import NamedTuple

import numpy as np
from numpy import ndarray
from scipy import ndimage
from scipy.special import ndtr

from .captions import Caption, Claims, Relation
from .render import DOT_PERIOD, HATCH_PERIOD, STRIPE_PERIOD, coverage, dark_share, shape_distance
from .world import BACKGROUNDS, COLORS, SHAPES, SIZE_BORDER, STYLES, place_at

RESOLUTION = 64

BACKGROUND_TOLERANCE = 0.2  # distance in RGB, below half of that between any two backgrounds
FOREGROUND_CONTRAST = 0.16  # distance from the background; half of the faintest pair, dark green on black
NOISY = 0.02  # standard deviation above which a picture is smoothed before objects are separated
OBJECT_CONTRAST = 0.24  # of a region's clearest parts; fainter ones are stains
SMALLEST_REGION = 25  # pixels; the smallest object, a small star, covers 80
SMALLEST_PART = 0.1  # share of a region that another colour needs to count as an object of its own
COLOR_TOLERANCE = 0.94  # cosine between a region's colour and a named one
LEAST_FIT = 0.6  # intersection over union below which a shape is not told
FLAT_VARIATION = 0.06  # standard deviation of brightness relative to its mean; least for a pattern
GRAIN_VARIATION = 0.075  # least for variation that no pattern explains
PATTERN_SHARE = 0.42  # of the variation that a pattern must explain; grain reaches 0.39
MOST_OBJECTS = 6

SQUARE = np.ones((3, 3))


@dataclass(frozen=True)
class ObjectReading:
    shape: str | None
    color: str | None
    size: str
    place: str
    x: float
    y: float
    radius: float
    fit: float  # intersection over union with the best drawn shape


@dataclass(frozen=True)
class Reading:
    objects: tuple[ObjectReading, ...]  # largest first
    background: str | None
    style: str | None


class Region(NamedTuple):
    mask: ndarray  # (H, W) bool
    cover: ndarray  # (H, W) share of each pixel that belongs to the region
    color: ndarray  # (3,) mean colour of its inside


class Placed(NamedTuple):
    shape: str
    x: float
    y: float
    radius: float
    fit: float


def read(image: ndarray) -> Reading:
    """image: (H, W, 3) uint8, or float in [0, 1]."""
    picture = averaged(image)
    frame = np.concatenate([rim.reshape(-1, 3) for rim in (picture[:2], picture[-2:], picture[:, :2], picture[:, -2:])])
    background = np.median(frame, axis=0)
    noise = 1.48 * np.median(np.abs(frame - background))

    objects, patterns = [], []
    for region in regions(picture, background, noise):
        placed = best_shape(region.cover)
        objects.append(object_reading(region, placed))
        patterns.append(Pattern(picture, region, placed))
    return Reading(tuple(objects), nearest_background(background), common_style(patterns))


def averaged(image: ndarray) -> ndarray:
    """Area average on RESOLUTION x RESOLUTION pixels, in [0, 1]."""
    image = np.asarray(image)
    if image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(
            f"A picture to read has shape {image.shape}, expected (H, W, 3). Pass one RGB picture at a time."
        )
    if image.dtype != np.uint8 and image.dtype.kind != "f":
        raise ValueError(
            f"A picture to read holds {image.dtype}, expected uint8, or float in [0, 1]. Convert it first."
        )
    picture = image / 255 if image.dtype == np.uint8 else np.clip(np.nan_to_num(image.astype(float)), 0, 1)
    height, width = picture.shape[:2]
    return np.einsum("ih,hwc,jw->ijc", overlaps(height), picture, overlaps(width), optimize=True)


@cache
def overlaps(size: int) -> ndarray:
    """Share of each of RESOLUTION cells covered by each of `size` cells of the same line. Returns (RESOLUTION, size)."""
    low, high = np.arange(RESOLUTION)[:, None] / RESOLUTION, np.arange(size) / size
    shared = np.minimum(low + 1 / RESOLUTION, high + 1 / size) - np.maximum(low, high)
    return np.clip(shared, 0, None) * RESOLUTION


def nearest_background(color: ndarray) -> str | None:
    distances = {name: np.linalg.norm(color - np.array(value)) for name, value in BACKGROUNDS.items()}
    name = min(distances, key=distances.get)
    return name if distances[name] < BACKGROUND_TOLERANCE else None


def color_cosines(colors: ndarray) -> ndarray:
    """Likeness of hues regardless of brightness; colors: (..., 3). Returns (..., number of COLORS)."""
    named = np.array(list(COLORS.values()))
    named = named / np.linalg.norm(named, axis=-1, keepdims=True)
    return colors @ named.T / np.maximum(np.linalg.norm(colors, axis=-1, keepdims=True), 1e-6)


def nearest_color(color: ndarray) -> str | None:
    cosines = color_cosines(color)
    return list(COLORS)[cosines.argmax()] if cosines.max() > COLOR_TOLERANCE else None


def regions(picture: ndarray, background: ndarray, noise: float) -> list[Region]:
    """Connected regions that differ from the background, split where they change colour; largest first."""
    smooth = ndimage.gaussian_filter(picture, (0.8, 0.8, 0)) if noise > NOISY else picture
    contrast = np.linalg.norm(smooth - background, axis=-1)
    labels, count = ndimage.label(ndimage.binary_fill_holes(contrast > FOREGROUND_CONTRAST))

    found = []
    for label in range(1, count + 1):
        mask = labels == label
        if np.quantile(contrast[mask], 0.9) < OBJECT_CONTRAST:
            continue
        cover = soft_cover(contrast, mask)
        mask = cover > 0.5
        if mask.sum() >= SMALLEST_REGION:
            for side in single_colored(smooth, mask):
                part = mask & side
                found.append(Region(part, cover * side, picture[eroded(part)].mean(axis=0)))
    found.sort(key=lambda region: region.mask.sum(), reverse=True)
    return found[:MOST_OBJECTS]


def soft_cover(contrast: ndarray, mask: ndarray) -> ndarray:
    """Share of each pixel that belongs to a region: its contrast relative to the region's fainter parts."""
    near = ndimage.binary_dilation(mask, SQUARE)
    for _ in range(2):  # the first mask may hold a blurred rim, which is fainter still
        faint = max(np.quantile(contrast[eroded(mask)], 0.1), FOREGROUND_CONTRAST)
        cover = np.clip(contrast / faint, 0, 1) * near
        mask = ndimage.binary_fill_holes(cover > 0.5)
    return np.maximum(cover, eroded(mask))


def single_colored(picture: ndarray, mask: ndarray) -> list[ndarray]:
    """Cuts the picture into sides, one per colour that fills a fair share of the region in one piece."""
    hues = color_cosines(ndimage.gaussian_filter(picture, (0.8, 0.8, 0))).argmax(-1)
    inside = eroded(mask)
    least = max(SMALLEST_REGION, SMALLEST_PART * inside.sum())

    seeds = np.zeros(mask.shape, int)
    for hue in np.unique(hues[inside]):
        labels, count = ndimage.label(inside & (hues == hue))
        for label in range(1, count + 1):
            piece = labels == label
            if piece.sum() >= least and ndimage.binary_erosion(piece, SQUARE).sum() >= 0.2 * piece.sum():
                seeds[piece] = seeds.max() + 1
    if seeds.max() < 2:
        return [np.ones(mask.shape, bool)]
    row, column = ndimage.distance_transform_edt(seeds == 0, return_distances=False, return_indices=True)
    return [seeds[row, column] == label for label in range(1, seeds.max() + 1)]


def eroded(mask: ndarray) -> ndarray:
    """The mask without its edge, where colours mix; thin masks are kept whole."""
    inside = ndimage.binary_erosion(mask, SQUARE)
    return inside if inside.sum() >= 12 else mask


@cache
def unit_moments(shape: str) -> tuple[float, float, float]:
    """Area and centre of mass (u, v) of a shape of radius 1."""
    axis = np.linspace(-1.2, 1.2, 241)
    u, v = np.meshgrid(axis, axis)
    inside = shape_distance(shape, u, v) < 0
    return float(inside.sum() * 0.01**2), float(u[inside].mean()), float(v[inside].mean())


def best_shape(cover: ndarray) -> Placed:
    """The drawn shape that overlaps best, in image sides."""
    rows, columns = (np.flatnonzero((cover > 0.1).any(axis=axis)) for axis in (1, 0))
    top, left = max(rows[0] - 2, 0), max(columns[0] - 2, 0)
    window = cover[top : rows[-1] + 3, left : columns[-1] + 3]
    x = (np.arange(left, left + window.shape[1]) + 0.5)[None, :] / RESOLUTION
    y = (np.arange(top, top + window.shape[0]) + 0.5)[:, None] / RESOLUTION
    total = window.sum()
    center_x, center_y = (window * x).sum() / total, (window * y).sum() / total

    starts = []
    for shape in SHAPES:
        area, u, v = unit_moments(shape)
        radius = math.sqrt(total / area) / RESOLUTION
        start = np.array([center_x - u * radius, center_y - v * radius, radius])
        starts.append(Placed(shape, *start, overlap(window, shape, x, y, start[None])[0]))
    hopeful = max(start.fit for start in starts) - 0.2
    return max((refined(window, x, y, start) for start in starts if start.fit > hopeful), key=lambda p: p.fit)


def overlap(window: ndarray, shape: str, x: ndarray, y: ndarray, candidates: ndarray) -> ndarray:
    """Intersection over union of a cover with shapes at candidates (S, 3), each x, y, radius. Returns (S,)."""
    center_x, center_y, radius = candidates.T[:, :, None, None]
    drawn = coverage(radius * shape_distance(shape, (x - center_x) / radius, (y - center_y) / radius), RESOLUTION)
    both = np.minimum(drawn, window).sum((1, 2))
    return both / np.maximum(drawn, window).sum((1, 2))


MOVES = np.concatenate([np.eye(3), -np.eye(3)]) / RESOLUTION


def refined(window: ndarray, x: ndarray, y: ndarray, start: Placed) -> Placed:
    """Walks to the best overlap in steps of one pixel, then a half, then a quarter."""
    best, fit = np.array([start.x, start.y, start.radius]), start.fit
    for stride in (1, 0.5, 0.25):
        for _ in range(4):
            candidates = best + stride * MOVES
            candidates[:, 2] = np.maximum(candidates[:, 2], 1 / RESOLUTION)
            fits = overlap(window, start.shape, x, y, candidates)
            if fits.max() <= fit:
                break
            best, fit = candidates[fits.argmax()], fits.max()
    return Placed(start.shape, *best, fit)


def object_reading(region: Region, placed: Placed) -> ObjectReading:
    x, y, radius = (float(value) for value in (placed.x, placed.y, placed.radius))
    return ObjectReading(
        shape=placed.shape if placed.fit >= LEAST_FIT else None,
        color=nearest_color(region.color),
        size="large" if radius > SIZE_BORDER else "small",
        place=place_at(x, y),
        x=x,
        y=y,
        radius=radius,
        fit=float(placed.fit),
    )


class Pattern:
    """Brightness inside one object, and how much of its variation each style explains."""

    def __init__(self, picture: ndarray, region: Region, placed: Placed):
        axis = (np.arange(RESOLUTION) + 0.5) / RESOLUTION
        x, y = np.meshgrid(axis, axis)
        u, v = (x - placed.x) / placed.radius, (y - placed.y) / placed.radius
        distance = placed.radius * shape_distance(placed.shape, u, v)
        inside = region.mask & (distance < -0.6 / RESOLUTION)
        if inside.sum() < 12:
            inside = region.mask

        self.x, self.y, self.distance = x[inside], y[inside], distance[inside]
        self.pixels = inside.sum()
        self.rim = np.stack([np.ones(self.pixels), ndtr(self.distance * RESOLUTION)], axis=1)  # as blur mixes it

        length = max(np.linalg.norm(region.color), 1e-6)
        direction = region.color / length
        varying = without(self.rim, picture[inside])
        self.brightness = varying @ direction / length
        hue = varying / length - np.outer(self.brightness, direction)
        self.noise = (hue**2).sum() / 2 / self.pixels  # styles leave hue alone, so what varies there is noise
        self.excess = max((self.brightness**2).mean() - self.noise, 0)

    def explained(self, style: str) -> float:
        """Most variance that the style's pattern explains, over where the pattern may start."""
        drawn = without(self.rim, np.stack(list(self.drawn(style)), axis=1))
        covariance = np.minimum(self.brightness @ drawn, 0) / self.pixels  # dark parts must be darker
        return float((covariance**2 / np.maximum((drawn**2).mean(axis=0), 1e-4)).max())

    def drawn(self, style: str) -> Iterator[ndarray]:
        if style == "outlined":
            for shift in (-0.01, 0, 0.01):
                yield dark_share(style, self.distance + shift, self.x, self.y, RESOLUTION)
            return
        period = {"striped": STRIPE_PERIOD, "dotted": DOT_PERIOD, "hatched": HATCH_PERIOD * math.sqrt(2)}[style]
        shifts = np.arange(6) / 6 * period
        for dx in shifts if style != "striped" else (0.0,):
            for dy in shifts:
                yield dark_share(style, self.distance, self.x + dx, self.y + dy, RESOLUTION)


def without(basis: ndarray, values: ndarray) -> ndarray:
    """What is left of values (P, ...) when the best mixture of the basis (P, K) is taken away."""
    return values - basis @ np.linalg.lstsq(basis, values, rcond=None)[0]


def common_style(patterns: list[Pattern]) -> str | None:
    """The style that fits all objects of a picture together."""
    if not patterns:
        return None
    pixels = sum(pattern.pixels for pattern in patterns)
    variation = math.sqrt(sum(pattern.pixels * pattern.excess for pattern in patterns) / pixels)
    if variation < FLAT_VARIATION:
        return "flat"

    total = pixels * variation**2
    shares = {
        style: sum(pattern.pixels * pattern.explained(style) for pattern in patterns) / total
        for style in STYLES
        if style not in ("flat", "grainy")
    }
    best = max(shares, key=shares.get)
    if shares[best] > PATTERN_SHARE:
        return best
    return "grainy" if variation > GRAIN_VARIATION else "flat"


class Tally(NamedTuple):
    right: int
    total: int


ATTRIBUTES = ("count", "color", "shape", "size", "place", "background", "style", "relations")


@dataclass(frozen=True)
class Score:
    """Right answers per attribute, out of what was claimed."""

    tallies: dict[str, Tally]

    def __getitem__(self, attribute: str) -> Tally:
        return self.tallies[attribute]

    def holds(self, *attributes: str) -> bool:
        return all(self[attribute].right == self[attribute].total for attribute in attributes)

    @property
    def all_right(self) -> bool:
        return self.holds(*ATTRIBUTES)

    @property
    def colors_right(self) -> bool:
        return self.holds("color")

    @property
    def colors_and_shapes_right(self) -> bool:
        return self.holds("color", "shape")


WEIGHTS = {"shape": 8, "color": 6, "place": 2, "size": 1}  # of agreements, when claims look for their objects


def score(claims: Claims | Caption, reading: Reading) -> Score:
    """Each claimed object is compared with one read object, chosen so that most agrees."""
    claims = claims.claims if isinstance(claims, Caption) else claims
    matched = best_matching(claims, reading)

    tallies = {"count": Tally(int(len(reading.objects) == len(claims.objects)), 1)}
    for attribute in WEIGHTS:
        claimed = [(getattr(c, attribute), m) for c, m in zip(claims.objects, matched, strict=True)]
        claimed = [(value, m) for value, m in claimed if value is not None]
        tallies[attribute] = Tally(sum(m is not None and getattr(m, attribute) == v for v, m in claimed), len(claimed))
    for attribute in ("background", "style"):
        value = getattr(claims, attribute)
        claimed = value is not None
        tallies[attribute] = Tally(int(claimed and value == getattr(reading, attribute)), int(claimed))
    tallies["relations"] = Tally(sum(relation_holds(r, matched) for r in claims.relations), len(claims.relations))
    return Score(tallies)


def best_matching(claims: Claims, reading: Reading) -> tuple[ObjectReading | None, ...]:
    candidates = [*reading.objects, *[None] * len(claims.objects)]

    def agreement(matching):
        return sum(
            weight
            for claim, item in zip(claims.objects, matching, strict=True)
            for attribute, weight in WEIGHTS.items()
            if item is not None and getattr(claim, attribute) == getattr(item, attribute) is not None
        )

    return max(permutations(candidates, len(claims.objects)), key=agreement)


def relation_holds(relation: Relation, matched: tuple[ObjectReading | None, ...]) -> bool:
    subject, other = matched[relation.subject], matched[relation.object]
    if subject is None or other is None:
        return False
    return {
        "left": subject.x < other.x,
        "right": subject.x > other.x,
        "above": subject.y < other.y,
        "below": subject.y > other.y,
    }[relation.side]
