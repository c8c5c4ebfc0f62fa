"""Paint-with-words: a person paints where a phrase of the prompt should appear; no training (eDiff-I, Sec. 4.3).

In every cross-attention layer the phrase's tokens become easier to attend to from the painted pixels:

    softmax((Q K^T + w A) / sqrt(d)) V,    w = w' log(1 + sigma) max(Q K^T)

A is 1 where image token and text token belong to one painted phrase. The weight follows the scale of each layer's own
scores and dies out with the noise. Axis letters: B batch, H heads, N image tokens, L text tokens, D channels per head.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention import attend
from .conditioning import Conditioning

SCALES = ("max", "std")  # the paper's, and the one that users of Stable Diffusion found (paint-with-words-sd, README)
NEGLIGIBLE = 1e-4  # of w' log(1 + sigma): below it, the bias is smaller than the rounding of half precision
BLOCK = 2**24  # scores held at once where their maximum is taken

Size = tuple[int, int]  # height, width
Box = tuple[float, float, float, float]  # a part of a picture: top, left, bottom, right in [0, 1]
WHOLE: Box = (0.0, 0.0, 1.0, 1.0)


@dataclass(frozen=True)
class Region:
    """A painted phrase: where it should appear, and which tokens it is."""

    phrase: str
    mask: Tensor  # (M, h, w) in [0, 1], any resolution; M is 1 or one for each image of a batch
    columns: tuple[int, ...]  # of the conditioning's token axis
    strength: float = 1.0

    def __post_init__(self) -> None:
        if self.mask.ndim != 3:
            raise ValueError(
                f"The mask of {self.phrase!r} must be (images, height, width), got {list(self.mask.shape)}."
            )
        if not math.isfinite(self.strength) or self.strength < 0:
            raise ValueError(f"The strength of {self.phrase!r} must be 0 or more, got {self.strength}.")


@dataclass(frozen=True)
class PaintSettings:
    """How strongly painted regions are obeyed, and at which noise levels."""

    weight: float = 0.4  # w'
    scale: str = "max"
    start_sigma: float = math.inf  # from this noise level on ...
    end_sigma: float = 0.0  # ... down to this one

    def __post_init__(self) -> None:
        if self.scale not in SCALES:
            raise ValueError(f"The scale of paint-with-words is one of {', '.join(SCALES)}, got {self.scale!r}.")

    def at(self, sigma: float) -> float:
        """w' log(1 + sigma), or 0 outside the window and where it would change nothing."""
        if not self.end_sigma <= sigma <= self.start_sigma:
            return 0.0
        weight = self.weight * math.log1p(sigma)
        return weight if abs(weight) > NEGLIGIBLE else 0.0


def flow_sigma(t: float) -> float:
    """The noise level of a flow model's time t as a ratio of noise to signal: t / (1 - t)."""
    return t / (1 - min(t, 0.999))  # at t = 1 there is no signal, and the ratio has no end


@dataclass(frozen=True)
class Regions:
    """The painted phrases of one conditioning. A mask is resized once for each grid of a network, and kept."""

    regions: tuple[Region, ...] = ()
    _masks: dict = field(default_factory=dict, repr=False, compare=False)

    def __bool__(self) -> bool:
        return bool(self.regions)

    def masks(self, grid: Size, box: Box = WHOLE, device=None, padded: tuple[Size, Size] | None = None) -> Tensor:
        """(M, N, R): how much of each image token, in row-major order of the h x w grid, each of R regions covers.

        padded: the sizes of the picture and of what the grid lies on, where a network pads the picture.
        """
        key = (grid, box, str(device), padded)
        if key not in self._masks:
            if len(self._masks) > 64:  # runs of many sizes on one conditioning
                self._masks.clear()
            images = max(len(region.mask) for region in self.regions)
            masks = [cropped(region.mask, box) for region in self.regions]
            if padded is not None:
                masks = [extended(mask, *padded) for mask in masks]
            masks = [resized(mask, grid).flatten(1).expand(images, -1) for mask in masks]
            self._masks[key] = torch.stack(masks, dim=-1).to(device)
        return self._masks[key]

    def tokens(self, length: int, columns=lambda columns: columns) -> Tensor:
        """(R, L): the strength of each region at its tokens. columns: where a network keeps the conditioning's columns."""
        tokens = torch.zeros(len(self.regions), length)
        for row, region in zip(tokens, self.regions, strict=True):
            row[list(columns(region.columns))] = region.strength
        return tokens

    def map(self, grid: tuple[int, int], length: int) -> Tensor:
        """A, (M, N, L); overlapping phrases add up."""
        return self.masks(grid) @ self.tokens(length)


