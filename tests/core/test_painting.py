"""Paintings from the canvas, from strangers, and from the colours of a picture."""

import base64
import json
import time
import tracemalloc
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ediffi_core.painting import MAX_PHRASES, from_colors, parse

GOLDEN = Path(__file__).parents[1] / "web" / "painting.json"  # tests/web holds the canvas to it
HALF = base64.b64encode(bytes([0x80, 1, 0x80, 1])).decode()  # 128 cells without, 128 with


def phrase(**changes) -> dict:
    entry = {
        "id": "a1",
        "text": "red circle",
        "nth": None,
        "color": "#e69f00",
        "strength": 1.0,
        "on": True,
        "rle": HALF,
    }
    return entry | changes


def value(*phrases, **changes) -> str:
    return json.dumps({"v": 1, "w": 16, "h": 16, "mode": "exclusive", "phrases": list(phrases)} | changes)


def runs(*lengths: int) -> str:
    """An independent LEB128, one number at a time."""
    code = bytearray()
    for length in lengths:
        while length > 127:
            code.append(length % 128 + 128)
            length //= 128
        code.append(length)
    return base64.b64encode(code).decode()


def test_the_canvas_and_the_core_mean_the_same_cells():
    painting = parse(GOLDEN.read_text())
    assert (painting.width, painting.height) == (64, 48)
    red, blue = painting.phrases  # the third is switched off
    expected = torch.zeros(2, 48, 64, dtype=torch.bool)
    expected[0, 6:30, 8:24] = True
    expected[1, 24:44, 16:60] = True
    assert torch.equal(torch.stack([red.mask, blue.mask]), expected)
    assert (red.id, red.text, red.nth, red.strength, red.color) == ("p1", "red circle", None, 1.0, "#e69f00")
    assert (blue.id, blue.nth, blue.strength) == ("p2", 2, 0.5)


def test_a_colour_map_has_only_so_many_colours():
    lines = "\n".join(f"#{i:06x} = cat" for i in range(257))
    with pytest.raises(ValueError, match="The colours are more than 256"):
        from_colors(torch.zeros(2, 2, 3), lines, 0.1)


@pytest.mark.parametrize("empty", ["", " \n"])
def test_without_a_painting_there_are_no_phrases(empty):
    assert parse(empty).phrases == ()


def test_what_a_script_may_leave_out_has_defaults_and_unknown_keys_do_no_harm():
    entry = {"id": "a", "text": "cat", "color": "#FFFFFF", "rle": HALF, "softness": [1, {"x": None}]}
    (cat,) = parse(json.dumps({"v": 1, "w": 16, "h": 16, "phrases": [entry], "reference": {"name": "../x"}})).phrases
    assert (cat.nth, cat.strength, cat.color) == (None, 1.0, "#ffffff")
    assert cat.mask[8:].all()
    assert not cat.mask[:8].any()


@settings(deadline=None)
@given(st.integers(16, 80), st.integers(16, 80), st.randoms(use_true_random=False))
def test_any_area_is_read_back(width, height, random):
    lengths, left = [random.randint(0, 300)], width * height
    while sum(lengths) < left:
        lengths.append(random.randint(1, 300))
    lengths[-1] -= sum(lengths) - left
    painted, cells = False, []
    for length in lengths:
        cells += [painted] * length
        painted = not painted
    (one,) = parse(value(phrase(rle=runs(*lengths)), w=width, h=height)).phrases
    assert torch.equal(one.mask, torch.tensor(cells).view(height, width))


