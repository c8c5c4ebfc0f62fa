"""Grounding: while it learns, cross-attention is told where in the picture the words of each object belong.

Not in eDiff-I, which had the pictures to learn it from; with a few hundred thousand pictures a network does not find out by
itself. As TokenCompose (Wang et al. 2023, arXiv:2312.03626) adds to the denoising loss what the attention to an object's
words misses of the object's region. Axis letters: B batch, O objects, H heads, N cells, L tokens.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..conditioning import CLIP_LENGTH, T5_LENGTH, Conditioning
from ..phrases import columns
from ..shapeworld.captions import PLACE_WORDS, Caption
from ..shapeworld.world import Scene

MOST = 3  # objects of a scene


@dataclass(frozen=True)
class Objects:
    """Where the objects of some pictures lie, and which tokens are about each."""

    discs: Tensor  # (B, O, 3): x, y and radius, in shares of the side; a radius of 0 for no object
    clip: Tensor  # (B, O, 77) bool
    t5: Tensor  # (B, O, 113) bool

    def rows(self, rows) -> "Objects":
        return Objects(self.discs[rows], self.clip[rows], self.t5[rows])

    def to(self, device) -> "Objects":
        return Objects(self.discs.to(device), self.clip.to(device), self.t5.to(device))

    def tokens(self, conditioning: Conditioning) -> Tensor:
        """(B, O, L) float32 over the tokens of a network's context; what is dropped or padding is no object's."""
        clip, t5 = conditioning.clip_mask, conditioning.t5_mask
        about = [self.clip[:, :, : clip.shape[1]] & clip[:, None], self.t5[:, :, : t5.shape[1]] & t5[:, None]]
        others = about[0].new_zeros(*about[0].shape[:2], 2)  # the image token and the null token
        return torch.cat([*about, others], dim=2).float()

    def regions(self, side: int) -> Tensor:
        """(B, O, N) float32: how much of each cell of a square picture, `side` x `side`, an object's disc covers."""
        middles = (torch.arange(side, device=self.discs.device) + 0.5) / side
        x, y, radius = (self.discs[:, :, i, None, None].float() for i in range(3))
        distance = ((middles - x) ** 2 + (middles[:, None] - y) ** 2).sqrt() - radius
        return ((0.5 - distance * side).clamp(0, 1) * (radius > 0)).flatten(2)


def objects_of(scenes: Sequence[Scene], captions: Sequence[Caption], encoders) -> Objects:
    """Of scenes and what is said about them. A caption's objects are in its own order."""
    size = len(captions), MOST
    discs = torch.zeros(*size, 3)
    clip, t5 = (torch.zeros(*size, length, dtype=torch.bool) for length in (CLIP_LENGTH, T5_LENGTH))
    tokens = encoders.tokens([words.text for words in captions])
    for row, (scene, words, read) in enumerate(zip(scenes, captions, tokens, strict=True)):
        for number, claim in enumerate(words.claims.objects):
            item = next(item for item in scene.objects if (item.shape, item.color) == (claim.shape, claim.color))
            discs[row, number] = torch.tensor([item.x, item.y, item.radius])
            about = said_of(words.text, claim)
            clip[row, number, columns(read.clip.spans, about)] = True
            t5[row, number, columns(read.t5.spans, about)] = True
    return Objects(discs, clip, t5)


def said_of(text: str, claim) -> list[tuple[int, int]]:
    """The ranges of characters that name an object and say where it is: "a red circle can be seen [at the top]"."""
    ranges = [claim.span]
    if claim.place is not None:
        first = text.rfind(".", 0, claim.span[0]) + 1
        stop = text.find(".", claim.span[1])
        for words in sorted(PLACE_WORDS[claim.place], key=len, reverse=True):
            places = [m.span() for m in re.finditer(re.escape(words), text[first : stop if stop > 0 else None])]
            if places:  # in a short caption, the first behind the object's name
                near = min(
                    places, key=lambda span: (first + span[0] < claim.span[1], abs(first + span[0] - claim.span[1]))
                )
                return [*ranges, (first + near[0], first + near[1])]
    return ranges


class Watched:
    """Attention by products that keeps the weights of cross-attention: `kept`, each (B, H, N, L)."""

    def __init__(self) -> None:
        self.kept: list[Tensor] = []

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
        weights = (scores if bias is None else scores + bias).softmax(-1)
        if bias is not None:
            self.kept.append(weights)
        return weights @ v


def grounding_loss(kept: Sequence[Tensor], objects: Objects, conditioning: Conditioning) -> Tensor:
    """(): how far attention is from the objects, as mean logarithms: over layers, over pictures, and over those objects of
    each picture whose words are there.

    Of each object: the share of all attention to its words that comes from its region, and, from its region, the share of
    attention that goes to its words; mean over heads.
    """
    tokens = objects.tokens(conditioning)
    losses = []
    for weights in kept:
        side = int(weights.shape[2] ** 0.5)
        regions = objects.regions(side)
        known = (tokens.any(2) & regions.any(2)).float()  # (B, O)
        attention = torch.einsum("bnl,bol->bon", weights.float().mean(1), tokens)
        inside = (attention * regions).sum(2)
        missed = -(inside / attention.sum(2).clamp(min=1e-8)).clamp(min=1e-6).log()
        strayed = -(inside / regions.sum(2).clamp(min=1e-8)).clamp(min=1e-6).log()
        losses.append((((missed + strayed) * known).sum(1) / known.sum(1).clamp(min=1)).mean())
    return torch.stack(losses).mean()