def cropped(mask: Tensor, box: Box) -> Tensor:
    """The part of a mask (M, h, w) inside `box`, at least one pixel."""
    (height, width), (top, left, bottom, right) = mask.shape[1:], box
    y, x = min(round(top * height), height - 1), min(round(left * width), width - 1)
    return mask[:, y : max(y + 1, round(bottom * height)), x : max(x + 1, round(right * width))]


def extended(mask: Tensor, size: Size, padded: Size) -> Tensor:
    """A mask (M, h, w) of a picture of `size` that is padded at its lower and right edges: (M, *padded), as at the edges."""
    right, lower = padded[1] - size[1], padded[0] - size[0]
    return F.pad(resized(mask, size)[:, None], (0, right, 0, lower), mode="replicate")[:, 0]


def resized(mask: Tensor, grid: tuple[int, int]) -> Tensor:
    """A mask (M, h, w) on the grid of image tokens, (M, *grid), by area.

    The paper resizes bilinearly, which loses strokes thinner than a token; by area none is ever lost.
    """
    return F.adaptive_avg_pool2d(mask.float()[:, None], grid)[:, 0]


def level(q: Tensor, k: Tensor, scale: str = "max", hidden: Tensor | None = None) -> Tensor:
    """How large the scores Q K^T of each sample are, (B,): their maximum, not below 0, or their standard deviation.

    q: (B, H, N, D); k: (B, H, L, D); hidden: (B or 1, L) bool, tokens that do not count. Of each sample alone, so that
    an image does not depend on its batch. The scores are never held as a whole.
    """
    batch, heads, queries, _ = q.shape
    step = max(1, BLOCK // (batch * queries * k.shape[2]))
    tops, total, squares, count = [], 0.0, 0.0, 0
    for start in range(0, heads, step):
        scores = (q[:, start : start + step] @ k[:, start : start + step].transpose(-1, -2)).flatten(1, 2)  # (B, HN, L)
        if scale == "max":
            if hidden is not None:
                scores = scores.masked_fill(hidden[:, None], -math.inf)
            tops.append(scores.amax((1, 2)))
            continue
        visible = torch.ones_like(scores[:, :1]) if hidden is None else (~hidden[:, None]).to(scores)
        scores = scores.double() * visible
        total, squares = total + scores.sum((1, 2)), squares + scores.square().sum((1, 2))
        count = count + visible.double().sum((1, 2)) * scores.shape[1]
    if scale == "max":
        return torch.stack(tops).amax(0).clamp(min=0).float()
    return (squares / count - (total / count) ** 2).clamp(min=0).sqrt().float()


def bias(q: Tensor, k: Tensor, painted: Tensor, weight: float, scale: str = "max", hidden: Tensor | None = None,
         logit_scale: float | None = None) -> Tensor:  # fmt: skip
    """w A / sqrt(d): what is added to the scaled scores, (B, 1, N, L) float32.

    painted: A, (B or 1, N, L); weight: `PaintSettings.at`; logit_scale: 1 / sqrt(d) unless the network has its own.
    """
    factor = weight * level(q, k, scale, hidden) * (q.shape[-1] ** -0.5 if logit_scale is None else logit_scale)
    return (factor[:, None, None] * painted)[:, None]


def painted(denoise: Callable, regions: Sequence[Regions], settings: PaintSettings) -> Callable:
    """A denoiser of our networks that obeys painted regions, for `guidance.guided`.

    denoise: an ensemble; regions: of each request, columns as in the conditioning, 77 CLIP tokens and then T5's. Rows beyond
    the requests, such as guidance's unconditional ones, have none.
    """

    def denoise_painted(x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        weight = settings.at(sigma.max().item())
        rows = [row for row, held in enumerate(regions) if held]
        if not (weight and rows):
            return denoise(x, sigma, conditioning)

        def attend_painted(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None = None) -> Tensor:
            result = attend(q, k, v, hidden)
            if hidden is not None:  # cross-attention: it hides absent tokens
                shrink = math.isqrt(x.shape[2] * x.shape[3] // q.shape[2])
                grid = (x.shape[2] // shrink, x.shape[3] // shrink)
                maps = torch.cat([regions[row].map(grid, k.shape[2]) for row in rows]).to(q.device)
                added = bias(q[rows], k[rows], maps, weight, settings.scale, hidden[rows, 0, 0] < -1e4)
                result[rows] = attend(q[rows], k[rows], v[rows], (hidden[rows] + added).to(q.dtype))
            return result

        return denoise(x, sigma, conditioning, attend=attend_painted)

    return denoise_painted
