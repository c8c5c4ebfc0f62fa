"""Super-resolution: the low-res image a stage starts from, and tiles for pictures beyond memory (eDiff-I, Sec. 3 and App. A).

A super-resolution stage is a denoiser like any other whose conditioning also holds the low-res image, enlarged to the size
of the image that is made. Images lie in [-1, 1].
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import pairwise, product
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .conditioning import Conditioning
from .ensemble import Denoise
from .paint_with_words import Box
from .samplers import seeded_noise

FACTOR = 4  # 64 -> 256 -> 1024
BLEND = 16  # pixels over which one tile goes over into the next; at most half of what they share
STREAM = 0x9E3779B9  # between seeds of different noise; far from the next seed, also in the 32 bits that torch uses


def stream(seed: int, number: int) -> int:
    """A seed for other noise than `seed`'s own. Seeds that follow each other still do."""
    return (seed + number * STREAM) % 2**64


def upsampled(images: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, 3, h, w) to (B, 3, *size), bicubic, as NeMo's Imagen does before its super-resolution networks.

    Bicubic overshoots beside edges; what leaves [-1, 1] is cut, as it is no colour.
    """
    return F.interpolate(images, size, mode="bicubic", align_corners=False).clamp(-1, 1)


def augmented(low_res: Tensor, sigma: float, seed: int) -> Tensor:
    """Noise-conditioning augmentation: low_res + sigma noise, row i as seed + i gives alone (Imagen, Saharia et al. 2022).

    Other noise than that of the sampler with this seed. sigma 0 gives low_res itself.
    """
    if not (math.isfinite(sigma) and sigma >= 0):
        raise ValueError(f"augmentation_sigma is the noise put on the low-res image, 0 or more, got {sigma}.")
    if sigma == 0:
        return low_res
    noise = seeded_noise(stream(seed, 1), low_res.shape[0], tuple(low_res.shape[1:]), torch.float32)
    return low_res + sigma * noise.to(low_res)


def check_pictures(images: Tensor) -> None:
    """Raise ValueError unless these are pictures (B, 3, h, w) that can be enlarged."""
    if images.ndim != 4 or images.shape[1] != 3:
        alpha = " Remove the alpha channel first." if images.ndim == 4 and images.shape[1] == 4 else ""
        raise ValueError(f"Pictures to enlarge are (B, 3, height, width), got {tuple(images.shape)}.{alpha}")
    if 0 in images.shape:
        raise ValueError(f"There is nothing to enlarge in pictures of shape {tuple(images.shape)}. Pass at least one.")
    if not torch.isfinite(images).all():
        raise ValueError(
            "The picture to enlarge holds pixels that are not finite (NaN or infinity). What made it went wrong: see there."
        )


def conditioned(conditioning: Conditioning, images: Tensor, seed: int, augmentation_sigma: float = 0.0) -> Conditioning:
    """What a super-resolution stage is told when it enlarges pictures (B, 3, h, w) in [-1, 1]."""
    check_pictures(images)
    if len(conditioning) != len(images):
        raise ValueError(
            f"There are {len(images)} pictures to enlarge and conditioning for {len(conditioning)}. Give each its own."
        )
    height, width = images.shape[2:]
    images = images.to(conditioning.image.device, torch.float32)
    low_res = upsampled(images, (FACTOR * height, FACTOR * width))
    sigmas = torch.full((len(images),), float(augmentation_sigma), device=low_res.device)
    return conditioning.with_low_res(augmented(low_res, augmentation_sigma, seed), sigmas)


class Span(NamedTuple):
    """A part of one axis and how much the tile in it counts there."""

    start: int
    stop: int
    weights: Tensor  # (stop - start,) float32; those of all spans sum to 1 everywhere


def stride(tile: int, overlap: int, multiple: int = 1) -> int:
    """How far apart tiles may lie. Raises ValueError where they could not move on."""
    if not 0 <= overlap < tile:
        raise ValueError(
            f"Tiles of {tile} pixels cannot overlap by {overlap}. Choose an overlap from 0 to below the tile."
        )
    step = (tile // multiple * multiple - overlap) // multiple * multiple
    if step <= 0:
        raise ValueError(
            f"Tiles of {tile} pixels with an overlap of {overlap} leave no room to move on in steps of "
            f"{multiple} pixels. Raise the tile or lower the overlap."
        )
    return step


def spans(size: int, tile: int, overlap: int, multiple: int = 1) -> list[Span]:
    """Covers `size` pixels with spans of at most `tile` that start at multiples of `multiple` and share at least `overlap`.

    Of what two spans share, the middle `BLEND` pixels go linearly from one to the other; beyond them, near its own end, a span
    counts nothing. So the joined result equals the whole if the denoiser looks no further than (overlap - BLEND) / 2 pixels,
    and one that looks further leaves no seam.
    """
    step = stride(tile, overlap, multiple)
    if size <= tile:
        return [Span(0, size, torch.ones(size))]
    tile -= tile % multiple  # a span that ends between two multiples would be padded there
    last = math.ceil((size - tile) / multiple) * multiple
    count = 1 + math.ceil(last / step)
    starts = [i * last // (count - 1) // multiple * multiple for i in range(count)]  # spread evenly

    windows = []
    for start in starts:
        windows.append(torch.ones(min(start + tile, size) - start, dtype=torch.float64))
    for (left, left_window), (right, right_window) in pairwise(zip(starts, windows, strict=True)):
        shared = left + tile - right
        blend = min(BLEND, shared / 2)
        centres = torch.arange(shared, dtype=torch.float64) + 0.5
        rising = ((centres - (shared - blend) / 2) / blend).clamp(0, 1)
        right_window[:shared] *= rising[: len(right_window)]
        left_window[len(left_window) - shared :] *= 1 - rising

    total = torch.zeros(size, dtype=torch.float64)  # not 1 where three spans meet
    for start, window in zip(starts, windows, strict=True):
        total[start : start + len(window)] += window
    return [
        Span(start, start + len(window), (window / total[start : start + len(window)]).float())
        for start, window in zip(starts, windows, strict=True)
    ]


def tiled(
    denoise: Denoise,
    tile: int,
    overlap: int,
    multiple: int = 1,
    options: Callable[[Box], Mapping[str, Any]] | None = None,
    after: Callable[[int, int], None] | None = None,
) -> Denoise:
    """A denoiser that works through `spans` of both axes, one tile after the other, and joins what they give.

    Beside x and the result, memory is that of one tile. An image that fits in one tile is passed on as it is. multiple: the
    network's, so that tiles share the grid that it halves. options: more arguments for the denoiser in that part of the
    picture, such as the regions there. after: called with the tiles done and their number, for progress and interruption.
    """
    stride(tile, overlap, multiple)  # refuses before anything runs

    def denoise_tiled(x: Tensor, sigma: Tensor, conditioning: Conditioning, **given) -> Tensor:
        height, width = x.shape[2:]
        places = list(product(spans(height, tile, overlap, multiple), spans(width, tile, overlap, multiple)))
        denoised = None if len(places) == 1 else torch.zeros_like(x)
        for done, (rows, columns) in enumerate(places, 1):
            box = (rows.start / height, columns.start / width, rows.stop / height, columns.stop / width)
            more = {**given, **(options(box) if options else {})}
            if denoised is None:
                denoised = denoise(x, sigma, conditioning, **more)
            else:
                part = (..., slice(rows.start, rows.stop), slice(columns.start, columns.stop))
                low_res = None if conditioning.low_res is None else conditioning.low_res[part]
                result = denoise(x[part], sigma, replace(conditioning, low_res=low_res), **more)
                denoised[part] += result * torch.outer(rows.weights, columns.weights).to(result)
            if after:
                after(done, len(places))
        return denoised

    return denoise_tiled
