"""What thresholding does to strongly guided pictures, as a picture: one row for each way, one column for each prompt.

python -m ediffi_core.evaluation.thresholding [--out web/docs/images/thresholding.png] [--guidance-scale 12]

Beside each row: the share of colour values at black's or white's end, 0 or 255, where detail is lost; and the contrast,
the standard deviation of all values in [-1, 1], which falls as pictures turn gray. The first row is not pulled hard.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from ..checkpoint import load_ensemble, read_ensemble
from ..conditioning import Conditioning
from ..encoders import load_encoders
from ..ensemble import Denoise
from ..guidance import guided, thresholded
from ..pipeline import Settings, conditioning_of, recommended, sample

BUNDLED = Path(__file__).parents[2] / "demo"
HELP = Path(__file__).parents[2] / "web" / "docs" / "images"  # where help pages on the canvas find pictures
PROMPTS = (
    "a large red circle on a white background",
    "a large blue square on a black background",
    "a large green heart on a beige background",
)
SEED = 8
CELL, GAP, WORDS = 128, 4, 220  # pixels of a picture, between them, and of the words on the left
FONT = 20  # large, as a help page is narrow and shrinks the picture


class Way(NamedTuple):
    """percentile and maximum as in `thresholded`; None does not threshold."""

    name: str
    percentile: float | None = None
    maximum: float = 100.0


WAYS = (
    Way("as it is"),
    Way("static", 1.0, 1.0),
    *(Way(f"dynamic {percentile:g}", percentile) for percentile in (0.8, 0.9, 0.95, 0.995, 1.0)),
)


def sampled(denoise: Denoise, conditioning: Conditioning, way: Way, settings: Settings) -> Tensor:
    """(B, 3, 64, 64); about [-1, 1], as the sampler leaves them."""
    pulled = guided(denoise, settings.guidance_scale)

    def held(x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        denoised = pulled(x, sigma, conditioning)
        return denoised if way.percentile is None else thresholded(denoised, way.percentile, way.maximum)

    *_, last = sample(held, conditioning, SEED, settings._replace(guidance_scale=1.0))
    return last.x.float()


def at_the_ends(images: Tensor) -> float:
    """Share of values that a file of 8 bits holds as 0 or 255."""
    stored = ((images + 1) * 127.5).round()
    return ((stored <= 0) | (stored >= 255)).float().mean().item()


def contrast(images: Tensor) -> float:
    return images.clamp(-1, 1).std().item()


def sheet(rows: Sequence[tuple[str, Tensor]]):
    """A PIL image of (title, images (B, 3, 64, 64)) below each other, with their numbers."""
    from PIL import Image, ImageDraw, ImageFont

    columns, step = len(rows[0][1]), CELL + GAP
    made = Image.new("RGB", (WORDS + columns * step, len(rows) * step - GAP), "white")
    draw, font = ImageDraw.Draw(made), ImageFont.load_default(FONT)
    for y, (title, images) in enumerate(rows):
        pixels = ((images + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
        for x, one in enumerate(pixels):
            picture = Image.fromarray(one).resize((CELL, CELL), Image.Resampling.NEAREST)
            made.paste(picture, (WORDS + GAP + x * step, y * step))
        words = f"{title}\n{100 * at_the_ends(images):.1f} % at the ends\ncontrast {contrast(images):.2f}"
        draw.multiline_text((WORDS - 4, y * step + CELL // 2), words, "black", font, anchor="rm", align="right")
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ensemble", type=Path, default=BUNDLED / "ensembles" / "shapeworld-base")
    parser.add_argument("--encoders", type=Path, default=BUNDLED / "encoders" / "shapeworld")
    parser.add_argument("--guidance-scale", type=float, default=12.0)
    parser.add_argument("--out", type=Path, default=HELP / "thresholding.png")
    options = parser.parse_args()
    encoders, ensemble = load_encoders(options.encoders), load_ensemble(options.ensemble)
    settings = recommended(read_ensemble(options.ensemble).sampler)
    conditioning = conditioning_of(PROMPTS, encoders)
    rows = [(f"cfg {settings.guidance_scale:g}", sampled(ensemble, conditioning, WAYS[0], settings))]
    for way in WAYS:
        strong = settings._replace(guidance_scale=options.guidance_scale)
        title = f"cfg {options.guidance_scale:g}, {way.name}"
        rows.append((title, sampled(ensemble, conditioning, way, strong)))
    for title, images in rows:
        print(f"{title:24s} {100 * at_the_ends(images):5.1f} % at the ends, contrast {contrast(images):.2f}")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    sheet(rows).save(options.out)


if __name__ == "__main__":
    main()
