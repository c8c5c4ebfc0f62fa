"""The `ediffi` command."""

import argparse
import json
import signal
import sys
import time
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path

from .pipeline import DEFAULTS, OVERLAP, SR_DEFAULTS, Settings, recommended
from .style import FITS

DEMO = Path(__file__).resolve().parent.parent / "demo"
ENSEMBLES, ENCODERS = DEMO / "ensembles", DEMO / "encoders"
SR_STAGES = {64: (), 256: ("sr256",), 1024: ("sr256", "sr1024")}  # that follow the base stage for pictures of this size
SAMPLE_STEPS = 10  # at most, of the pictures that are drawn while training


ELSEWHERE = {  # commands whose options are their module's
    "branch": ("training.branching", "grow experts from a Stable Diffusion 1.5 or SDXL that you have"),
    "curves": ("evaluation.curves", "FID and CLIP score over guidance"),
    "reproduce": ("evaluation.reproduce", "figures 3 and 4 of the paper, by your ensemble"),
}


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        if arguments and arguments[0] in ELSEWHERE:
            module, _ = ELSEWHERE[arguments[0]]
            return import_module(f"{__package__}.{module}").main(arguments[1:])
        options = parser().parse_args(arguments)
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
    one.add_argument("--size", type=int, choices=SR_STAGES, default=64, help="pixels a side (64)")
    _model_options(one)
    for stage in SR_STAGES[1024]:
        one.add_argument(
            f"--{stage}",
            default=f"shapeworld-{stage}",
            metavar="ENSEMBLE",
            help=f"the ensemble that makes {stage[2:]} pixels",
        )
    _style_options(one)
    _sr_options(one)
    one.set_defaults(run=generate_picture)

    one = commands.add_parser("upscale", help="make a picture 4 times as large a side")
    one.add_argument("picture", type=Path, metavar="in.png")
    one.add_argument("--out", type=Path, required=True, metavar="out.png")
    _model_options(one, "shapeworld-sr256")
    one.add_argument("--prompt", default="", help="what the picture shows; nothing is known if left out")
    _style_options(one)
    _sr_options(one)
    one.add_argument("--overlap", type=int, default=OVERLAP, metavar="N", help=f"pixels that tiles share ({OVERLAP})")
    one.add_argument(
        "--denoise",
        type=float,
        default=1.0,
        metavar="D",
        help="below 1: start from the picture under some noise, and change it less (1)",
    )
    one.set_defaults(run=upscale_picture)

    one = commands.add_parser(
        "prepare", help="encode the training pairs of a recipe, rendered or from your own tar files"
    )
    _training_options(one)
    one.add_argument("--worker", type=int, default=0)
    one.add_argument("--workers", type=int, default=1, help="processes that share the work, started by you")
    one.add_argument("--device", default="cpu", help="where the encoders run (cpu)")
    one.add_argument(
        "--precision", choices=("float32", "bfloat16"), default="float32", help="of the encoders (float32)"
    )
    one.add_argument(
        "--batch", type=int, metavar="N", help="pairs that are encoded at once (256 rendered, 64 of your own)"
    )
    one.add_argument("--plot", action="store_true", help="also draw histograms of the scores of your own pictures")
    one.add_argument("--allow-pipe", action="store_true", help="run the commands that the recipe names as shards")
    one.set_defaults(run=prepare)

    one = commands.add_parser("train", help="train the networks of a recipe, or continue")
    _training_options(one)
    one.add_argument("--node", help="one network only; all in order if left out")
    one.add_argument("--save-every", type=int, default=250, metavar="STEPS")
    one.add_argument("--log-every", type=int, default=50, metavar="STEPS")
    one.add_argument("--device", help="cpu if left out; `accelerate launch` chooses by itself")
    one.add_argument(
        "--accumulate", type=int, default=1, metavar="N", help="take each batch in N parts, to need less memory (1)"
    )
    one.add_argument(
        "--workers",
        type=int,
        default=0,
        metavar="N",
        help="processes that draw batches ahead, for a GPU that would wait (0)",
    )
    one.add_argument("--tensorboard", type=Path, metavar="FOLDER", help="also draw curves for TensorBoard here")
    one.add_argument(
        "--samples", type=int, metavar="STEPS", help="draw pictures of a few captions every so many steps; base stage"
    )
    one.add_argument("--captions", type=Path, metavar="captions.txt", help="those of --samples, one in a line")
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

    for name, (_, says) in ELSEWHERE.items():
        commands.add_parser(name, help=says, add_help=False)

    one = commands.add_parser("inspect", help="say what network files and ensembles hold")
    one.add_argument("files", nargs="+", type=Path)
    one.set_defaults(run=inspect)
    return whole


