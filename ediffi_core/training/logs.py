"""What a training tells on its way: a line on the terminal, a log of losses, curves in TensorBoard, pictures."""

import json
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..checkpoint import KINDS, load_network
from ..conditioning import Conditioning
from ..ensemble import Ensemble
from ..intervals import complement
from ..pipeline import Settings, sample
from ..preconditioning import Denoiser
from .trainer import Progress, Trainer

SMOOTH = 0.02  # share of each step's loss in the smoothed one
COLUMNS = 4  # of a grid


class Journal:
    """Notes the progress of one node. Only the first of several processes writes; the others may call it all the same.

    every: steps between two lines of <node>.log.jsonl, and between two points of TensorBoard's curves.
    tensorboard: a folder; the curves of each node lie in <recipe>/<node> below it.
    """

    def __init__(self, trainer: Trainer, every: int = 50, tensorboard: Path | None = None) -> None:
        self.name, self.every, self.first = trainer.node.name, every, trainer.step
        self.started, self.smooth = time.monotonic(), None
        self.rows, self.lost = Counter(), Counter()  # by decade of sigma, since the last point
        self.log = self.board = None
        if trainer.engine.rank == 0:
            trainer.folder.mkdir(parents=True, exist_ok=True)
            if tensorboard is not None:
                self.board = _board(tensorboard / trainer.recipe.name / self.name, trainer.step)
            self.log = open(trainer.folder / f"{self.name}.log.jsonl", "a", encoding="utf-8")  # noqa: SIM115

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_) -> None:
        for one in (self.log, self.board):
            if one is not None:
                one.close()

    def note(self, progress: Progress) -> None:
        """Take in one step."""
        if self.log is None:
            return
        loss = progress.loss
        self.smooth = loss if self.smooth is None else self.smooth + SMOOTH * (loss - self.smooth)
        for decade, (rows, mean) in (progress.decades or {}).items():
            self.rows[decade] += rows
            self.lost[decade] += rows * mean
        spent = time.monotonic() - self.started
        left = spent / (progress.step - self.first) * (progress.steps - progress.step)
        line = f"{self.name} {progress.step}/{progress.steps} loss {self.smooth:.4f}, {left / 60:.0f} min left"
        due = progress.step % self.every == 0 or progress.step == progress.steps
        if sys.stdout.isatty():
            print(f"\r{line} ", end="\n" if progress.step == progress.steps else "", flush=True)
        elif due:
            print(line, flush=True)
        if due:
            values = {name: value for name, value in progress._asdict().items() if name != "decades"}
            print(json.dumps({**values, "smooth": self.smooth, "seconds": spent}), file=self.log, flush=True)
            self._draw(progress)

    def _draw(self, progress: Progress) -> None:
        if self.board is not None:
            for name in ("loss", "gradient_norm", "learning_rate"):
                if (value := getattr(progress, name)) is not None:
                    self.board.add_scalar(name, value, progress.step)
            self.board.add_scalar("loss/smooth", self.smooth, progress.step)
            for decade, rows in self.rows.items():
                self.board.add_scalar(
                    f"loss/sigma 1e{decade} to 1e{decade + 1}", self.lost[decade] / rows, progress.step
                )
        self.rows.clear()
        self.lost.clear()

    def say(self, line: str) -> None:
        """A line that stays on the terminal."""
        if self.log is not None:
            print(f"\n{line}" if sys.stdout.isatty() else line, flush=True)

    def picture(self, grid: np.ndarray, step: int) -> None:
        """Show (H, W, 3) uint8 in TensorBoard."""
        if self.board is not None:
            self.board.add_image("samples", grid, step, dataformats="HWC")


def _board(folder: Path, step: int):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError(
            "--tensorboard needs tensorboard, which is not installed. Install it: "
            'pip install "comfyui-ediffi[train]", or leave --tensorboard out.'
        ) from error
    # steps after the checkpoint that a killed run had drawn are drawn again: hide the old ones
    return SummaryWriter(str(folder), purge_step=step + 1)


class Samples:
    """Pictures of a few fixed captions by a node's averaged weights, as a grid. Only the base stage draws from noise.

    conditioning: of the captions; size: (H, W) of a picture; settings: how they are sampled.
    """

    def __init__(
        self, captions: Sequence[str], conditioning: Conditioning, settings: Settings, size: tuple[int, int]
    ) -> None:
        self.captions, self.conditioning, self.settings, self.size = captions, conditioning, settings, size

    def draw(self, trainer: Trainer) -> np.ndarray:
        """The grid, (H, W, 3) uint8, in the order of the captions, row by row; always of the same noise.

        At noise that is not the node's own, its parent denoises.
        """
        kind = torch.device(trainer.device).type
        with torch.autocast(kind, torch.bfloat16, enabled=trainer.low):
            conditioning = self.conditioning.to(trainer.device)
            *_, last = sample(_everywhere(trainer), conditioning, 0, self.settings, self.size)
        return grid(last.images())

    def write(self, trainer: Trainer) -> np.ndarray:
        """Draw into samples/<node>-<step>.png of the trainer's folder, captions.txt beside it. Returns the grid."""
        from PIL import Image

        folder = trainer.folder / "samples"
        folder.mkdir(parents=True, exist_ok=True)
        picture = self.draw(trainer)
        Image.fromarray(picture).save(folder / f"{trainer.node.name}-{trainer.step:06d}.png")
        (folder / "captions.txt").write_text("\n".join(self.captions) + "\n", encoding="utf-8")
        return picture


def _everywhere(trainer: Trainer):
    """A denoiser for all noise: the node's averaged weights in its intervals, its parent's elsewhere."""
    network = KINDS[trainer.recipe.stage].network(trainer.recipe.network, device="meta")
    network.load_state_dict(trainer.average, assign=True)
    own, intervals = Denoiser(network.eval().requires_grad_(False), trainer.denoiser.sigma_data), trainer.node.intervals
    rest = complement(intervals)
    if trainer.node.parent is None or not rest:
        return own
    path = trainer.folder / f"{trainer.node.parent}.safetensors"
    network, header = load_network(path, device=trainer.device, dtype=torch.float32)
    parents = Denoiser(network, header.sigma_data)
    pieces = [*((interval, own) for interval in intervals), *((interval, parents) for interval in rest)]
    return Ensemble(sorted(pieces, key=lambda piece: piece[0], reverse=True))


def grid(images: Tensor) -> np.ndarray:
    """images (B, 3, H, W) in [0, 1], `COLUMNS` in a row, as one picture (H', W', 3) uint8; what is left over is black."""
    count, _, height, width = images.shape
    columns = min(COLUMNS, count)
    rows = -(-count // columns)
    filled = torch.zeros(rows * columns, 3, height, width)
    filled[:count] = images.float().cpu()
    tiled = filled.view(rows, columns, 3, height, width).permute(0, 3, 1, 4, 2)
    return (tiled.reshape(rows * height, columns * width, 3) * 255).round().byte().numpy()
