"""Binding: the demo family's T5 is also asked what each of its tokens is about.

A large T5 learns from trillions of words that in "a red circle at the top" the colour, the shape and the place belong
together, and its tokens show it. A small one that only fills gaps in captions hardly learns it: with two objects, the token
of a colour told the place of its object in 27 of 100 captions (docs/demo.md). A denoiser whose cross-attention reads such
tokens cannot find out what is where. So linear layers, thrown away afterwards, read from every token of an object what is
said of that object, and from all tokens what is said of the whole picture.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..phrases import columns
from ..shapeworld.captions import Caption
from ..shapeworld.world import BACKGROUNDS, COLORS, PLACES, SHAPES, SIZES, STYLES
from .grounding import said_of

OF_OBJECTS = {"shape": tuple(SHAPES), "color": tuple(COLORS), "size": tuple(SIZES), "place": PLACES}
OF_PICTURES = {"style": STYLES, "background": tuple(BACKGROUNDS)}
TOPICS = OF_OBJECTS | OF_PICTURES
UNSAID = -100  # what cross-entropy passes over


@dataclass(frozen=True)
class Said:
    """The tokens of a caption, and of each what is said about what it belongs to."""

    ids: list[int]
    answers: Tensor  # (topics, L) int64: a place in the topic's list, or UNSAID


def said(words: Caption, ids: list[int], spans: list[tuple[int, int]]) -> Said:
    """spans: the characters of each token."""
    answers = torch.full((len(TOPICS), len(ids)), UNSAID)
    for row, (topic, options) in enumerate(TOPICS.items()):
        if topic in OF_PICTURES:
            claim = getattr(words.claims, topic)
            if claim is not None:
                answers[row] = options.index(claim)
            continue
        for of in words.claims.objects:
            claim = getattr(of, topic)
            if claim is not None:
                answers[row, columns(spans, said_of(words.text, of))] = options.index(claim)
    return Said(ids, answers)


class Readers(nn.Module):
    """A linear layer for each topic, on the tokens of an encoder."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.lines = nn.ModuleList([nn.Linear(width, len(options)) for options in TOPICS.values()])

    def forward(self, states: Tensor, answers: Tensor) -> Tensor:
        """(): cross-entropy of what is read, mean over tokens with an answer, then over topics.

        states: (B, L, E); answers: (B, topics, L), with UNSAID where there is nothing to read.
        """
        losses = []
        for line, wanted in zip(self.lines, answers.unbind(1), strict=True):
            if (wanted != UNSAID).any():
                losses.append(F.cross_entropy(line(states).float().transpose(1, 2), wanted, ignore_index=UNSAID))
        return torch.stack(losses).mean()


def stacked(answers: Sequence[Tensor]) -> Tensor:
    """Those of several captions, (B, topics, L), padded with UNSAID."""
    longest = max(one.shape[1] for one in answers)
    return torch.stack([F.pad(one, (0, longest - one.shape[1]), value=UNSAID) for one in answers])
