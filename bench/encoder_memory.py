"""What a T5 in 16 bits takes of memory and time: written, loaded, used and dropped, in ComfyUI and without it, on the CPU.

    python bench/encoder_memory.py [--layers 24] [--width 4096] [--ways comfyui,core] [--folder FOLDER]

Writes a T5 v1.1 of random bfloat16 weights into a temporary folder (in FOLDER; of T5-XXL's shape it takes 9.5 GB), in parts of
2 GB with an index, beside the demo family's CLIP and tokenizers. Each way runs in a process of its own and says:

    peak    most memory above the baseline, by the kernel's own record (VmHWM, set back after the baseline), while the
            encoders are loaded and a prompt is encoded; it counts pages of mapped files like any other memory
    file    how much of what is resident after the prompt are such pages (RssFile), which the kernel may drop
    left    what is resident above the baseline after the encoders are dropped

The baseline is taken after the demo family's encoders were loaded, used and dropped: libraries, pools and tokenizers are in
it. ComfyUI is COMFYUI_DIR or ~/comfy/ComfyUI.
"""

import argparse
import asyncio
import gc
import importlib
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COMFY = Path(os.environ.get("COMFYUI_DIR", Path.home() / "comfy" / "ComfyUI"))
DEMO = ROOT / "demo" / "encoders" / "shapeworld"
PROMPT = "a big red star in front of a striped background, and a small green circle to the left of a blue square"
PART = 2 * 10**9  # bytes
VOCABULARY = 32128


def shapes(layers: int, width: int) -> dict[str, tuple[int, ...]]:
    """Of T5 v1.1: the large ones have 64 channels in each head, and 2.5 times the width between the layers."""
    heads, hidden = width // 64, width * 5 // 2
    found = {
        "shared.weight": (VOCABULARY, width),
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": (32, heads),
        "encoder.final_layer_norm.weight": (width,),
    }
    for i in range(layers):
        attention, feed_forward = (f"encoder.block.{i}.layer.{j}" for j in range(2))
        found |= {f"{attention}.SelfAttention.{name}.weight": (heads * 64, width) for name in "qkv"}
        found |= {
            f"{attention}.SelfAttention.o.weight": (width, heads * 64),
            f"{attention}.layer_norm.weight": (width,),
            f"{feed_forward}.DenseReluDense.wi_0.weight": (hidden, width),
            f"{feed_forward}.DenseReluDense.wi_1.weight": (hidden, width),
            f"{feed_forward}.DenseReluDense.wo.weight": (width, hidden),
            f"{feed_forward}.layer_norm.weight": (width,),
        }
    return found


