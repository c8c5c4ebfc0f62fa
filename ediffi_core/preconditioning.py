"""Preconditioning: turns a network F into a denoiser D (eDiff-I, Sec. 3; EDM, Eq. 7 and Table 1)."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from .attention import Attend, attend
from .conditioning import Conditioning

SIGMA_DATA = 0.5  # standard deviation of natural images in [-1, 1] (EDM, Table 1)


class Coefficients(NamedTuple):
    c_skip: Tensor
    c_out: Tensor
    c_in: Tensor
    c_noise: Tensor


def coefficients(sigma: Tensor, sigma_data: float = SIGMA_DATA) -> Coefficients:
    """EDM's scalings, each of the shape of `sigma`: unit variance for the network's input and target (EDM, App. B.6)."""
    total = (sigma**2 + sigma_data**2).sqrt()  # standard deviation of the noised image
    return Coefficients(
        c_skip=sigma_data**2 / total**2,
        c_out=sigma * sigma_data / total,
        c_in=1 / total,
        c_noise=sigma.log() / 4,
    )


def loss_weight(sigma: Tensor, sigma_data: float = SIGMA_DATA) -> Tensor:
    """lambda(sigma) = 1 / c_out^2: every noise level starts with the same weight (eDiff-I, Sec. 3)."""
    return (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2


class Denoiser(nn.Module):
    """D(x; c, sigma) = c_skip x + c_out F(c_in x; c, c_noise)."""

    def __init__(self, network: nn.Module, sigma_data: float = SIGMA_DATA) -> None:
        super().__init__()
        self.network = network
        self.sigma_data = sigma_data

    def forward(self, x: Tensor, sigma: Tensor, conditioning: Conditioning, attend: Attend = attend) -> Tensor:
        """x: (B, C, H, W) noised images; sigma: (B,). Returns denoised images, (B, C, H, W), in the dtype of x.

        The network runs in its own dtype, or in autocast's where that is on; the sum is taken in the dtype of x.
        """
        c_skip, c_out, c_in, c_noise = coefficients(sigma.to(x.dtype)[:, None, None, None], self.sigma_data)
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.network.dtype
        scaled = (c_in * x).to(dtype)
        F_x = self.network(scaled, c_noise.flatten(), conditioning, attend)
        return c_skip * x + c_out * F_x.to(x.dtype)
