"""Two experts in one sampler run: our routing beside the other ways there are, on tiny random networks on the CPU.

    python bench/routing.py [--wan-moe FOLDER] [--everything] [--json FILE]

ComfyUI is COMFYUI_DIR or ~/comfy/ComfyUI. --wan-moe: a copy of github.com/stduhpf/ComfyUI-WanMoeKSampler; without it that row
is left out. --everything: also all samplers, schedulers, steps and denoise through our routing, for four kinds of models.
What is counted, and the result: docs/routing.md.
"""

import argparse
import asyncio
import contextlib
import gc
import importlib
import importlib.util
import io
import itertools
import json
import logging
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from types import SimpleNamespace

import torch

ROOT = Path(__file__).resolve().parents[1]
COMFY = Path(os.environ.get("COMFYUI_DIR", Path.home() / "comfy" / "ComfyUI"))
BOUNDARY = 0.875  # Wan 2.2's for text to video; in a flow model the timestep, of 1, is sigma
SHIFT = 8.0
STEPS, DENOISE = (4, 8, 20, 30), (0.7, 0.5, 0.3)
EQUAL = 1e-5  # relative distance below which images count as equal
NOTHING = [[torch.zeros(1, 1, 1), {}]]  # a CONDITIONING for networks that read none


@dataclass(frozen=True)
class Settings:
    """What one sampler run is asked for."""

    image: torch.Tensor
    positive: list
    negative: list
    sampler: str
    scheduler: str = "simple"
    steps: int = 8
    cfg: float = 1.0
    denoise: float = 1.0
    sigmas: torch.Tensor | None = None  # instead of scheduler, steps and denoise


class Impossible(Exception):
    """There is no input for this setting."""


def load_pack():
    """ComfyUI on the CPU, and the pack in it, as the fixture `pack` of the tests."""
    if not (COMFY / "comfy").is_dir():
        sys.exit(f"No ComfyUI at {COMFY}. Set COMFYUI_DIR to its folder.")
    sys.path[:0] = [str(COMFY), str(ROOT / "tests" / "support")]
    from comfy.cli_args import args

    args.cpu = True
    import nodes

    if not asyncio.run(nodes.load_custom_node(str(ROOT))):
        sys.exit("ComfyUI could not load the pack.")
    name = str(ROOT).replace(".", "_x_")
    return SimpleNamespace(
        bridge=importlib.import_module(f"{name}.nodes.comfy_bridge"),
        core=lambda module: importlib.import_module(f"{name}.ediffi_core.{module}"),
        module=lambda module: importlib.import_module(f"{name}.nodes.{module}"),
    )


