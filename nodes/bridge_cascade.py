"""The cascade in ComfyUI: a low-res image in a CONDITIONING, tiles around the calls of a network, one stage as a whole.

The low-res image travels under LOW_RES as it was given, and is enlarged where the size of the sampled image is known. Most
MODELs would not look there and would be silent about it, so a marker among the entry's `model_conds` raises an error in
front of them; it has the name of an argument of super-resolution networks, whose value takes its place. Tiles travel with
the low-res image, and ComfyUI asks for the memory of one: every sampler, guider and expert works in them.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import comfy.conds
import comfy.model_management
import comfy.model_patcher
import comfy.utils
import torch
from torch import Tensor

from ..ediffi_core.efficient_unet import EfficientUNet
from ..ediffi_core.paint_with_words import Box
from ..ediffi_core.super_resolution import FACTOR, augmented, check_pictures, tiled, upsampled
from .bridge_conditioning import LENGTH
from .bridge_painting import RECORDING, REGIONS
from .bridge_routing import routing_of
from .bridge_sampling import empty_image, sample
from .bridge_timeline import executing

Patcher = comfy.model_patcher.ModelPatcher
LOW_RES = "ediffi_low_res"  # key of the conditioning dict that holds a `LowRes`
MARKER = "low_res"  # among the `model_conds`; the `extra_conds` of super-resolution networks has a value of this name
TILES = "ediffi_tiles"  # among the `model_conds`: a `TiledCalls`
PICTURES = 8  # of the size that is made, held by a sampler: x, noise, low-res image, denoised, slopes

NOBODY_LOOKS = (
    "This CONDITIONING holds a low-res image, but the MODEL that samples does not look at it: it is no super-resolution ensemble. "
    "Load one with eDiff-I Load Ensemble, or leave out eDiff-I Low-Res Image."
)
NOTHING_TO_ENLARGE = (
    "This MODEL is a super-resolution ensemble, but a CONDITIONING that it is given holds no low-res image. Put eDiff-I Low-Res "
    "Image in front of the sampler, behind everything that combines prompts, or use eDiff-I Super Resolution."
)
NOT_THIS_STAGE = (
    "This MODEL ({name}) is no super-resolution ensemble, so it cannot enlarge an IMAGE. Load one with eDiff-I Load Ensemble, "
    "such as one for 64 to 256 or 256 to 1024 pixels."
)


# ------------------------------------------------------------------------------------------------ the CONDITIONING


@dataclass(frozen=True)
class LowRes:
    """The image that a super-resolution stage starts from, one for all rows of a batch or one for each."""

    images: Tensor  # (N, 3, h, w) in [-1, 1]
    augmentation_sigma: float
    seed: int  # of the augmentation noise: row i as seed + i gives alone
    tiles: "Tiles | None" = None

    def at(self, shape, device) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) and augmentation sigmas (B,) for sampled images of `shape`."""
        rows, _, *size = shape
        if len(self.images) not in (1, rows):
            raise ValueError(
                f"The CONDITIONING holds {len(self.images)} low-res images, but {rows} are sampled. Give eDiff-I Low-Res Image "
                f"one image, or one for each that is sampled, and sample the LATENT that it gives."
            )
        images = upsampled(self.images, tuple(size)).expand(rows, -1, -1, -1)
        low_res = augmented(images, self.augmentation_sigma, self.seed).to(device)
        return low_res, torch.full((rows,), float(self.augmentation_sigma), device=device)


class Unseen:
    """Stands among a conditioning's values and refuses every MODEL that has put no low-res image in its place."""

    def process_cond(self, *_, **__):
        raise ValueError(NOBODY_LOOKS)

    def can_concat(self, other) -> bool:
        return False


