"""Encoders: prompts and reference pictures become embeddings (eDiff-I, Sec. 4.2).

A folder of encoders holds `t5/` (Hugging Face layout), `clip/` (open_clip's local layout) and optionally
`encoders.json`. All widths are read from those files, so T5-XXL with CLIP-L loads just like the bundled demo family.
Weights may be in parts that an index lists, and of any floating-point type; those of 8 bits may have scales beside them.
transformers and open_clip are imported when a folder is loaded, not before.

Pooled text and image embeddings are projected but not normalised, as ComfyUI returns them.
"""

import gzip
import json
import re
import zlib
from collections.abc import Container
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .conditioning import CLIP_LENGTH, T5_LENGTH

FORMAT_VERSION = 1
MERGES_FILE = "bpe_merges.txt.gz"  # what open_clip's SimpleTokenizer takes as bpe_path
MERGES_LIMIT = 1 << 24  # bytes when unpacked; OpenAI's file has 3 million


class TextEmbeddings(NamedTuple):
    """Masks are True up to and including the end token; hidden states behind it are zero."""

    clip_tokens: Tensor  # (B, 77, E_clip) last layer, after the final LayerNorm
    clip_mask: Tensor  # (B, 77) bool
    clip_pooled: Tensor  # (B, E_image) projected state of the end token
    t5_tokens: Tensor  # (B, 113, E_t5)
    t5_mask: Tensor  # (B, 113) bool


class Tokens(NamedTuple):
    """One prompt as one encoder reads it, already cut to the encoder's length."""

    ids: list[int]
    spans: list[tuple[int, int]]  # characters of the prompt each id stands for; (0, 0) for special tokens
    read: int  # characters of the prompt that were read; its length if nothing was cut
    lost: int  # tokens that were cut


class PromptTokens(NamedTuple):
    clip: Tokens
    t5: Tokens


class Cut(NamedTuple):
    """The end of a prompt that one encoder does not read."""

    prompt: int  # index into the texts
    encoder: str  # "CLIP" or "T5"
    text: str
    tokens: int

    def __str__(self):
        return f"{self.encoder} does not read the last {self.tokens} tokens of the prompt: {self.text!r}."


class Encoders:
    """T5 and CLIP, frozen. `load_encoders` makes them from a folder."""

    def __init__(self, t5, t5_tokenizer, clip, clip_tokenizer, image_size: int, image_mean: Tensor, image_std: Tensor):
        self.t5 = t5
        self.t5_tokenizer = t5_tokenizer
        self.clip = clip
        self.clip_tokenizer = clip_tokenizer
        self.image_size = image_size
        self.image_mean = image_mean  # (3, 1, 1), for images in [0, 1]
        self.image_std = image_std

        tower = text_tower(clip)
        self.clip_width = tower.token_embedding.weight.shape[1]
        self.t5_width = t5.config.d_model
        self.image_width = projection_width(tower)
        self.device = tower.token_embedding.weight.device
        self.dtype = tower.token_embedding.weight.dtype

    def tokens(self, texts: list[str]) -> list[PromptTokens]:
        return [
            PromptTokens(clip_tokens(self.clip_tokenizer, text), t5_tokens(self.t5_tokenizer, text)) for text in texts
        ]

    def cut(self, texts: list[str]) -> list[Cut]:
        """What `encode_text` will not read; empty when every prompt fits both encoders."""
        return [
            Cut(index, name, text[tokens.read :].strip(), tokens.lost)
            for index, (text, prompt) in enumerate(zip(texts, self.tokens(texts), strict=True))
            for name, tokens in (("CLIP", prompt.clip), ("T5", prompt.t5))
            if tokens.lost
        ]

    @torch.no_grad()
    def encode_text(self, texts: list[str]) -> TextEmbeddings:
        """Prompts longer than an encoder's length keep its end token; `cut` names the words that are lost."""
        prompts = self.tokens(texts)

        ids, clip_mask = padded([prompt.clip.ids for prompt in prompts], self.device)
        states = text_states(self.clip, ids)
        last = clip_mask.sum(1) - 1
        pooled = projected(self.clip, states[torch.arange(len(texts), device=self.device), last])
        clip_states = states.where(clip_mask[..., None], 0)  # a product would leave zeros with a sign

        ids, t5_mask = padded([prompt.t5.ids for prompt in prompts], self.device)
        t5_states = self.t5(input_ids=ids, attention_mask=t5_mask.long()).last_hidden_state
        t5_states = t5_states.where(t5_mask[..., None], 0)

        return TextEmbeddings(
            lengthened(clip_states, CLIP_LENGTH),
            lengthened(clip_mask, CLIP_LENGTH),
            pooled,
            lengthened(t5_states, T5_LENGTH),
            lengthened(t5_mask, T5_LENGTH),
        )

    @torch.no_grad()
    def encode_image(self, images: Tensor) -> Tensor:
        """images: (B, 3, H, W) in [-1, 1]. Returns the projected class token, (B, E_image)."""
        images = resized(images.to(self.device, torch.float32) / 2 + 0.5, self.image_size)
        images = (images * 255).round().clip(0, 255) / 255  # CLIP was trained on 8-bit pictures; ComfyUI does the same
        images = (images - self.image_mean) / self.image_std
        return self.clip.encode_image(images.to(self.dtype))


