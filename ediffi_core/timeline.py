"""The timeline of an ensemble: which expert denoises which step, as data and as a picture.

Sigma lies on a logarithmic axis with high noise at the left, because sampling runs from there to the right. Everything
is listed from high to low noise: experts, colours, the steps of a decreasing schedule.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from .intervals import NoiseInterval, check_partition
from .router import ExpertRouter

# Of the experts, from high to low noise. Found by search: at least 2.5 : 1 against white and against #222, and any two
# apart for normal sight and for each kind of colour blindness (tests/core/test_timeline.py). web/timeline.js has the same.
COLORS = ("#007373", "#a596f5", "#eb8214", "#8c50c8", "#05b996", "#b93719")
BACKGROUND, TEXT, FAINT = "#222222", "#eeeeee", "#a0a0a0"
SMALLEST = 5  # font size in pixels, for six experts on 320


@dataclass(frozen=True)
class Band:
    """One expert on the timeline. cfg: None where it takes the sampler's."""

    name: str
    interval: NoiseInterval
    cfg: float | None = None


@dataclass(frozen=True)
class Timeline:
    """Experts from high to low noise, and the levels of a schedule, (S + 1) of them or none.

    A schedule usually decreases and ends in 0; it may climb back up. range: lowest and highest sigma of the model.
    Raises ValueError for intervals with a gap or an overlap.
    """

    experts: tuple[Band, ...]
    sigmas: tuple[float, ...]
    range: tuple[float, float]

    def __post_init__(self) -> None:
        check_partition([band.interval for band in self.experts])

    @property
    def plan(self) -> list[int]:
        """The expert of each of the S steps, by the level the step starts from."""
        router = ExpertRouter([band.interval for band in self.experts])
        return router.plan(torch.tensor(self.sigmas, dtype=torch.float64))

    def as_dict(self) -> dict:
        """For JSON, which knows no infinity: `high` of the noisiest expert may be None."""
        experts = [
            {"name": band.name, "low": band.interval.low, "high": finite(band.interval.high), "cfg": band.cfg}
            for band in self.experts
        ]
        return {"sigmas": list(self.sigmas), "experts": experts, "plan": self.plan, "range": list(self.range)}


def draw(timeline: Timeline, width: int = 1024, height: int = 384) -> Tensor:
    """A picture, (H, W, 3) float32 in [0, 1].

    Above, what each expert is; then its band; then a mark for each step at the sigma it starts from, in its expert's
    colour, and a grey one where the schedule ends. A schedule that climbs back up goes on one row lower. Sigma 0, which
    a logarithm cannot show, stands apart at the right end.
    """
    from PIL import Image, ImageDraw, ImageFont  # here: the core is imported where no Pillow is

    # the largest font with which all text has room
    for size in range(max(SMALLEST, round(min(width / 40, height / 22))), SMALLEST - 1, -1):
        sheet = Sheet(timeline, width, height, ImageFont.load_default(size), size)
        if sheet.fits:
            break
    picture = Image.new("RGB", (width, height), BACKGROUND)
    sheet.draw(ImageDraw.Draw(picture))
    pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return pixels.view(height, width, 3).float() / 255


