"""The files: names and folders as in ComfyUI's own templates, tensors under the keys of the real file."""

import io
import json
import math
import zlib
from collections.abc import Callable
from pathlib import Path

import comfy.clip_model
import comfy.clip_vision
import comfy.ldm.models.autoencoder
import comfy.ldm.wan.model
import comfy.ldm.wan.vae
import comfy.ops
import comfy.supported_models as supported
import comfy.text_encoders.flux
import comfy.text_encoders.wan
import safetensors.torch
import torch
from comfy import sd1_clip
from torch import Tensor

from .sizes import CLIP_VISION, KEY, TEXT_OPTIONS, autoencoder

Weights = dict[str, Tensor]
# No attention at the higher resolutions, where it takes most of the time on a processor.
UNET = dict(
    image_size=32, in_channels=4, out_channels=4, model_channels=32, use_spatial_transformer=True, legacy=False,
    use_temporal_resblock=False, use_temporal_attention=False,
)  # fmt: skip
SD15 = UNET | dict(
    context_dim=768, adm_in_channels=None, use_linear_in_transformer=False, channel_mult=[1, 2, 4, 4],
    num_res_blocks=[2, 2, 2, 2], transformer_depth=[0, 0, 1, 1, 1, 1, 0, 0], transformer_depth_middle=1,
    transformer_depth_output=[0, 0, 0, 1, 1, 1, 1, 1, 1, 0, 0, 0],
)  # fmt: skip
SDXL = UNET | dict(
    context_dim=2048, adm_in_channels=2816, num_classes="sequential", use_linear_in_transformer=True,
    channel_mult=[1, 2, 4], num_res_blocks=[2, 2, 2], transformer_depth=[0, 0, 0, 0, 1, 1], transformer_depth_middle=1,
    transformer_depth_output=[0, 0, 0, 0, 0, 0, 1, 1, 1],
)  # fmt: skip
REFINER = UNET | dict(
    context_dim=1280, adm_in_channels=2560, num_classes="sequential", use_linear_in_transformer=True,
    channel_mult=[1, 2, 4, 4], num_res_blocks=[2, 2, 2, 2], transformer_depth=[0, 0, 0, 0, 1, 1, 0, 0],
    transformer_depth_middle=1, transformer_depth_output=[0, 0, 0, 0, 0, 0, 1, 1, 1, 0, 0, 0],
)  # fmt: skip
X4 = UNET | dict(
    in_channels=7, context_dim=1024, adm_in_channels=None, num_classes=1000, use_linear_in_transformer=True,
    channel_mult=[1, 2, 2, 4], num_res_blocks=[2, 2, 2, 2], transformer_depth=[0, 0, 0, 0, 0, 0, 1, 1],
    transformer_depth_middle=1, transformer_depth_output=[0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1],
)  # fmt: skip
FLUX = dict(
    image_model="flux", guidance_embed=True, in_channels=16, out_channels=16, vec_in_dim=768, context_in_dim=4096,
    hidden_size=128, mlp_ratio=4.0, num_heads=1, depth=1, depth_single_blocks=1, axes_dim=[16, 56, 56], theta=10000,
    patch_size=2, qkv_bias=True, txt_ids_dims=[],
)  # fmt: skip
WAN = dict(dim=24, num_heads=1, ffn_dim=32, num_layers=1, out_dim=16)
WAN_VAE = dict(
    dim=2, z_dim=16, dim_mult=[1, 2, 4, 4], num_res_blocks=2, attn_scales=[], temperal_downsample=[False, True, True],
    image_channels=3, conv_out_channels=3, dropout=0.0,
)  # fmt: skip


def write(models: Path) -> None:
    """Write what is not there yet."""
    for name, make in FILES.items():
        path = models / name
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            weights, metadata = make()
            fill(weights, zlib.crc32(name.encode()))
            part = path.with_suffix(".part")
            safetensors.torch.save_file(weights, part, metadata)
            part.rename(path)


def fill(weights: Weights, seed: int) -> None:
    """Random weights that keep the size of what passes through. Norms and numbers that are no weights stay as they are."""
    generator = torch.Generator().manual_seed(seed)
    for key, tensor in weights.items():
        if tensor.is_floating_point() and tensor.numel():
            if key.endswith("bias"):
                tensor = torch.zeros(tensor.shape)
            elif math.prod(tensor.shape[1:]) == 1:
                tensor = torch.ones(tensor.shape)
            else:
                tensor = torch.randn(tensor.shape, generator=generator) * math.prod(tensor.shape[1:]) ** -0.5
            weights[key] = tensor.to(torch.float8_e4m3fn if tensor.ndim > 1 else torch.float16)


def checkpoint(
    config: type, unet: dict, channels: int = 4, levels: int = 4, **recognised_by
) -> Callable[[], tuple[Weights, dict]]:
    """Network, autoencoder and text encoders in one file, as ComfyUI itself would save them."""

    def make():
        configured = config(unet)
        configured.set_inference_dtype(torch.float16, None)
        model = configured.get_model({})
        text = configured.clip_target({}).clip(dtype=torch.float16, model_options=TEXT_OPTIONS)
        vae = comfy.ldm.models.autoencoder.AutoencoderKL(**autoencoder(channels, levels))
        parts = (part.state_dict() for part in (model.diffusion_model, text, vae))
        return model.state_dict_for_saving(*parts), {KEY: json.dumps(recognised_by)}

    return make