def load_encoders(folder: str | Path, device="cpu", dtype: torch.dtype = torch.float32) -> Encoders:
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"There is no folder of encoders at {folder}. It should hold t5/ and clip/. "
            f"Check the path, or use the bundled demo/encoders/shapeworld."
        )
    description = folder / "encoders.json"
    if description.is_file():
        version = read_json(description).get("format_version")
        if version != FORMAT_VERSION:
            raise ValueError(
                f"{description} has format version {version!r}, this version of the pack reads {FORMAT_VERSION}. "
                f"Update the pack, or download encoders made for it."
            )

    t5 = load_t5(folder / "t5", device, dtype)
    unigram = load_t5_tokenizer(folder / "t5")
    check_vocabulary(folder / "t5", unigram, t5.shared)
    clip, preprocessing = load_clip(folder / "clip", device, dtype)
    bpe = load_clip_tokenizer(folder / "clip")
    check_vocabulary(folder / "clip", bpe, text_tower(clip).token_embedding)

    size = clip.visual.image_size
    return Encoders(
        t5=t5,
        t5_tokenizer=unigram,
        clip=clip,
        clip_tokenizer=bpe,
        image_size=size[0] if isinstance(size, tuple) else size,
        image_mean=torch.tensor(preprocessing["mean"], device=device).view(3, 1, 1),
        image_std=torch.tensor(preprocessing["std"], device=device).view(3, 1, 1),
    )


def load_t5(folder: Path, device, dtype: torch.dtype):
    """The encoder half; a decoder in the file is left out.

    Weights that are of `dtype` already are not copied: on the CPU they are the mapped file itself.
    """
    from transformers import T5Config, T5EncoderModel

    config = T5Config(**{k: v for k, v in read_json(folder / "config.json").items() if k != "model_type"})
    with torch.device("meta"):
        model = T5EncoderModel(config)

    expected = {name: w.shape for name, w in model.state_dict().items() if name != "encoder.embed_tokens.weight"}
    weights = load_weights(folder, "model.safetensors", expected, device, dtype)
    check_shapes(folder / "model.safetensors", weights, expected)

    model.load_state_dict(weights, strict=False, assign=True)
    model.set_input_embeddings(model.shared)  # the encoder shares the table
    return model.eval().requires_grad_(False)


def load_clip(folder: Path, device, dtype: torch.dtype) -> tuple[torch.nn.Module, dict]:
    """The model and its picture statistics, `mean` and `std`."""
    from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
    from open_clip.model import CLIP, CustomTextCLIP

    config = read_json(folder / "open_clip_config.json")
    architecture = dict(config["model_cfg"])
    kind = CustomTextCLIP if architecture.pop("custom_text", False) else CLIP
    model = kind(**architecture)
    if not hasattr(text_tower(model), "attn_mask"):
        raise ValueError(
            f"{folder / 'open_clip_config.json'} describes a text encoder of another kind than CLIP's own transformer. "
            f"Use a CLIP with the plain architecture, such as ViT-L-14."
        )
    expected = {name: w.shape for name, w in model.state_dict().items()}
    weights = load_weights(folder, "open_clip_model.safetensors", expected, "cpu", torch.float32)
    check_shapes(folder / "open_clip_model.safetensors", weights, expected)
    model.load_state_dict(weights)

    preprocessing = {"mean": OPENAI_DATASET_MEAN, "std": OPENAI_DATASET_STD}
    return model.to(device, dtype).eval().requires_grad_(False), preprocessing | config.get("preprocess_cfg", {})


def load_t5_tokenizer(folder: Path):
    from transformers import T5TokenizerFast

    if not any((folder / name).is_file() for name in ("tokenizer.json", "spiece.model")):
        raise FileNotFoundError(
            f"{folder} holds no T5 tokenizer. It needs tokenizer.json or spiece.model. "
            f"Copy the file from where the T5 weights came from."
        )
    try:
        return T5TokenizerFast.from_pretrained(folder, local_files_only=True).backend_tokenizer
    except Exception as error:  # the libraries have no error of their own for a damaged file
        raise ValueError(
            f"The T5 tokenizer in {folder} cannot be read ({error}). Download or copy its files again."
        ) from error