def ways(pack, families, wan_moe: Path | None) -> dict[str, Callable]:
    """name -> (experts, settings) -> image. The experts: high noise, low noise."""
    import comfy.hooks
    import comfy.samplers
    from comfy_extras.nodes_hooks import CreateHookKeyframe, SetHookKeyframes

    import nodes

    def sampled(model, s: Settings, positive=None, negative=None):
        return families.sample(
            model, positive or s.positive, negative or s.negative, s.image, s.sampler, s.scheduler, s.steps, s.cfg,
            s.denoise, sigmas=s.sigmas,
        )  # fmt: skip

    def plain(experts, s: Settings):
        return sampled(experts[0], s)

    def ours(experts, s: Settings):
        return sampled(families.routed(pack, experts, [BOUNDARY]), s)

    def two_samplers(experts, s: Settings):
        if s.sigmas is not None:
            raise Impossible
        steps = s.steps if s.denoise == 1 else int(s.steps / s.denoise)  # as a user works it out by hand
        sigmas = comfy.samplers.KSampler(experts[0], steps, "cpu", s.sampler, s.scheduler).sigmas
        start, switch = steps - s.steps, int((sigmas >= BOUNDARY).sum())
        common = (5, steps, s.cfg, s.sampler, s.scheduler, s.positive, s.negative)
        latent = {"samples": s.image}
        node = nodes.KSamplerAdvanced()
        if switch > start:
            (latent,) = node.sample(experts[0], "enable", *common, latent, start, switch, "enable")
        add_noise = "disable" if switch > start else "enable"
        (latent,) = node.sample(experts[1], add_noise, *common, latent, max(start, switch), steps, "disable")
        return latent["samples"]

    def hooks(experts, s: Settings):
        weights = comfy.hooks.get_patch_weights_from_model(experts[1])
        hooks = comfy.hooks.create_hook_model_as_lora(weights, None, 1.0, 1.0)
        keyframe, percent = CreateHookKeyframe(), percent_of(experts[0], BOUNDARY)
        (keyframes,) = keyframe.create_hook_keyframe(0.0, 0.0)
        (keyframes,) = keyframe.create_hook_keyframe(1.0, percent, keyframes)
        (hooks,) = SetHookKeyframes().set_hook_keyframes(hooks, keyframes)
        hooked = [comfy.hooks.set_hooks_for_conditioning(cond, hooks) for cond in (s.positive, s.negative)]
        return sampled(experts[0], s, *hooked)

    found = {"one MODEL": plain, "this pack": ours, "two KSamplerAdvanced": two_samplers, "hooks and keyframes": hooks}
    if wan_moe is None:
        print("WanMoeKSampler is left out: no --wan-moe.\n")
        return found

    spec = importlib.util.spec_from_file_location("wan_moe_nodes", wan_moe / "nodes.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def wan_moe_sampler(experts, s: Settings):
        if s.sigmas is not None:
            raise Impossible
        (latent,) = module.WanMoeKSampler().sample(
            *experts, BOUNDARY, 5, s.steps, s.cfg, s.cfg, s.sampler, s.scheduler, SHIFT, s.positive, s.negative,
            {"samples": s.image}, s.denoise,
        )  # fmt: skip
        return latent["samples"]

    return found | {"WanMoeKSampler": wan_moe_sampler}


def percent_of(model, sigma: float) -> float:
    """The part of the schedule at which `sigma` comes, by bisection; never before it."""
    sampling, low, high = model.get_model_object("model_sampling"), 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if sampling.percent_to_sigma(middle) > sigma else (low, middle)
    return high


def with_equal_experts(way: Callable, wan, samplers: Sequence[str]) -> list[torch.Tensor]:
    """The image of each sampler, the experts having equal weights."""
    experts = [wan.model(1), wan.model(1)]
    conditionings = wan.conditioning(2), wan.conditioning(3)
    return [way(experts, Settings(wan.image(), *conditionings, sampler, cfg=3.0)) for sampler in samplers]


def wrong_calls(way: Callable, families, runs: Sequence[dict]) -> dict | None:
    """Calls of a network whose sigma lies in the other expert's interval; None where a way has no such input."""
    calls = []
    experts = [families.marked("flow", mark, calls, SHIFT) for mark in range(2)]
    found = {"runs": len(runs), "calls": 0, "wrong": 0}
    for run in runs:
        calls.clear()
        try:
            way(experts, Settings(torch.full((1, 4, 1, 1), 0.5), NOTHING, NOTHING, **run))
        except Impossible:
            return None
        owned = [call for call in calls if call[1] == call[1]]  # some samplers come to sigmas that are no number
        found["calls"] += len(owned)
        found["wrong"] += sum(mark != families.owner(sigma, [BOUNDARY]) for mark, sigma in owned)
    return found


def memory(way: Callable, families, wan, experts: int) -> dict:
    """Copies of one expert's weights while a network is called, and what changed in the MODELs after a run."""
    import comfy.model_management

    comfy.model_management.unload_all_models()
    gc.collect()
    experts = [wan.model(seed) for seed in range(experts)]
    weight = experts[0].model.diffusion_model.get_parameter("text_embedding.0.weight")
    before = [families.snapshot(expert) for expert in experts]
    outside, copies = families.copies(weight) - len(experts), []

    def counted(forward):
        def call(*args, **kwargs):
            copies.append(families.copies(weight) - outside)
            return forward(*args, **kwargs)

        return call

    networks = [expert.model.diffusion_model for expert in experts]
    for network in networks:
        network.forward = counted(network.forward)
    way(experts, Settings(wan.image(), wan.conditioning(2), wan.conditioning(3), "euler", steps=4, cfg=3.0))
    for network in networks:
        del network.forward
    comfy.model_management.unload_all_models()
    after = [families.snapshot(expert) for expert in experts]
    changed = {key for old, new in zip(before, after, strict=True) for key in old if old[key] != new[key]}
    # a new patches_uuid only makes ComfyUI load the weights again
    return {"copies": max(copies), "changed": sorted(changed - {"patches_uuid"})}


def overhead(plain: Callable, ours: Callable, settings: Settings, pairs: int) -> dict:
    """Time of our routing against one MODEL, in pairs of runs one right after the other, in turns which comes first.

    Each way is called with settings. Processor time is less disturbed by whatever else the machine does.
    """
    wall, processor, extra, calls = [], [], [], []
    for pair in range(-1, pairs):
        taken = {}
        for way in (plain, ours) if pair % 2 else (ours, plain):
            start = time.perf_counter(), time.process_time()
            way(settings)
            taken[way] = time.perf_counter() - start[0], time.process_time() - start[1]
        if pair < 0:  # warms up
            continue
        wall.append(taken[ours][0] / taken[plain][0])
        processor.append(taken[ours][1] / taken[plain][1])
        extra.append((taken[ours][1] - taken[plain][1]) / settings.steps)
        calls.append(taken[plain][1] / settings.steps)
    found = {"pairs": pairs, "call_ms": 1e3 * statistics.median(calls), "extra_ms": 1e3 * statistics.median(extra)}
    return found | {
        name: statistics.quantiles(ratios, n=4) for name, ratios in (("wall", wall), ("processor", processor))
    }


def everything(pack, families, samplers: Sequence[str], schedulers: Sequence[str]) -> dict:
    """Our routing, three experts: all samplers, schedulers and STEPS, at denoise 1, 0.7 and 0.3, for each kind of prediction."""
    found = {}
    for prediction in families.PREDICTIONS:
        calls = []
        experts = [families.marked(prediction, mark, calls) for mark in range(3)]
        edges = families.edges(experts[0], 3)
        ensemble = families.routed(pack, experts, edges)
        counts = found[prediction] = {"runs": 0, "calls": 0, "wrong": 0}
        for sampler, scheduler, steps, denoise in itertools.product(samplers, schedulers, STEPS, (1.0, 0.7, 0.3)):
            calls.clear()
            image = torch.full((1, 4, 1, 1), 0.5)
            families.sample(ensemble, NOTHING, NOTHING, image, sampler, scheduler, steps, 1.0, denoise)
            counts["runs"] += 1
            counts["calls"] += len(calls)
            counts["wrong"] += sum(mark != families.owner(sigma, edges) for mark, sigma in calls)
        print(f"{prediction}: {counts['runs']:,} runs, {counts['calls']:,} calls, {counts['wrong']} wrong", flush=True)
    return found


def quiet(way: Callable) -> Callable:
    def silenced(*args):
        with contextlib.redirect_stdout(io.StringIO()):
            return way(*args)

    return silenced


def measure(pack, families, found: dict[str, Callable], pairs: int) -> dict:
    from comfy.samplers import SAMPLER_NAMES as samplers
    from comfy.samplers import SCHEDULER_NAMES as schedulers

    wan, plain = families.families(pack)["wan"], found["one MODEL"]
    whole = [dict(sampler=a, scheduler=b, steps=c) for a, b, c in itertools.product(samplers, schedulers, STEPS)]
    partly = [dict(sampler=a, steps=20, denoise=b) for a, b in itertools.product(samplers, DENOISE)]
    # up over the boundary twice
    climbing = torch.tensor([1.0, 0.95, 0.7, 0.93, 0.98, 0.5, 0.9, 0.4, 0.3, 0.1, 0.0])
    back = [dict(sampler=a, sigmas=climbing) for a in samplers]
    results, expected = {"ways": {}}, with_equal_experts(plain, wan, samplers)
    for name, way in found.items():
        images = list(zip(with_equal_experts(way, wan, samplers), expected, strict=True))
        measured = memory(way, families, wan, experts=1 if way is plain else 2)
        measured["equal"] = {
            "near": sum(float((image - one).norm() / one.norm()) < EQUAL for image, one in images),
            "exact": sum(torch.equal(image, one) for image, one in images),
            "of": len(samplers),
        }
        if way is not plain:
            measured |= {
                "calls": wrong_calls(way, families, whole),
                "denoise": wrong_calls(way, families, partly),
                "climbing": wrong_calls(way, families, back),
            }
        results["ways"][name] = measured
        print(f"measured: {name}: {measured}", file=sys.stderr)

    family = families.families(pack)["sd15"]
    image = torch.zeros(1, 4, 32, 32)
    settings = Settings(image, family.conditioning(2), family.conditioning(3), "dpmpp_2m", steps=6, cfg=4.0)
    pair = [family.model(1), family.model(1)]
    results["overhead"] = overhead(*both(families, pack, pair), settings, pairs)
    settings = Settings(torch.zeros(1, 4, 1, 1), NOTHING, NOTHING, "dpmpp_2m", steps=50)
    pair = [families.marked("eps", 1, []), families.marked("eps", 1, [])]
    results["overhead of nothing"] = overhead(*both(families, pack, pair), settings, pairs)
    return results


def both(families, pack, experts: Sequence) -> tuple[Callable, Callable]:
    """A run of the first of two equal experts, and of both of them joined; each (settings) -> image."""
    ensemble = families.routed(pack, experts, families.edges(experts[0], 2))

    def run(model):
        return lambda s: families.sample(model, s.positive, s.negative, s.image, s.sampler, s.scheduler, s.steps, s.cfg)

    return run(experts[0]), run(ensemble)


def table(results: dict) -> str:
    """The results as Markdown."""

    def calls(found: dict, key: str) -> str:
        if key not in found:
            return "-"
        return "no such input" if found[key] is None else f"{found[key]['wrong']:,} of {found[key]['calls']:,}"

    rows = [
        "| way | samplers equal to one MODEL (bit-equal) | calls of the wrong expert | at denoise 0.7, 0.5, 0.3 | "
        "sigmas that climb back | copies of the weights | the MODELs after a run |",
        "| --- " * 7 + "|",
    ]
    for name, found in results["ways"].items():
        equal, changed = found["equal"], ", ".join(found["changed"])
        rows.append(
            f"| {name} | {equal['near']} ({equal['exact']}) of {equal['of']} | {calls(found, 'calls')} | "
            f"{calls(found, 'denoise')} | {calls(found, 'climbing')} | {found['copies']} | "
            f"{'changed: ' + changed if changed else 'as before'} |"
        )
    o, nothing = results["overhead"], results["overhead of nothing"]
    rows += [
        "",
        f"Time with our routing over time of one MODEL, {o['pairs']} alternating pairs, calls of {o['call_ms']:.0f} ms: "
        + "; ".join(
            "{} {:.3f} [{:.3f}, {:.3f}]".format(kind, *(o[kind][i] for i in (1, 0, 2)))
            for kind in ("wall", "processor")
        )
        + f" (median and quartiles). Beside a network that costs nothing: {nothing['extra_ms']:.2f} ms a call.",
    ]
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wan-moe", type=Path, metavar="FOLDER")
    parser.add_argument("--everything", action="store_true")
    parser.add_argument("--pairs", type=int, default=30, help="of runs that the overhead is measured on (30)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="the numbers as well")
    options = parser.parse_args()
    sys.argv = sys.argv[:1]  # ComfyUI reads it too

    pack = load_pack()
    import comfy.utils
    import comfyui_version
    import families

    comfy.utils.PROGRESS_BAR_ENABLED = False
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    with torch.inference_mode():
        found = {name: quiet(way) for name, way in ways(pack, families, options.wan_moe).items()}
        results = measure(pack, families, found, options.pairs)
        print(
            f"ComfyUI {comfyui_version.__version__}, torch {torch.__version__}, {date.today()}\n\n{table(results)}",
            flush=True,
        )
        if options.everything:
            from comfy.samplers import SAMPLER_NAMES, SCHEDULER_NAMES

            results["everything"] = everything(pack, families, SAMPLER_NAMES, SCHEDULER_NAMES)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
