"""Recipes: one TOML file says everything that decides the weights of an ensemble."""

import math
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

import torch
from torch import Tensor

from .. import efficient_unet, unet
from ..checkpoint import KINDS
from ..intervals import EVERYTHING, NoiseDistribution, NoiseInterval, complement
from ..super_resolution import FACTOR
from ..unet import NetworkConfig
from .degradation import Degradation

PRESETS = {**unet.PRESETS, **efficient_unet.PRESETS}
TREE = NoiseDistribution()  # the paper's tree of intervals, whatever noise a recipe trains on


@dataclass(frozen=True)
class Data:
    encoders: str  # folder of the frozen encoders
    pairs: int | None = None  # number of pictures that are rendered; None where there are shards
    seed: int = 0
    resolution: int = 64
    long_share: float = 0.5  # share of long captions
    references: str = "own"  # whose CLIP image embedding goes with a picture: its own, or another's of its "style"
    even_styles: bool = False  # each style as often as any other in the batches, however often it occurs
    window: int | None = None  # side of the square that is kept of each picture, somewhere in it; None: all is kept
    windows: int = 1  # pairs in a row that show one scene in different windows, under one caption
    crop: int | None = None  # side of the square that a step sees, somewhere in what is kept; None: all of it
    shards: str | None = (
        None  # tar files of one's own pictures and captions, as webdataset names them; None: rendered ones
    )
    least_side: int | None = None  # pixels of the shorter side below which a picture is left out; None: the resolution
    least_clip_score: float | None = None  # cosine of caption and picture below which a pair is left out
    least_aesthetic_score: float | None = None  # what the head below gives a picture that stays, or more
    aesthetic_head: str | None = None  # safetensors file; scores a picture by its CLIP embedding

    def __post_init__(self) -> None:
        if self.shards is None:
            self._check_rendered()
        else:
            self._check_shards()
        if self.references not in ("own", "style"):
            raise ValueError(f'references is "own" or "style", got {self.references!r}')
        if self.windows < 1 or (self.windows > 1 and self.window is None):
            raise ValueError(f"windows is 1, or more where window says how large they are, got {self.windows}")
        for name, within in (("window", self.resolution), ("crop", self.kept)):
            side = getattr(self, name)
            if side is not None and (side % FACTOR or not 0 < side <= within):
                raise ValueError(f"{name} is a multiple of {FACTOR} from {FACTOR} to {within} pixels, got {side}")

    def _check_rendered(self) -> None:
        if self.pairs is None:
            raise ValueError("[data] needs pairs, the number of pictures to render, or shards, tar files of your own")
        for name in ("least_side", "least_clip_score", "least_aesthetic_score", "aesthetic_head"):
            if getattr(self, name) is not None:
                raise ValueError(f"{name} chooses among the pictures of shards, and this recipe renders its own")

    def _check_shards(self) -> None:
        if self.pairs is not None or self.windows != 1:
            raise ValueError(
                "pairs and windows are for rendered pictures: leave them out, the shards say how many there are"
            )
        if self.references != "own" or self.even_styles:
            raise ValueError(
                'pictures from shards have no styles that are known: choose references = "own" and leave even_styles out'
            )
        if self.least_side is not None and self.least_side < self.resolution:
            raise ValueError(
                f"least_side is at least the resolution of {self.resolution} pixels, below which none is taken, "
                f"got {self.least_side}"
            )
        if self.least_clip_score is not None and not -1 <= self.least_clip_score <= 1:
            raise ValueError(f"least_clip_score is a cosine, from -1 to 1, got {self.least_clip_score!r}")
        if self.least_aesthetic_score is not None and self.aesthetic_head is None:
            raise ValueError("least_aesthetic_score needs aesthetic_head, the safetensors file that scores")

    @property
    def kept(self) -> int:
        """Side of the stored pictures."""
        return self.resolution if self.window is None else self.window

    @property
    def prepared(self) -> "Data":
        """Only what decides the stored pairs; the rest is for training and may change after them."""
        return replace(self, references="own", even_styles=False, crop=None)


@dataclass(frozen=True)
class Augmentation:
    """Noise on the low-res image, of a sigma that the network is told (Imagen, Saharia et al. 2022; not in eDiff-I's text)."""

    clean: float = 0.5  # share of the rows that get none
    maximum: float = 0.3  # sigma of the others, even from 0 to this

    def __post_init__(self) -> None:
        if not 0 <= self.clean <= 1 or not self.maximum >= 0:
            raise ValueError(
                f"augmentation needs a share clean from 0 to 1 and a maximum of 0 or more, got {self.clean!r} and "
                f"{self.maximum!r}"
            )

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """Sigmas, (count,)."""
        noised = torch.rand(count, generator=generator) >= self.clean
        return noised * self.maximum * torch.rand(count, generator=generator)


