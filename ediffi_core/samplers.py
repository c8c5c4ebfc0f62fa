"""Samplers: walk from noise to an image along a sigma schedule.

Each sampler is a generator over steps, so progress, previews and interruption belong to the caller. `denoise` takes
(x, sigma) with sigma of shape (B,) and returns the denoised images; `sigmas` is (S + 1,), decreasing, ending in 0. `noise`
maps x to fresh unit noise, for those that add some.
The state x is kept in the dtype it comes in; float64 costs little and is what EDM uses.
"""

import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

Denoise = Callable[[Tensor, Tensor], Tensor]
Noise = Callable[[Tensor], Tensor]


class Step(NamedTuple):
    index: int
    sigma: float  # level this step started from
    denoised: Tensor  # (B, C, H, W) estimate of the clean image at that level
    x: Tensor  # (B, C, H, W) image after the step

    def images(self) -> Tensor:
        """What the step left, as pictures: (B, C, H, W) float32 in [0, 1]."""
        return ((self.x.float() + 1) / 2).clamp(0, 1)


def slope(x: Tensor, sigma: float, denoise: Denoise) -> tuple[Tensor, Tensor]:
    """dx/dsigma = (x - D(x; sigma)) / sigma (EDM, Eq. 1 with s = 1 and sigma(t) = t), and D itself."""
    denoised = denoise(x, torch.full((x.shape[0],), sigma, dtype=x.dtype, device=x.device))
    return (x - denoised) / sigma, denoised


def euler(denoise: Denoise, x: Tensor, sigmas: Tensor, *, noise: Noise | None = None) -> Iterator[Step]:
    """First order: one network call a step."""
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas.tolist())):
        d, denoised = slope(x, sigma, denoise)
        x = x + (sigma_next - sigma) * d
        yield Step(i, sigma, denoised, x)


def heun(denoise: Denoise, x: Tensor, sigmas: Tensor, *, noise: Noise | None = None) -> Iterator[Step]:
    """Second order (EDM, Algorithm 1): two network calls a step; the last step, to sigma 0, is Euler."""
    yield from stochastic(denoise, x, sigmas, s_churn=0, noise=noise)


def stochastic(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    s_churn: float = 40,
    s_tmin: float = 0.05,
    s_tmax: float = 50,
    s_noise: float = 1.003,
    *,
    noise: Noise | None,
) -> Iterator[Step]:
    """Heun with churn: fresh noise is added before each step inside [s_tmin, s_tmax] (EDM, Algorithm 2).

    noise: maps x to fresh unit noise of its shape, None only without churn; `RowNoise` makes a batch equal its members.
    The defaults are EDM's for ImageNet at 64 pixels.
    """
    steps = len(sigmas) - 1
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas.tolist())):
        gamma = min(s_churn / steps, math.sqrt(2) - 1) if s_tmin <= sigma <= s_tmax else 0.0
        sigma_hat = sigma * (1 + gamma)
        if gamma > 0:
            x = x + math.sqrt(sigma_hat**2 - sigma**2) * s_noise * noise(x)

        d, denoised = slope(x, sigma_hat, denoise)
        x_next = x + (sigma_next - sigma_hat) * d
        if sigma_next > 0:
            d_next, _ = slope(x_next, sigma_next, denoise)
            x_next = x + (sigma_next - sigma_hat) * (d + d_next) / 2

        x = x_next
        yield Step(i, sigma, denoised, x)


SAMPLERS = {"euler": euler, "heun": heun, "stochastic": stochastic}


class RowNoise:
    """Unit noise for a batch, call after call: image i draws what seed + i draws alone.

    Drawn in float32 on the CPU, as ComfyUI draws it, so the same seed means the same first noise in both.
    """

    def __init__(self, seed: int, batch: int) -> None:
        self.generators = [torch.Generator().manual_seed(seed + row) for row in range(batch)]

    def __call__(self, x: Tensor) -> Tensor:
        """Fresh noise like x (B, ...)."""
        return torch.stack([torch.randn(x.shape[1:], generator=one) for one in self.generators]).to(x)


def seeded_noise(seed: int, batch: int, shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> Tensor:
    """The first noise (B, *shape) of `RowNoise`."""
    return RowNoise(seed, batch)(torch.empty((batch, *shape), dtype=dtype))
