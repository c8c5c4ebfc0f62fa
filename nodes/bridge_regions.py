"""Regions in a CONDITIONING: from phrases, masks, colours and paintings to token columns, with a report for the canvas."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ediffi_core.attention_maps import AttentionMaps
from ..ediffi_core.paint_with_words import PaintSettings, Region, resized
from ..ediffi_core.painting import PaintedPhrase, from_colors, parse
from ..ediffi_core.phrases import columns, find
from .bridge_conditioning import WORDS, Words
from .bridge_painting import REGIONS, obeying, painted_with, recording

COARSEST = 8  # image tokens along the longer side, in the coarsest layers of most networks
FAINT = 0.1  # of a token covered: hardly seen


def obey_paint(model, weight: float, scale: str, start_sigma: float, end_sigma: float):
    """A MODEL that obeys painted regions. Raises ValueError, by name, for one that cannot."""
    return obeying(model, PaintSettings(weight, scale, start_sigma, end_sigma))


def bind(conditioning: list, phrases: list[tuple[str, int | None, Tensor, float]]) -> list:
    """CONDITIONING with a region for each (phrase, occurrence or None for all, mask (M, h, w), strength).

    In each of its prompts that holds the phrase. Raises ValueError for one that is in none of them, and for prompts that
    do not remember their words.
    """
    remembered = remembering(conditioning)
    for phrase, nth, mask, strength in phrases:
        found, error = False, None
        for i in remembered:
            try:
                region = region_of(conditioning[i][1][WORDS], phrase, nth, mask, strength)
            except ValueError as problem:
                error = error or problem
                continue
            conditioning, found = painted_with(conditioning, [region], i), True
        if not found:
            raise error
    return conditioning


def remembering(conditioning: list) -> list[int]:
    """The prompts of a CONDITIONING that remember their words. Raises ValueError if there are none."""
    remembered = [i for i, (_, values) in enumerate(conditioning) if isinstance(values.get(WORDS), Words)]
    if not remembered:
        raise ValueError(
            "This CONDITIONING does not remember its words, so no phrase can be found in it. Encode the prompt with eDiff-I "
            "Text Encode or eDiff-I Paint With Words."
        )
    return remembered


def columns_of(words: Words, phrase: str, nth: int | None) -> tuple[int, ...]:
    """Token columns of a phrase. Raises ValueError for one that is not in the prompt, or whose tokens cannot be known."""
    ranges = find(words.text, phrase, nth)
    if words.spans is None:
        raise ValueError(
            f"The tokens of this CLIP cannot be followed back to the words of the prompt, so phrases cannot be found with "
            f"it: {words.lost or 'its tokenizer is unknown'}. Encoders of CLIP and T5 can."
        )
    where = columns(words.spans, ranges)
    if not where:
        raise ValueError(f"{phrase!r} lies behind the part of the prompt that the encoder reads. Shorten the prompt.")
    return tuple(where)


def region_of(words: Words, phrase: str, nth: int | None, mask: Tensor, strength: float) -> Region:
    """mask: (M, h, w), or (h, w). Raises ValueError as `columns_of` does."""
    mask = mask.float().clamp(0, 1).reshape(-1, *mask.shape[-2:]).cpu()
    return Region(phrase, mask, columns_of(words, phrase, nth), strength)


def bind_colors(conditioning: list, image: Tensor, lines: str, tolerance: float) -> list:
    """CONDITIONING with a region for each colour of a map, image (H, W, 3), and its line "#rrggbb = phrase"."""
    phrases = [(phrase, None, mask[None], 1.0) for phrase, mask in from_colors(image, lines, tolerance)]
    return bind(conditioning, phrases)


def paint(conditioning: list, width: int, height: int, value: str) -> tuple[list, Tensor, Tensor, dict]:
    """(CONDITIONING, masks (P, height, width), legend (1, height, width, 3), report) of an encoded prompt and a painting."""
    words = conditioning[0][1].get(WORDS)
    painting, report = parse(value), []
    for phrase in painting.phrases:
        mask = phrase.mask.float()[None]
        entry = {"id": phrase.id, "text": phrase.text, "found": True, "tokens": 0, "coverage": mask.mean().item()}
        try:
            region = region_of(words, phrase.text, phrase.nth, mask, phrase.strength)
            conditioning = painted_with(conditioning, [region], 0)
            entry |= {"tokens": len(region.columns), "note": note(mask)}
        except ValueError as problem:  # the prompt may have been rewritten since: the others count all the same
            entry |= {"found": False, "note": str(problem)}
        report.append(entry)
    masks = [F.interpolate(phrase.mask.float()[None, None], (height, width))[0] for phrase in painting.phrases]
    masks = torch.cat(masks) if masks else torch.zeros(1, height, width)
    return conditioning, masks, legend(painting.phrases, masks), {"text": words.text, "phrases": report}


def note(mask: Tensor) -> str:
    """What a person should know of a mask (1, h, w); empty if nothing."""
    if not mask.any():
        return "Nothing is painted, so it has no effect."
    height, width = mask.shape[1:]
    longer = max(height, width)
    grid = (max(1, round(COARSEST * height / longer)), max(1, round(COARSEST * width / longer)))
    top = resized(mask, grid).max().item()
    return f"Thin: the coarsest layers see it at {100 * top:.0f} % of its strength." if top < FAINT else ""


def legend(phrases: tuple[PaintedPhrase, ...], masks: Tensor) -> Tensor:
    """The regions in their colours on gray, later ones above, each named in its middle: (1, height, width, 3).

    masks: (P, height, width); one that is empty where there are no phrases.
    """
    from PIL import Image, ImageDraw, ImageFont

    height, width = masks.shape[1:]
    picture = torch.full((height, width, 3), 0.15)
    places = []
    for phrase, mask in zip(phrases, masks > 0.5, strict=False):
        color = torch.tensor([int(phrase.color[i : i + 2], 16) / 255 for i in (1, 3, 5)])
        picture[mask] = color
        if mask.any():
            rows, columns = mask.nonzero().unbind(1)
            places.append((phrase.text, columns.float().mean().item(), rows.float().mean().item(), color))
    image = Image.fromarray((picture * 255).round().byte().numpy())
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(max(10, min(width, height) // 24))
    for text, x, y, color in places:
        dark = (color * torch.tensor([0.299, 0.587, 0.114])).sum() < 0.5
        draw.text((x, y), text, "white" if dark else "black", font, anchor="mm")
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(1, height, width, 3).float() / 255


def attention_maps(model, conditioning: list, lines: str, levels: int):
    """(MODEL that notes where the picture looks, the maps that a run fills): for phrases, one a line, of its first prompt."""
    tokens, values = conditioning[remembering(conditioning)[0]]
    phrases = [line.strip() for line in lines.splitlines() if line.strip()]
    regions = [(region.phrase, region.columns) for region in values[REGIONS].regions] if REGIONS in values else []
    if phrases:
        regions = [(phrase, columns_of(values[WORDS], phrase, None)) for phrase in phrases]
    if not regions:
        raise ValueError(
            "No phrases are given, and none are painted. Write words of the prompt into phrases, one phrase a line."
        )
    maps = AttentionMaps(tuple(phrase for phrase, _ in regions))
    return recording(model, maps, [columns for _, columns in regions], tokens.shape[1], levels), maps
