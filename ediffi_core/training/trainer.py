"""The trainer: one node of a recipe, from its parent's weights to a finished expert.

All randomness of step n comes from (seed, n), so a run that was stopped anywhere continues to the same weights as one
that was not. State lives in safetensors and JSON, written whole or not at all.
"""

import json
import math
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..attention import Attend, attend, attend_by_products
from ..checkpoint import (
    KINDS,
    NetworkHeader,
    check_finite,
    read_ensemble,
    read_weights,
    save_network,
    write_ensemble,
)
from ..conditioning import Conditioning
from ..intervals import NoiseInterval
from ..preconditioning import SIGMA_DATA, Denoiser, loss_weight
from ..super_resolution import FACTOR, upsampled
from .degradation import degraded
from .optimizers import Muon, matrices
from .pairs import Pairs
from .recipe import Node, Recipe

POOL = 8  # batches that are drawn together


class Progress(NamedTuple):
    step: int  # steps done
    steps: int
    loss: float  # of this step's batch; 1 is what an untrained network scores
    gradient_norm: float


def denoising_loss(
    denoiser: Denoiser,
    images: Tensor,
    conditioning: Conditioning,
    sigma: Tensor,
    noise: Tensor,
    attend: Attend = attend,
    deviation: Tensor | None = None,
) -> Tensor:
    """E lambda(sigma) |D(image + sigma noise; c, sigma) - image|^2, mean over all pixels (eDiff-I, Sec. 3).

    deviation: (B, 1, 1, 1), takes sigma_data's place in lambda for a network that works around its low-res image.
    """
    level = sigma[:, None, None, None]
    denoised = denoiser(images + level * noise, sigma, conditioning, attend)
    weight = loss_weight(level, denoiser.sigma_data if deviation is None else deviation)
    return (weight * (denoised - images) ** 2).mean()


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


