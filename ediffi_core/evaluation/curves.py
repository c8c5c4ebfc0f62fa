"""What guidance trades: the Frechet distance and the CLIP score of pictures over guidance (eDiff-I, Sec. 5, Figs. 7 and 8).

ediffi curves --out curves.json --plot curves.png
ediffi curves --network shared.safetensors --out curves.json --plot curves.png     one more curve
ediffi curves --embeddings both T5 CLIP --out curves.json --plot curves.png     Fig. 8
ediffi curves --captions captions.txt --reference-pictures photos --clip clip-vit-l --inception
    pt_inception-2015-12-05.pth --ensemble my-base --encoders t5-xxl-clip-l --pictures 2000 ...      with networks of your own

Guidance is the paper's: 0 is none, and cfg or `guidance_scale` is 1 more. Points that --out holds are not drawn again, so a run
that was interrupted continues, and curves of other networks join those that are there.

FID is the Frechet distance in the features of Inception, from a file of yours. Without one it is taken in CLIP's space: of the
image embeddings, as they leave the encoder. The CLIP score is 100 times the mean cosine of picture and caption, 0 at least.
Few pictures raise the Frechet distance; the star in the plot, as many true pictures, shows how much.
"""

import argparse
import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..checkpoint import load_ensemble, load_network, read_ensemble, read_header
from ..cli import ENCODERS, ENSEMBLES, found
from ..conditioning import Conditioning, joined
from ..encoders import (
    Encoders,
    clip_tokens,
    load_clip,
    load_clip_tokenizer,
    load_encoders,
    padded,
    projected,
    resized,
    text_states,
)
from ..ensemble import Denoise
from ..pipeline import Settings, conditioning_of, sample
from ..preconditioning import Denoiser
from ..shapeworld import Caption, Scene, caption, random_scene, render
from ..super_resolution import stream
from .conditioning import ENCODERS as EMBEDDINGS
from .frechet import Gaussian, frechet_distance, jackknife_interval
from .reading import PRECISIONS, UNSEEN, in_precision

SIZE = 64  # pixels a side of the base stage's pictures
FORMAT = 1
Features = Callable[[Tensor], Tensor]  # pictures (B, 3, H, W) in [0, 1] -> (B, D)


class Model(NamedTuple):
    """An ensemble or a single network of the base stage, not yet loaded."""

    name: str
    load: Callable[[], Denoise]
    files: dict[str, str]  # their fingerprints
    edges: tuple[float, ...] = ()  # sigmas where experts meet
    encoders: str | None = None  # the recommended ones
    kept: tuple[str, ...] = ("clip", "t5")  # embeddings that it is told


def model_of_ensemble(name: str) -> Model:
    """Raises FileNotFoundError, or ValueError for another stage."""
    description = read_ensemble(found(name, ENSEMBLES))
    if description.stage != "base":
        raise ValueError(
            f"{name} is an ensemble of the stage {description.stage!r}, but pictures of captions come from the stage 'base'. "
            f"Choose another ensemble."
        )
    return Model(
        description.folder.resolve().name,
        partial(load_ensemble, description.folder),
        {path.name: fingerprint(path) for path in description.paths},
        tuple(interval.low for interval in description.intervals if interval.low > 0),
        description.encoders,
    )


def model_of_network(path: Path) -> Model:
    """Raises FileNotFoundError, or ValueError for another stage."""
    header = read_header(path)
    if header.kind != "base":
        raise ValueError(
            f"{path.name} is a network of the stage {header.kind!r}, but pictures of captions come from the stage 'base'. "
            f"Choose another file."
        )

    def load() -> Denoise:
        return Denoiser(load_network(path, dtype=torch.float32)[0], header.sigma_data)

    return Model(f"{path.resolve().parent.name}/{path.stem}", load, {path.name: fingerprint(path)})


def told(model: Model, which: str) -> Model:
    """The model as it draws with both text encoders, or with one alone (eDiff-I, Fig. 8)."""
    return model if which == "both" else model._replace(name=f"{model.name}, {which} alone", kept=EMBEDDINGS[which])


def fingerprint(path: Path) -> str:
    """Of a file's size, beginning and end: another training of the same network has another one."""
    length, part = path.stat().st_size, 1 << 20
    with open(path, "rb") as file:
        parts = [str(length).encode(), file.read(part)]
        file.seek(max(0, length - part))
        parts.append(file.read())
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


