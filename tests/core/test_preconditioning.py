import torch
from tiny import random_conditioning
from torch import nn

from ediffi_core.preconditioning import Denoiser, coefficients, loss_weight

SIGMA = torch.logspace(-3, 2, 50, dtype=torch.float64)


def test_the_network_sees_unit_variance_and_its_target_has_unit_variance():
    """With images of variance sigma_data^2: Var[c_in x] = 1 and Var[(image - c_skip x) / c_out] = 1 (EDM, App. B.6)."""
    c_skip, c_out, c_in, _ = coefficients(SIGMA)
    data = 0.5**2
    torch.testing.assert_close(c_in**2 * (data + SIGMA**2), torch.ones_like(SIGMA))
    target = ((1 - c_skip) ** 2 * data + c_skip**2 * SIGMA**2) / c_out**2
    torch.testing.assert_close(target, torch.ones_like(SIGMA))


def test_the_loss_weight_cancels_the_output_scale():
    torch.testing.assert_close(loss_weight(SIGMA) * coefficients(SIGMA).c_out ** 2, torch.ones_like(SIGMA))


def test_noise_enters_the_network_as_a_quarter_of_its_logarithm():
    torch.testing.assert_close(coefficients(SIGMA).c_noise, SIGMA.log() / 4)


def test_the_ideal_network_for_one_known_image_recovers_it():
    """If F returns its target exactly, D returns the image at every noise level."""
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(2, 3, 8, 8, generator=generator)
    sigma = torch.tensor([0.05, 20.0])
    x = image + sigma[:, None, None, None] * torch.randn(image.shape, generator=generator)

    class Ideal(nn.Module):
        dtype = torch.float32

        def forward(self, scaled, c_noise, conditioning, attend):
            c_skip, c_out, c_in, _ = coefficients(sigma[:, None, None, None])
            torch.testing.assert_close(scaled, c_in * x)
            return (image - c_skip * x) / c_out

    denoised = Denoiser(Ideal())(x, sigma, random_conditioning())
    torch.testing.assert_close(denoised, image, atol=1e-5, rtol=1e-5)


def test_a_half_precision_network_leaves_the_sum_in_float(tiny, conditioning):
    denoised = Denoiser(tiny.to(torch.bfloat16))(torch.randn(2, 3, 8, 8), torch.tensor([1.0, 2.0]), conditioning)
    assert denoised.dtype == torch.float32
