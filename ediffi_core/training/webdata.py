"""Training pairs from one's own pictures: tar files as webdataset lays them out, streamed and encoded once.

In a tar file, files that follow each other and share their name up to its first dot are one sample: a picture and its
caption. What cannot be used is left out and counted under its reason. A tar file becomes parts, shards of the layout that
`pairs` describes, and a report that says it is finished; each part knows how far into the tar file it reaches, so a run that
was stopped continues after it.
"""

import json
import os
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from io import BytesIO
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple
from urllib.parse import urlparse
from urllib.request import url2pathname

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor

from ..encoders import resized
from ..super_resolution import FACTOR
from .filters import AestheticHead, clip_scores, counted, load_aesthetic_head, verdicts
from .pairs import SHARD, TOKENS, claimed, embedded, is_whole, write_shard
from .recipe import Data

PICTURES = ("jpg", "jpeg", "png", "webp")
CAPTIONS = ("txt", "json")
PART = 2**28  # bytes of pictures in a part, about
DAMAGED = "damaged tar file, the rest is lost"


class Unusable(Exception):
    """The reason to leave a sample out."""


class Damaged(Exception):
    """Why the rest of a tar file cannot be read."""


class Sample(NamedTuple):
    key: str
    files: dict[str, bytes]  # by extension, of those in PICTURES and CAPTIONS
    others: tuple[str, ...]  # extensions of the files that are not read


class Pair(NamedTuple):
    name: str  # tar file and key
    caption: str
    picture: Tensor  # (kept, kept, 3) uint8
    whole: Tensor  # (S, S, 3) uint8, for the image encoder


@dataclass
class Report:
    """What became of the samples of one tar file, or of all."""

    samples: int = 0
    kept: int = 0
    skipped: Counter[str] = field(default_factory=Counter)  # by reason
    examples: dict[str, str] = field(default_factory=dict)  # a sample of each reason: tar file and key
    scores: dict[str, Counter[str]] = field(default_factory=dict)  # before the filters; see `filters.counted`

    def skip(self, reason: str, example: str) -> None:
        self.skipped[reason] += 1
        self.examples.setdefault(reason, example)

    def add(self, other: "Report") -> None:
        self.samples += other.samples
        self.kept += other.kept
        self.skipped += other.skipped
        self.examples = other.examples | self.examples
        for name, counts in other.scores.items():
            self.scores[name] = self.scores.get(name, Counter()) + counts

    def as_dict(self) -> dict:
        skipped = {
            reason: {"count": count, "example": self.examples[reason]} for reason, count in self.skipped.most_common()
        }
        scores = {name: dict(sorted(of.items(), key=lambda bar: float(bar[0]))) for name, of in self.scores.items()}
        return {"samples": self.samples, "kept": self.kept, "skipped": skipped, "scores": scores}

    @classmethod
    def of_dict(cls, values: dict) -> "Report":
        skipped = values["skipped"]
        return cls(
            values["samples"],
            values["kept"],
            Counter({reason: one["count"] for reason, one in skipped.items()}),
            {reason: one["example"] for reason, one in skipped.items()},
            {name: Counter(of) for name, of in values["scores"].items()},
        )


class Progress(NamedTuple):
    shard: int  # tar files done, those of other workers not counted
    shards: int  # of this worker
    name: str  # of the last one
    report: Report  # of it
    failure: str | None = None  # why the last one could not be read; the next run tries it again


def shard_urls(shards: str, allow_pipe: bool = False) -> list[str]:
    """The tar files that a recipe names: `{0..9}` and `{a,b}` are expanded, `::` stands between several.

    Raises ValueError for a command where commands are not allowed and for an address nothing can open, FileNotFoundError
    for a local file that is not there.
    """
    library = _webdataset()
    try:
        urls = library.shardlists.expand_urls(shards)
    except ValueError as error:
        raise ValueError(
            f"The shards {shards!r} cannot be expanded ({error}). Close each brace that is opened."
        ) from error
    for url in urls:
        scheme = urlparse(url).scheme
        if scheme == "pipe" and not allow_pipe:
            raise ValueError(
                f"The recipe's shards run a command on your computer: {url!r}. Recipes are shared, so this is refused. If you "
                f"know the command and want it run, say --allow-pipe."
            )
        path = local_path(url)
        if path is not None and not path.is_file():
            raise FileNotFoundError(
                f"There is no tar file {path}, which the recipe's shards {shards!r} name. Relative paths count from where the "
                f"command is started."
            )
        if path is None and scheme not in library.gopen_schemes:
            raise ValueError(
                f"The shard {url!r} has the address {scheme}:, which webdataset cannot open. It opens files and "
                f"{', '.join(sorted(name for name in library.gopen_schemes if not name.startswith('_')))}; anything else by a "
                f'command, "pipe:aws s3 cp s3://bucket/000000.tar -", and --allow-pipe.'
            )
    return urls


