"""Paintings: where a person painted which phrase, as the canvas stores it, or as the colours of a picture.

The text form is JSON, {"v": 1, "w", "h", "mode", "phrases": [...]}, in which each phrase has an "rle" of its area: lengths of
alternating runs, unpainted first, row by row, as unsigned LEB128 in base64. `web/painter_core.js` writes it. It comes with
workflows from strangers, so `parse` believes nothing, and needs time and memory in proportion to the text and the grids.
"""

import base64
import binascii
import json
import math
import re
from dataclasses import dataclass
from typing import NoReturn

import numpy as np
import torch
from torch import Tensor

VERSION = 1
MIN_SIDE, MAX_SIDE = 16, 1024  # cells
MAX_PHRASES = 32
MAX_COLORS = 256  # of a colour map; each becomes a mask as large as the picture
MAX_STRENGTH = 100
MAX_PHRASE = 1_000  # characters
MAX_VALUE = 4_000_000  # characters
MAX_ID = 100  # characters
VARINT = 3  # bytes hold the longest run, 1024 x 1024 cells

COLOR = re.compile(r"#[0-9a-f]{6}", re.IGNORECASE)


@dataclass(frozen=True)
class PaintedPhrase:
    """A phrase that is switched on, and its area."""

    id: str
    text: str
    nth: int | None  # which of its occurrences in the prompt, from 1; None is each
    strength: float
    mask: Tensor  # (H, W) bool
    color: str  # "#rrggbb"


@dataclass(frozen=True)
class Painting:
    """Width and height in cells; both 0 without a painting."""

    width: int
    height: int
    phrases: tuple[PaintedPhrase, ...]


def parse(value: str) -> Painting:
    """The painting of a widget's value. "" holds none. Raises ValueError, naming the key, for what is not a painting."""
    if not isinstance(value, str):
        _refuse("", f"is {_named(value)}", 'a JSON string, or "" without a painting')
    if len(value) > MAX_VALUE:
        _refuse("", f"has {len(value):,} characters", f"at most {MAX_VALUE:,}")
    if not value.strip():
        return Painting(0, 0, ())

    stored = _json(value)
    if not isinstance(stored, dict):
        _refuse("", f"is {_named(stored)}", "a JSON object")
    version = _whole(stored, "v", 1, None)
    if version > VERSION:
        raise ValueError(
            f"The painting has format {version}, and this version of the pack reads format {VERSION}. Update the pack."
        )
    width, height = _whole(stored, "w", MIN_SIDE, MAX_SIDE), _whole(stored, "h", MIN_SIDE, MAX_SIDE)
    mode = stored.get("mode", "exclusive")
    if mode not in ("exclusive", "overlap"):
        _refuse('"mode"', f"is {_named(mode)}", '"exclusive" or "overlap"')
    entries = stored.get("phrases")
    if not isinstance(entries, list):
        _refuse('"phrases"', f"is {_named(entries)}", "a list")
    if len(entries) > MAX_PHRASES:
        _refuse('"phrases"', f"has {len(entries)} entries", f"at most {MAX_PHRASES}")

    phrases = [_phrase(entry, f'"phrases"[{i}]', width, height) for i, entry in enumerate(entries)]
    ids = [phrase.id for phrase, _ in phrases]
    for i, one in enumerate(ids):
        if one in ids[:i]:
            _refuse(f'"phrases"[{i}] "id"', f"is {_named(one)} like an earlier one", "an id of its own for each phrase")
    return Painting(width, height, tuple(phrase for phrase, on in phrases if on))


def from_colors(image: Tensor, lines: str, tolerance: float) -> list[tuple[str, Tensor]]:
    """The areas of a picture that have the colours named in `lines`, as (phrase, mask (H, W) float).

    image: (H, W, 3) in [0, 1]. lines: "#rrggbb = phrase" each. A pixel belongs to the nearest colour, the first of equally
    near ones, unless it is farther than `tolerance` from all of them: 0 takes exact colours only, 1 leaves out no pixel,
    so that edges blended by antialiasing or JPEG leave no hole. Distance is Euclidean in RGB, black to white is 1.
    """
    if image.dim() != 3 or image.shape[-1] != 3:
        raise ValueError(f"A colour map needs a picture of shape (height, width, 3), got {list(image.shape)}.")
    if not 0 <= tolerance <= 1:
        raise ValueError(f"The tolerance is {tolerance}; expected 0 (exact colours) to 1 (every pixel gets a phrase).")
    phrases = _color_lines(lines)

    nearest = torch.full(image.shape[:2], -1, device=image.device)
    least = torch.full(image.shape[:2], math.inf, device=image.device)
    for index, (color, _) in enumerate(phrases):
        channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        distance = (image.float() - image.new_tensor(channels, dtype=torch.float32)).square().mean(-1).sqrt()
        nearer = distance < least
        least = torch.where(nearer, distance, least)
        nearest = torch.where(nearer, index, nearest)
    exact = 0.5 / 255  # a colour of eight bits, however it was rounded
    nearest = torch.where(least <= max(tolerance, exact), nearest, -1)
    return [(phrase, (nearest == index).float()) for index, (_, phrase) in enumerate(phrases)]


