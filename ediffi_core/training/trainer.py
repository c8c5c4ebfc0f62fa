"""The trainer: one node of a recipe, from its parent's weights to a finished expert.

All randomness of step n comes from (seed, n), so a run that was stopped anywhere continues to the same weights as one
that was not. Several processes draw the same batch and take a slice each, so their number changes rounding alone. State
lives in safetensors and JSON, written whole or not at all.
"""

import gc
import json
import math
import multiprocessing
import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset

from ..attention import Attend, attend, attend_by_products
from ..checkpoint import (
    KINDS,
    NetworkHeader,
    check_finite,
    read_ensemble,
    read_header,
    read_weights,
    save_network,
    write_ensemble,
)
from ..conditioning import Conditioning
from ..preconditioning import SIGMA_DATA, Denoiser, loss_weight
from ..super_resolution import FACTOR, upsampled
from .degradation import degraded
from .grounding import Objects, Watched, grounding_loss
from .optimizers import Muon, WhitenedAdamW, matrices
from .pairs import Pairs
from .recipe import Node, Recipe
from .whitening import whiten, whiteners

POOL = 8  # batches that are drawn together
DECADES = range(-3, 3)  # of sigma: d is [10^d, 10^(d+1)); the outermost hold what is beyond them too


class Progress(NamedTuple):
    step: int  # steps done
    steps: int
    loss: float  # the denoising loss of this step's batch; 1 is what an untrained network scores
    gradient_norm: float  # before it is clipped
    learning_rate: float | None = None
    decades: dict[int, tuple[int, float]] | None = (
        None  # of sigma: how many rows the batch has in each, their mean loss
    )


def denoising_loss(*batch, **options) -> Tensor:
    """E lambda(sigma) |D(image + sigma noise; c, sigma) - image|^2, mean over all pixels (eDiff-I, Sec. 3).

    Takes what `weighted_errors` takes.
    """
    return weighted_errors(*batch, **options).mean()


def weighted_errors(
    denoiser: Denoiser,
    images: Tensor,
    conditioning: Conditioning,
    sigma: Tensor,
    noise: Tensor,
    attend: Attend = attend,
    deviation: Tensor | None = None,
) -> Tensor:
    """What `denoising_loss` is the mean of, (B, 3, H, W).

    deviation: (B, 1, 1, 1), takes sigma_data's place in lambda for a network that works around its low-res image.
    """
    level = sigma[:, None, None, None]
    denoised = denoiser(images + level * noise, sigma, conditioning, attend)
    weight = loss_weight(level, denoiser.sigma_data if deviation is None else deviation)
    return weight * (denoised - images) ** 2


class Batch(NamedTuple):
    images: Tensor  # (B, 3, H, W)
    conditioning: Conditioning
    sigma: Tensor  # (B,)
    noise: Tensor  # (B, 3, H, W), of deviation 1
    objects: Objects | None  # where grounding asks for them


class Objective(nn.Module):
    """What a batch is trained on, (), and the denoising loss of each of its rows, (B,), as one call: where processes share
    gradients, they do so around it.

    around: does the network work around its low-res image? grounding: the weight of `grounding_loss`.
    """

    def __init__(self, denoiser: Denoiser, around: bool = False, grounding: float = 0.0) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.around = around
        self.grounding = grounding

    def forward(self, batch: Batch, attend: Attend = attend) -> tuple[Tensor, Tensor]:
        images, conditioning, sigma, noise, objects = batch
        watched = Watched() if self.grounding else attend
        deviation = self.denoiser.network.deviation(conditioning) if self.around else None
        errors = weighted_errors(self.denoiser, images, conditioning, sigma, noise, watched, deviation)
        loss = errors.mean()
        if self.grounding:
            loss = loss + self.grounding * grounding_loss(watched.kept, objects, conditioning)
        return loss, errors.detach().flatten(1).mean(1)


