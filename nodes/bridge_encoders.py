"""A folder of encoders as CLIP and CLIP_VISION of ComfyUI: its own T5 and CLIP classes, sized by the folder's files.

Memory, dtype, offloading and LoRAs are ComfyUI's. What differs is the layout that comes out (bridge_conditioning): the
hidden states of both encoders, zero behind the end of the prompt, and nothing at all for an empty prompt, which is how
training drops text.
"""

import gzip
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import comfy.clip_model
import comfy.clip_vision
import comfy.ops
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models_base
import comfy.text_encoders.t5
import comfy.utils
import torch
import torch.nn.functional as F
from torch import Tensor

from ..ediffi_core.conditioning import CLIP_LENGTH, T5_LENGTH
from ..ediffi_core.encoders import (
    MERGES_FILE,
    check_safetensors,
    clip_tokenizer,
    load_t5_tokenizer,
    read_json,
    weight_files,
)
from .bridge_conditioning import WORDS, Words, packed
from .bridge_words import NOTHING, Untraceable, overheard, placed, plain, spans_of

ENDLESS = 10**9  # no chunks: prompts are cut to the paper's lengths, not encoded in pieces
T5_EPSILON = 1e-6  # these two are fixed in ComfyUI's T5
T5_BUCKETS = 32


class CLIPText(comfy.clip_model.CLIPTextModel):
    """ComfyUI's CLIP text model with any vocabulary and any width of projection."""

    def __init__(self, config, dtype, device, operations) -> None:
        super().__init__(config, dtype, device, operations)
        width, factory = config["hidden_size"], dict(dtype=dtype, device=device)
        self.text_model.embeddings = comfy.clip_model.CLIPEmbeddings(
            width, config["vocab_size"], config["max_position_embeddings"], **factory, operations=operations
        )
        self.text_projection = operations.Linear(width, config["projection_dim"], bias=False, **factory)


class TextEncoders(torch.nn.Module):
    """T5 and CLIP text behind ComfyUI's call: tokens -> (conditioning tensor, pooled, extra entries)."""

    def __init__(self, configs, device="cpu", dtype=None, model_options=None) -> None:
        super().__init__()
        options = model_options or {}
        masked = dict(zero_out_masked=True, return_attention_masks=True)
        clip, t5 = dict(configs.clip), dict(configs.t5)
        self.clip_l = comfy.sd1_clip.SDClipModel(
            device=device,
            dtype=dtype,
            max_length=clip["max_position_embeddings"],
            textmodel_json_config=clip,
            model_class=CLIPText,
            special_tokens={"start": clip["bos_token_id"], "end": clip["eos_token_id"], "pad": clip["eos_token_id"]},
            model_options={**options, "model_name": "clip_l"},
            **masked,
        )
        self.t5xxl = comfy.sd1_clip.SDClipModel(
            device=device,
            dtype=dtype,
            textmodel_json_config=t5,
            model_class=comfy.text_encoders.t5.T5,
            special_tokens={"end": 1, "pad": 0},
            enable_attention_masks=True,
            model_options={**options, "model_name": "t5xxl"},
            **masked,
        )
        self.where = configs.where
        self.dtypes = {dtype} if dtype is not None else set()

    def set_clip_options(self, options) -> None:
        self.clip_l.set_clip_options(options)
        # CLIP Set Last Layer means CLIP
        self.t5xxl.set_clip_options({k: v for k, v in options.items() if k != "layer"})

    def reset_clip_options(self) -> None:
        self.clip_l.reset_clip_options()
        self.t5xxl.reset_clip_options()

    def encode_token_weights(self, tokens):
        clip, pooled = self.clip_l.encode_token_weights(tokens["l"])[:2]
        t5 = self.t5xxl.encode_token_weights(tokens["t5xxl"])[0]
        if not has_content(tokens["l"], self.clip_l.special_tokens):
            clip, pooled = torch.zeros_like(clip), torch.zeros_like(pooled)
        if not has_content(tokens["t5xxl"], self.t5xxl.special_tokens):
            t5 = torch.zeros_like(t5)
        words = getattr(tokens, "words", None)
        extra = {} if words is None else {WORDS: words}
        return packed(lengthened(clip, CLIP_LENGTH), lengthened(t5, T5_LENGTH)), pooled, extra

    def load_sd(self, weights):
        encoder = self.t5xxl if "shared.weight" in weights else self.clip_l
        try:
            missing, unexpected = encoder.load_sd(weights)
        except RuntimeError as error:  # torch's list of shapes that differ
            raise ValueError(f"{MISFIT.format(where=self.where)} {error}") from error
        missing = [name for name in missing if name != "logit_scale"]
        if missing:
            raise ValueError(f"{MISFIT.format(where=self.where)} The weight {missing[0]} is missing.")
        return missing, unexpected


