"""Do the encoders and the style do what the paper says of them? Pictures of unseen captions, and the reader looks.

python -m ediffi_core.evaluation.conditioning encoders [--captions 300] [--out encoders.json] [--sheet encoders.png]
python -m ediffi_core.evaluation.conditioning style    [--captions 300] [--out style.json] [--sheet style.png]

encoders: long captions with T5 and CLIP, with T5 alone, with CLIP alone (eDiff-I, Fig. 18).
style: captions that name no style, without a reference and with one in each style (eDiff-I, Fig. 16). References are other
scenes: other objects in other places.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..checkpoint import load_ensemble, read_ensemble
from ..conditioning import Conditioning
from ..encoders import Encoders, load_encoders
from ..ensemble import Denoise
from ..pipeline import Settings, conditioning_of, recommended, sample
from ..shapeworld import Caption, caption, random_scene, read, render, score
from ..shapeworld.world import STYLES
from .reading import PRECISIONS, UNSEEN, counted, in_precision, unseen_captions

BUNDLED = Path(__file__).parents[2] / "demo"
ENCODERS = {"both": ("clip", "t5"), "T5": ("t5",), "CLIP": ("clip",)}
OBJECT = ("color", "shape", "size", "place")


class Judged(NamedTuple):
    """One picture: the right answers of what its caption claims, by attribute, and the style that the reader sees."""

    image: np.ndarray  # (H, W, 3) in [0, 1]
    right: dict[str, tuple[int, int]]  # right, claimed
    style: str | None

    def share(self, attributes: Sequence[str]) -> tuple[int, int]:
        return tuple(sum(self.right[name][i] for name in attributes) for i in (0, 1))


def judged(
    captions: Sequence[Caption],
    encoders: Encoders,
    ensemble: Denoise,
    settings: Settings,
    change: Callable[[Conditioning, slice], Conditioning],
    batch: int = 25,
) -> list[Judged]:
    """Picture i from seed i, of the conditioning of caption i as `change` makes it."""
    result = []
    for start in range(0, len(captions), batch):
        part = captions[start : start + batch]
        conditioning = change(conditioning_of([one.text for one in part], encoders), slice(start, start + len(part)))
        *_, last = sample(ensemble, conditioning, start, settings)
        images = last.images().permute(0, 2, 3, 1).numpy()
        for one, image in zip(part, images, strict=True):
            reading = read(image)
            tallies = {name: tuple(tally) for name, tally in score(one, reading).tallies.items()}
            result.append(Judged(image, tallies, reading.style))
    return result


def attribute_score(pictures: Sequence[Judged], attributes: Sequence[str]) -> dict:
    shares = [picture.share(attributes) for picture in pictures]
    return counted(sum(right for right, _ in shares), sum(total for _, total in shares))


def difference(first: Sequence[Judged], second: Sequence[Judged], attributes: Sequence[str]) -> dict:
    """How much more of the claims `first` gets right, with a 95 % interval by drawing the captions again (bootstrap)."""
    a, b = (np.array([picture.share(attributes) for picture in pictures]) for pictures in (first, second))
    rng = np.random.default_rng(0)
    rows = rng.integers(len(a), size=(4000, len(a)))
    drawn = a[rows, 0].sum(1) / a[rows, 1].sum(1) - b[rows, 0].sum(1) / b[rows, 1].sum(1)
    low, high = np.quantile(drawn, [0.025, 0.975])
    middle = a[:, 0].sum() / a[:, 1].sum() - b[:, 0].sum() / b[:, 1].sum()
    return {"difference": float(middle), "interval_95": (float(low), float(high))}


def of_encoders(count: int, encoders: Encoders, ensemble: Denoise, settings: Settings) -> tuple[dict, list]:
    """Scores of T5 and CLIP, T5 alone, CLIP alone on long captions, and the pictures, one list for each."""
    captions = unseen_captions(count, "long")
    pictures = {
        name: judged(captions, encoders, ensemble, settings, lambda c, _, kept=kept: c.only(*kept))
        for name, kept in ENCODERS.items()
    }
    attributes = list(pictures["both"][0].right)
    scores = {
        name: {"all attributes": attribute_score(of, attributes)}
        | {attribute: attribute_score(of, [attribute]) for attribute in attributes}
        for name, of in pictures.items()
    }
    for name in ("T5", "CLIP"):
        scores[name]["both are better by"] = difference(pictures["both"], pictures[name], attributes)
    return scores, list(pictures.values())


def reference(style: str, number: int) -> Tensor:
    """(3, 64, 64) in [-1, 1]: a scene in a style, which no caption of the evaluation describes."""
    rng = np.random.default_rng([UNSEEN, 2, number])
    picture = render(replace(random_scene(rng), style=style), 64)
    return torch.from_numpy(picture).permute(2, 0, 1) * 2 - 1


def styleless_captions(count: int) -> list[Caption]:
    rng, found = np.random.default_rng([UNSEEN, 3]), []
    while len(found) < count:
        one = caption(random_scene(rng), rng, "short")
        if one.claims.style is None:
            found.append(one)
    return found


def of_style(count: int, encoders: Encoders, ensemble: Denoise, settings: Settings) -> tuple[dict, list]:
    """What the reader sees without and with a reference, caption i with one in style i, and the pictures."""
    captions = styleless_captions(count)
    styles = [STYLES[i % len(STYLES)] for i in range(count)]
    references = torch.stack([reference(style, i) for i, style in enumerate(styles)])
    embeddings = encoders.encode_image(references)

    def styled(conditioning: Conditioning, rows: slice) -> Conditioning:
        return replace(conditioning, image=embeddings[rows], image_strength=torch.ones(len(conditioning)))

    plain = judged(captions, encoders, ensemble, settings, lambda conditioning, _: conditioning)
    with_style = judged(captions, encoders, ensemble, settings, styled)
    scores = {}
    for name, pictures in (("without a reference", plain), ("with a reference", with_style)):
        seen = [one.style == style for one, style in zip(pictures, styles, strict=True)]
        each = {
            style: counted(
                sum(right for right, is_ in zip(seen, styles, strict=True) if is_ == style), styles.count(style)
            )
            for style in STYLES
        }
        scores[name] = {
            "style of the reference": counted(sum(seen), count),
            "... in each style": each,
            "objects' attributes": attribute_score(pictures, OBJECT),
            **{attribute: attribute_score(pictures, [attribute]) for attribute in (*OBJECT, "count", "background")},
        }
    scores["with a reference"]["objects are better by"] = difference(with_style, plain, OBJECT)
    shown = (references.permute(0, 2, 3, 1).numpy() + 1) / 2
    return scores, [plain, [Judged(image, {}, None) for image in shown], with_style]


def sheet(rows: Sequence[Sequence[Judged]], path: Path, columns: int = 12) -> None:
    """The first pictures, one row for each list."""
    from PIL import Image

    picture = np.concatenate([np.concatenate([one.image for one in row[:columns]], axis=1) for row in rows])
    Image.fromarray((picture * 255).round().astype(np.uint8)).save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("encoders", "style"))
    parser.add_argument("--ensemble", type=Path, default=BUNDLED / "ensembles" / "shapeworld-base")
    parser.add_argument("--encoders", type=Path, default=BUNDLED / "encoders" / "shapeworld")
    parser.add_argument("--captions", type=int, default=300)
    parser.add_argument("--steps", type=int, help="the ensemble's if left out, as the next one")
    parser.add_argument("--guidance-scale", type=float)
    parser.add_argument("--precision", choices=PRECISIONS, default="float32")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--sheet", type=Path)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    encoders, ensemble = load_encoders(options.encoders), load_ensemble(options.ensemble)
    ensemble = in_precision(ensemble, options.precision)
    sampler = read_ensemble(options.ensemble).sampler
    settings = recommended(sampler, steps=options.steps, guidance_scale=options.guidance_scale)
    evaluate = {"encoders": of_encoders, "style": of_style}[options.what]
    scores, pictures = evaluate(options.captions, encoders, ensemble, settings)
    print(json.dumps(scores, indent=1))
    if options.out:
        options.out.write_text(json.dumps(scores, indent=1) + "\n")
    if options.sheet:
        sheet(pictures, options.sheet)


if __name__ == "__main__":
    main()