def _model_options(command: argparse.ArgumentParser, ensemble: str = "shapeworld-base") -> None:
    command.add_argument("--ensemble", default=ensemble, help="name of a bundled ensemble, or a folder")
    command.add_argument("--encoders", help="name of bundled encoders, or a folder; the ensemble's choice if left out")
    command.add_argument("--steps", type=int)
    command.add_argument("--guidance-scale", type=float)
    command.add_argument("--sampler")
    command.add_argument("--threads", type=int, help="CPU threads")


def _style_options(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--style", type=Path, action="append", metavar="ref.png", help="a picture whose look is wanted; again for more"
    )
    command.add_argument(
        "--style-strength",
        type=float,
        action="append",
        metavar="S",
        help="0 is none, 1 (the default) as in training; once for all pictures, or once for each",
    )
    command.add_argument("--style-fit", choices=FITS, default=FITS[0], help="pad the picture to a square, or crop it")
    command.add_argument(
        "--style-guidance-scale",
        type=float,
        metavar="S",
        help="guide the style by its own number; the text's if left out",
    )


def _sr_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--seed", type=int, default=0)
    command.add_argument(
        "--augmentation-sigma",
        type=float,
        default=0.0,
        metavar="S",
        help="noise put on what is enlarged, so that more detail is invented (0)",
    )
    command.add_argument(
        "--tile", type=int, metavar="N", help="enlarge in tiles of at most N pixels a side, as large as memory allows"
    )


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


def _described(name: str, *stages: str):
    """The ensemble that a name on the command line means. Raises ValueError unless it is of one of these stages."""
    from .checkpoint import read_ensemble

    description = read_ensemble(found(name, ENSEMBLES))
    if description.stage not in stages:
        raise ValueError(
            f"{name!r} is an ensemble of the stage {description.stage!r}, where {' or '.join(map(repr, stages))} is needed. "
            f"Choose another; `ediffi inspect FOLDER` says what an ensemble is."
        )
    return description


def _settings(description, options: argparse.Namespace | None = None, defaults: Settings = DEFAULTS) -> Settings:
    """The defaults, changed by what the ensemble recommends, changed by what the command line says."""
    names = ("steps", "guidance_scale", "sampler", "style_guidance_scale")
    return recommended(description.sampler, defaults, **{name: getattr(options, name, None) for name in names})


def _loaded_encoders(options: argparse.Namespace, *descriptions):
    """The ones that were chosen, else those that all the ensembles recommend."""
    import torch

    from .encoders import load_encoders

    if options.threads:
        torch.set_num_threads(options.threads)
    wanted = {description.encoders: description.folder.name for description in descriptions if description.encoders}
    if len(wanted) > 1 and not options.encoders:
        each = ", ".join(f"{name} {encoders!r}" for encoders, name in wanted.items())
        raise ValueError(f"The ensembles were trained with different encoders: {each}. Choose ensembles of one family.")
    return load_encoders(found(options.encoders or next(iter(wanted), "shapeworld"), ENCODERS))


def _report(line: str, passing: bool = False) -> None:
    """A line of progress. Passing ones, and all but the last on a terminal, do not stay."""
    if sys.stderr.isatty():
        print(f"\r{line:40}", end="", file=sys.stderr, flush=True)
    elif not passing:
        print(line, file=sys.stderr, flush=True)


def generate_picture(options: argparse.Namespace) -> None:
    from .checkpoint import load_ensemble
    from .pipeline import Stage, cascade

    base = _described(options.ensemble, "base")
    larger = [_described(getattr(options, stage), stage) for stage in SR_STAGES[options.size]]
    encoders = _loaded_encoders(options, base, *larger)
    for cut in encoders.cut([options.prompt]):
        print(f"ediffi: {cut}", file=sys.stderr)
    style, strength = _style(options, encoders)
    stages = [Stage(partial(load_ensemble, base.folder), _settings(base, options))]
    for one in larger:
        settings = _settings(one, defaults=SR_DEFAULTS)
        stages.append(Stage(partial(load_ensemble, one.folder), settings, options.augmentation_sigma, options.tile))
    run = cascade([options.prompt], encoders, stages, options.seed, style, style_strength=strength)
    for number, step in run:
        name = (base, *larger)[number].folder.name
        _report(f"{name}: step {step.index + 1} of {stages[number].settings.steps}")
    _finish(step, options.out)


