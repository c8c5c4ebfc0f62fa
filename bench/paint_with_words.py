"""What paint-with-words costs: one guided call of a U-Net of SD1.5's real size, painted against plain, in alternating pairs.

    python bench/paint_with_words.py [--comfyui FOLDER] [--pairs 7] [--dtype bfloat16] [--json FILE]

Random weights: time does not depend on them. Ratios are medians over pairs of (painted, plain) calls, one directly after
the other, of wall time on a GPU and of the process's own time on a CPU, which other programs do not disturb; memory is the peak of tensors that a call holds beyond what was there before it, as PyTorch's profiler counts
it. Beside ours stands ComfyUI's own way of regions, masked conditionings, which adds a row of the network for each.
"""

import argparse
import asyncio
import gc
import json
import math
import os
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SD15 = dict(
    image_size=32, in_channels=4, out_channels=4, model_channels=320, num_res_blocks=[2, 2, 2, 2], num_heads=8,
    channel_mult=[1, 2, 4, 4], transformer_depth=[1, 1, 1, 1, 1, 1, 0, 0], transformer_depth_middle=1,
    transformer_depth_output=[1] * 9 + [0] * 3, use_spatial_transformer=True, legacy=False, context_dim=768,
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--comfyui", type=Path, default=os.environ.get("COMFYUI_DIR", Path.home() / "comfy" / "ComfyUI")
    )
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    sys.path.insert(0, str(options.comfyui))
    import torch
    from comfy.cli_args import args

    args.cpu = not torch.cuda.is_available()
    bench = Bench(getattr(torch, options.dtype), options.pairs)
    rows = bench.rows()
    print(f"\n{'':46}{'time':>8}{'spread':>16}{'memory':>8}{'rows':>6}")
    for row in rows:
        spread = f"{row['low']:.2f} .. {row['high']:.2f}"
        print(f"{row['what']:46}{row['time']:8.3f}{spread:>16}{row['memory']:8.3f}{row['rows']:6}")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


class Bench:
    def __init__(self, dtype, pairs: int) -> None:
        import comfy.model_management
        import comfy.model_patcher
        import comfy.supported_models as supported
        import torch

        import nodes

        asyncio.run(nodes.load_custom_node(str(ROOT)))
        name = str(ROOT).replace(".", "_x_")
        self.painting = sys.modules[f"{name}.nodes.bridge_painting"]
        self.maps = sys.modules[f"{name}.ediffi_core.attention_maps"]
        self.method = sys.modules[f"{name}.ediffi_core.paint_with_words"]
        config = supported.SD15({**supported.SD15.unet_config, **SD15, "dtype": dtype})
        config.set_inference_dtype(dtype, None)
        with torch.no_grad():
            model = config.get_model({})
            for parameter in model.diffusion_model.parameters():
                parameter.normal_(0, parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.02)
        device = comfy.model_management.get_torch_device()
        self.model = comfy.model_patcher.CoreModelPatcher(model, device, comfy.model_management.unet_offload_device())
        self.pairs, self.device = pairs, device
        self.clock = time.perf_counter if device.type == "cuda" else time.process_time

    def conditioning(self, tokens: int, seed: int) -> list:
        import torch

        generator = torch.Generator().manual_seed(seed)
        return [[torch.randn(1, tokens, 768, generator=generator), {"pooled_output": torch.zeros(1, 768)}]]

    def masks(self, count: int) -> list:
        """So many upright stripes of a picture of 512 pixels."""
        import torch

        masks = torch.zeros(count, 1, 512, 512)
        for i in range(count):
            masks[i, ..., i * 512 // count : (i + 1) * 512 // count] = 1
        return list(masks)

    def rows(self) -> list[dict]:
        result = []
        for tokens in (77, 192):
            plain = self.conditioning(tokens, 1)
            for count in (1, 4, 16):
                regions = [
                    self.method.Region(f"{i}", mask, (1 + 2 * i, 2 + 2 * i)) for i, mask in enumerate(self.masks(count))
                ]
                painted = self.painting.painted_with(plain, regions, 0)
                result.append(self.compare(f"{tokens} tokens, {count} regions", tokens, painted))
        longer = self.painting.painted_with(self.conditioning(154, 1), regions[:4], 0)
        result.append(self.compare("prompt of 154 tokens, negative of 77", 77, longer, self.conditioning(154, 1)))
        result.append(self.compare("attention maps of 4 phrases", 77, self.conditioning(77, 1), maps=True))
        masked = [
            [tokens, {**values, "mask": mask, "mask_strength": 1.0}]
            for i, mask in enumerate(self.masks(4))
            for tokens, values in self.conditioning(77, i)
        ]
        result.append(self.compare("ComfyUI's masked conditionings, 4 regions", 77, masked))
        return result

    def compare(self, what: str, tokens: int, positive: list, plain: list | None = None, maps: bool = False) -> dict:
        negative, plain = self.conditioning(tokens, 2), plain or self.conditioning(tokens, 1)
        ours = self.painting.obeying(self.model)
        if maps:
            noted = self.maps.AttentionMaps(("a", "b", "c", "d"))
            ours = self.painting.recording(self.model, noted, [(1, 2), (3,), (4, 5), (6,)], tokens, 1)
        calls = (lambda: self.call(ours, positive, negative)), (lambda: self.call(self.model, plain, negative))
        rows = [call()[1] for call in calls]  # warm
        ratios = []
        for pair in range(self.pairs):
            seconds = {}
            for which in (0, 1) if pair % 2 else (1, 0):
                started = self.clock()
                calls[which]()
                seconds[which] = self.clock() - started
            ratios.append(seconds[0] / seconds[1])
        memory = self.peak(calls[0]) / self.peak(calls[1])
        row = dict(
            what=what, time=statistics.median(ratios), low=min(ratios), high=max(ratios), memory=memory, rows=rows[0]
        )
        print(f"{what}: {row['time']:.3f}", file=sys.stderr, flush=True)
        return row

    def call(self, model, positive, negative):
        """(prediction, rows that the network saw) of one step at sigma 3."""
        import comfy.sample
        import comfy.samplers
        import torch

        seen = []

        def count(function, arguments):
            seen.append(len(arguments["input"]))
            return function(arguments["input"], arguments["timestep"], **arguments["c"])

        model = model.clone()
        model.set_model_unet_function_wrapper(count)
        noise = torch.randn(1, 4, 64, 64, generator=torch.Generator().manual_seed(0))
        sampler, sigmas = comfy.samplers.sampler_object("euler"), torch.tensor([3.0, 0.0])
        with torch.inference_mode():
            settings = (model, noise, 7.0, sampler, sigmas, positive, negative, torch.zeros_like(noise))
            result = comfy.sample.sample_custom(*settings, disable_pbar=True, seed=1)
        return result, sum(seen)

    def peak(self, call) -> float:
        """Bytes held at once by a call."""
        import torch

        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            call()
            return torch.cuda.max_memory_allocated() - before
        gc.collect()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            call()
        held = top = 0
        for event in profile.profiler.kineto_results.events():
            if event.name() == "[memory]":
                held += event.nbytes()
                top = max(top, held)
        return top if top > 0 else math.nan


if __name__ == "__main__":
    main()
