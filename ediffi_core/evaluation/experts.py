"""Experts against one network that saw as many samples (eDiff-I, Sec. 4.1 and 5.1, Fig. 7 and Table 1), over several seeds.

python -m ediffi_core.evaluation.experts RECIPE --folder runs --out experts.json --plot experts.png

The recipe's nodes end in the number of their seed: of each seed N, `NAME-N` with an interval is an expert, and the one without is the
single network. Both sides of a seed have to see as many samples, by the recipe, and to be trained to their last step, by their files.
For each seed, on the same scenes, captions and noise:

    loss        the denoising loss in each expert's interval, at sigmas which divide the training noise there into equal parts
    attributes  the share of what captions of pictures ask for that the reader finds
    all right   the share of pictures in which it finds everything
    distance    the Frechet distance of the pictures to rendered scenes, in the features of the demo CLIP; it is larger for few pictures

Differences are experts minus single. Their 95 % intervals are over the seeds (Student's t), so that they say what other trainings
would give; three seeds make them wide.
"""

import argparse
import re
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..checkpoint import read_header
from ..cli import ENCODERS, found
from ..conditioning import Conditioning
from ..encoders import Encoders, load_encoders
from ..ensemble import Denoise, Ensemble
from ..intervals import NoiseDistribution, NoiseInterval, check_partition
from ..pipeline import Settings, conditioning_of, recommended, sample
from ..shapeworld import read, score
from ..super_resolution import stream
from ..training.recipe import Node, Recipe, read_recipe
from .curves import (
    Clip,
    checked_seeds,
    fingerprint,
    in_batches,
    model_of_network,
    pyplot,
    rendered,
    reported,
    save_plot,
    unseen,
    write_json,
)
from .frechet import Gaussian, frechet_distance
from .reading import PRECISIONS, in_precision
from .words import losses

SIDES = ("experts", "single")
REFERENCES = 2000  # rendered scenes


class Contest(NamedTuple):
    """What one seed trained, not yet loaded."""

    seed: int
    experts: tuple[tuple[NoiseInterval, Path], ...]  # from high noise to low noise
    single: Path
    samples: int  # that each side saw

    def sides(self) -> dict[str, Denoise]:
        return {
            "experts": Ensemble([(interval, model_of_network(path).load()) for interval, path in self.experts]),
            "single": model_of_network(self.single).load(),
        }


def contests(recipe: Recipe, folder: Path) -> list[Contest]:
    """One for each seed that the names of the recipe's nodes end in.

    Raises ValueError where a seed lacks a side, its experts do not cover all noise, or a side saw more samples than the other;
    FileNotFoundError where a node is not trained yet.
    """
    of_seed: dict[int, list[Node]] = defaultdict(list)
    for node in recipe.nodes:
        if named := re.fullmatch(r".+-(\d+)", node.name):
            of_seed[int(named[1])].append(node)
    if not of_seed:
        raise ValueError(
            f"No node of {recipe.name} ends in the number of a seed, such as high-1 and single-1. Rename them."
        )
    return [_contest(seed, nodes, folder) for seed, nodes in sorted(of_seed.items())]


def _contest(seed: int, nodes: Sequence[Node], folder: Path) -> Contest:
    singles = [node for node in nodes if not (node.owns or node.excludes)]
    experts = sorted((node for node in nodes if node not in singles), key=lambda node: node.intervals[0], reverse=True)
    if len(singles) != 1 or not experts:
        raise ValueError(
            f"Seed {seed} has {len(experts)} experts and {len(singles)} single networks. It needs experts, whose nodes own or "
            f"exclude an interval, and one node that does neither."
        )
    intervals = [node.interval for node in experts]
    check_partition(intervals)
    seen = {}
    for node in nodes:
        steps = read_header(folder / f"{node.name}.safetensors").training.get("steps", node.steps)
        if steps < node.steps:
            raise ValueError(f"{node.name} is at step {steps} of {node.steps}. Finish it first: ediffi train.")
        seen[node.name] = node.steps * node.batch
    total = sum(seen[node.name] for node in experts)
    if total != seen[singles[0].name]:
        raise ValueError(
            f"The experts of seed {seed} saw {total} samples and its single network {seen[singles[0].name]}, so this is no fair "
            f"comparison. Give both as many in the recipe."
        )
    paths = [folder / f"{node.name}.safetensors" for node in experts]
    return Contest(seed, tuple(zip(intervals, paths, strict=True)), folder / f"{singles[0].name}.safetensors", total)


