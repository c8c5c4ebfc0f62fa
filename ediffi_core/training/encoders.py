"""Training of the demo family's encoders: a small T5 and a small CLIP that know the world of shapes.

T5 learns by span corruption (Raffel et al. 2020) on captions and on pairs of captions of one scene: what is hidden in
one stands in the other, so colours must be bound to shapes; where a recipe asks for it, also by `binding`. CLIP learns by
contrasting pictures with captions. Both are written in the layout of their large relatives, so whatever loads T5-XXL and
CLIP-L loads these. Training loops yield (step, loss); `main` prints. The two parts are independent and may run at the same
time.
"""

import argparse
import gzip
import json
import math
import os
import re
import sys
import tempfile
import time
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from ..encoders import (
    FORMAT_VERSION,
    MERGES_FILE,
    T5_LENGTH,
    clip_tokenizer,
    clip_tokens,
    clip_vocabulary,
    load_clip,
    load_clip_tokenizer,
    load_encoders,
    load_t5_tokenizer,
    padded,
    projected,
    t5_tokens,
    text_states,
)
from ..phrases import columns
from ..shapeworld.captions import caption
from ..shapeworld.render import as_uint8, render
from ..shapeworld.world import COLORS, PLACES, SHAPES, STYLES, Scene, random_scene
from .binding import OF_OBJECTS, Readers, Said, said, stacked
from .grounding import said_of

SENTINELS = 100  # what transformers' T5 tokenizer expects
SPECIAL = ("<pad>", "</s>", "<unk>")
PRINTABLE = [chr(c) for c in range(0x21, 0x7F) if not chr(c).isupper()]

Steps = Iterator[tuple[int, float]]


def scenes(count: int, seed: int) -> list[Scene]:
    rng = np.random.default_rng(seed)
    return [random_scene(rng) for _ in range(count)]


def in_every_style(of: list[Scene]) -> list[Scene]:
    return [replace(scene, style=style) for scene in of for style in STYLES]


def captions(count: int, seed: int, long_share: float) -> list[str]:
    rng = np.random.default_rng(seed)
    return [caption(random_scene(rng), rng, form_of_caption(rng, long_share)).text for _ in range(count)]


def caption_pairs(count: int, seed: int) -> list[str]:
    """A short and another caption of the same scene, in one text and either order."""
    rng = np.random.default_rng(seed)
    texts = []
    for scene in scenes(count, seed + 1):
        parts = [caption(scene, rng, "short").text + ".", caption(scene, rng, form_of_caption(rng, 0.5)).text]
        texts.append(" ".join(parts if rng.random() < 0.5 else reversed(parts)))
    return texts


def bound_captions(tokenizer, count: int, rng: np.random.Generator, form: str) -> list[Said]:
    captioned = (caption(random_scene(rng), rng, form) for _ in range(count))
    read = ((words, t5_tokens(tokenizer, words.text)) for words in captioned)
    return [said(words, tokens.ids, tokens.spans) for words, tokens in read]


def form_of_caption(rng: np.random.Generator, long_share: float) -> str:
    return "long" if rng.random() < long_share else "short"


def pictures(of: list[Scene], resolution: int) -> Tensor:
    """(N, 3, H, W) uint8."""
    return torch.from_numpy(np.stack([as_uint8(render(scene, resolution)) for scene in of])).permute(0, 3, 1, 2)