def wan(channels: int) -> Callable[[], tuple[Weights, dict]]:
    """The transformer of Wan 2.2; ComfyUI reads its sizes from the file. 36 channels: text and image to video."""

    def make():
        network = comfy.ldm.wan.model.WanModel(**WAN, in_dim=channels, operations=comfy.ops.disable_weight_init)
        return network.state_dict(), {"config": json.dumps({"transformer": {"num_heads": WAN["num_heads"]}})}

    return make


def wan_vae() -> tuple[Weights, dict]:
    return comfy.ldm.wan.vae.WanVAE(**WAN_VAE).state_dict(), {}


def clip_l() -> tuple[Weights, dict]:
    encoder = sd1_clip.SDClipModel(dtype=torch.float16, model_options=TEXT_OPTIONS)
    return encoder.transformer.state_dict(), {KEY: "{}"}


def t5() -> tuple[Weights, dict]:
    encoder = comfy.text_encoders.sd3_clip.T5XXLModel(dtype=torch.float16, model_options=TEXT_OPTIONS)
    return encoder.transformer.state_dict() | looks_like_xxl(), {KEY: "{}"}


def umt5() -> tuple[Weights, dict]:
    options = TEXT_OPTIONS | {"model_name": "umt5xxl"}
    encoder = comfy.text_encoders.wan.UMT5XXlModel(dtype=torch.float16, model_options=options)
    return encoder.transformer.state_dict() | looks_like_xxl() | {"spiece_model": sentencepiece_model()}, {KEY: "{}"}


def sigclip() -> tuple[Weights, dict]:
    config = json.loads(Path(comfy.clip_vision.__file__).with_name("clip_vision_siglip_384.json").read_text())
    encoder = comfy.clip_model.CLIPVisionModelProjection(
        config | CLIP_VISION, torch.float16, None, comfy.ops.disable_weight_init
    )
    return encoder.state_dict(), {KEY: "{}"}


def redux(inside: int = 64) -> tuple[Weights, dict]:
    """The real one is 12288 wide inside."""
    sizes = {"redux_up": (1152, inside), "redux_down": (inside, 4096)}
    layers = {name: torch.nn.Linear(*size) for name, size in sizes.items()}
    weights = {f"{name}.{key}": one for name, layer in layers.items() for key, one in layer.state_dict().items()}
    return weights, {KEY: "{}"}


def looks_like_xxl() -> Weights:
    """The tensor by which ComfyUI tells T5-XXL from smaller ones, without its numbers; no layer takes it."""
    return {"encoder.block.23.layer.1.DenseReluDense.wi_1.weight": torch.empty(10240, 0)}


def sentencepiece_model() -> Tensor:
    """A tokenizer that spells, with umT5's special tokens; the real file carries its own likewise."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a quick brown fox jumps over the lazy dog"]), model_writer=model, model_type="char",
        vocab_size=300, hard_vocab_limit=False, byte_fallback=True, pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
        minloglevel=2,
    )  # fmt: skip
    return torch.frombuffer(bytearray(model.getvalue()), dtype=torch.uint8)


FILES = {
    "checkpoints/v1-5-pruned-emaonly-fp16.safetensors": checkpoint(supported.SD15, SD15, model_channels=320),
    "checkpoints/dreamshaper_8.safetensors": checkpoint(supported.SD15, SD15, model_channels=320),
    "checkpoints/sd_xl_base_1.0.safetensors": checkpoint(
        supported.SDXL, SDXL, model_channels=320, transformer_depth=[0, 0, 2, 2, 10, 10]
    ),
    "checkpoints/sd_xl_refiner_1.0.safetensors": checkpoint(
        supported.SDXLRefiner, REFINER, model_channels=384, transformer_depth=[0, 0, 4, 4, 4, 4, 0, 0]
    ),
    "checkpoints/x4-upscaler-ema.safetensors": checkpoint(supported.SD_X4Upscaler, X4, levels=3, model_channels=256),
    "checkpoints/flux1-dev-fp8.safetensors": checkpoint(supported.Flux, FLUX, channels=16),
    "diffusion_models/wan2.2_t2v_high_noise_14B_fp8_scaled.safetensors": wan(16),
    "diffusion_models/wan2.2_t2v_low_noise_14B_fp8_scaled.safetensors": wan(16),
    "diffusion_models/wan2.2_i2v_high_noise_14B_fp8_scaled.safetensors": wan(36),
    "diffusion_models/wan2.2_i2v_low_noise_14B_fp8_scaled.safetensors": wan(36),
    "vae/wan_2.1_vae.safetensors": wan_vae,
    "text_encoders/umt5_xxl_fp8_e4m3fn_scaled.safetensors": umt5,
    "text_encoders/clip_l.safetensors": clip_l,
    "text_encoders/t5xxl_fp16.safetensors": t5,
    "clip_vision/sigclip_vision_patch14_384.safetensors": sigclip,
    "style_models/flux1-redux-dev.safetensors": redux,
}