def _color_lines(lines: str) -> list[tuple[str, str]]:
    """[("#rrggbb", phrase)] of the lines that are not blank."""
    found: dict[str, str] = {}
    for number, line in enumerate(lines.splitlines(), 1):
        if not line.strip():
            continue
        color, equals, phrase = (part.strip() for part in line.partition("="))
        if not (equals and phrase and COLOR.fullmatch(color)):
            raise ValueError(
                f'Line {number} of the colours is {_named(line)}; expected "#rrggbb = phrase", like "#ff0000 = red hat".'
            )
        if color.lower() in found:
            raise ValueError(f"Line {number} of the colours repeats {color}. Give each phrase a colour of its own.")
        if len(found) == MAX_COLORS:
            raise ValueError(f"The colours are more than {MAX_COLORS}. Leave out those whose phrases are not needed.")
        found[color.lower()] = phrase
    if not found:
        raise ValueError('The colours are empty. Write a line "#rrggbb = phrase" for each colour of the picture.')
    return list(found.items())


def _phrase(entry, where: str, width: int, height: int) -> tuple[PaintedPhrase, bool]:
    """(phrase, whether it is switched on)."""
    if not isinstance(entry, dict):
        _refuse(where, f"is {_named(entry)}", "an object")
    text = _text(entry, where, "text", MAX_PHRASE)
    where = f"{where} ({_named(text)})"
    name = _text(entry, where, "id", MAX_ID)
    color = _text(entry, where, "color", 7)
    if not COLOR.fullmatch(color):
        _refuse(f'{where} "color"', f"is {_named(color)}", '"#rrggbb"')
    nth = None if entry.get("nth") is None else _whole(entry, "nth", 1, None, where)
    strength = entry.get("strength", 1.0)
    if isinstance(strength, bool) or not isinstance(strength, int | float) or not 0 <= strength <= MAX_STRENGTH:
        _refuse(f'{where} "strength"', f"is {_named(strength)}", f"a number from 0 to {MAX_STRENGTH}")
    on = entry.get("on", True)
    if not isinstance(on, bool):
        _refuse(f'{where} "on"', f"is {_named(on)}", "true or false")
    mask = _mask(entry.get("rle"), f'{where} "rle"', width, height)
    return PaintedPhrase(name, text, nth, float(strength), mask, color.lower()), on


def _mask(rle, where: str, width: int, height: int) -> Tensor:
    """(H, W) bool. Nothing is expanded before the runs are known to cover the grid exactly."""
    if not isinstance(rle, str):
        _refuse(where, f"is {_named(rle)}", "a base64 string")
    try:
        code = np.frombuffer(base64.b64decode(rle, validate=True), dtype=np.uint8)
    except (binascii.Error, ValueError):
        _refuse(where, "is not base64", "standard base64")
    if not code.size or code[-1] > 127:
        _refuse(where, "ends within a run", "whole LEB128 numbers")

    ends = np.flatnonzero(code < 128)
    starts = np.concatenate([[0], ends[:-1] + 1])
    places = np.arange(code.size) - np.repeat(starts, ends - starts + 1)  # of each byte within its number
    if places.max() >= VARINT:
        _refuse(where, "holds a run longer than any picture", f"runs that cover {width} x {height} cells")
    runs = np.add.reduceat((code & 127).astype(np.int64) << (7 * places), starts)
    if runs.sum() != width * height:
        _refuse(where, f"covers {runs.sum():,} cells", f"runs that cover {width} x {height} = {width * height:,} cells")
    if (runs[1:] == 0).any():
        _refuse(where, "holds an empty run", "runs of 1 cell or more after the first")

    painted = np.arange(runs.size) % 2 == 1
    return torch.from_numpy(np.repeat(painted, runs).reshape(height, width))


def _json(value: str):
    def constant(name):
        _refuse("", f"holds {name}", "JSON, which has no such number")

    def whole(digits):
        if len(digits) > 20:  # Python reads long ones in quadratic time
            _refuse("", f"holds a number of {len(digits)} digits", "numbers of at most 20")
        return int(digits)

    try:
        return json.loads(value, parse_constant=constant, parse_int=whole)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"The painting is not JSON ({error.msg} at character {error.pos}); expected what the painting's canvas stores, "
            'or "" without a painting. Load the workflow again, or clear the painting.'
        ) from None
    except RecursionError:
        raise ValueError("The painting is nested too deep; expected what the painting's canvas stores.") from None


def _whole(entry: dict, key: str, low: int, high: int | None, where: str = "") -> int:
    number = entry.get(key)
    if isinstance(number, bool) or not isinstance(number, int) or number < low or (high is not None and number > high):
        expected = f"a whole number from {low} to {high}" if high is not None else f"a whole number of {low} or more"
        _refuse(f'{where} "{key}"'.strip(), f"is {_named(number)}", expected)
    return number


def _text(entry: dict, where: str, key: str, longest: int) -> str:
    text = entry.get(key)
    if not isinstance(text, str) or not text.strip():
        _refuse(f'{where} "{key}"', f"is {_named(text)}", "text")
    if len(text) > longest:
        _refuse(f'{where} "{key}"', f"has {len(text):,} characters", f"at most {longest:,}")
    if re.search("[\ud800-\udfff]", text):
        _refuse(f'{where} "{key}"', "holds half a character", "Unicode text")
    return text


def _named(value) -> str:
    """A value as JSON, cut to fit a message; a container by its kind."""
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    if value is None:
        return "missing or null"
    text = json.dumps(value, ensure_ascii=isinstance(value, str) and not value.isprintable())
    return text if len(text) <= 60 else text[:57] + '..."'


def _refuse(where: str, fault: str, expected: str) -> NoReturn:
    raise ValueError(f"The painting{where and ': ' + where} {fault}; expected {expected}.")