def t5_tokenizer(texts: list[str], pieces: int):
    """Unigram with T5's ids and pre-tokenizer: <pad> 0, </s> 1, <unk> 2, pieces, then sentinels from 99 down to 0.

    Latin letters are lower-cased and lose their accents; other characters become <unk>.
    """
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
        trainers,
    )

    words = Counter(word for text in texts for word in re.findall(r"[^\W\d_]+", text)).most_common(pieces)
    total = sum(count for _, count in words)
    whole = [("▁" + word, math.log(count / total)) for word, count in words]

    # The trainer looks for what words share and so finds their parts, which new words are spelled with.
    learner = Tokenizer(models.Unigram())
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Metaspace(),
            pre_tokenizers.Split(Regex(r"[^\p{L}\p{N}▁]"), "isolated"),  # no piece joins a word and its full stop
        ]
    )
    learner.train_from_iterator(texts, trainers.UnigramTrainer(vocab_size=pieces, show_progress=False))
    known = {piece for piece, _ in whole} | {"<unk>"}
    rarer = min(score for _, score in whole)  # a word seen in training is never spelled out
    vocabulary = json.loads(learner.to_str())["model"]["vocab"]
    parts = [(piece, score + rarer) for piece, score in vocabulary if piece not in known]
    known |= {piece for piece, _ in parts}
    characters = [(c, 4 * rarer) for c in ["▁", *PRINTABLE] if c not in known]
    sentinels = [(f"<extra_id_{i}>", 0.0) for i in reversed(range(SENTINELS))]

    vocabulary = [*((token, 0.0) for token in SPECIAL), *whole, *parts, *characters, *sentinels]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=2, byte_fallback=False))
    tokenizer.normalizer = normalizers.Precompiled(folding_table())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme="always")]
    )
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token, _ in reversed(sentinels)])
    return tokenizer


def folding_table() -> bytes:
    """Lower case without accents for Latin letters, compiled for T5's kind of tokenizer file."""
    import sentencepiece

    rules = []
    for character in map(chr, [*range(0x21, 0x7F), *range(0xA1, 0x250)]):
        parts = unicodedata.normalize("NFKD", character).casefold()
        folded = "".join(c for c in parts if not unicodedata.combining(c)).strip()
        if folded and folded != character:
            rules.append(f"{ord(character):X}\t{' '.join(f'{ord(c):X}' for c in folded)}\n")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rules.tsv"
        file.write_text("".join(rules))
        spec = sentencepiece.SentencePieceNormalizer(rule_tsv=str(file)).serialized_normalizer_spec()
    return protobuf_field(spec, 2)  # NormalizerSpec.precompiled_charsmap


def protobuf_field(message: bytes, number: int) -> bytes:
    """The bytes of one length-delimited field of a message whose other fields are numbers or bytes."""
    position = 0

    def varint() -> int:
        nonlocal position
        value = shift = 0
        while True:
            byte = message[position]
            position += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while position < len(message):
        key = varint()
        size = varint()
        if key & 7 == 2:
            if key >> 3 == number:
                return message[position : position + size]
            position += size
    raise ValueError(
        f"The message of {len(message)} bytes has no field {number}. Use a release of sentencepiece >= 0.2.1."
    )


def clip_merges(texts: list[str], most: int) -> list[tuple[str, str]]:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.pre_tokenizer = clip_tokenizer([]).pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=2 * 256 + most,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    learner.train_from_iterator(texts, trainer)
    return [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]][:most]


def span_corruption(
    ids: list[int], rng: np.random.Generator, density: float, mean_span: float, first_sentinel: int
) -> tuple[list[int], list[int]]:
    """Hidden spans become sentinels in the input; the target spells them out behind the same sentinels.

    ids end with </s>, which is never hidden. Sentinels count down from first_sentinel.
    """
    length = len(ids) - 1
    hidden = min(max(round(length * density), 1), length - 1)
    spans = min(max(round(hidden / mean_span), 1), hidden, length - hidden)
    hidden_lengths = random_parts(hidden, spans, rng)
    seen_lengths = random_parts(length - hidden, spans, rng)

    inputs, targets, position = [], [], 0
    for i, (seen, masked) in enumerate(zip(seen_lengths, hidden_lengths, strict=True)):
        sentinel = first_sentinel - i
        inputs += [*ids[position : position + seen], sentinel]
        targets += [sentinel, *ids[position + seen : position + seen + masked]]
        position += seen + masked
    return [*inputs, ids[-1]], [*targets, ids[-1]]


