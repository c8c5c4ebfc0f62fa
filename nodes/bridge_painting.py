"""Paint-with-words in any MODEL whose attention ComfyUI lets us reach.

Regions travel in the CONDITIONING (key REGIONS), so prompts that are combined, and each image of a batch, keep their own.
Two wrappers on the MODEL find them: one puts them among the conditionings' values before ComfyUI batches its calls, for
all of them, so that prompt and negative are still one batch; the other stands around each call of the network and, for
that call, puts an override in front of the attention backend. The override knows the family of the network: which calls
are between image and text, and where the tokens of each lie. Rows without regions go the way they always went.
"""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import comfy.ldm.modules.attention as comfy_attention
import comfy.model_patcher
import comfy.model_sampling
import comfy.patcher_extension
import torch
from torch import Tensor

from ..ediffi_core.attention_maps import AttentionMaps, shares
from ..ediffi_core.conditioning import CLIP_LENGTH, T5_LENGTH
from ..ediffi_core.paint_with_words import WHOLE, PaintSettings, Region, Regions, Size, bias, flow_sigma
from .bridge_conditioning import LENGTH

Patcher = comfy.model_patcher.ModelPatcher
Kind = comfy.patcher_extension.WrappersMP
KEY = "ediffi_paint"  # of the wrappers, and of the settings among the transformer options
REGIONS = "ediffi_regions"  # of a conditioning's painted regions
RECORDING = "ediffi_recording"  # among the transformer options: a Recording


# ------------------------------------------------------------------------------------------------ the CONDITIONING


class Painted:
    """The regions of one conditioning, as a value that ComfyUI batches. Refuses a MODEL that would ignore them."""

    def __init__(self, regions: Regions, length: int) -> None:
        self.regions = regions
        self.length = length  # tokens of the conditioning
        self.size_of_latent: tuple[int, int] | None = None  # set by the MODEL that obeys
        self.box = WHOLE
        self.tile: tuple[Size, Size] | None = None  # its upper left corner, and the size of what `box` covers
        self.rows = 0

    def process_cond(self, batch_size: int, area=None, **_) -> "Painted":
        if self.size_of_latent is None:
            phrases = ", ".join(repr(region.phrase) for region in self.regions.regions)
            raise ValueError(
                f"This CONDITIONING holds painted regions ({phrases}), but the MODEL does not look at them. Put eDiff-I Apply "
                f"Paint With Words in front of the sampler."
            )
        for region in self.regions.regions:
            if len(region.mask) not in (1, batch_size):
                raise ValueError(
                    f"The mask of {region.phrase!r} holds {len(region.mask)} pictures, but {batch_size} are sampled. Give "
                    f"one mask, or one for each picture."
                )
        result = copy.copy(self)
        result.rows = batch_size
        if area is not None:  # (.., h, w, .., y, x), of which only the last two dimensions are painted
            dimensions = len(area) // 2
            (height, width), (h, w) = self.size_of_latent, area[dimensions - 2 : dimensions]
            y, x = area[2 * dimensions - 2 :]
            result.box = (y / height, x / width, (y + h) / height, (x + w) / width)
        return result

    def in_tile(self, corner: Size, size: Size) -> "Painted":
        """For a call on a part of the image, whose upper left corner lies there in an image of `size`, in pixels."""
        result = copy.copy(self)
        result.tile = corner, size
        return result

    def can_concat(self, other) -> bool:
        return isinstance(other, Painted)

    def concat(self, others: Sequence["Painted"]) -> "list[Painted]":
        return [self, *others]

    def size(self) -> list[int]:
        return [1]


def painted_with(conditioning: list, regions: Sequence[Region], index: int) -> list:
    """CONDITIONING with more regions on entry `index`; nothing that was given is changed. Empty ones are left out."""
    result = list(conditioning)
    tokens, values = conditioning[index]
    visible = [region for region in regions if region.strength > 0 and region.mask.any()]
    if not visible:
        return result
    together = Regions((*values.get(REGIONS, Regions()).regions, *visible))
    model_conds = values.get("model_conds", {}) | {REGIONS: Painted(together, tokens.shape[1])}
    result[index] = [tokens, values | {REGIONS: together, "model_conds": model_conds}]
    return result


# ------------------------------------------------------------------------------------------------ the MODEL


def obeying(model: Patcher, settings: PaintSettings | None = None) -> Patcher:
    """A clone of MODEL that obeys painted regions. Raises ValueError, by name, for a network that cannot."""
    family_of(model.get_model_object("diffusion_model"))
    clone = model.clone()
    make_obey(clone)
    if settings is not None:
        clone.model_options["transformer_options"][KEY] = settings
    return clone


