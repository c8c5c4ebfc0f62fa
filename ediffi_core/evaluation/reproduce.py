"""What the paper says of a trained ensemble, looked at again: figures 3 and 4, each with numbers, intervals and a plot.

ediffi reproduce 3 4 [--ensemble shapeworld-base] [--folder reproduced]

3: attention to the text fades with the noise. Pictures of unseen captions are sampled; of the calls at each sigma it is
   measured how much cross-attention falls on tokens of the text, the rest being the null token's, and how evenly it
   spreads over them: its entropy as a share of that of even attention. Means over layers, heads and places.
4: a prompt that is switched late changes nothing, one that is switched early everything. A picture is denoised with one
   prompt, and from a step on with another that differs in every attribute; a program reads which of the two it shows.

The other figures are evaluations by themselves: docs/evaluation.md.
"""

import argparse
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..attention import attend
from ..conditioning import Conditioning
from ..encoders import Encoders, load_encoders
from ..ensemble import Denoise
from ..pipeline import Settings, conditioning_of, guided_by, sample, walked
from ..samplers import RowNoise
from ..schedule import karras_sigmas
from ..shapeworld import Caption, Scene, caption, random_scene, read, score
from ..super_resolution import stream
from .curves import (
    SIZE,
    Model,
    checked_seeds,
    chosen_encoders,
    fingerprints,
    in_batches,
    mean_95,
    model_of_ensemble,
    model_of_network,
    pyplot,
    reported,
    save_plot,
    unseen,
    write_json,
)
from .reading import PRECISIONS, UNSEEN, counted, in_precision

ELSEWHERE = {
    "7": "curves",
    "8": "curves --embeddings both T5 CLIP",
    "16": "conditioning style",
    "17": "painting",
    "18": "conditioning encoders",
}
EARLY, LATE = 0.4, 0.93  # the paper's two switches: within the first 40 %, and in the last 7 % of denoising
ATTRIBUTES = ("shape", "color", "size", "place", "background", "style")
NOT_TEXT = 2  # the last columns of the context: the style's token and the null token


class Looks(NamedTuple):
    """Where cross-attention of some layers went, for each request of a batch."""

    text: Tensor  # (B,) share of the text's tokens
    null: Tensor  # (B,) share of the null token
    entropy: Tensor  # (B,) over the text's tokens, nats
    evenness: Tensor  # (B,) as a share of the entropy of even attention


def looks(q: Tensor, k: Tensor, bias: Tensor) -> Looks:
    """Of one layer, mean over heads and image tokens. q: (B, H, N, D); k: (B, H, L, D); bias: (B, 1, 1, L)."""
    visible = (bias[:, 0, 0, :-NOT_TEXT] > -1e4).sum(-1)
    sums = torch.zeros(3, len(q))
    for head in range(q.shape[1]):  # one head at a time: the whole of the scores may not fit
        scores = q[:, head].float() @ k[:, head].float().transpose(-1, -2) * q.shape[-1] ** -0.5
        weights = (scores + bias[:, 0].float()).softmax(-1)
        text = weights[..., :-NOT_TEXT]
        total = text.sum(-1, keepdim=True)
        entropy = torch.special.entr(text / total.clamp(min=1e-30)).sum(-1)
        sums += torch.stack([one.mean(1).cpu() for one in (total[..., 0], weights[..., -1], entropy)])
    share, null, entropy = sums / q.shape[1]
    return Looks(share, null, entropy, entropy / visible.cpu().clamp(min=2).log())


