"""A prompt through the encoders of any CLIP: each of them can be switched off, and T5 read further than it usually does."""

import logging

import comfy.sd

from ..ediffi_core.conditioning import CLIP_LENGTH
from .bridge_conditioning import LENGTH, WORDS
from .bridge_encoders import is_ours
from .bridge_encoding import encoded
from .bridge_tokens import Encoder, Reading, encoders_of, readings
from .bridge_words import words_of

OUR_COLUMNS = {"l": slice(CLIP_LENGTH), "t5xxl": slice(CLIP_LENGTH, LENGTH)}
logger = logging.getLogger("ediffi")


def encode_text(
    clip: comfy.sd.CLIP, text: str, use_t5: bool = True, use_clip: bool = True, t5_length: int = 0
) -> tuple[list, list[Reading]]:
    """(CONDITIONING that remembers its words, what each encoder read of the prompt).

    Of our CLIP a switched-off encoder leaves no trace, as in the paper's ablation (eDiff-I, Sec. 5.2); of others it reads an
    empty prompt, for their models expect all encoders. t5_length: 0, or tokens that our T5 reads at most, those beyond
    113 in further chunks of the conditioning; other T5s read on anyway, and are padded to as many. Raises ValueError where a
    switch or the length would have no effect, or nothing would read the prompt.
    """
    ours, tokens = is_ours(clip), clip.tokenize(text)
    encoders = encoders_of(clip, tokens)
    silent = silenced(encoders, {"T5": use_t5, "CLIP": use_clip}, ours)
    if t5_length and use_t5:
        clip = with_t5_length(clip, encoders, t5_length, ours)
        tokens = clip.tokenize(text)
    empty = clip.tokenize("") if silent else {}
    for key in silent:
        tokens[key] = empty[key]

    conditioning = encoded(clip, tokens)
    if ours:
        words = tokens.words
        for key in silent:
            words = words.without(OUR_COLUMNS[key])
    else:
        words = words_of(clip, text, conditioning[0][0].shape[1], silent)
    found = readings(clip, text, encoders, silent)
    for reading in found:
        for sentence in reading.sentences():
            logger.warning(sentence)
    return [[tensor, values | {WORDS: words}] for tensor, values in conditioning], found


def silenced(encoders: list[Encoder], used: dict[str, bool], ours: bool) -> list[str]:
    """Keys of the encoders that are switched off. Raises ValueError where a switch has no effect or leaves nothing."""
    silent = []
    for kind, on in used.items():
        keys = [encoder.key for encoder in encoders if encoder.kind == kind]
        if not on and not keys:
            raise ValueError(
                f"use_{kind.lower()} is off, but this CLIP has no {kind} that could be left out: {listed(encoders)}. Set "
                f"use_{kind.lower()} to true."
            )
        silent += [] if on else keys
    if silent and len(silent) == len(encoders) and not ours:
        switches = " and ".join(f"use_{kind.lower()}" for kind, on in used.items() if not on)
        raise ValueError(
            f"With {switches} off nothing reads the prompt: {listed(encoders)}. Switch one on; for no text at all leave the "
            f"prompt empty."
        )
    return silent


def listed(encoders: list[Encoder]) -> str:
    if not encoders:
        return "its encoders are unknown"
    *others, last = [encoder.name for encoder in encoders]
    return f"it has {', '.join(others)} and {last}" if others else f"it has {last} alone"


def with_t5_length(clip: comfy.sd.CLIP, encoders: list[Encoder], length: int, ours: bool) -> comfy.sd.CLIP:
    """A clone whose T5 reads up to `length` tokens, or is padded to them. Raises ValueError for a CLIP without such a T5."""
    keys = [encoder.key for encoder in encoders if encoder.kind == "T5"]
    if not keys:
        raise ValueError(f"t5_length is {length}, but this CLIP has no T5: {listed(encoders)}. Set t5_length to 0.")
    clip = clip.clone()
    for key in keys:
        clip.set_tokenizer_option(f"{key}_length" if ours else f"{key}_min_length", length)
    tokens = clip.tokenize("")
    if not ours and any(len(row) < length for key in keys for row in tokens[key]):
        raise ValueError(
            f"t5_length is {length}, but the tokenizer of this CLIP ({type(clip.tokenizer).__name__}) takes no length. Set "
            f"t5_length to 0."
        )
    return clip