class Sheet:
    """A timeline laid out in one font size. Lengths are in pixels."""

    def __init__(self, timeline: Timeline, width: int, height: int, font, size: int) -> None:
        self.timeline = timeline
        self.font = font
        self.line = sum(font.getmetrics())
        self.pad = pad = size
        self.left, self.right = pad, width - 1 - pad
        self.zero = self.right - pad  # column of sigma 0
        self.end = self.zero - 2 * pad if 0 in timeline.sigmas else self.right  # of the axis

        edges = {edge for band in timeline.experts for edge in (band.interval.low, band.interval.high)}
        levels = [level for level in (*edges, *timeline.sigmas, *timeline.range) if 0 < level < math.inf]
        self.low, self.high = min(levels, default=1.0), max(levels, default=1.0)
        if self.low == self.high:
            self.low /= 2

        room = (width - 2 * pad) / len(timeline.experts) - pad / 2
        self.blocks = [self.block(expert, room) for expert in range(len(timeline.experts))]
        self.labels = {self.high: f"sigma {short(self.high)}"}  # level -> text, from high to low noise
        self.labels |= {edge: short(edge) for edge in sorted(edges, reverse=True) if self.low < edge < self.high}
        self.labels[self.low] = short(self.low)
        if 0 in timeline.sigmas:
            self.labels[0.0] = "0"

        self.bands = pad + max(map(len, self.blocks)) * self.line + pad
        self.floor = height - 1 - pad - self.line - pad
        marked = 0.55 if timeline.sigmas else 0
        self.rows = round(self.bands + (self.floor - self.bands) * (1 - marked))
        needed = [sum(map(self.block_width, self.blocks)), sum(map(self.text_width, self.labels.values()))]
        self.fits = (
            max(needed) <= width - 2 * pad
            and all(self.block_width(block) <= room + pad / 2 for block in self.blocks)
            and self.floor - self.bands >= 3 * pad
        )

    def column(self, sigma: float) -> int:
        if sigma <= 0:
            return self.zero
        share = math.log(self.high / sigma) / math.log(self.high / self.low)
        return round(self.left + share * (self.end - self.left))

    def block(self, expert: int, room: float) -> list[str]:
        """What stands above a band; only the name may be shortened."""
        band = self.timeline.experts[expert]
        lines = [self.shortened(" ".join(band.name.split()), room), interval_text(band.interval)]
        if self.timeline.sigmas:
            steps = self.timeline.plan.count(expert)
            lines.append(f"{steps} step{'' if steps == 1 else 's'}")
        if band.cfg is not None:
            lines.append(f"cfg {short(band.cfg)}")
        return lines

    def shortened(self, text: str, room: float) -> str:
        if self.font.getlength(text) <= room:
            return text
        while text and self.font.getlength(text + "…") > room:
            text = text[:-1]
        return text.rstrip() + "…"

    def text_width(self, text: str) -> float:
        return self.font.getlength(text) + self.pad / 2

    def block_width(self, lines: list[str]) -> float:
        return max(map(self.text_width, lines))

    def draw(self, on) -> None:
        """on: a PIL.ImageDraw."""
        self.draw_bands(on)
        if self.timeline.sigmas:
            self.draw_steps(on)
        self.draw_labels(on)

    def draw_bands(self, on) -> None:
        spans = []
        for number, band in enumerate(self.timeline.experts):
            first = self.left if band.interval.high >= self.high else self.column(band.interval.high)
            last = self.end if band.interval.low <= self.low else self.column(band.interval.low) - 1
            spans.append((first, max(first, last)))
            on.rectangle((*(first, self.bands), *(spans[-1][1], self.floor)), fill=mixed(COLORS[number], 0.25))
            on.rectangle((*(first, self.bands), *(spans[-1][1], self.rows)), fill=COLORS[number])
        middles = [sum(span) / 2 for span in spans]
        places = spread(middles, list(map(self.block_width, self.blocks)), self.left, self.right + 1)
        for number, (lines, middle, place) in enumerate(zip(self.blocks, middles, places, strict=True)):
            top = self.bands - self.pad - len(lines) * self.line
            for row, text in enumerate(lines):
                on.text((place, top + row * self.line), text, TEXT if row == 0 else FAINT, self.font, "ma")
            on.line((place, self.bands - self.pad + 2, middle, self.bands), COLORS[number], max(1, self.pad // 8))

    def draw_steps(self, on) -> None:
        sigmas, plan = self.timeline.sigmas, self.timeline.plan
        falls = [0, *(int(after > before) for before, after in pairwise(sigmas))]
        row_height = (self.floor - self.rows) / (1 + sum(falls))
        row, thick = 0, max(1, self.pad // 8)
        for step, sigma in enumerate(sigmas):
            row += falls[step]
            left = self.column(sigma) - thick // 2
            top, bottom = self.rows + row * row_height, self.rows + (row + 1) * row_height
            color = COLORS[plan[step]] if step < len(plan) else FAINT
            on.rectangle((left, round(top) + 1, left + thick - 1, max(round(top) + 1, round(bottom))), fill=color)

    def draw_labels(self, on) -> None:
        columns = [self.column(level) for level in self.labels]
        widths = list(map(self.text_width, self.labels.values()))
        places = spread(columns, widths, self.left, self.right + 1)
        for text, column, place in zip(self.labels.values(), columns, places, strict=True):
            on.line((column, self.floor + 1, place, self.floor + self.pad - 2), FAINT)
            on.text((place, self.floor + self.pad), text, TEXT, self.font, "ma")


def spread(wanted: Sequence[float], widths: Sequence[float], low: float, high: float) -> list[float]:
    """Centres for things in a row, near those wanted, so that none overlap. Together they must fit into [low, high]."""

    def pushed(centers, widths, edge):
        placed = []
        for center, width in zip(centers, widths, strict=True):
            placed.append(max(center, edge + width / 2))
            edge = placed[-1] + width / 2
        return placed

    def pulled(centers, widths, edge):
        mirrored = pushed([-center for center in reversed(centers)], list(reversed(widths)), -edge)
        return [-center for center in reversed(mirrored)]

    # Both are without overlap and in order, hence so is their mean, which favours neither side.
    rightward = pulled(pushed(wanted, widths, low), widths, high)
    leftward = pushed(pulled(wanted, widths, high), widths, low)
    return [(one + other) / 2 for one, other in zip(rightward, leftward, strict=True)]


def interval_text(interval: NoiseInterval) -> str:
    if interval.high == math.inf:
        return f"from {short(interval.low)} up" if interval.low else "every sigma"
    return f"{short(interval.high)} to {short(interval.low)}" if interval.low else f"below {short(interval.high)}"


def short(number: float) -> str:
    return f"{number:.4g}"


def finite(number: float) -> float | None:
    return number if number < math.inf else None


def mixed(color: str, share: float) -> str:
    """`share` of a colour on the background."""
    channels = [(int(color[i : i + 2], 16), int(BACKGROUND[i : i + 2], 16)) for i in (1, 3, 5)]
    return "#" + "".join(f"{round(share * over + (1 - share) * under):02x}" for over, under in channels)
