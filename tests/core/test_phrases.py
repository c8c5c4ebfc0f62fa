"""Phrases are found as a reader finds them: whole words, whatever the capitals, spaces, accents and quotation marks."""

import re
import time
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ediffi_core.phrases import characters, columns, find, occurrences

FOUND = {
    "capitals": ("A Red FOX", "red fox", ["Red FOX"]),
    "every one": ("red, Red; RED", "red", ["red", "Red", "RED"]),
    "none over another": ("cat cat cat cat cat", "cat cat", ["cat cat", "cat cat"]),
    "spaces": ("a red \t\n fox", "red  fox", ["red \t\n fox"]),
    "a space that does not break": ("a red\u00a0fox", "red fox", ["red\u00a0fox"]),
    "spaces around the phrase": ("a red fox", " red ", ["red"]),
    "punctuation next to it": ("(a fox,dog)", "fox", ["fox"]),
    "punctuation inside": ('he says "hi, you" to it', 'says "hi, you"', ['says "hi, you"']),
    "quotation marks": ("a \u201cred\u201d hat", '"red" hat', ["\u201cred\u201d hat"]),
    "apostrophes": ("the dog\u2019s ball", "dog's", ["dog\u2019s"]),
    "dashes": ("half\u2013moon", "half-moon", ["half\u2013moon"]),
    "half of a word with a hyphen": ("half-moon", "moon", ["moon"]),
    "underscores": ("long_hair", "hair", ["hair"]),
    "sharp s": ("Stra\u00dfe", "STRASSE", ["Stra\u00dfe"]),
    "an accent apart": ("a cafe\u0301.", "caf\u00e9", ["cafe\u0301"]),
    "an accent together": ("a caf\u00e9.", "cafe\u0301", ["caf\u00e9"]),
    "a ligature": ("\ufb01re", "fire", ["\ufb01re"]),
    "wide letters": ("\uff2d\uff2f\uff2f\uff2e", "moon", ["\uff2d\uff2f\uff2f\uff2e"]),
    "an ellipsis": ("wait\u2026 now", "wait... now", ["wait\u2026 now"]),
    "a soft hyphen": ("moon\u00adlight", "moonlight", ["moon\u00adlight"]),
    "chinese": ("\u4e00\u53ea\u7ea2\u8272\u7684\u72d0\u72f8", "\u7ea2\u8272", ["\u7ea2\u8272"]),
    "thai": ("\u0e41\u0e21\u0e27\u0e2a\u0e35\u0e41\u0e14\u0e07", "\u0e2a\u0e35", ["\u0e2a\u0e35"]),
    "latin among japanese": ("\u8d64\u3044fox\u3068", "fox", ["fox"]),
    "hangul in parts": (
        "\u1112\u1161\u11ab\u1100\u116e\u11a8",
        "\ud55c\uad6d",
        ["\u1112\u1161\u11ab\u1100\u116e\u11a8"],
    ),
    "cyrillic": (
        "\u0440\u044b\u0436\u0430\u044f \u041b\u0418\u0421\u0410",
        "\u043b\u0438\u0441\u0430",
        ["\u041b\u0418\u0421\u0410"],
    ),
    "an emoji": ("a \U0001f98a!", "\U0001f98a", ["\U0001f98a"]),
    "an emoji in colour": ("\u2764\ufe0f", "\u2764", ["\u2764\ufe0f"]),
    "digits": ("3 cats, 33 dogs", "3", ["3"]),
    "a percentage": ("50% off", "50%", ["50%"]),
}
ABSENT = {
    "the beginning of a word": ("moonlit", "moon"),
    "the end of a word": ("honeymoon", "moon"),
    "the middle of a word": ("a honeymoons b", "moon"),
    "part of a number": ("2023", "20"),
    "a letter of another accent": ("cafe\u0301", "cafe"),
    "half of a ligature": ("\ufb01", "f"),
    "one of two who are one emoji": ("\U0001f469\u200d\U0001f680", "\U0001f469"),
    "an emoji of another colour": ("\U0001f44d\U0001f3fd", "\U0001f44d"),
    "other words between": ("red old fox", "red fox"),
    "no space": ("redfox", "red fox"),
    "nothing": ("a fox", ""),
    "only spaces": ("a fox", "  "),
    "only what has no width": ("a fox", "\u200b"),
    "an empty prompt": ("", "fox"),
}


@pytest.mark.parametrize(("text", "phrase", "expected"), FOUND.values(), ids=FOUND)
def test_phrases_are_found_as_they_are_read(text, phrase, expected):
    found = occurrences(text, phrase)
    assert [text[slice(*place)] for place in found] == expected
    assert find(text, phrase) == found
    assert [find(text, phrase, nth) for nth in range(1, len(found) + 1)] == [[place] for place in found]


@pytest.mark.parametrize(("text", "phrase"), ABSENT.values(), ids=ABSENT)
def test_what_only_looks_like_a_phrase_is_none(text, phrase):
    assert occurrences(text, phrase) == []
    with pytest.raises(ValueError, match="phrase"):
        find(text, phrase)


