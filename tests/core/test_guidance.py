import torch

from ediffi_core.guidance import guided, thresholded
from ediffi_core.preconditioning import Denoiser


def test_scale_1_is_the_conditional_denoiser_and_calls_it_once(tiny, conditioning):
    calls = []

    def denoise(x, sigma, conditioning):
        calls.append(len(x))
        return Denoiser(tiny)(x, sigma, conditioning)

    x, sigma = torch.randn(2, 3, 8, 8), torch.tensor([1.0, 1.0])
    assert torch.equal(guided(denoise, 1)(x, sigma, conditioning), Denoiser(tiny)(x, sigma, conditioning))
    assert calls == [2]


def test_guidance_extrapolates_from_the_dropped_conditioning(tiny, conditioning):
    denoise = Denoiser(tiny)
    x, sigma = torch.randn(2, 3, 8, 8), torch.tensor([1.0, 1.0])
    cond, uncond = denoise(x, sigma, conditioning), denoise(x, sigma, conditioning.only())
    torch.testing.assert_close(
        guided(denoise, 3.5)(x, sigma, conditioning), uncond + 3.5 * (cond - uncond), atol=1e-5, rtol=1e-5
    )


def test_dynamic_thresholding_divides_by_the_percentile_of_each_image():
    x = torch.linspace(-4, 4, 1001).repeat(2, 3, 1, 1)
    x[1] /= 8
    y = thresholded(x, 0.9, 100.0)
    s = x[0].abs().flatten().double().quantile(0.9).item()
    torch.testing.assert_close(y[0], x[0].clamp(-s, s) / s, rtol=1e-2, atol=1e-2)
    assert y[0].max() == 1
    assert torch.equal(y[1], x[1]), "An image inside the range is left alone."
    assert torch.equal(thresholded(x[1:], 0.9, 100.0), y[1:])


def test_a_maximum_of_one_is_static_thresholding():
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 3
    assert torch.equal(thresholded(x, 0.995, 1.0), x.clamp(-1, 1))
    assert thresholded(x, 0.5, 1.5).abs().max() <= 1
