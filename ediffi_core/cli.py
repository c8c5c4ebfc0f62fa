"""The `ediffi` command: generate, prepare, train, evaluate, inspect."""

import argparse
import json
import sys
import time
from pathlib import Path

from .pipeline import Settings
from .style import FITS

DEMO = Path(__file__).resolve().parent.parent / "demo"
ENSEMBLES, ENCODERS = DEMO / "ensembles", DEMO / "encoders"


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    try:
        options.run(options)
    except (ValueError, FileNotFoundError) as error:
        print(f"ediffi: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def parser() -> argparse.ArgumentParser:
    whole = argparse.ArgumentParser(prog="ediffi", description="eDiff-I without ComfyUI.")
    commands = whole.add_subparsers(required=True, metavar="COMMAND")

    one = commands.add_parser("generate", help="make a picture of a prompt")
    one.add_argument("prompt")
    one.add_argument("--out", type=Path, required=True, metavar="x.png")
    _model_options(one)
    one.add_argument(
        "--style", type=Path, action="append", metavar="ref.png", help="a picture whose look is wanted; again for more"
    )
    one.add_argument(
        "--style-strength",
        type=float,
        action="append",
        metavar="S",
        help="0 is none, 1 (the default) as in training; once for all pictures, or once for each",
    )
    one.add_argument("--style-fit", choices=FITS, default=FITS[0], help="pad the picture to a square, or crop it")
    one.add_argument(
        "--style-guidance-scale",
        type=float,
        metavar="S",
        help="guide the style by its own number; the text's if left out",
    )
    one.add_argument("--seed", type=int, default=0)
    one.set_defaults(run=generate_picture)

    one = commands.add_parser("prepare", help="render and encode the training pairs of a recipe")
    _training_options(one)
    one.add_argument("--worker", type=int, default=0)
    one.add_argument("--workers", type=int, default=1, help="processes that share the work, started by you")
    one.set_defaults(run=prepare)

    one = commands.add_parser("train", help="train the networks of a recipe, or continue")
    _training_options(one)
    one.add_argument("--node", help="one network only; all in order if left out")
    one.add_argument("--save-every", type=int, default=250, metavar="STEPS")
    one.add_argument("--device", default="cpu")
    one.add_argument("--export", type=Path, metavar="FOLDER", help="write the finished ensemble here")
    one.set_defaults(run=train)

    one = commands.add_parser("evaluate", help="score pictures of unseen captions")
    _model_options(one)
    one.add_argument("--network", type=Path, help="score this single network file instead of the ensemble")
    one.add_argument("--captions", type=int, default=300)
    one.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    one.add_argument("--form", choices=("short", "long"), default="short")
    one.add_argument("--seed", type=int, default=0)
    one.add_argument("--out", type=Path, metavar="scores.json")
    one.add_argument("--sheet", type=Path, metavar="sheet.png", help="also write a sheet of the first pictures")
    one.set_defaults(run=evaluate)

    one = commands.add_parser("inspect", help="say what network files and ensembles hold")
    one.add_argument("files", nargs="+", type=Path)
    one.set_defaults(run=inspect)
    return whole


def _model_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--ensemble", default="shapeworld-base", help="name of a bundled ensemble, or a folder")
    command.add_argument("--encoders", help="name of bundled encoders, or a folder; the ensemble's choice if left out")
    command.add_argument("--steps", type=int)
    command.add_argument("--guidance-scale", type=float)
    command.add_argument("--sampler")
    command.add_argument("--threads", type=int, help="CPU threads")


def _training_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("recipe", type=Path, metavar="RECIPE.toml")
    command.add_argument("--folder", type=Path, default=Path("runs"), help="where data and weights go (runs/)")
    command.add_argument("--threads", type=int, help="CPU threads")


def found(name: str, bundled: Path) -> Path:
    """The folder that a name on the command line means: a bundled one, or a path."""
    if (bundled / name).is_dir():
        return bundled / name
    if Path(name).is_dir():
        return Path(name)
    known = sorted(path.name for path in bundled.iterdir() if path.is_dir()) if bundled.is_dir() else []
    raise FileNotFoundError(
        f"There is no {name!r}: neither a folder nor bundled. Bundled are: {', '.join(known) or 'none'}."
    )


def _loaded(options: argparse.Namespace):
    import torch

    from .checkpoint import load_ensemble, read_ensemble
    from .encoders import load_encoders

    if options.threads:
        torch.set_num_threads(options.threads)
    folder = found(options.ensemble, ENSEMBLES)
    description = read_ensemble(folder)
    encoders = load_encoders(found(options.encoders or description.encoders or "shapeworld", ENCODERS))
    names = ("steps", "guidance_scale", "sampler", "style_guidance_scale")
    chosen = {name: getattr(options, name, None) for name in names}
    recommended = {name: value for name, value in description.sampler.items() if name in Settings._fields}
    settings = Settings(**{**recommended, **{name: value for name, value in chosen.items() if value is not None}})
    return encoders, load_ensemble(folder), settings


def generate_picture(options: argparse.Namespace) -> None:
    from .pipeline import generate

    encoders, ensemble, settings = _loaded(options)
    for cut in encoders.cut([options.prompt]):
        print(f"ediffi: {cut}", file=sys.stderr)
    style, strength = _style(options, encoders)
    image = generate([options.prompt], encoders, ensemble, options.seed, settings, style, style_strength=strength)[0]
    _save_png(image.permute(1, 2, 0).numpy(), options.out)
    print(options.out)


def _style(options: argparse.Namespace, encoders):
    """The embedding (1, E) of all references together, None without any, and its strength."""
    import numpy as np
    import torch
    from PIL import Image, ImageOps, UnidentifiedImageError

    from .style import averaged, square

    files, strengths = options.style or [], options.style_strength or [1.0]
    if len(strengths) not in (1, len(files)):
        raise ValueError(
            f"--style-strength is given {len(strengths)} times for {len(files)} --style. Give it once, or once for each."
        )
    embeddings = []
    for file in files:
        try:
            picture = ImageOps.exif_transpose(Image.open(file))
        except UnidentifiedImageError as error:
            raise ValueError(f"{file} is no picture that can be read. Give --style a PNG or JPEG file.") from error
        pixels = np.asarray(picture.convert("RGBA" if picture.has_transparency_data else "RGB"), dtype=np.float32)
        reference = square(
            torch.from_numpy(pixels / 255).permute(2, 0, 1)[None], encoders.image_size, options.style_fit
        )
        embeddings.append(encoders.encode_image(reference * 2 - 1)[0])
    if not embeddings:
        return None, 1.0
    style, strength = averaged(embeddings, strengths * len(files) if len(strengths) == 1 else strengths)
    return style[None], strength


def prepare(options: argparse.Namespace) -> None:
    import torch

    from .encoders import load_encoders
    from .training.pairs import write_shards
    from .training.recipe import read_recipe

    if options.threads:
        torch.set_num_threads(options.threads)
    recipe = read_recipe(options.recipe)
    encoders = load_encoders(found(recipe.data.encoders, ENCODERS))
    folder = options.folder / f"{recipe.name}-pairs"
    for done, total in write_shards(folder, encoders, recipe.data, worker=options.worker, workers=options.workers):
        print(f"{done} of {total} pairs", flush=True)


def train(options: argparse.Namespace) -> None:
    import torch

    from .training.pairs import read_shards
    from .training.recipe import read_recipe
    from .training.trainer import Trainer, export

    if options.threads:
        torch.set_num_threads(options.threads)
    recipe = read_recipe(options.recipe)
    pairs = read_shards(options.folder / f"{recipe.name}-pairs")
    folder = options.folder / recipe.name
    for node in [recipe.node(options.node)] if options.node else recipe.nodes:
        trainer = Trainer(recipe, node, pairs, folder, options.device)
        _run(trainer, options.save_every)
    if options.export:
        export(recipe, folder, options.export)


def _run(trainer, save_every: int) -> None:
    """Drive a trainer with a line of progress, a log of losses, and checkpoints."""
    started, first, smooth = time.monotonic(), trainer.step, None
    trainer.folder.mkdir(parents=True, exist_ok=True)
    if first >= trainer.node.steps:
        print(f"{trainer.node.name}: already finished at step {first}", flush=True)
        return
    with open(trainer.folder / f"{trainer.node.name}.log.jsonl", "a", encoding="utf-8") as log:
        try:
            for progress in trainer.train():
                smooth = progress.loss if smooth is None else smooth + 0.02 * (progress.loss - smooth)
                spent = time.monotonic() - started
                left = spent / (progress.step - first) * (progress.steps - progress.step)
                line = f"{trainer.node.name} {progress.step}/{progress.steps} loss {smooth:.4f}"
                if sys.stdout.isatty():
                    print(f"\r{line}, {left / 60:.0f} min left ", end="", flush=True)
                if progress.step % 50 == 0:
                    print(json.dumps({**progress._asdict(), "smooth": smooth, "seconds": spent}), file=log, flush=True)
                    if not sys.stdout.isatty():
                        print(f"{line}, {left / 60:.0f} min left", flush=True)
                if progress.step % save_every == 0 and progress.step < progress.steps:
                    trainer.save()
        finally:
            trainer.save()


def evaluate(options: argparse.Namespace) -> None:
    import numpy as np

    from .checkpoint import load_network
    from .evaluation.reading import in_precision, read_pictures, summary, unseen_captions
    from .preconditioning import Denoiser

    encoders, ensemble, settings = _loaded(options)
    if options.network:
        import torch

        network, header = load_network(options.network, dtype=torch.float32)
        ensemble = Denoiser(network, header.sigma_data)
    ensemble = in_precision(ensemble, options.precision)
    started = time.monotonic()
    pictures = []
    for picture in read_pictures(
        unseen_captions(options.captions, options.form), encoders, ensemble, settings, options.seed
    ):
        pictures.append(picture)
        if len(pictures) % 50 == 0:
            print(f"{len(pictures)} of {options.captions} pictures, {time.monotonic() - started:.0f} s", flush=True)
    scores = summary(pictures)
    for group, rows in scores.items():
        print(f"{group}")
        for name, row in rows.items():
            low, high = row["interval_95"]
            print(
                f"  {name:32s} {row['right']:4d} of {row['total']:4d} = {100 * row['share']:5.1f} %  [{100 * low:.1f}, {100 * high:.1f}]"
            )
    if options.out:
        described = {
            "model": str(options.network or options.ensemble),
            "captions": options.captions,
            "form": options.form,
            "seed": options.seed,
            "precision": options.precision,
            "settings": settings._asdict(),
            "scores": scores,
        }
        options.out.write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")
    if options.sheet:
        columns = 10
        shown = [picture.image for picture in pictures[: len(pictures) // columns * columns][:100]]
        rows = [np.concatenate(shown[i : i + columns], axis=1) for i in range(0, len(shown), columns)]
        _save_png(np.concatenate(rows), options.sheet)


def inspect(options: argparse.Namespace) -> None:
    from .checkpoint import read_ensemble, read_header

    for path in options.files:
        if path.is_dir():
            ensemble = read_ensemble(path)
            print(f"{path}: {ensemble.stage} ensemble, encoders {ensemble.encoders}, licence {ensemble.license}")
            for file, interval in zip(ensemble.files, ensemble.intervals, strict=True):
                print(f"  {file}: sigma in {interval}")
            continue
        header = read_header(path)
        print(f"{path}: {header.kind} network for sigma in {header.interval}, sigma_data {header.sigma_data:g}")
        for name, value in {**header.config.as_dict(), **header.training}.items():
            print(f"  {name}: {value}")


def _save_png(image, path: Path) -> None:
    """image: (H, W, 3) float in [0, 1]."""
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((image * 255).round().clip(0, 255).astype("uint8")).save(path)


if __name__ == "__main__":
    sys.exit(main())
