"""What the paper's size takes of time and memory, stage by stage, with random weights: a call, another expert, torch.compile.

    python bench/paper_size.py [--device cuda] [--dtype bfloat16] [--stages base sr256 sr1024] [--calls 5] [--compile] [--json FILE]

A call is one step of a sampler over a whole picture: guided in the base stage, two rows; one row in the others. Another expert
is all weights copied to the device from pinned memory, and ahead is what a call takes longer when that copy runs beside
it, on a stream of its own: what a change costs where the expert is fetched in time. Seconds are medians, but of what is
done once. The peak is the device's; on a CPU, where nothing is copied, the process's, so each stage has a process.
--size tiny tries the script.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path += [str(ROOT), str(ROOT / "tests" / "support")]

from cascade_memory import resident  # noqa: E402
from tiny import random_conditioning, random_super_resolution  # noqa: E402

from ediffi_core.checkpoint import KINDS  # noqa: E402
from ediffi_core.guidance import guided  # noqa: E402
from ediffi_core.preconditioning import Denoiser  # noqa: E402
from ediffi_core.training.recipe import PRESETS  # noqa: E402

SIDES = {"base": 64, "sr256": 256, "sr1024": 1024}  # pixels
SIGMA = 5.0
GIB = 2**30


def measured(stage: str, options: argparse.Namespace) -> dict:
    """One stage, in a process that has done nothing before."""
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    name = "tiny" if (options.size, stage) == ("tiny", "base") else f"{options.size}-{stage}"
    config, side = PRESETS[name], SIDES[stage]
    torch.manual_seed(0)
    network = KINDS[stage].network(config, device=device, dtype=dtype).eval().requires_grad_(False)
    weights = list(network.parameters())
    row = {"stage": stage, "side": side, "weights": sum(one.numel() for one in weights)}
    row["GiB of weights"] = sum(one.nbytes for one in weights) / GIB
    if stage == "base":
        denoise, conditioning = guided(Denoiser(network), 5.0), random_conditioning(1, config=config)
    else:
        denoise, conditioning = Denoiser(network), random_super_resolution(1, side, side, config=config)
    conditioning = conditioning.to(device=device, dtype=dtype)
    x, sigma = SIGMA * torch.randn(1, 3, side, side, device=device), torch.tensor([SIGMA], device=device)

    def call() -> None:
        assert denoise(x, sigma, conditioning).isfinite().all()

    def seconds(work: Callable[[], None]) -> float:
        wait(device)
        began = time.perf_counter()
        work()
        wait(device)
        return time.perf_counter() - began

    def usual(work: Callable[[], None]) -> float:
        return statistics.median(seconds(work) for _ in range(options.calls))

    with torch.inference_mode():
        row["first call, s"] = seconds(call)
        row["call, s"] = usual(call)
        row["GiB at its peak"] = peak(device)
        if device.type == "cuda":
            row |= changed(weights, call, row["call, s"], usual)
        if options.compile:
            network.compile()
            row["compiling, s"] = seconds(call)
            row["compiled call, s"] = usual(call)
    return row


def changed(weights: list[torch.Tensor], call: Callable[[], None], alone: float, usual: Callable) -> dict[str, float]:
    """What another expert costs, before a call and beside it. alone: seconds of the call by itself."""
    kept = [torch.empty(one.shape, dtype=one.dtype, pin_memory=True).copy_(one) for one in weights]
    other = [torch.empty_like(one) for one in weights]  # beside the ones that work
    stream = torch.cuda.Stream()

    def copy() -> None:
        for to, of in zip(other, kept, strict=True):
            to.copy_(of, non_blocking=True)

    def beside() -> None:
        with torch.cuda.stream(stream):
            copy()
        call()

    return {"another expert, s": usual(copy), "ahead, s": usual(beside) - alone}


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def peak(device: torch.device) -> float:
    return (torch.cuda.max_memory_allocated() if device.type == "cuda" else resident("VmHWM")) / GIB


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--stages", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--size", choices=("paper", "demo", "tiny"), default="paper")
    parser.add_argument("--calls", type=int, default=5)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = []
    for stage in options.stages:
        with ProcessPoolExecutor(1, get_context("spawn")) as own:
            rows.append(own.submit(measured, stage, options).result())
        shown = (f"{name} {one:.3g}" if isinstance(one, float) else f"{name} {one}" for name, one in rows[-1].items())
        print(", ".join(shown), flush=True)
    if options.json:
        on = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
        settings = {"device": on, "torch": torch.__version__, "dtype": options.dtype, "size": options.size}
        options.json.write_text(json.dumps({"settings": settings, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
