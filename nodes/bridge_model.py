"""One expert as a MODEL of ComfyUI: the network with ComfyUI's layers and attention, in a patcher that it can manage.

There are two kinds of networks, the base stage's and those of super-resolution; the latter also see a low-res image.
"""

import math
from pathlib import Path

import comfy.conds
import comfy.latent_formats
import comfy.ldm.modules.attention as comfy_attention
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.model_sampling
import comfy.ops
import comfy.patcher_extension
import comfy.sd
import comfy.supported_models_base
import comfy.utils
import torch
from torch import Tensor

from ..ediffi_core.checkpoint import NetworkHeader, check_finite, read_header
from ..ediffi_core.efficient_unet import EfficientUNet, EfficientUNetConfig
from ..ediffi_core.schedule import SIGMA_MAX, SIGMA_MIN
from ..ediffi_core.unet import NetworkConfig, UNet
from .bridge_cascade import LOW_RES, NOTHING_TO_ENLARGE, TILES, TiledCalls
from .bridge_cascade import MARKER as LOW_RES_MARKER
from .bridge_conditioning import check_conditioning, unpacked
from .bridge_painting import make_obey
from .bridge_style import MARKER, PICTURES, style_of

Patcher = comfy.model_patcher.ModelPatcher


class PixelFormat(comfy.latent_formats.ChromaRadiance):
    """LATENT in pixel space: RGB images in [-1, 1], (B, 3, H, W); previews show them as they are."""


class ComfyNetwork:
    """A network of the core, called the way ComfyUI calls a diffusion model. Stands in front of its class."""

    dtype = None  # an attribute instead of the core's property: under dynamic VRAM there are no weights to ask yet

    def __init__(self, config, dtype=None, device=None, operations=None, **_) -> None:
        super().__init__(config, operations=operations, device=device, dtype=dtype)
        self.dtype = dtype

    def forward(self, x, timesteps, context=None, control=None, transformer_options=None, **kwargs) -> Tensor:
        """x: (B, 3, H, W) scaled noised images; timesteps: (B,) c_noise. Other packs wrap this call."""
        options = {} if transformer_options is None else transformer_options
        kind = comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL
        wrappers = comfy.patcher_extension.get_all_wrappers(kind, options)
        executor = comfy.patcher_extension.WrapperExecutor.new_class_executor(self._forward, self, wrappers)
        return executor.execute(x, timesteps, context, control, options, **kwargs)

    def _forward(
        self, x, timesteps, context, control, transformer_options, pooled, image, image_strength,
        low_res=None, augmentation_sigma=None, **_,
    ) -> Tensor:  # fmt: skip
        if control is not None:
            raise ValueError("There are no ControlNets for eDiff-I networks. Remove Apply ControlNet from the prompt.")
        conditioning = unpacked(context, pooled, image, image_strength, self.config)
        if low_res is not None:
            conditioning = conditioning.with_low_res(low_res, augmentation_sigma)

        def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
            if bias is not None:
                # some backends turn minus infinity into NaN, and some want a row per query
                bias = bias.clamp(min=torch.finfo(bias.dtype).min).expand(-1, -1, q.shape[2], -1)
            return comfy_attention.optimized_attention(
                q, k, v, q.shape[1], mask=bias, skip_reshape=True, skip_output_reshape=True,
                transformer_options=transformer_options,
            )  # fmt: skip

        return super().forward(x, timesteps, conditioning, attend)


class ComfyUNet(ComfyNetwork, UNet):
    """Of the base stage."""


class ComfyEfficientUNet(ComfyNetwork, EfficientUNet):
    """Of the super-resolution stages."""


class Preconditioning(comfy.model_sampling.ModelSamplingContinuousEDM, comfy.model_sampling.EDM):
    """EDM in ComfyUI's words. Sampling starts from sigma_max times unit noise, as in EDM.

    ComfyUI would start from sqrt(1 + sigma_max^2), which suits models whose data has unit variance.
    """

    def noise_scaling(self, sigma, noise, latent_image, max_denoise=False):
        return super().noise_scaling(sigma, noise, latent_image, max_denoise=False)


class EDiffIModel(comfy.model_base.BaseModel):
    network = ComfyUNet

    def __init__(self, model_config, device=None) -> None:
        super().__init__(model_config, comfy.model_base.ModelType.EDM, device=device, unet_model=self.network)
        self.model_sampling = Preconditioning(model_config)

    def extra_conds(self, **kwargs):
        """What the network receives besides the noised image, from one entry of a CONDITIONING."""
        config = self.diffusion_model.config
        check_images(kwargs["noise"].shape, config)
        tokens, pooled = kwargs.get("cross_attn"), kwargs.get("pooled_output")
        check_conditioning(tokens, pooled, config)
        image, strength = style_of(kwargs.get(PICTURES), config.image_width)
        # CONDRegular: prompts of different length are not tiled to a common one but run one after the other
        return {
            "c_crossattn": comfy.conds.CONDRegular(tokens),
            "pooled": comfy.conds.CONDRegular(pooled),
            "image": comfy.conds.CONDRegular(image),
            MARKER: comfy.conds.CONDRegular(strength),
        }


