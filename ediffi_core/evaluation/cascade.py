"""Are enlarged pictures better than bicubic and Lanczos? Unseen scenes of Shapeworld, of which the large picture is known.

python -m ediffi_core.evaluation.cascade [--ensemble shapeworld-sr256] [--scenes 200] [--out scores.json] [--sheet sheet.png]
python -m ediffi_core.evaluation.cascade --input base ...      what is enlarged is the base stage's own output
python -m ediffi_core.evaluation.cascade --ensemble shapeworld-sr1024 --crop 256 ...      windows, as in training
python -m ediffi_core.evaluation.cascade --plot plot.png --beside a.json b.json           draws what was measured before

What is enlarged is the exact picture averaged and degraded as in training. The base stage invents its scenes, so of its free
pictures no truth is known: with --input base it begins at the true 64 pixels under noise of --sigma and denoises from there,
with the caption (SDEdit, Meng et al. 2022). A stage that makes 1024 pixels then enlarges what --sr256 makes of that.

PSNR is against the exact picture. The reader of styles looks at 64 pixels, where every way is about as good as the low-res
image itself; what a stage adds lies beyond. So the fine detail, what is left of a picture without its own average over
FACTOR x FACTOR pixels, is measured by itself:

    detail   share of its energy that is reproduced, place by place: 1 is all, 0 is none, below 0 is wrong
    weave    strength of the threads in objects, wherever they lie, relative to the truth
    ink      strength of the line around objects, where it belongs, relative to the truth
    paper    strength of the background's grain, which no one can know exactly, relative to the truth
"""

import argparse
import json
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..checkpoint import load_ensemble, load_network, read_ensemble
from ..cli import ENCODERS, ENSEMBLES, found
from ..conditioning import Conditioning
from ..encoders import Encoders, load_encoders
from ..ensemble import Denoise
from ..pipeline import SR_DEFAULTS, Settings, conditioning_of, guided_by, recommended, upscale, walked
from ..preconditioning import Denoiser
from ..samplers import RowNoise
from ..schedule import karras_sigmas
from ..shapeworld import Caption, Scene, caption, random_scene, read, render
from ..shapeworld.render import INK_WIDTH, WEAVES, coverage, shape_distance
from ..shapeworld.world import BACKGROUNDS, COLORS
from ..super_resolution import FACTOR, upsampled
from ..training.degradation import Degradation, degraded
from ..training.recipe import read_recipe
from .reading import PRECISIONS, UNSEEN, counted, in_precision

Upscaler = Callable[[Tensor, Conditioning, int], Tensor]  # low-res (B, 3, h, w), conditioning, seed -> (B, 3, 4h, 4w)
RESOLUTIONS = {"sr256": 256, "sr1024": 1024}
HIGHEST = 100.0  # dB; PSNR of two equal pictures would have no value
MEASURES = ("psnr", "detail", "weave", "ink", "paper")
STRENGTHS = ("weave", "ink", "paper")  # "fine detail is there": each from half to twice as strong as in the truth


class Window(NamedTuple):
    """The part of a picture of `resolution` pixels a side that is looked at: a square, in pixels."""

    left: int
    top: int
    side: int
    resolution: int

    def of(self, images: Tensor) -> Tensor:
        """The same part of images (..., H, W) of this resolution, or of a FACTOR-th of it."""
        scale = self.resolution // images.shape[-1]
        left, top, side = self.left // scale, self.top // scale, self.side // scale
        return images[..., top : top + side, left : left + side]

    def centres(self) -> tuple[np.ndarray, np.ndarray]:
        """x and y of the pixels, in image sides."""
        return tuple((np.arange(start, start + self.side) + 0.5) / self.resolution for start in (self.left, self.top))


def unseen_scenes(count: int, form: str = "short") -> list[tuple[Scene, Caption]]:
    rng, pairs = np.random.default_rng([UNSEEN, 4]), []
    for _ in range(count):
        scene = random_scene(rng)
        pairs.append((scene, caption(scene, rng, form)))
    return pairs