def upscale_picture(options: argparse.Namespace) -> None:
    import numpy as np
    import torch

    from .checkpoint import load_ensemble
    from .pipeline import conditioning_of, upscale

    description = _described(options.ensemble, *SR_STAGES[1024])
    picture = _opened(options.picture)
    if picture.has_transparency_data and np.asarray(picture.convert("RGBA"))[..., 3].min() < 255:
        raise ValueError(
            f"{options.picture} is transparent in places, which cannot be enlarged. Put it on a background."
        )
    pixels = torch.from_numpy(np.asarray(picture.convert("RGB"), dtype=np.float32) / 127.5 - 1)
    encoders = _loaded_encoders(options, description)
    for cut in encoders.cut([options.prompt]):
        print(f"ediffi: {cut}", file=sys.stderr)
    conditioning = conditioning_of([options.prompt], encoders, *_style(options, encoders))
    settings = _settings(description, options, SR_DEFAULTS)
    for step in upscale(
        pixels.permute(2, 0, 1)[None],
        conditioning,
        load_ensemble(description.folder),
        options.seed,
        settings,
        options.augmentation_sigma,
        options.denoise,
        options.tile,
        options.overlap,
        after=lambda done, tiles: _report(f"tile {done} of {tiles}", passing=True),
    ):
        _report(f"{description.folder.name}: step {step.index + 1} of {settings.steps}")
    _finish(step, options.out)


def _finish(step, path: Path) -> None:
    if sys.stderr.isatty():
        print(file=sys.stderr)
    _save_png(step.images()[0].permute(1, 2, 0).numpy(), path)
    print(path)


