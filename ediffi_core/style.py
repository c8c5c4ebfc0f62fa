"""Style: reference pictures of any shape and number become what the conditioning holds, one embedding and its strength.

The paper speaks of one reference and not of its shape (eDiff-I, Sec. 5.3 and Fig. 16); what other shapes and several
references mean is our choice. Axis letters: B batch, C channels, H W image, E embedding width.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

FITS = ("whole", "crop")
GRAY = 0.5  # what shows through transparent pixels
BAND = 64  # rows


def square(references: Tensor, size: int, fit: str = "whole") -> Tensor:
    """References as CLIP looks at them, (B, 3, size, size) in [0, 1].

    references: (B, C, H, W) in [0, 1], where C is 1 for gray, 2 for gray and alpha, 3 for RGB, 4 for RGB and alpha.
    fit: "whole" leaves nothing out and pads to a square, with the colour of the sides that it lengthens: another one would
    be told to CLIP as part of the look. "crop" takes the square in the middle. Both are resized as in `encoders.resized`,
    before anything else is done, and one by one: a reference may be large.

    Raises ValueError for another fit, an empty batch, other shapes, and pixels that are no numbers.
    """
    if fit not in FITS:
        raise ValueError(f"A reference is fitted by one of {', '.join(FITS)}, got {fit!r}.")
    if references.ndim != 4 or not 1 <= references.shape[1] <= 4:
        raise ValueError(
            f"References are pictures (batch, channels, height, width) of 1 to 4 channels, got {list(references.shape)}."
        )
    if 0 in references.shape:
        raise ValueError(
            f"There is no reference: {len(references)} pictures of {references.shape[3]}x{references.shape[2]} pixels. "
            f"Give at least one picture."
        )
    return torch.stack([_square(reference, size, fit) for reference in references])


def _square(reference: Tensor, size: int, fit: str) -> Tensor:
    height, width = reference.shape[1:]
    shape = (size, size)
    if fit == "crop":
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        reference = reference[:, top : top + side, left : left + side]
    else:
        scale = size / max(height, width)
        shape = (max(1, round(scale * height)), max(1, round(scale * width)))
    small = _resized(reference, shape)
    if not small.isfinite().all():
        raise ValueError(
            f"The reference of {width}x{height} pixels holds values that are not numbers (NaN or infinite). Look at the "
            f"picture and at what made it."
        )
    small = small.clamp(0, 1)

    height, width = shape
    ends = [small[:, 0], small[:, -1]] if height < width else [small[..., 0], small[..., -1]]
    padded = torch.cat(ends, dim=1).mean(1)[:, None, None].repeat(1, size, size)
    top, left = (size - height) // 2, (size - width) // 2
    padded[:, top : top + height, left : left + width] = small
    return padded


def _resized(reference: Tensor, shape: tuple[int, int]) -> Tensor:
    """(C, H, W) with or without alpha -> (3, *shape)."""
    if len(reference) % 2:
        return _bicubic(reference, shape).expand(3, -1, -1)
    # columns first, in bands of rows: colours times alpha are as large as the picture
    narrow = reference.new_empty(len(reference) - 1, reference.shape[1], shape[1], dtype=torch.float32)
    for band, part in zip(reference.split(BAND, dim=1), narrow.split(BAND, dim=1), strict=True):
        seen = (band[:-1] - GRAY) * band[-1:]
        part.copy_(_bicubic(seen, (band.shape[1], shape[1])))
    return (_bicubic(narrow, shape) + GRAY).expand(3, -1, -1)


def _bicubic(planes: Tensor, shape: tuple[int, int]) -> Tensor:
    if planes.shape[1:] == shape:
        return planes.float()
    return F.interpolate(planes[None].float(), shape, mode="bicubic", antialias=True)[0]


def averaged(embeddings: Sequence[Tensor], strengths: Sequence[float]) -> tuple[Tensor, float]:
    """One style of at least one reference: (E,) the average of their embeddings, (E,) each, weighted by their strengths,
    and its strength, the largest of theirs.

    A single reference is itself and one of strength 0 is as if it were not there, bit for bit.
    Raises ValueError for a strength that is negative or no number.
    """
    for strength in strengths:
        if not (math.isfinite(strength) and strength >= 0):
            raise ValueError(
                f"The strength of a style must be 0 or more, got {strength}. 0 is no style, 1 is all of it."
            )
    total = sum(strengths)
    if total == 0:
        return torch.zeros_like(embeddings[0]), 0.0
    pairs = zip(embeddings, strengths, strict=True)
    return sum(strength / total * embedding for embedding, strength in pairs if strength > 0), max(strengths)
