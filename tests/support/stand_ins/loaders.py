"""Makes ComfyUI's stock loaders accept stand-ins.

They recognise a model by its exact channel counts, and build text encoders and KL autoencoders of fixed sizes, so a small
file cannot get past them, and no setting says otherwise. Here, in the test server alone, six functions are wrapped; each
acts only on a file whose metadata says that it is a stand-in.
"""

import functools
import inspect
import json
from pathlib import Path

import comfy.clip_vision
import comfy.ldm.flux.redux
import comfy.model_detection
import comfy.ops
import comfy.sd
import comfy.utils
import safetensors
import torch

from .sizes import CLIP_VISION, KEY, TEXT_OPTIONS, autoencoder


def accept_stand_ins() -> None:
    if getattr(comfy.sd.load_clip, "accepts_stand_ins", False):
        return
    comfy.sd.load_clip = with_small_text_encoders(comfy.sd.load_clip, "model_options")
    comfy.sd.load_checkpoint_guess_config = with_small_text_encoders(
        comfy.sd.load_checkpoint_guess_config, "te_model_options"
    )
    comfy.model_detection.model_config_from_unet = with_own_channels(comfy.model_detection.model_config_from_unet)
    comfy.sd.VAE.__init__ = with_small_autoencoder(comfy.sd.VAE.__init__)
    comfy.clip_vision.load = with_few_layers(comfy.clip_vision.load)
    comfy.sd.load_style_model = with_small_redux(comfy.sd.load_style_model)


def recognised_by(metadata: dict | None) -> dict | None:
    """What the real file's U-Net would be recognised by; None for a file that is no stand-in."""
    note = (metadata or {}).get(KEY)
    return None if note is None else json.loads(note)


def is_stand_in(path: str) -> bool:
    if not str(path).endswith(".safetensors"):
        return False
    with safetensors.safe_open(path, framework="pt") as file:
        return recognised_by(file.metadata()) is not None


def wraps(function, change):
    """The function called as before, after `change` has had its arguments by name."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        call = signature.bind(*args, **kwargs)
        call.apply_defaults()
        change(call.arguments)
        return function(*call.args, **call.kwargs)

    wrapped.accepts_stand_ins = True
    return wrapped


def with_small_text_encoders(function, option: str):
    def change(arguments):
        paths = next(iter(arguments.values()))
        if all(map(is_stand_in, [paths] if isinstance(paths, str) else paths)):
            arguments[option] = {**arguments[option], **TEXT_OPTIONS}

    return wraps(function, change)


def with_own_channels(function):
    @functools.wraps(function)
    def model_config_from_unet(state_dict, unet_key_prefix, *args, metadata=None, **kwargs):
        real = recognised_by(metadata)
        if not real:
            return function(state_dict, unet_key_prefix, *args, metadata=metadata, **kwargs)
        own = comfy.model_detection.detect_unet_config(state_dict, unet_key_prefix, metadata=metadata)
        config = comfy.model_detection.model_config_from_unet_config(own | real, state_dict, unet_key_prefix)
        config.unet_config.update({name: own[name] for name in real})
        return config

    return model_config_from_unet


def with_small_autoencoder(function):
    def change(arguments):
        if recognised_by(arguments["metadata"]) is not None:
            weights = arguments["sd"]
            channels = weights["decoder.conv_in.weight"].shape[1]
            levels = 4 if "decoder.up.3.upsample.conv.weight" in weights else 3
            arguments["config"] = {"params": autoencoder(channels, levels)}

    wrapped = wraps(function, change)

    @functools.wraps(function)
    def __init__(self, sd=None, *args, **kwargs):
        wrapped(self, sd, *args, **kwargs)
        if hasattr(self.first_stage_model, "post_quant_conv"):  # of a given configuration ComfyUI assumes four channels
            self.latent_channels = self.first_stage_model.post_quant_conv.in_channels

    return __init__


def with_few_layers(function):
    @functools.wraps(function)
    def load(path):
        if not is_stand_in(path):
            return function(path)
        configuration = Path(comfy.clip_vision.__file__).with_name("clip_vision_siglip_384.json")
        encoder = comfy.clip_vision.ClipVisionModel(json.loads(configuration.read_text()) | CLIP_VISION)
        encoder.load_sd(comfy.utils.load_torch_file(path))
        return encoder

    return load


def with_small_redux(function):
    @functools.wraps(function)
    def load_style_model(path):
        if not is_stand_in(path):
            return function(path)
        weights = comfy.utils.load_torch_file(path)
        with torch.device("meta"):
            encoder = comfy.ldm.flux.redux.ReduxImageEncoder()
        for name in ("redux_up", "redux_down"):
            outputs, inputs = weights[f"{name}.weight"].shape
            setattr(encoder, name, comfy.ops.manual_cast.Linear(inputs, outputs))
        encoder.load_state_dict(weights)
        return comfy.sd.StyleModel(encoder)

    return load_style_model
