"""The ensemble: experts and a router, called like one denoiser (eDiff-I, Sec. 4).

One expert works at each noise level, so an ensemble costs as many network calls as a single model.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from .conditioning import Conditioning
from .intervals import NoiseInterval
from .router import ExpertRouter

Denoise = Callable[[Tensor, Tensor, Conditioning], Tensor]


class Ensemble(nn.Module):
    """Denoisers with their noise intervals, from high noise to low noise."""

    def __init__(self, experts: Sequence[tuple[NoiseInterval, nn.Module]]) -> None:
        super().__init__()
        self.router = ExpertRouter([interval for interval, _ in experts])
        self.experts = nn.ModuleList([denoiser for _, denoiser in experts])

    def forward(self, x: Tensor, sigma: Tensor, conditioning: Conditioning, **options) -> Tensor:
        """As `Denoiser`: x (B, C, H, W), sigma (B,). Rows may lie in different intervals."""
        groups = list(self.router.groups(sigma))
        if len(groups) == 1:
            return self.experts[groups[0][0]](x, sigma, conditioning, **options)
        denoised = torch.empty_like(x)
        for expert, rows in groups:
            denoised[rows] = self.experts[expert](x[rows], sigma[rows], conditioning.rows(rows), **options)
        return denoised