def pictures(image: Tensor) -> Tensor:
    """IMAGE (B, H, W, C) as (B, 3, H, W) in [-1, 1]: gray in three channels, transparency left out.

    Raises ValueError for no image, another number of channels, and pixels that are not finite.
    """
    if image.ndim != 4 or image.shape[-1] not in (1, 3, 4):
        raise ValueError(
            f"An IMAGE to enlarge is (images, height, width, 3), got {list(image.shape)}. Gray images and images with "
            f"transparency work too."
        )
    images = image[..., :3].movedim(-1, 1).expand(-1, 3, -1, -1)
    check_pictures(images)
    return images.float().clamp(0, 1) * 2 - 1


def with_low_res(conditioning: list, low_res: LowRes) -> list:
    """CONDITIONING for a super-resolution stage; nothing that was given is changed."""
    if not conditioning:
        raise ValueError(
            "This CONDITIONING holds no prompt at all. Encode one with eDiff-I Text Encode; it may be empty."
        )
    return [
        [
            tokens,
            values | {LOW_RES: low_res, "model_conds": values.get("model_conds", {}) | {MARKER: Unseen()}},
        ]
        for tokens, values in conditioning
    ]


def low_res_image(positive: list, negative: list, image: Tensor, augmentation_sigma: float, seed: int):
    """(positive, negative, LATENT): what any sampler needs to enlarge an IMAGE FACTOR times."""
    return told(positive, negative, LowRes(pictures(image), augmentation_sigma, seed))


def told(positive: list, negative: list, low_res: LowRes):
    rows, _, height, width = low_res.images.shape
    latent = empty_image(FACTOR * width, FACTOR * height, rows)
    return with_low_res(positive, low_res), with_low_res(negative, low_res), latent


def no_text(network: EfficientUNet) -> list:
    """The CONDITIONING of no text at all, for a network of these widths: what an empty prompt gives."""
    config = network.config
    tokens = torch.zeros(1, LENGTH, max(config.clip_width, config.t5_width))
    return [[tokens, {"pooled_output": torch.zeros(1, config.pooled_width)}]]


# ------------------------------------------------------------------------------------------------ tiles


@dataclass(frozen=True)
class Slice:
    """What each tile has a part of: takes the place of a conditioning in the core's `tiled`."""

    low_res: Tensor  # (B, 3, H, W)


class Tiles:
    """How the calls of a run are divided, and how far they are."""

    def __init__(self, tile: int, overlap: int, progress: Callable[[float], None]) -> None:
        """progress: is told after each tile how many steps are done, with a fraction."""
        self.tile, self.overlap = tile, overlap
        self.progress, self.reached = progress, 0.0

    def __call__(self, apply: Callable, x: Tensor, t: Tensor, multiple: int, values: dict) -> Tensor:
        """`apply`, a model's call with a low-res image and perhaps regions among its values, tile by tile."""
        height, width = x.shape[2:]
        painted = values.get(REGIONS)

        def denoise(part: Tensor, t: Tensor, given: Slice, box: Box) -> Tensor:
            own = {**values, MARKER: given.low_res}
            if painted:
                corner = (round(box[0] * height), round(box[1] * width))
                own[REGIONS] = [chunk.in_tile(corner, (height, width)) for chunk in painted]
            return apply(part, t, **own)

        options = values.get("transformer_options", {})
        if options.get(RECORDING) is not None:
            raise ValueError(
                "eDiff-I Attention Maps cannot look at an image that is made in tiles. Set tile to 0, or leave the node out."
            )
        done_before = self._steps_before(options)

        def after(done: int, tiles: int) -> None:
            comfy.model_management.throw_exception_if_processing_interrupted()
            self.reached = max(self.reached, done_before + done / tiles)  # guidance and some samplers call twice
            self.progress(self.reached)

        by_tiles = tiled(denoise, self.tile, self.overlap, multiple, lambda box: {"box": box}, after)
        return by_tiles(x, t, Slice(values[MARKER]))

    @staticmethod
    def _steps_before(options: dict) -> int:
        """How many levels of the schedule lie above that of this call."""
        schedule, now = options.get("sample_sigmas"), options.get("sigmas")
        return 0 if schedule is None or now is None else int((schedule[:-1].cpu() > float(now.flatten()[0])).sum())

    def shape(self, shape: Sequence[int]) -> list[int]:
        """What a call of the network sees at once of images of `shape`."""
        rows, channels, *size = shape
        return [rows, channels, *(min(side, self.tile) for side in size)]


