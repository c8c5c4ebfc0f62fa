import pytest
import torch

from ediffi_core.schedule import karras_sigmas


def test_a_schedule_falls_from_sigma_max_to_sigma_min_and_then_zero():
    sigmas = karras_sigmas(18)
    assert sigmas.shape == (19,)
    assert sigmas[0] == pytest.approx(80)
    assert sigmas[-2] == pytest.approx(0.002)
    assert sigmas[-1] == 0
    assert (sigmas.diff() < 0).all()


def test_the_schedule_is_linear_in_the_rho_th_root():
    roots = karras_sigmas(12, 0.01, 50, rho=5)[:-1] ** (1 / 5)
    torch.testing.assert_close(roots.diff(), roots.diff().mean().expand(11))


def test_one_step_starts_at_sigma_max():
    assert karras_sigmas(1).tolist() == pytest.approx([80, 0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(steps=0), "at least 1 step"),
        (dict(steps=5, sigma_min=3, sigma_max=1), "sigma_min=3 and sigma_max=1"),
        (dict(steps=5, sigma_min=0), "0 < sigma_min"),
        (dict(steps=5, rho=0), "rho"),
    ],
)
def test_an_impossible_schedule_is_refused_with_its_values(arguments, message):
    with pytest.raises(ValueError, match=message):
        karras_sigmas(**arguments)