def load_clip_tokenizer(folder: Path):
    """From the folder's merges or, for models with OpenAI's vocabulary, from the ones in open_clip."""
    file = folder / MERGES_FILE
    if not file.is_file():
        import open_clip.tokenizer

        file = Path(open_clip.tokenizer.default_bpe())
    return clip_tokenizer(read_merges(file))


def read_merges(file: Path) -> list[tuple[str, str]]:
    """The pairs that CLIP's tokenizer joins, in order. Raises ValueError for a damaged file."""
    try:
        with gzip.open(file) as packed:
            text = packed.read(MERGES_LIMIT + 1)
        lines = text.decode("utf-8").split("\n")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is no list of merges in gzip ({error}). Download or copy the file again.") from error
    if len(text) > MERGES_LIMIT:
        raise ValueError(
            f"{file} unpacks to more than {MERGES_LIMIT} bytes, too many for merges. Download or copy it again."
        )
    most = 49152 - 256 - 2  # OpenAI's file lists more merges than CLIP uses
    merges = [tuple(line.split()) for line in lines[1 : most + 1] if line]
    for merge in merges:
        if len(merge) != 2:
            raise ValueError(
                f"{file} holds the line {' '.join(merge)[:80]!r}, which is no pair. Download or copy the file again."
            )
    return merges


def clip_tokenizer(merges: list[tuple[str, str]]):
    """CLIP's byte-level BPE: lower case, words end in </w>, ids in the order bytes, word-ending bytes, merges."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

    tokenizer = Tokenizer(models.BPE(clip_vocabulary(merges), merges, end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    word = Regex(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(word, behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return tokenizer


def clip_vocabulary(merges: list[tuple[str, str]]) -> dict[str, int]:
    characters = byte_characters()
    words = characters + [c + "</w>" for c in characters] + ["".join(pair) for pair in merges]
    return {word: i for i, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}


def byte_characters() -> list[str]:
    """A visible character for each byte: printable Latin-1 stands for itself, the other bytes follow from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return [chr(b) for b in printable] + [chr(0x100 + i) for i in range(256 - len(printable))]


def clip_tokens(tokenizer, text: str) -> Tokens:
    start, end = (tokenizer.token_to_id(token) for token in ("<|startoftext|>", "<|endoftext|>"))
    encoding = encoded(tokenizer, text)
    room = CLIP_LENGTH - 2
    return Tokens(
        [start, *encoding.ids[:room], end],
        [(0, 0), *encoding.offsets[:room], (0, 0)],
        *read_and_lost(text, encoding.offsets, room),
    )


def t5_tokens(tokenizer, text: str) -> Tokens:
    end = tokenizer.token_to_id("</s>")
    encoding = encoded(tokenizer, text)
    room = T5_LENGTH - 1
    return Tokens(
        [*encoding.ids[:room], end], [*encoding.offsets[:room], (0, 0)], *read_and_lost(text, encoding.offsets, room)
    )


def encoded(tokenizer, text: str):
    if half := re.search("[\ud800-\udfff]", text):
        raise ValueError(
            f"The prompt holds half a character at place {half.start()}, often half an emoji. Write it again."
        )
    return tokenizer.encode(text, add_special_tokens=False)


def read_and_lost(text: str, spans: list[tuple[int, int]], room: int) -> tuple[int, int]:
    if len(spans) <= room:
        return len(text), 0
    return spans[room][0], len(spans) - room


def text_tower(clip):
    return getattr(clip, "text", clip)


def text_states(clip, ids: Tensor) -> Tensor:
    """Hidden states after the final LayerNorm, (B, L, E_clip), of ids (B, L) with L up to the context length."""
    tower = text_tower(clip)
    length = ids.shape[1]
    x = tower.token_embedding(ids) + tower.positional_embedding[:length]
    x = tower.transformer(x, attn_mask=tower.attn_mask[:length, :length])
    return tower.ln_final(x)


def projected(clip, states: Tensor) -> Tensor:
    projection = text_tower(clip).text_projection
    return projection(states) if isinstance(projection, torch.nn.Module) else states @ projection


def projection_width(tower) -> int:
    projection = tower.text_projection
    return projection.out_features if isinstance(projection, torch.nn.Linear) else projection.shape[1]


def padded(ids: list[list[int]], device=None) -> tuple[Tensor, Tensor]:
    """Rows of different lengths as (B, L) ids padded with 0, and the mask of the real ones."""
    lengths = torch.tensor([len(row) for row in ids])
    longest = int(lengths.max())
    rows = torch.tensor([row + [0] * (longest - len(row)) for row in ids])
    return rows.to(device), (torch.arange(longest) < lengths[:, None]).to(device)


