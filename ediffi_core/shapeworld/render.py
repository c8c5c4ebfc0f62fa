"""Render: a scene as a picture, at any resolution.

A pixel is the average of the continuous scene over its square, so a small picture equals the area-downsampled large
one: edges through signed distances (negative inside), waves through their exact average (a sinc per axis).
The patterns of styles lie on the whole picture, as on printed paper, and objects show their part of it: so a
pattern follows from style and position alone.
What lies beyond 32 cycles per image (paper, weave, the ink line) shows at 256 and 1024 only.
"""

import math

import numpy as np
from numpy import ndarray

from .world import BACKGROUNDS, COLORS, REACH, Scene, SceneObject

SHADE = 0.5  # brightness of the dark parts of a style, relative to the object's colour

STRIPE_PERIOD = 1 / 12
DOT_PERIOD = 1 / 12
DOT_RADIUS = 0.027
HATCH_PERIOD = 1 / math.sqrt(128)  # across the lines; 8 along each side of the picture
HATCH_WIDTH = 0.026
OUTLINE_WIDTH = 0.034
GRAIN_BAND = (10.0, 18.0)  # cycles per image
GRAIN_WAVES = 24

INK_WIDTH = 0.004
INK_SHADE = 0.55
WEAVES = ((80.0, 0.05), (272.0, 0.05))  # cycles per image, amplitude relative to the object's colour
PAPERS = ((70.0, 118.0, 0.012), (210.0, 470.0, 0.012))  # band in cycles per image, standard deviation
PAPER_WAVES = 24


def shape_distance(shape: str, u: ndarray, v: ndarray) -> ndarray:
    """Signed distance to a shape of radius 1 around the origin; u points right, v down."""
    if shape == "circle":
        return np.hypot(u, v) - 1
    if shape == "square":
        return np.maximum(np.abs(u), np.abs(v)) - 0.82
    if shape == "triangle":
        slope = math.cos(math.pi / 6) * np.abs(u) - 0.5 * (v - 0.2)
        return np.maximum(slope, v - 0.2) - 0.58
    if shape == "star":
        return star_distance(u, v + 0.04)
    if shape == "cross":
        u, v = np.abs(u), np.abs(v)
        return np.maximum(np.minimum(u, v) - 0.36, np.maximum(u, v) - 1)
    if shape == "heart":
        return heart_distance(u, v)
    raise ValueError(f"{shape!r} is not a shape of Shapeworld.")


def star_distance(u: ndarray, v: ndarray, tip: float = 1.12, notch: float = 0.48) -> ndarray:
    """Folded into a tenth of the turn, the outline is the line from a tip to the notch beside it."""
    tenth = math.pi / 5
    angle = np.arctan2(u, -v)
    folded = np.abs((angle + tenth) % (2 * tenth) - tenth)
    radius = np.hypot(u, v)

    rise, run = notch * math.sin(tenth), tip - notch * math.cos(tenth)
    length = math.hypot(rise, run)
    return ((radius * np.cos(folded) - tip) * rise + radius * np.sin(folded) * run) / length


def heart_distance(u: ndarray, v: ndarray) -> ndarray:
    """Two discs on the upper sides of a square that stands on its corner."""
    u, v = np.abs(u), v - 0.09
    side = 0.62  # half of the square's, and the radius of the discs
    diamond = (u + np.abs(v)) / math.sqrt(2) - side
    lobe = side / math.sqrt(2)
    return np.minimum(diamond, np.hypot(u - lobe, v + lobe) - side)


def coverage(distance: ndarray, resolution: int) -> ndarray:
    """Share of a pixel on the negative side of an edge."""
    return np.clip(0.5 - distance * resolution, 0, 1)


def line_share(offset: ndarray, period: float, width: float, resolution: int) -> ndarray:
    """Share of a pixel on lines of this width, one at every multiple of the period."""
    from_line = np.abs((offset + period / 2) % period - period / 2)
    return coverage(from_line - width / 2, resolution) - coverage(from_line + width / 2, resolution)


def dark_share(style: str, distance: ndarray, x: ndarray, y: ndarray, resolution: int) -> ndarray | float:
    """Share of a pixel that a style darkens. x, y: in the picture; distance: to the object's edge; all in image sides."""
    if style == "flat":
        return 0.0
    if style == "striped":
        return np.broadcast_to(line_share(y, STRIPE_PERIOD, STRIPE_PERIOD / 2, resolution), distance.shape)
    if style == "dotted":
        x, y = (w % DOT_PERIOD - DOT_PERIOD / 2 for w in (x, y))
        return coverage(np.hypot(x, y) - DOT_RADIUS, resolution)
    if style == "hatched":
        falling, rising = (x + y) / math.sqrt(2), (x - y) / math.sqrt(2)
        light = 1.0
        for offset in (falling, rising):
            light = light * (1 - line_share(offset, HATCH_PERIOD, HATCH_WIDTH, resolution))
        return 1 - light
    if style == "outlined":
        return 1 - coverage(distance + OUTLINE_WIDTH, resolution)
    raise ValueError(f"{style!r} is not a style with a fixed pattern.")