def sigmas_within(noise: NoiseDistribution, interval: NoiseInterval, count: int) -> list[float]:
    """The middles of so many parts of the training noise in an interval, each as probable as the others."""
    low, high = noise.mass_below(interval.low), noise.mass_below(interval.high)
    middles = low + (high - low) * (torch.arange(count, dtype=torch.float64) + 0.5) / count
    return noise.quantile(middles).tolist()


def difference(experts: Sequence[float], single: Sequence[float]) -> dict:
    """Of one number for each seed: experts minus single, with its 95 % interval over the seeds."""
    from scipy.stats import t

    each = np.subtract(experts, single)
    half = float(t.ppf(0.975, len(each) - 1) * each.std(ddof=1) / len(each) ** 0.5) if len(each) > 1 else None
    mean = float(each.mean())
    return {
        "experts": list(map(float, experts)),
        "single": list(map(float, single)),
        "difference": mean,
        "interval_95": None if half is None else [mean - half, mean + half],
    }


def _losses(denoise: Denoise, seed: int, scenes: int, sigmas: Sequence[float], encoders: Encoders) -> list[float]:
    """The loss at each sigma, over scenes of this seed."""
    pairs = unseen(scenes, 7, seed, "long")
    images = rendered([scene for scene, _ in pairs]).float() * 2 - 1
    text = encoders.encode_text([words.text for _, words in pairs])
    conditioning = Conditioning.of_text(text, image_width=encoders.image_width)
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))
    return losses(denoise, images, conditioning, noise, sigmas)


class Drawn(NamedTuple):
    attributes: list[float]  # of each picture, the share that is right
    all_right: list[bool]
    features: Tensor  # (N, D)


def _drawn(denoise: Denoise, seed: int, count: int, settings: Settings, encoders: Encoders, clip: Clip) -> Drawn:
    """Pictures of captions of this seed."""
    captions = [words for _, words in unseen(count, 8, seed)]
    attributes, right, features = [], [], []
    for rows in in_batches(range(count), 25):
        part = [captions[row] for row in rows]
        conditioning = conditioning_of([words.text for words in part], encoders)
        *_, last = sample(denoise, conditioning, stream(rows[0], seed), settings)
        images = last.images()
        features.append(clip.of_images(images))
        for words, image in zip(part, images.permute(0, 2, 3, 1).numpy(), strict=True):
            scored = score(words, read(image))
            counts = np.array(list(scored.tallies.values()))
            attributes.append(float(counts[:, 0].sum() / counts[:, 1].sum()))
            right.append(scored.all_right)
    return Drawn(attributes, right, torch.cat(features))


@torch.inference_mode()
def compared(
    each: Sequence[Contest],
    noise: NoiseDistribution,
    settings: Settings,
    encoders: Encoders,
    scenes: int,
    sigmas: int,
    captions: int,
    precision: str = "float32",
) -> dict:
    """Every measure of both sides over the seeds, with the losses at all sigmas."""
    clip = Clip.of(encoders)
    reference = [clip.of_images(rendered(part)) for part in in_batches([s for s, _ in unseen(REFERENCES, 6)], 50)]
    truth = Gaussian.of(torch.cat(reference).double().numpy())
    intervals = [interval for interval, _ in each[0].experts]
    levels = [sigmas_within(noise, interval, sigmas) for interval in intervals]
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: {side: [] for side in SIDES})
    at_sigma: dict[str, list[list[float]]] = {side: [] for side in SIDES}
    for contest in each:
        began = time.monotonic()
        for side, whole in contest.sides().items():
            denoise = in_precision(whole, precision)
            measured = [_losses(denoise, contest.seed, scenes, of, encoders) for of in levels]
            at_sigma[side].append([value for of in measured for value in of])
            for interval, of in zip(intervals, measured, strict=True):
                found[f"loss, sigma {interval}"][side].append(float(np.mean(of)))
            drawn = _drawn(denoise, contest.seed, captions, settings, encoders, clip)
            found["attributes"][side].append(float(np.mean(drawn.attributes)))
            found["all right"][side].append(float(np.mean(drawn.all_right)))
            distance = frechet_distance(Gaussian.of(drawn.features.double().numpy()), truth)
            found["distance"][side].append(distance)
            print(f"seed {contest.seed}, {side}: {time.monotonic() - began:.0f} s", flush=True)
    return {
        "measures": {name: difference(**values) for name, values in found.items()},
        "sigmas": [sigma for of in levels for sigma in of],
        "loss_at_sigma": at_sigma,
        "edges": [interval.low for interval in intervals if interval.low > 0],
    }