def random_parts(total: int, parts: int, rng: np.random.Generator) -> list[int]:
    """Random positive whole numbers that add up to the total."""
    borders = np.sort(rng.choice(total - 1, parts - 1, replace=False)) + 1
    return np.diff([0, *borders, total]).tolist()


def corrupted_batch(rows: list[list[int]], rng: np.random.Generator, training: dict, first_sentinel: int) -> dict:
    pairs = [
        span_corruption(ids, rng, training["noise_density"], training["mean_span"], first_sentinel) for ids in rows
    ]
    inputs, mask = padded([pair[0] for pair in pairs])
    targets, real = padded([pair[1] for pair in pairs])
    return {"input_ids": inputs, "attention_mask": mask.long(), "labels": targets.masked_fill(~real, -100)}


def new_t5(network: dict, vocabulary: int):
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        **network,
        vocab_size=vocabulary,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        dropout_rate=0.0,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=1,
    )
    model = T5ForConditionalGeneration(config)
    nn.init.normal_(model.lm_head.weight, std=config.d_model**-0.5)
    return model


def train_t5(
    model,
    rows: dict[str, list[list[int]]],
    training: dict,
    seed: int,
    first_sentinel: int,
    bound: dict[str, list[Said]] | None = None,
) -> Steps:
    """rows: tokens of texts by form; each batch has one form, so that little is padding.

    bound: captions by form whose tokens are asked what they are about, where training["binding"] says how much that counts.
    """
    rng = np.random.default_rng(seed)
    forms = list(training["forms"])
    weight = training.get("binding", 0.0)
    readers = Readers(model.config.d_model)
    optimizer, schedule = optimization(nn.ModuleList([model, readers]), training, betas=(0.9, 0.98))
    for step in range(1, training["steps"] + 1):
        of_form = rows[rng.choice(forms, p=list(training["forms"].values()))]
        chosen = [of_form[i] for i in rng.integers(len(of_form), size=training["batch"])]
        with low_precision(training):
            loss = model(**corrupted_batch(chosen, rng, training, first_sentinel)).loss
            if weight:
                of_form = bound[rng.choice(list(bound))]
                whole = [of_form[i] for i in rng.integers(len(of_form), size=training["batch"])]
                ids, mask = padded([one.ids for one in whole])
                states = model.encoder(input_ids=ids, attention_mask=mask.long()).last_hidden_state
                loss = loss + weight * readers(states, stacked([one.answers for one in whole]))
        descend(model, loss, optimizer, schedule)
        yield step, loss.item()


@torch.no_grad()
def span_accuracy(model, rows: list[list[int]], training: dict, seed: int, first_sentinel: int) -> float:
    """Share of the hidden tokens named right, given the ones before; sentinels and </s> do not count."""
    rng = np.random.default_rng(seed)
    right = total = 0
    for start in range(0, len(rows), 250):
        batch = corrupted_batch(rows[start : start + 250], rng, training, first_sentinel)
        labels = batch["labels"]
        counts = (labels > 1) & (labels < first_sentinel - SENTINELS + 1)
        right += (model(**batch).logits.argmax(-1) == labels)[counts].sum().item()
        total += counts.sum().item()
    return right / total


def new_clip(network: dict, vocabulary: int):
    from open_clip.model import CLIP

    text = network["text_cfg"] | {"vocab_size": vocabulary}
    return CLIP(network["embed_dim"], network["vision_cfg"], text, quick_gelu=network["quick_gelu"])