class SuperResolutionModel(EDiffIModel):
    network = ComfyEfficientUNet

    def extra_conds(self, **kwargs):
        conds = super().extra_conds(**kwargs)
        if LOW_RES not in kwargs:
            raise ValueError(NOTHING_TO_ENLARGE)
        given = kwargs[LOW_RES]
        low_res, augmentation_sigma = given.at(kwargs["noise"].shape, kwargs["device"])
        conds |= {
            LOW_RES_MARKER: comfy.conds.CONDNoiseShape(low_res),
            "augmentation_sigma": comfy.conds.CONDRegular(augmentation_sigma),
        }
        return conds if given.tiles is None else conds | {TILES: TiledCalls(given.tiles)}

    def extra_conds_shapes(self, **kwargs):
        given = kwargs.get(LOW_RES)
        return {} if given is None or given.tiles is None else {TILES: TiledCalls(given.tiles).size()}

    def memory_required(self, input_shape, cond_shapes=None):
        """Of a call, in bytes: where there are tiles, of one."""
        shapes = cond_shapes or {}
        if shapes.get(TILES):
            largest = max(shapes[TILES], key=math.prod)
            input_shape = [*input_shape[:2], *map(min, zip(input_shape[2:], largest[2:], strict=True))]
        return super().memory_required(input_shape, shapes)

    def apply_model(self, x, t, **values):
        """Outside of what other nodes wrap around a call, so that they and painted regions see each tile as an image."""
        tiles = values.pop(TILES, None)
        if tiles is None:
            return super().apply_model(x, t, **values)
        return tiles(super().apply_model, x, t, self.diffusion_model.config.multiple, values)


class EDiffIConfig(comfy.supported_models_base.BASE):
    unet_extra_config = {}  # noqa: RUF012
    latent_format = PixelFormat
    supported_inference_dtypes = [torch.float16, torch.bfloat16, torch.float32]  # noqa: RUF012

    def __init__(self, header: NetworkHeader) -> None:
        self.sampling_settings = dict(sigma_min=SIGMA_MIN, sigma_max=SIGMA_MAX, sigma_data=header.sigma_data)
        super().__init__({"config": header.config})
        # ComfyUI counts 0.01 MiB times the factor for each number
        self.memory_usage_factor = header.config.numbers_per_pixel / (0.01 * 2**20)

    def get_model(self, state_dict, prefix="", device=None) -> EDiffIModel:
        kind = SuperResolutionModel if isinstance(self.unet_config["config"], EfficientUNetConfig) else EDiffIModel
        return kind(self, device=device)


def check_images(shape, config: NetworkConfig) -> None:
    """Raise ValueError unless a LATENT of this shape can be sampled by the network."""
    if len(shape) != 4 or shape[1] != config.image_channels:
        raise ValueError(
            f"This MODEL works on pixels: it samples LATENTs of {config.image_channels} channels, got shape {list(shape)}. "
            f"Start from eDiff-I Empty Image, or encode an image with the VAE of eDiff-I Load Ensemble."
        )
    if isinstance(config, EfficientUNetConfig):  # it takes images of any size
        return
    height, width = shape[2:]
    if height % config.multiple or width % config.multiple:
        raise ValueError(
            f"This ensemble works on images whose sides are multiples of {config.multiple} pixels, got "
            f"{width}x{height}. Change width and height."
        )


def load_expert(path: str | Path, model_options: dict | None = None, disable_dynamic: bool = False) -> Patcher:
    """One network file as a MODEL.

    Raises FileNotFoundError, or ValueError for a damaged file, wrong shapes or weights that are not finite.
    """
    options = model_options or {}
    path = Path(path)
    header = read_header(path)
    weights = comfy.utils.load_torch_file(str(path), safe_load=True)
    check_finite(weights, path.name)

    load_device = comfy.model_management.get_torch_device()
    offload_device = comfy.model_management.unet_offload_device()
    config = EDiffIConfig(header)
    dtype = options.get("dtype") or comfy.model_management.unet_dtype(
        device=load_device,
        model_params=comfy.utils.calculate_parameters(weights),
        supported_dtypes=config.supported_inference_dtypes,
        weight_dtype=comfy.utils.weight_dtype(weights),
    )
    manual_cast = comfy.model_management.unet_manual_cast(dtype, load_device, config.supported_inference_dtypes)
    config.set_inference_dtype(dtype, manual_cast)
    config.custom_operations = options.get("custom_operations")

    model = config.get_model(weights, device=offload_device)
    kind = Patcher if disable_dynamic else comfy.model_patcher.CoreModelPatcher  # main.py exchanges the latter
    patcher = kind(model, load_device=load_device, offload_device=offload_device)
    model.load_model_weights(weights, assign=patcher.is_dynamic())
    make_obey(patcher)  # painted regions need no node of their own on our networks
    # how ComfyUI gets a fresh copy for hooks, other devices and training
    patcher.cached_patcher_init = (load_expert, (str(path), options))
    return patcher


def pixel_vae() -> comfy.sd.VAE:
    """ComfyUI's VAE that changes only [-1, 1] to [0, 1]; float32, as bfloat16 would round the pixels."""
    vae = comfy.sd.VAE(sd={"pixel_space_vae": torch.tensor(1.0)}, dtype=torch.float32)
    vae.patcher.cached_patcher_init = (_vae_patcher, ())
    return vae


def _vae_patcher(disable_dynamic: bool = False) -> Patcher:
    return pixel_vae().patcher
