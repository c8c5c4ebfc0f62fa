"""Gaussian data: images drawn from N(mean, std^2) independently per pixel, whose ideal denoiser is known."""

import torch
from torch import Tensor

MEAN, STD = 0.3, 0.4


def denoise(x: Tensor, sigma: Tensor, conditioning=None) -> Tensor:
    """E[image | x] for x = image + sigma noise."""
    level = sigma.view(-1, *[1] * (x.dim() - 1))
    return (STD**2 * x + level**2 * MEAN) / (STD**2 + level**2)


def trajectory(x: Tensor, sigma: float, sigma_next: float) -> Tensor:
    """Where the probability-flow ODE takes x from one level to another, exactly."""
    return MEAN + (x - MEAN) * ((STD**2 + sigma_next**2) / (STD**2 + sigma**2)) ** 0.5


def orders(errors: list[float]) -> list[float]:
    """Measured order between runs whose steps double."""
    return torch.log2(torch.tensor(errors[:-1]) / torch.tensor(errors[1:])).tolist()
