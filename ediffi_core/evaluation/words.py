"""What words do: how much the denoising loss rises when a caption says something else than the picture shows.

    python -m ediffi_core.evaluation.words [--network FILE] [--scenes 96] [--out words.json]

Scenes are unseen ones in the styles in turn, with their long captions, which say everything; captions are changed in one
topic before they are encoded, and worded alike. A topic that costs nothing at any sigma has not been learned. `nothing` is
the loss itself; the others are what is added to it. Conditioning is text alone.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from ..checkpoint import load_ensemble, load_network
from ..conditioning import Conditioning
from ..ensemble import Denoise
from ..preconditioning import SIGMA_DATA, Denoiser, loss_weight
from ..shapeworld import caption, random_scene, render
from ..shapeworld.world import STYLES, Scene
from ..training.binding import OF_OBJECTS
from .reading import PRECISIONS, UNSEEN, in_precision

SIGMAS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
CHANGES = ("nothing", *OF_OBJECTS, "style", "places exchanged")
BUNDLED = Path(__file__).parents[2] / "demo"


def styled_scenes(count: int, objects: int) -> list[Scene]:
    rng = np.random.default_rng([UNSEEN, 3, objects])
    return [replace(random_scene(rng, objects), style=STYLES[i % len(STYLES)]) for i in range(count)]


def changed(scene: Scene, what: str, rng: np.random.Generator) -> Scene:
    """A scene that is another in one topic, in each of its objects. "places exchanged": each has the next one's place."""

    def other(value: str, options: Sequence[str]) -> str:
        others = [one for one in options if one != value]
        return others[rng.integers(len(others))]

    if what == "style":
        return replace(scene, style=other(scene.style, STYLES))
    if what == "places exchanged":
        places = [item.place for item in scene.objects]
        turned = zip(scene.objects, places[1:] + places[:1], strict=True)
        return replace(scene, objects=tuple(replace(item, place=place) for item, place in turned))
    if what in OF_OBJECTS:
        options = OF_OBJECTS[what]
        items = (replace(item, **{what: other(getattr(item, what), options)}) for item in scene.objects)
        return replace(scene, objects=tuple(items))
    if what == "nothing":
        return scene
    raise ValueError(f"{what!r} cannot be changed in a caption. Use one of: {', '.join(CHANGES)}.")


def wordings(scenes: Sequence[Scene], what: str) -> list[str]:
    """Their long captions, of scene i in the same wording whatever is changed."""
    rng = np.random.default_rng(UNSEEN)
    return [
        caption(changed(one, what, rng), np.random.default_rng([UNSEEN, i]), "long").text
        for i, one in enumerate(scenes)
    ]


@torch.inference_mode()
def losses(
    denoise: Denoise, images: torch.Tensor, conditioning: Conditioning, noise: torch.Tensor, sigmas: Sequence[float]
) -> list[float]:
    """lambda(sigma) |D - image|^2 at each sigma, mean over pixels and rows. images, noise: (B, 3, H, W)."""
    found = []
    for sigma in sigmas:
        level = torch.full((len(images),), float(sigma))
        denoised = denoise(images + sigma * noise, level, conditioning)
        found.append((loss_weight(torch.tensor(float(sigma)), SIGMA_DATA) * (denoised - images) ** 2).mean().item())
    return found


def of_words(count: int, encoders, denoise: Denoise, sigmas: Sequence[float] = SIGMAS) -> dict:
    """For scenes of one and of two objects, by what is changed: what it costs at each sigma."""
    scores: dict = {"scenes": count, "sigmas": list(sigmas)}
    for objects in (1, 2):
        scenes = styled_scenes(count, objects)
        images = torch.from_numpy(np.stack([render(one, 64) for one in scenes])).permute(0, 3, 1, 2).float() * 2 - 1
        noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(objects))
        rows = {}
        for what in CHANGES if objects > 1 else CHANGES[:-1]:
            text = encoders.encode_text(wordings(scenes, what))
            conditioning = Conditioning.of_text(text, image_width=encoders.image_width)
            rows[what] = losses(denoise, images, conditioning, noise, sigmas)
        own = rows["nothing"]
        scores[f"{objects} object{'s' * (objects > 1)}"] = {
            what: own if what == "nothing" else [a - b for a, b in zip(row, own, strict=True)]
            for what, row in rows.items()
        }
    return scores


def main() -> None:
    from ..encoders import load_encoders

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ensemble", type=Path, default=BUNDLED / "ensembles" / "shapeworld-base")
    parser.add_argument("--network", type=Path, help="this single network file instead of the ensemble")
    parser.add_argument("--encoders", type=Path, default=BUNDLED / "encoders" / "shapeworld")
    parser.add_argument("--scenes", type=int, default=96)
    parser.add_argument("--precision", choices=PRECISIONS, default="float32")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    encoders = load_encoders(options.encoders)
    whole = (
        Denoiser(load_network(options.network, dtype=torch.float32)[0])
        if options.network
        else load_ensemble(options.ensemble)
    )
    scores = of_words(options.scenes, encoders, in_precision(whole, options.precision))
    for group, rows in scores.items():
        if isinstance(rows, dict):
            print(f"{group}; sigma {' '.join(f'{sigma:7g}' for sigma in scores['sigmas'])}")
            for what, row in rows.items():
                print(f"  {what:17}" + " ".join(f"{value:7.4f}" for value in row))
    if options.out:
        options.out.write_text(json.dumps(scores, indent=1) + "\n")


if __name__ == "__main__":
    main()
