"""Does paint-with-words put things where they were painted? Two objects, one painted left, one right, and the reader looks.

python -m ediffi_core.evaluation.painting --weights 0 0.2 0.4 0.8 [--prompts 200] [--out scores.json] [--plot plot.png]
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from ..checkpoint import load_ensemble, read_ensemble
from ..conditioning import CLIP_LENGTH
from ..encoders import Encoders, load_encoders
from ..ensemble import Denoise
from ..paint_with_words import PaintSettings, Region, Regions, painted
from ..phrases import columns, find
from ..pipeline import Settings, conditioning_of, recommended, sample
from ..shapeworld import COLORS, SHAPES, ObjectReading, Reading, read
from .reading import PRECISIONS, UNSEEN, counted, in_precision

BUNDLED = Path(__file__).parents[2] / "demo"


class Sided(NamedTuple):
    """A prompt of two objects, and what is painted where."""

    text: str
    left: tuple[str, str]  # colour, shape
    right: tuple[str, str]


def prompts(count: int, seed: int = UNSEEN) -> list[Sided]:
    """Every second prompt names first what is painted right, so that the order of words cannot help."""
    rng, result = np.random.default_rng([seed, 1]), []
    for i in range(count):
        shapes, colors = rng.choice(SHAPES, 2, replace=False), rng.choice(list(COLORS), 2, replace=False)
        first, second = ((str(color), str(shape)) for color, shape in zip(colors, shapes, strict=True))
        text = f"a {first[0]} {first[1]} and a {second[0]} {second[1]}"
        result.append(Sided(text, first, second) if i % 2 == 0 else Sided(text, second, first))
    return result


def regions_of(prompt: Sided, encoders: Encoders, side: int = 64) -> Regions:
    """The two halves of the canvas, bound to the two objects."""
    (tokens,) = encoders.tokens([prompt.text])
    spans = [*tokens.clip.spans, *[(0, 0)] * (CLIP_LENGTH - len(tokens.clip.spans)), *tokens.t5.spans]
    made = []
    for (color, shape), half in ((prompt.left, slice(0, side // 2)), (prompt.right, slice(side // 2, side))):
        mask = torch.zeros(1, side, side)
        mask[:, :, half] = 1
        phrase = f"{color} {shape}"
        made.append(Region(phrase, mask, tuple(columns(spans, find(prompt.text, phrase)))))
    return Regions(tuple(made))


def pictures(
    sided: Sequence[Sided], encoders: Encoders, ensemble: Denoise, weight: float, settings: Settings, batch: int = 25
) -> np.ndarray:
    """(count, 64, 64, 3) in [0, 1]; picture i from seed i whatever the weight."""
    made = []
    for start in range(0, len(sided), batch):
        part = sided[start : start + batch]
        conditioning = conditioning_of([one.text for one in part], encoders)
        regions = [regions_of(one, encoders) for one in part]
        *_, last = sample(painted(ensemble, regions, PaintSettings(weight)), conditioning, start, settings)
        made.append(last.images().permute(0, 2, 3, 1).numpy())
    return np.concatenate(made)


def scores(sided: Sequence[Sided], readings: Sequence[Reading]) -> dict[str, tuple[int, int]]:
    """Of the named objects: how many are there by colour, and by colour and shape; of those, how many lie on their side."""
    counts = {name: [0, 0] for name in ("color found", "color in its area", "object found", "object in its area")}
    for prompt, reading in zip(sided, readings, strict=True):
        for (color, shape), wanted_left in ((prompt.left, True), (prompt.right, False)):
            colored = [one for one in reading.objects if one.color == color]
            for name, found in (("color", colored), ("object", [one for one in colored if one.shape == shape])):
                counts[f"{name} found"][0] += bool(found)
                counts[f"{name} found"][1] += 1
                if found:
                    counts[f"{name} in its area"][0] += (
                        largest(found).x < 0.5 if wanted_left else largest(found).x > 0.5
                    )
                    counts[f"{name} in its area"][1] += 1
    return {name: (int(right), total) for name, (right, total) in counts.items()}


def largest(objects: Sequence[ObjectReading]) -> ObjectReading:
    return max(objects, key=lambda one: one.radius)


def plot(rows: list[dict], path: Path) -> None:
    """Shares against the weight, with their 95 % intervals."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    for name in rows[0]["scores"]:
        shares = [row["scores"][name] for row in rows]
        middle = [100 * one["share"] for one in shares]
        ends = [[100 * abs(one["interval_95"][end] - one["share"]) for one in shares] for end in (0, 1)]
        axes.errorbar([row["weight"] for row in rows], middle, ends, label=name, marker="o", capsize=3)
    axes.axhline(50, color="gray", linewidth=0.8, linestyle=":")
    axes.set(xlabel="weight w\u2032", ylabel="% of named objects", ylim=(0, 100))
    axes.legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ensemble", type=Path, default=BUNDLED / "ensembles" / "shapeworld-base")
    parser.add_argument("--encoders", type=Path, default=BUNDLED / "encoders" / "shapeworld")
    parser.add_argument("--weights", type=float, nargs="+", default=[0.0, 0.2, 0.4, 0.8])
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--steps", type=int, help="the ensemble's if left out, as the next one")
    parser.add_argument("--guidance-scale", type=float)
    parser.add_argument("--precision", choices=PRECISIONS, default="float32")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    sided = prompts(options.prompts)
    encoders, ensemble = load_encoders(options.encoders), load_ensemble(options.ensemble)
    ensemble = in_precision(ensemble, options.precision)
    sampler = read_ensemble(options.ensemble).sampler
    settings, rows = recommended(sampler, steps=options.steps, guidance_scale=options.guidance_scale), []
    for weight in options.weights:
        readings = [read(picture) for picture in pictures(sided, encoders, ensemble, weight, settings)]
        found = {name: counted(*tally) for name, tally in scores(sided, readings).items()}
        rows.append({"weight": weight, "scores": found})
        shares = ", ".join(f"{name} {one['right']}/{one['total']}" for name, one in found.items())
        print(f"weight {weight:g}: {shares}", flush=True)
    if options.out:
        options.out.write_text(json.dumps(rows, indent=1) + "\n")
    if options.plot:
        plot(rows, options.plot)


if __name__ == "__main__":
    main()
