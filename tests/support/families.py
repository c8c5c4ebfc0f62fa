"""Tiny random MODELs of ComfyUI's own architectures, what they are conditioned on, and MODELs that need no routing.

Import it after ComfyUI has been told to use the CPU.
"""

import copy
import gc
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.sample
import comfy.samplers
import comfy.supported_models as supported
import comfy.supported_models_base
import torch
from torch import Tensor

Patcher = comfy.model_patcher.ModelPatcher
ModelType = comfy.model_base.ModelType
TOKENS = 7
SD_UNET = dict(
    image_size=32, in_channels=4, out_channels=4, use_spatial_transformer=True, legacy=False, num_res_blocks=[1],
    channel_mult=[1], transformer_depth=[0], transformer_depth_output=[0, 0], transformer_depth_middle=1,
)  # fmt: skip
FLUX = dict(
    in_channels=16, out_channels=16, vec_in_dim=10, context_in_dim=14, hidden_size=48, mlp_ratio=2.0, num_heads=2,
    depth=1, depth_single_blocks=1, axes_dim=[8, 8, 8], theta=10000, patch_size=2, qkv_bias=True, guidance_embed=True,
    txt_ids_dims=[],
)  # fmt: skip
WAN = dict(
    model_type="t2v", in_dim=16, out_dim=16, dim=48, ffn_dim=64, freq_dim=32, text_dim=14, num_heads=2, num_layers=1
)


@dataclass(frozen=True)
class Family:
    """An architecture: how to build one of its models, and the shapes around it."""

    name: str
    build: Callable[[], comfy.model_base.BaseModel]
    output: str  # the layer whose weights give the prediction
    latent: tuple[int, ...]  # of one image
    context: int  # width of a token
    pooled: int
    tokens: int = TOKENS

    def model(self, seed: int) -> Patcher:
        """A MODEL of random weights, tame enough that rounding does not grow along a trajectory."""
        built = self.build()
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in built.diffusion_model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, parameter[0].numel() ** -0.5, generator=generator)
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
        built.diffusion_model.get_parameter(f"{self.output}.weight").mul_(0.2)
        return patcher(built)

    def conditioning(self, seed: int) -> list:
        """A random CONDITIONING, a prompt of `tokens` tokens."""
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randn(1, self.tokens, self.context, generator=generator)
        return [[tokens, {"pooled_output": torch.randn(1, self.pooled, generator=generator)}]]

    def image(self, batch: int = 1, seed: int | None = None) -> Tensor:
        """The samples of a LATENT: empty, or random with a seed. (batch, *latent)."""
        if seed is None:
            return torch.zeros(batch, *self.latent)
        return torch.randn(batch, *self.latent, generator=torch.Generator().manual_seed(seed))


def patcher(model: comfy.model_base.BaseModel) -> Patcher:
    device = comfy.model_management.get_torch_device()
    return comfy.model_patcher.CoreModelPatcher(model, device, comfy.model_management.unet_offload_device())


def supported_model(config: type, unet_config: dict, state_dict: dict | None = None) -> Callable:
    """state_dict: the keys by which ComfyUI recognizes a variant of the architecture."""

    def build() -> comfy.model_base.BaseModel:
        made = config({"dtype": torch.float32, **config.unet_config, **unet_config})
        return made.get_model(state_dict or {})

    return build


def families(pack) -> dict[str, Family]:
    """By name; `pack` is the loaded pack, for the family of its own."""
    unet = {**SD_UNET, "model_channels": 32, "context_dim": 14}
    # the real widths of conditioning, as they are what tells base and refiner apart
    sdxl = {**SD_UNET, "model_channels": 64, "transformer_depth": [0], "num_classes": "sequential"}
    wide = {**unet, "model_channels": 64}
    is_v_prediction = {"output_blocks.11.1.transformer_blocks.0.norm1.bias": torch.tensor([-1.0, 1.0])}
    latent = (4, 8, 8)
    entries = [
        Family("sd15", supported_model(supported.SD15, unet), "out.2", latent, 14, 10),
        Family("sd15_inpaint", supported_model(supported.SD15, unet | {"in_channels": 9}), "out.2", latent, 14, 10),
        Family("sd21_v", supported_model(supported.SD20, wide, is_v_prediction), "out.2", latent, 14, 10),
        Family("sdxl", supported_model(supported.SDXL, sdxl), "out.2", latent, 2048, 1280),
        Family("sdxl_refiner", supported_model(supported.SDXLRefiner, sdxl), "out.2", latent, 1280, 1280),
        Family("wan", supported_model(supported.WAN21_T2V, WAN), "head.head", (16, 2, 4, 4), 14, 10),
        Family("flux", supported_model(supported.Flux, FLUX), "final_layer.linear", (16, 8, 8), 14, 10),
        Family("ediff_i", lambda: _ediff_i(pack), "conv_out", (3, 8, 8), 14, 10, tokens=pack.bridge.LENGTH),
    ]
    return {family.name: family for family in entries}


def _ediff_i(pack) -> comfy.model_base.BaseModel:
    everything = pack.core("intervals").EVERYTHING
    header = pack.core("checkpoint").NetworkHeader(pack.core("unet").PRESETS["tiny"], everything)
    config = pack.module("bridge_model").EDiffIConfig(header)
    config.set_inference_dtype(torch.float32, None)
    return config.get_model({})


class Marked(torch.nn.Module):
    """A network that costs next to nothing and notes (mark, sigma) of each call; its only weight is its mark."""

    dtype = torch.float32

    def __init__(self, mark: int, calls: list[tuple[int, float]]) -> None:
        super().__init__()
        self.mark = comfy.ops.disable_weight_init.Linear(1, 1, bias=False)
        self.mark.weight.data.fill_(mark)
        self.mark.weight.requires_grad_(False)
        self.calls = calls

    def forward(self, x, timesteps, context=None, control=None, transformer_options=None, **_):
        mark = float(self.mark.weight)
        self.calls.append((round(mark), float(transformer_options["sigmas"][0])))
        return torch.tanh(x * (0.3 + 0.1 * mark))