@dataclass(frozen=True)
class Optimizer:
    """AdamW (eDiff-I, Sec. 5: learning rate 1e-4, weight decay 0.01, batch 2048)."""

    name: str = "adamw"  # or "muon": for the matrices inside the network, and AdamW for the rest
    learning_rate: float = 1e-4
    weight_decay: float = 0.01
    beta_1: float = 0.9
    beta_2: float = 0.999
    warmup: int = 0  # steps from 0 to the full learning rate
    final: float = 1.0  # share of the learning rate that the cosine decay leaves at the last step; 1 keeps it constant
    precision: str = "float32"  # of the network's products; "bfloat16" is several times faster where hardware has it
    clip: float = 1.0  # largest gradient norm
    ema: float = 0.9999  # decay of the averaged weights

    def __post_init__(self) -> None:
        if self.name not in ("adamw", "muon"):
            raise ValueError(f"the optimizer's name is adamw or muon, got {self.name!r}")
        if self.precision not in ("float32", "bfloat16"):
            raise ValueError(f"precision is float32 or bfloat16, got {self.precision!r}")


@dataclass(frozen=True)
class Dropout:
    """How often each embedding is dropped, independently (eDiff-I, Sec. 4.2; the rates are not in its text)."""

    clip: float = 0.2
    pooled: float = 0.0  # the pooled CLIP text alone, tokens kept: what appears where is then only in the tokens; ours
    t5: float = 0.25
    image: float = 0.9


@dataclass(frozen=True)
class Node:
    """One network of the branching tree: what it is trained on, from whose weights it starts, and for how long."""

    name: str
    steps: int
    batch: int
    parent: str | None = None
    owns: tuple[tuple[int, int], ...] = ()  # (depth, index) intervals of the tree; none means everything
    excludes: tuple[tuple[int, int], ...] = ()  # intervals taken away instead, the paper's minus sign
    expert: bool = False  # part of the finished ensemble?
    learning_rate: float | None = None  # None: the recipe's
    noise_mean: float | None = None  # of ln sigma; None: the recipe's
    noise_std: float | None = None
    drop_image: float | None = None  # how often the image embedding is dropped; None: as the recipe's dropout says
    unnamed_styles: float | None = None  # share of the pictures whose captions leave the style to the reference; ours
    whiten: bool = False  # train projections of embeddings as if all directions were equally loud; ours
    grounding: float = 0.0  # weight of `grounding_loss`; ours, needs pictures whose objects are known
    seed: int = 0

    def __post_init__(self) -> None:
        if self.unnamed_styles is not None and not 0 <= self.unnamed_styles <= 1:
            raise ValueError(f"unnamed_styles of {self.name} is a share from 0 to 1, got {self.unnamed_styles}")

    @property
    def intervals(self) -> tuple[NoiseInterval, ...]:
        if self.owns:
            return tuple(TREE.interval(depth, index) for depth, index in self.owns)
        if self.excludes:
            return complement([TREE.interval(depth, index) for depth, index in self.excludes])
        return (EVERYTHING,)

    @property
    def interval(self) -> NoiseInterval:
        """From the lowest sigma of its `intervals` to the highest: where an expert works."""
        return NoiseInterval(self.intervals[0].low, self.intervals[-1].high)


@dataclass(frozen=True)
class Recipe:
    name: str
    network: NetworkConfig
    data: Data
    nodes: tuple[Node, ...]
    noise: NoiseDistribution = field(default_factory=NoiseDistribution)
    optimizer: Optimizer = field(default_factory=Optimizer)
    dropout: Dropout = field(default_factory=Dropout)
    sampler: dict[str, Any] = field(default_factory=dict)  # recommended settings, written into ensemble.json
    seed: int = 0
    stage: str = "base"
    degradation: Degradation = field(default_factory=Degradation)  # of the low-res image of super-resolution stages
    augmentation: Augmentation = field(default_factory=Augmentation)

    def __post_init__(self) -> None:
        side = self.data.kept if self.data.crop is None else self.data.crop
        if self.stage != "base" and side % FACTOR:
            raise ValueError(f"pictures of {side} pixels have no low-res image: choose a multiple of {FACTOR}")

    def node(self, name: str) -> Node:
        for node in self.nodes:
            if node.name == name:
                return node
        known = ", ".join(node.name for node in self.nodes)
        raise ValueError(f"The recipe {self.name} has no node {name!r}. Its nodes are {known}.")


