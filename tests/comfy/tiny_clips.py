"""ComfyUI's CLIPs with its real tokenizers and tiny random text encoders, as its loaders put them together."""

import io

import torch
import torch.nn.functional as F

CLIP = dict(hidden_size=8, intermediate_size=16, num_attention_heads=2, num_hidden_layers=3)
T5 = dict(d_model=8, d_ff=16, d_kv=4, num_heads=2, num_layers=2)
LLM = dict(hidden_size=16, intermediate_size=16, num_attention_heads=2, num_key_value_heads=1, num_hidden_layers=3)
KINDS = [
    "sd15", "sd2", "sdxl", "refiner", "sd3", "sd3-clip", "flux", "chroma", "wan", "lumina2",
    "z-image", "klein", "qwen-image", "ovis",
]  # fmt: skip
WITHOUT_WEIGHTS = KINDS[-4:]  # language models that read the brackets of weights as text


def tiny_clip(kind: str, embeddings=None):
    """A CLIP of ComfyUI, named after the model that it belongs to."""
    import comfy.sd
    import comfy.sd1_clip
    import comfy.sdxl_clip
    import comfy.supported_models_base
    import comfy.text_encoders.flux
    import comfy.text_encoders.lumina2
    import comfy.text_encoders.ovis
    import comfy.text_encoders.pixart_t5
    import comfy.text_encoders.qwen_image
    import comfy.text_encoders.sd2_clip
    import comfy.text_encoders.sd3_clip
    import comfy.text_encoders.wan
    import comfy.text_encoders.z_image

    stock = comfy.text_encoders
    sdxl = comfy.sdxl_clip
    tokenizer, encoders = {
        "sd15": (comfy.sd1_clip.SD1Tokenizer, comfy.sd1_clip.SD1ClipModel),
        "sd2": (stock.sd2_clip.SD2Tokenizer, stock.sd2_clip.SD2ClipModel),
        "sdxl": (sdxl.SDXLTokenizer, sdxl.SDXLClipModel),
        "refiner": (sdxl.SDXLTokenizer, sdxl.SDXLRefinerClipModel),
        "sd3": (stock.sd3_clip.SD3Tokenizer, stock.sd3_clip.sd3_clip()),
        "sd3-clip": (stock.sd3_clip.SD3Tokenizer, stock.sd3_clip.sd3_clip(t5=False)),
        "flux": (stock.flux.FluxTokenizer, stock.flux.flux_clip()),
        "chroma": (stock.pixart_t5.PixArtTokenizer, stock.pixart_t5.pixart_te()),
        "wan": (stock.wan.WanT5Tokenizer, stock.wan.te()),
        "lumina2": (stock.lumina2.LuminaTokenizer, stock.lumina2.te()),
        "z-image": (stock.z_image.ZImageTokenizer, stock.z_image.te()),
        "klein": (stock.flux.KleinTokenizer, stock.flux.klein_te()),
        "ovis": (stock.ovis.OvisTokenizer, stock.ovis.te()),
        "qwen-image": (stock.qwen_image.QwenImageTokenizer, stock.qwen_image.te()),
    }[kind]
    target = comfy.supported_models_base.ClipTarget(tokenizer, encoders)
    names = {"clip_l": CLIP, "clip_g": CLIP, "clip_h": CLIP, "t5xxl": T5, "umt5xxl": T5 | {"vocab_size": 400}}
    names |= {"gemma2_2b": LLM | {"vocab_size": 400}, "qwen3_4b": LLM, "qwen3_2b": LLM, "qwen25_7b": LLM}
    if kind == "klein":  # which reads the layers 9, 18 and 27
        names["qwen3_4b"] = LLM | {"num_hidden_layers": 28}
    options = {f"{name}_model_config": config for name, config in names.items()}
    spiece = {"spiece_model": sentencepiece_model()} if kind in ("wan", "lumina2") else {}
    clip = comfy.sd.CLIP(target, embeddings, tokenizer_data=spiece, model_options=options | {"dtype": torch.float32})
    for encoder in clip.cond_stage_model.children():
        if hasattr(encoder.transformer, "visual"):
            del encoder.transformer.visual  # for pictures, and not tiny
        generator = torch.Generator().manual_seed(1)
        for parameter in encoder.parameters():
            parameter.data.normal_(std=0.3, generator=generator)
    if kind == "sd3":  # CLIP's columns are padded to the width of T5-XXL
        clip.cond_stage_model.t5xxl.register_forward_hook(lambda _, __, out: (F.pad(out[0], (0, 4088)), *out[1:]))
    return clip


def sentencepiece_model() -> torch.Tensor:
    """A small sentencepiece model with the special tokens of umT5, as a file of ComfyUI holds it."""
    import sentencepiece

    sentences = ["a red fox and a red hat in the moonlit castle on a hill", "the moon, a knight, a dragon's eye"] * 50
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences), model_writer=model, vocab_size=320, hard_vocab_limit=False, minloglevel=2,
        byte_fallback=True, pad_id=0, eos_id=1, bos_id=2, unk_id=3,
    )  # fmt: skip
    return torch.frombuffer(bytearray(model.getvalue()), dtype=torch.uint8)
