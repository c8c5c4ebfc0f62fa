"""What each encoder of a CLIP reads of a prompt, token by token, and what it leaves out: for the canvas and the log.

ComfyUI reads prompts of any length, in chunks or at once, but not every encoder of every CLIP reads all of it:

    ours                 CLIP and T5 are cut to the paper's lengths
    HiDream              T5 is cut to 128 tokens
    PixelDiT             its language model is cut to 298 tokens
    Flux, HiDream,       of CLIP only the pooled vector is used, and that is the first chunk's
    HunyuanVideo,
    Kandinsky 5
    SDXL, SD3            where an embedding makes one CLIP's prompt longer than the other's, both end with the shorter
    all                  an embedding is left out by encoders whose width it does not have

Nothing of this is repeated here, except the third and the last two: what was cut is what the tokenizer made and the tokens lack.
"""

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from numbers import Integral

import comfy.clip_model
import comfy.text_encoders.t5

from ..ediffi_core.phrases import Range
from .bridge_encoders import is_ours
from .bridge_words import NOTHING, Untraceable, part, spans_of, token_axis, traced, width_of

ENDLESS = 10_000  # a chunk of so many tokens or more is no chunk
POOLED = {
    "FluxClipModel": {"l"},
    "HiDreamTEModel": {"l", "g"},
    "HunyuanVideoClipModel": {"l"},
    "Kandinsky5TEModel": {"l"},
}  # class that encodes -> keys of the encoders of which only the first chunk's pooled vector is used
MOST_BOXES = 400  # of one encoder, on the canvas
OUTPUT = "ediffi_tokens"  # web/tokens.js reads this among a node's outputs
logger = logging.getLogger("ediffi")

Heard = tuple[Range, float]  # the characters of a token, and its weight


@dataclass(frozen=True)
class Encoder:
    """One text encoder of a CLIP."""

    key: str  # of ComfyUI's tokens
    kind: str  # "T5", "CLIP" or ""
    name: str


@dataclass
class Reading:
    """What one encoder reads of a prompt."""

    encoder: Encoder
    text: str = ""  # the prompt without weights
    chunks: list[list[Heard]] = field(default_factory=list)
    cut: list[Range] = field(default_factory=list)  # of tokens that it does not read
    ignored: list[Range] = field(default_factory=list)  # of embeddings that are not of its width
    most: int | None = None  # tokens of the prompt that a chunk can hold
    off: bool = False  # it was given an empty prompt

    def sentences(self) -> list[str]:
        """What a person should know; empty if the encoder reads everything."""
        found, name = [], self.encoder.name
        if self.cut:
            rest = " ".join(self.text[self.cut[0][0] :].split())
            quoted = rest if len(rest) <= 60 else f"{rest[:60]}..."
            found.append(
                f"{name} does not read the last {len(self.cut)} tokens of the prompt, from {quoted!r} on; it reads "
                f"{sum(map(len, self.chunks))} tokens."
            )
        if self.ignored:
            names = ", ".join(dict.fromkeys(self.text[slice(*span)] for span in self.ignored))
            found.append(f"{name} leaves out {names}, which holds no vectors of its width.")
        return found


def encoders_of(clip, tokens: dict) -> list[Encoder]:
    """The encoders of a CLIP that ComfyUI's tokens are for."""
    if is_ours(clip):
        return [Encoder("l", "CLIP", "CLIP"), Encoder("t5xxl", "T5", "T5")]
    found, model = [], getattr(clip, "cond_stage_model", None)
    for key in tokens:
        transformer = getattr(part(model, key)[1], "transformer", None)
        if isinstance(transformer, comfy.text_encoders.t5.T5):
            found.append(Encoder(key, "T5", "T5" if key == "t5xxl" else key))
        elif isinstance(transformer, comfy.clip_model.CLIPTextModel):
            found.append(Encoder(key, "CLIP", f"CLIP-{key.upper()}"))
        elif transformer is not None:
            found.append(Encoder(key, "", key))
    return found


