import math

import pytest
import torch

from ediffi_core.intervals import NoiseInterval, paper_split
from ediffi_core.router import ExpertRouter
from ediffi_core.schedule import karras_sigmas

ROUTER = ExpertRouter(paper_split())
HIGH, LOW = ROUTER.intervals[1].high, ROUTER.intervals[1].low


@pytest.mark.parametrize(
    ("sigma", "expert"),
    [
        (1e9, 0),
        (HIGH, 0),
        (math.nextafter(HIGH, 0), 1),
        (1.0, 1),
        (LOW, 1),
        (math.nextafter(LOW, 0), 2),
        (1e-9, 2),
        (0.0, 2),
    ],
)
def test_both_sides_of_every_edge_go_to_their_expert(sigma, expert):
    assert ROUTER.expert(sigma) == expert


def test_levels_beyond_the_range_go_to_the_expert_at_that_end():
    router = ExpertRouter([NoiseInterval(1, 10), NoiseInterval(0.1, 1)])
    assert router.expert(50) == 0
    assert router.expert(0.01) == 1


def test_a_batch_is_sorted_by_expert():
    sigma = torch.tensor([0.01, 20.0, 0.5, 30.0])
    assert list(ROUTER.groups(sigma)) == [(0, [1, 3]), (1, [2]), (2, [0])]


@pytest.mark.parametrize(("steps", "shares"), [(10, (4, 4, 2)), (20, (7, 9, 4)), (25, (9, 11, 5)), (50, (17, 23, 10))])
def test_the_papers_experts_share_an_edm_schedule_as_computed(steps, shares):
    plan = ROUTER.plan(karras_sigmas(steps))
    assert tuple(plan.count(expert) for expert in range(3)) == shares
