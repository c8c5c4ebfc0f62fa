"""T5 and CLIP-L as files that ComfyUI's own loaders take, and the same weights as a folder of encoders. All of them tiny."""

import functools
import shutil
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import load_file, save_file

from .random_encoders import write_clip, write_t5

T5 = dict(width=14, heads=2, channels=8, hidden=20, layers=2)
CLIP = dict(
    text=12, embedding=12, layers=3
)  # ComfyUI's CLIP-L projects to its own width, and SD3 reads its last but one layer
OPTIONS = {
    "t5xxl_model_config": dict(d_model=14, num_heads=2, d_kv=8, d_ff=20, num_layers=2),
    "clip_l_model_config": dict(hidden_size=12, intermediate_size=48, num_attention_heads=2, num_hidden_layers=3),
}
XXL = "encoder.block.23.layer.1.DenseReluDense.wi_1.weight"  # by whose 10240 rows ComfyUI tells T5-XXL


def write_stock(pack, folder):
    """.encoders: a folder of encoders; .t5 and .clip: the same weights as single files; .bare: CLIP without projection."""
    import comfy.sd1_clip

    encoders = folder / "encoders"
    tokenizers = Path(comfy.sd1_clip.__file__).parent / "text_encoders" / "t5_tokenizer"
    write_t5(encoders / "t5", 3, **T5, vocabulary=32128)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tokenizers / name, encoders / "t5" / name)
    write_clip(encoders / "clip", 3, quick_gelu=True, **CLIP, vocabulary=49408)
    (encoders / "clip" / "bpe_merges.txt.gz").unlink()  # then it is OpenAI's

    t5 = load_file(encoders / "t5" / "model.safetensors")
    clip, _ = pack.module("bridge_encoders").clip_weights(encoders)
    clip = {name: weight.contiguous().clone() for name, weight in clip.items()}
    files = SimpleNamespace(
        encoders=encoders, **{name: folder / f"{name}.safetensors" for name in ("t5", "clip", "bare")}
    )
    save_file(t5 | {XXL: torch.empty(10240, 0)}, files.t5)
    save_file(clip, files.clip)
    save_file({name: weight for name, weight in clip.items() if "projection" not in name}, files.bare)
    return files


@functools.cache
def stock(kind: str, *files):
    """`load_stock`, once: for tests that leave it as it is."""
    return load_stock(kind, *files)


def load_stock(kind: str, *files, **options):
    """What the nodes Load CLIP and DualCLIPLoader load."""
    import comfy.sd

    sizes = {name: dict(config) for name, config in OPTIONS.items()}
    # ComfyUI's loader of a CLIP-L starts from this one
    sizes["model_config"] = dict(sizes["clip_l_model_config"])
    kinds = comfy.sd.CLIPType
    return comfy.sd.load_clip([str(file) for file in files], None, kinds[kind.upper()], sizes | options)