def watched(denoise: Denoise, requests: int, see: Callable[[float, Looks], None]) -> Denoise:
    """The same denoiser; `see` gets sigma and the looks of each cross-attention of the first rows, those of the requests."""

    def denoise_watched(x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        def attend_watched(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
            if bias is not None:  # cross-attention: it hides absent tokens
                see(sigma[0].item(), looks(q[:requests], k[:requests], bias[:requests]))
            return attend(q, k, v, bias)

        return denoise(x, sigma, conditioning, attend=attend_watched)

    return denoise_watched


class Run(NamedTuple):
    """What all figures are made with."""

    model: Model
    encoders: Encoders
    precision: str
    settings: Settings
    seeds: Sequence[int]
    count: int  # pictures, or pairs of prompts, of each seed
    batch: int


def attention(run: Run) -> dict:
    """Figure 3."""
    denoise, values = run.model.load(), defaultdict(list)  # of each sigma: (4, B) of each batch, in order
    for seed in run.seeds:
        texts = [one.text for _, one in unseen(run.count, 8, seed)]
        for rows in counted_batches(run, seed):
            seen: dict[float, list[Looks]] = defaultdict(list)
            noted = watched(denoise, len(rows), lambda sigma, layer, seen=seen: seen[sigma].append(layer))
            conditioning = conditioning_of([texts[row] for row in rows], run.encoders)
            for _ in sample(
                in_precision(noted, run.precision), conditioning, stream(rows[0], seed), run.settings, (SIZE, SIZE)
            ):
                pass
            for sigma, layers in seen.items():
                values[sigma].append(torch.stack([torch.stack(layer) for layer in layers]).mean(0).double())
    by_sigma = {sigma: torch.cat(parts, 1).numpy().reshape(4, len(run.seeds), -1) for sigma, parts in values.items()}
    sigmas = sorted(by_sigma, reverse=True)
    rows = [
        {"sigma": sigma} | {name: mean_95(of) for name, of in zip(Looks._fields, by_sigma[sigma], strict=True)}
        for sigma in sigmas
    ]
    fall = by_sigma[sigmas[0]][0] - by_sigma[sigmas[-1]][0]
    return {"edges": run.model.edges, "sigmas": rows, "text at the highest sigma minus at the lowest": mean_95(fall)}


def plot_attention(result: dict, path: Path) -> None:
    figure, panels = pyplot().subplots(1, 2, figsize=(10, 4), layout="constrained")
    sigmas = [row["sigma"] for row in result["sigmas"]]
    for axes, names, label in (
        (panels[0], ("text", "null"), "% of cross-attention"),
        (panels[1], ("evenness",), "entropy over the text's tokens, % of even"),
    ):
        for name in names:
            drawn_with_interval(axes, sigmas, [row[name] for row in result["sigmas"]], name)
        for edge in result["edges"]:
            axes.axvline(edge, color="gray", linewidth=0.8, linestyle=":")
        axes.set(xscale="log", xlabel="sigma (dotted: where experts meet)", ylabel=label, ylim=(0, 100))
        axes.invert_xaxis()
    panels[0].legend()
    save_plot(figure, path)


def drawn_with_interval(axes, x: Sequence[float], values: Sequence[dict], label: str) -> None:
    """In per cent. values: of `mean_95` or `counted`."""
    middle = [100 * one.get("value", one.get("share")) for one in values]
    ends = [[100 * abs(one["interval_95"][i]) for one in values] for i in (0, 1)]
    (line,) = axes.plot(x, middle, marker="o", markersize=4, label=label)
    axes.fill_between(x, *ends, color=line.get_color(), alpha=0.2, linewidth=0)


def switched_prompts(count: int, seed: int) -> list[tuple[Caption, Caption]]:
    """Long captions of one object each, that differ in every attribute and say them all."""
    rng, pairs = np.random.default_rng([UNSEEN, 7, seed]), []
    while len(pairs) < count:
        scenes = random_scene(rng, 1), random_scene(rng, 1)
        if all(a != b for a, b in zip(*map(shown, scenes), strict=True)):
            first, second = (caption(scene, rng, "long") for scene in scenes)
            pairs.append((first, second))
    return pairs


def shown(scene: Scene) -> tuple[str, ...]:
    (item,) = scene.objects
    return item.shape, item.color, item.size, item.place, scene.background, scene.style


def switched(
    denoise: Denoise, before: Conditioning, after: Conditioning, seed: int, settings: Settings, steps: Sequence[int]
) -> list[Tensor]:
    """Images (B, 3, 64, 64) in [0, 1] of one noise, for each of the steps from which on `after` is what is known.

    Step 0 is `after` from the start, settings.steps is `before` to the end. The common beginning is walked once.
    """
    sigmas = karras_sigmas(settings.steps, settings.sigma_min, settings.sigma_max, settings.rho)
    denoise = guided_by(denoise, settings)
    noise = RowNoise(seed, len(before))
    x = sigmas[0] * noise(torch.empty((len(before), 3, SIZE, SIZE), dtype=torch.float64))
    states = [x, *(step.x for step in walked(denoise, before, x, sigmas, settings.sampler, noise))]
    made = []
    for first in steps:
        x = states[first]
        if first < settings.steps:
            *_, last = walked(denoise, after, x, sigmas[first:], settings.sampler, noise)
            x = last.x
        made.append(((x.float() + 1) / 2).clamp(0, 1))
    return made


def switch_steps(steps: int) -> list[int]:
    """Every second step, the paper's two, and never."""
    return sorted({*range(0, steps, 2), at_step(EARLY, steps), at_step(LATE, steps), steps})


def at_step(share: float, steps: int) -> int:
    """How many steps are nearest to this share of them; not none and not all."""
    return min(max(round(share * steps), 1), steps - 1)


def switching(run: Run) -> dict:
    """Figure 4."""
    denoise = in_precision(run.model.load(), run.precision)
    steps = switch_steps(run.settings.steps)
    rights: list[np.ndarray] = []  # (pairs, steps, prompts, attributes) bool of each batch
    ways: list[np.ndarray] = []  # (pairs, steps)
    for seed in run.seeds:
        pairs = switched_prompts(run.count, seed)
        for rows in counted_batches(run, seed):
            part = [pairs[row] for row in rows]
            before, after = (conditioning_of([pair[i].text for pair in part], run.encoders) for i in (0, 1))
            images = switched(denoise, before, after, stream(rows[0], seed), run.settings, steps)
            rights.append(np.stack([attributes_shown(part, of_step) for of_step in images], axis=1))
            ways.append(np.stack([way(of_step, images[-1], images[0]) for of_step in images], axis=1))
    shape = len(run.seeds), run.count
    right, moved = (np.concatenate(parts).reshape(*shape, *parts[0].shape[1:]) for parts in (rights, ways))
    share = right.mean(-1)  # (seeds, pairs, steps, prompts)
    rows = []
    for i, step in enumerate(steps):
        more = right[:, :, i].sum(-1)
        rows.append(
            {
                "step": step,
                "share of steps": step / run.settings.steps,
                "first prompt": mean_95(share[:, :, i, 0]),
                "second prompt": mean_95(share[:, :, i, 1]),
                "shows": {
                    "the first": counted((more[..., 0] > more[..., 1]).sum(), more[..., 0].size),
                    "the second": counted((more[..., 0] < more[..., 1]).sum(), more[..., 0].size),
                    "as much of both": counted((more[..., 0] == more[..., 1]).sum(), more[..., 0].size),
                },
                "way to the second": mean_95(moved[:, :, i]),
                "attributes": {
                    name: {
                        which: counted(right[:, :, i, j, k].sum(), right[:, :, i, j, k].size)
                        for j, which in enumerate(("first prompt", "second prompt"))
                    }
                    for k, name in enumerate(ATTRIBUTES)
                },
            }
        )
    early, late = (steps.index(at_step(at, run.settings.steps)) for at in (EARLY, LATE))
    return {
        "switches": rows,
        "the paper's": {
            "in the first 40 %": {
                "share of steps": steps[early] / run.settings.steps,
                "second prompt, minus from the start": mean_95(share[:, :, early, 1] - share[:, :, 0, 1]),
                "way to the second": mean_95(moved[:, :, early]),
            },
            "in the last 7 %": {
                "share of steps": steps[late] / run.settings.steps,
                "first prompt, minus to the end": mean_95(share[:, :, late, 0] - share[:, :, -1, 0]),
                "way to the second": mean_95(moved[:, :, late]),
            },
        },
    }


def attributes_shown(pairs: Sequence[tuple[Caption, Caption]], images: Tensor) -> np.ndarray:
    """(B, 2, 6) bool: does the picture show this attribute as the first prompt says, as the second says?"""
    made = []
    for pair, image in zip(pairs, images.permute(0, 2, 3, 1).numpy(), strict=True):
        reading = read(image)
        scores = [score(one, reading) for one in pair]
        made.append([[one[name].right == 1 for name in ATTRIBUTES] for one in scores])
    return np.array(made)


def way(images: Tensor, first: Tensor, second: Tensor) -> np.ndarray:
    """(B,): how far images are on the way from `first`, 0, to `second`, 1, by their distances in RGB; 0.5 if all are equal."""
    a, b = (torch.linalg.vector_norm((images - end).double().flatten(1), dim=1) for end in (first, second))
    return torch.where(a + b > 0, a / (a + b).clamp(min=1e-30), torch.full_like(a, 0.5)).numpy()


def plot_switching(result: dict, path: Path) -> None:
    figure, panels = pyplot().subplots(1, 2, figsize=(11, 4.8), layout="constrained", sharey=True)
    rows = result["switches"]
    x = [100 * row["share of steps"] for row in rows]
    for name in ("first prompt", "second prompt"):
        drawn_with_interval(panels[0], x, [row[name] for row in rows], f"attributes of the {name}")
    for name in rows[0]["shows"]:
        drawn_with_interval(panels[1], x, [row["shows"][name] for row in rows], f"pictures that show {name}")
    drawn_with_interval(panels[1], x, [row["way to the second"] for row in rows], "way to the second, in RGB")
    for axes in panels:
        for at, words in ((EARLY, "first 40 %: the second"), (LATE, "last 7 %: the first")):
            axes.axvline(100 * at, color="gray", linewidth=0.8, linestyle=":")
            axes.annotate(words, (100 * at, 99), fontsize=7, rotation=90, ha="right", va="top")
        axes.set(xlabel="% of steps before the prompt is switched", ylabel="%", ylim=(0, 100))
        axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncol=2)
    save_plot(figure, path)


def counted_batches(run: Run, seed: int) -> Iterator[range]:
    """The rows of each batch, with a line of progress when it is done."""
    began = time.monotonic()
    for rows in in_batches(range(run.count), run.batch):
        yield rows
        print(f"seed {seed}: {rows[-1] + 1} of {run.count}, {time.monotonic() - began:.0f} s", flush=True)


class Figure(NamedTuple):
    title: str
    measure: Callable[[Run], dict]
    plot: Callable[[dict, Path], None]
    count: int  # of each seed
    steps: int


FIGURES = {
    "3": Figure("cross-attention to the text by noise level", attention, plot_attention, 32, 12),
    # 15 steps: the last one is 7 % of them, the first six are 40 %
    "4": Figure("a prompt that is switched while denoising", switching, plot_switching, 32, 15),
}


def options_of(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "ediffi reproduce", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("figures", nargs="+", metavar="FIGURE", help=f"of the paper: {', '.join(FIGURES)}")
    parser.add_argument("--ensemble", default="shapeworld-base", help="bundled, or a folder")
    parser.add_argument("--network", type=Path, help="a single network instead")
    parser.add_argument("--encoders", help="bundled, or a folder; the ensemble's choice if left out")
    parser.add_argument("--folder", type=Path, default=Path("reproduced"), help="for figure_N.json and figure_N.png")
    parser.add_argument("--captions", type=int, help="of each seed; for figure 4 pairs of them (32)")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1, 2], help="each has captions and noise of its own"
    )
    parser.add_argument("--steps", type=int, help="(12; for figure 4 15, as one of them is 7 %%)")
    parser.add_argument("--guidance-scale", type=float, default=5.0)
    parser.add_argument("--sampler", choices=("heun", "euler"), default="heun")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--precision", choices=PRECISIONS, default="float32")
    parser.add_argument("--threads", type=int, help="CPU threads")
    return parser.parse_args(arguments)


