"""Branching: experts for parts of the noise range, grown from a U-Net that exists (eDiff-I, Sec. 4.1).

    ediffi branch RECIPE.toml

The network is one that diffusers and ComfyUI both load (Stable Diffusion 1.5 and 2, SDXL). Each node of the recipe's tree
starts from the weights of its parent and is trained further with the network's own objective, on the noise of its
intervals only; what is trained are all weights, or a LoRA. Sigma is ComfyUI's: the standard deviation of the noise beside
a latent of unit scale, sqrt((1 - a) / a) where the network's level keeps sqrt(a) of the latent.

All randomness of step n comes from (seed, n), so a run that was stopped anywhere continues to the same weights as one that
was not. Files appear whole or not at all. The libraries diffusers, peft and transformers are imported where they are used.
"""

import argparse
import json
import math
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor

from ..checkpoint import check_finite
from ..intervals import NoiseInterval
from .branch_recipe import (
    FAMILIES,
    BranchNode,
    BranchRecipe,
    Levels,
    Lora,
    Source,
    experts_of,
    read_branch_recipe,
)
from .latents import Batch, LatentPairs, needs, prepare, write, write_json
from .trainer import Progress, learning_rate_share

FORMAT = 1
HEADER = "ediffi_branch"  # of an expert's metadata
DRAWS = 4  # levels at which each held-out pair is tried
SCHEDULE = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")  # of both families


class Model(NamedTuple):
    unet: torch.nn.Module  # diffusers' UNet2DConditionModel
    levels: Levels
    prediction: str  # "epsilon", "v_prediction" or "sample"


def load_model(source: Source) -> Model:
    """The network in float32, ready to be trained. Nothing is downloaded.

    Raises FileNotFoundError, or ValueError for a network that does not take and give latents alone.
    """
    with needs("Branching"):
        from diffusers import DDPMScheduler, UNet2DConditionModel
    path = Path(source.path)
    if not path.exists():
        raise FileNotFoundError(
            f"There is no model {path}. Give a folder in diffusers' layout, or a .safetensors file."
        )
    if source.is_file:
        with tempfile.TemporaryDirectory() as configuration:
            described = {"_class_name": "UNet2DConditionModel", **FAMILIES[source.family]}
            Path(configuration, "unet").mkdir()
            Path(configuration, "unet", "config.json").write_text(json.dumps(described), encoding="utf-8")
            unet = UNet2DConditionModel.from_single_file(
                str(path), config=configuration, subfolder="unet", local_files_only=True
            )
        schedule = DDPMScheduler(**SCHEDULE)
    else:
        unet = UNet2DConditionModel.from_pretrained(path, subfolder="unet", local_files_only=True)
        schedule = DDPMScheduler.from_pretrained(path, subfolder="scheduler", local_files_only=True)
    if unet.config.in_channels != unet.config.out_channels:
        raise ValueError(
            f"{path.name} takes {unet.config.in_channels} channels and gives {unet.config.out_channels}, as inpainting "
            f"networks do. Only networks that take and give latents alone can be branched."
        )
    levels = Levels(schedule.alphas_cumprod.double())
    return Model(unet.float(), levels, source.prediction or schedule.config.prediction_type)


def prediction_loss(model: Model, batch: Batch, timesteps: Tensor, noise: Tensor) -> Tensor:
    """The network's own objective, the mean square of its error in epsilon, v or the latent: (B,), one for each row.

    timesteps: (B,) int64, levels; noise: like the latents.
    """
    kept = model.levels.alphas.to(batch.latents.device, torch.float32)[timesteps][:, None, None, None]
    noised = kept.sqrt() * batch.latents + (1 - kept).sqrt() * noise
    target = {
        "epsilon": lambda: noise,
        "v_prediction": lambda: kept.sqrt() * noise - (1 - kept).sqrt() * batch.latents,
        "sample": lambda: batch.latents,
    }[model.prediction]()
    added = None if batch.pooled is None else {"text_embeds": batch.pooled, "time_ids": batch.time_ids}
    predicted = model.unet(
        noised, timesteps, encoder_hidden_states=batch.tokens, added_cond_kwargs=added, return_dict=False
    )[0]
    return F.mse_loss(predicted.float(), target, reduction="none").mean((1, 2, 3))


