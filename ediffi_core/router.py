"""The router: which expert denoises a noise level.

Experts are listed in the order sampling meets them, from high noise to low noise. Levels beyond either end of the
covered range go to the expert at that end, so a schedule that starts slightly above the trained range still runs.
A level exactly on an edge goes to the noisier side (the intervals are half-open).
"""

from collections.abc import Iterator, Sequence

from torch import Tensor

from .intervals import NoiseInterval, check_partition


class ExpertRouter:
    """Maps sigma to the index of an expert. Raises ValueError for intervals with a gap or an overlap."""

    def __init__(self, intervals: Sequence[NoiseInterval]) -> None:
        check_partition(intervals)
        self.intervals = tuple(intervals)

    def __len__(self) -> int:
        return len(self.intervals)

    def expert(self, sigma: float) -> int:
        """Index of the expert that owns `sigma`, 0 = highest noise."""
        for index, interval in enumerate(self.intervals):
            if sigma >= interval.low:
                return index
        return len(self.intervals) - 1

    def groups(self, sigma: Tensor) -> Iterator[tuple[int, list[int]]]:
        """Sort a batch by expert: for sigma (B,), yields (expert, rows) for each expert that owns any row."""
        owners = [self.expert(level) for level in sigma.double().tolist()]
        for index in sorted(set(owners)):
            yield index, [row for row, owner in enumerate(owners) if owner == index]

    def plan(self, sigmas: Tensor) -> list[int]:
        """The expert of each step of a schedule (S + 1,): S indices, by the level each step starts from."""
        return [self.expert(level) for level in sigmas.double().tolist()[:-1]]