class Trainer:
    """Trains one node. `folder` receives <node>.safetensors (averaged weights) and <node>.state (to continue from)."""

    def __init__(self, recipe: Recipe, node: Node, pairs: Pairs, folder: str | Path, device: str = "cpu") -> None:
        self.recipe, self.node, self.pairs, self.device = recipe, node, pairs, device
        self.folder = Path(folder)
        with torch.random.fork_rng():  # layers draw their first weights from the global generator; leave it as it was
            torch.manual_seed(self._seed(-1))
            self.network = KINDS[recipe.stage].network(recipe.network).initialise().to(device)
        self.step = 0
        if node.parent is not None:
            self.network.load_state_dict(_float(read_weights(self.folder / f"{node.parent}.safetensors")))
        self.average = {name: tensor.clone() for name, tensor in self.network.state_dict().items()}
        own = {"mean": node.noise_mean, "std": node.noise_std}
        self.noise = replace(recipe.noise, **{name: value for name, value in own.items() if value is not None})
        settings = recipe.optimizer
        self.learning_rate = node.learning_rate if node.learning_rate is not None else settings.learning_rate
        inner = matrices(self.network) if settings.name == "muon" else set()
        named = list(self.network.named_parameters())
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(
                [parameter for name, parameter in named if name not in inner],
                lr=self.learning_rate,
                betas=(settings.beta_1, settings.beta_2),
                weight_decay=settings.weight_decay,
                fused=True,
            )
        ]
        if inner:
            by_muon = [parameter for name, parameter in named if name in inner]
            self.optimizers.append(Muon(by_muon, self.learning_rate, weight_decay=settings.weight_decay))
        self.denoiser = Denoiser(self.network, SIGMA_DATA)
        if self.state_path.is_file():
            self._resume()

    @property
    def state_path(self) -> Path:
        return self.folder / f"{self.node.name}.state"

    @property
    def path(self) -> Path:
        return self.folder / f"{self.node.name}.safetensors"

    def train(self, until: int | None = None) -> Iterator[Progress]:
        """Train up to step `until` (the node's last by default); yields after each step. Save when you like."""
        self.network.train()
        last = self.node.steps if until is None else until
        while self.step < last:
            progress = self._train_step(self.step)
            self.step += 1
            yield progress

    def _train_step(self, index: int) -> Progress:
        settings = self.recipe.optimizer
        images, conditioning, sigma, noise = self._draw(index)
        share = learning_rate_share(index, self.node.steps, settings.warmup, settings.final)
        for group in (group for optimizer in self.optimizers for group in optimizer.param_groups):
            group["lr"] = self.learning_rate * share

        kind, low = torch.device(self.device).type, settings.precision == "bfloat16"
        by = attend_by_products if low and kind == "cpu" else attend
        with torch.autocast(kind, torch.bfloat16, enabled=low):
            around = self.recipe.stage != "base" and self.recipe.network.residual
            deviation = self.network.deviation(conditioning) if around else None
            loss = denoising_loss(self.denoiser, images, conditioning, sigma, noise, by, deviation)
        self.network.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.network.parameters(), settings.clip)
        for optimizer in self.optimizers:
            optimizer.step()

        decay = min(settings.ema, (index + 1) / (index + 10))  # young averages forget the random start
        with torch.no_grad():
            for name, tensor in self.network.state_dict().items():
                self.average[name].lerp_(tensor, 1 - decay)
        return Progress(index + 1, self.node.steps, loss.item(), norm.item())

    def _draw(self, index: int) -> tuple[Tensor, Conditioning, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(self._seed(index))
        batch, rates = self.node.batch, self.recipe.dropout
        # of a few batches' worth of pairs, sorted by the length of their captions, one slice: little is padding, and
        # every pair that is drawn is as likely as any other
        drawn = self.pairs.draw(POOL * batch, generator, self.recipe.data.even_styles)
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
        return images.to(self.device), conditioning.to(self.device), sigma.to(self.device), noise.to(self.device)

    def _seed(self, index: int) -> int:
        """A seed for step `index`; distinct for each recipe seed, node seed and step."""
        return (self.recipe.seed * 1_000_003 + self.node.seed) * 10_000_019 + index + 1

    def save(self) -> None:
        """Write the averaged weights (float16) and the state to continue from."""
        self.folder.mkdir(parents=True, exist_ok=True)
        check_finite(self.average, f"step {self.step} of node {self.node.name}")
        interval = NoiseInterval(self.node.intervals[0].low, self.node.intervals[-1].high)
        provenance = {"recipe": self.recipe.name, "node": asdict(self.node), "steps": self.step}
        header = NetworkHeader(self.recipe.network, interval, self.recipe.stage, self.denoiser.sigma_data, provenance)
        save_network(self.path, {name: tensor.half() for name, tensor in self.average.items()}, header)

        state = {f"network.{name}": tensor.contiguous() for name, tensor in self.network.state_dict().items()}
        state |= {f"average.{name}": tensor.contiguous() for name, tensor in self.average.items()}
        for name, parameter in self.network.named_parameters():
            for optimizer in self.optimizers:
                moments = optimizer.state.get(parameter, {})
                state |= {f"optimizer.{name}.{key}": value.contiguous() for key, value in moments.items()}
        partial = self.state_path.with_suffix(".partial")
        save_file(state, partial, metadata={"state": json.dumps({"step": self.step, "node": asdict(self.node)})})
        os.replace(partial, self.state_path)

    def _resume(self) -> None:
        with safe_open(self.state_path, framework="pt", device=self.device) as file:
            saved = json.loads(file.metadata()["state"])
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if saved["node"] != json.loads(json.dumps(asdict(self.node))):
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
        experts.append((f"{node.name}.safetensors", NoiseInterval(node.intervals[0].low, node.intervals[-1].high)))
    experts.sort(key=lambda expert: expert[1], reverse=True)
    write_ensemble(target, experts, recipe.stage, recipe.sampler, recipe.data.encoders, "Apache-2.0")
    read_ensemble(target)