def train_clip(model, tokenizer, of: list[Scene], images: Tensor, data: dict, training: dict, seed: int) -> Steps:
    """InfoNCE in both directions (Radford et al. 2021). Each batch is all short or all long captions, freshly worded.

    The last `len(STYLES) * in_every_style` scenes are some scenes drawn in every style. In the second half
    some batches are hard: scenes with the same colours, or scenes in every style under long captions, which name it.
    Otherwise colours alone find the caption, and shape, style and place are learned late.
    """
    from open_clip.transformer import PatchDropout

    rng = np.random.default_rng(seed)
    normalise = image_normalisation()
    single = len(of) - len(STYLES) * training.get("in_every_style", 0)
    groups = [group for group in of_the_same_colors(of[:single]) if len(group) >= training["batch"]]
    sizes = np.array([len(group) for group in groups])
    families = np.arange(single, len(of)).reshape(-1, len(STYLES))
    shares = {"any": 0.0, "colors": training["alike_share"], "styles": training.get("styles_share", 0.0)}
    shares["any"] = 1 - sum(shares.values())
    optimizer, schedule = optimization(model, training, betas=(0.9, 0.98))
    for step in range(1, training["steps"] + 1):
        late = 2 * step > training["steps"]
        model.visual.patch_dropout = nn.Identity() if late else PatchDropout(training["patch_dropout"])

        kind = rng.choice(list(shares), p=list(shares.values())) if late else "any"
        form = "long" if kind == "styles" else form_of_caption(rng, data["long_share"])
        if kind == "styles":
            chosen = rng.choice(families, training["batch"] // len(STYLES), replace=False).ravel()
        else:
            source = groups[rng.choice(len(groups), p=sizes / sizes.sum())] if kind == "colors" else single
            chosen = rng.choice(source, training["batch"], replace=False)
        ids, _ = padded([clip_tokens(tokenizer, caption(of[i], rng, form).text).ids for i in chosen])
        with low_precision(training):
            text = text_embedding(model, ids)
            image = model.encode_image(normalise(images[chosen]))

        text, image = text.float(), image.float()
        logits = model.logit_scale.exp() * F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T
        matches = torch.arange(len(chosen))
        loss = (F.cross_entropy(logits, matches) + F.cross_entropy(logits.T, matches)) / 2
        descend(model, loss, optimizer, schedule)
        model.logit_scale.data.clamp_(0, math.log(100))
        yield step, loss.item()


def train_vision(model, of: list[Scene], images: Tensor, text: Tensor, training: dict, seed: int) -> Steps:
    """The image tower goes on alone: it also learns to name a picture's style, which contrast with captions hardly teaches.

    text: (N, E) embeddings of one caption of each scene by the finished text tower, which stays as it is.
    """
    rng = np.random.default_rng(seed)
    normalise = image_normalisation()
    styles = torch.tensor([list(STYLES).index(scene.style) for scene in of])
    namer = nn.Sequential(nn.LayerNorm(text.shape[1]), nn.Linear(text.shape[1], len(STYLES)))
    text = F.normalize(text, dim=-1)
    learning = nn.ModuleList([model.visual, namer])
    optimizer, schedule = optimization(learning, training, betas=(0.9, 0.98))
    for step in range(1, training["steps"] + 1):
        chosen = rng.choice(len(of), training["batch"], replace=False)
        with (
            low_precision(training),
            sdpa_kernel(SDPBackend.MATH),
        ):  # whose backward is the fast one in bfloat16 on CPUs
            image = model.encode_image(normalise(images[chosen]))
        image = image.float()
        logits = model.logit_scale.exp() * F.normalize(image, dim=-1) @ text[chosen].T
        matches = torch.arange(len(chosen))
        contrast = (F.cross_entropy(logits, matches) + F.cross_entropy(logits.T, matches)) / 2
        naming = F.cross_entropy(namer(image), styles[chosen])
        descend(learning, naming + training["contrast"] * contrast, optimizer, schedule)
        yield step, naming.item()


def of_the_same_colors(of: list[Scene]) -> list[np.ndarray]:
    """Indices of the scenes whose objects have the same colours."""
    groups = {}
    for i, scene in enumerate(of):
        groups.setdefault(tuple(sorted(item.color for item in scene.objects)), []).append(i)
    return [np.array(group) for group in groups.values()]


def text_embedding(model, ids: Tensor) -> Tensor:
    states = text_states(model, ids)
    return projected(model, states[torch.arange(len(ids)), ids.argmax(1)])  # the end token has the largest id


def image_normalisation():
    import open_clip

    mean = torch.tensor(open_clip.OPENAI_DATASET_MEAN).view(3, 1, 1)
    std = torch.tensor(open_clip.OPENAI_DATASET_STD).view(3, 1, 1)
    return lambda images: (images / 255 - mean) / std


def optimization(model: nn.Module, training: dict, betas: tuple[float, float]):
    """AdamW without decay of vectors; the learning rate rises linearly, then falls as a cosine to zero."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups = [
        {"params": matrices, "weight_decay": training["weight_decay"]},
        {"params": vectors, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=training["learning_rate"], betas=betas)
    warmup, steps = training["warmup"], training["steps"]

    def factor(step: int) -> float:
        return min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * step / steps))

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def low_precision(training: dict):
    """The network's products in bfloat16 where the recipe asks for it; faster where hardware has it."""
    return torch.autocast("cpu", torch.bfloat16, enabled=training.get("precision") == "bfloat16")


def descend(model: nn.Module, loss: Tensor, optimizer, schedule) -> None:
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    schedule.step()


def write(file: Path, content: bytes | str | dict) -> None:
    """Whole or not at all."""
    if isinstance(content, dict):
        content = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    if isinstance(content, str):
        content = content.encode("utf-8")
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_name(file.name + ".part")
    unfinished.write_bytes(content)
    os.replace(unfinished, file)


def write_weights(file: Path, weights: dict[str, Tensor]) -> None:
    from safetensors.torch import save

    write(file, save({k: w.detach().half().contiguous() for k, w in weights.items()}, metadata={"format": "pt"}))


def write_t5_tokenizer(folder: Path, tokenizer) -> None:
    write(folder / "tokenizer.json", tokenizer.to_str(pretty=True) + "\n")
    write(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "T5TokenizerFast",
            "model_max_length": T5_LENGTH,
            "extra_ids": SENTINELS,
            "pad_token": "<pad>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
        },
    )


