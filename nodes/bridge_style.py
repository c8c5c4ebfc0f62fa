"""Style in a CONDITIONING: pictures for our ensembles and for unCLIP models, tokens of Redux for Flux.

Pictures travel as ComfyUI's own unCLIPConditioning carries them, under PICTURES. Most MODELs do not look there and would
be silent about it. So each picture notes whether it was read, and a marker among the entry's `model_conds` raises an error
in front of a MODEL that has read none. The marker has the name of an argument of our networks, whose value takes its
place; for other MODELs that have read, it leaves when ComfyUI copies the values for a run. With it in place, prompt and
negative would no longer be one batch.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import comfy.ldm.flux.redux
import torch
from torch import Tensor

from ..ediffi_core.style import averaged, square
from .bridge_conditioning import WORDS, Words

PICTURES = "unclip_conditioning"  # ComfyUI's key of a list of pictures
MARKER = "image_strength"  # among the `model_conds`; our networks' `extra_conds` has a value of this name
TOKENS = "ediffi_style_tokens"  # True where a style model's tokens stand behind those of the prompt
MASK, GRID = "attention_mask", "attention_mask_img_shape"  # ComfyUI's keys of Flux's attention mask
PERCENT = ("start_percent", "end_percent", "clip_start_percent", "clip_end_percent")
START, END = "timestep_start", "timestep_end"  # what ComfyUI makes of them: sigmas, both included
HIGHEST = 100000.0  # a start_sigma that is no limit

NOBODY_LOOKS = (
    "This CONDITIONING holds a style, but the MODEL does not look at it. Styles are for eDiff-I ensembles, for unCLIP models, "
    "and for Flux if a Redux model is connected to style_model. Take eDiff-I Style Image out for this MODEL."
)
NO_STRENGTH = (
    "This CONDITIONING holds a style of strength {strength:g}, but the MODEL cannot weaken or strengthen its tokens: only Flux and "
    "its relatives take an attention mask. Set the strength of eDiff-I Style Image to 1 or to 0."
)


# ------------------------------------------------------------------------------------------------ pictures


def encode_style(clip_vision, image: Tensor, fit: str):
    """A CLIP_VISION_OUTPUT of IMAGEs (B, H, W, C), each whole or cropped; raises ValueError as the core's `square` does."""
    pictures = square(image.movedim(-1, 1), clip_vision.image_size, fit)
    return clip_vision.encode_image(pictures.movedim(1, -1), crop=False)


def style_of(pictures: Sequence[dict] | None, width: int) -> tuple[Tensor, Tensor]:
    """The style (1, E_image) of the pictures of one entry, and its strength (1,), as the core averages them.

    Several pictures in one CLIP_VISION_OUTPUT count as their mean. Raises ValueError for embeddings of another width.
    """
    if not pictures:
        return torch.zeros(1, width), torch.zeros(1)
    embeddings = [_embedding(picture["clip_vision_output"], width) for picture in pictures]
    style, strength = averaged(embeddings, [picture["strength"] for picture in pictures])
    return style[None], torch.tensor([strength], dtype=torch.float32)


def _embedding(output, width: int) -> Tensor:
    embeddings = output.image_embeds
    found = 0 if embeddings is None else embeddings.shape[-1]
    if found != width:
        raise ValueError(
            f"The style image was encoded to {found} numbers, this ensemble reads {width}. Encode it with eDiff-I Encode "
            f"Style and the CLIP_VISION of eDiff-I Load Encoders, with the encoders that the ensemble was trained with."
        )
    if not embeddings.isfinite().all():
        raise ValueError(
            "The embedding of the style image holds values that are not numbers (NaN or infinite). Look at the picture."
        )
    return embeddings.float().cpu().mean(0)