def write(folder: Path, layers: int, width: int, part: int = PART) -> int:
    """A folder of encoders with such a T5. Returns the bytes of its weights."""
    import torch
    from safetensors.torch import save_file

    shutil.copytree(DEMO / "clip", folder / "clip")
    (folder / "t5").mkdir()
    for file in (DEMO / "t5").iterdir():
        if "token" in file.name:
            shutil.copyfile(file, folder / "t5" / file.name)
    heads = width // 64
    config = dict(
        model_type="t5", d_model=width, d_kv=64, d_ff=width * 5 // 2, num_heads=heads, num_layers=layers,
        vocab_size=VOCABULARY, feed_forward_proj="gated-gelu", tie_word_embeddings=False,
    )  # fmt: skip
    (folder / "t5" / "config.json").write_text(json.dumps(config))

    # numbers enough for any row; drawing 5 billion would take longer than all that is measured
    numbers = torch.randn(2**24 + 1, generator=torch.Generator().manual_seed(0)).bfloat16()
    place: dict[str, str] = {}
    total, held, weights = 0, 0, {}
    for name, shape in shapes(layers, width).items():
        scale = 1.0 if name == "shared.weight" else shape[-1] ** -0.5
        weights[name] = torch.ones(shape, dtype=torch.bfloat16)
        if len(shape) > 1:
            for values in weights[name].view(-1).split(len(numbers)):
                values.copy_(numbers[: len(values)]).mul_(scale)
        held += 2 * math.prod(shape)
        if held >= part:
            total += held
            save(folder / "t5", weights, place, save_file)
            held, weights = 0, {}
    if weights:
        save(folder / "t5", weights, place, save_file)
    (folder / "t5" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": place}))
    return total + held


def save(folder: Path, weights: dict, place: dict[str, str], save_file: Callable) -> None:
    file = f"model-{len(set(place.values())) + 1:05}.safetensors"
    save_file(weights, folder / file)
    place.update(dict.fromkeys(weights, file))


def resident(*fields: str) -> int:
    """Bytes in /proc/self/status, all fields together."""
    lines = Path("/proc/self/status").read_text().splitlines()
    values = {line.split(":")[0]: line.split(":")[1].split() for line in lines}
    return sum(1024 * int(values[field][0]) for field in fields)


def measured(load: Callable, encode: Callable) -> dict[str, float]:
    """Bytes and seconds of loading encoders, encoding the prompt and dropping them again."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from here
    before, start = resident("VmRSS"), time.perf_counter()
    encoders = load()
    loaded = time.perf_counter()
    encode(encoders)
    encoded = time.perf_counter()
    peak, file = resident("VmHWM"), resident("RssFile")
    del encoders
    gc.collect()
    return {
        "baseline": before,
        "peak": peak - before,
        "file": file,
        "left": resident("VmRSS") - before,
        "load_s": loaded - start,
        "encode_s": encoded - loaded,
    }


def in_comfyui(folder: Path) -> dict[str, float]:
    sys.path.insert(0, str(COMFY))
    from comfy.cli_args import args

    args.cpu = True  # before any other ComfyUI import: model_management chooses a device when imported
    args.base_directory = tempfile.mkdtemp()
    import nodes

    assert asyncio.run(nodes.load_custom_node(str(ROOT))), "ComfyUI could not load the pack."
    combine = importlib.import_module(f"{str(ROOT).replace('.', '_x_')}.nodes.bridge_combine")

    def encode(clip) -> None:
        clip.encode_from_tokens_scheduled(clip.tokenize(PROMPT))

    measured(lambda: combine.load_text_encoders(DEMO), encode)
    return measured(lambda: combine.load_text_encoders(folder), encode)


def in_core(folder: Path) -> dict[str, float]:
    import torch

    sys.path.insert(0, str(ROOT))
    from ediffi_core.encoders import load_encoders

    def encode(encoders) -> None:
        encoders.encode_text([PROMPT])

    measured(lambda: load_encoders(DEMO), encode)
    return measured(lambda: load_encoders(folder, dtype=torch.bfloat16), encode)


WAYS = {"comfyui": in_comfyui, "core": in_core}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--ways", default=",".join(WAYS))
    parser.add_argument("--folder", type=Path, help="where there is room; the system's temporary folder if left out")
    parser.add_argument("--measure", choices=WAYS, help=argparse.SUPPRESS)  # in the process of one way
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(WAYS[options.measure](options.folder)))
        return

    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        folder = Path(temporary) / "encoders"
        start = time.perf_counter()
        size = write(folder, options.layers, options.width)
        print(
            f"T5 of {options.layers} layers, width {options.width}: {size / 1e9:.2f} GB, {time.perf_counter() - start:.0f} s to write"
        )
        print(f"{'':10}{'peak':>10}{'of file':>9}{'mapped':>10}{'left':>10}{'load':>9}{'encode':>9}{'baseline':>11}")
        for way in options.ways.split(","):
            command = [sys.executable, __file__, "--measure", way, "--folder", str(folder)]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            found = json.loads(output.splitlines()[-1])
            peak, mapped, left, baseline = (found[name] / 1e9 for name in ("peak", "file", "left", "baseline"))
            print(
                f"{way:10}{peak:>7.2f} GB{1e9 * peak / size:>9.3f}{mapped:>7.2f} GB{left:>7.2f} GB{found['load_s']:>7.1f} s"
                f"{found['encode_s']:>7.1f} s{baseline:>8.2f} GB"
            )


if __name__ == "__main__":
    main()
