"""Phrases of a prompt: where they stand among its characters, and which tokens that is (eDiff-I, Sec. 4.3).

A range is (start, stop) in characters of the prompt as it is written. Text is compared as a reader would: without regard to
capitals, to how an accent is stored, to how wide a space or a dash is and how a quotation mark is bent.
"""

import difflib
import re
import unicodedata
from collections.abc import Iterable, Sequence

Range = tuple[int, int]

SINGLE_QUOTES = "`\u00b4\u02bc\u2018\u2019\u201a\u201b\u2032\u2039\u203a"
DOUBLE_QUOTES = "\u00ab\u00bb\u201c\u201d\u201e\u201f\u2033"
DASHES = "\u2010\u2011\u2012\u2013\u2014\u2015\u2212\ufe58"
TYPOGRAPHY = str.maketrans(
    dict.fromkeys(SINGLE_QUOTES, "'") | dict.fromkeys(DOUBLE_QUOTES, '"') | dict.fromkeys(DASHES, "-")
)
JOINER = "\u200d"  # makes one emoji of two
LONGEST = 64  # code points of one character: Unicode normalises longer ones in quadratic time, and no script has them
COMPARED = 1_000_000  # most characters of a prompt times those of a phrase for which similar words are looked for
SKIN_TONES = {chr(code) for code in range(0x1F3FB, 0x1F400)}
# Scripts, by the first word of their characters' names, in which a word is written against its neighbours.
UNSPACED = re.compile(r"(CJK|IDEOGRAPHIC|HIRAGANA|KATAKANA|BOPOMOFO|HANGUL|THAI|LAO|KHMER|MYANMAR|TIBETAN)[ -]")
WORD = re.compile(r"\w+(?:['\u2019-]\w+)*")


def occurrences(text: str, phrase: str) -> list[Range]:
    """The ranges of `text` that read like `phrase`, from left to right, none over another.

    Whole words only: no letter or digit at either end of the phrase continues in the text, so "moon" is not in "moonlit". In
    scripts that put no spaces between words, such as Chinese, Japanese and Thai, a phrase may begin and end anywhere.
    """
    read, starts, stops = _folded(text)
    wanted = _folded(phrase)[0].strip()
    found: list[Range] = []
    begin = read.find(wanted) if wanted else -1
    while begin >= 0:
        end = begin + len(wanted)
        whole = begin in starts and end in stops  # not half a ligature
        if whole and not _continues(read, begin) and not _continues(read, end):
            found.append((starts[begin], stops[end]))
            begin = read.find(wanted, end)
        else:
            begin = read.find(wanted, begin + 1)
    return found


def find(text: str, phrase: str, nth: int | None = None) -> list[Range]:
    """All occurrences of a phrase, or a list of only the nth, counted from 1. Raises ValueError where there is none."""
    if not phrase.strip():
        raise ValueError("The phrase is empty. Write some words of the prompt.")
    found = occurrences(text, phrase)
    if not found:
        near = _similar(text, phrase)
        hint = "Phrases repeat words of the prompt, in order."
        if near:
            hint = f"Did you mean {' or '.join(map(repr, near))}?"
        raise ValueError(f"The phrase {phrase!r} is not in the prompt {_shortened(text)!r}. {hint}")
    if nth is None:
        return found
    if not 1 <= nth <= len(found):
        count = f"{len(found)} times" if len(found) > 1 else "once"
        numbers = f"a number from 1 to {len(found)}" if len(found) > 1 else "number 1"
        raise ValueError(
            f"The phrase {phrase!r} is in the prompt {count}, so there is no occurrence {nth}. Choose {numbers}, or all."
        )
    return [found[nth - 1]]


def columns(spans: Iterable[Range], ranges: Sequence[Range]) -> list[int]:
    """The tokens that stand for any character of the ranges. `spans`: the characters of each token, (0, 0) for none."""
    return [
        column
        for column, (start, stop) in enumerate(spans)
        if any(max(start, first) < min(stop, last) for first, last in ranges)
    ]


def characters(text: str) -> list[Range]:
    """What a reader takes for characters: a letter with its accents, a syllable of Hangul, an emoji with its modifiers."""
    ranges: list[Range] = []
    for i, c in enumerate(text):
        start = ranges[-1][0] if ranges else 0
        if ranges and not c.isascii() and i - start < LONGEST and _joins(text[start:i], c):
            ranges[-1] = (start, i + 1)
        else:
            ranges.append((i, i + 1))
    return ranges


def _joins(before: str, c: str) -> bool:
    if unicodedata.category(c)[0] == "M" or c == JOINER or before[-1] == JOINER or c in SKIN_TONES:
        return True
    together, apart = (unicodedata.normalize("NFC", before + c), unicodedata.normalize("NFC", before) + c)
    return len(together) < len(apart)


def _folded(text: str) -> tuple[str, dict[int, int], dict[int, int]]:
    """(text to compare, {place in it: start of the character that begins there}, {place: stop of the one that ends there})."""
    read: list[str] = []
    place, starts, stops = 0, {}, {}
    for start, stop in characters(text):
        folded = fold(text[start:stop])
        if folded == " " and read and read[-1] == " ":
            stops[place] = stop
        elif folded:
            starts[place] = start
            read.append(folded)
            place += len(folded)
            stops[place] = stop
    return "".join(read), starts, stops


def fold(character: str) -> str:
    """One character as it is compared; nothing for what has no width."""
    if character.isspace():
        return " "
    if character.isascii():
        return character.translate(TYPOGRAPHY).lower()
    compatible = unicodedata.normalize("NFKC", character.translate(TYPOGRAPHY))
    folded = unicodedata.normalize("NFKC", compatible.casefold())
    return "".join(c for c in folded if unicodedata.category(c) != "Cf" and c not in "\ufe0e\ufe0f")


def _continues(read: str, place: int) -> bool:
    """Does a word go on across `place`?"""
    if not 0 < place < len(read):
        return False
    around = read[place - 1], read[place]
    return all(map(_in_word, around)) and not any(map(_unspaced, around))


def _in_word(c: str) -> bool:
    return c.isalnum() or unicodedata.category(c)[0] == "M"


def _unspaced(c: str) -> bool:
    return UNSPACED.match(unicodedata.name(c, "")) is not None


def _similar(text: str, phrase: str) -> list[str]:
    """Up to three runs of words of the text that look like the phrase, best first."""
    if len(text) * len(phrase) > COMPARED:
        return []
    words = [match.span() for match in WORD.finditer(text)]
    length = max(1, len(WORD.findall(phrase)))
    runs: dict[str, str] = {}
    for count in (length, length + 1, length - 1):
        for i in range(len(words) - count + 1 if count else 0):
            run = text[words[i][0] : words[i + count - 1][1]]
            runs.setdefault(_folded(run)[0], run)
    return [runs[near] for near in difflib.get_close_matches(_folded(phrase)[0], runs, n=3)]


def _shortened(text: str, length: int = 80) -> str:
    return text if len(text) <= length else f"{text[:length]}..."