class Picture(dict):
    """An entry of ComfyUI's list of pictures, which notes that it was read: that someone has asked for its strength.

    ComfyUI goes through the values of a CONDITIONING now and then, and Z-Image looks for pictures whether it can use them or
    not; but only a MODEL that takes a style asks how strong it is. The note is taken back when a run begins, but stays
    behind if a run fails while the MODEL is reading.
    """

    read = False

    def __getitem__(self, key):
        self.read = self.read or key == "strength"
        return super().__getitem__(key)


class Marker:
    """Stands among the values that ComfyUI batches and refuses a MODEL, unless it has read the pictures."""

    def __init__(self, message: str, pictures: Sequence[Picture] = ()) -> None:
        self.message = message
        self.pictures = pictures

    @property
    def done(self) -> bool:
        return bool(self.pictures) and all(picture.read for picture in self.pictures)

    def process_cond(self, *_, **__) -> "Marker":
        if not self.done:
            raise ValueError(self.message)
        return self

    def can_concat(self, other) -> bool:
        return isinstance(other, Marker)

    def concat(self, others: Sequence["Marker"]) -> "Marker":
        return self

    def size(self) -> list[int]:
        return [1]


class Values(dict):
    """The `model_conds` of an entry with a style. ComfyUI copies them for a run, after it has asked the MODEL for its own."""

    def copy(self) -> "Values":
        done = {key: value for key, value in self.items() if isinstance(value, Marker) and value.done}
        for marker in done.values():
            for picture in marker.pictures:
                picture.read = False
        return Values({key: value for key, value in self.items() if key not in done})

    def __or__(self, other: dict) -> "Values":
        return Values({**self, **other})


def _marked(values: dict, key: str, marker: Marker) -> dict:
    return values | {"model_conds": Values({**values.get("model_conds", {}), key: marker})}


# ------------------------------------------------------------------------------------------------ the CONDITIONING


def with_style(
    conditioning: list, output, strength: float, start_sigma: float = HIGHEST, end_sigma: float = 0.0, style_model=None
) -> list:
    """CONDITIONING with one more style, from start_sigma down to end_sigma; nothing that was given is changed.

    Strength 0 gives back what was given. style_model: turns the picture into tokens, as Redux does for Flux.
    Raises ValueError for a window that is upside down, one that meets a range in percent, and a style model that does not
    fit.
    """
    if start_sigma < end_sigma:
        raise ValueError(
            f"start_sigma {start_sigma:g} lies below end_sigma {end_sigma:g}, but noise falls from the start of sampling to its "
            f"end. Exchange them."
        )
    if strength == 0:
        return conditioning
    if style_model is None:
        styled = [[tokens, _with_picture(values, output, strength)] for tokens, values in conditioning]
    else:
        new = _tokens(style_model, output, strength)
        styled = [_with_tokens(tokens, values, new, strength) for tokens, values in conditioning]
    return _in_window(conditioning, styled, start_sigma, end_sigma)


def _with_picture(values: dict, output, strength: float) -> dict:
    picture = Picture(clip_vision_output=output, strength=strength, noise_augmentation=0.0)
    pictures = [*values.get(PICTURES, ()), picture]
    marker = Marker(NOBODY_LOOKS, [one for one in pictures if isinstance(one, Picture)])
    return _marked(values, MARKER, marker) | {PICTURES: pictures}


def _in_window(plain: list, styled: list, start: float, end: float) -> list:
    """Entries with a style inside [end, start], without it above and below; ComfyUI picks by the sigma of each call."""
    if start >= HIGHEST and end <= 0:
        return styled
    result = []
    for without, within in zip(plain, styled, strict=True):
        values = without[1]
        if any(key in values for key in PERCENT):
            raise ValueError(
                "This CONDITIONING has a range in percent, from ConditioningSetTimestepRange or from scheduled hooks of its "
                "CLIP, and its style a window in sigma. ComfyUI would look at the percents alone, behind eDiff-I Style "
                "Image as in front of it. Leave start_sigma and end_sigma as they were, give the CONDITIONING with the "
                "style and the one without it a range in percent each, and join both by Conditioning (Combine)."
            )
        top, bottom = float(values.get(START, math.inf)), float(values.get(END, 0.0))
        parts = [(within, min(top, _float32(start)), max(bottom, _float32(end)))]
        if start < HIGHEST:
            parts.insert(0, (without, top, max(bottom, _beside(start, math.inf))))
        if end > 0:
            parts.append((without, min(top, _beside(end, -math.inf)), bottom))
        result += [[tokens, _between(values, high, low)] for (tokens, values), high, low in parts if high >= low]
    return result


