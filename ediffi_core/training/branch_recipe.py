"""Recipes of `branching`: the model that is branched, its tree of experts, and the noise levels it knows."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from ..intervals import NoiseInterval, check_partition, check_place, complement
from .recipe import Optimizer, check_names, read_toml, section, tables

MOST = 6  # experts that eDiff-I Expert Ensemble joins
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")

# what a checkpoint in one file does not say about its U-Net (Rombach et al. 2022; Podell et al. 2023, Table 1)
FAMILIES = {
    "sd15": dict(
        sample_size=64, layers_per_block=2, block_out_channels=[320, 640, 1280, 1280], cross_attention_dim=768, attention_head_dim=8,
        down_block_types=["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        up_block_types=["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    ),
    "sdxl": dict(
        sample_size=128, layers_per_block=2, block_out_channels=[320, 640, 1280], cross_attention_dim=2048,
        attention_head_dim=[5, 10, 20], down_block_types=["DownBlock2D"] + ["CrossAttnDownBlock2D"] * 2,
        up_block_types=["CrossAttnUpBlock2D"] * 2 + ["UpBlock2D"], transformer_layers_per_block=[1, 2, 10],
        use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Levels:
    """The noise levels a network was trained on, each as often as any other.

    alphas: (T,) float64, falling; level t makes sqrt(a_t) latent + sqrt(1 - a_t) noise.
    """

    alphas: Tensor

    def __len__(self) -> int:
        return len(self.alphas)

    @cached_property
    def sigmas(self) -> Tensor:
        """(T,) float64, rising."""
        kept = self.alphas.clamp(min=2**-24)  # a schedule that ends in pure noise has an infinite sigma there
        return ((1 - kept) / kept).sqrt()

    def interval(self, depth: int, index: int) -> NoiseInterval:
        """The interval of expert E^depth_index: one of 2^depth that hold equally many levels, index 0 at the lowest noise."""
        check_place(depth, index)
        first, end = (round(len(self) * part / 2**depth) for part in (index, index + 1))
        if first == end:
            raise ValueError(
                f"The interval (depth {depth}, index {index}) holds none of the network's {len(self)} levels. "
                f"Choose a smaller depth."
            )
        return NoiseInterval(self._edge(first), self._edge(end))

    def _edge(self, level: int) -> float:
        """Between `level` and the one below.

        Halfway in ln sigma, where ComfyUI's rounding of a sigma to a level turns over: an expert then hears of no level
        but those it was trained on.
        """
        if level == 0:
            return 0.0
        if level == len(self):
            return math.inf
        return float(f"{math.sqrt(self.sigmas[level - 1] * self.sigmas[level]):.6g}")

    def within(self, intervals: Sequence[NoiseInterval]) -> Tensor:
        """The levels whose sigma lies in one of `intervals`, rising, (n,) int64. Raises ValueError if there are none."""
        inside = torch.zeros(len(self), dtype=torch.bool)
        for interval in intervals:
            inside |= (self.sigmas >= interval.low) & (self.sigmas < interval.high)
        if not inside.any():
            raise ValueError(
                f"None of the network's noise levels, sigma {self.sigmas[0]:.4g} to {self.sigmas[-1]:.4g}, lies in "
                f"{', '.join(map(str, intervals))}. Move the edges."
            )
        return inside.nonzero()[:, 0]


@dataclass(frozen=True)
class Source:
    """The network that is branched."""

    path: str  # a folder in diffusers' layout, or a checkpoint in one .safetensors file
    family: str | None = None  # of a checkpoint in one file
    prediction: str | None = None  # None: what the folder's scheduler says; "epsilon" for one file
    checkpoint: str | None = None  # what ComfyUI calls it, in models/checkpoints; None: the file's name

    def __post_init__(self) -> None:
        if self.prediction not in (None, "epsilon", "v_prediction", "sample"):
            raise ValueError(f'prediction is "epsilon", "v_prediction" or "sample", got {self.prediction!r}')
        if self.is_file and self.family not in FAMILIES:
            raise ValueError(
                f"a checkpoint in one file needs a family, {' or '.join(FAMILIES)}, got {self.family!r}; for another "
                f"architecture give a folder in diffusers' layout"
            )

    @property
    def is_file(self) -> bool:
        return self.path.endswith(".safetensors")

    @property
    def name(self) -> str:
        return self.checkpoint or (Path(self.path).name if self.is_file else f"{Path(self.path).name}.safetensors")


@dataclass(frozen=True)
class Captioned:
    """Latents and the embeddings of their captions: given, or to be made of pictures."""

    pairs: str | None = None  # a .safetensors file or a folder of them
    pictures: str | None = None  # a folder of pictures, a caption x.txt beside each x.png
    encoders: str | None = None  # a folder in diffusers' layout; None: the model's own
    resolution: int = 512
    held_out: int = 0  # so many of the last pairs are kept from training, and the experts are compared on them
    dropout: float = 0.1  # share of the captions that are left out, for guidance

    def __post_init__(self) -> None:
        if (self.pairs is None) == (self.pictures is None):
            raise ValueError("data needs either pairs or pictures")
        if self.resolution % 64 or self.resolution <= 0:
            raise ValueError(f"resolution is a multiple of 64, got {self.resolution}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is from 0 to below 1, got {self.dropout}")


@dataclass(frozen=True)
class Lora:
    """Low-rank updates of some layers in place of new weights (Hu et al. 2021)."""

    rank: int = 16
    alpha: float = 16.0  # the update is scaled by alpha / rank
    layers: tuple[str, ...] = ATTENTION  # ends of the names that diffusers gives them


@dataclass(frozen=True)
class BranchNode:
    """One network of the tree. Its part of the noise is said by `owns`, by `excludes`, or by `low` and `high` in sigma."""

    name: str
    steps: int
    batch: int
    parent: str | None = None  # None: the network that is branched
    owns: tuple[tuple[int, int], ...] = ()  # (depth, index) intervals of the network's own tree
    excludes: tuple[tuple[int, int], ...] = ()  # intervals taken away instead, the paper's minus sign
    low: float | None = None
    high: float | None = None
    expert: bool = True  # part of the ensemble, or only a parent?
    learning_rate: float | None = None  # None: the recipe's
    seed: int = 0

    def __post_init__(self) -> None:
        if sum((bool(self.owns), bool(self.excludes), self.low is not None or self.high is not None)) > 1:
            raise ValueError(
                f"node {self.name!r} has its part of the noise said twice; keep owns, excludes, or low and high"
            )

    def intervals(self, levels: Levels) -> tuple[NoiseInterval, ...]:
        if self.owns:
            return tuple(levels.interval(depth, index) for depth, index in self.owns)
        if self.excludes:
            return complement([levels.interval(depth, index) for depth, index in self.excludes])
        return (NoiseInterval(self.low or 0.0, math.inf if self.high is None else self.high),)

    def interval(self, levels: Levels) -> NoiseInterval:
        """All its intervals as one. Raises ValueError where they do not touch."""
        parts = sorted(self.intervals(levels))
        for below, above in pairwise(parts):
            if below.high != above.low:
                raise ValueError(
                    f"The expert {self.name!r} would have two parts of the noise, {below} and {above}, with another expert "
                    f"between them. Make two experts of it, or set expert = false."
                )
        return NoiseInterval(parts[0].low, parts[-1].high)


@dataclass(frozen=True)
class BranchRecipe:
    name: str
    model: Source
    data: Captioned
    nodes: tuple[BranchNode, ...]
    lora: Lora | None = None  # None: all weights are trained
    optimizer: Optimizer = field(default_factory=lambda: Optimizer(ema=0.0))
    checkpointing: bool = False  # compute activations twice, in less memory
    seed: int = 0

    def node(self, name: str) -> BranchNode:
        for node in self.nodes:
            if node.name == name:
                return node
        known = ", ".join(node.name for node in self.nodes)
        raise ValueError(f"The recipe {self.name} has no node {name!r}. Its nodes are {known}.")


def read_branch_recipe(path: str | Path) -> BranchRecipe:
    """Read a TOML recipe. Raises FileNotFoundError, or ValueError naming the entry that is not understood."""
    path = Path(path)
    values = read_toml(path)
    try:
        model, data = section(Source, values.pop("model"), "model"), section(Captioned, values.pop("data"), "data")
        lora = section(Lora, values.pop("lora"), "lora") if "lora" in values else None
        optimizer = values.pop("optimizer", {})
        optimizer = section(
            Optimizer, {"ema": 0.0, **optimizer} if isinstance(optimizer, dict) else optimizer, "optimizer"
        )
        if optimizer.name != "adamw":
            raise ValueError(f"branching knows the optimizer adamw only, got {optimizer.name!r}")
        nodes = tuple(section(BranchNode, node, "a node") for node in tables(values.pop("nodes"), "nodes"))
        check_names(nodes)
        more = dict(name=path.stem, model=model, data=data, nodes=nodes, lora=lora, optimizer=optimizer)
        recipe = section(BranchRecipe, values, "the recipe", **more)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{path.name} is not a usable recipe: {error}.") from error
    seen: set[str] = set()
    for node in recipe.nodes:
        if node.parent is not None and node.parent not in seen:
            raise ValueError(
                f"{path.name}: node {node.name!r} starts from {node.parent!r}, which does not come before it."
            )
        if node.name in seen:
            raise ValueError(f"{path.name}: two nodes are called {node.name!r}. Rename one.")
        seen.add(node.name)
    return recipe


def experts_of(recipe: BranchRecipe, levels: Levels) -> list[tuple[NoiseInterval, BranchNode | None]]:
    """What denoises where, from high to low noise. None: the network that is branched, where no expert was asked for.

    Raises ValueError where experts overlap, or there are more than eDiff-I Expert Ensemble joins.
    """
    owned = [(node.interval(levels), node) for node in recipe.nodes if node.expert]
    if not owned:
        raise ValueError(
            f"The recipe {recipe.name} has no expert. Set expert = true on the nodes that the ensemble is made of."
        )
    rest = [(interval, None) for interval in complement([interval for interval, _ in owned])]
    experts = sorted([*owned, *rest], key=lambda expert: expert[0], reverse=True)
    check_partition([interval for interval, _ in experts])
    if len(experts) > MOST:
        raise ValueError(
            f"The recipe {recipe.name} makes an ensemble of {len(experts)}, and ComfyUI's node joins {MOST} at most."
        )
    return experts
