"""Guidance, of everything at once or of text and style apart, and what keeps strongly guided pixels in range.

Classifier-free guidance (Ho & Salimans 2022; eDiff-I, Sec. 4.2 drops all embeddings for the unconditional branch) pushes
denoised images out of [-1, 1]; thresholding brings them back (Imagen, Saharia et al. 2022, Sec. 2.3).
"""

import torch
from torch import Tensor

from .conditioning import EMBEDDINGS, Conditioning, joined, null_conditioning
from .ensemble import Denoise

DROPS = {"all": EMBEDDINGS, "text": ("clip", "t5"), "image": ("image",)}  # what an unconditional branch may go without


def dropped(conditioning: Conditioning, what: str = "all") -> Conditioning:
    """Without the embeddings of a choice in `DROPS`, as training drops them: the `null` of guidance by the others.

    Guided away from "text", only the text is guided and the style is as strong as it is by itself; "image" is the
    opposite; "all" is the paper's. Raises ValueError for another word.
    """
    if what not in DROPS:
        raise ValueError(f"{what!r} cannot be dropped. Choose one of {', '.join(DROPS)}.")
    return conditioning.only(*(name for name in EMBEDDINGS if name not in DROPS[what]))


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


def guided_apart(denoise: Denoise, text_scale: float, style_scale: float) -> Denoise:
    """D_null + style_scale (D_style - D_null) + text_scale (D_both - D_style), as one denoiser.

    Text and style each have a scale: first the style is guided away from nothing, then text and style away from the style
    (InstructPix2Pix, Brooks et al. 2023, Eq. 3, where the picture to edit has the place of the style; the sum of guided
    conditions is from Liu et al. 2022). Equal scales are `guided`.

    Three network rows per image. Two where a branch has no share in the sum: D_null with style_scale 1, D_both with
    text_scale 0, D_style with equal scales or without any style. One where two have none.
    """

    def denoise_guided(x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        if text_scale == style_scale or not conditioning.image_strength.any():
            return guided(denoise, text_scale)(x, sigma, conditioning)
        branches = [
            (share, branch)
            for share, branch in (
                (text_scale, conditioning),  # first, as in `guided`: painted regions belong to the first rows
                (style_scale - text_scale, dropped(conditioning, "text")),
                (1 - style_scale, dropped(conditioning, "all")),
            )
            if share != 0
        ]
        shares, conditionings = zip(*branches, strict=True)
        rows = len(branches)
        denoised = denoise(torch.cat([x] * rows), torch.cat([sigma] * rows), joined(conditionings)).chunk(rows)
        return sum(share * one for share, one in zip(shares, denoised, strict=True))

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