def fingerprints(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): fingerprint(path) for path in sorted(folder.rglob("*.safetensors"))}


def chosen_encoders(models: Sequence[Model], name: str | None) -> Path:
    """The folder of the encoders that were named, else of those that all models recommend. Raises ValueError if they differ."""
    recommended = {model.encoders for model in models if model.encoders}
    if name is None and len(recommended) > 1:
        each = ", ".join(f"{model.name} {model.encoders!r}" for model in models if model.encoders)
        raise ValueError(f"The ensembles recommend different encoders: {each}. Name one with --encoders.")
    return found(name or next(iter(recommended), "shapeworld"), ENCODERS)


class Clip(NamedTuple):
    """A CLIP that judges pictures."""

    model: torch.nn.Module
    tokenizer: Any
    size: int
    mean: Tensor  # (3, 1, 1), for images in [0, 1]
    std: Tensor

    @classmethod
    def of(cls, encoders: Encoders) -> "Clip":
        return cls(encoders.clip, encoders.clip_tokenizer, encoders.image_size, encoders.image_mean, encoders.image_std)

    @classmethod
    def load(cls, folder: Path) -> "Clip":
        """From open_clip's local layout. Raises FileNotFoundError or ValueError."""
        if not (folder / "open_clip_config.json").is_file():
            raise FileNotFoundError(
                f"There is no CLIP at {folder}: it should be a folder with open_clip_config.json and "
                f"open_clip_model.safetensors. Check --clip."
            )
        model, preprocessing = load_clip(folder, "cpu", torch.float32)
        size = model.visual.image_size
        mean, std = (torch.tensor(preprocessing[name]).view(3, 1, 1) for name in ("mean", "std"))
        return cls(model, load_clip_tokenizer(folder), size[0] if isinstance(size, tuple) else size, mean, std)

    @torch.no_grad()
    def of_texts(self, texts: Sequence[str], batch: int = 50) -> Tensor:
        """(N, E), projected and not normalised."""
        made = []
        for start in range(0, len(texts), batch):
            ids, mask = padded([clip_tokens(self.tokenizer, text).ids for text in texts[start : start + batch]])
            states = text_states(self.model, ids)
            made.append(projected(self.model, states[torch.arange(len(ids)), mask.sum(1) - 1]))
        return torch.cat(made)

    @torch.no_grad()
    def of_images(self, images: Tensor) -> Tensor:
        """images: (B, 3, H, W) in [0, 1]. (B, E), projected and not normalised."""
        images = (resized(images, self.size) * 255).round().clip(0, 255) / 255
        return self.model.encode_image((images - self.mean) / self.std)


def clip_score(images: Tensor, texts: Tensor) -> Tensor:
    """100 times the cosine of each picture's embedding (N, E) and its caption's: (N,).

    The score of a set is their mean, or 0 if that is negative (as in torchmetrics; Hessel et al. 2021 without the factor 2.5).
    """
    return 100 * torch.cosine_similarity(images.double(), texts.double(), dim=-1)


def inception(weights: Path) -> Features:
    """The 2048 features that FID is made of; nothing is downloaded.

    weights: torch-fidelity's conversion of the original network, pt_inception-2015-12-05-6726825d.pth.
    Raises FileNotFoundError, or ValueError without that library or for other weights.
    """
    if not weights.is_file():
        raise FileNotFoundError(
            f"There is no file of Inception's weights at {weights}. Download pt_inception-2015-12-05-6726825d.pth from "
            f"torch-fidelity's releases, or leave out --inception to measure in CLIP's space."
        )
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        raise ValueError(
            'FID with Inception needs the library torch-fidelity: pip install "comfyui-ediffi[eval]". '
            "Or leave out --inception to measure in CLIP's space."
        ) from error
    try:
        torch.load(
            weights, map_location="cpu", weights_only=True
        )  # the library itself would run code that a file brings
        network = FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048"], feature_extractor_weights_path=str(weights)
        ).eval()
    except Exception as error:  # whatever unpickling and loading raise for another file
        raise ValueError(
            f"{weights.name} does not hold Inception's weights as torch-fidelity converted them "
            f"({str(error).splitlines()[0] if str(error) else type(error).__name__}). "
            f"Use pt_inception-2015-12-05-6726825d.pth."
        ) from error

    @torch.no_grad()
    def features(images: Tensor) -> Tensor:
        (made,) = network((images * 255).round().clip(0, 255).byte())
        return made

    return features


