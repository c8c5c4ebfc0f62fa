import torch

from ediffi_core.guidance import guided
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