def write_t5(folder: Path, model, network: dict) -> None:
    """The encoder alone; the decoder has done its work."""
    c = model.config
    config = {
        "architectures": ["T5EncoderModel"],
        "model_type": "t5",
        **network,
        "vocab_size": c.vocab_size,
        "feed_forward_proj": "gated-gelu",
        "is_gated_act": True,
        "relative_attention_num_buckets": c.relative_attention_num_buckets,
        "relative_attention_max_distance": c.relative_attention_max_distance,
        "layer_norm_epsilon": c.layer_norm_epsilon,
        "dropout_rate": 0.0,
        "is_encoder_decoder": True,
        "tie_word_embeddings": False,
        "decoder_start_token_id": 0,
        "pad_token_id": 0,
        "eos_token_id": 1,
    }
    weights = {
        name: weight
        for name, weight in model.state_dict().items()
        if name.startswith(("shared.", "encoder.")) and name != "encoder.embed_tokens.weight"
    }
    write_weights(folder / "model.safetensors", weights)
    write(folder / "config.json", config)


def write_clip_tokenizer(folder: Path, merges: list[tuple[str, str]]) -> None:
    """The same merges twice: for open_clip's SimpleTokenizer and for transformers' CLIPTokenizer."""
    lines = "\n".join(["#version: 0.2", *(" ".join(pair) for pair in merges)])
    write(folder / MERGES_FILE, gzip.compress(lines.encode("utf-8"), mtime=0))  # an end of line would count as a merge
    write(folder / "merges.txt", lines + "\n")
    write(folder / "vocab.json", clip_vocabulary(merges))
    write(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "CLIPTokenizer",
            "model_max_length": 77,
            "bos_token": "<|startoftext|>",
            "eos_token": "<|endoftext|>",
            "unk_token": "<|endoftext|>",
            "pad_token": "<|endoftext|>",
        },
    )