REFUSED = {
    "not JSON": ("{", r"not JSON \(Expecting property name .* at character 1\).*Load the workflow again"),
    "another value of the node": ("fixed", "not JSON"),
    "a list": ("[]", "is a list; expected a JSON object"),
    "no version": (value(v=None), '"v" is missing or null; expected a whole number of 1 or more'),
    "a newer version": (value(v=2), "has format 2, and this version of the pack reads format 1. Update the pack"),
    "a version of words": (value(v="1"), '"v" is "1"'),
    "true for a number": (value(w=True), '"w" is true; expected a whole number from 16 to 1024'),
    "a side too short": (value(w=15), '"w" is 15'),
    "a side too long": (value(h=1025), '"h" is 1025'),
    "half a cell": (value(h=20.5), '"h" is 20.5'),
    "another mode": (value(mode="soft"), '"mode" is "soft"; expected "exclusive" or "overlap"'),
    "no phrases": (value(phrases=None), '"phrases" is missing or null; expected a list'),
    "too many phrases": (
        value(*[phrase(id=str(i)) for i in range(MAX_PHRASES + 1)]),
        "has 33 entries; expected at most 32",
    ),
    "a phrase of words": (value("cat"), r'"phrases"\[0\] is "cat"; expected an object'),
    "no text": (value(phrase(text=" ")), r'"phrases"\[0\] "text" is " "; expected text'),
    "a text too long": (value(phrase(text="x" * 1001)), '"text" has 1,001 characters; expected at most 1,000'),
    "half a character": (value(phrase(text="a\ud800")), '"text" holds half a character'),
    "no id": (value(phrase(id=7)), r'"phrases"\[0\] \("red circle"\) "id" is 7'),
    "two of one id": (value(phrase(), phrase()), r'"phrases"\[1\] "id" is "a1" like an earlier one'),
    "a colour's name": (value(phrase(color="red")), '"color" is "red"; expected "#rrggbb"'),
    "occurrence 0": (value(phrase(nth=0)), '"nth" is 0; expected a whole number of 1 or more'),
    "a negative strength": (value(phrase(strength=-1)), '"strength" is -1; expected a number from 0 to 100'),
    "a strength beyond all": (value(phrase(strength=1e9)), '"strength" is 1000000000.0'),
    "an endless strength": ('{"v": 1, "w": 16, "h": 16, "phrases": [{"strength": Infinity}]}', "holds Infinity"),
    "no number": ('{"v": 1, "w": NaN}', "holds NaN; expected JSON, which has no such number"),
    "beyond doubles": (value(phrase()).replace("1.0", "1e999"), '"strength" is Infinity'),
    "on as a number": (value(phrase(on=1)), '"on" is 1; expected true or false'),
    "no area": (value(phrase(rle=None)), '"rle" is missing or null; expected a base64 string'),
    "no base64": (value(phrase(rle="a*")), '"rle" is not base64'),
    "an empty area": (value(phrase(rle="")), '"rle" ends within a run'),
    "half a run": (value(phrase(rle=base64.b64encode(b"\x80").decode())), '"rle" ends within a run'),
    "too few cells": (value(phrase(rle=runs(128))), "covers 128 cells; expected runs that cover 16 x 16 = 256 cells"),
    "too many cells": (value(phrase(rle=runs(128, 129))), "covers 257 cells"),
    "empty runs": (value(phrase(rle=runs(128, 0, 128))), "holds an empty run"),
    "a run beyond all": (value(phrase(rle=runs(2**60))), "holds a run longer than any picture"),
    "a long number": ('{"v": 1' + "0" * 100_000 + "}", "holds a number of 100001 digits"),
    "too much": (" " * 4_000_001, "has 4,000,001 characters; expected at most 4,000,000"),
    "a switched-off phrase is read too": (value(phrase(on=False, rle="")), '"rle" ends within a run'),
}


