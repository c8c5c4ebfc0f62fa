"""The one door to ComfyUI: everything that knows its insides lies behind the names below.

    folders       what models/ediffi, models/ediffi_encoders and demo/ hold
    conditioning  how embeddings travel in a CONDITIONING
    guidance      a CONDITIONING with some of them dropped
    model         one network file as a MODEL
    routing       several MODELs called like one
    prefetch      the next of them, loaded ahead
    painting      MODELs that obey painted regions, and note where they look
    regions       phrases, masks and paintings in a CONDITIONING
    style         pictures whose look is wanted, in a CONDITIONING
    timeline      which expert denoises what, for pictures and the canvas
    encoders      a folder of encoders as CLIPs and CLIP_VISION
    combine       T5 and CLIP text, of a folder or of ComfyUI's loaders, as one CLIP
    words         which characters of the prompt each of its tokens stands for
    tokens        what each encoder reads of a prompt, and what it leaves out
    encoding      prompts that were encoded before
    text          a prompt through the encoders of any CLIP
    sampling      ComfyUI's samplers with EDM's schedule and noise for each image
    cascade       a low-res image in a CONDITIONING, tiles, a super-resolution stage as a whole

When ComfyUI changes, the files bridge_*.py change and nothing else does.
"""

from pathlib import Path

import comfy.model_management
import comfy.sd
import comfy.utils

from ..ediffi_core.attention_maps import draw as draw_attention_maps
from ..ediffi_core.checkpoint import check_experts, read_ensemble, read_header
from ..ediffi_core.guidance import DROPS
from ..ediffi_core.paint_with_words import SCALES
from ..ediffi_core.style import FITS
from .bridge_cascade import check_super_resolution, low_res_image, super_resolved
from .bridge_combine import combined as combine_encoders
from .bridge_combine import load_text_encoders
from .bridge_conditioning import LENGTH, WORDS, Words, check_conditioning, for_experts, packed, unpacked
from .bridge_encoders import is_ours, load_vision_encoder
from .bridge_folders import entries, entry, register_folders
from .bridge_guidance import dropped
from .bridge_model import check_images, load_expert, pixel_vae
from .bridge_regions import attention_maps, bind, bind_colors, obey_paint
from .bridge_regions import paint as paint_regions
from .bridge_routing import Routing, route, routing_of
from .bridge_sampling import (
    CHURNING,
    SAMPLERS,
    SCHEDULERS,
    edm_sampler,
    empty_image,
    sample,
    sampler_named,
    schedule,
    with_thresholding,
)
from .bridge_style import HIGHEST, encode_style, with_style
from .bridge_text import encode_text
from .bridge_timeline import UNITS, announce, draw, is_flow, join, shown, timeline
from .bridge_tokens import shown as shown_tokens

__all__ = [
    "CHURNING",
    "DROPS",
    "FITS",
    "HIGHEST",
    "LENGTH",
    "SAMPLERS",
    "SCALES",
    "SCHEDULERS",
    "UNITS",
    "WORDS",
    "Routing",
    "Words",
    "announce",
    "attention_maps",
    "bind",
    "bind_colors",
    "check_conditioning",
    "check_images",
    "check_super_resolution",
    "combine_encoders",
    "draw",
    "draw_attention_maps",
    "dropped",
    "edm_sampler",
    "empty_image",
    "encode_style",
    "encode_text",
    "entries",
    "entry",
    "for_experts",
    "is_flow",
    "is_ours",
    "join",
    "load_encoders",
    "load_ensemble",
    "load_expert",
    "low_res_image",
    "obey_paint",
    "packed",
    "paint",
    "pixel_vae",
    "register_folders",
    "route",
    "routing_of",
    "sample",
    "sampler_named",
    "schedule",
    "shown",
    "shown_tokens",
    "super_resolved",
    "timeline",
    "unpacked",
    "with_style",
    "with_thresholding",
]


def load_ensemble(folder: str | Path):
    """The ensemble of a folder as a MODEL. Raises FileNotFoundError or ValueError, in words, before weights are loaded."""
    description = read_ensemble(folder)
    check_experts(description, [read_header(path) for path in description.paths])
    progress = comfy.utils.ProgressBar(len(description.paths))
    experts, names = [], [path.stem for path in description.paths]
    for interval, path in zip(description.intervals, description.paths, strict=True):
        comfy.model_management.throw_exception_if_processing_interrupted()
        experts.append((interval, load_expert(path)))
        progress.update(1)
    return route(experts, names)


def load_encoders(folder: str | Path, embedding_directory=None):
    """The encoders of a folder as CLIP and CLIP_VISION."""
    clip = load_text_encoders(folder, {"embedding_directory": embedding_directory})
    comfy.model_management.throw_exception_if_processing_interrupted()
    return clip, load_vision_encoder(folder)


def paint(clip: comfy.sd.CLIP, text: str, width: int, height: int, painting: str):
    """(CONDITIONING with regions, masks, legend, report for the canvas) of a prompt and a painting on it."""
    conditioning, _ = encode_text(clip, text)
    return paint_regions(conditioning, width, height, painting)
