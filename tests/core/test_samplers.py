import gaussian
import pytest
import torch

from ediffi_core.samplers import SAMPLERS, RowNoise, euler, heun, seeded_noise, stochastic
from ediffi_core.schedule import karras_sigmas


def last(steps):
    *_, step = steps
    return step.x


def errors(sampler, counts):
    x = 10.0 * seeded_noise(0, 1, (1, 16, 16))
    exact = gaussian.trajectory(x, 10.0, 0.1)
    found = []
    for count in counts:
        sigmas = karras_sigmas(count + 1, 0.1, 10.0)[:-1]
        found.append((last(sampler(gaussian.denoise, x, sigmas)) - exact).abs().max().item())
    return found


@pytest.mark.parametrize(("sampler", "order"), [(euler, 1), (heun, 2)])
def test_a_sampler_shows_its_order_on_gaussian_data(sampler, order):
    measured = gaussian.orders(errors(sampler, (64, 128, 256, 512)))
    assert all(abs(one - order) < 0.1 for one in measured), measured


def test_churn_keeps_the_distribution_of_gaussian_data():
    x = 80 * seeded_noise(0, 1, (1, 200, 200))
    generator = torch.Generator().manual_seed(1)
    image = last(
        stochastic(
            gaussian.denoise,
            x,
            karras_sigmas(60),
            s_churn=30,
            s_noise=1.0,
            noise=lambda like: torch.randn(like.shape, dtype=like.dtype, generator=generator),
        )
    )
    assert image.mean().item() == pytest.approx(gaussian.MEAN, abs=0.01)
    assert image.std().item() == pytest.approx(gaussian.STD, abs=0.02)


def test_without_churn_the_stochastic_sampler_is_heun():
    x = 80 * seeded_noise(0, 2, (3, 8, 8))
    sigmas = karras_sigmas(12)
    still = last(stochastic(gaussian.denoise, x, sigmas, s_churn=0, noise=RowNoise(1, 2)))
    assert torch.equal(still, last(heun(gaussian.denoise, x, sigmas)))


def test_churn_acts_only_inside_its_limits():
    x = 80 * seeded_noise(0, 1, (3, 8, 8))
    sigmas = karras_sigmas(12)
    untouched = last(stochastic(gaussian.denoise, x, sigmas, s_churn=40, s_tmin=90, s_tmax=100, noise=RowNoise(1, 1)))
    assert torch.equal(untouched, last(heun(gaussian.denoise, x, sigmas)))


@pytest.mark.parametrize(("sampler", "calls"), [("euler", 10), ("heun", 19), ("stochastic", 19)])
def test_a_sampler_yields_every_step_and_calls_the_network_as_often_as_it_says(sampler, calls):
    seen = []

    def denoise(x, sigma):
        seen.append(sigma[0].item())
        return gaussian.denoise(x, sigma)

    x = 80 * seeded_noise(0, 1, (3, 4, 4))
    steps = list(SAMPLERS[sampler](denoise, x, karras_sigmas(10), noise=RowNoise(1, 1)))
    assert [step.index for step in steps] == list(range(10))
    assert len(seen) == calls
    assert steps[0].sigma == pytest.approx(80)


def test_the_last_step_ends_on_the_denoised_image():
    *_, step = euler(gaussian.denoise, 80 * seeded_noise(0, 1, (3, 4, 4)), karras_sigmas(10))
    torch.testing.assert_close(step.x, step.denoised)


def test_an_image_of_a_batch_has_the_noise_of_its_own_seed():
    batch = seeded_noise(5, 3, (3, 8, 8))
    for row in range(3):
        assert torch.equal(batch[row], seeded_noise(5 + row, 1, (3, 8, 8))[0])


def test_each_call_for_noise_gives_other_noise_the_same_in_any_batch():
    x = torch.zeros(3, 2, 8, 8, dtype=torch.float64)
    together, alone = RowNoise(5, 3), RowNoise(7, 1)
    first, second = together(x), together(x)
    assert not torch.equal(first, second)
    assert first.dtype == x.dtype
    assert torch.equal(first[2:], alone(x[:1]))
    assert torch.equal(second[2:], alone(x[:1]))
