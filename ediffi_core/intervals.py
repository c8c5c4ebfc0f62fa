"""Noise intervals: the part of the noise range an expert is responsible for, and how training noise is drawn from it.

Sigma is the standard deviation of the noise; images lie in [-1, 1]. Intervals are half-open, [low, high), so neighbours
share an edge without overlapping. The paper splits the training distribution of sigma, ln sigma ~ N(-1.2, 1.2^2), into
a binary tree of intervals of equal probability: at depth d, interval `index` of 2^d, index 0 at the lowest noise
(eDiff-I, Sec. 4.1; E^d_index is its expert).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor


@dataclass(frozen=True, order=True)
class NoiseInterval:
    """Levels from `low` (included) to `high` (excluded; may be infinite)."""

    low: float
    high: float

    def __post_init__(self) -> None:
        if not 0 <= self.low < self.high:
            raise ValueError(f"A noise interval needs 0 <= low < high, got {self}. Swap or move its edges.")

    def __contains__(self, sigma: float) -> bool:
        return self.low <= sigma < self.high

    def __str__(self) -> str:
        return f"[{self.low:g}, {self.high:g})"


EVERYTHING = NoiseInterval(0.0, math.inf)
DEEPEST = 50  # depth of the tree of intervals


@dataclass(frozen=True)
class NoiseDistribution:
    """ln sigma ~ N(mean, std^2): how often training meets each noise level (eDiff-I, Sec. 3; EDM, Table 1)."""

    mean: float = -1.2
    std: float = 1.2

    def quantile(self, mass: Tensor) -> Tensor:
        """The sigma below which `mass` of the distribution lies; 0 at 0 and infinity at 1."""
        return torch.exp(self.mean + self.std * torch.special.ndtri(mass.double()))

    def mass_below(self, sigma: float) -> float:
        """The inverse of `quantile`."""
        if sigma == 0:
            return 0.0
        return 0.5 * (1 + math.erf((math.log(sigma) - self.mean) / (self.std * math.sqrt(2))))

    def interval(self, depth: int, index: int) -> NoiseInterval:
        """The interval of expert E^depth_index, one of 2^depth of equal probability."""
        check_place(depth, index)
        edges = self.quantile(torch.tensor([index, index + 1], dtype=torch.float64) / 2**depth)
        return NoiseInterval(edges[0].item(), edges[1].item())

    def sample(
        self, count: int, intervals: Sequence[NoiseInterval], generator: torch.Generator | None = None
    ) -> Tensor:
        """Draw sigmas, (count,) float64, from the distribution restricted to the union of disjoint `intervals`.

        The draw is stratified: one from each of `count` slices of equal probability, low to high, which leaves the
        distribution of each the same over a batch and makes the mean over the batch less noisy.
        """
        edges = [(self.mass_below(interval.low), self.mass_below(interval.high)) for interval in intervals]
        lows, highs = torch.tensor(edges, dtype=torch.float64).unbind(1)
        ends = (highs - lows).cumsum(0)
        if not ends[-1] > 0:
            raise ValueError(
                f"No training noise falls into {', '.join(map(str, intervals))}: ln sigma is drawn from "
                f"N({self.mean:g}, {self.std:g}^2). Choose an interval that the distribution reaches."
            )
        slices = torch.arange(count, dtype=torch.float64)
        drawn = (slices + torch.rand(count, dtype=torch.float64, generator=generator)) / count * ends[-1]
        which = torch.searchsorted(ends, drawn, right=True).clamp(max=len(edges) - 1)
        mass = highs[which] - (ends[which] - drawn)
        # a mass of exactly 0 or 1 would be a sigma of 0 or infinity
        return self.quantile(mass.clamp(1e-12, 1 - 1e-12))


def check_place(depth: int, index: int) -> None:
    """Raise ValueError unless a binary tree of intervals has this one."""
    if depth > DEEPEST:
        raise ValueError(
            f"The tree has no depth {depth}: it ends at {DEEPEST}, where floating point cannot tell the edges."
        )
    if depth < 0 or not 0 <= index < 2**depth:
        raise ValueError(
            f"The tree has no interval (depth {depth}, index {index}): at depth {depth} the index runs from 0 to "
            f"{2 ** max(depth, 0) - 1}."
        )


def complement(intervals: Sequence[NoiseInterval]) -> tuple[NoiseInterval, ...]:
    """Everything outside `intervals`, low noise first: what the paper writes with a minus sign (eDiff-I, App. B)."""
    rest, low = [], 0.0
    for interval in sorted(intervals):
        if interval.low > low:
            rest.append(NoiseInterval(low, interval.low))
        low = max(low, interval.high)
    if low < math.inf:
        rest.append(NoiseInterval(low, math.inf))
    return tuple(rest)


def check_partition(intervals: Sequence[NoiseInterval]) -> None:
    """Raise ValueError unless `intervals`, from high noise to low noise, touch without gap or overlap."""
    if not intervals:
        raise ValueError("An ensemble needs at least one expert, got none. Add an expert.")
    for above, below in pairwise(intervals):
        if below.low >= above.low:
            raise ValueError(
                f"Experts are listed from high noise to low noise, but {above} comes before {below}. Reorder them."
            )
        if below.high != above.low:
            kind = "a gap" if below.high < above.low else "an overlap"
            low, high = sorted((below.high, above.low))
            raise ValueError(
                f"Noise intervals {above} and {below} leave {kind} between sigma {low:g} and {high:g}. "
                f"Move one edge so that both are equal."
            )


def paper_split(distribution: NoiseDistribution | None = None) -> tuple[NoiseInterval, ...]:
    """The base stage's three experts, high to low noise: E^9_511, the middle, E^3_0 (eDiff-I, Sec. 4.1 and 5.1, config D)."""
    distribution = distribution or NoiseDistribution()
    high, low = distribution.interval(9, 511), distribution.interval(3, 0)
    (middle,) = complement([high, low])
    return high, middle, low
