"""Filters of training pairs: does the caption fit the picture, and is the picture pleasant? (eDiff-I, Sec. 5)

The paper filters its pairs by CLIP score and by an aesthetic score and does not say where it draws the lines. Both scores
come from embeddings that a pair is stored with anyway. Thresholds are the least that stays.
"""

import math
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .recipe import Data

BINS = {"clip": 0.01, "aesthetic": 0.1}  # width of a histogram's bars
ACTIVATIONS = {"none": lambda x: x, "relu": F.relu, "gelu": F.gelu}


def clip_scores(clip_pooled: Tensor, image: Tensor) -> Tensor:
    """Cosine of the projected text (B, E) and image (B, E) embeddings of CLIP, (B,) float32 from -1 to 1.

    Raises ValueError where text and pictures are not projected to a common width.
    """
    if clip_pooled.shape[1] != image.shape[1]:
        raise ValueError(
            f"A CLIP score needs texts and pictures in one space, these encoders make {clip_pooled.shape[1]} and "
            f"{image.shape[1]} numbers of them. Use a CLIP whose two projections have the same width."
        )
    return F.cosine_similarity(clip_pooled.float(), image.float())


@dataclass(frozen=True)
class AestheticHead:
    """Scores a CLIP image embedding, brought to length 1, by one linear layer or several."""

    layers: tuple[tuple[Tensor, Tensor], ...]  # weight (out, in) and bias (out,) of each; the last has out = 1
    activation: str = "none"  # between layers

    def __call__(self, image: Tensor) -> Tensor:
        """image: (B, E) as the encoders return it. Returns scores, (B,) float32."""
        x = F.normalize(image.float())
        for number, (weight, bias) in enumerate(self.layers):
            if number:
                x = ACTIVATIONS[self.activation](x)
            x = F.linear(x, weight, bias)
        return x[:, 0]


def load_aesthetic_head(path: str | Path, width: int) -> AestheticHead:
    """A head for image embeddings of `width` numbers, from a safetensors file.

    The file holds pairs named `weight` (out, in) and `bias` (out,), with anything before that; numbers in the names say the
    order. Its metadata may name an `activation`: none (the default), relu or gelu. Raises FileNotFoundError or ValueError.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"There is no aesthetic head {path}. The path counts from where the command is started."
        )
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118 - not a dict
            activation = (file.metadata() or {}).get("activation", "none")
    except SafetensorError as error:
        raise ValueError(
            f"{path} is not a safetensors file ({error}). A head in PyTorch's own format (.pth, .pt) can run code when it is "
            f"read, so none is: convert it first, as docs/data.md says."
        ) from error
    if activation not in ACTIVATIONS:
        raise ValueError(f"{path} asks for the activation {activation!r}. Known are {', '.join(ACTIVATIONS)}.")
    names = sorted((name.removesuffix("weight") for name in tensors if name.endswith("weight")), key=_in_order)
    if {name + of for name in names for of in ("weight", "bias")} != set(tensors) or not names:
        raise ValueError(f"{path} holds {', '.join(sorted(tensors))}, where pairs of weight and bias are expected.")
    layers = tuple((tensors[name + "weight"], tensors[name + "bias"]) for name in names)
    shapes = [tuple(weight.shape) for weight, _ in layers]
    ins, outs = [shape[-1] for shape in shapes], [shape[0] for shape in shapes]
    fits = all(len(shape) == 2 and bias.shape == shape[:1] for shape, (_, bias) in zip(shapes, layers, strict=True))
    if not fits or ins != [width, *outs[:-1]] or outs[-1] != 1:
        raise ValueError(
            f"{path} holds layers of the shapes {shapes}, (out, in), where the first must take the {width} numbers of these "
            f"encoders' image embeddings, each other what the one before gives, and the last give 1. Use a head that was "
            f"trained on the recipe's CLIP."
        )
    return AestheticHead(layers, activation)


def _in_order(name: str) -> list[int | str]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def verdicts(data: Data, scores: dict[str, Tensor]) -> list[str | None]:
    """For each pair the reason to leave it out, or None. scores: `clip` and, with a head, `aesthetic`, each (B,)."""
    least = {"clip": data.least_clip_score, "aesthetic": data.least_aesthetic_score}
    reasons: list[str | None] = [None] * len(scores["clip"])
    for name, of in scores.items():
        for row, score in enumerate(of.tolist()):
            if not math.isfinite(score):
                reasons[row] = reasons[row] or "embedding is no number"
            elif least[name] is not None and score < least[name]:
                reasons[row] = reasons[row] or f"below least_{name}_score"
    return reasons


def counted(name: str, scores: Tensor) -> Counter[str]:
    """How many scores begin each bar: by its lower end, written out, so that counts of several runs add up."""
    width = BINS[name]
    finite = scores[scores.isfinite()].double()
    return Counter(f"{math.floor(round(score / width, 4)) * width:.2f}" for score in finite.tolist())


def plot_scores(path: str | Path, counts: dict[str, Counter[str]], data: Data) -> None:
    """Histograms as a PNG, one beside the other, with the recipe's thresholds. counts: of each score, as `counted` counts."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError('Plots need matplotlib. Install it: pip install "comfyui-ediffi[eval]".') from error
    if not counts:
        raise ValueError("There are no scores to draw: no pair came as far as the encoders. The report says why.")
    titles = {"clip": "CLIP score (cosine of caption and picture)", "aesthetic": "aesthetic score"}
    least = {"clip": data.least_clip_score, "aesthetic": data.least_aesthetic_score}
    figure = Figure(figsize=(6 * len(counts), 3.5), layout="constrained")
    for axes, (name, of) in zip(figure.subplots(1, len(counts), squeeze=False)[0], counts.items(), strict=True):
        axes.bar([float(edge) for edge in of], list(of.values()), BINS[name], align="edge", color="tab:blue")
        axes.set(xlabel=titles[name], ylabel="pairs")
        if least[name] is not None:
            axes.axvline(least[name], color="tab:red", label=f"left out below {least[name]:g}")
            axes.legend()
    figure.savefig(path, dpi=120)
