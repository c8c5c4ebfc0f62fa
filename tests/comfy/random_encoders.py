"""A folder of small random encoders in the layouts of the large ones: t5/ as Hugging Face's, clip/ as open_clip's."""

import gzip
import json

import torch
from safetensors.torch import load_file, save_file

WORDS = ["a", "red", "green", "fox", "cat", "hat", "on", "the", "grass", "striped", "circle", "and", "under"]


def write_encoders(folder, seed=0, quick_gelu=False, dtype=torch.half):
    write_t5(folder / "t5", seed, dtype=dtype)
    write_clip(folder / "clip", seed, quick_gelu, dtype=dtype)
    return folder


def write_t5(folder, seed, width=14, heads=2, channels=8, hidden=20, layers=2, vocabulary=None, dtype=torch.half):
    folder.mkdir(parents=True)
    own = write_t5_tokenizer(folder)
    vocabulary = vocabulary or own
    shapes = {"shared.weight": (vocabulary, width), "encoder.final_layer_norm.weight": (width,)}
    for i in range(layers):
        block = f"encoder.block.{i}.layer"
        for name in "qkv":
            shapes[f"{block}.0.SelfAttention.{name}.weight"] = (heads * channels, width)
        shapes[f"{block}.0.SelfAttention.o.weight"] = (width, heads * channels)
        shapes[f"{block}.1.DenseReluDense.wi_0.weight"] = (hidden, width)
        shapes[f"{block}.1.DenseReluDense.wi_1.weight"] = (hidden, width)
        shapes[f"{block}.1.DenseReluDense.wo.weight"] = (width, hidden)
        for j in range(2):
            shapes[f"{block}.{j}.layer_norm.weight"] = (width,)
    shapes["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"] = (32, heads)
    save(folder / "model.safetensors", shapes, seed, dtype)
    config = dict(
        d_model=width, d_kv=channels, d_ff=hidden, num_layers=layers, num_heads=heads, vocab_size=vocabulary,
        feed_forward_proj="gated-gelu", model_type="t5", tie_word_embeddings=False,
    )  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))


def write_t5_tokenizer(folder):
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors

    special = ["<pad>", "</s>", "<unk>"]
    pieces = [("▁" + word, -2.0) for word in WORDS] + [(c, -9.0) for c in "▁abcdefghijklmnopqrstuvwxyz,.()"]
    sentinels = [f"<extra_id_{i}>" for i in reversed(range(100))]
    vocabulary = [*((token, 0.0) for token in special), *pieces, *((token, 0.0) for token in sentinels)]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=2, byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme="always")]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in [*special, *reversed(sentinels)]])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = dict(
        tokenizer_class="T5TokenizerFast", extra_ids=100, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return tokenizer.get_vocab_size()


def write_clip(folder, seed, quick_gelu, text=12, vision=16, embedding=10, layers=2, vocabulary=None, dtype=torch.half):
    folder.mkdir(parents=True)
    merges = ["r e", "re d</w>", "f o", "fo x</w>", "c a", "ca t</w>"]
    (folder / "bpe_merges.txt.gz").write_bytes(gzip.compress("\n".join(["#version: 0.2", *merges]).encode()))
    vocabulary = vocabulary or 2 * 256 + len(merges) + 2
    shapes = {
        "positional_embedding": (77, text),
        "token_embedding.weight": (vocabulary, text),
        "text_projection": (text, embedding),
        "ln_final.weight": (text,),
        "ln_final.bias": (text,),
        "visual.class_embedding": (vision,),
        "visual.positional_embedding": ((32 // 8) ** 2 + 1, vision),
        "visual.proj": (vision, embedding),
        "visual.conv1.weight": (vision, 3, 8, 8),
        "logit_scale": (),
    }
    for tower, width, depth in (("", text, layers), ("visual.", vision, 2)):
        for i in range(depth):
            block = f"{tower}transformer.resblocks.{i}"
            for name in ("ln_1", "ln_2"):
                shapes |= {f"{block}.{name}.weight": (width,), f"{block}.{name}.bias": (width,)}
            shapes |= {
                f"{block}.attn.in_proj_weight": (3 * width, width),
                f"{block}.attn.in_proj_bias": (3 * width,),
                f"{block}.attn.out_proj.weight": (width, width),
                f"{block}.attn.out_proj.bias": (width,),
                f"{block}.mlp.c_fc.weight": (4 * width, width),
                f"{block}.mlp.c_fc.bias": (4 * width,),
                f"{block}.mlp.c_proj.weight": (width, 4 * width),
                f"{block}.mlp.c_proj.bias": (width,),
            }
    for name in ("ln_pre", "ln_post"):
        shapes |= {f"visual.{name}.weight": (vision,), f"visual.{name}.bias": (vision,)}
    save(folder / "open_clip_model.safetensors", shapes, seed, dtype)
    config = {
        "model_cfg": {
            "embed_dim": embedding,
            "quick_gelu": quick_gelu,
            "vision_cfg": dict(image_size=32, patch_size=8, width=vision, head_width=8, layers=2),
            "text_cfg": dict(context_length=77, vocab_size=vocabulary, width=text, heads=2, layers=layers),
        },
        "preprocess_cfg": {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.25, 0.3]},
    }
    (folder / "open_clip_config.json").write_text(json.dumps(config))


def save(file, shapes, seed, dtype=torch.half):
    """Half precision, as ComfyUI holds text encoders."""
    generator = torch.Generator().manual_seed(seed)
    weights = {name: torch.randn(shape, generator=generator) * 0.5 for name, shape in shapes.items()}
    save_file({name: weight.to(dtype) for name, weight in weights.items()}, file)


def split_file(file, parts=2):
    """Replaces a file by parts and the index that lists them, as Hugging Face's libraries do."""
    weights = load_file(file)
    names = [f"{file.stem}-{i + 1:05}-of-{parts:05}.safetensors" for i in range(parts)]
    place = {name: names[i % parts] for i, name in enumerate(sorted(weights))}
    for part in names:
        save_file({name: weights[name] for name in place if place[name] == part}, file.with_name(part))
    file.with_name(f"{file.name}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": place}))
    file.unlink()
    return [file.with_name(part) for part in names]