def unseen(count: int, stream_of_scenes: int, seed: int = 0, form: str = "short") -> list[tuple[Scene, Caption]]:
    """Scenes that no training data uses, and their captions; the same for the same arguments."""
    rng, pairs = np.random.default_rng([UNSEEN, stream_of_scenes, seed]), []
    for _ in range(count):
        scene = random_scene(rng)
        pairs.append((scene, caption(scene, rng, form)))
    return pairs


def rendered(scenes: Sequence[Scene]) -> Tensor:
    """(B, 3, 64, 64) in [0, 1]."""
    return torch.stack([torch.from_numpy(render(scene, SIZE)).permute(2, 0, 1) for scene in scenes])


def in_batches(things: Sequence, batch: int) -> Iterator[Sequence]:
    yield from (things[start : start + batch] for start in range(0, len(things), batch))


PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def pictures_in(folder: Path) -> list[Path]:
    """Raises FileNotFoundError where there are none."""
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in PICTURES) if folder.is_dir() else []
    if not files:
        raise FileNotFoundError(
            f"There are no pictures ({', '.join(PICTURES)}) in {folder}. Check --reference-pictures."
        )
    return files


def opened(path: Path) -> Tensor:
    """The middle square of a picture, at the size of those that are drawn: (1, 3, 64, 64) in [0, 1]."""
    from PIL import Image

    try:
        pixels = np.asarray(Image.open(path).convert("RGB"), dtype=np.float32) / 255
    except OSError as error:
        raise ValueError(f"{path} is not a picture that can be read ({error}). Remove it or get it again.") from error
    return resized(torch.from_numpy(pixels).permute(2, 0, 1)[None], SIZE).clamp(0, 1)


def guidances(start: float, stop: float, step: float) -> list[float]:
    """From start to stop, both included. Raises ValueError unless 0 <= start <= stop and step > 0."""
    if not (math.isfinite(start) and math.isfinite(stop) and 0 <= start <= stop):
        raise ValueError(
            f"Guidance begins at 0 (none) or more and ends at as much or more, got {start:g} to {stop:g}. Correct --guidance."
        )
    if not step > 0 or not math.isfinite(step):
        raise ValueError(f"The step of guidance must be above 0, got {step:g}. The paper's is 0.5. Correct --guidance.")
    return [round(start + i * step, 9) for i in range(math.floor((stop - start) / step + 1e-9) + 1)]


def mean_95(values: np.ndarray) -> dict:
    """Of (seeds, pictures): the mean, its 95 % interval over all pictures, and the mean of each seed."""
    values = np.asarray(values, dtype=np.float64)
    mean = float(values.mean())
    half = float(1.96 * values.std(ddof=1) / math.sqrt(values.size)) if values.size > 1 else None
    interval = (None, None) if half is None else (mean - half, mean + half)
    return {"value": mean, "interval_95": interval, "each_seed": values.mean(1).tolist()}


