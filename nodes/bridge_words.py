"""Which characters of the prompt each token of a CONDITIONING stands for.

A prompt goes through much before it is tokens: weights in brackets, embeddings, templates of language models, chunks of 75,
padding. None of it is repeated here. Copies of the CLIP's tokenizers are given the prompt once more and note each piece of
text that ComfyUI hands to the library that makes tokens. ComfyUI numbers the pieces (its word ids), so each column says
which piece it comes from, and the library says which of the piece's characters. Where anything does not fit, `Untraceable`
is raised: no span is a guess.
"""

import copy
import logging
import unicodedata
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import accumulate
from numbers import Integral

import comfy.sd1_clip
from comfy.sd1_clip import SDTokenizer
from comfy.text_encoders.spiece_tokenizer import SPieceTokenizer

from ..ediffi_core.encoders import byte_characters
from ..ediffi_core.phrases import Range, characters, fold
from .bridge_conditioning import Words

NOTHING: Range = (0, 0)  # the span of start, end, padding and templates
MARKER = "\ue000"  # for private use: a prompt that no template contains
CUT_IN_FRONT = {"QwenImageTEModel", "OvisTEModel"}  # these leave out the columns of their template's beginning
logger = logging.getLogger("ediffi")


class Untraceable(ValueError):
    """The tokens of an encoder cannot be followed back to the prompt."""


def words_of(clip, text: str, length: int, silent: Collection[str] = ()) -> Words:
    """The words of a prompt and the span of each of the `length` columns that `clip` made of it.

    silent: keys of ComfyUI's tokens whose encoders were given an empty prompt. Never raises: a CLIP that cannot be followed
    has the spans None.
    """
    try:
        return _followed(clip, text, length, silent)
    except Exception as error:  # tokenizers of other packs fail in ways of their own, and the prompt is encoded
        logger.debug("The tokens of a prompt cannot be followed.", exc_info=error)
        return Words(plain(text), None, str(error))


def plain(text: str) -> str:
    """The prompt without the brackets of weights."""
    weighted = comfy.sd1_clip.token_weights(comfy.sd1_clip.escape_important(text), 1.0)
    return comfy.sd1_clip.unescape_important("".join(segment for segment, _ in weighted))


@dataclass(frozen=True)
class Piece:
    """What ComfyUI turns into tokens at once: some text, or the name of an embedding."""

    text: str
    ids: Sequence[int | None] | None  # None among them: a vector of an embedding; None: an embedding that is not there
    offsets: Sequence[Range]  # characters of `text`, for each token


def overheard(tokenizer: SDTokenizer) -> tuple[SDTokenizer, list[Piece]]:
    """A copy of a tokenizer, and the list in which it notes the pieces of the prompts that it is given."""
    pieces: list[Piece] = []
    kept = slice(tokenizer.tokens_start, -1 if tokenizer.tokenizer_adds_end_token else None)  # as ComfyUI cuts them

    def library(text: str, encoded: dict) -> None:
        ids, offsets = encoded["input_ids"][kept], encoded["offset_mapping"][kept]
        pieces.append(Piece(text, ids, _attached(text, [tokenizer.inv_vocab[i] for i in ids], offsets)))

    def embedding(name: str):
        vectors, *_, leftover = found = tokenizer._try_get_embedding(name)
        count = 0 if vectors is None else 1 if vectors.ndim == 1 else len(vectors)
        written = tokenizer.embedding_identifier + _without(name, leftover)
        pieces.append(Piece(written, None if vectors is None else [None] * count, [(0, len(written))] * count))
        return found

    listening = copy.copy(tokenizer)
    listening.tokenizer = Library(tokenizer.tokenizer, tokenizer.inv_vocab, library)
    listening._try_get_embedding = embedding
    return listening, pieces


def _attached(text: str, tokens: Sequence[str], offsets: Sequence[Range]) -> Sequence[Range]:
    """Of sentencepiece, whose words begin with "▁": on its own it belongs to the word, as some versions say and some do not.

    And of the parts of one character, such as its bytes, only the last knows its place.
    """
    if not any(token.startswith("▁") for token in tokens):
        return offsets
    offsets = list(offsets)
    for i in reversed(range(len(offsets) - 1)):
        if not text[slice(*offsets[i])].strip() and not tokens[i + 1].startswith("▁"):
            offsets[i] = offsets[i + 1]
    return offsets


class Library:
    """Stands before a library's tokenizer, asks it for offsets, and tells `heard` what it was asked."""

    def __init__(self, tokenizer, vocabulary: dict[int, str], heard) -> None:
        self.tokenizer = tokenizer
        self.vocabulary = vocabulary
        self.heard = heard

    def __call__(self, text: str, **options):
        try:
            encoded = self.tokenizer(text, return_offsets_mapping=True, **options)
        except (NotImplementedError, TypeError):  # transformers 4 for CLIP and Qwen; ComfyUI's own classes
            encoded = dict(self.tokenizer(text, **options))
        if "offset_mapping" not in encoded:
            ids = encoded["input_ids"]
            if isinstance(self.tokenizer, SPieceTokenizer):
                encoded["offset_mapping"] = sentencepiece_offsets(self.tokenizer.tokenizer, text, ids)
            else:
                clip = "a</w>" in self.vocabulary.values()
                encoded["offset_mapping"] = byte_offsets(text, [self.vocabulary[i] for i in ids], clip)
        self.heard(text, encoded)
        return encoded

    def __getattr__(self, name: str):
        return getattr(self.tokenizer, name)


