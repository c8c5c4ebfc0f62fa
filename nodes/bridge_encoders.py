"""A folder of encoders as CLIPs and CLIP_VISION of ComfyUI: its own T5 and CLIP classes, sized by the folder's files.

Memory, offloading and LoRAs are ComfyUI's. Weights keep the type that they have in the file, unless it is wider than
ComfyUI's for text encoders (16 bits, --fp32-text-enc for 32). `bridge_combine` makes one CLIP of T5 and CLIP text.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import comfy.clip_model
import comfy.clip_vision
import comfy.model_management
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
    read_merges,
    weight_files,
)
from .bridge_conditioning import LENGTH, Words, packed_spans
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


class Encoder(comfy.sd1_clip.SD1ClipModel):
    """One encoder of a folder behind ComfyUI's calls, as `clip_l` or `t5xxl`."""

    def __init__(self, where: str, kind, device="cpu", dtype=None, model_options=None, **names) -> None:
        super().__init__(device, dtype, model_options or {}, clip_model=kind, **names)
        self.where = where

    def load_sd(self, weights):
        encoder = getattr(self, self.clip)
        if self.clip == "t5xxl" and encoder.logit_scale.device.type == "cpu":
            # Its weights stay the mapped file itself: beside a copy, the file's pages would be a second T5 in memory. So the
            # file may be replaced while it is loaded, but not written over.
            encoder.can_assign_sd = True
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


