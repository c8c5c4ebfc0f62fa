"""Classifier-free guidance (Ho & Salimans 2022; eDiff-I, Sec. 4.2 drops all embeddings for the unconditional branch)."""

import torch
from torch import Tensor

from .conditioning import Conditioning, joined, null_conditioning
from .ensemble import Denoise


def guided(denoise: Denoise, guidance_scale: float, null: Conditioning | None = None) -> Denoise:
    """D_null + guidance_scale (D_cond - D_null), as one denoiser.

    guidance_scale 1 is the conditional denoiser, one network row per image; ComfyUI's `cfg` is the same number. The
    paper's axis, 0 ... 10, starts at plain conditional sampling and is this number minus 1.
    """

    def denoise_guided(x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        if guidance_scale == 1:
            return denoise(x, sigma, conditioning)
        both = joined([conditioning, null_conditioning(conditioning) if null is None else null])
        cond, uncond = denoise(torch.cat([x, x]), torch.cat([sigma, sigma]), both).chunk(2)
        return uncond + guidance_scale * (cond - uncond)

    return denoise_guided
