"""Training pairs of latent models: latents with embedded captions, given or made of pictures, and files written whole."""

import bisect
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from .branch_recipe import BranchRecipe

SHARD = 512  # pairs per file
PICTURES = {".png", ".jpg", ".jpeg", ".webp"}


class Batch(NamedTuple):
    latents: Tensor  # (B, C, H, W) of unit scale
    tokens: Tensor  # (B, L, E)
    pooled: Tensor | None  # (B, P), and
    time_ids: Tensor | None  # (B, 6): what SDXL is told besides

    def to(self, device) -> "Batch":
        return Batch(*(None if one is None else one.to(device) for one in self))

    def rows(self, which: slice) -> "Batch":
        return Batch(*(None if one is None else one[which] for one in self))


class LatentPairs:
    """Latents and embedded captions in safetensors files, read row by row, so only a batch is in memory.

    A file holds `latents` (n, C, H, W) and `tokens` (n, L, E); for SDXL also `pooled` (n, P) and `time_ids` (n, 6); and what
    an empty caption gives, `null_tokens` (L, E) and `null_pooled` (P).
    """

    def __init__(self, path: str | Path, held_out: int = 0) -> None:
        path = Path(path)
        paths = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
        if not paths:
            raise FileNotFoundError(f"There are no pairs at {path}: neither a .safetensors file nor a folder of them.")
        self.files = [safe_open(one, framework="pt") for one in paths]
        self.names = set(self.files[0].keys())
        for name in ("latents", "tokens"):
            if name not in self.names:
                raise ValueError(
                    f"{paths[0].name} holds no tensor {name!r}. Pairs are latents and tokens; see docs/branching.md."
                )
        counts = [file.get_slice("latents").get_shape()[0] for file in self.files]
        self.starts = [sum(counts[:i]) for i in range(len(counts) + 1)]
        if not 0 <= held_out < len(self):
            raise ValueError(f"{held_out} pairs are to be held out, but there are {len(self)}. Leave some to train on.")
        self.held_out = torch.arange(len(self) - held_out, len(self))
        self.trained = len(self) - held_out

    def __len__(self) -> int:
        return self.starts[-1]

    def shape(self, name: str) -> list[int]:
        return self.files[0].get_slice(name).get_shape()

    def check(self, unet) -> None:
        """Raise ValueError unless the pairs fit the network."""
        wanted = {("latents", 1): unet.config.in_channels, ("tokens", 2): unet.config.cross_attention_dim}
        for (name, axis), expected in wanted.items():
            found = self.shape(name)[axis]
            if found != expected:
                raise ValueError(
                    f"The pairs' {name} are {found} wide, and the network takes {expected}. They were made for another model."
                )
        if unet.config.addition_embed_type == "text_time" and not {"pooled", "time_ids"} <= self.names:
            raise ValueError(
                "The network is an SDXL, and the pairs lack pooled or time_ids. They were made for another model."
            )

    def batch(self, rows: Tensor, dropped: Tensor | None = None) -> Batch:
        """rows: (B,) numbers of pairs; dropped: (B,) bool, whose caption is left out. All in float32."""
        found: dict[str, list[Tensor]] = {}
        for place, row in enumerate(rows.tolist()):
            which = bisect.bisect_right(self.starts, row) - 1
            file, at = self.files[which], row - self.starts[which]
            left_out = dropped is not None and bool(dropped[place])
            for name in Batch._fields:
                if name not in self.names:
                    continue
                if left_out and name in ("tokens", "pooled"):
                    if f"null_{name}" not in self.names:
                        raise ValueError(
                            f"Captions are to be left out, but the pairs do not hold what an empty one gives, null_{name}. "
                            f"Add it, or set dropout = 0."
                        )
                    value = file.get_tensor(f"null_{name}")
                else:
                    value = file.get_slice(name)[at : at + 1][0]
                found.setdefault(name, []).append(value.float())
        return Batch(*(torch.stack(found[name]) if name in found else None for name in Batch._fields))