@torch.no_grad()
def interval_losses(
    model: Model, pairs: LatentPairs, intervals: Sequence[NoiseInterval], seed: int = 0, at_once: int = 16
) -> list[float]:
    """The mean loss on the held-out pairs in each of `intervals`, with levels and noise that the seed alone decides."""
    device = next(model.unet.parameters()).device
    losses = []
    for interval in intervals:
        generator = torch.Generator().manual_seed(seed)
        rows, levels = pairs.held_out.repeat(DRAWS), model.levels.within([interval])
        timesteps = _evenly(levels, len(rows), generator)[torch.randperm(len(rows), generator=generator)]
        total = 0.0
        for start in range(0, len(rows), at_once):
            batch = pairs.batch(rows[start : start + at_once])
            noise = torch.randn(batch.latents.shape, generator=generator)
            chosen = timesteps[start : start + at_once]
            total += prediction_loss(model, batch.to(device), chosen.to(device), noise.to(device)).sum().item()
        losses.append(total / len(rows))
    return losses


def _evenly(levels: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` of `levels`, one from each of `count` equal parts of them, low to high; see NoiseDistribution.sample."""
    drawn = (torch.arange(count) + torch.rand(count, generator=generator)) / count * len(levels)
    return levels[drawn.long().clamp(max=len(levels) - 1)]


def add_lora(unet, lora: Lora, seed: int) -> None:
    """Freeze the network and put a LoRA on it that changes nothing yet; its layers are float32 whatever the network is.

    Raises ValueError where a layer's name is not found.
    """
    with needs("A LoRA"):
        from peft import LoraConfig
    names = [name for name, _ in unet.named_modules()]
    for layer in lora.layers:
        if not any(name == layer or name.endswith(f".{layer}") for name in names):
            raise ValueError(
                f"No layer of the network is called {layer!r}. Layers are named as in diffusers, such as to_q."
            )
    unet.requires_grad_(False)
    with torch.random.fork_rng():  # layers draw their first weights from the global generator; leave it as it was
        torch.manual_seed(seed)
        unet.add_adapter(LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=list(lora.layers)))
    for _, parameter in trained(unet):
        parameter.data = parameter.data.float()


def trained(unet) -> list[tuple[str, torch.nn.Parameter]]:
    return [(name, parameter) for name, parameter in unet.named_parameters() if parameter.requires_grad]


def lora_key(name: str) -> str:
    """The name of a LoRA's weight in a file, kohya's form, of its name in the network; both of ComfyUI's loaders know it."""
    layer, part = name.removesuffix(".default.weight").rsplit(".", 1)
    return f"lora_unet_{layer.replace('.', '_')}.{ {'lora_A': 'lora_down', 'lora_B': 'lora_up'}[part] }.weight"


def expert_file(recipe: BranchRecipe, node: BranchNode) -> str:
    return f"{recipe.name}-{node.name}.safetensors"


def load_expert(unet, recipe: BranchRecipe, node: BranchNode, folder: str | Path) -> None:
    """Give the network the weights of a finished expert, or of a parent; a LoRA must have been added before.

    Raises FileNotFoundError, or ValueError for one that is not finished or does not fit.
    """
    path = Path(folder) / expert_file(recipe, node)
    if not path.is_file():
        raise FileNotFoundError(f"There is no {path}. Train the node {node.name!r} first.")
    with safe_open(path, framework="pt") as file:
        steps = json.loads(file.metadata()[HEADER])["steps"]
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if steps != node.steps:
        raise ValueError(
            f"{path.name} was trained for {steps} steps of {node.steps}. Train the node {node.name!r} to its end."
        )
    key = lora_key if recipe.lora else str
    with torch.no_grad():
        for name, parameter in trained(unet):
            if key(name) not in weights or weights[key(name)].shape != parameter.shape:
                raise ValueError(
                    f"{path.name} does not fit the network at {key(name)}. It is of another model or recipe."
                )
            parameter.copy_(weights[key(name)])


class BranchTrainer:
    """Trains one node. `folder` receives its weights, as ComfyUI loads them, and a .state to continue from.

    accumulate: parts that a batch is taken in, one after the other, to need less memory. `train()` and `save()` are driven
    as those of `training.trainer.Trainer`. Raises ValueError for pairs, a parent or a state that do not fit.
    """

    def __init__(
        self,
        recipe: BranchRecipe,
        node: BranchNode,
        pairs: LatentPairs,
        folder: str | Path,
        device: str = "cpu",
        accumulate: int = 1,
    ) -> None:
        if accumulate < 1 or node.batch % accumulate:
            raise ValueError(
                f"The batch of node {node.name} has {node.batch} rows, which {accumulate} equal parts cannot share. Choose a "
                f"number that divides {node.batch}."
            )
        self.recipe, self.node, self.pairs, self.device = recipe, node, pairs, device
        self.folder, self.step, self.accumulate = Path(folder), 0, accumulate
        self.model = model = load_model(recipe.model)
        pairs.check(model.unet)
        self.levels = model.levels.within(node.intervals(model.levels))
        low = recipe.optimizer.precision == "bfloat16"
        if recipe.lora is not None:
            add_lora(model.unet, recipe.lora, self._seed(-1))
        if node.parent is not None and not self.state_path.is_file():
            load_expert(model.unet, recipe, recipe.node(node.parent), self.folder)
        model.unet.to(device).train()
        if recipe.lora is not None and low:
            for parameter in model.unet.parameters():
                if not parameter.requires_grad:
                    parameter.data = parameter.data.bfloat16()
        if recipe.checkpointing:
            model.unet.enable_gradient_checkpointing()
        self.parameters = dict(trained(model.unet))
        # without averaging the average is the weights themselves, and costs no memory
        self.average = {
            name: parameter.detach().clone() if recipe.optimizer.ema else parameter.detach()
            for name, parameter in self.parameters.items()
        }
        settings = recipe.optimizer
        self.learning_rate = node.learning_rate if node.learning_rate is not None else settings.learning_rate
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(),
            lr=self.learning_rate,
            betas=(settings.beta_1, settings.beta_2),
            weight_decay=settings.weight_decay,
            fused=True,
        )
        if self.state_path.is_file():
            self._resume()

    @property
    def path(self) -> Path:
        return self.folder / expert_file(self.recipe, self.node)

    @property
    def state_path(self) -> Path:
        return self.path.with_suffix(".state")

    @property
    def settings(self) -> dict[str, Any]:
        """What must stay the same for a run to be continued."""
        recipe = self.recipe
        settings = {
            "model": Path(recipe.model.path).name,
            "node": asdict(self.node),
            "lora": recipe.lora and asdict(recipe.lora),
            "optimizer": asdict(recipe.optimizer),
            "data": {"dropout": recipe.data.dropout, "trained": self.pairs.trained},
            "seed": recipe.seed,
        }
        return json.loads(json.dumps(settings))

    def train(self, until: int | None = None) -> Iterator[Progress]:
        """Train up to step `until` (the node's last by default); yields after each step. Save when you like."""
        last = self.node.steps if until is None else until
        while self.step < last:
            progress = self._train_step(self.step)
            self.step += 1
            yield progress

    def _train_step(self, index: int) -> Progress:
        settings, count = self.recipe.optimizer, self.node.batch
        batch, timesteps, noise = self._draw(index)
        share = learning_rate_share(index, self.node.steps, settings.warmup, settings.final)
        self.optimizer.param_groups[0]["lr"] = self.learning_rate * share
        self.optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for start in range(0, count, count // self.accumulate):
            part = slice(start, start + count // self.accumulate)
            rows = batch.rows(part).to(self.device), timesteps[part].to(self.device), noise[part].to(self.device)
            low = settings.precision == "bfloat16"
            with torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=low):
                loss = prediction_loss(self.model, *rows).sum() / count
            loss.backward()
            total += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), settings.clip)
        self.optimizer.step()
        if settings.ema:
            decay = min(settings.ema, (index + 1) / (index + 10))  # young averages forget where they started
            with torch.no_grad():
                for name, parameter in self.parameters.items():
                    self.average[name].lerp_(parameter, 1 - decay)
        return Progress(index + 1, self.node.steps, total, norm.item(), self.learning_rate * share)

    def _draw(self, index: int) -> tuple[Batch, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(self._seed(index))
        count = self.node.batch
        rows = torch.randint(self.pairs.trained, (count,), generator=generator)
        dropped = torch.rand(count, generator=generator) < self.recipe.data.dropout
        batch = self.pairs.batch(rows, dropped)
        timesteps = _evenly(self.levels, count, generator)
        return batch, timesteps, torch.randn(batch.latents.shape, generator=generator)

    def _seed(self, index: int) -> int:
        """A seed for step `index`; distinct for each recipe seed, node seed and step."""
        return (self.recipe.seed * 1_000_003 + self.node.seed) * 10_000_019 + index + 1

    def save(self) -> None:
        """Write the (averaged) weights as ComfyUI loads them, a LoRA in float32 and a whole network in float16, and the
        state to continue from."""
        self.folder.mkdir(parents=True, exist_ok=True)
        check_finite(self.average, f"step {self.step} of node {self.node.name}")
        interval = NoiseInterval(*_ends(self.node.intervals(self.model.levels)))
        header = {
            "format": FORMAT,
            "kind": "full" if self.recipe.lora is None else "lora",
            "interval": _to_json(interval),
            "steps": self.step,
            "recipe": self.recipe.name,
            **self.settings,
        }
        if self.recipe.lora is None:
            weights = {name: tensor.half() for name, tensor in self.average.items()}
            check_finite(weights, f"step {self.step} of node {self.node.name}, in float16")
        else:
            weights = {lora_key(name): tensor for name, tensor in self.average.items()}
            alpha = torch.tensor(float(self.recipe.lora.alpha))
            weights |= {f"{key.split('.')[0]}.alpha": alpha.clone() for key in list(weights)}
        write(self.path, weights, {HEADER: json.dumps(header)})

        state = {f"weights.{name}": parameter.detach() for name, parameter in self.parameters.items()}
        if self.recipe.optimizer.ema:
            state |= {f"average.{name}": tensor for name, tensor in self.average.items()}
        for name, parameter in self.parameters.items():
            moments = self.optimizer.state.get(parameter, {})
            state |= {f"optimizer.{key}.{name}": value for key, value in moments.items()}
        write(self.state_path, state, {"state": json.dumps({"step": self.step, "settings": self.settings})})

    def _resume(self) -> None:
        with safe_open(self.state_path, framework="pt", device=self.device) as file:
            saved = json.loads(file.metadata()["state"])
            if saved["settings"] != self.settings:
                changed = [name for name, value in self.settings.items() if saved["settings"].get(name) != value]
                raise ValueError(
                    f"{self.state_path} continues a run of other settings: {', '.join(changed)} changed. Restore the recipe, "
                    f"or remove the file to begin again."
                )
            self.step = saved["step"]
            kept = set(file.keys())
            with torch.no_grad():
                for name, parameter in self.parameters.items():
                    parameter.copy_(file.get_tensor(f"weights.{name}"))
                    if self.recipe.optimizer.ema:
                        self.average[name].copy_(file.get_tensor(f"average.{name}"))
                    moments = {
                        key: file.get_tensor(f"optimizer.{key}.{name}")
                        for key in ("step", "exp_avg", "exp_avg_sq")
                        if f"optimizer.{key}.{name}" in kept
                    }
                    if moments:
                        self.optimizer.state[parameter] = moments


def compared(
    recipe: BranchRecipe, pairs: LatentPairs, folder: str | Path, device: str = "cpu"
) -> tuple[list[NoiseInterval], dict[str, list[float]]]:
    """The held-out loss of the network that is branched, "base", and of each node, in each expert's interval.

    Below the base in its own interval an expert has learnt something. Whether branching was the better use of the steps,
    a node says that owns everything, is no expert, and has as many steps as the experts together.
    """
    model = load_model(recipe.model)
    model.unet.to(device).eval()
    intervals = [interval for interval, node in experts_of(recipe, model.levels) if node is not None]
    losses = {"base": interval_losses(model, pairs, intervals)}
    if recipe.lora is not None:
        add_lora(model.unet, recipe.lora, 0)
    for node in recipe.nodes:
        load_expert(model.unet, recipe, node, folder)
        losses[node.name] = interval_losses(model, pairs, intervals)
    return intervals, losses


def workflow(recipe: BranchRecipe, levels: Levels) -> dict[str, Any]:
    """A graph in ComfyUI's API format: the checkpoint, its experts, eDiff-I Expert Ensemble, a sampler, a picture."""
    experts = experts_of(recipe, levels)
    side = recipe.data.resolution
    graph: dict[str, Any] = {"checkpoint": ("CheckpointLoaderSimple", {"ckpt_name": recipe.model.name})}
    joined: dict[str, Any] = {"unit": "sigma", "preset": "own boundaries", "experts": str(len(experts))}
    for number, (interval, node) in enumerate(experts, 1):
        model: list[Any] = ["checkpoint", 0]
        if node is not None:
            file = expert_file(recipe, node)
            if recipe.lora is None:
                graph[node.name] = ("UNETLoader", {"unet_name": file, "weight_dtype": "default"})
            else:
                loaded = {"model": model, "lora_name": file, "strength_model": 1.0}
                graph[node.name] = ("LoraLoaderModelOnly", loaded)
            model = [node.name, 0]
        joined |= {f"experts.expert_{number}": model, f"experts.cfg_{number}": -1.0}
        if number < len(experts):
            joined[f"experts.boundary_{number}"] = interval.low
    only = len(experts) == 1  # one expert for all noise is no ensemble
    source = joined["experts.expert_1"] if only else ["ensemble", 0]
    if not only:
        graph["ensemble"] = ("EDiffI_ExpertEnsemble", joined)
    sampled = {
        "model": source, "positive": ["positive", 0], "negative": ["negative", 0], "latent_image": ["latent", 0],
        "seed": 0, "steps": 25, "cfg": 7.0, "sampler_name": "dpmpp_2m", "scheduler": "karras", "denoise": 1.0,
    }  # fmt: skip
    graph |= {
        "positive": ("CLIPTextEncode", {"clip": ["checkpoint", 1], "text": "a red fox in the snow"}),
        "negative": ("CLIPTextEncode", {"clip": ["checkpoint", 1], "text": ""}),
        "latent": ("EmptyLatentImage", {"width": side, "height": side, "batch_size": 1}),
        "sampler": ("KSampler", sampled),
        "decoded": ("VAEDecode", {"samples": ["sampler", 0], "vae": ["checkpoint", 2]}),
        "saved": ("SaveImage", {"images": ["decoded", 0], "filename_prefix": recipe.name}),
    }
    return {name: {"class_type": kind, "inputs": inputs} for name, (kind, inputs) in graph.items()}


def describe(
    recipe: BranchRecipe,
    levels: Levels,
    folder: str | Path,
    losses: tuple[list[NoiseInterval], dict[str, list[float]]] | None = None,
) -> str:
    """Write experts.json and workflow_api.json beside the experts; returns what to do with them, in words."""
    folder, experts = Path(folder), experts_of(recipe, levels)
    boundaries = [interval.low for interval, _ in experts[:-1]]
    described = {
        "format": FORMAT,
        "kind": "full" if recipe.lora is None else "lora",
        "model": recipe.model.name,
        "unit": "sigma",
        "boundaries": boundaries,
        "experts": [
            {"file": node and expert_file(recipe, node), "interval": _to_json(interval)} for interval, node in experts
        ],
    }
    lines = [f"Copy to ComfyUI's models/{'diffusion_models' if recipe.lora is None else 'loras'}:"]
    lines += [f"  {folder / expert_file(recipe, node)}" for _, node in experts if node is not None]
    lines += ["eDiff-I Expert Ensemble, unit sigma:"]
    for number, (interval, node) in enumerate(experts, 1):
        what = f"{recipe.model.name} as it is" if node is None else expert_file(recipe, node)
        lines += [f"  expert_{number}    {what}"]
        lines += [f"  boundary_{number}  {interval.low:g}"] if number < len(experts) else []
    if losses is not None:
        intervals, by_name = losses
        described["held_out_losses"] = {"intervals": [_to_json(one) for one in intervals], **by_name}
        lines += ["Loss on pairs held out, by interval of sigma:"]
        lines += [f"  {'':22s}" + "".join(f"{name:>12s}" for name in by_name)]
        for place, interval in enumerate(intervals):
            lines += [f"  {interval!s:22s}" + "".join(f"{values[place]:12.5f}" for values in by_name.values())]
    write_json(folder / "experts.json", described)
    write_json(folder / "workflow_api.json", workflow(recipe, levels))
    return "\n".join([*lines, f"Or open {folder / 'workflow_api.json'} in ComfyUI."])


def _ends(intervals: Sequence[NoiseInterval]) -> tuple[float, float]:
    return min(one.low for one in intervals), max(one.high for one in intervals)


def _to_json(interval: NoiseInterval) -> list[float | None]:
    return [interval.low, None if math.isinf(interval.high) else interval.high]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="ediffi branch", description="Grow experts from a U-Net that exists.")
    parser.add_argument("recipe", type=Path, metavar="RECIPE.toml")
    parser.add_argument("--folder", type=Path, default=Path("runs"), help="where pairs and weights go (runs/)")
    parser.add_argument("--node", help="one node only; all in order if left out")
    parser.add_argument("--save-every", type=int, default=250, metavar="STEPS")
    parser.add_argument(
        "--accumulate", type=int, default=1, metavar="N", help="take each batch in N parts, in less memory"
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda, ...")
    parser.add_argument("--threads", type=int, help="CPU threads")
    run(parser.parse_args(arguments))
    return 0


def run(options: argparse.Namespace) -> None:
    """Prepare what is not prepared, train what is not trained, say what to do with it. options: those of `main`."""
    if options.threads:
        torch.set_num_threads(options.threads)
    recipe = read_branch_recipe(options.recipe)
    folder = options.folder / recipe.name
    pairs_at = recipe.data.pairs
    if pairs_at is None:
        pairs_at = options.folder / f"{recipe.name}-pairs"
        for done, total in prepare(recipe, pairs_at, options.device):
            print(f"{done} of {total} pairs", flush=True)
    pairs = LatentPairs(pairs_at, recipe.data.held_out)
    levels = None
    for node in [recipe.node(options.node)] if options.node else recipe.nodes:
        trainer = BranchTrainer(recipe, node, pairs, folder, options.device, options.accumulate)
        levels = trainer.model.levels
        experts_of(recipe, levels)  # a recipe that makes no ensemble is said before hours of training, not after
        _drive(trainer, options.save_every)
        del trainer  # before the next takes as much memory
    if options.node:
        return
    losses = compared(recipe, pairs, folder, options.device) if recipe.data.held_out else None
    print(describe(recipe, levels, folder, losses))


def _drive(trainer: BranchTrainer, save_every: int) -> None:
    name, smooth = trainer.node.name, None
    if trainer.step >= trainer.node.steps:
        print(f"{name}: already finished at step {trainer.step}", flush=True)
        return
    for (
        progress
    ) in trainer.train():  # saved between steps only: one that is interrupted has half of its weights changed
        smooth = progress.loss if smooth is None else smooth + 0.02 * (progress.loss - smooth)
        finished = progress.step == progress.steps
        if progress.step % 50 == 0 or finished:
            print(f"{name} {progress.step}/{progress.steps} loss {smooth:.5f}", flush=True)
        if progress.step % save_every == 0 or finished:
            trainer.save()