def checked_figures(names: Sequence[str]) -> list[str]:
    """The keys of FIGURES. Raises ValueError for another figure."""
    for name in names:
        if name in ELSEWHERE:
            raise ValueError(f"Figure {name} is measured by python -m ediffi_core.evaluation.{ELSEWHERE[name]}.")
        if name not in FIGURES:
            raise ValueError(
                f"There is no figure {name!r} to reproduce. Choose from {', '.join(FIGURES)}; docs/evaluation.md lists the "
                f"commands of others."
            )
    return list(dict.fromkeys(names))


def run(options: argparse.Namespace) -> None:
    names = checked_figures(options.figures)
    checked_seeds(options.seeds)
    if options.captions is not None and options.captions * len(options.seeds) < 2:
        raise ValueError(
            f"--captions {options.captions} with {len(options.seeds)} seeds is too little for an interval: at least 2 in all. "
            f"Raise --captions."
        )
    if options.steps is not None and options.steps < 3:
        raise ValueError(f"--steps must be at least 3, so that a prompt can be switched between, got {options.steps}.")
    pyplot()
    model = model_of_network(options.network) if options.network else model_of_ensemble(options.ensemble)
    folder = chosen_encoders([model], options.encoders)
    encoders = load_encoders(folder)
    for name in names:
        figure, began = FIGURES[name], time.monotonic()
        print(f"figure {name}: {figure.title}", flush=True)
        settings = Settings(options.steps or figure.steps, options.guidance_scale, options.sampler)
        count = options.captions or figure.count
        measured = figure.measure(
            Run(model, encoders, options.precision, settings, options.seeds, count, options.batch)
        )
        result = {
            "figure": name,
            "title": figure.title,
            "model": {"name": model.name, "files": model.files},
            "encoders": {"folder": folder.resolve().name, "files": fingerprints(folder)},
            "captions": count,
            "seeds": options.seeds,
            "precision": options.precision,
            "settings": settings._asdict(),
            "seconds": round(time.monotonic() - began, 1),
            **measured,
        }
        write_json(result, options.folder / f"figure_{name}.json")
        figure.plot(result, options.folder / f"figure_{name}.png")
        print(f"{options.folder / f'figure_{name}.json'} and .png, {result['seconds']:.0f} s", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    options = options_of(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    return reported(lambda: run(options), "reproduce")


if __name__ == "__main__":
    sys.exit(main())