class Waves:
    """A sum of plane waves with unit variance: smooth random texture of a chosen fineness."""

    def __init__(self, rng: np.random.Generator, low: float, high: float, count: int):
        frequency = rng.uniform(low, high, count)
        angle = rng.uniform(0, 2 * math.pi, count)
        self.fx, self.fy = frequency * np.cos(angle), frequency * np.sin(angle)
        self.phase = rng.uniform(0, 2 * math.pi, count)
        self.amplitude = math.sqrt(2 / count)

    def sample(self, x: ndarray, y: ndarray, resolution: int) -> ndarray:
        """Pixel averages at x: (W,) and y: (H,); waves that average out are skipped. Returns (H, W)."""
        gain = np.sinc(self.fx / resolution) * np.sinc(self.fy / resolution)
        heard = np.abs(gain) > 0.05
        turn_x = 2 * math.pi * np.outer(x, self.fx[heard])
        turn_y = 2 * math.pi * np.outer(y, self.fy[heard]) + self.phase[heard]

        weight = self.amplitude * gain[heard]
        return (np.cos(turn_y) * weight) @ np.cos(turn_x).T - (np.sin(turn_y) * weight) @ np.sin(turn_x).T


def weave(u: ndarray, v: ndarray, resolution: int) -> ndarray | float:
    """Threads through an object; u: (W,), v: (H,). Returns (H, W), around zero."""
    total = 0.0
    for frequency, amplitude in WEAVES:
        gain = np.sinc(frequency / resolution)
        if gain**2 > 0.05:
            across, down = (gain * np.cos(2 * math.pi * frequency * w) for w in (u, v))
            total = total + amplitude * np.outer(down, across)
    return total


def paint(image: ndarray, corner: tuple[int, int], resolution: int, item: SceneObject, style: str,
          grain: Waves | None) -> None:  # fmt: skip
    """Draws one object over the image, (H, W, 3): the part of the picture that begins at corner (left, top)."""
    reach = REACH * item.radius + 1 / resolution
    (left, right), (top, bottom) = (
        (max(math.floor((c - reach) * resolution), start), min(math.ceil((c + reach) * resolution), start + side))
        for c, start, side in zip((item.x, item.y), corner, (image.shape[1], image.shape[0]), strict=True)
    )
    if left >= right or top >= bottom:
        return
    window = image[top - corner[1] : bottom - corner[1], left - corner[0] : right - corner[0]]
    x = (np.arange(left, right) + 0.5) / resolution
    y = (np.arange(top, bottom) + 0.5) / resolution
    u, v = x[None, :] - item.x, y[:, None] - item.y

    distance = item.radius * shape_distance(item.shape, u / item.radius, v / item.radius)
    inside = coverage(distance, resolution)
    ink = inside - coverage(distance + INK_WIDTH, resolution)

    if grain is None:
        dark = dark_share(style, distance, x[None, :], y[:, None], resolution)
    else:
        dark = np.clip(0.5 + 0.5 * grain.sample(x, y, resolution), 0, 1)
    shade = 1 - (1 - SHADE) * dark + weave(u[0], v[:, 0], resolution)
    paint_share = shade * (inside - (1 - INK_SHADE) * ink)

    color = np.array(COLORS[item.color], np.float32)
    window *= (1 - inside)[..., None].astype(np.float32)
    window += paint_share[..., None].astype(np.float32) * color


def render(scene: Scene, resolution: int, window: tuple[int, int, int, int] | None = None) -> ndarray:
    """(H, W, 3) float32 in [0, 1]: the picture of `resolution` pixels a side, or only its window.

    window: left, top, width and height in pixels. What it shows is the same as in the whole picture, to rounding.
    """
    rng = np.random.default_rng(scene.seed)
    grain = Waves(rng, *GRAIN_BAND, GRAIN_WAVES)
    papers = [(Waves(rng, low, high, PAPER_WAVES), deviation) for low, high, deviation in PAPERS]

    left, top, width, height = window or (0, 0, resolution, resolution)
    if min(left, top) < 0 or min(width, height) < 1 or left + width > resolution or top + height > resolution:
        raise ValueError(
            f"The window {window} (left, top, width, height) is not inside a picture of {resolution} pixels a side."
        )
    x, y = ((np.arange(start, start + side) + 0.5) / resolution for start, side in ((left, width), (top, height)))
    paper = sum(deviation * waves.sample(x, y, resolution) for waves, deviation in papers)
    image = np.array(BACKGROUNDS[scene.background], np.float32) + paper[..., None].astype(np.float32)
    for item in scene.objects:
        paint(image, (left, top), resolution, item, scene.style, grain if scene.style == "grainy" else None)
    return np.clip(image, 0, 1)


def as_uint8(image: ndarray) -> ndarray:
    return np.round(image * 255).astype(np.uint8)