class TiledCalls(comfy.conds.CONDConstant):
    """`Tiles` on their way through ComfyUI's batching, where the size of a value counts when memory is estimated."""

    def size(self) -> list[int]:
        return [1, 1, self.cond.tile, self.cond.tile]


# ------------------------------------------------------------------------------------------------ a stage


def check_super_resolution(model: Patcher) -> EfficientUNet:
    """The network of a MODEL. Raises ValueError for one that is no super-resolution ensemble."""
    network = model.get_model_object("diffusion_model")
    if not isinstance(network, EfficientUNet):
        raise ValueError(NOT_THIS_STAGE.format(name=type(network).__name__))
    return network


def super_resolved(
    model: Patcher, image: Tensor, positive: list | None, negative: list | None, seed: int, cfg: float, sampler, sigmas: Tensor,
    augmentation_sigma: float, tile: int, overlap: int, keep: bool,
) -> Tensor:  # fmt: skip
    """A stage as a whole: IMAGE (B, h, w, C) to IMAGE (B, 4 h, 4 w, 3).

    positive, negative: None is no text; tile: 0 is the whole image at once; keep: start from the enlarged image and not from
    noise alone, for sigmas that begin lower (SDEdit, Meng et al. 2022).
    """
    network = check_super_resolution(model)
    if positive is None and negative is None:
        cfg = 1.0  # guidance from nothing to nothing
    positive = no_text(network) if positive is None else positive
    negative = no_text(network) if negative is None else negative
    images, tiles = pictures(image), None
    if 0 < tile < FACTOR * max(images.shape[2:]):
        bar, steps = comfy.utils.ProgressBar(len(sigmas) - 1), len(sigmas) - 1
        tiles = Tiles(tile, overlap, lambda done: bar.update_absolute(done, steps))
    positive, negative, latent = told(positive, negative, LowRes(images, augmentation_sigma, seed, tiles))
    empty = latent["samples"]
    if keep:
        latent["samples"] = upsampled(images, tuple(empty.shape[2:])).to(empty)
    say(estimate(model, empty.shape, tiles, cfg))
    samples = sample(model, seed, cfg, sampler, sigmas, positive, negative, latent)["samples"]
    return ((samples + 1) / 2).clamp(0, 1).movedim(1, -1)


def estimate(model: Patcher, shape, tiles: Tiles | None, cfg: float) -> str:
    """What a run on images of `shape` (B, 3, H, W) will need, in words."""
    rows, channels, height, width = shape
    routing = routing_of(model)
    weights = max(expert.model_size() for expert in (routing.experts if routing else [model]))
    sides = tiles.shape(shape)[2:] if tiles else [height, width]
    numbers = rows * (1 if cfg == 1 else 2) * sides[0] * sides[1]
    size = comfy.model_management.dtype_size(model.model.get_dtype_inference())
    call = 0.01 * 2**20 * model.model.memory_usage_factor * numbers * size  # as ComfyUI counts on a GPU
    held = PICTURES * rows * channels * height * width * 4
    way = f"in tiles of {sides[1]}x{sides[0]}" if tiles else "as a whole"
    return (
        f"{width // FACTOR}x{height // FACTOR} to {width}x{height} {way}: about {_gigabytes(weights + call + held)} "
        f"({_gigabytes(weights)} weights, {_gigabytes(call)} a call, {_gigabytes(held)} pictures)"
    )


def _gigabytes(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"


def say(sentence: str) -> None:
    """Into the log, and under the node that is executing, before its run begins."""
    logging.getLogger("ediffi").info("eDiff-I Super Resolution: %s", sentence)
    if now := executing():
        server, node = now
        server.send_progress_text(sentence, node, server.client_id)
