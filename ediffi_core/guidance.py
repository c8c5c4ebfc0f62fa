"""Guidance, and what keeps strongly guided pixels in range.

Classifier-free guidance (Ho & Salimans 2022; eDiff-I, Sec. 4.2 drops all embeddings for the unconditional branch) pushes
denoised images out of [-1, 1]; thresholding brings them back (Imagen, Saharia et al. 2022, Sec. 2.3).
"""

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


def thresholded(x: Tensor, percentile: float, maximum: float) -> Tensor:
    """Denoised images (B, C, ...) brought into [-1, 1], each by itself (Imagen, Sec. 2.3).

    s is the size below which `percentile` (0 to 1) of an image's values lie, not under 1 and not over `maximum`; values are
    cut at s and divided by it. A maximum of 1 is static thresholding: they are only cut.
    """
    sizes = x.abs().flatten(1).float()
    s = torch.stack([size.kthvalue(max(1, round(percentile * len(size)))).values for size in sizes])
    s = s.clamp(1, maximum).to(x).view(-1, *[1] * (x.ndim - 1))
    return x.clamp(-s, s) / s