MISFIT = (
    "The encoders in {where} hold weights that do not fit the configuration beside them. Keep weights and configuration "
    "of the same model together."
)


def has_content(batches, special_tokens) -> bool:
    """Is there anything besides start, end and padding?"""
    special = set(special_tokens.values())
    return any(not isinstance(token, int) or token not in special for batch in batches for token, *_ in batch)


def lengthened(tokens: Tensor, length: int) -> Tensor:
    """Cut or filled with zeros to `length`: (B, L, E) -> (B, length, E)."""
    return F.pad(tokens[:, :length], (0, 0, 0, max(0, length - tokens.shape[1])))


class Tokens(dict):
    """ComfyUI's tokens, that also remember their words and what was cut off the prompt."""

    words: Words | None = None

    def __init__(self) -> None:
        super().__init__()
        self.cut: dict[str, str] = {}  # "clip", "t5" -> a sentence, for an encoder that does not read the whole prompt


class FastTokenizer:
    """A tokenizer of the `tokenizers` library with the calls that ComfyUI makes."""

    def __init__(self, backend, start: str | None, end: str) -> None:
        self.backend = backend
        self.start = [] if start is None else [backend.token_to_id(start)]
        self.end = [backend.token_to_id(end)]

    def from_pretrained(self, *_, **__) -> "FastTokenizer":
        return self

    def __call__(self, text: str, **_) -> dict[str, list]:
        encoded = self.backend.encode(text, add_special_tokens=False)
        offsets = [NOTHING] * len(self.start) + encoded.offsets + [NOTHING]
        return {"input_ids": self.start + encoded.ids + self.end, "offset_mapping": offsets}

    def get_vocab(self) -> dict[str, int]:
        return self.backend.get_vocab()

    def decode(self, ids, **options) -> str:
        return self.backend.decode(list(ids), **options)


class PromptTokenizer(comfy.sd1_clip.SDTokenizer):
    """ComfyUI's prompt syntax, as one sequence that is cut and padded to the length the encoder reads."""

    def __init__(self, name: str, backend: FastTokenizer, length: int, width: int, embedding_directory=None) -> None:
        super().__init__(
            tokenizer_class=backend,
            embedding_directory=embedding_directory,
            embedding_size=width,
            embedding_key=name,
            max_length=ENDLESS,
            has_start_token=bool(backend.start),
            pad_with_end=bool(backend.start),  # CLIP pads with its end token, T5 with 0
            pad_to_max_length=False,
        )
        self.length = length
        self.lost = 0  # tokens cut from the latest prompt

    def tokenize_with_weights(self, text: str, return_word_ids=False, **options):
        options.pop("tokenizer_options", None)  # they are about padding, and the length is the paper's
        (row,) = super().tokenize_with_weights(text, return_word_ids, **options)
        self.lost = max(0, len(row) - self.length)
        if self.lost:
            row = [*row[: self.length - 1], row[-1]]  # the end token stays
        padding = (self.pad_token, 1.0, 0) if return_word_ids else (self.pad_token, 1.0)
        return [row + [padding] * (self.length - len(row))]


class Tokenizer:
    """Both tokenizers behind ComfyUI's call; under the names that its loaders use, `l` and `t5xxl`."""

    def __init__(self, configs, embedding_directory=None, tokenizer_data=None) -> None:
        self.clip_l = PromptTokenizer(
            "clip_l", configs.clip_tokenizer, configs.clip_length, configs.clip["hidden_size"], embedding_directory
        )
        self.t5xxl = PromptTokenizer(
            "t5xxl", configs.t5_tokenizer, T5_LENGTH, configs.t5["d_model"], embedding_directory
        )

    def tokenize_with_weights(self, text: str, return_word_ids=False, **options) -> Tokens:
        text = "" if not text.strip() else text
        tokens, words, spans, lost = Tokens(), plain(text), [], ""
        for key, name, tokenizer, length in (
            ("l", "CLIP", self.clip_l, CLIP_LENGTH),
            ("t5xxl", "T5", self.t5xxl, T5_LENGTH),
        ):
            listening, pieces = overheard(tokenizer)
            rows = listening.tokenize_with_weights(text, True, **options)
            try:
                found = spans_of(rows, placed(pieces, words), tokenizer.embedding_size)
            except Untraceable as error:
                found, lost = [NOTHING] * tokenizer.length, str(error)
            if listening.lost:
                rest = " ".join(words[max(stop for _, stop in found) :].split())
                quoted = rest if len(rest) <= 60 else f"{rest[:60]}..."
                tokens.cut[name.lower()] = (
                    f"{name} does not read the last {listening.lost} tokens of the prompt, from {quoted!r} on; it reads "
                    f"{tokenizer.length - tokenizer.tokens_start - 1} tokens."
                )
            tokens[key] = rows if return_word_ids else [[entry[:2] for entry in row] for row in rows]
            spans += found + [NOTHING] * (length - len(found))
        tokens.words = Words(words, None if lost else tuple(spans), lost)
        return tokens

    def state_dict(self) -> dict:
        return {}

    def decode(self, ids, **options) -> str:
        return self.t5xxl.decode(ids, **options)