def test_errors_say_what_to_write_instead():
    prompt = "a dog wearing a red scarf, in a moonlit wood"
    for phrase, message in {
        "red hat": "The phrase 'red hat' is not in the prompt 'a dog wearing a red scarf, in a moonlit wood'. Did you mean 'red",
        "moon": "Did you mean 'moonlit'?",
        "a Dog waering": "Did you mean 'a dog wearing'",
        "zebra": "'zebra' is not in the prompt .*Phrases repeat words of the prompt, in order.",
        " ": "The phrase is empty",
    }.items():
        with pytest.raises(ValueError, match=message):
            find(prompt, phrase)
    with pytest.raises(
        ValueError, match=r"'a' is in the prompt 3 times, so there is no occurrence 4. Choose a number from 1 to 3"
    ):
        find(prompt, "a", 4)
    with pytest.raises(
        ValueError, match=r"'dog' is in the prompt once, so there is no occurrence 0. Choose number 1, or all"
    ):
        find(prompt, "dog", 0)
    with pytest.raises(ValueError, match=r"not in the prompt 'x x [x ]*\.\.\.'"):
        find("x " * 20_000, "zebra")


def test_columns_are_those_that_touch_a_range():
    #        a       moon    lit     castle
    spans = [(0, 0), (0, 1), (2, 6), (6, 9), (10, 16), (0, 0), (0, 1), (2, 9), (10, 16), (0, 0)]
    assert columns(spans, [(2, 9)]) == [2, 3, 7]
    assert columns(spans, [(0, 1)]) == [1, 6]
    assert columns(spans, [(2, 6), (10, 16)]) == [2, 4, 7, 8]
    assert columns(spans, [(9, 10)]) == []
    assert columns(spans, []) == []


LETTERS = "aA\u00e9e\u0301\u00df\ufb01 \n-\u2013'\u2019(1\u65e5\u0e2a\u0e35\U0001f469\u200d\ufe0f\U0001f3fd\u0440\u200b\u2026\u1112\u1161"


@settings(deadline=None)
@given(st.text(LETTERS) | st.text())
def test_characters_cover_the_text_and_keep_what_belongs_together(text):
    parts = [text[start:stop] for start, stop in characters(text)]
    assert "".join(parts) == text
    assert all(parts)
    together = "".join(unicodedata.normalize("NFC", part) for part in parts)
    assert unicodedata.normalize("NFC", together) == unicodedata.normalize("NFC", text)
    assert all(not unicodedata.category(part[0]).startswith("M") for part in parts[1:])


WORDS = [
    "red", "a", "moonlit", "moon", "half-sun", "don't", "3", "33", "fox,", "(tall", "caf\u00e9", "stra\u00dfe",
    "\u043b\u0438\u0441\u0430", "\U0001f98a", "\u65e5\u672c", "\ud55c\uad6d", "long_hair",
]  # fmt: skip
SPACES = [" ", "  ", "\n", "\t ", "\u00a0", "\u3000"]
WRITTEN = [
    str,
    str.upper,
    str.title,
    lambda word: unicodedata.normalize("NFD", word),
    lambda word: word.replace("'", "\u2019"),
]


@settings(deadline=None)
@given(st.lists(st.sampled_from(WORDS), min_size=1, unique=True), st.data())
def test_any_run_of_words_is_found_where_it_stands(words, data):
    first = data.draw(st.integers(0, len(words) - 1))
    last = data.draw(st.integers(first, len(words) - 1))
    text, places = "", []
    for word in words:
        written = data.draw(st.sampled_from(WRITTEN))(word)
        text += data.draw(st.sampled_from(SPACES))
        places.append((len(text), len(text) + len(written)))
        text += written
    phrase = data.draw(st.sampled_from(SPACES)).join(words[first : last + 1])
    assert occurrences(text, phrase) == [(places[first][0], places[last][1])]


@settings(deadline=None)
@given(st.text("ab ,", max_size=20), st.text("ab ,", min_size=1, max_size=4))
def test_plain_text_is_searched_as_a_regular_expression_would(text, phrase):
    words = phrase.split()
    pattern = r"\s+".join(map(re.escape, words))
    left, right = (r"\b" if phrase.strip()[i : i + 1 or None].isalnum() else "" for i in (0, -1))
    expected = [match.span() for match in re.finditer(left + pattern + right, text)] if words else []
    assert occurrences(text, phrase) == expected


def test_long_runs_of_accents_are_read_in_time_for_their_length():
    text = "a" + "\u0315\u0300" * 10_000
    start = time.process_time()
    assert occurrences(text + " fox", "fox") == [(len(text) + 1, len(text) + 4)]
    assert time.process_time() - start < 2  # without a longest character it is 10


def test_similar_words_are_not_looked_for_in_what_is_too_long_to_compare():
    with pytest.raises(ValueError, match=r"Phrases repeat words of the prompt, in order\.$"):
        find("a red fox " * 2000, "a red fix " * 100)