def sentencepiece_offsets(processor, text: str, ids: Sequence[int]) -> list[Range]:
    """Of tokens with or without a start and an end."""
    bare = dict(add_bos=False, add_eos=False)
    try:
        encoded = processor.encode(text, out_type="offset_mapping", **bare)
        found, offsets = list(encoded["ids"]), list(encoded["offsets"])
    except (RuntimeError, ValueError):  # older versions, such as 0.2.0
        encoded = processor.encode(text, out_type="immutable_proto", **bare)
        found, offsets = [one.id for one in encoded.pieces], [(one.begin, one.end) for one in encoded.pieces]
    before = next((i for i in (0, 1) if list(ids[i : i + len(found)]) == found), None)
    if before is None:
        raise Untraceable("sentencepiece gives the prompt other tokens than ComfyUI")
    return [NOTHING] * before + offsets + [NOTHING] * (len(ids) - before - len(found))


def byte_offsets(text: str, tokens: Sequence[str], clip: bool) -> list[Range]:
    """Of byte-level BPE, whose tokens spell the bytes of the text, without regard to white space.

    CLIP spells capitals small and, where ftfy is installed, quotation marks straight.
    """
    value = dict(zip(byte_characters(), _byte_order(), strict=True))
    spelled, owners = bytearray(), []
    for i, token in enumerate(tokens):
        if not clip or token not in ("<|startoftext|>", "<|endoftext|>"):
            letters = bytes(value[c] for c in token.removesuffix("</w>" if clip else ""))
            letters = bytes(b for b in letters if not bytes([b]).isspace())
            spelled += letters
            owners += [i] * len(letters)

    offsets, place = [NOTHING] * len(tokens), 0
    for start, stop in characters(text):
        character = unicodedata.normalize("NFC", text[start:stop])
        if character.isspace() and (clip or character.isascii()):
            continue
        forms = (character.lower(), fold(character)) if clip else (character,)
        forms = [b"".join(form.encode().split()) for form in forms]
        form = next((form for form in forms if spelled.startswith(form, place)), None)
        if form is None:
            raise Untraceable("the tokenizer's tokens do not spell the prompt")
        for i in owners[place : place + len(form)]:
            offsets[i] = (start if offsets[i] == NOTHING else offsets[i][0], stop)
        place += len(form)
    if place < len(spelled):
        raise Untraceable("the tokenizer's tokens spell more than the prompt")
    return offsets


def _byte_order() -> list[int]:
    """The bytes in the order of `byte_characters`."""
    printable = [ord(c) for c in byte_characters() if ord(c) < 0x100]
    return printable + [b for b in range(256) if b not in printable]


def placed(pieces: Sequence[Piece], text: str, before: str = "", after: str = "") -> list[list[tuple]]:
    """(id, span in `text`) of the tokens of each piece that counts, where the pieces are all of before + text + after.

    White space is left out of the comparison, as ComfyUI does not keep all of it, and out of the spans' ends.
    """
    prompt = [(c, i) for i, c in enumerate(text) if not c.isspace()]
    whole = [*((c, None) for c in before), *prompt, *((c, None) for c in after)]
    if [c for c, _ in whole] != [c for piece in pieces for c in piece.text if not c.isspace()]:
        raise Untraceable("the tokenizer reads something else than the prompt")
    groups, place = [], 0
    for piece in pieces:
        ink = [0, *accumulate(not c.isspace() for c in piece.text)]
        spans = []
        for start, stop in piece.offsets:
            positions = [i for _, i in whole[place + ink[start] : place + ink[stop]] if i is not None]
            spans.append((positions[0], positions[-1] + 1) if positions else NOTHING)
        if piece.ids is not None:
            groups.append(list(zip(piece.ids, spans, strict=True)))
        place += ink[-1]
    return groups


def spans_of(rows: Sequence[list], groups: Sequence[list[tuple]], width: int) -> list[Range]:
    """The span of each column that an encoder, whose embeddings are `width` wide, makes of tokens with word ids."""
    waiting = [iter(group) for group in groups]
    spans: list[Range] = []
    for row in rows:
        ignored = 0
        for token, _, number in row:
            if number == 0:
                spans.append(NOTHING)
                continue
            known, span = next(waiting[number - 1], (None, None))
            if span is None or (known != token if isinstance(token, Integral) else known is not None):
                raise Untraceable("the CLIP's tokens are not those of its tokenizer")
            if known is None and token.shape[-1] != width:
                ignored += 1
            else:
                spans.append(span)
        spans += [NOTHING] * ignored  # ComfyUI leaves such vectors out and pads the end
    return spans