def local_path(url: str) -> Path | None:
    parts = urlparse(url)
    if parts.scheme == "file":
        return Path(url2pathname(parts.path))
    return Path(url) if len(parts.scheme) < 2 else None  # a scheme of one letter is a drive of Windows


def _webdataset():
    try:
        import webdataset
    except ImportError as error:
        raise ValueError('Shards need webdataset. Install it: pip install "comfyui-ediffi[train]".') from error
    return webdataset


def _opened(url: str) -> BinaryIO:
    path = local_path(url)
    return open(path, "rb") if path is not None else _webdataset().gopen(url)


def samples(stream: BinaryIO) -> Iterator[Sample]:
    """The samples of a tar file, in order, one in memory at a time.

    Raises Damaged, after the last sample, where the file is damaged or ends before its end mark, and OSError where the
    stream fails. webdataset's own reader takes a file that is cut between two members for a whole one, and so does tarfile.
    """
    key, files, others, damage = None, {}, [], None
    try:
        with tarfile.open(fileobj=stream, mode="r|*") as archive:
            for member in archive:
                archive.members = []  # it would remember all of them
                folder, slash, name = member.name.rpartition("/")
                stem, _, extension = name.partition(".")
                if not member.isreg() or not stem or (name.startswith("__") and name.endswith("__")):
                    continue
                if folder + slash + stem != key:
                    if key is not None:
                        yield Sample(key, files, tuple(others))
                    key, files, others = folder + slash + stem, {}, []
                if extension.lower() in PICTURES + CAPTIONS:
                    files[extension.lower()] = archive.extractfile(member).read()
                else:
                    others.append(extension)
            if archive.fileobj.tell() - archive.offset < tarfile.BLOCKSIZE:
                damage = "it ends without an end mark"
            while block := archive.fileobj.read(1 << 20):
                if block.strip(b"\0"):
                    damage = "something that is no member follows"
    except OSError:
        raise
    except Exception as error:  # tarfile has many for a damaged header
        damage = str(error) or type(error).__name__
    if key is not None:
        yield Sample(key, files, tuple(others))
    if damage is not None:
        raise Damaged(damage)


def caption_of(sample: Sample) -> str:
    """The text of .txt, else "caption" in .json. Raises Unusable."""
    try:
        if text := sample.files.get("txt", b"").decode().strip():
            return text
        text = json.loads(sample.files.get("json", b"{}"))
    except ValueError as error:  # of JSON and of UTF-8
        raise Unusable("broken caption") from error
    text = text.get("caption") if isinstance(text, dict) else None
    if text is not None and not isinstance(text, str):
        raise Unusable("broken caption")
    if not text or not text.strip():
        raise Unusable("no caption")
    return text.strip()


