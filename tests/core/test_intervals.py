import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ediffi_core.intervals import (
    EVERYTHING,
    NoiseDistribution,
    NoiseInterval,
    check_partition,
    complement,
    paper_split,
)

PAPER = NoiseDistribution()

# upper edge of E^d_0 and lower edge of E^d_(2^d - 1), from exp(-1.2 + 1.2 sqrt(2) erfinv(2 i / 2^d - 1))
EDGES = [
    (1, 0.301194, 0.301194),
    (2, 0.134071, 0.676642),
    (3, 0.075742, 1.197719),
    (4, 0.047790, 1.898273),
    (5, 0.032216, 2.815890),
    (6, 0.022717, 3.993426),
    (7, 0.016555, 5.479812),
    (8, 0.012375, 7.330773),
    (9, 0.009440, 9.609593),
    (10, 0.007323, 12.387933),
]


@pytest.mark.parametrize(("depth", "lowest", "highest"), EDGES)
def test_edges_of_the_tree_equal_the_closed_form(depth, lowest, highest):
    assert PAPER.interval(depth, 0).high == pytest.approx(lowest, abs=6e-7)
    assert PAPER.interval(depth, 2**depth - 1).low == pytest.approx(highest, abs=6e-7)


def test_depth_three_has_the_papers_eight_intervals():
    lows = [PAPER.interval(3, index).low for index in range(8)]
    assert lows == pytest.approx([0, 0.075742, 0.134071, 0.205488, 0.301194, 0.441475, 0.676642, 1.197719], abs=6e-7)


@given(st.integers(0, 12), st.data())
def test_children_tile_their_parent(depth, data):
    index = data.draw(st.integers(0, 2**depth - 1))
    parent = PAPER.interval(depth, index)
    low, high = PAPER.interval(depth + 1, 2 * index), PAPER.interval(depth + 1, 2 * index + 1)
    assert (low.low, low.high, high.high) == (parent.low, high.low, parent.high)


def test_the_papers_split_is_high_middle_low():
    high, middle, low = paper_split()
    assert high.high == math.inf
    assert low.low == 0
    assert (middle.low, middle.high) == (low.high, high.low)
    assert (low.high, high.low) == pytest.approx((0.075742, 9.609593), abs=6e-7)
    check_partition([high, middle, low])


def test_an_interval_holds_its_low_edge_and_not_its_high_one():
    interval = NoiseInterval(0.5, 2)
    assert 0.5 in interval
    assert 2 not in interval


def test_a_complement_leaves_out_exactly_what_was_named():
    assert complement([NoiseInterval(1, 2)]) == (NoiseInterval(0, 1), NoiseInterval(2, math.inf))
    assert complement([NoiseInterval(2, math.inf), NoiseInterval(0, 1)]) == (NoiseInterval(1, 2),)
    assert complement([EVERYTHING]) == ()


@pytest.mark.parametrize(
    "intervals",
    [(EVERYTHING,), (PAPER.interval(9, 511),), complement([PAPER.interval(2, 1)]), (PAPER.interval(3, 0),)],
    ids=["everything", "high", "two parts", "low"],
)
def test_sampled_noise_follows_the_restricted_distribution(intervals):
    sigma = PAPER.sample(4000, intervals, torch.Generator().manual_seed(0))
    inside = torch.zeros(4000, dtype=torch.bool)
    for interval in intervals:
        inside |= (sigma >= interval.low * (1 - 1e-9)) & (sigma < interval.high)
    assert inside.all()
    # the mass below each drawn sigma, counted within the intervals only, is uniform: compare its quantiles
    total = sum(PAPER.mass_below(one.high) - PAPER.mass_below(one.low) for one in intervals)
    masses = [
        sum(max(0.0, PAPER.mass_below(min(level, one.high)) - PAPER.mass_below(one.low)) for one in intervals) / total
        for level in sigma.tolist()
    ]
    masses = torch.tensor(sorted(masses), dtype=torch.float64)
    assert (masses - torch.linspace(0, 1, 4000, dtype=torch.float64)).abs().max() < 0.01


def test_the_same_generator_draws_the_same_noise():
    draws = [PAPER.sample(8, (EVERYTHING,), torch.Generator().manual_seed(3)) for _ in range(2)]
    assert torch.equal(*draws)


def test_a_gap_is_named_with_both_of_its_edges():
    with pytest.raises(ValueError, match=r"\[2, inf\) and \[0, 1\) leave a gap between sigma 1 and 2"):
        check_partition([NoiseInterval(2, math.inf), NoiseInterval(0, 1)])


def test_an_overlap_is_named_with_both_of_its_edges():
    with pytest.raises(ValueError, match="an overlap between sigma 1 and 2"):
        check_partition([NoiseInterval(1, math.inf), NoiseInterval(0, 2)])


def test_experts_in_the_wrong_order_are_refused():
    with pytest.raises(ValueError, match="from high noise to low noise"):
        check_partition([NoiseInterval(0, 1), NoiseInterval(1, math.inf)])


@pytest.mark.parametrize(("low", "high"), [(-1, 2), (2, 2), (3, 1), (math.nan, 1)])
def test_an_empty_interval_is_refused(low, high):
    with pytest.raises(ValueError, match="0 <= low < high"):
        NoiseInterval(low, high)


def test_an_interval_outside_the_tree_is_refused():
    with pytest.raises(ValueError, match="index runs from 0 to 7"):
        PAPER.interval(3, 8)
