"""Training pairs: pictures with the frozen embeddings of their captions, computed once and kept in shards.

A shard is a safetensors file of a few thousand pairs. Tokens of all captions lie end to end, (tokens, E) float16, with
the length of each beside them, so padding is not stored. Pictures are (n, H, W, 3) uint8. Beside each lies the number of
its style and, of Shapeworld, where its objects are and which tokens are about them. Shards are read where they lie: the
system keeps in memory what is used often, as far as there is room.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..conditioning import Conditioning
from ..super_resolution import FACTOR
from .grounding import Objects, objects_of
from .recipe import Data

SHARD = 2048  # pairs per file
TOKENS = ("clip", "t5")
NAMES = (
    "pictures",
    "styles",
    "clip_pooled",
    "image",
    *(f"{name}_{of}" for name in TOKENS for of in ("tokens", "lengths")),
)
OBJECTS = {f"objects_{name}": name for name in ("discs", "clip", "t5")}  # where pictures have them
VIEW = 64  # pixels a side of a whole picture of which only a window is kept


def shapeworld_pairs(data: Data, shard: int, count: int):
    """Of one shard: what is kept of the pictures, (count, H, W, 3) uint8; the whole pictures for the image encoder, uint8
    too; their styles, (count,) uint8; their captions; and the scenes.

    The same for the same arguments, whatever else ran.
    """
    from ..shapeworld import as_uint8, caption, random_scene, render
    from ..shapeworld.world import STYLES

    rng = np.random.default_rng([data.seed, shard])
    side, captions, scenes = data.kept, [], []
    pictures, styles = np.empty((count, side, side, 3), np.uint8), np.empty(count, np.uint8)
    wholes = pictures if data.window is None else np.empty((count, VIEW, VIEW, 3), np.uint8)
    for start in range(0, count, data.windows):
        scene = random_scene(rng)
        rows = range(start, min(start + data.windows, count))
        styles[rows] = STYLES.index(scene.style)
        words = caption(scene, rng, "long" if rng.random() < data.long_share else "short")
        captions += [words] * len(rows)
        scenes += [scene] * len(rows)
        if data.window is None:
            pictures[start] = as_uint8(render(scene, data.resolution))
            continue
        wholes[rows] = as_uint8(render(scene, VIEW))
        for row in rows:
            left, top = FACTOR * rng.integers((data.resolution - side) // FACTOR + 1, size=2)
            pictures[row] = as_uint8(render(scene, data.resolution, (left, top, side, side)))
    return *(torch.from_numpy(array) for array in (pictures, wholes, styles)), captions, scenes


def write_shards(
    folder: str | Path, encoders, data: Data, batch: int = 256, worker: int = 0, workers: int = 1
) -> Iterator[tuple[int, int]]:
    """Render, caption and encode `data.pairs` pairs into `folder`; yields (pairs done, pairs in all) after each shard.

    Shards that are already there are kept, so an interrupted run continues; other settings are refused. Of several
    workers, each writes every `workers`-th shard.
    """
    folder = claimed(folder, data)
    count = data.pairs
    for shard in range(worker, math.ceil(count / SHARD), workers):
        start = shard * SHARD
        path = folder / f"pairs-{shard:05d}.safetensors"
        size = min(SHARD, count - start)
        if not is_whole(path):
            pictures, wholes, styles, captions, scenes = shapeworld_pairs(data, shard, size)
            tensors = {"pictures": pictures, "styles": styles}
            if data.window is None:
                objects = objects_of(scenes, captions, encoders)
                tensors |= {key: getattr(objects, name) for key, name in OBJECTS.items()}
            write_shard(path, tensors | embedded(encoders, wholes, [c.text for c in captions], batch), worker)
        yield start + size, count


def claimed(folder: str | Path, data: Data) -> Path:
    """The folder for the pairs of `data`, made if need be. Raises ValueError where it holds pairs of other settings."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    settings = asdict(data.prepared)
    described = folder / "pairs.json"
    if described.is_file() and Data(**json.loads(described.read_text())).prepared != data.prepared:
        raise ValueError(
            f"{folder} already holds other pairs ({described.read_text().strip()}), this recipe asks for "
            f"{json.dumps(settings)}. Choose another folder or remove the old one."
        )
    described.write_text(json.dumps(settings))
    return folder


def write_shard(path: Path, tensors: dict[str, Tensor], worker: int, metadata: dict[str, str] | None = None) -> None:
    """Written whole or not at all."""
    partial = path.with_suffix(f".partial{worker}")
    save_file(tensors, partial, metadata)
    os.replace(partial, path)


def is_whole(path: Path) -> bool:
    """Is there a shard, as long as its header says?"""
    try:
        with safe_open(path, framework="pt"):
            return True
    except (FileNotFoundError, SafetensorError):
        return False