PREDICTIONS = {"eps": ModelType.EPS, "v": ModelType.V_PREDICTION, "edm": ModelType.EDM, "flow": ModelType.FLOW}


def marked(prediction: str, mark: int, calls: list, shift: float = 1.0) -> Patcher:
    """A MODEL around a `Marked` network, of one of the `PREDICTIONS`; shift: of the schedule of a flow."""
    config = comfy.supported_models_base.BASE({"disable_unet_model_creation": True})
    config.sampling_settings["shift"] = shift
    model = comfy.model_base.BaseModel(config, PREDICTIONS[prediction])
    model.diffusion_model = Marked(mark, calls)
    return patcher(model)


class Dispatch(torch.nn.Module):
    """Several networks as one: each call goes to the network that owns its sigma, by a plain comparison."""

    def __init__(self, networks: Sequence[torch.nn.Module], edges: Sequence[float]) -> None:
        """edges: between the networks, from high to low noise."""
        super().__init__()
        self.networks = torch.nn.ModuleList(networks)
        self.edges = torch.tensor(edges)  # float32, as sigmas are
        self.calls: list[tuple[int, float]] = []

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.networks[0], name)

    def forward(self, x, *args, transformer_options=None, **kwargs):
        sigma = transformer_options["sigmas"][0]
        owner = int((sigma < self.edges).sum())
        self.calls.append((owner, float(sigma)))
        return self.networks[owner](x, *args, transformer_options=transformer_options, **kwargs)


def oracle(experts: Sequence[Patcher], edges: Sequence[float]) -> Patcher:
    """One MODEL whose network is the networks of `experts` behind an `if`. Its `calls` say who was called."""
    model = copy.copy(experts[0].model)
    model._modules = dict(model._modules)  # the others stay as they are
    model.diffusion_model = Dispatch([expert.model.diffusion_model for expert in experts], edges)
    return patcher(model)


def edges(model: Patcher, experts: int) -> list[float]:
    """Sigmas that give each of so many experts an equal part of the schedule, from high to low noise."""
    sampling = model.get_model_object("model_sampling")
    return [float(sampling.percent_to_sigma(part / experts)) for part in range(1, experts)]


def owner(sigma: float, edges: Sequence[float]) -> int:
    """The expert of a sigma, both as the sampler sees them: in float32. A sigma on an edge is the noisier one's."""
    return int((torch.tensor(sigma) < torch.tensor(edges)).sum())


def routed(pack, experts: Sequence[Patcher], edges: Sequence[float]) -> Patcher:
    """The MODEL under test: `experts` joined by the pack's routing at `edges`."""
    ends = [float("inf"), *edges, 0.0]
    intervals = [pack.core("intervals").NoiseInterval(low, high) for high, low in itertools.pairwise(ends)]
    return pack.bridge.route(list(zip(intervals, experts, strict=True)))


@torch.inference_mode()  # as ComfyUI executes nodes
def sample(
    model: Patcher, positive, negative, image: Tensor, sampler="euler", scheduler="simple", steps=8, cfg=1.0,
    denoise=1.0, noise_mask: Tensor | None = None, callback=None, sigmas: Tensor | None = None, seed=5,
) -> Tensor:  # fmt: skip
    """What ComfyUI's KSampler does; `sampler` may be a SAMPLER, and goes through `sigmas` if they are given."""
    noise = comfy.sample.prepare_noise(image, seed)
    common = dict(noise_mask=noise_mask, callback=callback, disable_pbar=True, seed=seed)
    if sigmas is None:
        return comfy.sample.sample(
            model, noise, steps, cfg, sampler, scheduler, positive, negative, image, denoise=denoise, **common
        )
    made = comfy.samplers.sampler_object(sampler) if isinstance(sampler, str) else sampler
    return comfy.sample.sample_custom(model, noise, cfg, made, sigmas, positive, negative, image, **common)


def snapshot(model: Patcher) -> dict:
    """Everything that whoever uses a MODEL could notice, as plain data to compare. Unload the MODEL before."""
    sampling = model.get_model_object("model_sampling")
    return {
        "weights": _plain(model.model.state_dict()),
        "patches": _plain(model.patches),
        "patches_uuid": model.patches_uuid,
        "object_patches": _plain(model.object_patches),
        "model_options": _plain(model.model_options),
        "wrappers": _plain(model.wrappers),
        "callbacks": _plain(model.callbacks),
        "attachments": _plain(model.attachments),
        "additional_models": _plain(model.additional_models),
        "injections": _plain(model.injections),
        "hook_patches": _plain(model.hook_patches),
        "hook_mode": model.hook_mode,
        "model_sampling": (id(sampling), getattr(sampling, "shift", None), _plain(sampling.state_dict())),
        "own model_sampling": (id(model.model.model_sampling), getattr(model.model.model_sampling, "shift", None)),
        "in use": model.model.current_patcher is not None,
    }


def _plain(value):
    if isinstance(value, Tensor):
        return value.dtype, tuple(value.shape), value.detach().cpu().flatten().view(torch.uint8).numpy().tobytes()
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return value  # numbers and words by value, objects by identity


def copies(like: Tensor) -> int:
    """How many tensors of this shape and type hold memory of their own now."""
    return len(
        {
            thing.untyped_storage().data_ptr()
            for thing in gc.get_objects()
            if issubclass(type(thing), Tensor) and thing.shape == like.shape and thing.dtype == like.dtype
        }
    )