def plot(result: dict, path: Path) -> None:
    """The losses of the experts relative to the single network's, and the other measures, seed by seed."""
    figure, (left, right) = pyplot().subplots(
        1, 2, figsize=(11, 4), layout="constrained", gridspec_kw={"width_ratios": (3, 2)}
    )
    ours, theirs = (np.array(result["loss_at_sigma"][side]) for side in SIDES)
    order = np.argsort(result["sigmas"])
    sigmas, change = np.array(result["sigmas"])[order], (100 * (ours / theirs - 1))[:, order]
    left.plot(sigmas, change.T, color="C0", alpha=0.35, linewidth=1)
    left.plot(sigmas, change.mean(0), color="C0", marker="o", markersize=4, label="experts, mean of the seeds")
    left.axhline(0, color="black", linewidth=1, label="one network, as many samples")
    for edge in result["edges"]:
        left.axvline(edge, color="gray", linestyle=":", linewidth=1)
    left.set(xscale="log", xlabel="sigma", ylabel="denoising loss, % beside the single network's")
    left.legend(fontsize=8)
    rows = [
        (name, row["difference"] * scale, [end * scale for end in row["interval_95"] or (row["difference"],) * 2])
        for name, row in result["measures"].items()
        if not name.startswith("loss")
        for scale in [1 if name == "distance" else 100]
    ]
    for place, (_, value, (low, high)) in enumerate(rows):
        right.errorbar(value, place, xerr=[[value - low], [high - value]], fmt="o", color="C0", capsize=3)
    right.axvline(0, color="black", linewidth=1)
    right.set_yticks(range(len(rows)), [name if name == "distance" else f"{name}, points" for name, *_ in rows])
    right.set(xlabel="experts minus single, 95 % interval over the seeds", ylim=(-0.5, len(rows) - 0.5))
    save_plot(figure, path)


def options_of(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "experts", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--folder", type=Path, default=Path("runs"), help="where `ediffi train` put its nodes (runs)")
    parser.add_argument("--encoders", help="bundled, or a folder; the recipe's if left out")
    parser.add_argument("--seeds", type=int, nargs="+", help="of the recipe's; all if left out")
    parser.add_argument("--scenes", type=int, default=96, help="of each seed, for the losses (96)")
    parser.add_argument("--sigmas", type=int, default=6, help="in each interval (6)")
    parser.add_argument("--captions", type=int, default=150, help="of each seed, for the pictures (150)")
    parser.add_argument("--precision", choices=PRECISIONS, default="float32")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--out", type=Path, metavar="experts.json")
    parser.add_argument("--plot", type=Path, metavar="experts.png")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> dict:
    recipe = read_recipe(options.recipe)
    each = contests(recipe, options.folder / recipe.name)
    if options.seeds:
        checked_seeds(options.seeds)
        known = {contest.seed for contest in each}
        if unknown := set(options.seeds) - known:
            raise ValueError(f"The recipe {recipe.name} has no seed {min(unknown)}. Its seeds are {sorted(known)}.")
        each = [contest for contest in each if contest.seed in options.seeds]
    if options.captions < 2 or options.scenes < 1 or options.sigmas < 1:
        raise ValueError("--captions must be at least 2, --scenes and --sigmas at least 1. Raise them.")
    if options.plot:
        pyplot()
    encoders = load_encoders(found(options.encoders or recipe.data.encoders, ENCODERS))
    settings = recommended(recipe.sampler)
    measured = compared(
        each, recipe.noise, settings, encoders, options.scenes, options.sigmas, options.captions, options.precision
    )
    result = {
        "recipe": recipe.name,
        "seeds": [contest.seed for contest in each],
        "samples of each side": each[0].samples,
        "files": {
            path.name: fingerprint(path)
            for contest in each
            for path in (*(path for _, path in contest.experts), contest.single)
        },
        "scenes": options.scenes,
        "captions": options.captions,
        "precision": options.precision,
        "settings": settings._asdict(),
        **measured,
    }
    for name, row in result["measures"].items():
        ends = "" if row["interval_95"] is None else " [{:+.4g}, {:+.4g}]".format(*row["interval_95"])
        experts, single = np.mean(row["experts"]), np.mean(row["single"])
        print(f"{name}: experts {experts:.4g}, single {single:.4g}, difference {row['difference']:+.4g}{ends}")
    if options.out:
        write_json(result, options.out)
    if options.plot:
        plot(result, options.plot)
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    options = options_of(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    return reported(lambda: run(options), "experts")


if __name__ == "__main__":
    sys.exit(main())