def write_clip(folder: Path, model, network: dict, name: str) -> None:
    import open_clip

    text = network["text_cfg"] | {
        "vocab_size": model.vocab_size,
        "hf_tokenizer_name": name,  # makes open_clip.get_tokenizer read this folder instead of OpenAI's vocabulary
    }
    config = {
        "model_cfg": network | {"text_cfg": text},
        "preprocess_cfg": {"mean": list(open_clip.OPENAI_DATASET_MEAN), "std": list(open_clip.OPENAI_DATASET_STD)},
    }
    write_weights(folder / "open_clip_model.safetensors", model.state_dict())
    write(folder / "open_clip_config.json", config)


def make_t5(recipe: dict, folder: Path) -> Steps:
    data, t5 = recipe["data"], recipe["t5"]
    seed, long_share = data["seed"], data["long_share"]
    tokenizer = t5_tokenizer(captions(t5["tokenizer"]["captions"], seed, long_share), t5["tokenizer"]["pieces"])
    write_t5_tokenizer(folder, tokenizer)
    tokenizer = load_t5_tokenizer(folder)

    torch.manual_seed(seed)
    vocabulary = tokenizer.get_vocab_size()
    model = new_t5(t5["network"], vocabulary)
    texts = {
        "short": captions(30_000, seed + 1, long_share=0.0),
        "long": captions(30_000, seed + 1, long_share=1.0),
        "pair": caption_pairs(30_000, seed + 1),
    }
    rows = {form: [t5_tokens(tokenizer, text).ids for text in of_form] for form, of_form in texts.items()}
    bound = None
    if t5["training"].get("binding"):
        rng = np.random.default_rng(seed + 7)
        bound = {form: bound_captions(tokenizer, 20_000, rng, form) for form in ("short", "long")}
    yield from train_t5(model, rows, t5["training"], seed, vocabulary - 1, bound)

    write_t5(folder, model, t5["network"])
    model.eval()
    unseen = {"captions": captions(data["held_out"], seed + 3, long_share), "pairs": caption_pairs(1000, seed + 3)}
    accuracy = {
        kind: span_accuracy(
            model, [t5_tokens(tokenizer, text).ids for text in texts], t5["training"], seed, vocabulary - 1
        )
        for kind, texts in unseen.items()
    }
    write(folder.parent / "t5.figures.json", {"t5_span_accuracy": {k: round(a, 3) for k, a in accuracy.items()}})


def make_clip(recipe: dict, folder: Path) -> Steps:
    data, clip = recipe["data"], recipe["clip"]
    seed = data["seed"]
    merges = clip_merges(captions(clip["tokenizer"]["captions"], seed, data["long_share"]), clip["tokenizer"]["merges"])
    write_clip_tokenizer(folder, merges)
    tokenizer = load_clip_tokenizer(folder)

    of = scenes(data["pictures"], seed + 1)
    of += in_every_style(scenes(clip["training"].get("in_every_style", 0), seed + 5))
    images = pictures(of, clip["network"]["vision_cfg"]["image_size"])
    torch.manual_seed(seed)
    model = new_clip(clip["network"], len(clip_vocabulary(merges)))
    yield from train_clip(model, tokenizer, of, images, data, clip["training"], seed)
    write_clip(folder, model, clip["network"], recipe["name"])


def make_vision(recipe: dict, folder: Path) -> Steps:
    """Continues the image tower of the CLIP that `make_clip` wrote; its text tower stays what it is."""
    data, clip = recipe["data"], recipe["clip"]
    training, seed = clip["vision_training"], data["seed"]
    model, _ = load_clip(folder, "cpu", torch.float32)
    tokenizer = load_clip_tokenizer(folder)
    of = in_every_style(scenes(training["scenes"], seed + 6))
    images = pictures(of, clip["network"]["vision_cfg"]["image_size"])
    rng = np.random.default_rng(seed + 6)
    text = []
    with torch.no_grad():
        for start in range(0, len(of), 200):
            rows = [clip_tokens(tokenizer, caption(s, rng, "long").text).ids for s in of[start : start + 200]]
            text.append(text_embedding(model, padded(rows)[0]))
    model.visual.train().requires_grad_(True)
    torch.manual_seed(seed)
    yield from train_vision(model, of, images, torch.cat(text), training, seed)
    write_clip(folder, model, clip["network"], recipe["name"])