class Engine:
    """One process on one device: what `ediffi train` is by itself."""

    processes, rank = 1, 0
    precision = "float32"  # that products have at most; a recipe may ask for less

    def __init__(self, device: str = "cpu") -> None:
        self.device = device

    def prepare(self, module: nn.Module) -> nn.Module:
        """The module whose backward pass leaves the mean gradient of all processes in each."""
        return module

    def apart(self, module: nn.Module) -> AbstractContextManager:
        """Within it, gradients of a prepared module stay in their process and add up."""
        return nullcontext()

    def mean(self, values: Tensor) -> Tensor:
        """The mean over all processes, in each. All wait here for the last."""
        return values

    def close(self) -> None:
        """Let the other processes go."""


class Accelerated(Engine):
    """As many processes, and the precision, as `accelerate launch` or `torchrun` say; gradients are averaged by DDP.

    Raises ValueError where accelerate is not installed, or is configured for what this training does not do.
    """

    def __init__(self, device: str | None = None) -> None:
        try:
            from accelerate import Accelerator
        except ImportError as error:
            raise ValueError(
                "Training in several processes needs accelerate, which is not installed. Install it: "
                'pip install "comfyui-ediffi[train]".'
            ) from error
        none = not getattr(torch, "accelerator", torch.cuda).is_available()
        self.accelerator = Accelerator(cpu=none or device == "cpu")
        device_of = self.accelerator.device
        self.device = "cpu" if device_of.type == "cpu" else str(device_of)  # safetensors knows no cpu:0
        self.rank = self.accelerator.process_index
        self.processes = self.accelerator.num_processes
        kind, mixed = self.accelerator.distributed_type.value, self.accelerator.mixed_precision
        if kind in ("FSDP", "DEEPSPEED", "MEGATRON_LM", "XLA"):
            raise ValueError(
                f"accelerate is configured for {kind}, which divides the weights among processes. This training keeps whole "
                f"weights in each: choose MULTI_GPU, or MULTI_CPU, in `accelerate config`."
            )
        if mixed not in ("no", "bf16"):
            raise ValueError(f"accelerate's mixed precision is no or bf16 here, got {mixed}. Change it in the launch.")
        if self.processes != int(os.environ.get("WORLD_SIZE", 1)):
            raise ValueError(
                f"{os.environ['WORLD_SIZE']} processes were started, but accelerate sees {self.processes}. Say which device "
                f"they are for: --device cpu, or what `accelerate config` asks."
            )
        if device is not None and torch.device(device).type != device_of.type:
            raise ValueError(f"--device is {device}, but the launch works on {self.device}. Leave --device out.")
        self.precision = "bfloat16" if mixed == "bf16" else "float32"

    def prepare(self, module: nn.Module) -> nn.Module:
        self.accelerator.free_memory()  # of the node before
        return self.accelerator.prepare(module)

    def apart(self, module: nn.Module) -> AbstractContextManager:
        return self.accelerator.no_sync(module)

    def mean(self, values: Tensor) -> Tensor:
        return self.accelerator.reduce(values.to(self.device), reduction="mean")

    def close(self) -> None:
        # A process that ends while threads of the group still hold tensors of its last reduction is aborted: so first all
        # wait for each other, and nothing keeps the group.
        self.accelerator.free_memory()
        gc.collect()
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()


def engine_of(device: str | None = None) -> Engine:
    """The engine that the way this process was started asks for."""
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ or int(os.environ.get("WORLD_SIZE", 1)) > 1
    return Accelerated(device) if launched else Engine(device or "cpu")


