"""CONDITIONING: how the paper's embeddings travel through ComfyUI's nodes.

The tensor of a CONDITIONING holds the token layout of the paper, (B, 77 + 113, E) with E the wider of the two encoders:
CLIP tokens first, then T5, each padded with zeros in width. `pooled_output` is the pooled CLIP text. A token that is all
zeros is absent (padding, or a dropped embedding), so no mask travels beside the tensor and ComfyUI's own nodes do what
one expects: averaging keeps the words of both prompts, ConditioningZeroOut gives the null conditioning of the paper
(eDiff-I, Sec. 4.2), ConditioningConcat puts two token lists behind each other.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ediffi_core.conditioning import CLIP_LENGTH, T5_LENGTH, Conditioning
from ..ediffi_core.intervals import NoiseInterval
from ..ediffi_core.phrases import Range
from ..ediffi_core.unet import NetworkConfig

LENGTH = CLIP_LENGTH + T5_LENGTH
WORDS = "ediffi_words"  # key of the conditioning dict that holds a `Words`
EXPERT = "ediffi_expert"  # key of the conditioning dict that holds (index, number of experts)

FOREIGN = (
    "This CONDITIONING was not made by eDiff-I's encoders: {what}. Encode the prompt with eDiff-I Text Encode or CLIP Text "
    "Encode, using the CLIP of eDiff-I Load Encoders with the encoders that the ensemble was trained with."
)


@dataclass(frozen=True)
class Words:
    """The prompt that a CONDITIONING was made from, without weights' brackets, and where its tokens stand in it.

    spans: for each column of the token axis the characters (start, stop) of `text` that it stands for; (0, 0) for start,
    end, padding, and an encoder that was switched off. None where the tokens cannot be followed; `lost` says why.
    """

    text: str
    spans: tuple[Range, ...] | None = None
    lost: str = ""

    def without(self, columns: slice) -> "Words":
        """Where these columns stand for no text."""
        if self.spans is None:
            return self
        spans = list(self.spans)
        spans[columns] = [(0, 0)] * len(spans[columns])
        return replace(self, spans=tuple(spans))


def packed(clip: Tensor, t5: Tensor) -> Tensor:
    """(B, 77, E_clip) and (B, n 113, E_t5) -> (B, n 190, max(E_clip, E_t5)), where CLIP is absent from all but the first 190."""
    width, chunks = max(clip.shape[-1], t5.shape[-1]), t5.shape[1] // T5_LENGTH
    clip = F.pad(clip, (0, width - clip.shape[-1], 0, (chunks - 1) * CLIP_LENGTH))
    t5 = F.pad(t5, (0, width - t5.shape[-1]))
    pairs = zip(clip.split(CLIP_LENGTH, dim=1), t5.split(T5_LENGTH, dim=1), strict=True)
    return torch.cat([tokens for pair in pairs for tokens in pair], dim=1)


def packed_spans(clip: Sequence[Range], t5: Sequence[Range]) -> tuple[Range, ...]:
    """The spans of the columns that `packed` makes, from those of each encoder's tokens."""
    spans: list[Range] = []
    for start in range(0, max(1, len(t5)), T5_LENGTH):
        for part, length in ((clip if start == 0 else (), CLIP_LENGTH), (t5[start : start + T5_LENGTH], T5_LENGTH)):
            spans += [*part, *[(0, 0)] * (length - len(part))]
    return tuple(spans)


def unpacked(
    tokens: Tensor, pooled: Tensor, image: Tensor, image_strength: Tensor, config: NetworkConfig
) -> Conditioning:
    """The inverse of `packed`, with masks read from the tokens. `tokens` may be several prompts long, (B, n 190, E)."""
    parts = tokens.split([CLIP_LENGTH, T5_LENGTH] * (tokens.shape[1] // LENGTH), dim=1)
    clip = torch.cat(parts[::2], dim=1)[..., : config.clip_width]
    t5 = torch.cat(parts[1::2], dim=1)[..., : config.t5_width]
    return Conditioning(
        clip_tokens=clip,
        clip_mask=(clip != 0).any(-1),
        clip_pooled=pooled,
        t5_tokens=t5,
        t5_mask=(t5 != 0).any(-1),
        image=image,
        image_strength=image_strength,
    )


def check_conditioning(tokens: Tensor | None, pooled: Tensor | None, config: NetworkConfig) -> None:
    """Raise ValueError unless a CONDITIONING has the layout that the network reads."""
    width = max(config.clip_width, config.t5_width)
    if tokens is None or tokens.ndim != 3:
        raise ValueError(FOREIGN.format(what="it holds no tokens"))
    if tokens.shape[1] == 0 or tokens.shape[1] % LENGTH:
        raise ValueError(FOREIGN.format(what=f"it holds {tokens.shape[1]} tokens, the network reads {LENGTH}"))
    if tokens.shape[2] != width:
        raise ValueError(FOREIGN.format(what=f"its tokens are {tokens.shape[2]} wide, the network reads {width}"))
    if pooled is None:
        raise ValueError(FOREIGN.format(what="it has no pooled output"))
    if pooled.shape[-1] != config.pooled_width:
        raise ValueError(
            FOREIGN.format(
                what=f"its pooled output is {pooled.shape[-1]} wide, the network reads {config.pooled_width}"
            )
        )


class Addressed:
    """Stands among a conditioning's values and refuses every call that did not come through an ensemble."""

    def process_cond(self, *_, **__):
        raise ValueError(
            "This CONDITIONING holds one prompt for each expert of an ensemble, but the MODEL that samples is no ensemble. "
            "Connect the MODEL of eDiff-I Expert Ensemble or eDiff-I Load Ensemble, or leave out eDiff-I Expert "
            "Conditioning."
        )

    def can_concat(self, other) -> bool:
        return False


def for_experts(conditionings: Sequence[list]) -> list:
    """One CONDITIONING from one for each expert, listed from high to low noise. Each entry says whose it is."""
    return [
        [
            tokens,
            values
            | {
                EXPERT: (index, len(conditionings)),
                "model_conds": values.get("model_conds", {}) | {EXPERT: Addressed()},
            },
        ]
        for index, conditioning in enumerate(conditionings)
        for tokens, values in conditioning
    ]


def of_expert(conds: Sequence[dict], index: int, intervals: Sequence[NoiseInterval]) -> list[dict]:
    """The conds that expert `index` shall use, as ComfyUI carries them in a run: its own, and those of no one.

    Raises ValueError where they were made for another number of experts.
    """
    mine = []
    for cond in conds:
        owner, experts = cond.get(EXPERT, (index, len(intervals)))
        if experts != len(intervals):
            raise ValueError(
                f"eDiff-I Expert Conditioning holds prompts for {experts} experts, but this ensemble has {len(intervals)}: "
                f"sigma in {', '.join(map(str, intervals))}. Connect one conditioning for each, from high to low noise."
            )
        if owner == index:
            model_conds = cond["model_conds"].copy()
            model_conds.pop(EXPERT, None)
            mine.append(cond | {"model_conds": model_conds})
    return mine
