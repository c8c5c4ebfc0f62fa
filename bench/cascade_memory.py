"""What enlarging a large picture in tiles takes of memory and time, on the CPU.

    python bench/cascade_memory.py [--sizes 1024,2048,4096] [--tile 512] [--steps 2] [--ensemble FOLDER]

For each size, pictures of a quarter of it are enlarged to it in a process of its own, which says:

    peak    most memory above the baseline, by the kernel's own record (VmHWM, set back after the baseline)
    whole   most memory of the process, the baseline with it
    images  how many images of the size, in float32 as the sampler holds them, would fill the peak

The baseline is taken after a picture of one tile was enlarged: libraries and weights are in it. Without --ensemble the network
is the preset demo-sr1024 with random weights, written into a temporary folder: memory depends on its shape only.
"""

import argparse
import gc
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def resident(field: str) -> int:
    """Bytes in /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(f"{field}:")))


def write(folder: Path) -> None:
    """An ensemble of one network of the demo's shape."""
    import torch

    sys.path.insert(0, str(ROOT))
    from ediffi_core.checkpoint import NetworkHeader, save_network, write_ensemble
    from ediffi_core.efficient_unet import PRESETS, EfficientUNet
    from ediffi_core.intervals import EVERYTHING

    torch.manual_seed(0)
    config = PRESETS["demo-sr1024"]
    save_network(folder / "all.safetensors", EfficientUNet(config).state_dict(), NetworkHeader(config, kind="sr1024"))
    write_ensemble(folder, [("all.safetensors", EVERYTHING)], "sr1024")


def measured(folder: Path, size: int, tile: int, settings: dict) -> dict[str, float]:
    import torch

    sys.path.insert(0, str(ROOT))
    from ediffi_core.checkpoint import load_ensemble, read_ensemble, read_header
    from ediffi_core.conditioning import CLIP_LENGTH, T5_LENGTH, Conditioning
    from ediffi_core.pipeline import SR_DEFAULTS, upscale

    config = read_header(read_ensemble(folder).paths[0]).config
    conditioning = Conditioning(
        clip_tokens=torch.zeros(1, CLIP_LENGTH, config.clip_width),
        clip_mask=torch.ones(1, CLIP_LENGTH, dtype=torch.bool),
        clip_pooled=torch.zeros(1, config.pooled_width),
        t5_tokens=torch.zeros(1, T5_LENGTH, config.t5_width),
        t5_mask=torch.ones(1, T5_LENGTH, dtype=torch.bool),
        image=torch.zeros(1, config.image_width),
        image_strength=torch.zeros(1),
    )
    ensemble, settings = load_ensemble(folder), SR_DEFAULTS._replace(**settings)

    def enlarge(size: int) -> None:
        images = torch.rand(1, 3, size // 4, size // 4, generator=torch.Generator().manual_seed(0)) * 2 - 1
        for step in upscale(images, conditioning, ensemble, settings=settings, tile=tile):
            picture = step.images()
        assert picture.shape == (1, 3, size, size)

    enlarge(tile)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from here
    before, start = resident("VmRSS"), time.perf_counter()
    enlarge(size)
    whole = resident("VmHWM")
    return {"baseline": before, "peak": whole - before, "whole": whole, "seconds": time.perf_counter() - start}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--ensemble", type=Path)
    parser.add_argument("--sizes", default="1024,2048,4096")
    parser.add_argument("--tile", type=int, default=512)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--sampler", default="heun")
    parser.add_argument("--guidance-scale", type=float, default=1.0)
    parser.add_argument("--measure", type=int, help=argparse.SUPPRESS)  # in the process of one size
    options = parser.parse_args()
    settings = {"steps": options.steps, "sampler": options.sampler, "guidance_scale": options.guidance_scale}
    if options.measure:
        print(json.dumps(measured(options.ensemble, options.measure, options.tile, settings)))
        return

    with tempfile.TemporaryDirectory() as temporary:
        folder = options.ensemble or Path(temporary)
        if options.ensemble is None:
            write(folder)
        print(f"{'size':>6}{'peak':>12}{'whole':>12}{'images':>9}{'time':>10}{'baseline':>12}")
        for size in options.sizes.split(","):
            command = [sys.executable, __file__, "--measure", size, "--ensemble", str(folder), *sys.argv[1:]]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            found = json.loads(output.splitlines()[-1])
            peak, whole, baseline = (found[name] / 1e9 for name in ("peak", "whole", "baseline"))
            images = found["peak"] / (3 * 4 * int(size) ** 2)
            print(
                f"{size:>6}{peak:>9.2f} GB{whole:>9.2f} GB{images:>9.1f}{found['seconds']:>8.0f} s{baseline:>9.2f} GB",
                flush=True,
            )


if __name__ == "__main__":
    main()