@pytest.mark.parametrize(("text", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_is_no_painting_is_refused_by_the_key_that_is_wrong(text, message):
    with pytest.raises(ValueError, match=message) as refused:
        parse(text)
    assert str(refused.value).startswith("The painting")
    assert len(str(refused.value)) < 300


def test_an_object_is_not_its_text():
    with pytest.raises(ValueError, match="is an object; expected a JSON string"):
        parse({"v": 1})


HOSTILE = {
    "nesting": "[" * 3_900_000,
    "nesting of objects": '{"a":' * 700_000,
    "nesting under a phrase": value(phrase()).replace('"red circle"', "[" * 900_000),
    "runs of nothing": value(phrase(rle=base64.b64encode(bytes(2_900_000)).decode())),
    "one number of all bytes": value(phrase(rle=base64.b64encode(b"\xff" * 2_900_000).decode())),
    "the longest runs, again and again": value(phrase(rle=runs(*[2**21 - 1] * 900_000))),
    "phrases of nothing": value(*[0] * 1_200_000),
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_values_are_refused_quickly_and_in_little_memory(text):
    tracemalloc.start()
    began = time.process_time()
    with pytest.raises(ValueError, match="painting"):
        parse(text)
    seconds = time.process_time() - began
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert seconds < 10  # the whole of it traced; what grows faster than the value takes minutes
    assert peak < 256 * 2**20


def test_the_largest_painting_is_read_in_the_memory_of_its_masks():
    stripes = runs(*[64] * (1024 * 1024 // 64))
    entries = [phrase(id=str(i), rle=stripes) for i in range(MAX_PHRASES)]
    painting = parse(value(*entries, w=1024, h=1024))
    assert sum(one.mask.numel() for one in painting.phrases) == MAX_PHRASES * 1024 * 1024


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["v", "w", "id", "rle"]), inner),
    max_leaves=8,
)
keys = st.sampled_from(["v", "w", "h", "mode", "phrases", "id", "text", "nth", "color", "strength", "on", "rle"])


def read(text: str):
    """The painting, or the words it was refused with. Anything else is a fault."""
    try:
        return parse(text)
    except ValueError as refused:
        return str(refused)


@settings(max_examples=200, deadline=None)
@given(keys, anything)
def test_any_change_of_a_key_is_read_or_refused_in_words(key, changed):
    entry = phrase()
    stored = {"v": 1, "w": 16, "h": 16, "phrases": [entry]}
    (entry if key in entry else stored)[key] = changed
    painting = read(json.dumps(stored))
    if isinstance(painting, str):
        assert painting.startswith("The painting")
    else:
        assert all(one.mask.shape == (painting.height, painting.width) for one in painting.phrases)


@settings(deadline=None)
@given(st.text(max_size=200) | st.binary(max_size=40))
def test_any_text_is_read_or_refused_in_words(content):
    if isinstance(content, bytes):
        content = value(phrase(rle=base64.b64encode(content).decode()))
    painting = read(content)
    assert painting.startswith("The painting") if isinstance(painting, str) else painting.width in (0, 16)


# colours


def colors(*rows: list[str]) -> torch.Tensor:
    return torch.tensor([[[int(c[i : i + 2], 16) / 255 for i in (0, 2, 4)] for c in row] for row in rows])


LINES = "#ff0000 = red hat\n\n  #0000FF=blue sea = deep\n"


def test_each_colour_gets_the_pixels_nearest_to_it():
    image = colors(["ff0000", "fe0201", "800000"], ["0000ff", "7f0081", "ffffff"])
    (hat, red), (sea, blue) = from_colors(image, LINES, 1.0)
    assert (hat, sea) == ("red hat", "blue sea = deep")
    assert red.tolist() == [[1, 1, 1], [0, 0, 1]]
    assert torch.equal(red + blue, torch.ones(2, 3))


def test_pixels_farther_than_the_tolerance_belong_to_no_phrase():
    image = colors(["ff0000", "e60000", "000000"])
    masks = {t: from_colors(image, LINES, t)[0][1].tolist() for t in (0.0, 0.1, 0.6)}
    assert masks == {0.0: [[1, 0, 0]], 0.1: [[1, 1, 0]], 0.6: [[1, 1, 1]]}


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_at_tolerance_1_no_edge_leaves_a_hole(seed):
    image = torch.rand(5, 7, 3, generator=torch.Generator().manual_seed(seed))
    masks = [mask for _, mask in from_colors(image, LINES + "#808080 = fog", 1.0)]
    assert torch.equal(torch.stack(masks).sum(0), torch.ones(5, 7))


def test_tolerance_0_takes_a_colour_of_eight_bits_however_it_was_rounded():
    image = colors(["ff7f01"]) + torch.tensor([0, 1e-4, -1e-4])
    assert from_colors(image, "#ff7f01 = x", 0.0)[0][1].item() == 1
    assert from_colors(colors(["ff7f02"]), "#ff7f01 = x", 0.0)[0][1].item() == 0


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("", 'The colours are empty. Write a line "#rrggbb = phrase"'),
        ("#ff0000 = a\nred = b", 'Line 2 of the colours is "red = b"; expected "#rrggbb = phrase"'),
        ("#ff0000", 'Line 1 of the colours is "#ff0000"'),
        ("#ff0000 =", "Line 1 of the colours"),
        ("#f00 = a", "Line 1 of the colours"),
        ("#ff0000 = a\n#FF0000 = b", "Line 2 of the colours repeats #FF0000"),
    ],
)
def test_lines_that_are_no_colours_are_named(lines, message):
    with pytest.raises(ValueError, match=message):
        from_colors(torch.zeros(2, 2, 3), lines, 1.0)


def test_colours_want_a_picture_and_a_tolerance():
    with pytest.raises(ValueError, match=r"shape \(height, width, 3\), got \[1, 2, 2, 3\]"):
        from_colors(torch.zeros(1, 2, 2, 3), LINES, 1.0)
    with pytest.raises(ValueError, match=r"The tolerance is nan; expected 0 \(exact colours\) to 1"):
        from_colors(torch.zeros(2, 2, 3), LINES, float("nan"))