def _followed(clip, text: str, length: int, silent: Collection[str]) -> Words:
    model = getattr(clip, "cond_stage_model", None)
    kind, groups = token_axis(model)
    keys = [key for group in groups for key in group]
    words, rows, placements = traced(clip, text, keys)
    spans = {key: spans_of(rows[key], placements[key], width_of(model, key)) for key in keys}
    if silent:
        empty = clip.tokenize("")
        spans |= {key: [NOTHING] * sum(map(len, empty[key])) for key in keys if key in silent}
    columns = [span for group in groups for span in _shared([spans[key] for key in group])]
    cut = len(columns) - length
    if cut and (kind not in CUT_IN_FRONT or cut < 0):
        raise Untraceable(f"{kind} made {length} columns of {len(columns)} tokens")
    return Words(words, tuple(columns[cut:]))


def traced(clip, text: str, keys: Sequence[str]) -> tuple[str, dict[str, list], dict[str, list[list[tuple]]]]:
    """(prompt without weights, {key: rows of tokens with word ids}, {key: what `placed` says}), by key of ComfyUI's tokens."""
    tokens, pieces, templates = _listened(clip, text, keys)
    # language models read the brackets of weights as text, and a prompt may bring its own template
    unweighted = comfy.sd1_clip.unescape_important(comfy.sd1_clip.escape_important(text))
    readings = [(words, framed) for words in dict.fromkeys((plain(text), unweighted)) for framed in (True, False)]
    problem = None
    for words, framed in readings:
        try:
            found = {key: placed(pieces[key], words, *(templates[key] if framed else ())) for key in keys}
        except Untraceable as error:
            problem = problem or error
            continue
        return words, {key: tokens[key] for key in keys}, found
    raise problem


def width_of(model, key: str) -> int:
    """Of the embeddings of an encoder's tokens."""
    return part(model, key)[1].transformer.get_input_embeddings().embedding_dim


def part(owner, key: str):
    """(name, value) of the tokenizer or encoder for a key of ComfyUI's tokens; None for a part that is not there."""
    name = next((name for name in (key, f"clip_{key}") if hasattr(owner, name)), key)
    return name, getattr(owner, name, None)


def _listened(clip, text: str, keys: Sequence[str]) -> tuple[dict, dict[str, list[Piece]], dict[str, tuple[str, str]]]:
    """By key of ComfyUI's tokens: the prompt's tokens with word ids, its pieces, and what a template puts around it."""
    listening = copy.copy(clip)
    listening.tokenizer = copy.copy(clip.tokenizer)
    pieces = {}
    for key in keys:
        name, tokenizer = part(clip.tokenizer, key)
        if not isinstance(tokenizer, SDTokenizer):
            raise Untraceable(f"{type(clip.tokenizer).__name__} holds no tokenizer of ComfyUI for {name}")
        copied, pieces[key] = overheard(tokenizer)
        setattr(listening.tokenizer, name, copied)

    listening.tokenize(MARKER, return_word_ids=True)
    templates = {key: _around(heard) for key, heard in pieces.items()}
    for heard in pieces.values():
        heard.clear()
    return listening.tokenize(text, return_word_ids=True), pieces, templates


def token_axis(model) -> tuple[str, list[tuple[str, ...]]]:
    """The class that encodes, and the keys of the tokens behind each other in its columns; a tuple shares columns."""
    kind = next((kind for kind in type(model).__mro__ if "encode_token_weights" in vars(kind)), type(model)).__name__
    if kind in ("SD1ClipModel", "Flux2TEModel", *CUT_IN_FRONT):
        return kind, [(model.clip_name,)]
    if kind == "SDXLClipModel":
        return kind, [("l", "g")]
    if kind == "FluxClipModel":
        return kind, [("t5xxl",)]
    if kind == "SD3ClipModel":
        there = [tuple(key for key in keys if part(model, key)[1] is not None) for keys in (("l", "g"), ("t5xxl",))]
        return kind, [keys for keys in there if keys]
    raise Untraceable(f"the text encoder {kind} is not known")


def _shared(columns: list[list[Range]]) -> list[Range]:
    """Of two encoders side by side in the same columns, as long as the shorter."""
    length = min(map(len, columns))
    if any(spans[:length] != columns[0][:length] for spans in columns):
        raise Untraceable(
            "CLIP-L and CLIP-G hold different words in the same columns, as an embedding for one of them does"
        )
    return columns[0][:length]


def _around(pieces: Sequence[Piece]) -> tuple[str, str]:
    """What a template puts before and behind the prompt, without white space."""
    before, marker, after = _ink("".join(piece.text for piece in pieces)).partition(MARKER)
    if not marker or MARKER in after:
        raise Untraceable("the tokenizer changes the prompt")
    return before, after


def _ink(text: str) -> str:
    return "".join(text.split())


def _without(text: str, end: str) -> str:
    """`text` without the characters of `end`, which may differ in white space."""
    ink = [i for i, c in enumerate(text) if not c.isspace()]
    rest = len(_ink(end))
    return text[: ink[len(ink) - rest]] if rest else text