@torch.inference_mode()
def embedded(encoders, pictures: Tensor, texts: list[str], batch: int) -> dict[str, Tensor]:
    """What a shard holds beside its pictures and styles, of whole pictures (n, H, W, 3) uint8 and their captions."""
    parts: dict[str, list[Tensor]] = {}
    for start in range(0, len(texts), batch):
        text = encoders.encode_text(texts[start : start + batch])
        images = pictures[start : start + batch].permute(0, 3, 1, 2) / 127.5 - 1
        for name in TOKENS:
            tokens, mask = getattr(text, f"{name}_tokens"), getattr(text, f"{name}_mask")
            parts.setdefault(f"{name}_tokens", []).append(tokens[mask].half().cpu())
            parts.setdefault(f"{name}_lengths", []).append(mask.sum(1).cpu())
        parts.setdefault("clip_pooled", []).append(text.clip_pooled.half().cpu())
        parts.setdefault("image", []).append(encoders.encode_image(images).half().cpu())
    return {name: torch.cat(tensors).contiguous() for name, tensors in parts.items()}


class Joined:
    """Tensors end to end that stay where they are, in as many files: only the rows that are asked for are read."""

    def __init__(self, parts: Sequence[Tensor]) -> None:
        self.parts = parts
        self.ends = torch.tensor([len(part) for part in parts]).cumsum(0)
        self.starts = self.ends - torch.tensor([len(part) for part in parts])
        self.dtype = parts[0].dtype
        self.shape = torch.Size((int(self.ends[-1]), *parts[0].shape[1:]))

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Tensor | int) -> Tensor:
        """As of a tensor. rows: numbers of rows from 0 on, int64 of any shape, (...); returns (..., *shape[1:])."""
        if isinstance(rows, int):
            part = int(torch.bucketize(rows, self.ends, right=True))
            return self.parts[part][rows - int(self.starts[part])]
        wanted = rows.reshape(-1)
        of = torch.bucketize(wanted, self.ends, right=True)
        order = of.argsort()
        parts, counts = of[order].unique_consecutive(return_counts=True)
        taken = torch.empty((len(wanted), *self.shape[1:]), dtype=self.dtype)
        for part, places in zip(parts.tolist(), order.split(counts.tolist()), strict=True):
            taken[places] = self.parts[part][wanted[places] - self.starts[part]]
        return taken.view(*rows.shape, *self.shape[1:])