def prepare(recipe: BranchRecipe, folder: str | Path, device: str = "cpu") -> Iterator[tuple[int, int]]:
    """Encode the recipe's pictures and captions into `folder`; yields (pairs done, pairs in all) after each file.

    A picture is scaled and cut to the square of the resolution, around its middle. Files that are already there are kept;
    those of other pictures, captions or settings are refused.
    """
    source, folder = Path(recipe.data.pictures), Path(folder)
    pictures = sorted(path for path in source.rglob("*") if path.suffix.lower() in PICTURES)
    if not pictures:
        raise FileNotFoundError(f"There are no pictures in {source} ({', '.join(sorted(PICTURES))}).")
    for picture in pictures:
        if not picture.with_suffix(".txt").is_file():
            raise FileNotFoundError(
                f"{picture} has no caption: there is no {picture.with_suffix('.txt').name} beside it."
            )
    captions = [picture.with_suffix(".txt").read_text(encoding="utf-8").strip() for picture in pictures]
    encoders = Path(recipe.data.encoders or recipe.model.path)
    if not (encoders / "vae").is_dir():
        raise ValueError(
            f"The pictures need a VAE and text encoders, and {encoders} is no folder with vae, text_encoder and tokenizer in it. "
            f"Name one in diffusers' layout as encoders."
        )
    listed = [(str(p.relative_to(source)), p.stat().st_size, c) for p, c in zip(pictures, captions, strict=True)]
    settings = {
        "resolution": recipe.data.resolution,
        "encoders": encoders.name,
        "pictures": hashlib.sha256(json.dumps(listed).encode()).hexdigest(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    described = folder / "pairs.json"
    if described.is_file() and json.loads(described.read_text(encoding="utf-8")) != settings:
        raise ValueError(
            f"{folder} holds pairs of other pictures, captions or settings. Remove it to make them again, or use another name."
        )
    write_json(described, settings)
    encode = None
    for start in range(0, len(pictures), SHARD):
        end = min(start + SHARD, len(pictures))
        path = folder / f"pairs-{start // SHARD:05d}.safetensors"
        if not path.is_file():
            encode = encode or _encoder(encoders, recipe.data.resolution, device)
            write(path, encode(pictures[start:end], captions[start:end]), {})
        yield end, len(pictures)


def _encoder(folder: Path, resolution: int, device: str):
    """A function of pictures' paths and captions to the tensors of a file of `LatentPairs`, float16."""
    with needs("Encoding pictures"):
        import numpy as np
        from diffusers import AutoencoderKL
        from PIL import Image, ImageOps
        from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer
    vae = AutoencoderKL.from_pretrained(folder, subfolder="vae", local_files_only=True).to(device).eval()
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
    text = CLIPTextModel.from_pretrained(folder / "text_encoder", local_files_only=True).to(device).eval()
    second = None
    if (folder / "text_encoder_2").is_dir():
        second_tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer_2", local_files_only=True)
        second = CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder_2", local_files_only=True)
        second = second.to(device).eval()

    def embedded(caption: str) -> dict[str, Tensor]:
        def ids(tokenizer):
            settings = dict(padding="max_length", max_length=77, truncation=True, return_tensors="pt")
            return tokenizer(caption, **settings).input_ids.to(device)

        if second is None:
            return {"tokens": text(ids(tokenizer)).last_hidden_state[0]}
        one = text(ids(tokenizer), output_hidden_states=True)
        two = second(ids(second_tokenizer), output_hidden_states=True)
        return {"tokens": torch.cat([one.hidden_states[-2], two.hidden_states[-2]], 2)[0], "pooled": two.text_embeds[0]}

    @torch.inference_mode()
    def encode(pictures: Sequence[Path], captions: Sequence[str]) -> dict[str, Tensor]:
        rows: dict[str, list[Tensor]] = {}
        for path, caption in zip(pictures, captions, strict=True):
            image = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
            square = ImageOps.fit(image, (resolution, resolution), Image.Resampling.LANCZOS)
            pixels = torch.from_numpy(np.asarray(square, dtype=np.float32) / 127.5 - 1).permute(2, 0, 1)[None]
            latent = vae.encode(pixels.to(device)).latent_dist.mode()[0]
            shift = vae.config.shift_factor or 0.0
            row = {"latents": (latent - shift) * vae.config.scaling_factor, **embedded(caption)}
            if second is not None:  # as a picture of just this size, whole
                row["time_ids"] = torch.tensor([resolution, resolution, 0, 0, resolution, resolution])
            for name, value in row.items():
                rows.setdefault(name, []).append(value.cpu())
        tensors = {name: torch.stack(values) for name, values in rows.items()}
        tensors |= {f"null_{name}": value.cpu() for name, value in embedded("").items()}
        return {name: value.half().contiguous() for name, value in tensors.items()}

    return encode


@contextmanager
def needs(what: str):
    try:
        yield
    except ImportError as error:
        raise ValueError(
            f'{what} needs the package {error.name}. Install it with: pip install "comfyui-ediffi[train]"'
        ) from error


def write(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    partial = path.with_name(path.name + ".partial")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial, metadata=metadata)
    os.replace(partial, path)


def write_json(path: Path, values: Any) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, path)