class Judge(NamedTuple):
    """What pictures of the captions are measured with."""

    clip: Clip
    features: Features | None  # of the Frechet distance; None: CLIP's
    captions: Tensor  # (seeds * pictures, E) embeddings of the captions
    reference: Gaussian

    def features_of(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Of (B, 3, H, W) in [0, 1]: those of the Frechet distance, and CLIP's, (B, D) and (B, E)."""
        embeddings = self.clip.of_images(images)
        return embeddings if self.features is None else self.features(images), embeddings

    def scores(self, features: Tensor, embeddings: Tensor, seeds: int) -> dict:
        """Of all pictures, (seeds * pictures, D) and (seeds * pictures, E)."""
        made = features.double().numpy()

        def distance(which) -> float:
            return frechet_distance(Gaussian.of(made[which]), self.reference)

        score = mean_95(clip_score(embeddings, self.captions).view(seeds, -1).numpy())
        score["value"] = max(score["value"], 0.0)
        one = len(made) // seeds
        return {
            "frechet": {
                "value": distance(slice(None)),
                "interval_95": jackknife_interval(distance, len(made)),
                "each_seed": [distance(slice(i, i + one)) for i in range(0, len(made), one)] if one > 1 else None,
            },
            "clip_score": score,
        }


def measured(
    denoise: Denoise,
    conditionings: Sequence[Conditioning],
    seeds: Sequence[int],
    settings: Settings,
    judge: Judge,
    batch: int = 25,
) -> dict:
    """Scores of one picture for each caption; the conditionings are of the captions of each seed.

    Picture i of seed s has noise of its own, that of the seed i for s = 0, whatever the guidance and the batch.
    """
    features = []
    for conditioning, seed in zip(conditionings, seeds, strict=True):
        for rows in in_batches(range(len(conditioning)), batch):
            part = conditioning.rows(slice(rows[0], rows[-1] + 1))
            *_, last = sample(denoise, part, stream(rows[0], seed), settings)
            features.append(judge.features_of(last.images()))
    return judge.scores(*(torch.cat(parts) for parts in zip(*features, strict=True)), len(seeds))


def written(path: Path, write: Callable[[Path], Any]) -> None:
    """The file appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial_path = path.with_name(f".partial-{path.name}")
    try:
        write(partial_path)
        os.replace(partial_path, path)
    finally:
        partial_path.unlink(missing_ok=True)


def write_json(values: dict, path: Path) -> None:
    written(path, lambda to: to.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8"))


def pyplot():
    """matplotlib without a display. Raises ValueError where it is not installed."""
    try:
        import matplotlib
    except ImportError as error:
        raise ValueError('Plots need the library matplotlib: pip install "comfyui-ediffi[eval]".') from error
    matplotlib.use("agg")
    from matplotlib import pyplot

    return pyplot


def save_plot(figure, path: Path) -> None:
    written(path, partial(figure.savefig, dpi=110))
    pyplot().close(figure)


def plot(result: dict, path: Path) -> None:
    """The Frechet distance against the CLIP score, one dot for each guidance, with 95 % intervals."""
    figure, axes = pyplot().subplots(figsize=(7.5, 5.5), layout="constrained")
    for number, curve in enumerate(result["curves"]):
        points = sorted(curve["points"], key=lambda point: point["guidance"])
        x, y = ([point[name]["value"] for point in points] for name in ("clip_score", "frechet"))
        ends = [
            [[abs(point[name]["interval_95"][end] - point[name]["value"]) for point in points] for end in (0, 1)]
            for name in ("clip_score", "frechet")
        ]
        axes.plot(x, y, marker="o", markersize=4, color=f"C{number}", label=curve["name"])
        axes.errorbar(x, y, ends[1], ends[0], fmt="none", ecolor=f"C{number}", alpha=0.25)
        for point, *where in zip(points, x, y, strict=True):
            axes.annotate(f"{point['guidance']:g}", where, (3, 3), textcoords="offset points", fontsize=7)
    if result["truth"]:
        where = [result["truth"][name]["value"] for name in ("clip_score", "frechet")]
        axes.plot(*where, "k*", markersize=11, label="as many true pictures")
    axes.set(xlabel="CLIP score", ylabel=f"Frechet distance, {result['settings']['features']}")
    axes.legend()
    save_plot(figure, path)


def earlier(path: Path | None, settings: dict, models: Sequence[Model]) -> list[dict]:
    """The curves that a file of scores holds already; none without a file.

    Raises ValueError for a file of something else, of other settings, or of other weights of the same name.
    """
    if path is None or not path.exists():
        return []
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
        format_, was, curves = held["format"], held["settings"], held["curves"]
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise ValueError(
            f"{path} was not written by this command ({error!r}). Choose another file for --out."
        ) from error
    if format_ != FORMAT:
        raise ValueError(f"{path} has format {format_!r}, this version reads {FORMAT}. Choose another file for --out.")
    now = json.loads(json.dumps(settings))
    for name in [*now, *(name for name in was if name not in now)]:
        if was.get(name) != now.get(name):
            raise ValueError(
                f"{path} holds points with {name} {was.get(name)!r}, this run has {now.get(name)!r}, so they would not be one "
                f"curve. Choose another file for --out, or the same settings."
            )
    for curve in curves:
        for model in models:
            if curve["name"] == model.name and curve["files"] != model.files:
                raise ValueError(
                    f"{path} holds a curve of {model.name} from other weights than these. Choose another file for --out, or "
                    f"delete it."
                )
    return curves


def options_of(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "ediffi curves", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ensemble", action="append", default=[], help="bundled, or a folder; again for more curves")
    parser.add_argument("--network", type=Path, action="append", default=[], help="a single network; again for more")
    parser.add_argument("--encoders", help="bundled, or a folder; the ensembles' choice if left out")
    parser.add_argument(
        "--embeddings",
        nargs="+",
        choices=EMBEDDINGS,
        default=["both"],
        help="of the text: a curve for each choice (both)",
    )
    parser.add_argument("--guidance", type=float, nargs=3, default=(0, 10, 0.5), metavar=("START", "STOP", "STEP"))
    parser.add_argument("--pictures", type=int, default=25, help="of each seed, at each guidance (25)")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1, 2], help="each has captions and noise of its own"
    )
    parser.add_argument("--form", choices=("short", "long"), default="short", help="of Shapeworld's captions")
    parser.add_argument("--captions", type=Path, metavar="captions.txt", help="other captions, one a line")
    parser.add_argument("--references", type=int, default=2000, help="rendered scenes that pictures are compared with")
    parser.add_argument("--reference-pictures", type=Path, metavar="FOLDER", help="pictures to compare with instead")
    parser.add_argument("--clip", type=Path, metavar="FOLDER", help="the CLIP that judges; the encoders' if left out")
    parser.add_argument("--inception", type=Path, metavar="FILE", help="weights of Inception, for FID")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--sampler", default="heun")
    parser.add_argument("--batch", type=int, default=25)
    parser.add_argument("--precision", choices=PRECISIONS, default="float32")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--out", type=Path, metavar="curves.json")
    parser.add_argument("--plot", type=Path, metavar="curves.png")
    return parser.parse_args(arguments)


def checked_seeds(seeds: Sequence[int]) -> None:
    if len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise ValueError(f"Seeds are different numbers of 0 or more, got {' '.join(map(str, seeds))}. Correct --seeds.")


def run(options: argparse.Namespace) -> dict:
    """Everything that was measured, as the file holds it; each point is written as soon as it is known."""
    wanted = guidances(*options.guidance)
    checked_seeds(options.seeds)
    if options.pictures < 1 or options.pictures * len(options.seeds) < 3:
        raise ValueError(
            f"--pictures {options.pictures} with {len(options.seeds)} seeds is too little for an interval: at least 3 pictures "
            f"in all. Raise --pictures."
        )
    if (options.captions is None) != (options.reference_pictures is None):
        raise ValueError("Captions of your own need pictures of your own to compare with: give --captions and --reference-pictures.")  # fmt: skip
    if options.plot:
        pyplot()
    models = [model_of_ensemble(name) for name in options.ensemble]
    models += [model_of_network(path) for path in options.network]
    models = models or [model_of_ensemble("shapeworld-base")]
    folder = chosen_encoders(models, options.encoders)
    models = [told(model, which) for model in models for which in dict.fromkeys(options.embeddings)]
    if len({model.name for model in models}) < len(models):
        raise ValueError(f"Two curves would both be called {models[0].name}. Give each network once, or rename a file.")

    scenes: list[list[Scene]] = []
    if options.captions:
        texts = captions_of(options.captions, options.pictures, len(options.seeds))
        files = pictures_in(options.reference_pictures)
        about = {
            "captions": {"file": options.captions.name, "sha256": fingerprint(options.captions)},
            "references": {"folder": options.reference_pictures.resolve().name, "pictures": len(files)},
        }
    else:
        pairs = [unseen(options.pictures, 5, seed, options.form) for seed in options.seeds]
        scenes = [[scene for scene, _ in of_seed] for of_seed in pairs]
        texts = [[one.text for _, one in of_seed] for of_seed in pairs]
        about = {
            "captions": f"Shapeworld, {options.form}",
            "references": {"folder": "Shapeworld", "pictures": options.references},
        }
    settings = Settings(steps=options.steps, sampler=options.sampler)
    judged_by = folder / "clip" if options.clip is None else options.clip
    about |= {
        "pictures": options.pictures,
        "seeds": options.seeds,
        "features": "CLIP's image embedding" if options.inception is None else "Inception's 2048 features",
        "clip": fingerprints(judged_by),
        "inception": fingerprint(options.inception) if options.inception and options.inception.is_file() else None,
        "encoders": {"folder": folder.resolve().name, "files": fingerprints(folder)},
        "precision": options.precision,
        "sampler": {name: value for name, value in settings._asdict().items() if "guidance" not in name},
    }
    curves = earlier(options.out, about, models)

    encoders = load_encoders(folder)
    clip = Clip.of(encoders) if options.clip is None else Clip.load(options.clip)
    features = None if options.inception is None else inception(options.inception)
    of_reference = features or clip.of_images
    if options.captions:
        reference = [
            of_reference(torch.cat([opened(path) for path in part])) for part in in_batches(files, options.batch)
        ]
    else:
        others = [scene for scene, _ in unseen(options.references, 6)]
        reference = [of_reference(rendered(part)) for part in in_batches(others, options.batch)]
    judge = Judge(
        clip,
        features,
        clip.of_texts([text for of_seed in texts for text in of_seed]),
        Gaussian.of(torch.cat(reference).double().numpy()),
    )
    result = {"format": FORMAT, "settings": about, "truth": None, "curves": curves}
    if scenes:
        each = [scene for of_seed in scenes for scene in of_seed]
        true = [judge.features_of(rendered(part)) for part in in_batches(each, options.batch)]
        result["truth"] = judge.scores(*(torch.cat(parts) for parts in zip(*true, strict=True)), len(options.seeds))

    missing = {}
    for model in models:
        curve = next((curve for curve in curves if curve["name"] == model.name), None)
        if curve is None:
            curve = {"name": model.name, "files": model.files, "points": []}
            curves.append(curve)
        held = {point["guidance"] for point in curve["points"]}
        missing[model.name] = curve, [one for one in wanted if one not in held]
    done, total, began = 0, sum(len(points) for _, points in missing.values()), time.monotonic()
    print(f"{total} points to draw, {len(options.seeds) * options.pictures} pictures each", flush=True)
    conditionings = [
        joined([conditioning_of(part, encoders) for part in in_batches(of_seed, options.batch)])
        for of_seed in texts
        if total
    ]
    for model in models:
        curve, points = missing[model.name]
        denoise = in_precision(model.load(), options.precision) if points else None
        for guidance in points:
            started = time.monotonic()
            guided = settings._replace(guidance_scale=guidance + 1)
            known = [conditioning.only(*model.kept) for conditioning in conditionings]
            scores = measured(denoise, known, options.seeds, guided, judge, options.batch)
            seconds, done = time.monotonic() - started, done + 1
            point = {"guidance": guidance, "guidance_scale": guidance + 1, **scores, "seconds": round(seconds, 1)}
            curve["points"] = sorted([*curve["points"], point], key=lambda one: one["guidance"])
            if options.out:
                write_json(result, options.out)
            left = (time.monotonic() - began) / done * (total - done)
            print(f"{said(model.name, point)}; {left / 60:.0f} min left", flush=True)
    if options.out:
        write_json(result, options.out)
    return result


def captions_of(path: Path, pictures: int, seeds: int) -> list[list[str]]:
    """The first lines of a file, as many as there are pictures, by seed."""
    if not path.is_file():
        raise FileNotFoundError(f"There is no file of captions at {path}. Check --captions.")
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if len(lines) < pictures * seeds:
        raise ValueError(
            f"{path.name} holds {len(lines)} captions, {seeds} seeds of {pictures} pictures need {pictures * seeds}. "
            f"Lower --pictures or add lines."
        )
    return [lines[start : start + pictures] for start in range(0, pictures * seeds, pictures)]


def said(name: str, point: dict) -> str:
    frechet, score = (
        f"{point[one]['value']:.4g} [{point[one]['interval_95'][0]:.4g}, {point[one]['interval_95'][1]:.4g}]"
        for one in ("frechet", "clip_score")
    )
    return f"{name}, guidance {point['guidance']:g}: Frechet distance {frechet}, CLIP score {score}, {point['seconds']:.0f} s"


def reported(run: Callable[[], Any], name: str) -> int:
    """The exit code of a command: 1, and what is wrong in one line, for a mistake of whoever typed it."""
    try:
        run()
    except (ValueError, FileNotFoundError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 1
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    options = options_of(arguments)

    def evaluate() -> None:
        if options.threads:
            torch.set_num_threads(options.threads)
        result = run(options)
        if options.plot:
            plot(result, options.plot)

    return reported(evaluate, "curves")


if __name__ == "__main__":
    sys.exit(main())