@dataclass(frozen=True)
class Pairs:
    """All pairs of a folder. What is large is read from the files when it is asked for."""

    pictures: Tensor | Joined  # (n, H, W, 3) uint8
    tokens: Mapping[str, Tensor | Joined]  # per encoder: (tokens, E) float16, captions end to end
    starts: Mapping[str, Tensor]  # per encoder: (n + 1,) where each caption's tokens begin
    clip_pooled: Tensor | Joined  # (n, E)
    image: Tensor | Joined  # (n, E)
    styles: Tensor  # (n,) uint8: pictures with the same number look alike
    objects: Objects | None = None  # of all pictures, where they are known

    @cached_property
    def lengths(self) -> Tensor:
        """(n,) tokens of each caption, all encoders together."""
        return sum(starts.diff() for starts in self.starts.values())

    def __len__(self) -> int:
        return len(self.pictures)

    @cached_property
    def of_style(self) -> dict[int, Tensor]:
        """The rows of each style."""
        return {int(style): (self.styles == style).nonzero()[:, 0] for style in self.styles.unique()}

    @cached_property
    def style_named(self) -> Tensor:
        """(n,) bool: does the caption say the style? Only where objects are known."""
        return self.objects.clip[:, -1].any(1) | self.objects.t5[:, -1].any(1)

    def draw(
        self, count: int, generator: torch.Generator, even_styles: bool = False, unnamed: float | None = None
    ) -> Tensor:
        """Random rows (count,), each as likely as any other; or each style as likely as any other, and its rows alike.

        unnamed: the share of rows whose captions do not say the style, by default as large as it is.
        """
        if not even_styles and unnamed is None:
            return torch.randint(len(self), (count,), generator=generator)
        shares = torch.ones(len(self))
        if even_styles:
            shares = 1 / torch.bincount(self.styles.long())[self.styles.long()]
        if unnamed is not None:
            kinds = ((unnamed, shares * ~self.style_named), (1 - unnamed, shares * self.style_named))
            shares = sum(share * of / of.sum().clamp(min=1e-8) for share, of in kinds)  # of a kind there may be none
        return torch.multinomial(shares, count, replacement=True, generator=generator)

    def references(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        """For each row (B,) a random one of its style.

        A network that is shown these learns to take nothing else from a reference: neither its objects nor its layout.
        """
        likes = [self.of_style[int(style)] for style in self.styles[rows]]
        return torch.stack([like[torch.randint(len(like), (), generator=generator)] for like in likes])

    def crops(self, rows: Tensor, side: int | None, generator: torch.Generator) -> Tensor:
        """(B, side, side, 3) uint8: of each picture a random square whose corner is a pixel of the low-res image too."""
        if side is None:
            return self.pictures[rows]
        height, width = self.pictures.shape[1:3]
        places = ((size - side) // FACTOR + 1 for size in (height, width))
        tops, lefts = (FACTOR * torch.randint(most, (len(rows),), generator=generator) for most in places)
        return torch.stack(
            [
                self.pictures[row][top : top + side, left : left + side]
                for row, top, left in zip(rows.tolist(), tops.tolist(), lefts.tolist(), strict=True)
            ]
        )

    def batch(
        self, rows: Tensor, references: Tensor | None = None, pictures: Tensor | None = None
    ) -> tuple[Tensor, Conditioning]:
        """Images (B, 3, H, W) float32 in [-1, 1] and their conditioning, padded to the longest caption of the batch.

        references: rows (B,) whose image embeddings are taken; by default the pictures' own. pictures: (B, H, W, 3) uint8,
        the `crops` that are shown instead of the whole.
        """
        pictures = self.pictures[rows] if pictures is None else pictures
        images = pictures.permute(0, 3, 1, 2).float() / 127.5 - 1
        (clip, clip_mask), (t5, t5_mask) = (self._padded(name, rows) for name in TOKENS)
        present = torch.ones(len(rows))
        pooled, image = self.clip_pooled[rows].float(), self.image[rows if references is None else references].float()
        return images, Conditioning(clip, clip_mask, pooled, t5, t5_mask, image, present)

    def _padded(self, name: str, rows: Tensor) -> tuple[Tensor, Tensor]:
        starts, lengths = self.starts[name][rows], (self.starts[name][1:] - self.starts[name][:-1])[rows]
        offsets = torch.arange(int(lengths.max()))
        mask = offsets < lengths[:, None]
        where = (starts[:, None] + offsets).clamp(max=len(self.tokens[name]) - 1)
        return self.tokens[name][where].float() * mask[:, :, None], mask


def read_shards(folder: str | Path, network=None) -> Pairs:
    """The pairs of all shards of a folder, read where they lie.

    network: the configuration of the one to train, whose widths the embeddings must have.
    Raises FileNotFoundError where there are no shards, and ValueError naming one that is cut short or made with other
    encoders than the first, or than `network` is for.
    """
    paths = sorted(Path(folder).glob("pairs-*.safetensors"))
    if not paths:
        raise FileNotFoundError(f"There are no training pairs in {folder}. Prepare them first: ediffi prepare RECIPE.")
    shards = [_opened(path) for path in paths]
    first = _widths(shards[0])
    if network is not None:
        check_widths({name: width for name, width in first.items() if name != "picture"}, network, f"{paths[0]}")
    for path, shard in zip(paths, shards, strict=True):
        if (widths := _widths(shard)) != first:
            raise ValueError(
                f"{path} holds {_listed(widths)}, but {paths[0].name} beside it {_listed(first)}: they were made with "
                f"different encoders or settings. Remove those of the wrong ones and run ediffi prepare again."
            )
    lengths = {name: torch.cat([shard[f"{name}_lengths"] for shard in shards]) for name in TOKENS}
    return Pairs(
        pictures=Joined([shard["pictures"] for shard in shards]),
        tokens={name: Joined([shard[f"{name}_tokens"] for shard in shards]) for name in TOKENS},
        starts={name: torch.cat([of.new_zeros(1), of.cumsum(0)]) for name, of in lengths.items()},
        clip_pooled=Joined([shard["clip_pooled"] for shard in shards]),
        image=Joined([shard["image"] for shard in shards]),
        styles=torch.cat([shard["styles"] for shard in shards]),
        objects=Objects(**{name: torch.cat([shard[key] for shard in shards]) for key, name in OBJECTS.items()})
        if all(OBJECTS.keys() <= shard.keys() for shard in shards)
        else None,
    )


def check_widths(widths: Mapping[str, int], network, of: str) -> None:
    """Raises ValueError unless embeddings of these widths, by name of the network's setting, are what it takes."""
    wanted = {name: getattr(network, name) for name in widths}
    if wanted != dict(widths):
        raise ValueError(
            f"{of}: embeddings of {_listed(widths)}, where the recipe's network takes {_listed(wanted)}. They come from "
            f"other encoders than the network is for. Set the widths in [network] to those of the encoders, or name other "
            f"encoders in [data] and run ediffi prepare into another folder."
        )


def _opened(path: Path) -> dict[str, Tensor]:
    """The tensors of a shard, mapped into memory but not read."""
    try:
        with safe_open(path, framework="pt") as file:
            objects = OBJECTS if OBJECTS.keys() <= set(file.keys()) else ()
            return {name: file.get_tensor(name) for name in (*NAMES, *objects)}
    except SafetensorError as error:
        raise ValueError(
            f"The prepared shard {path} cannot be read ({error}): it was cut short or is no shard. Run ediffi prepare again, "
            f"which makes it anew, or remove it to train without its pairs."
        ) from error


def _widths(shard: dict[str, Tensor]) -> dict[str, int]:
    names = {
        "clip_tokens": "clip_width",
        "t5_tokens": "t5_width",
        "clip_pooled": "pooled_width",
        "image": "image_width",
    }
    return {width: shard[name].shape[1] for name, width in names.items()} | {"picture": shard["pictures"].shape[1]}


def _listed(widths: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {width}" for name, width in widths.items())