def low_res_of(images: Tensor, recipe: Recipe, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """What a super-resolution stage is given to make `images` (B, 3, H, W) of: low_res (B, 3, H, W), and its
    augmentation_sigma (B,).

    Averaged by 4, degraded, enlarged again, then noised.
    """
    low_res = degraded(F.avg_pool2d(images, FACTOR), recipe.data.resolution // FACTOR, generator, recipe.degradation)
    sigma = recipe.augmentation.sample(len(images), generator)
    noise = torch.randn(images.shape, generator=generator)
    return upsampled(low_res, images.shape[2:]) + sigma[:, None, None, None] * noise, sigma


def learning_rate_share(step: int, steps: int, warmup: int, final: float) -> float:
    """The share of the full learning rate at `step`: linear warm-up, then cosine decay to `final`."""
    rise = min(1.0, (step + 1) / warmup) if warmup else 1.0
    fall = final + (1 - final) * (1 + math.cos(math.pi * step / steps)) / 2
    return rise * fall


class Draw:
    """The batches of a node, each from its number alone, the same in every process."""

    def __init__(self, recipe: Recipe, node: Node, pairs: Pairs) -> None:
        self.recipe, self.node, self.pairs = recipe, node, pairs
        self.noise = _overridden(recipe.noise, mean=node.noise_mean, std=node.noise_std)
        self.dropout = _overridden(recipe.dropout, image=node.drop_image)

    def seed(self, index: int) -> int:
        """A seed for step `index`; distinct for each recipe seed, node seed and step."""
        return (self.recipe.seed * 1_000_003 + self.node.seed) * 10_000_019 + index + 1

    def __call__(self, index: int) -> Batch:
        """The whole batch of a step."""
        generator = torch.Generator().manual_seed(self.seed(index))
        batch, rates = self.node.batch, self.dropout
        # of a few batches' worth of pairs, sorted by the length of their captions, one slice: little is padding, and
        # every pair that is drawn is as likely as any other
        drawn = self.pairs.draw(POOL * batch, generator, self.recipe.data.even_styles, self.node.unnamed_styles)
        slice_of = int(torch.randint(POOL, (), generator=generator))
        rows = drawn[self.pairs.lengths[drawn].argsort(stable=True)][slice_of * batch : (slice_of + 1) * batch]
        same_style = self.recipe.data.references == "style"
        references = self.pairs.references(rows, generator) if same_style else None
        crops = self.pairs.crops(rows, self.recipe.data.crop, generator)
        images, conditioning = self.pairs.batch(rows, references, crops)
        clip, t5, image = (
            torch.rand(batch, generator=generator) < rate for rate in (rates.clip, rates.t5, rates.image)
        )
        conditioning = conditioning.drop(clip, t5, image)
        if rates.pooled:
            kept = torch.rand(batch, 1, generator=generator) >= rates.pooled
            conditioning = replace(conditioning, clip_pooled=conditioning.clip_pooled * kept)
        sigma = self.noise.sample(batch, self.node.intervals, generator).float()
        noise = torch.randn(images.shape, generator=generator)
        if self.recipe.stage != "base":
            conditioning = conditioning.with_low_res(*low_res_of(images, self.recipe, generator))
        objects = self.pairs.objects.rows(rows) if self.node.grounding else None
        return Batch(images, conditioning, sigma, noise, objects)


def drawn_ahead(draw: Draw, steps: range, workers: int) -> Iterator[Batch]:
    """The batches of `steps` in their order, drawn by so many processes ahead of time, or by none but this one."""
    if not workers:
        return map(draw, steps)
    batches = DataLoader(
        _Drawn(draw, steps),
        batch_size=None,
        num_workers=workers,
        collate_fn=_as_it_is,
        worker_init_fn=_leave_signals,
        multiprocessing_context="fork",  # pairs are mapped files, which a fork shares and pickling would copy
    )
    return iter(batches)


class _Drawn(Dataset):
    def __init__(self, draw: Draw, steps: range) -> None:
        self.draw, self.steps = draw, steps

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, place: int) -> Batch:
        return self.draw(self.steps[place])


def _as_it_is(batch: Batch) -> Batch:
    return batch


def _leave_signals(worker: int) -> None:
    """Ctrl-C reaches every process of a terminal: the trainer answers it, and then ends its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


class Trainer:
    """Trains one node. `folder` receives <node>.safetensors (averaged weights) and <node>.state (to continue from).

    engine: the processes that train it together, by default this one alone on `device`; the node's batch is that of all.
    accumulate: parts that a process takes its share of the batch in, one after the other, to need less memory.
    workers: processes that draw the batches of the next steps meanwhile, which changes none of them; 0: drawn in between.
    Raises ValueError for a state of other settings, a parent that is not finished, a batch that cannot be divided, or
    workers on a system without fork.
    """

    def __init__(
        self,
        recipe: Recipe,
        node: Node,
        pairs: Pairs,
        folder: str | Path,
        device: str = "cpu",
        engine: Engine | None = None,
        accumulate: int = 1,
        workers: int = 0,
    ) -> None:
        self.engine = engine or Engine(device)
        self.recipe, self.node, self.pairs, self.device = recipe, node, pairs, self.engine.device
        self.folder, self.accumulate, self.workers = Path(folder), accumulate, workers
        if workers < 0:
            raise ValueError(f"workers is 0 or more, got {workers}")
        if workers and "fork" not in multiprocessing.get_all_start_methods():
            raise ValueError(
                "Batches are drawn ahead by forks of this process, and this system has no fork. Leave workers at 0."
            )
        if accumulate < 1 or node.batch % (self.engine.processes * accumulate):
            raise ValueError(
                f"The batch of node {node.name} has {node.batch} rows, which {self.engine.processes} processes cannot take "
                f"in {accumulate} equal parts each. Choose numbers whose product divides {node.batch}."
            )
        self.draw = Draw(recipe, node, pairs)
        with torch.random.fork_rng():  # layers draw their first weights from the global generator; leave it as it was
            torch.manual_seed(self.draw.seed(-1))
            self.network = KINDS[recipe.stage].network(recipe.network).initialise()
        white = {}
        if node.whiten:
            generator = torch.Generator().manual_seed(self.draw.seed(-2))
            white = whiteners(self.network, pairs, generator)
            for projection, matrix in white.items() if node.parent is None else ():
                whiten(projection, matrix, generator)
        self.network.to(self.device)
        self.step = 0
        if node.parent is not None and not self.state_path.is_file():
            self._start_from(recipe.node(node.parent))
        self.average = {name: tensor.clone() for name, tensor in self.network.state_dict().items()}
        settings = recipe.optimizer
        self.learning_rate = node.learning_rate if node.learning_rate is not None else settings.learning_rate
        named = dict(self.network.named_parameters())
        by_muon = matrices(self.network) if settings.name == "muon" else set()
        white = {projection.linear.weight: matrix.to(self.device) for projection, matrix in white.items()}
        others = [one for name, one in named.items() if name not in by_muon and one not in white]
        adam = {
            "lr": self.learning_rate,
            "betas": (settings.beta_1, settings.beta_2),
            "weight_decay": settings.weight_decay,
            "fused": True,
        }
        self.optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(others, **adam)]
        if white:
            self.optimizers.append(WhitenedAdamW(list(white), list(white.values()), **adam))
        if by_muon:
            inner = [one for name, one in named.items() if name in by_muon]
            self.optimizers.append(Muon(inner, self.learning_rate, weight_decay=settings.weight_decay))
        self.denoiser = Denoiser(self.network, SIGMA_DATA)
        if self.state_path.is_file():
            self._resume()
        around = recipe.stage != "base" and recipe.network.residual
        asked = {"grounding": node.grounding != 0, "unnamed_styles": node.unnamed_styles is not None}
        needs = [name for name, is_asked in asked.items() if is_asked]
        if needs and pairs.objects is None:
            raise ValueError(
                f"Node {node.name} has {needs[0]}, but where the objects of these pictures are is not known, nor what their "
                f"captions say of them. Leave {needs[0]} out, or prepare pictures of Shapeworld again."
            )
        self.objective = self.engine.prepare(Objective(self.denoiser, around, node.grounding))
        self.engine.mean(torch.zeros(1))  # wait until all have read the files

    @property
    def low(self) -> bool:
        """Are products taken in bfloat16?"""
        return "bfloat16" in (self.recipe.optimizer.precision, self.engine.precision)

    @property
    def state_path(self) -> Path:
        return self.folder / f"{self.node.name}.state"

    @property
    def path(self) -> Path:
        return self.folder / f"{self.node.name}.safetensors"

    def train(self, until: int | None = None) -> Iterator[Progress]:
        """Train up to step `until` (the node's last by default); yields after each step. Save when you like."""
        self.network.train()
        steps = range(self.step, self.node.steps if until is None else until)
        for index, batch in zip(steps, drawn_ahead(self.draw, steps, self.workers), strict=True):
            progress = self._train_step(index, batch)
            self.step += 1
            yield progress

    def _train_step(self, index: int, batch: Batch) -> Progress:
        settings = self.recipe.optimizer
        rate = self.learning_rate * learning_rate_share(index, self.node.steps, settings.warmup, settings.final)
        for group in (group for optimizer in self.optimizers for group in optimizer.param_groups):
            group["lr"] = rate

        self.network.zero_grad(set_to_none=True)
        scores = torch.zeros(1 + 2 * len(DECADES), device=self.device)
        for part in range(self.accumulate):
            last = part == self.accumulate - 1
            with nullcontext() if last else self.engine.apart(self.objective):
                scores += self._backward(self._share_of(batch, part)) / self.accumulate
        norm = torch.nn.utils.clip_grad_norm_(self.network.parameters(), settings.clip)
        for optimizer in self.optimizers:
            optimizer.step()

        decay = min(settings.ema, (index + 1) / (index + 10))  # young averages forget the random start
        weights = self.network.state_dict()
        get_ema_multi_avg_fn(decay)([self.average[name] for name in weights], list(weights.values()), None)
        loss, *rest = self.engine.mean(scores).tolist()
        shares, losses = rest[: len(DECADES)], rest[len(DECADES) :]
        decades = {
            decade: (round(share * self.node.batch), lost / share)
            for decade, share, lost in zip(DECADES, shares, losses, strict=True)
            if share
        }
        return Progress(index + 1, self.node.steps, loss, norm.item(), rate, decades)

    def _backward(self, batch: Batch) -> Tensor:
        """Adds to the gradients. Returns the loss, then for each of `DECADES` the share of rows in it, then that times
        their mean loss: all of which average over parts of a batch."""
        kind = torch.device(self.device).type
        by = attend_by_products if self.low and kind == "cpu" else attend
        with torch.autocast(kind, torch.bfloat16, enabled=self.low):
            loss, rows = self.objective(batch, by)
        (loss / self.accumulate).backward()
        sigma = batch.sigma
        decade = sigma.log10().floor().clamp(DECADES[0], DECADES[-1]).long() - DECADES[0]
        within = F.one_hot(decade, len(DECADES)).float() / len(sigma)  # (B, decades)
        return torch.cat([rows.mean()[None], within.sum(0), rows @ within])

    def _share_of(self, batch: Batch, part: int) -> Batch:
        """This process's rows of a part of the batch, on its device."""
        size = self.node.batch // (self.engine.processes * self.accumulate)
        first = (part * self.engine.processes + self.engine.rank) * size
        rows = slice(first, first + size)
        images, sigma, noise = (one[rows].to(self.device) for one in (batch.images, batch.sigma, batch.noise))
        conditioning, objects = (one and one.rows(rows).to(self.device) for one in (batch.conditioning, batch.objects))
        return Batch(images, conditioning, sigma, noise, objects)

    def save(self) -> None:
        """Write the averaged weights (float16) and the state to continue from. Every process calls it, the first writes.

        Raises ValueError where there is no room or weights are not finite; what was saved before is then as it was.
        """
        problem = None
        if self.engine.rank == 0:
            try:
                self._write()
            except ValueError as error:
                problem = error
        if self.engine.mean(torch.tensor([float(problem is not None)])).item():
            raise problem or ValueError(f"The first process could not save step {self.step}: see what it says.")

    def _write(self) -> None:
        check_finite(self.average, f"step {self.step} of node {self.node.name}")
        provenance = {"recipe": self.recipe.name, "node": asdict(self.node), "steps": self.step}
        header = NetworkHeader(
            self.recipe.network, self.node.interval, self.recipe.stage, self.denoiser.sigma_data, provenance
        )
        weights = {name: tensor.half() for name, tensor in self.average.items()}

        state = {f"network.{name}": tensor.contiguous() for name, tensor in self.network.state_dict().items()}
        state |= {f"average.{name}": tensor.contiguous() for name, tensor in self.average.items()}
        for name, parameter in self.network.named_parameters():
            for optimizer in self.optimizers:
                moments = optimizer.state.get(parameter, {})
                state |= {f"optimizer.{name}.{key}": value.contiguous() for key, value in moments.items()}
        settings = json.dumps({"step": self.step, "node": asdict(self.node)})

        work = self.folder / f"{self.node.name}.saving"  # all that a process which was killed leaves behind
        shutil.rmtree(work, ignore_errors=True)
        try:
            work.mkdir(parents=True)
            save_network(work / self.path.name, weights, header)
            save_file(state, work / self.state_path.name, metadata={"state": settings})
            # weights before the state: killed in between, the steps since the last state are done again
            for path in (self.path, self.state_path):
                _flush(work / path.name)
            for path in (self.path, self.state_path):
                os.replace(work / path.name, path)
            _flush(self.folder)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(work, ignore_errors=True)
            needed = sum(tensor.nbytes for tensor in (*weights.values(), *state.values()))
            room = f"It needs {needed / 1e6:.0f} MB of room"
            if self.folder.is_dir():
                room += f", {shutil.disk_usage(self.folder).free / 1e6:.0f} MB are free"
            raise ValueError(
                f"Step {self.step} of node {self.node.name} could not be saved in {self.folder} ({error}). {room}. What was "
                f"saved before is as it was: make room, and the same command continues from it."
            ) from error
        finally:
            shutil.rmtree(work, ignore_errors=True)

    def _start_from(self, parent: Node) -> None:
        path = self.folder / f"{parent.name}.safetensors"
        training = read_header(path).training
        if training.get("recipe") == self.recipe.name and training.get("steps", parent.steps) < parent.steps:
            raise ValueError(
                f"Node {self.node.name} starts from {parent.name}, which is at step {training['steps']} of {parent.steps}. "
                f"Finish {parent.name} first."
            )
        self.network.load_state_dict(_float(read_weights(path)))

    def _resume(self) -> None:
        try:
            with safe_open(self.state_path, framework="pt", device=self.device) as file:
                saved = json.loads(file.metadata()["state"])
                state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(
                f"{self.state_path} is damaged ({error}). Put a copy in its place, or remove it to begin again."
            ) from error
        unsaid = asdict(Node(self.node.name, self.node.steps, self.node.batch))  # entries may be newer than the state
        if json.loads(json.dumps(unsaid | saved["node"])) != json.loads(json.dumps(asdict(self.node))):
            raise ValueError(
                f"{self.state_path} continues a node of other settings ({saved['node']}) than the recipe's. "
                f"Restore the recipe, or remove the file to begin again."
            )
        self.step = saved["step"]
        self.network.load_state_dict(_part(state, "network."))
        self.average = {name: tensor.clone() for name, tensor in _part(state, "average.").items()}
        names = {parameter: name for name, parameter in self.network.named_parameters()}
        for optimizer in self.optimizers:
            for parameter in (parameter for group in optimizer.param_groups for parameter in group["params"]):
                moments = _part(state, f"optimizer.{names[parameter]}.")
                # the fused optimizer walks memory in order, so moments need the memory layout of their parameter
                optimizer.state[parameter] = {
                    key: torch.empty_like(parameter).copy_(value) if value.dim() else value
                    for key, value in moments.items()
                }
        if self.engine.rank == 0 and self._step_of_weights() < self.step:
            self._write()

    def _step_of_weights(self) -> int:
        """The step whose weights lie beside the state: as far or farther, unless somebody changed or removed them."""
        try:
            return read_header(self.path).training.get("steps", 0)
        except (FileNotFoundError, ValueError):
            return -1


def _overridden(settings, **own):
    """The recipe's settings, with those that a node has of its own."""
    return replace(settings, **{name: value for name, value in own.items() if value is not None})


def _flush(path: Path) -> None:
    """Wait until a file, or what a folder lists, is on the disk, where a power failure cannot undo it."""
    if os.name == "nt":  # neither can be done there with what is open for reading only
        return
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def _part(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def _float(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.float() for name, tensor in state.items()}


def export(recipe: Recipe, folder: str | Path, target: str | Path) -> None:
    """Copy a recipe's finished experts into the folder of an ensemble and describe them in `ensemble.json`."""
    target = Path(target)
    target.mkdir(parents=True, exist_ok=True)
    experts = []
    for node in (node for node in recipe.nodes if node.expert):
        shutil.copyfile(Path(folder) / f"{node.name}.safetensors", target / f"{node.name}.safetensors")
        experts.append((f"{node.name}.safetensors", node.interval))
    experts.sort(key=lambda expert: expert[1], reverse=True)
    write_ensemble(target, experts, recipe.stage, recipe.sampler, recipe.data.encoders, "Apache-2.0")
    read_ensemble(target)