def window_of(scene: Scene, resolution: int, side: int | None = None) -> Window:
    """Everything, or a square of `side` pixels with corners on pixels of the low-res image, around the right rim of the first
    object: it shows some of its inside, its line and the background."""
    if side is None:
        return Window(0, 0, resolution, resolution)
    if side % FACTOR or not 0 < side <= resolution:
        raise ValueError(f"--crop is a multiple of {FACTOR} from {FACTOR} to {resolution} pixels, got {side}.")
    item = scene.objects[0]
    corners = (round(at * resolution - side / 2) for at in (item.x + 0.7 * item.radius, item.y))
    left, top = (min(max(corner, 0), resolution - side) // FACTOR * FACTOR for corner in corners)
    return Window(left, top, side, resolution)


def exact(scenes: Sequence[Scene], resolution: int) -> Tensor:
    """(B, 3, H, W) in [-1, 1]."""
    return torch.stack([torch.from_numpy(render(scene, resolution)).permute(2, 0, 1) for scene in scenes]) * 2 - 1


def degraded_low_res(truth: Tensor, first: int, settings: Degradation) -> Tensor:
    """What the stage is trained to enlarge, of whole pictures (B, 3, H, W); row i draws from the seed first + i."""
    low_res = F.avg_pool2d(truth, FACTOR)
    seeds = (torch.Generator().manual_seed(first + row) for row in range(len(truth)))
    rows = zip(low_res.split(1), seeds, strict=True)
    return torch.cat([degraded(row, low_res.shape[-1], generator, settings) for row, generator in rows])


def of_base(pictures: Tensor, conditioning: Conditioning, base: Denoise, sigma: float, settings: Settings, seed: int):
    """Pictures (B, 3, 64, 64) as the base stage denoises them from noise of `sigma` on."""
    sigmas = karras_sigmas(settings.steps, settings.sigma_min, sigma, settings.rho)
    noise = RowNoise(seed, len(pictures))
    x = pictures + sigma * noise(pictures.double())
    *_, last = walked(guided_by(base, settings), conditioning, x, sigmas, settings.sampler, noise)
    return last.x.float().clamp(-1, 1)


def bicubic(low_res: Tensor, conditioning: Conditioning, seed: int) -> Tensor:
    return upsampled(low_res, tuple(FACTOR * side for side in low_res.shape[2:]))


def lanczos(low_res: Tensor, conditioning: Conditioning, seed: int) -> Tensor:
    """Pillow's, of three lobes, without rounding to 8 bits in between."""
    from PIL import Image

    height, width = low_res.shape[2:]
    planes = [
        np.asarray(Image.fromarray(plane.numpy()).resize((FACTOR * width, FACTOR * height), Image.Resampling.LANCZOS))
        for plane in low_res.float().flatten(0, 1)
    ]
    large = torch.from_numpy(np.stack(planes)).view(*low_res.shape[:2], FACTOR * height, FACTOR * width)
    return large.clamp(-1, 1)


def enlarged(
    low_res: Tensor,
    conditioning: Conditioning,
    seed: int,
    ensemble: Denoise,
    settings: Settings,
    augmentation_sigma: float,
) -> Tensor:
    *_, last = upscale(low_res, conditioning, ensemble, seed, settings, augmentation_sigma)
    return last.x.float().clamp(-1, 1)


def psnr(images: Tensor, truth: Tensor) -> Tensor:
    """In dB, (B,), of images in [-1, 1]."""
    error = (images - truth).square().mean((1, 2, 3)).double()
    return (10 * torch.log10(4 / error)).clamp(max=HIGHEST)


def fine(images: Tensor) -> Tensor:
    """What a low-res image cannot hold: (B, 3, H, W) without their own average, enlarged."""
    return images - F.interpolate(F.avg_pool2d(images, FACTOR), images.shape[2:], mode="bicubic", align_corners=False)


class FineDetail:
    """Where the fine detail of one scene lies in a window, to compare how much of it pictures have."""

    def __init__(self, scene: Scene, window: Window, truth: Tensor):
        """truth: (3, H, W) in [-1, 1], the window of the exact picture."""
        self.truth = fine(truth[None].double())[0]
        resolution, (x, y) = window.resolution, window.centres()
        # of the two weaves the one that the picture shows and its low-res image does not
        (frequency,) = (f for f, _ in WEAVES if resolution / 2 / FACTOR < f < resolution / 2)
        self.threads: list[tuple[Tensor, Tensor, Tensor]] = []  # of each object: where, brightness, waves
        line, edge = torch.zeros_like(self.truth), torch.zeros_like(self.truth)
        ground = torch.tensor(BACKGROUNDS[scene.background], dtype=torch.float64)
        self.rims = torch.zeros(self.truth.shape[1:], dtype=torch.bool)
        self.background = torch.ones(self.truth.shape[1:], dtype=torch.bool)
        for item in scene.objects:
            u, v = x[None, :] - item.x, y[:, None] - item.y
            distance = item.radius * shape_distance(item.shape, u / item.radius, v / item.radius)
            color = torch.tensor(COLORS[item.color], dtype=torch.float64)
            covered, inner = (coverage(distance + width, resolution) for width in (0, INK_WIDTH))
            line -= color[:, None, None] * torch.from_numpy(covered - inner)
            edge += (color - ground)[:, None, None] * torch.from_numpy(covered)
            self.rims |= torch.from_numpy(np.abs(distance) < INK_WIDTH + FACTOR / resolution)
            self.background &= torch.from_numpy(distance > 2 * FACTOR / resolution)
            inside = torch.from_numpy(distance < -INK_WIDTH - 2 * FACTOR / resolution)
            if inside.sum() > 64:
                waves = [
                    torch.from_numpy(down(2 * math.pi * frequency * v) * across(2 * math.pi * frequency * u))[inside]
                    for down in (np.cos, np.sin)
                    for across in (np.cos, np.sin)
                ]
                self.threads.append((inside, color / color.square().sum(), torch.stack(waves, 1)))
        self.lines = torch.stack([fine(one[None])[0][:, self.rims].flatten() for one in (line, edge)], 1)

    def weave(self, detail: Tensor) -> float:
        """Amplitude of the threads in fine detail (3, H, W), relative to the objects' colours."""
        power, pixels = 0.0, 0
        for inside, brightness, waves in self.threads:
            values = torch.einsum("cp,c->p", detail[:, inside], brightness)
            found = torch.linalg.lstsq(waves, values[:, None]).solution
            power, pixels = power + len(values) * found.square().sum().item(), pixels + len(values)
        return math.sqrt(power / pixels) if pixels else math.nan

    def ink(self, detail: Tensor) -> float:
        """How dark the line is, told apart from the edge beside it."""
        if not self.rims.any():
            return math.nan
        return torch.linalg.lstsq(self.lines, detail[:, self.rims].reshape(-1, 1)).solution[0].item()

    def grain(self, detail: Tensor) -> float:
        return detail[:, self.background].square().mean().sqrt().item()  # nan without any

    def measured(self, image: Tensor) -> dict[str, float]:
        """Of a picture (3, H, W); nan where the window shows nothing of the kind."""
        detail = fine(image[None].double())[0]
        kinds = {"weave": self.weave, "ink": self.ink, "paper": self.grain}
        missing = (detail - self.truth).square().sum() / self.truth.square().sum()
        return {"detail": 1 - missing.item()} | {
            name: strength(detail) / (strength(self.truth) or math.nan) for name, strength in kinds.items()
        }


class Judged(NamedTuple):
    """One scene: by way of enlarging, what was measured, whether the reader names the style, and the picture."""

    low_res: Tensor  # (3, h, w)
    truth: Tensor  # (3, H, W)
    images: dict[str, Tensor]
    measures: dict[str, dict[str, float]]
    styles: dict[str, bool]  # empty for windows: the reader reads whole pictures


def judged(
    pairs: Sequence[tuple[Scene, Caption]],
    encoders: Encoders,
    ways: dict[str, Upscaler],
    low_res_of: Callable[[Tensor, Sequence[Scene], Conditioning, int], Tensor],
    resolution: int,
    crop: int | None = None,
    batch: int = 4,
) -> Iterator[Judged]:
    """Scene i is enlarged in each way with the seed i.

    low_res_of: exact pictures (B, 3, H, W), their scenes, conditioning, seed -> what is enlarged, (B, 3, H/4, W/4).
    """
    for start in range(0, len(pairs), batch):
        scenes, captions = zip(*pairs[start : start + batch], strict=True)
        conditioning = conditioning_of([one.text for one in captions], encoders)
        truth = exact(scenes, resolution)
        low_res = low_res_of(truth, scenes, conditioning, start)
        windows = [window_of(scene, resolution, crop) for scene in scenes]
        truth, low_res = (
            torch.cat([window.of(one) for window, one in zip(windows, images.split(1), strict=True)])
            for images in (truth, low_res)
        )
        results = {name: way(low_res, conditioning, start) for name, way in ways.items()}
        for row, (scene, window) in enumerate(zip(scenes, windows, strict=True)):
            detail = FineDetail(scene, window, truth[row])
            images = {name: images[row] for name, images in results.items()}
            measures = {
                name: {"psnr": psnr(image[None], truth[row : row + 1]).item(), **detail.measured(image)}
                for name, image in images.items()
            }
            shown = images if crop is None else {}
            styles = {name: read(as_pixels(image)).style == scene.style for name, image in shown.items()}
            yield Judged(low_res[row], truth[row], images, measures, styles)


def as_pixels(image: Tensor) -> np.ndarray:
    """(3, H, W) in [-1, 1] to (H, W, 3) in [0, 1]."""
    return ((image + 1) / 2).permute(1, 2, 0).numpy()


def averaged(values: Sequence[float]) -> dict:
    """The mean over scenes and its 95 % interval; scenes that have no value do not count."""
    known = np.array([value for value in values if not math.isnan(value)])
    if not len(known):
        return {"mean": None, "interval_95": (None, None), "scenes": 0}
    half = 1.96 * known.std(ddof=1) / math.sqrt(len(known)) if len(known) > 1 else math.inf
    mean = float(known.mean())
    return {
        "mean": mean,
        "interval_95": (mean - half, mean + half) if math.isfinite(half) else (None, None),
        "scenes": len(known),
    }


def summary(pictures: Sequence[Judged], ours: str = "ours") -> dict:
    """By way: each measure and the shares of scenes; and by how much `ours` is better, scene by scene."""
    ways = list(pictures[0].images)

    def values(way: str, name: str) -> list[float]:
        return [one.measures[way][name] for one in pictures]

    def there(way: str) -> list[bool]:
        strengths = ([one.measures[way][name] for name in STRENGTHS] for one in pictures)
        return [not any(strength < 0.5 or strength > 2 for strength in each) for each in strengths]  # nan: none to see

    shares = {"fine detail is there": {way: there(way) for way in ways}}
    if pictures[0].styles:
        shares["style is read"] = {way: [one.styles[way] for one in pictures] for way in ways}
    scores = {
        way: {name: averaged(values(way, name)) for name in MEASURES}
        | {name: counted(sum(of[way]), len(pictures)) for name, of in shares.items()}
        for way in ways
    }

    def better(ours: Sequence[float], theirs: Sequence[float]) -> dict:
        return averaged([float(a) - float(b) for a, b in zip(ours, theirs, strict=True)])

    scores[ours][f"{ours} is better by"] = {
        way: {name: better(values(ours, name), values(way, name)) for name in MEASURES}
        | {name: better(of[ours], of[way]) for name, of in shares.items()}
        for way in ways
        if way != ours
    }
    return scores


def sheet(pictures: Sequence[Judged], path: Path, side: int = 256, shown: int = 8) -> None:
    """A row for each scene: what is enlarged, each way, the truth; the middle of pictures larger than `side`."""
    from PIL import Image, ImageDraw, ImageFont

    def tile(image: Tensor) -> Image.Image:
        picture = Image.fromarray((as_pixels(image) * 255).round().clip(0, 255).astype(np.uint8))
        if picture.width > side:
            corner = (picture.width - side) // 2
            return picture.crop((corner, corner, corner + side, corner + side))
        return picture.resize((side, side), Image.Resampling.NEAREST)

    titles = ["low-res", *pictures[0].images, "truth"]
    pictures, gap, line = pictures[:shown], 4, 24
    made = Image.new("RGB", (len(titles) * (side + gap) - gap, line + len(pictures) * (side + gap) - gap), "white")
    draw, font = ImageDraw.Draw(made), ImageFont.load_default(16)
    for column, title in enumerate(titles):
        draw.text((column * (side + gap) + side // 2, line // 2), title, "black", font, anchor="mm")
    for row, one in enumerate(pictures):
        size = one.truth.shape[-1]
        low_res = one.low_res.repeat_interleave(size // one.low_res.shape[-1], 1)
        low_res = low_res.repeat_interleave(size // one.low_res.shape[-1], 2)  # each pixel a square
        for column, image in enumerate((low_res, *one.images.values(), one.truth)):
            made.paste(tile(image), (column * (side + gap), line + row * (side + gap)))
    path.parent.mkdir(parents=True, exist_ok=True)
    made.save(path)


def plot(runs: Sequence[dict], path: Path) -> None:
    """PSNR, reproduced detail and the strength of the finest line, one group for each run, with 95 % intervals."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    panels = (("psnr", "PSNR, dB", 1), ("detail", "fine detail reproduced, %", 100), ("ink", "line around objects, % of the truth's", 100))  # fmt: skip
    figure, axes = pyplot.subplots(1, len(panels), figsize=(4 * len(panels), 3.8), layout="constrained")
    ways = list(dict.fromkeys(way for run in runs for way in run["scores"]))
    called = {"against": next((Path(run["against"]).stem for run in runs if run["against"]), "against")}
    for panel, (name, label, scale) in zip(axes, panels, strict=True):
        for i, way in enumerate(ways):
            for group, run in enumerate(runs):
                if way not in run["scores"]:
                    continue
                one = run["scores"][way][name]
                middle = one["mean"]
                ends = [scale * abs(end - middle) for end in one["interval_95"] if end is not None]
                where = group + (i - (len(ways) - 1) / 2) * 0.8 / len(ways)
                panel.bar(
                    where,
                    scale * middle,
                    0.8 / len(ways),
                    color=f"C{i}",
                    label=called.get(way, way) if group == 0 else None,
                )
                if ends:
                    panel.errorbar(where, scale * middle, [[ends[0]], [ends[1]]], color="black", capsize=3)
        labels = [
            f"{run['stage']}\n{run['input']}" + (f"\nsigma {run['sigma']:g}" if run["sigma"] else "") for run in runs
        ]
        panel.set(ylabel=label, xticks=range(len(runs)))
        panel.set_xticklabels(labels, fontsize=8)
    axes[0].legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def options_of(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ensemble", default="shapeworld-sr256", help="bundled, or a folder")
    parser.add_argument("--against", type=Path, help="another ensemble or single network of the stage, compared too")
    parser.add_argument("--encoders", default="shapeworld")
    parser.add_argument("--input", choices=("degraded", "base"), default="degraded")
    parser.add_argument("--recipe", type=Path, help="whose degradation; the usual one if left out")
    parser.add_argument("--base", default="shapeworld-base")
    parser.add_argument("--sr256", default="shapeworld-sr256")
    parser.add_argument("--sigma", type=float, default=0.5, help="noise that the base stage begins under (0.5)")
    parser.add_argument("--scenes", type=int, default=200)
    parser.add_argument("--form", choices=("short", "long"), default="short", help="of the captions")
    parser.add_argument("--crop", type=int, metavar="SIDE", help="a window around an object instead of the whole")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--guidance-scale", type=float)
    parser.add_argument("--sampler")
    parser.add_argument("--augmentation-sigma", type=float, default=0.0)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--precision", choices=PRECISIONS, default="float32")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--out", type=Path, metavar="scores.json")
    parser.add_argument("--sheet", type=Path, metavar="sheet.png")
    parser.add_argument("--plot", type=Path, metavar="plot.png")
    parser.add_argument(
        "--beside", type=Path, nargs="+", default=[], metavar="scores.json", help="draw these, run nothing"
    )
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> tuple[dict, list[Judged]]:
    """Everything that was measured, for the file, and the scenes."""
    description = read_ensemble(found(options.ensemble, ENSEMBLES))
    if description.stage not in RESOLUTIONS:
        raise ValueError(f"{options.ensemble} is of the stage {description.stage!r}, which enlarges nothing.")
    resolution = RESOLUTIONS[description.stage]
    encoders = load_encoders(found(options.encoders, ENCODERS))

    chosen = {name: getattr(options, name) for name in ("steps", "guidance_scale", "sampler")}
    settings = recommended(description.sampler, SR_DEFAULTS, **chosen)

    def upscaler(folder: Path, settings: Settings) -> Upscaler:
        if folder.is_dir():
            ensemble = load_ensemble(folder)
        else:
            network, header = load_network(folder, dtype=torch.float32)
            ensemble = Denoiser(network, header.sigma_data)
        ensemble = in_precision(ensemble, options.precision)
        return partial(enlarged, ensemble=ensemble, settings=settings, augmentation_sigma=options.augmentation_sigma)

    ways = {"bicubic": bicubic, "Lanczos": lanczos, "ours": upscaler(description.folder, settings)}
    if options.against:
        ways["against"] = upscaler(options.against, settings)

    if options.input == "degraded":
        degradation = read_recipe(options.recipe).degradation if options.recipe else Degradation()

        def low_res_of(truth, scenes, conditioning, seed):
            return degraded_low_res(truth, seed, degradation)
    else:
        folder = found(options.base, ENSEMBLES)
        base, base_settings = in_precision(load_ensemble(folder), options.precision), read_ensemble(folder)
        base_settings = recommended(base_settings.sampler)
        between = None
        if description.stage == "sr1024":
            folder = found(options.sr256, ENSEMBLES)
            between = upscaler(folder, recommended(read_ensemble(folder).sampler, SR_DEFAULTS))

        def low_res_of(truth, scenes, conditioning, seed):
            pictures = of_base(exact(scenes, 64), conditioning, base, options.sigma, base_settings, seed)
            return pictures if between is None else between(pictures, conditioning, seed)

    pairs, pictures = unseen_scenes(options.scenes, options.form), []
    for one in judged(pairs, encoders, ways, low_res_of, resolution, options.crop, options.batch):
        keep = one if len(pictures) < 8 else one._replace(images=dict.fromkeys(one.images), low_res=None, truth=None)
        pictures.append(keep)
        if len(pictures) % 10 == 0:
            print(f"{len(pictures)} of {options.scenes} scenes", flush=True)
    result = {
        "stage": description.stage,
        "ensemble": str(options.ensemble),
        "against": str(options.against) if options.against else None,
        "input": options.input,
        "sigma": options.sigma if options.input == "base" else None,
        "scenes": options.scenes,
        "crop": options.crop,
        "precision": options.precision,
        "augmentation_sigma": options.augmentation_sigma,
        "settings": settings._asdict(),
        "scores": summary(pictures),
    }
    return result, pictures


def main(arguments: Sequence[str] | None = None) -> None:
    options = options_of(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    runs = [json.loads(path.read_text()) for path in options.beside]
    if not runs:
        result, pictures = run(options)
        runs = [result]
        print(json.dumps(result, indent=1))
        if options.out:
            options.out.write_text(json.dumps(result, indent=1) + "\n")
        if options.sheet:
            sheet(pictures, options.sheet)
    if options.plot:
        plot(runs, options.plot)


if __name__ == "__main__":
    main()