@torch.no_grad()
def measure(folder: Path, recipe: dict) -> dict:
    """What the finished files can do on scenes that training never saw."""
    encoders = load_encoders(folder)
    seed, count = recipe["data"]["seed"] + 3, recipe["data"]["held_out"]
    rng = np.random.default_rng(seed)
    figures = {}

    of = scenes(1024, seed)
    image = F.normalize(encoders.encode_image(pictures(of, 64) / 127.5 - 1), dim=-1)
    for form in ("short", "long"):
        pooled = encoders.encode_text([caption(scene, rng, form).text for scene in of]).clip_pooled
        scores = (image @ F.normalize(pooled, dim=-1).T).view(16, 64, 16, 64).diagonal(dim1=0, dim2=2)  # (64, 64, 16)
        matches = torch.arange(64)[:, None]
        figures[f"retrieval_top1_of_64_{form}_captions"] = {
            "caption_of_picture": share(scores.argmax(1) == matches),
            "picture_of_caption": share(scores.argmax(0) == matches),
        }

    of = [random_scene(rng, 1) for _ in range(2 * count)]
    image = encoders.encode_image(pictures(of, 64) / 127.5 - 1)
    texts = encoders.encode_text([caption(scene, rng, "long").text for scene in of])
    t5 = texts.t5_tokens.sum(1) / texts.t5_mask.sum(1, keepdim=True)
    labels = {
        "shape": [SHAPES.index(scene.objects[0].shape) for scene in of],
        "color": [list(COLORS).index(scene.objects[0].color) for scene in of],
        "style": [list(STYLES).index(scene.style) for scene in of],
        "place": [PLACES.index(scene.objects[0].place) for scene in of],
    }
    for source, features in (("image", image), ("clip_pooled", texts.clip_pooled), ("t5_mean", t5)):
        figures[f"linear_probe_of_{source}"] = {
            name: probe(features, torch.tensor(values)) for name, values in labels.items()
        }
    return figures | {"linear_probe_of_tokens": token_probes(encoders, [random_scene(rng, 2) for _ in of], rng)}


def token_probes(encoders, of: list[Scene], rng: np.random.Generator) -> dict:
    """What single tokens know of the object they belong to, of which there are several: by encoder, the word the token
    ends, and the topic. Captions are long and say everything."""
    captioned = [caption(scene, rng, "long") for scene in of]
    texts = [words.text for words in captioned]
    prompts, embedded = encoders.tokens(texts), encoders.encode_text(texts)
    claims = [words.claims.objects[0] for words in captioned]
    topics = {name: [options.index(getattr(one, name)) for one in claims] for name, options in OF_OBJECTS.items()}
    topics["style"] = [STYLES.index(words.claims.style) for words in captioned]
    ends = {"shape": [one.span[1] for one in claims]}  # a phrase ends with its color and its shape
    ends["color"] = [end - len(one.shape) - 1 for end, one in zip(ends["shape"], claims, strict=True)]
    ends["place"] = [said_of(text, one)[1][1] for text, one in zip(texts, claims, strict=True)]
    figures: dict = {}
    for name, states in (("clip", embedded.clip_tokens), ("t5", embedded.t5_tokens)):
        spans = [getattr(prompt, name).spans for prompt in prompts]
        for word, stops in ends.items():
            at = [columns(row, [(stop - 1, stop)])[0] for row, stop in zip(spans, stops, strict=True)]
            features = states[torch.arange(len(at)), at]
            figures.setdefault(name, {})[word] = {
                topic: probe(features, torch.tensor(values)) for topic, values in topics.items()
            }
    return figures


