"""Grounding: while it learns, cross-attention is told where in the picture the words of each object belong.

Not in eDiff-I, which had the pictures to learn it from; with a few hundred thousand pictures a network does not find out by
itself. As in TokenCompose (Wang et al. 2023, arXiv:2312.03626), what the attention to an object's words misses of the object's
region is added to the denoising loss. The style belongs to all objects together, and its words are treated as one thing more.
Axis letters: B batch, O things that are said: the objects, and last the style; H heads, N cells, L tokens.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..conditioning import CLIP_LENGTH, T5_LENGTH, Conditioning
from ..phrases import columns
from ..shapeworld.captions import PLACE_WORDS, STYLE_WORDS, Caption, ObjectClaim
from ..shapeworld.world import Scene

MOST = 3  # objects of a scene


@dataclass(frozen=True)
class Objects:
    """Where the objects of some pictures lie, which tokens are about each, and which about their style."""

    discs: Tensor  # (B, O - 1, 3): x, y and radius, in shares of the side; a radius of 0 for no object
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
        """(B, O, N) float32: how much of each cell of a square picture, `side` x `side`, an object's disc covers, or any."""
        middles = (torch.arange(side, device=self.discs.device) + 0.5) / side
        x, y, radius = (self.discs[:, :, i, None, None].float() for i in range(3))
        distance = ((middles - x) ** 2 + (middles[:, None] - y) ** 2).sqrt() - radius
        covered = ((0.5 - distance * side).clamp(0, 1) * (radius > 0)).flatten(2)
        return torch.cat([covered, covered.amax(1, keepdim=True)], dim=1)


def objects_of(scenes: Sequence[Scene], captions: Sequence[Caption], encoders) -> Objects:
    """Of scenes and what is said about them. A caption's objects are in its own order."""
    size = len(captions)
    discs = torch.zeros(size, MOST, 3)
    clip, t5 = (torch.zeros(size, MOST + 1, length, dtype=torch.bool) for length in (CLIP_LENGTH, T5_LENGTH))
    tokens = encoders.tokens([words.text for words in captions])
    for row, (scene, words, read) in enumerate(zip(scenes, captions, tokens, strict=True)):
        said = dict(enumerate(said_of(words.text, claim) for claim in words.claims.objects))
        said[MOST] = said_of_style(words)
        for number, claim in enumerate(words.claims.objects):
            item = next(item for item in scene.objects if (item.shape, item.color) == (claim.shape, claim.color))
            discs[row, number] = torch.tensor([item.x, item.y, item.radius])
        for number, about in said.items():
            clip[row, number, columns(read.clip.spans, about)] = True
            t5[row, number, columns(read.t5.spans, about)] = True
    return Objects(discs, clip, t5)


def said_of(text: str, claim: ObjectClaim) -> list[tuple[int, int]]:
    """The ranges of characters that name an object and say where it is: "a [red circle] can be seen [at the top]"."""
    if claim.place is None:
        return [claim.span]
    start, stop = claim.span
    first, last = text.rfind(".", 0, start) + 1, text.find(".", stop)  # of its sentence; short captions have none
    for words in sorted(PLACE_WORDS[claim.place], key=len, reverse=True):
        places = [
            (first + m.start(), first + m.end()) for m in re.finditer(words, text[first : last if last > 0 else None])
        ]
        if places:  # behind the object's name if there is one, as in short captions, and the nearest
            return [claim.span, min(places, key=lambda place: (place[0] < stop, abs(place[0] - stop)))]
    return [claim.span]


def said_of_style(words: Caption) -> list[tuple[int, int]]:
    """The ranges of characters that name the style, if any do."""
    names = "|".join(STYLE_WORDS[words.claims.style]) if words.claims.style else "$^"
    return [m.span() for m in re.finditer(rf"\b({names})\b", words.text)]


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
    each picture whose words are there, and the style if its are.

    Of each: the share of all attention to its words that comes from its region, and, from its region, the share of
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
