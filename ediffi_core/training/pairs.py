"""Training pairs: pictures with the frozen embeddings of their captions, computed once and kept in shards.

A shard is a safetensors file of a few thousand pairs. Tokens of all captions lie end to end, (tokens, E) float16, with
the length of each beside them, so padding is not stored. Pictures are (n, H, W, 3) uint8. Beside each lies the number of
its style.
"""

import json
import math
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..conditioning import Conditioning
from ..super_resolution import FACTOR
from .recipe import Data

SHARD = 2048  # pairs per file
TOKENS = ("clip", "t5")
VIEW = 64  # pixels a side of a whole picture of which only a window is kept


def shapeworld_pairs(data: Data, shard: int, count: int):
    """Of one shard: what is kept of the pictures, (count, H, W, 3) uint8; the whole pictures for the image encoder, uint8
    too; their styles, (count,) uint8; and their captions.

    The same for the same arguments, whatever else ran.
    """
    from ..shapeworld import as_uint8, caption, random_scene, render
    from ..shapeworld.world import STYLES

    rng = np.random.default_rng([data.seed, shard])
    side, captions = data.kept, []
    pictures, styles = np.empty((count, side, side, 3), np.uint8), np.empty(count, np.uint8)
    wholes = pictures if data.window is None else np.empty((count, VIEW, VIEW, 3), np.uint8)
    for start in range(0, count, data.windows):
        scene = random_scene(rng)
        rows = range(start, min(start + data.windows, count))
        styles[rows] = STYLES.index(scene.style)
        words = caption(scene, rng, "long" if rng.random() < data.long_share else "short")
        captions += [words] * len(rows)
        if data.window is None:
            pictures[start] = as_uint8(render(scene, data.resolution))
            continue
        wholes[rows] = as_uint8(render(scene, VIEW))
        for row in rows:
            left, top = FACTOR * rng.integers((data.resolution - side) // FACTOR + 1, size=2)
            pictures[row] = as_uint8(render(scene, data.resolution, (left, top, side, side)))
    return *(torch.from_numpy(array) for array in (pictures, wholes, styles)), captions


def write_shards(
    folder: str | Path, encoders, data: Data, batch: int = 256, worker: int = 0, workers: int = 1
) -> Iterator[tuple[int, int]]:
    """Render, caption and encode `data.pairs` pairs into `folder`; yields (pairs done, pairs in all) after each shard.

    Shards that are already there are kept, so an interrupted run continues; other settings are refused. Of several
    workers, each writes every `workers`-th shard.
    """
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
    count = data.pairs
    for shard in range(worker, math.ceil(count / SHARD), workers):
        start = shard * SHARD
        path = folder / f"pairs-{shard:05d}.safetensors"
        size = min(SHARD, count - start)
        if not path.is_file():
            pictures, wholes, styles, captions = shapeworld_pairs(data, shard, size)
            embedded = _embedded(encoders, wholes, [c.text for c in captions], batch)
            save_file(
                {"pictures": pictures, "styles": styles, **embedded},
                path.with_suffix(f".partial{worker}"),
            )
            os.replace(path.with_suffix(f".partial{worker}"), path)
        yield start + size, count


@torch.inference_mode()
def _embedded(encoders, pictures: Tensor, texts: list[str], batch: int) -> dict[str, Tensor]:
    parts: dict[str, list[Tensor]] = {}
    for start in range(0, len(texts), batch):
        text = encoders.encode_text(texts[start : start + batch])
        images = pictures[start : start + batch].permute(0, 3, 1, 2) / 127.5 - 1
        for name in TOKENS:
            tokens, mask = getattr(text, f"{name}_tokens"), getattr(text, f"{name}_mask")
            parts.setdefault(f"{name}_tokens", []).append(tokens[mask].half())
            parts.setdefault(f"{name}_lengths", []).append(mask.sum(1))
        parts.setdefault("clip_pooled", []).append(text.clip_pooled.half())
        parts.setdefault("image", []).append(encoders.encode_image(images).half())
    return {name: torch.cat(tensors).contiguous() for name, tensors in parts.items()}


@dataclass(frozen=True)
class Pairs:
    """All pairs of a folder in memory."""

    pictures: Tensor  # (n, H, W, 3) uint8
    tokens: dict[str, Tensor]  # per encoder: (tokens, E) float16, captions end to end
    starts: dict[str, Tensor]  # per encoder: (n + 1,) where each caption's tokens begin
    clip_pooled: Tensor  # (n, E)
    image: Tensor  # (n, E)
    styles: Tensor  # (n,) uint8: pictures with the same number look alike

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

    def draw(self, count: int, generator: torch.Generator, even_styles: bool = False) -> Tensor:
        """Random rows (count,), each as likely as any other; or each style as likely as any other, and its rows alike."""
        if not even_styles:
            return torch.randint(len(self), (count,), generator=generator)
        shares = 1 / torch.bincount(self.styles.long())[self.styles.long()]
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
                self.pictures[row, top : top + side, left : left + side]
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


def read_shards(folder: str | Path) -> Pairs:
    """Load all shards of a folder. Raises FileNotFoundError where there are none."""
    paths = sorted(Path(folder).glob("pairs-*.safetensors"))
    if not paths:
        raise FileNotFoundError(f"There are no training pairs in {folder}. Prepare them first: ediffi prepare RECIPE.")
    parts: dict[str, list[Tensor]] = {}
    for path in paths:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                parts.setdefault(name, []).append(file.get_tensor(name))
    whole = {name: torch.cat(tensors) for name, tensors in parts.items()}
    ends = {name: whole[f"{name}_lengths"].cumsum(0) for name in TOKENS}
    return Pairs(
        pictures=whole["pictures"],
        tokens={name: whole[f"{name}_tokens"] for name in TOKENS},
        starts={name: torch.cat([ends[name].new_zeros(1), ends[name]]) for name in TOKENS},
        clip_pooled=whole["clip_pooled"],
        image=whole["image"],
        styles=whole["styles"],
    )