def lengthened(x: Tensor, length: int) -> Tensor:
    """Zeros behind the tokens: (B, L, ...) becomes (B, length, ...)."""
    longer = x.new_zeros(x.shape[0], length, *x.shape[2:])
    longer[:, : x.shape[1]] = x
    return longer


def resized(images: Tensor, size: int) -> Tensor:
    """The shorter side becomes `size`, the middle of the longer one is kept, as in ComfyUI's clip_preprocess."""
    height, width = images.shape[2:]
    if (height, width) != (size, size):
        scale = size / min(height, width)
        shape = (round(scale * height), round(scale * width))
        images = F.interpolate(images, shape, mode="bicubic", antialias=True)
    top, left = ((side - size) // 2 for side in images.shape[2:])
    return images[:, :, top : top + size, left : left + size]


def load_weights(folder: Path, name: str, wanted: Container[str], device, dtype: torch.dtype) -> dict[str, Tensor]:
    """The wanted tensors of a file or its parts. At most one part is in memory besides them."""
    from safetensors import safe_open

    weights: dict[str, Tensor] = {}
    scales: dict[str, Tensor] = {}
    for file in weight_files(folder, name):
        check_safetensors(file)
        with safe_open(file, "pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 - not a dict
                if key in wanted:
                    weights[key] = floating(file, key, tensors.get_tensor(key)).to(device, dtype)
                elif key.endswith(SCALES):
                    scales[key.rpartition(".")[0] + ".weight"] = tensors.get_tensor(key)
    for key, scale in scales.items():
        if key in weights:
            weights[key] = (weights[key].float() * scale.to(device)).to(dtype)
    return weights


SCALES = (".scale_weight", ".weight_scale")  # what ComfyUI's weights of 8 bits are multiplied with


def floating(file: Path, name: str, tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point():
        raise ValueError(
            f"{file} holds {name} as {str(tensor.dtype).removeprefix('torch.')}, a packed type that only ComfyUI unpacks. Use "
            f"a file with weights of 32, 16 or 8 bits in floating point."
        )
    return tensor


def weight_files(folder: Path, name: str) -> list[Path]:
    """The file, or the parts that its index lists. Raises ValueError for an index that names anything but files beside it."""
    index = folder / f"{name}.index.json"
    if not index.is_file():
        return [folder / name]
    listed = read_json(index).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise ValueError(f"{index} lists no parts in weight_map. Download or copy the file again.")
    for part in listed.values():
        if not isinstance(part, str) or part in ("", ".", "..") or len(part) > 200 or UNUSABLE.search(part):
            raise ValueError(
                f"{index} lists {str(part)[:80]!r} among its parts. Parts must be files in the same folder, named without any folder. "
                f"Get the index from where the weights came from, or correct the name."
            )
    return [folder / part for part in sorted(set(listed.values()))]


UNUSABLE = re.compile(
    "[/\\\\:\0\ud800-\udfff]"
)  # in the name of a file: other folders and drives, NUL, half a character


def read_json(file: Path) -> dict:
    """The object that a file holds. Raises FileNotFoundError or ValueError."""
    if not file.is_file():
        raise missing(file)
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not valid JSON ({error}). Download or copy the file again.") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file} should hold a JSON object, got {type(values).__name__}. Download or copy it again.")
    return values


def check_safetensors(file: Path) -> None:
    from safetensors import SafetensorError, safe_open

    if not file.is_file():
        raise missing(file)
    try:
        with safe_open(file, "pt"):
            pass
    except SafetensorError as error:
        raise ValueError(
            f"{file} is not a complete safetensors file: {file.stat().st_size} bytes do not hold what its header "
            f"promises ({error}). The download or copy was cut short; fetch the file again."
        ) from error


def check_shapes(file: Path, weights: dict[str, Tensor], expected: dict[str, torch.Size]) -> None:
    for name, shape in expected.items():
        found = tuple(weights[name].shape) if name in weights else "nothing"
        if found != tuple(shape):
            raise ValueError(
                f"{file} holds {found} for {name} where the configuration beside it asks for {tuple(shape)}. "
                f"Keep weights and configuration of the same model together."
            )


def check_vocabulary(folder: Path, tokenizer, table: torch.nn.Embedding) -> None:
    if tokenizer.get_vocab_size() > table.num_embeddings:  # fewer is fine: T5's table is rounded up
        raise ValueError(
            f"The tokenizer in {folder} has {tokenizer.get_vocab_size()} tokens, the weights beside it know "
            f"{table.num_embeddings}. Copy tokenizer and weights of the same model there."
        )


def missing(file: Path) -> FileNotFoundError:
    return FileNotFoundError(
        f"The encoder file {file} is missing. A folder of encoders holds t5/ with config.json and model.safetensors, "
        f"and clip/ with open_clip_config.json and open_clip_model.safetensors. Copy the file there."
    )