def picture_of(sample: Sample, least: int) -> Tensor:
    """The square in the middle of the picture, (side, side, 3) uint8, upright and on white. Raises Unusable.

    least: pixels that the shorter side must have.
    """
    from PIL import Image, ImageOps

    data = next((sample.files[name] for name in PICTURES if name in sample.files), None)
    if data is None:
        raise Unusable("unknown extension" if sample.others else "no picture")
    try:
        picture = Image.open(BytesIO(data), formats=("JPEG", "PNG", "WEBP"))
        if min(picture.size) < least:
            raise Unusable(f"shorter side below {least} pixels")
        if picture.mode.startswith(("I", "F")):  # Pillow would cut their values off at 255
            raise Unusable("more than 8 bits")
        picture = ImageOps.exif_transpose(picture)
        if picture.has_transparency_data:
            picture = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
        side = min(picture.size)
        left, top = ((size - side) // 2 for size in picture.size)
        picture = picture.crop((left, top, left + side, top + side)).convert("RGB")
    except Unusable:
        raise
    except Exception as error:  # Pillow has no error of its own for a damaged file
        raise Unusable("broken picture") from error
    return torch.from_numpy(np.array(picture))


def shrunk(square: Tensor, side: int) -> Tensor:
    """(S, S, 3) uint8 to (side, side, 3) uint8, each pixel the mean of those it covers, as the stage below shrinks it."""
    image = square.permute(2, 0, 1)[None].float()
    return F.interpolate(image, (side, side), mode="area")[0].round().byte().permute(1, 2, 0)


def shown(square: Tensor, side: int) -> Tensor:
    """The same as the image encoder sees it, which takes pictures of `side` pixels: (side, side, 3) uint8."""
    image = resized(square.permute(2, 0, 1)[None].float() / 255, side)
    return (image * 255).round().clip(0, 255)[0].byte().permute(1, 2, 0)


def window_of(picture: Tensor, side: int | None, seed: tuple[int, int, int]) -> Tensor:
    """A square of `side` pixels whose corner is a pixel of the low-res image too; the same for the same seed."""
    if side is None:
        return picture
    places = (len(picture) - side) // FACTOR + 1
    top, left = FACTOR * np.random.default_rng(seed).integers(places, size=2)
    return picture[top : top + side, left : left + side]


def usable(stream: BinaryIO, shard: int, name: str, data: Data, image_size: int, report: Report) -> Iterator[Pair]:
    """The pairs of a tar file that go to the encoders, after the `report.samples` that were read before.

    The report counts each sample as it passes. Raises OSError where the stream fails.
    """
    passed, damage = report.samples, None
    try:
        for number, sample in enumerate(samples(stream)):
            if number < passed:
                continue
            report.samples += 1
            try:
                caption = caption_of(sample)
                square = picture_of(sample, max(data.resolution, data.least_side or 0))
            except Unusable as reason:
                report.skip(str(reason), f"{name} {sample.key}")
                continue
            picture = window_of(shrunk(square, data.resolution), data.window, (data.seed, shard, number))
            yield Pair(f"{name} {sample.key}", caption, picture, shown(square, image_size))
    except Damaged as error:
        damage = str(error)
    while stream.read(1 << 20):  # a command whose output nobody takes would seem to fail
        pass
    stream.close()  # raises where a command failed: then it is no damage, and the next run may succeed
    if damage is not None and DAMAGED not in report.skipped:
        report.skip(DAMAGED, f"{name}: {damage}")


@dataclass(frozen=True)
class Writer:
    """Writes the parts of tar files into a folder."""

    folder: Path
    encoders: Any
    head: AestheticHead | None
    data: Data
    batch: int
    worker: int

    def part(self, shard: int, number: int) -> Path:
        return self.folder / f"pairs-{shard:05d}-{number:05d}.safetensors"

    def reached(self, shard: int) -> tuple[int, Report]:
        """How many parts of a tar file are there, without a gap, and the report up to there."""
        number, report = 0, Report()
        while is_whole(path := self.part(shard, number)):
            with safe_open(path, framework="pt") as file:
                report = Report.of_dict(json.loads(file.metadata()["report"]))
            number += 1
        return number, report

    def write(self, stream: BinaryIO, shard: int, name: str, number: int, report: Report) -> int:
        """The parts from `number` on. Returns how many there are now."""
        most = min(SHARD, PART // (3 * self.data.kept**2))
        pairs = usable(stream, shard, name, self.data, self.encoders.image_size, report)
        gathered: list[dict[str, Tensor]] = []
        while waiting := list(islice(pairs, self.batch)):
            gathered.append(self.encoded(waiting, report))
            if sum(len(one["pictures"]) for one in gathered) >= most:
                number += self._write_part(self.part(shard, number), gathered, report)
                gathered = []
        return number + self._write_part(self.part(shard, number), gathered, report)

    def _write_part(self, path: Path, gathered: list[dict[str, Tensor]], report: Report) -> int:
        if not any(len(one["pictures"]) for one in gathered):
            return 0
        tensors = {name: torch.cat([one[name] for one in gathered]) for name in gathered[0]}
        write_shard(path, tensors, self.worker, {"report": json.dumps(report.as_dict())})
        return 1

    def encoded(self, pairs: list[Pair], report: Report) -> dict[str, Tensor]:
        """What a shard holds of those pairs that pass the filters."""
        wholes = torch.stack([pair.whole for pair in pairs])
        tensors = embedded(self.encoders, wholes, [pair.caption for pair in pairs], len(pairs))
        scores = {"clip": clip_scores(tensors["clip_pooled"], tensors["image"])}
        if self.head is not None:
            scores["aesthetic"] = self.head(tensors["image"])
        for name, of in scores.items():
            report.scores[name] = report.scores.get(name, Counter()) + counted(name, of)
        reasons = verdicts(self.data, scores)
        for pair, reason in zip(pairs, reasons, strict=True):
            if reason is not None:
                report.skip(reason, pair.name)
        kept = torch.tensor([reason is None for reason in reasons])
        report.kept += int(kept.sum())
        for name in TOKENS:
            tensors[f"{name}_tokens"] = tensors[f"{name}_tokens"][kept.repeat_interleave(tensors[f"{name}_lengths"])]
        whole = {name: tensor if name.endswith("_tokens") else tensor[kept] for name, tensor in tensors.items()}
        pictures = torch.stack([pair.picture for pair in pairs])[kept]
        return {"pictures": pictures, "styles": torch.zeros(len(pictures), dtype=torch.uint8), **whole}


def write_web_shards(
    folder: str | Path,
    encoders,
    data: Data,
    batch: int = 64,
    worker: int = 0,
    workers: int = 1,
    allow_pipe: bool = False,
) -> Iterator[Progress]:
    """Encode the pairs of `data.shards` into `folder`; yields after each tar file.

    Tar files that are finished are kept, and one that was interrupted continues after its last part; other settings are
    refused. Of several workers, each takes every `workers`-th tar file. One that cannot be opened, or whose connection
    fails, is left for the next run.
    """
    urls = shard_urls(data.shards, allow_pipe)
    head = load_aesthetic_head(data.aesthetic_head, encoders.image_width) if data.aesthetic_head else None
    writer = Writer(claimed(folder, data), encoders, head, data, batch, worker)
    mine = range(worker, len(urls), workers)
    for done, shard in enumerate(mine, 1):
        finished, name = writer.folder / f"pairs-{shard:05d}.json", shard_name(urls[shard], shard)
        parts, report = writer.reached(shard)
        if finished.is_file() and (of := json.loads(finished.read_text(encoding="utf-8")))["parts"] == parts:
            yield Progress(done, len(mine), name, Report.of_dict(of))
            continue
        try:
            with _opened(urls[shard]) as stream:
                parts = writer.write(stream, shard, name, parts, report)
        except OSError as error:
            yield Progress(done, len(mine), name, report, str(error))
            continue
        _write_json(finished, {"parts": parts, **report.as_dict()}, worker)
        yield Progress(done, len(mine), name, report)


def write_report(folder: str | Path, data: Data, worker: int = 0, allow_pipe: bool = False) -> tuple[Report, list[str]]:
    """Add up what all workers have finished, and write it into `report.json` of the folder.

    Returns it, and the names of the tar files that are not finished.
    """
    folder, whole, missing = Path(folder), Report(), []
    for shard, url in enumerate(shard_urls(data.shards, allow_pipe)):
        finished = folder / f"pairs-{shard:05d}.json"
        if finished.is_file():
            whole.add(Report.of_dict(json.loads(finished.read_text(encoding="utf-8"))))
        else:
            missing.append(shard_name(url, shard))
    _write_json(folder / "report.json", {**whole.as_dict(), "unfinished": missing}, worker)
    return whole, missing


def shard_name(url: str, shard: int) -> str:
    """Of a tar file, without what may be secret in its address."""
    if (path := local_path(url)) is not None:
        return path.name
    parts = urlparse(url)
    return f"shard {shard}" if parts.scheme == "pipe" else PurePosixPath(parts.path).name or f"shard {shard}"


def _write_json(path: Path, values: dict, worker: int) -> None:
    partial = path.with_suffix(f".partial{worker}")
    partial.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)