def whole(length: int, chunk: int) -> int:
    """The length of the chunks that hold `length` tokens; of one where there are none."""
    return chunk * max(1, -(-length // chunk))


def lengthened(tokens: Tensor, length: int) -> Tensor:
    """Cut or filled with zeros to `length`: (B, L, E) -> (B, length, E)."""
    return F.pad(tokens[:, :length], (0, 0, 0, max(0, length - tokens.shape[1])))


class Tokens(dict):
    """ComfyUI's tokens, that also remember their words."""

    words: Words | None = None

    def __setitem__(self, key: str, rows: list) -> None:
        """A node such as CLIPTextEncodeFlux puts in one encoder's tokens of another prompt: they stand for none of these words."""
        super().__setitem__(key, rows)
        if self.words is not None and self.words.spans is not None:
            kept = [
                NOTHING if (i % LENGTH < CLIP_LENGTH) == (key == "l") else span
                for i, span in enumerate(self.words.spans)
            ]
            length = LENGTH * (len(self["t5xxl"][0]) // T5_LENGTH)
            self.words = replace(self.words, spans=(*kept, *[NOTHING] * length)[:length])


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
    """ComfyUI's prompt syntax, as one sequence that is cut and padded to the length the encoder reads.

    The tokenizer option "<name>_length" is another length to cut at; padding fills whole multiples of the encoder's own.
    """

    def __init__(self, name: str, tokenizer: comfy.sd1_clip.SDTokenizer, length: int) -> None:
        # not super().__init__, which reads a vocabulary: everything is the tokenizer's, but how prompts are split and filled
        vars(self).update(vars(tokenizer))
        self.max_length = ENDLESS
        self.min_length = self.min_padding = None
        self.pad_to_max_length = self.pad_left = self.disable_weights = False
        self.name = name
        self.length = length

    def limit(self, options: dict) -> int:
        """Tokens that are read of a prompt, its end token included."""
        return options.get(f"{self.name}_length", self.length)

    def tokenize_with_weights(self, text: str, return_word_ids=False, **options):
        limit = self.limit(options.pop("tokenizer_options", {}))  # ComfyUI's are about padding, which our masks hide
        (row,) = super().tokenize_with_weights(text, return_word_ids, **options)
        if len(row) > limit:
            row = [*row[: limit - 1], row[-1]]  # the end token stays
        padding = (self.pad_token, 1.0, 0) if return_word_ids else (self.pad_token, 1.0)
        return [row + [padding] * (whole(len(row), self.length) - len(row))]


class Tokenizer:
    """Both tokenizers behind ComfyUI's call; under the names that its loaders use, `l` and `t5xxl`."""

    def __init__(self, clip: comfy.sd1_clip.SDTokenizer, t5: comfy.sd1_clip.SDTokenizer, clip_positions: int) -> None:
        self.clip_l = PromptTokenizer("clip_l", clip, min(CLIP_LENGTH, clip_positions))
        self.t5xxl = PromptTokenizer("t5xxl", t5, T5_LENGTH)

    def tokenize_with_weights(self, text: str, return_word_ids=False, **options) -> Tokens:
        text = "" if not text.strip() else text
        tokens, words, spans, lost = Tokens(), plain(text), {}, ""
        for key, tokenizer in (("l", self.clip_l), ("t5xxl", self.t5xxl)):
            listening, pieces = overheard(tokenizer)
            rows = listening.tokenize_with_weights(text, True, **options)
            try:
                found = spans_of(rows, placed(pieces, words), tokenizer.embedding_size)
            except Untraceable as error:
                found, lost = [NOTHING] * len(rows[0]), str(error)
            tokens[key] = rows if return_word_ids else [[entry[:2] for entry in row] for row in rows]
            spans[key] = found
        tokens.words = Words(words, None if lost else packed_spans(spans["l"], spans["t5xxl"]), lost)
        return tokens

    def state_dict(self) -> dict:
        return {}

    def decode(self, ids, **options) -> str:
        return self.t5xxl.decode(ids, **options)


def is_ours(clip: comfy.sd.CLIP) -> bool:
    """Does a CLIP give the paper's layout?"""
    return isinstance(getattr(clip, "tokenizer", None), Tokenizer)


def load_text_encoder(name: str, folder: str | Path, model_options: dict | None = None, disable_dynamic: bool = False):
    """The CLIP text encoder (`name` clip_l) or the T5 (t5xxl) of a folder, as a CLIP of ComfyUI."""
    folder, options = Path(folder), dict(model_options or {})
    make, weights = (clip_makers, clip_weights(folder)[0]) if name == "clip_l" else (t5_makers, t5_weights(folder))
    load_device = options.get("load_device", comfy.model_management.text_encoder_device())
    widest = options.get("dtype") or comfy.model_management.text_encoder_dtype(load_device)
    dtype = comfy.model_management.pick_weight_dtype(own_type(weights), widest, load_device)
    quantization = comfy.utils.detect_layer_quantization(weights, "")
    if quantization is not None:
        options["quantization_metadata"] = quantization
    # not on the device before there is a prompt
    options.setdefault("initial_device", comfy.model_management.text_encoder_offload_device())

    kind, tokenizer = make(folder)
    names = {"clip_name": "l"} if name == "clip_l" else {"name": name}
    target = comfy.supported_models_base.ClipTarget(
        lambda embedding_directory, **_: SimpleNamespace(**{name: tokenizer(embedding_directory=embedding_directory)}),
        partial(Encoder, folder.name, kind, **names),
    )
    target.params = {}
    clip = comfy.sd.CLIP(
        target,
        embedding_directory=options.pop("embedding_directory", None),
        parameters=comfy.utils.calculate_parameters(weights),
        state_dict=[narrowed(weights, dtype)],
        model_options=options | {"dtype": dtype},
        disable_dynamic=disable_dynamic,
    )
    clip.patcher.cached_patcher_init = (_text_patcher, (name, str(folder), model_options))
    return clip


def own_type(weights: dict[str, Tensor]) -> torch.dtype:
    """What ComfyUI goes by in T5, a norm's, because weights of 8 bits may have scales beside them."""
    norm = next((name for name in weights if name.endswith("final_layer_norm.weight")), None)
    return weights[norm].dtype if norm else torch.float16


def narrowed(weights: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Floating-point weights that are wider than `dtype`, in `dtype`."""
    return {
        name: w.to(dtype)
        if w.is_floating_point() and w.itemsize > dtype.itemsize and not name.endswith("_scale")  # of weights of 8 bits
        else w
        for name, w in weights.items()
    }


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


def _text_patcher(name: str, folder: str, model_options: dict | None = None, disable_dynamic: bool = False):
    return load_text_encoder(name, folder, model_options, disable_dynamic).patcher


def _vision_patcher(folder: str, disable_dynamic: bool = False):
    return load_vision_encoder(folder).patcher


def clip_makers(folder: Path):
    """What builds ComfyUI's CLIP text encoder of a folder, and what builds its tokenizer."""
    folder = folder / "clip"
    backend = FastTokenizer(clip_backend(folder), "<|startoftext|>", "<|endoftext|>")
    config = clip_text_config(read_json(folder / "open_clip_config.json"), backend, folder.parent.name)
    tokens = {"start": config["bos_token_id"], "end": config["eos_token_id"], "pad": config["eos_token_id"]}
    encoder = partial(
        comfy.sd1_clip.SDClipModel,
        max_length=config["max_position_embeddings"],
        textmodel_json_config=config,
        model_class=CLIPText,
        special_tokens=tokens,
    )
    return encoder, partial(
        comfy.sd1_clip.SDTokenizer,
        tokenizer_class=backend,
        embedding_size=config["hidden_size"],
        embedding_key="clip_l",
    )


def t5_makers(folder: Path):
    """What builds ComfyUI's T5 of a folder, and what builds its tokenizer."""
    folder = folder / "t5"
    config = t5_config(read_json(folder / "config.json"), folder.parent.name)
    encoder = partial(
        comfy.sd1_clip.SDClipModel,
        textmodel_json_config=config,
        model_class=comfy.text_encoders.t5.T5,
        special_tokens={"end": 1, "pad": 0},
    )
    return encoder, partial(
        comfy.sd1_clip.SDTokenizer,
        tokenizer_class=FastTokenizer(load_t5_tokenizer(folder), None, "</s>"),
        embedding_size=config["d_model"],
        embedding_key="t5xxl",
        has_start_token=False,
        pad_with_end=False,
        pad_to_max_length=False,
    )


CLIP_TEXT_FIELDS = {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio", "hf_tokenizer_name"}
CLIP_VISION_FIELDS = {"image_size", "layers", "width", "head_width", "patch_size", "mlp_ratio"}


def clip_text_config(config: dict, tokenizer: FastTokenizer, where: str) -> dict:
    model = setting(config, "model_cfg", f"{where}/clip/open_clip_config.json")
    text = setting(model, "text_cfg", f"{where}/clip/open_clip_config.json")
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
        "projection_dim": setting(model, "embed_dim", f"{where}/clip/open_clip_config.json"),
        "bos_token_id": tokenizer.start[0],
        "eos_token_id": tokenizer.end[0],
    }


def vision_config(config: dict) -> dict:
    model = setting(config, "model_cfg", "clip/open_clip_config.json")
    vision = setting(model, "vision_cfg", "clip/open_clip_config.json")
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
        "projection_dim": setting(model, "embed_dim", "clip/open_clip_config.json"),
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
    sizes = ("d_model", "d_kv", "d_ff", "num_heads", "num_layers", "vocab_size")
    return {
        **{name: setting(config, name, f"{where}/t5/config.json") for name in sizes},
        "dense_act_fn": functions[function],
        "is_gated_act": gated,
        "model_type": "t5",
    }


def setting(config: dict, name: str, file: str):
    if name not in config:
        raise ValueError(f"{file} does not say {name}. Copy the configuration that belongs to the weights there.")
    return config[name]


def clip_backend(folder: Path):
    """The folder's own merges, or OpenAI's vocabulary as ComfyUI ships it."""
    file = folder / MERGES_FILE
    if file.is_file():
        return clip_tokenizer(read_merges(file))
    own = Path(comfy.sd1_clip.__file__).parent / "sd1_tokenizer" / "merges.txt"
    most = 49152 - 256 - 2  # of OpenAI's merges, those that CLIP uses
    lines = own.read_text(encoding="utf-8").split("\n")[1 : most + 1]
    return clip_tokenizer([tuple(line.split()) for line in lines if line])


def clip_weights(folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """open_clip's file in ComfyUI's names: the text half and the image half."""
    weights, _ = load_files(folder / "clip", "open_clip_model.safetensors")
    image = {name: weights.pop(name) for name in list(weights) if name.startswith("visual.")}
    text = {name.removeprefix("text."): tensor for name, tensor in weights.items() if "logit" not in name}
    text = comfy.utils.clip_text_transformers_convert(text, "", "")
    return text, comfy.clip_vision.convert_to_transformers(image, "visual.")


def t5_weights(folder: Path) -> dict[str, Tensor]:
    """The encoder half of one file, or of the parts that its index lists, with ComfyUI's notes on scaled weights."""
    weights, notes = load_files(folder / "t5", "model.safetensors")
    of_encoder = ("shared.", "encoder.")
    weights = {name: tensor for name, tensor in weights.items() if name.startswith((*of_encoder, "scaled_fp8"))}
    weights, _ = comfy.utils.convert_old_quants(weights, model_prefix="", metadata=notes)
    return {name: tensor for name, tensor in weights.items() if name.startswith(of_encoder)}


def load_files(folder: Path, name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the notes of a safetensors file, or of the parts that its index lists."""
    weights, notes = {}, {}
    for file in weight_files(folder, name):
        check_safetensors(file)
        tensors, metadata = comfy.utils.load_torch_file(str(file), safe_load=True, return_metadata=True)
        weights |= tensors
        notes |= metadata or {}
    return weights, notes