def make_obey(patcher: Patcher) -> None:
    for kind, wrapper in ((Kind.CALC_COND_BATCH, _arm), (Kind.APPLY_MODEL, _paint)):
        patcher.remove_wrappers_with_key(kind, KEY)
        patcher.add_wrapper_with_key(kind, KEY, wrapper)


def _arm(executor, model, conds, x_in, timestep, model_options):
    """Around the batching of all conditionings: with any region, each of them carries a value for it."""
    if any(REGIONS in cond for entries in conds for cond in entries or ()):
        conds = [None if entries is None else [_armed(cond, x_in) for cond in entries] for entries in conds]
    return executor(model, conds, x_in, timestep, model_options)


def _armed(cond: dict, x: Tensor) -> dict:
    tokens = cond.get("cross_attn")
    value = Painted(cond.get(REGIONS, Regions()), 0 if tokens is None else tokens.shape[1])
    value.size_of_latent = (x.shape[-2], x.shape[-1])
    return cond | {"model_conds": cond["model_conds"] | {REGIONS: value}}


def _paint(executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options=None, **kwargs):
    """Around one call of the network."""
    options = {} if transformer_options is None else transformer_options
    chunks = kwargs.pop(REGIONS, None) or []
    weight, settings = 0.0, options.get(KEY) or PaintSettings()
    if any(chunk.regions for chunk in chunks):
        flows = isinstance(executor.class_obj.model_sampling, comfy.model_sampling.CONST)
        sigma = float(t.flatten()[0])
        weight = settings.at(flow_sigma(sigma) if flows else sigma)
    recording = options.get(RECORDING)
    if recording is not None and not recording.wants(options):
        recording = None
    if weight or recording:
        call = Call(executor.class_obj.diffusion_model, chunks if weight else [], c_crossattn.shape[1], x)
        options = call.installed(options, weight, settings.scale, recording)
    return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)


# ------------------------------------------------------------------------------------------------ the families


@dataclass(frozen=True)
class Place:
    """Where image and text meet in one call of attention."""

    grid: tuple[int, int]
    frames: int  # the grid is repeated so often (video)
    queries: slice  # of image tokens among the queries
    text: slice  # of text tokens among the keys


class Family:
    """How a kind of network calls attention. `place` answers None for calls that are not between image and text."""

    def __init__(self, network, call: "Call") -> None:
        self.network = network
        self.call = call

    def place(self, q: Tensor, k: Tensor, options: dict, arguments: dict) -> Place | None:
        raise NotImplementedError

    def columns(self, columns: tuple[int, ...], length: int) -> tuple[int, ...]:
        """Of the conditioning -> of the keys."""
        return columns

    def masks(self, chunk: "Painted", place: Place, device) -> Tensor:
        """How much of each image token each region covers, (M, h w, regions)."""
        return chunk.regions.masks(place.grid, chunk.box, device)


class UNetFamily(Family):
    """ComfyUI's U-Net (SD1.5, SD2, SDXL and its refiner, ...): cross-attention announces itself through a patch."""

    def place(self, q, k, options, arguments):
        announced, self.call.announced = self.call.announced, False
        if not announced:
            return None
        grid = tuple(options["activations_shape"][-2:])
        if q.shape[-2] != grid[0] * grid[1] or k.shape[-2] < self.call.length:
            return None
        return Place(grid, 1, slice(0, q.shape[-2]), slice(0, self.call.length))