def read_toml(path: Path) -> dict[str, Any]:
    """The entries of a recipe, of whatever kind. Raises FileNotFoundError, or ValueError for a file that is no TOML."""
    if not path.is_file():
        raise FileNotFoundError(f"There is no recipe {path}. Recipes are TOML files; see the folder recipes/.")
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # no TOML, no UTF-8, numbers of thousands of digits
        raise ValueError(f"{path.name} is not valid TOML: {error}.") from error


def section(kind: type, values: Any, name: str, /, **more: Any) -> Any:
    """A table of a recipe as a `kind`, lists as tuples. Raises ValueError naming an entry of another type than its field."""
    if not isinstance(values, dict):
        raise ValueError(f"{name} is a table, got {_shown(values)}")
    hints, built = get_type_hints(kind), {}
    for key, value in values.items():
        value = _tuples(value)
        if key in hints and not _fits(value, hints[key]):
            raise ValueError(f"{key} of {name} cannot be {_shown(value)}")
        built[key] = value
    return kind(**built, **more)


def tables(values: Any, name: str) -> list:
    if not isinstance(values, list) or not values:
        raise ValueError(f"{name} are a list of tables, [[{name}]], got {_shown(values)}")
    return values


def check_names(nodes: Iterable[Any]) -> None:
    """Raise ValueError where a node cannot name its own file."""
    for node in nodes:
        if node.name in ("", ".", "..") or len(node.name) > 100 or re.search(r"[/\\:\0]", node.name):
            raise ValueError(f"a node's name becomes that of its file, without a folder; got {_shown(node.name)}")


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _fits(value: Any, hint: Any) -> bool:
    """Is a value of TOML what the annotation of a field asks for? NaN is no number of ours."""
    if get_origin(hint) is UnionType:
        return any(_fits(value, one) for one in get_args(hint))
    if get_origin(hint) is tuple:
        kinds = get_args(hint)
        kinds = [kinds[0]] * len(value) if isinstance(value, tuple) and kinds[-1] is ... else kinds
        return isinstance(value, tuple) and len(value) == len(kinds) and all(map(_fits, value, kinds))
    if hint is float and isinstance(value, float):
        return not math.isnan(value)
    if hint in (int, float):
        return type(value) is int and abs(value) < 2**63
    if hint in (bool, str):
        return isinstance(value, hint)
    return value is None if hint is type(None) else isinstance(value, dict)  # a table, which its own kind checks


def _shown(value: Any) -> str:
    return repr(value)[:80]


def read_recipe(path: str | Path) -> Recipe:
    """Read a TOML recipe. Raises FileNotFoundError, or ValueError naming the entry that is not understood."""
    path = Path(path)
    values = read_toml(path)
    try:
        stage = values.get("stage", "base")
        if not isinstance(stage, str) or stage not in KINDS:
            raise ValueError(f"stage is one of {', '.join(KINDS)}, got {_shown(stage)}")
        network = values.pop("network")
        if not isinstance(network, dict):
            raise ValueError(f"network is a table, got {_shown(network)}")
        preset = network.pop("preset", None)
        if preset is not None and (not isinstance(preset, str) or preset not in PRESETS):
            raise ValueError(f"preset is one of {', '.join(PRESETS)}, got {_shown(preset)}")
        network = {**(PRESETS[preset].as_dict() if preset else {}), **network}
        known = {one.name for one in fields(Recipe)}
        sections = {
            "data": Data,
            "noise": NoiseDistribution,
            "optimizer": Optimizer,
            "dropout": Dropout,
            "degradation": Degradation,
            "augmentation": Augmentation,
        }
        built = {name: section(kind, values.pop(name), name) for name, kind in sections.items() if name in values}
        nodes = tuple(section(Node, node, "a node") for node in tables(values.pop("nodes"), "nodes"))
        check_names(nodes)
        unknown = set(values) - known
        if unknown:
            raise ValueError(f"unknown entry {sorted(unknown)[0]!r}")
        more = dict(name=path.stem, network=KINDS[stage].config(**network), nodes=nodes, **built)
        recipe = section(Recipe, values, "the recipe", **more)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{path.name} is not a usable recipe: {error}.") from error
    seen: set[str] = set()
    for node in recipe.nodes:
        if node.parent is not None and node.parent not in seen:
            raise ValueError(
                f"{path.name}: node {node.name!r} starts from {node.parent!r}, which does not come before it."
            )
        seen.add(node.name)
    return recipe
