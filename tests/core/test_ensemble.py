import math

import pytest
import torch
from tiny import random_conditioning, tiny_network

from ediffi_core.ensemble import Ensemble
from ediffi_core.intervals import NoiseInterval, paper_split
from ediffi_core.preconditioning import Denoiser

SIGMA = torch.tensor([20.0, 0.5, 0.01, 9.7])


@pytest.fixture
def batch():
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)), random_conditioning(batch=4)


@pytest.mark.parametrize("sigma", [20.0, 0.5, 0.01])
def test_an_ensemble_of_equal_experts_is_that_expert_bit_for_bit(tiny, batch, sigma):
    expert = Denoiser(tiny)
    ensemble = Ensemble([(interval, expert) for interval in paper_split()])
    x, conditioning = batch
    level = torch.full((4,), sigma)
    assert torch.equal(ensemble(x, level, conditioning), expert(x, level, conditioning))


def test_one_interval_is_no_ensemble(tiny, batch):
    expert = Denoiser(tiny)
    x, conditioning = batch
    assert torch.equal(
        Ensemble([(NoiseInterval(0, math.inf), expert)])(x, SIGMA, conditioning), expert(x, SIGMA, conditioning)
    )


def test_each_row_is_denoised_by_the_expert_that_owns_its_sigma(batch):
    experts = [Denoiser(tiny_network(seed)) for seed in range(3)]
    ensemble = Ensemble(list(zip(paper_split(), experts, strict=True)))
    x, conditioning = batch
    denoised = ensemble(x, SIGMA, conditioning)
    for row, owner in enumerate([0, 1, 2, 0]):
        alone = experts[owner](x[row : row + 1], SIGMA[row : row + 1], conditioning.rows([row]))
        torch.testing.assert_close(denoised[row], alone[0], atol=1e-5, rtol=1e-5)


def test_an_expert_is_called_only_for_its_own_noise(batch):
    seen = []

    class Spy(torch.nn.Module):
        def __init__(self, name):
            super().__init__()
            self.name = name

        def forward(self, x, sigma, conditioning):
            seen.append((self.name, sigma.tolist()))
            return x

    x, conditioning = batch
    Ensemble([(interval, Spy(name)) for interval, name in zip(paper_split(), "hml", strict=True)])(
        x, SIGMA, conditioning
    )
    assert [(name, [round(level, 3) for level in levels]) for name, levels in seen] == [
        ("h", [20.0, 9.7]),
        ("m", [0.5]),
        ("l", [0.01]),
    ]
