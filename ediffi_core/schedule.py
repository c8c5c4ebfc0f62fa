"""Sigma schedules: decreasing noise levels that end in zero.

A schedule is a 1-D float64 tensor of S + 1 levels, S steps; ComfyUI's SIGMAS socket carries the same thing.
"""

import torch
from torch import Tensor

SIGMA_MIN, SIGMA_MAX, RHO = 0.002, 80.0, 7.0  # (EDM, Table 1)


def karras_sigmas(steps: int, sigma_min: float = SIGMA_MIN, sigma_max: float = SIGMA_MAX, rho: float = RHO) -> Tensor:
    """sigma_i = (sigma_max^(1/rho) + i/(S-1) (sigma_min^(1/rho) - sigma_max^(1/rho)))^rho, then 0 (EDM, Eq. 5).

    Returns (S + 1,). A larger `rho` spends more of the steps at low noise.
    """
    if steps < 1:
        raise ValueError(f"A schedule needs at least 1 step, got steps={steps}. Raise steps.")
    if not 0 < sigma_min <= sigma_max:
        raise ValueError(
            f"A schedule needs 0 < sigma_min <= sigma_max, got sigma_min={sigma_min:g} and sigma_max={sigma_max:g}. "
            f"Swap or raise them."
        )
    if rho <= 0:
        raise ValueError(f"rho bends the schedule and must be above 0, got {rho:g}. 7 is EDM's choice.")
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    sigmas = (high + ramp * (low - high)) ** rho
    return torch.cat([sigmas, sigmas.new_zeros(1)])
