"""Reading scores: generate pictures for unseen captions of Shapeworld and let the reader check what they claim."""

import math
from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch

from ..encoders import Encoders
from ..ensemble import Denoise
from ..pipeline import Settings, generate
from ..shapeworld import caption, random_scene, read, score

UNSEEN = 1_000_003  # seed of the captions that no training data uses


def in_precision(denoise: Denoise, precision: str) -> Denoise:
    """The denoiser with its products in "float32" or "bfloat16", which is about twice as fast on processors that have it."""
    if precision == "float32":
        return denoise

    def lower(x, sigma, conditioning, **options):
        with torch.autocast(x.device.type, torch.bfloat16):
            return denoise(x, sigma, conditioning, **options).to(x.dtype)

    return lower


PRECISIONS = ("float32", "bfloat16")


class Picture(NamedTuple):
    caption: str
    objects: int  # how many the caption names
    image: np.ndarray  # (H, W, 3) float in [0, 1]
    score: object  # shapeworld.Score


def unseen_captions(count: int, form: str = "short", seed: int = UNSEEN) -> list:
    """Captions of `count` random scenes; the same for the same arguments."""
    rng = np.random.default_rng([seed, 0])
    return [caption(random_scene(rng), rng, form) for _ in range(count)]


def read_pictures(
    captions: list, encoders: Encoders, ensemble: Denoise, settings: Settings, seed: int = 0, batch: int = 25
) -> Iterator[Picture]:
    """Generate one picture per caption, picture i with seed + i, and score it."""
    for start in range(0, len(captions), batch):
        part = captions[start : start + batch]
        images = generate([one.text for one in part], encoders, ensemble, seed + start, settings)
        for one, image in zip(part, images.permute(0, 2, 3, 1).numpy(), strict=True):
            yield Picture(one.text, len(one.claims.objects), image, score(one, read(image)))


def interval_95(right: int, total: int) -> tuple[float, float]:
    """Wilson's 95 % confidence interval of a share."""
    if total == 0:
        return 0.0, 1.0
    z, p = 1.96, right / total
    middle = (p + z * z / (2 * total)) / (1 + z * z / total)
    half = z * math.sqrt(p * (1 - p) / total + z * z / (4 * total * total)) / (1 + z * z / total)
    return max(0.0, middle - half), min(1.0, middle + half)


def counted(right: int, total: int) -> dict:
    """A share with what it was counted from and its 95 % interval."""
    right, total = int(right), int(total)
    share = right / max(1, total)
    return {"share": share, "right": right, "total": total, "interval_95": interval_95(right, total)}


def summary(pictures: list[Picture]) -> dict[str, dict[str, dict[str, float]]]:
    """Per number of objects: share of pictures right in colour, in colour and shape, in everything, and per attribute."""
    counts: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(lambda: [0, 0]))
    for picture in pictures:
        for group in (f"{picture.objects} object" + "s" * (picture.objects > 1), "all"):
            rows = {
                "colors right": (picture.score.colors_right, 1),
                "colors and shapes right": (picture.score.colors_and_shapes_right, 1),
                "all right": (picture.score.all_right, 1),
                **{f"attribute: {name}": pair for name, pair in picture.score.tallies.items()},
            }
            for name, (right, total) in rows.items():
                counts[group][name][0] += int(right)
                counts[group][name][1] += int(total)
    return {
        group: {name: counted(right, total) for name, (right, total) in rows.items() if total}
        for group, rows in sorted(counts.items())
    }