def is_ours(clip: comfy.sd.CLIP) -> bool:
    """Does a CLIP come from `load_text_encoders`?"""
    return isinstance(clip.cond_stage_model, TextEncoders)


def load_text_encoders(folder: str | Path, model_options: dict | None = None, disable_dynamic: bool = False):
    """The T5 and CLIP text encoder of a folder as a CLIP."""
    folder, options = Path(folder), dict(model_options or {})
    configs = read_configs(folder)
    weights = [clip_weights(folder)[0], t5_weights(folder)]

    target = comfy.supported_models_base.ClipTarget(partial(Tokenizer, configs), TextEncoders)
    target.params = {"configs": configs}
    clip = comfy.sd.CLIP(
        target,
        embedding_directory=options.pop("embedding_directory", None),
        parameters=sum(comfy.utils.calculate_parameters(part) for part in weights),
        state_dict=weights,
        model_options=options,
        disable_dynamic=disable_dynamic,
    )
    clip.patcher.cached_patcher_init = (_text_patcher, (str(folder), model_options))
    return clip


def load_vision_encoder(folder: str | Path):
    """The CLIP image encoder of a folder as a CLIP_VISION."""
    folder = Path(folder)
    vision = comfy.clip_vision.ClipVisionModel(vision_config(read_json(folder / "clip" / "open_clip_config.json")))
    _, weights = clip_weights(folder)
    try:
        missing, _ = vision.load_sd(weights)
    except RuntimeError as error:
        raise ValueError(f"{MISFIT.format(where=folder.name)} {error}") from error
    if missing or not isinstance(vision.model.visual_projection, torch.nn.Linear):
        raise ValueError(f"{MISFIT.format(where=folder.name)} The weight {[*missing, 'visual.proj'][0]} is missing.")
    vision.patcher.cached_patcher_init = (_vision_patcher, (str(folder),))
    return vision


def _text_patcher(folder: str, model_options: dict | None = None, disable_dynamic: bool = False):
    return load_text_encoders(folder, model_options, disable_dynamic).patcher


def _vision_patcher(folder: str, disable_dynamic: bool = False):
    return load_vision_encoder(folder).patcher


def read_configs(folder: Path) -> SimpleNamespace:
    """Both text encoders' configurations in the words of ComfyUI's classes, and their tokenizers."""
    config = read_json(folder / "clip" / "open_clip_config.json")
    tokenizer = FastTokenizer(clip_backend(folder / "clip"), "<|startoftext|>", "<|endoftext|>")
    clip = clip_text_config(config, tokenizer, folder.name)
    return SimpleNamespace(
        where=folder.name,
        clip=clip,
        clip_tokenizer=tokenizer,
        clip_length=min(CLIP_LENGTH, clip["max_position_embeddings"]),
        t5=t5_config(read_json(folder / "t5" / "config.json"), folder.name),
        t5_tokenizer=FastTokenizer(load_t5_tokenizer(folder / "t5"), None, "</s>"),
    )