class OwnFamily(Family):
    """Our networks: cross-attention is the call with a mask; keys are all CLIP tokens, all T5 tokens, image, null.

    Those of super-resolution pad an image to a multiple of pixels, and may be given it in tiles.
    """

    def place(self, q, k, options, arguments):
        if arguments.get("mask") is None:
            return None
        height, width = self._padded(self.call.latent)
        shrink = math.isqrt(height * width // q.shape[-2])
        grid = (height // shrink, width // shrink)
        if grid[0] * grid[1] != q.shape[-2]:
            return None
        return Place(grid, 1, slice(0, q.shape[-2]), slice(0, self.call.length))

    def masks(self, chunk, place, device):
        # of the whole image on the grid that tiles share, since they begin at multiples, and then the part of the tile
        corner, size = chunk.tile or ((0, 0), self.call.latent)
        padded = self._padded(size)
        cell = self._padded(self.call.latent)[0] // place.grid[0]
        grid = (padded[0] // cell, padded[1] // cell)
        masks = chunk.regions.masks(grid, chunk.box, device, None if size == padded else (size, padded))
        if chunk.tile is None:
            return masks
        rows, columns = (
            slice(start // cell, start // cell + side) for start, side in zip(corner, place.grid, strict=True)
        )
        return masks.unflatten(1, grid)[:, rows, columns].flatten(1, 2)

    def _padded(self, size):
        multiple = self.network.config.multiple
        return tuple(math.ceil(side / multiple) * multiple for side in size)

    def columns(self, columns, length):
        chunks = length // LENGTH
        result = []
        for column in columns:
            chunk, place = divmod(column, LENGTH)
            in_t5 = chunks * CLIP_LENGTH + chunk * T5_LENGTH + place - CLIP_LENGTH
            result.append(chunk * CLIP_LENGTH + place if place < CLIP_LENGTH else in_t5)
        return tuple(result)


class WanFamily(Family):
    """Wan's transformer: in each block self-attention, then cross-attention to text (and, for I2V, to an image)."""

    def place(self, q, k, options, arguments):
        block = (options.get("block_type"), options.get("block_index"))
        first, self.call.block = block != self.call.block, block
        if first or arguments.get("low_precision_attention") is False or k.shape[-2] != self.call.length:
            return None
        frames, *grid = options["grid_sizes"]
        if q.shape[-2] != frames * grid[0] * grid[1]:
            return None
        return Place(tuple(grid), frames, slice(0, q.shape[-2]), slice(0, self.call.length))


class JointFamily(Family):
    """Transformers with one attention over [text, image, references]: only image queries meet text keys here."""

    def place(self, q, k, options, arguments):
        patch = getattr(self.network, "patch_size", 2)
        patch = patch if isinstance(patch, int) else patch[-1]
        grid = tuple(math.ceil(side / patch) for side in self.call.latent)
        text, image = self.call.length, self.call.frames * grid[0] * grid[1]
        if q.shape[-2] != k.shape[-2] or q.shape[-2] < text + image:
            return None
        return Place(grid, self.call.frames, slice(text, text + image), slice(0, text))


FAMILIES = {
    "ComfyUNet": OwnFamily,
    "ComfyEfficientUNet": OwnFamily,
    "UNetModel": UNetFamily,
    "WanModel": WanFamily,
    "Flux": JointFamily,
    "Chroma": JointFamily,
    "OpenAISignatureMMDITWrapper": JointFamily,  # SD3
    "QwenImageTransformer2DModel": JointFamily,
}


def family_of(network) -> type[Family]:
    """Raises ValueError, by name, for a network whose attention cannot be painted."""
    for kind in type(network).__mro__:
        if kind.__name__ in FAMILIES:
            return FAMILIES[kind.__name__]
    raise ValueError(
        f"Paint-with-words cannot reach the attention of this MODEL ({type(network).__name__}). It works with eDiff-I, "
        f"SD1.5, SD2, SDXL, Wan, Flux, Chroma, SD3 and Qwen-Image."
    )


# ------------------------------------------------------------------------------------------------ one call


class Call:
    """One call of the network: the override of attention, and what it needs to know."""

    def __init__(self, network, chunks: list[Painted], length: int, x: Tensor) -> None:
        self.family = family_of(network)(network, self)
        self.length = length  # text tokens of the batch; shorter prompts were repeated to it
        self.latent = tuple(x.shape[-2:])
        self.frames = x.shape[2] if x.ndim == 5 else 1
        self.rows = len(x)
        self.announced = False  # UNetFamily: the next attention is cross-attention
        self.block = None  # WanFamily: the block of the attention before
        starts = [sum(chunk.rows for chunk in chunks[:i]) for i in range(len(chunks))]
        rows = [range(start, start + chunk.rows) for start, chunk in zip(starts, chunks, strict=True)]
        self.chunks = [(chunk, row) for chunk, row in zip(chunks, rows, strict=True) if chunk.regions]
        self.painted = [row for _, rows in self.chunks for row in rows]
        self.tokens = [self._tokens(chunk).to(x.device) for chunk, _ in self.chunks]  # for all layers

    def installed(self, options: dict, weight: float, scale: str, recording: "Recording | None" = None) -> dict:
        """Options with the override in front of whatever is there; `options` is not changed."""
        self.weight, self.scale, self.recording = weight, scale, recording
        options = options.copy()
        self.before: Callable | None = options.get("optimized_attention_override")
        options["optimized_attention_override"] = self.override
        if isinstance(self.family, UNetFamily):
            patches = options["patches"] = dict(options.get("patches", {}))
            patches["attn2_patch"] = [*patches.get("attn2_patch", []), self._announce]
            replacing = options.get("patches_replace", {})
            if replacing.get("attn2"):
                beside = {block: self._beside(patch) for block, patch in replacing["attn2"].items()}
                options["patches_replace"] = {**replacing, "attn2": beside}
        return options

    def _announce(self, n, context, value, extra_options):
        self.announced = True
        return n, context, value

    def override(self, function, q, k, v, heads, mask=None, attn_precision=None, **arguments):
        function = self._chained(function)
        options = arguments.get("transformer_options") or {}
        place = self.family.place(q, k, options, {"mask": mask, **arguments})
        arguments["attn_precision"] = attn_precision
        rows, added = self.painted if place else [], None
        if rows:
            inputs = (q, k, v) if len(rows) == self.rows else (q[rows], k[rows], v[rows])
            row_mask = _rows(mask, rows, q)
            added = self._bias(place, *inputs[:2], heads, row_mask, arguments)
            painted = self._attention(place, *inputs, heads, row_mask, added, arguments, function)
        if place and self.recording:
            self.recording.add(self, place, q, k, heads, mask, added, options, arguments)
        if len(rows) == self.rows:
            return painted
        # the whole batch, as it always was: some backends' last bits depend on how many rows they are given
        result = function(q, k, v, heads, mask=mask, **arguments)
        if rows:
            result[rows] = painted
        return result

    def _chained(self, function: Callable) -> Callable:
        """The backend, behind the override that was there before ours."""
        if self.before is None:
            return function
        return lambda *args, **kwargs: self.before(function, *args, **kwargs)

    def _attention(self, place: Place, q, k, v, heads, mask, added, arguments, function):
        """Attention of painted rows: image queries with the bias, the others as they are."""
        masked = self._chained(comfy_attention.attention_pytorch)  # not every backend takes a mask
        start, stop = place.queries.start, place.queries.stop
        parts = []
        if start > 0:
            parts.append(function(q[..., :start, :], k, v, heads, mask=_queries(mask, slice(0, start)), **arguments))
        image = _added(_queries(mask, place.queries), added, q.dtype)
        parts.append(masked(q[..., start:stop, :], k, v, heads, mask=image, **arguments))
        if stop < q.shape[-2]:
            rest = slice(stop, q.shape[-2])
            parts.append(function(q[..., rest, :], k, v, heads, mask=_queries(mask, rest), **arguments))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-2)

    def _bias(self, place: Place, q, k, heads, mask, arguments) -> Tensor:
        """(painted rows, 1, image queries, keys)."""
        q = _by_heads(q[..., place.queries, :], heads, arguments)
        keys, k = k.shape[-2], _by_heads(k[..., place.text, :], heads, arguments)
        if k.shape[1] < q.shape[1]:  # grouped queries
            k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        pairs = zip(self.chunks, self.tokens, strict=True)
        maps = torch.cat([self._map(chunk, tokens, place) for (chunk, _), tokens in pairs])
        if place.frames > 1:
            maps = maps.repeat(1, place.frames, 1)
        hidden = _hidden(mask, place)
        added = bias(q, k, maps, self.weight, self.scale, hidden, arguments.get("scale"))
        return torch.nn.functional.pad(added, (place.text.start, keys - place.text.stop))

    def _tokens(self, chunk: Painted) -> Tensor:
        """(regions, text tokens): the strength of each region of one conditioning at its tokens."""
        tokens = chunk.regions.tokens(chunk.length, lambda columns: self.family.columns(columns, chunk.length))
        return tokens.repeat(1, self.length // chunk.length)

    def _map(self, chunk: Painted, tokens: Tensor, place: Place) -> Tensor:
        """A of one conditioning, (rows, h w, text tokens)."""
        return (self.family.masks(chunk, place, tokens.device) @ tokens).expand(chunk.rows, -1, -1)

    def _beside(self, patch: Callable) -> Callable:
        """Another pack's attention in place of the network's: what painting changes is added to what it gives."""

        def both(q, k, v, extra_options):
            result = patch(q, k, v, extra_options)
            place = self.family.place(q, k, extra_options, {})
            rows, heads, added = self.painted, extra_options["n_heads"], None
            if place is None or len(k) != len(q):
                return result
            if rows:
                inputs, plain = (q[rows], k[rows], v[rows]), comfy_attention.attention_pytorch
                added = self._bias(place, *inputs[:2], heads, None, {})
                result = result.clone()
                result[rows] += self._attention(place, *inputs, heads, None, added, {}, plain) - plain(*inputs, heads)
            if self.recording:
                self.recording.add(self, place, q, k, heads, None, added, extra_options, {})
            return result

        return both


# ------------------------------------------------------------------------------------------------ looking


class Recording:
    """Where the picture looks: notes the attention that the prompt's phrases get, in some steps of a run."""

    def __init__(self, maps: AttentionMaps, columns: list[tuple[int, ...]], length: int, levels: int) -> None:
        """columns: of each phrase in a conditioning of `length` tokens; levels: how many steps to note."""
        self.maps = maps
        self.columns, self.length, self.levels = columns, length, levels

    def outer_sample(self, executor, noise, latent_image, sampler, sigmas, *args, **kwargs):
        """Around a whole run: what is noted belongs to the run that went last."""
        self.maps.begin(sigmas.cpu(), self.levels)
        return executor(noise, latent_image, sampler, sigmas, *args, **kwargs)

    def wants(self, options: dict) -> bool:
        return self.maps.wants(float(options["sigmas"][0])) and PROMPT in options["cond_or_uncond"]

    def add(self, call: Call, place: Place, q, k, heads, mask, added, options, arguments) -> None:
        """One layer of one call: the mean over the rows of the prompt."""
        which = options["cond_or_uncond"]
        each = call.rows // len(which)
        rows = [row for i, kind in enumerate(which) if kind == PROMPT for row in range(i * each, (i + 1) * each)]
        if call.length % self.length:
            return  # another prompt than the one whose phrases these are
        scale = arguments.get("scale")
        queries = _by_heads(q[..., place.queries, :], heads, arguments)[rows]
        keys = _by_heads(k, heads, arguments)[rows]
        total = None if mask is None else _added(_queries(_rows(mask, rows, q), place.queries), 0.0, torch.float32)
        if added is not None:
            biases = added.new_zeros(call.rows, *added.shape[1:])
            biases[call.painted] = added
            total = biases[rows] if total is None else total + biases[rows]
        columns = []
        for phrase in self.columns:
            own = call.family.columns(phrase, self.length)
            columns.append([c + start for start in range(0, call.length, self.length) for c in own])
        self.maps.add(
            float(options["sigmas"][0]), place.grid, place.frames, shares(queries, keys, columns, total, scale)
        )


PROMPT = 0  # of `cond_or_uncond`: positive


def recording(model: Patcher, maps: AttentionMaps, columns: list[tuple[int, ...]], length: int, levels: int) -> Patcher:
    """A clone of MODEL whose runs note into `maps`. Raises ValueError, by name, for a network that cannot be seen into."""
    clone = obeying(model)
    noting = Recording(maps, columns, length, levels)
    clone.model_options["transformer_options"][RECORDING] = noting
    clone.remove_wrappers_with_key(Kind.OUTER_SAMPLE, RECORDING)
    clone.add_wrapper_with_key(Kind.OUTER_SAMPLE, RECORDING, noting.outer_sample)
    return clone


def _by_heads(tensor: Tensor, heads: int, arguments: dict) -> Tensor:
    """(B, H, L, D) from either of the layouts that backends take."""
    if arguments.get("skip_reshape"):
        return tensor
    return tensor.unflatten(-1, (heads, -1)).transpose(1, 2)


def _rows(mask: Tensor | None, rows: list[int], q: Tensor) -> Tensor | None:
    return mask if mask is None or mask.ndim < 3 or len(mask) != len(q) else mask[rows]


def _queries(mask: Tensor | None, queries: slice) -> Tensor | None:
    return mask if mask is None or mask.shape[-2] == 1 else mask[..., queries, :]


def _added(mask: Tensor | None, added: Tensor | float, dtype: torch.dtype) -> Tensor:
    if mask is None:
        return added.to(dtype)
    while mask.ndim < 4:
        mask = mask[None] if mask.ndim == 2 else mask[:, None]
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, -math.inf)
    return (mask.float() + added).clamp(min=torch.finfo(dtype).min).to(dtype)


def _hidden(mask: Tensor | None, place: Place) -> Tensor | None:
    """(B or 1, L): text tokens that no query may see."""
    if mask is None:
        return None
    while mask.ndim < 4:
        mask = mask[None] if mask.ndim == 2 else mask[:, None]
    row = mask[:, 0, min(place.queries.start, mask.shape[2] - 1), place.text]
    return ~row if row.dtype == torch.bool else row < -1e4