def _opened(file: Path):
    """The picture in a file, upright."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        return ImageOps.exif_transpose(Image.open(file))
    except UnidentifiedImageError as error:
        raise ValueError(f"{file} is no picture that can be read. Give a PNG or JPEG file.") from error


def _style(options: argparse.Namespace, encoders):
    """The embedding (1, E) of all references together, None without any, and its strength."""
    import numpy as np
    import torch

    from .style import averaged, square

    files, strengths = options.style or [], options.style_strength or [1.0]
    if len(strengths) not in (1, len(files)):
        raise ValueError(
            f"--style-strength is given {len(strengths)} times for {len(files)} --style. Give it once, or once for each."
        )
    embeddings = []
    for file in files:
        picture = _opened(file)
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
    from .training.pairs import check_widths, write_shards
    from .training.recipe import read_recipe

    if options.threads:
        torch.set_num_threads(options.threads)
    recipe = read_recipe(options.recipe)
    if options.plot and recipe.data.shards is None:
        raise ValueError(f"--plot draws the scores of your own pictures, and {options.recipe} names no shards.")
    encoders = load_encoders(found(recipe.data.encoders, ENCODERS), options.device, getattr(torch, options.precision))
    widths = {"clip_width": encoders.clip_width, "t5_width": encoders.t5_width}
    widths |= {"pooled_width": encoders.image_width, "image_width": encoders.image_width}
    check_widths(widths, recipe.network, f"The encoders {recipe.data.encoders!r}")
    folder = options.folder / f"{recipe.name}-pairs"
    chosen = {"worker": options.worker, "workers": options.workers}
    chosen |= {"batch": options.batch} if options.batch else {}
    if recipe.data.shards is not None:
        _prepare_own(options, folder, encoders, recipe.data, chosen)
        return
    for done, total in write_shards(folder, encoders, recipe.data, **chosen):
        print(f"{done} of {total} pairs", flush=True)


def _prepare_own(options: argparse.Namespace, folder: Path, encoders, data, chosen: dict[str, int]) -> None:
    """From tar files, with a report of what was left out."""
    from .training.filters import plot_scores
    from .training.webdata import write_report, write_web_shards

    failed = []
    for progress in write_web_shards(folder, encoders, data, **chosen, allow_pipe=options.allow_pipe):
        line = f"{progress.shard} of {progress.shards}, {progress.name}: {progress.report.kept} pairs of "
        print(f"{line}{progress.report.samples} samples", flush=True)
        if progress.failure:
            failed.append(progress.name)
            print(f"ediffi: {progress.name} could not be read: {progress.failure}", file=sys.stderr, flush=True)
    report, unfinished = write_report(folder, data, options.worker, options.allow_pipe)
    print(f"{report.kept} pairs of {report.samples} samples are in {folder}")
    for reason, count in report.skipped.most_common():
        print(f"  left out {count}: {reason}, such as {report.examples[reason]}")
    if options.plot:
        plot_scores(folder / "scores.png", report.scores, data)
        print(folder / "scores.png")
    if failed:
        raise ValueError(
            f"{len(failed)} tar files could not be read, {failed[0]} the first. Run it again: what is done is kept."
        )
    if unfinished:
        print(f"{len(unfinished)} tar files of other workers are not finished, {unfinished[0]} the first")


def train(options: argparse.Namespace) -> None:
    import torch

    from .training.pairs import read_shards
    from .training.recipe import read_recipe
    from .training.trainer import Trainer, engine_of, export

    if options.threads:
        torch.set_num_threads(options.threads)
    recipe = read_recipe(options.recipe)
    engine = engine_of(options.device)
    samples = _samples(recipe, options) if options.samples and engine.rank == 0 else None
    pairs = read_shards(options.folder / f"{recipe.name}-pairs", recipe.network)
    folder = options.folder / recipe.name
    with _signals() as caught:
        for node in [recipe.node(options.node)] if options.node else recipe.nodes:
            # of the trainer nothing is kept: what it holds of the other processes has to go before the engine lets go of them
            stopped = _run(
                Trainer(
                    recipe, node, pairs, folder, engine=engine, accumulate=options.accumulate, workers=options.workers
                ),
                options,
                samples,
                caught,
            )
            if stopped:
                engine.close()
                raise SystemExit(128 + stopped)
    if options.export and engine.rank == 0:
        export(recipe, folder, options.export)
    engine.close()


@contextmanager
def _signals():
    """A list that SIGTERM and SIGINT are put in, for a loop to see between two steps. A second SIGINT interrupts it."""
    caught = []

    def note(number, frame):
        if caught and number == signal.SIGINT:
            raise KeyboardInterrupt
        caught.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _samples(recipe, options: argparse.Namespace):
    """What --samples draws: the captions of --captions, or a few of Shapeworld."""
    from .encoders import load_encoders
    from .evaluation.reading import unseen_captions
    from .pipeline import conditioning_of
    from .training.logs import Samples

    if recipe.stage != "base":
        raise ValueError(f"--samples draws from noise, as the base stage does; {recipe.name} is of {recipe.stage}.")
    if options.captions is None:
        captions = [one.text for one in unseen_captions(8)]
    else:
        lines = options.captions.read_text(encoding="utf-8").splitlines()
        captions = [line.strip() for line in lines if line.strip()]
    encoders = load_encoders(found(recipe.data.encoders, ENCODERS))
    settings = recommended(recipe.sampler)
    settings = settings._replace(steps=min(settings.steps, SAMPLE_STEPS))
    side = recipe.data.resolution
    return Samples(captions, conditioning_of(captions, encoders), settings, (side, side))


def _run(trainer, options: argparse.Namespace, samples, caught: list[int]) -> int | None:
    """Drive a trainer with its journal, checkpoints and samples. Returns the signal that stopped it, if one did."""
    import torch

    from .training.logs import Journal

    engine, node = trainer.engine, trainer.node.name
    if trainer.step >= trainer.node.steps:
        if engine.rank == 0:
            print(f"{node}: already finished at step {trainer.step}", flush=True)
        return None
    with Journal(trainer, options.log_every, options.tensorboard) as journal:
        for progress in trainer.train():
            journal.note(progress)
            step, finished = progress.step, progress.step == progress.steps
            stop = engine.mean(torch.tensor([float(bool(caught))])).item() > 0  # a signal may reach one process alone
            if stop or finished or step % options.save_every == 0:
                trainer.save()
            if samples and (finished or step % options.samples == 0):
                journal.picture(samples.write(trainer), step)
            if stop:
                by = signal.Signals(caught[0] if caught else signal.SIGTERM)
                journal.say(
                    f"{node}: stopped by {by.name} at step {step} of {progress.steps}, which is saved in {trainer.folder}. "
                    f"The same command continues."
                )
                return by.value
    return None


def evaluate(options: argparse.Namespace) -> None:
    import numpy as np

    from .checkpoint import load_ensemble, load_network
    from .evaluation.reading import in_precision, read_pictures, summary, unseen_captions
    from .preconditioning import Denoiser

    description = _described(options.ensemble, "base")
    encoders, settings = _loaded_encoders(options, description), _settings(description, options)
    ensemble = load_ensemble(description.folder)
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