def _between(values: dict, high: float, low: float) -> dict:
    return values | ({} if high >= HIGHEST else {START: high}) | ({} if low <= 0 else {END: low})


def _float32(sigma: float) -> float:
    return torch.tensor(sigma, dtype=torch.float32).item()


def _beside(sigma: float, towards: float) -> float:
    """The next sigma in that direction. Sigmas are compared in float32, whatever the limits are given in."""
    return torch.nextafter(torch.tensor(sigma, dtype=torch.float32), torch.tensor(towards)).item()


# ------------------------------------------------------------------------------------------------ tokens


def _tokens(style_model, output, strength: float) -> Tensor:
    """(1, tokens of all pictures, E)."""
    if strength != 1 and not isinstance(getattr(style_model, "model", None), comfy.ldm.flux.redux.ReduxImageEncoder):
        raise ValueError(NO_STRENGTH.format(strength=strength))
    try:
        tokens = style_model.get_cond(output)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, AttributeError) as error:  # shapes that do not fit, or no states at all
        raise ValueError(
            f"The style model cannot read this CLIP_VISION_OUTPUT ({error}). Encode the picture with the CLIP vision that it "
            f"was made for; Redux needs sigclip_vision_patch14_384."
        ) from error
    return tokens.flatten(0, 1)[None]


def _with_tokens(tokens: Tensor, values: dict, new: Tensor, strength: float) -> list:
    if new.shape[-1] != tokens.shape[-1]:
        raise ValueError(
            f"The style model makes tokens of {new.shape[-1]} numbers, those of the prompt have {tokens.shape[-1]}. Use a style "
            f"model and a CLIP of the same MODEL. eDiff-I ensembles and unCLIP models need none: disconnect style_model."
        )
    words, mask = values.get(WORDS), values.get(MASK)
    if isinstance(words, Words) and words.spans is not None:
        values = values | {WORDS: replace(words, spans=words.spans + ((0, 0),) * new.shape[1])}
    if mask is not None and mask.ndim == 2:  # which tokens of the prompt there are
        values = values | {MASK: torch.cat([mask, mask.new_ones(len(mask), new.shape[1])], dim=1)}
        mask = None
    if mask is not None or strength != 1:
        grid = values.get(GRID, (1, 1))
        values = values | {MASK: _joint_mask(mask, tokens, math.prod(grid), new.shape[1], strength), GRID: grid}
    if strength != 1:
        values = _marked(values, MASK, Marker(NO_STRENGTH.format(strength=strength)))  # Flux has a value of this name
    new = new.to(tokens.device).expand(len(tokens), -1, -1)
    return [torch.cat([tokens, new], dim=1), values | {TOKENS: True}]


def _joint_mask(mask: Tensor | None, tokens: Tensor, image: int, new: int, strength: float) -> Tensor:
    """Flux's bias of attention over [text, new tokens, image], (B, L, L), from the one over [text, image] or none.

    All others see the new tokens with a weight multiplied by `strength`; what these see themselves is left alone.
    """
    rows, text = tokens.shape[:2]
    if mask is None:
        mask = torch.zeros(rows, text + image, text + image, dtype=torch.float16, device=tokens.device)
    elif mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=torch.float16, device=mask.device).masked_fill(~mask, -math.inf)
    added = mask.new_full((*mask.shape[:2], new), math.log(strength))
    mask = torch.cat([mask[..., :text], added, mask[..., text:]], dim=2)
    return torch.cat([mask[:, :text], mask.new_zeros(len(mask), new, mask.shape[2]), mask[:, text:]], dim=1)