def readings(clip, text: str, encoders: Sequence[Encoder], silent: Collection[str] = ()) -> list[Reading]:
    """What each encoder reads of the prompt; those that cannot be followed are left out. Never raises."""
    result = {encoder.key: Reading(encoder, off=True) for encoder in encoders if encoder.key in silent}
    for encoder in encoders:
        if encoder.key in silent:
            continue
        try:
            result[encoder.key] = _reading(clip, text, encoder)
        except Exception as error:  # tokenizers of other packs fail in ways of their own, and the prompt is encoded
            logger.debug("The tokens of %s cannot be followed.", encoder.name, exc_info=error)
    for key, chunks in _limits(getattr(clip, "cond_stage_model", None), result).items():
        if key in result:
            reading = result[key]
            reading.cut = [span for chunk in reading.chunks[chunks:] for span, _ in chunk] + reading.cut
            reading.chunks = reading.chunks[:chunks]
    return [result[encoder.key] for encoder in encoders if encoder.key in result]


def _limits(model, found: dict[str, Reading]) -> dict[str, int]:
    """By key of encoders: how many of their chunks count."""
    kinds = {kind.__name__ for kind in type(model).__mro__} & POOLED.keys()
    limits = {key: 1 for kind in kinds for key in POOLED[kind]}
    try:
        groups = token_axis(model)[1]
    except Untraceable:
        return limits
    for group in groups:
        beside = [key for key in group if key in found and not found[key].off]
        limits |= {key: min(len(found[other].chunks) for other in beside) for key in beside}
    return limits


def _reading(clip, text: str, encoder: Encoder) -> Reading:
    key, ours = encoder.key, is_ours(clip)
    words, all_rows, all_groups = traced(clip, text, [key])
    rows, groups = all_rows[key], all_groups[key]
    tokenizer = part(clip.tokenizer, key)[1]
    width = tokenizer.embedding_size if ours else width_of(clip.cond_stage_model, key)
    try:
        spans_of(rows, groups, width)  # raises where tokens and words do not fit
    except Untraceable:
        groups = groups[1:]  # PixelDiT counts the tokens of its instructions first
        spans_of(rows, groups, width)
    reading, waiting = Reading(encoder, words), [iter(group) for group in groups]
    for row in rows:
        chunk: list[Heard] = []
        for token, weight, number in row:
            span = next(waiting[number - 1])[1] if number else NOTHING
            if span == NOTHING:
                continue
            if not isinstance(token, Integral) and token.shape[-1] != width:
                reading.ignored.append(span)
            else:
                chunk.append((span, weight))
        reading.chunks.append(chunk)
    reading.cut = [span for group in waiting for _, span in group if span != NOTHING]
    limit = tokenizer.limit(clip.tokenizer_options) if ours else tokenizer.max_length
    if limit < ENDLESS:
        reading.most = limit - (tokenizer.start_token is not None) - (tokenizer.end_token is not None)
    return reading


def shown(found: Sequence[Reading]) -> dict:
    """What a node returns as `ui`: the picture of the tokens under its widgets, and sentences about what was cut."""
    sentences = [sentence for reading in found for sentence in reading.sentences()]
    picture = {OUTPUT: [{"encoders": [_shown(reading) for reading in found]}]}
    return picture | ({"text": sentences} if sentences else {})


def _shown(reading: Reading) -> dict:
    left, chunks = MOST_BOXES, []
    for chunk in reading.chunks:
        boxes = _boxes(reading.text, chunk)
        chunks.append(boxes[:left])
        left -= len(chunks[-1])
    cut = _boxes(reading.text, [(span, 1.0) for span in reading.ignored + reading.cut])
    return {
        "name": reading.encoder.name,
        "off": reading.off,
        "count": sum(map(len, reading.chunks)),
        "most": reading.most,
        "chunks": [chunk for chunk in chunks if chunk],
        "cut": cut[:MOST_BOXES],
        "cut_count": len(reading.cut) + len(reading.ignored),
        "notes": reading.sentences(),
    }


def _boxes(text: str, tokens: Sequence[Heard]) -> list[tuple[str, float, int]]:
    """(piece of the prompt, weight, how many tokens stand for it): several do for a rare character, or an embedding.

    Some versions of T5's library give the space before a word the first letter of that word, too.
    """
    boxes: list[tuple[int, int, float, int]] = []
    for (start, stop), weight in tokens:
        if boxes and boxes[-1][0] <= start < boxes[-1][1] and boxes[-1][2] == weight:
            first, last, _, count = boxes[-1]
            boxes[-1] = (first, max(last, stop), weight, count + 1)
        else:
            boxes.append((start, stop, weight, 1))
    return [(text[start:stop], weight, count) for start, stop, weight, count in boxes]