CLIP_TEXT_FIELDS = {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio", "hf_tokenizer_name"}
CLIP_VISION_FIELDS = {"image_size", "layers", "width", "head_width", "patch_size", "mlp_ratio"}


def clip_text_config(config: dict, tokenizer: FastTokenizer, where: str) -> dict:
    model = config["model_cfg"]
    text = model["text_cfg"]
    check_plain(text, CLIP_TEXT_FIELDS, f"{where}/clip", "text")
    width = text.get("width", 512)
    return {
        "hidden_size": width,
        "num_hidden_layers": text.get("layers", 12),
        "num_attention_heads": text.get("heads", 8),
        "intermediate_size": int(width * text.get("mlp_ratio", 4.0)),
        "hidden_act": activation(model),
        "max_position_embeddings": text.get("context_length", 77),
        "vocab_size": text.get("vocab_size", 49408),
        "projection_dim": model["embed_dim"],
        "bos_token_id": tokenizer.start[0],
        "eos_token_id": tokenizer.end[0],
    }


def vision_config(config: dict) -> dict:
    model = config["model_cfg"]
    vision = model["vision_cfg"]
    check_plain(vision, CLIP_VISION_FIELDS, "clip/open_clip_config.json", "image")
    width, size = vision.get("width", 768), vision.get("image_size", 224)
    preprocessing = config.get("preprocess_cfg", {})
    statistics = {f"image_{name}": preprocessing[name] for name in ("mean", "std") if name in preprocessing}
    return {
        "model_type": "clip_vision_model",
        "hidden_size": width,
        "num_hidden_layers": vision.get("layers", 12),
        "num_attention_heads": width // vision.get("head_width", 64),
        "intermediate_size": int(width * vision.get("mlp_ratio", 4.0)),
        "hidden_act": activation(model),
        "image_size": size if isinstance(size, int) else size[0],
        "patch_size": vision.get("patch_size", 16),
        "num_channels": 3,
        "projection_dim": model["embed_dim"],
        **statistics,
    }


def activation(model: dict) -> str:
    return "quick_gelu" if model.get("quick_gelu") else "gelu"


def check_plain(config: dict, known: set[str], where: str, kind: str) -> None:
    """Raise ValueError for settings beyond CLIP's plain transformer."""
    for name, value in config.items():
        if name not in known and value not in (None, False):
            raise ValueError(
                f"{where} describes a CLIP whose {kind} encoder sets {name} = {value!r}, which ComfyUI's CLIP does not "
                f"have. Use a CLIP with the plain architecture, such as ViT-L-14."
            )


def t5_config(config: dict, where: str) -> dict:
    feed_forward = config.get("feed_forward_proj", "relu")
    gated, function = feed_forward.startswith("gated-"), feed_forward.removeprefix("gated-")
    functions = {"gelu": "gelu_pytorch_tanh", "gelu_new": "gelu_pytorch_tanh", "relu": "relu"}
    fixed = {
        "layer_norm_epsilon": (config.get("layer_norm_epsilon", T5_EPSILON), T5_EPSILON),
        "relative_attention_num_buckets": (config.get("relative_attention_num_buckets", T5_BUCKETS), T5_BUCKETS),
        "relative_attention_max_distance": (config.get("relative_attention_max_distance", 128), 128),
        "feed_forward_proj": (function, function if function in functions else "gelu or relu"),
    }
    for name, (value, expected) in fixed.items():
        if value != expected:
            raise ValueError(
                f"{where}/t5/config.json sets {name} = {value!r}, ComfyUI's T5 knows only {expected!r}. Use a T5 of the "
                f"usual architecture, such as T5 v1.1."
            )
    return {
        "d_model": config["d_model"],
        "d_kv": config["d_kv"],
        "d_ff": config["d_ff"],
        "num_heads": config["num_heads"],
        "num_layers": config["num_layers"],
        "vocab_size": config["vocab_size"],
        "dense_act_fn": functions[function],
        "is_gated_act": gated,
        "model_type": "t5",
    }


def clip_backend(folder: Path):
    """The folder's own merges, or OpenAI's vocabulary as ComfyUI ships it."""
    file = folder / MERGES_FILE
    if file.is_file():
        lines = gzip.decompress(file.read_bytes()).decode("utf-8").split("\n")[1:]
    else:
        own = Path(comfy.sd1_clip.__file__).parent / "sd1_tokenizer" / "merges.txt"
        lines = own.read_text(encoding="utf-8").split("\n")[1:]
    most = 49152 - 256 - 2  # of OpenAI's merges, those that CLIP uses
    return clip_tokenizer([tuple(line.split()) for line in lines[:most] if line])


def clip_weights(folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """open_clip's file in ComfyUI's names: the text half and the image half."""
    file = folder / "clip" / "open_clip_model.safetensors"
    check_safetensors(file)
    weights = comfy.utils.load_torch_file(str(file), safe_load=True)
    image = {name: weights.pop(name) for name in list(weights) if name.startswith("visual.")}
    text = {name.removeprefix("text."): tensor for name, tensor in weights.items() if "logit" not in name}
    text = comfy.utils.clip_text_transformers_convert(text, "", "")
    return text, comfy.clip_vision.convert_to_transformers(image, "visual.")


def t5_weights(folder: Path) -> dict[str, Tensor]:
    """The encoder half of one file, or of the parts that its index lists."""
    weights: dict[str, Tensor] = {}
    for file in weight_files(folder / "t5", "model.safetensors"):
        check_safetensors(file)
        weights |= comfy.utils.load_torch_file(str(file), safe_load=True)
    return {name: tensor for name, tensor in weights.items() if name.startswith(("shared.", "encoder."))}