def probe(features: Tensor, labels: Tensor, ridge: float = 1e-3) -> float:
    """Accuracy of ridge regression to one-hot labels, fitted on the first half, tested on the second."""
    half = len(labels) // 2
    x = (features - features[:half].mean(0)) / features[:half].std(0).clamp(min=1e-6)
    x = F.pad(x, (0, 1), value=1.0).double()
    targets = F.one_hot(labels).double()
    gram = x[:half].T @ x[:half] + ridge * half * torch.eye(x.shape[1], dtype=torch.float64)
    weights = torch.linalg.solve(gram, x[:half].T @ targets[:half])
    return share((x[half:] @ weights).argmax(1) == labels[half:])


def share(right: Tensor) -> float:
    return round(right.double().mean().item(), 3)


def describe(folder: Path, recipe: dict) -> dict:
    """Writes encoders.json, the last file: what the folder holds, how it was made and what it measured."""
    encoders = load_encoders(folder)
    accuracy = folder / "t5.figures.json"
    if accuracy.is_file():
        figures = json.loads(accuracy.read_text())
    else:  # described before; the decoder that could measure it again is gone
        figures = {
            "t5_span_accuracy": json.loads((folder / "encoders.json").read_text())["measured"]["t5_span_accuracy"]
        }
    figures |= measure(folder, recipe)
    description = {
        "format_version": FORMAT_VERSION,
        "name": recipe["name"],
        "license": "Apache-2.0",
        "clip": {"context_length": 77, "width": encoders.clip_width, "projection_width": encoders.image_width},
        "t5": {"context_length": T5_LENGTH, "width": encoders.t5_width},
        "training": {"code": "ediffi_core.training.encoders", "data": "ediffi_core.shapeworld", "recipe": recipe},
        "measured": figures,
    }
    write(folder / "encoders.json", description)
    accuracy.unlink(missing_ok=True)
    return figures


def report(name: str, steps: int, progress: Steps, every: float = 10.0) -> None:
    start = shown = time.monotonic()
    recent = []
    for step, loss in progress:
        recent.append(loss)
        now = time.monotonic()
        if now - shown >= every or step == steps:
            each = (now - start) / step
            left = each * (steps - step)
            mean = sum(recent) / len(recent)
            print(
                f"{name} step {step}/{steps}  loss {mean:.3f}  {each:.2f} s/step  {left / 60:.1f} min left", flush=True
            )
            shown, recent = now, []


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m ediffi_core.training.encoders", description=__doc__.split("\n")[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--out", type=Path, default=None, help="folder to write (default: demo/encoders/NAME)")
    parser.add_argument(
        "--part", choices=("t5", "clip", "vision", "describe"), help="only this part (default: all, in order)"
    )
    parser.add_argument("--threads", type=int, default=None, help="CPU threads (default: PyTorch's choice)")
    options = parser.parse_args(arguments)

    recipe = tomllib.loads(options.recipe.read_text(encoding="utf-8"))
    folder = options.out or Path("demo/encoders") / recipe["name"]
    if options.threads:
        torch.set_num_threads(options.threads)

    if options.part in (None, "t5"):
        report("T5", recipe["t5"]["training"]["steps"], make_t5(recipe, folder / "t5"))
    if options.part in (None, "clip"):
        report("CLIP", recipe["clip"]["training"]["steps"], make_clip(recipe, folder / "clip"))
    if options.part == "vision" or (options.part is None and "vision_training" in recipe["clip"]):
        report("CLIP image", recipe["clip"]["vision_training"]["steps"], make_vision(recipe, folder / "clip"))
    if options.part in (None, "describe"):
        print(json.dumps(describe(folder, recipe), indent=2))


if __name__ == "__main__":
    main()
