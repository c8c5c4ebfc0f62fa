"""T5 and CLIP text as one CLIP of ComfyUI, with the layout that comes out of bridge_conditioning.

The two encoders stay where ComfyUI's loaders put them: modules behind a patcher each, which ComfyUI loads, offloads and
patches. So LoRAs, weights of 8 bits and GGUF are what they were. What differs is how they are read: the last layer's
states, nothing behind the end of the prompt, and nothing at all for an empty prompt, which is how training drops text.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import comfy.clip_model
import comfy.model_management
import comfy.sd
import comfy.sd1_clip
import comfy.text_encoders.t5
import torch
from comfy.sd1_clip import SDClipModel, SDTokenizer
from torch import Tensor

from ..ediffi_core.conditioning import CLIP_LENGTH, T5_LENGTH
from .bridge_conditioning import WORDS, packed
from .bridge_encoders import Tokenizer, has_content, is_ours, lengthened, load_text_encoder, whole
from .bridge_words import part as part_of


class Part(NamedTuple):
    """One encoder: `name` is its module's in the patcher's model, and `layer` what CLIP Set Last Layer chose for it."""

    name: str
    patcher: object
    tokenizer: SDTokenizer
    layer: int | None = None

    @property
    def encoder(self) -> SDClipModel:
        return getattr(self.patcher.model, self.name)

    def is_t5(self) -> bool:
        return isinstance(self.encoder.transformer, comfy.text_encoders.t5.T5)

    def is_clip_l(self) -> bool:
        return self.name == "clip_l" and isinstance(self.encoder.transformer, comfy.clip_model.CLIPTextModel)


class Reader(torch.nn.Module):
    """One encoder behind the calls of ComfyUI's CLIP, whatever settings its loader gave it; its weights are shared.

    rows of tokens -> (hidden states up to and including the end token (1, L, E), pooled or None).
    """

    def __init__(self, encoder: SDClipModel) -> None:
        super().__init__()
        self.encoder = own = copy.copy(encoder)
        own.layer, own.layer_idx, own.return_projected_pooled = own.options_default = ("last", None, True)
        own.execution_device = None
        own.layer_norm_hidden_state = own.return_attention_masks = True
        own.zero_out_masked = False  # of the empty prompt, away from which a weight moves a word, padding is a part
        own.gen_empty_tokens = comfy.sd1_clip.gen_empty_tokens
        self.sees_backwards_only = isinstance(own.transformer, comfy.clip_model.CLIPTextModel)
        own.enable_attention_masks = not self.sees_backwards_only

    def set_clip_options(self, options) -> None:
        self.encoder.set_clip_options(options)

    def reset_clip_options(self) -> None:
        self.encoder.reset_clip_options()

    def encode_token_weights(self, rows):
        (row,), padding = rows, (self.encoder.special_tokens["pad"], 1.0)
        row = [entry[:2] for entry in row]
        if self.sees_backwards_only:  # ComfyUI's CLIP takes as many tokens as it has positions
            row = row + [padding] * (positions(self.encoder) - len(row))
        else:
            while is_token(row[-1][0], padding[0]):
                row.pop()
        states, pooled, extra = self.encoder.encode_token_weights([row])
        return states[:, : int(extra["attention_mask"].sum())], pooled


class TextEncoders(torch.nn.Module):
    """Both encoders' modules under their names, by which LoRAs and files find them."""

    def __init__(self, t5: Part, clip: Part) -> None:
        super().__init__()
        self.t5_name = t5.name
        for part in (clip, t5):
            setattr(self, part.name, part.encoder)

    @property
    def t5xxl(self) -> SDClipModel:
        """T5 by the key of its tokens; a T5 of other sizes has another name."""
        return self._modules[self.t5_name]

    def set_clip_options(self, options) -> None:
        """Nothing: each encoder's settings are its `Reader`'s."""

    def reset_clip_options(self) -> None:
        """Nothing."""


class CombinedCLIP(comfy.sd.CLIP):
    """T5 and CLIP text as one CLIP. Its `patcher` is that of CLIP, where hooks work; T5 has its own."""

    def __init__(self, t5: Part, clip: Part) -> None:
        super().__init__(no_init=True)
        self.name = clip.name
        self.t5 = t5
        self.patcher = clip.patcher
        self.clip_tokenizer = clip.tokenizer
        self.tokenizer = Tokenizer(clip.tokenizer, t5.tokenizer, positions(clip.encoder))
        self.tokenizer.clip_l.embedding_size = width(clip.encoder)
        self.tokenizer.t5xxl.embedding_size = width(t5.encoder)
        self.layer_idx = clip.layer
        self.cond_stage_model = TextEncoders(t5, clip)
        self.tokenizer_options = {}
        self.use_clip_schedule = False
        self.apply_hooks_to_conds = None

    @property
    def clip(self) -> Part:
        return Part(self.name, self.patcher, self.clip_tokenizer, self.layer_idx)

    @property
    def patcher(self):
        return self._patcher

    @patcher.setter
    def patcher(self, patcher) -> None:
        """Select CLIP Device gives CLIP another device by this; to the processor T5 goes with it."""
        devices = patcher.load_device, patcher.offload_device
        if devices != getattr(self, "_devices", devices) and patcher.load_device.type == "cpu":
            t5 = self.t5.patcher.clone(disable_dynamic=True)
            t5.load_device, t5.offload_device = devices
            self.t5 = self.t5._replace(patcher=t5)
        self._patcher, self._devices = patcher, devices

    @property
    def patchers(self) -> tuple:
        """Of CLIP and of T5."""
        return self.patcher, self.t5.patcher

    def clone(self, disable_dynamic=False):
        t5, clip = (part._replace(patcher=part.patcher.clone(disable_dynamic)) for part in (self.t5, self.clip))
        new = CombinedCLIP(t5, clip).set_like(self)
        if all(after.is_clone(before) for before, after in zip(self.patchers, new.patchers, strict=True)):
            new.cond_stage_model = self.cond_stage_model
        return new

    def set_like(self, other: comfy.sd.CLIP) -> "CombinedCLIP":
        """Takes over what nodes set on a CLIP, besides its patches."""
        self.tokenizer_options = other.tokenizer_options.copy()
        self.use_clip_schedule = other.use_clip_schedule
        self.apply_hooks_to_conds = other.apply_hooks_to_conds
        return self

    def encode_from_tokens(self, tokens, return_pooled=False, return_dict=False):
        with self._leaving():
            ((clip, values),) = self._read(self.clip, tokens["l"], unprojected=return_pooled == "unprojected")
            ((t5, _),) = self._read(self.t5, tokens["t5xxl"])
        states, pooled = joined(clip, t5, tokens), values["pooled_output"]
        if return_dict:
            values = {"cond": states, "pooled_output": pooled} | remembered(tokens)
            self.add_hooks_to_dict(values)
            return values
        return (states, pooled) if return_pooled else states

    def encode_from_tokens_scheduled(self, tokens, unprojected=False, add_dict=None, show_pbar=True):
        add_dict = add_dict or {}
        if self.patcher.forced_hooks is None or not self.use_clip_schedule:
            return super().encode_from_tokens_scheduled(tokens, unprojected, add_dict, show_pbar)
        with self._leaving():
            add_dict = remembered(tokens) | add_dict
            clips = self._read(self.clip, tokens["l"], unprojected, add_dict, show_pbar, schedule=True)
            ((t5, _),) = self._read(self.t5, tokens["t5xxl"])
        return [[joined(clip, t5, tokens), values] for clip, values in clips]

    def _read(self, part: Part, rows, unprojected=False, add_dict=None, show_pbar=False, schedule=False) -> list:
        """[hidden states, values] of one encoder; with a schedule, for each stretch of the run between changes of hooks."""
        encoder, add_dict = part.encoder, add_dict or {}
        if not has_content(rows, encoder.special_tokens):  # then the encoder need not come to the device
            device = comfy.model_management.intermediate_device()
            pooled = None if part.is_t5() else torch.zeros(1, projection_width(encoder), device=device)
            return [[torch.zeros(1, 0, width(encoder), device=device), {"pooled_output": pooled} | add_dict]]
        reading = comfy.sd.CLIP(no_init=True)
        reading.patcher, reading.cond_stage_model, reading.layer_idx = part.patcher, Reader(encoder), part.layer
        reading.use_clip_schedule, reading.apply_hooks_to_conds = schedule, self.apply_hooks_to_conds
        return reading.encode_from_tokens_scheduled(rows, unprojected, add_dict, show_pbar)

    @contextmanager
    def _leaving(self) -> Iterator[None]:
        """T5 is on the device only while prompts are encoded, whatever happens meanwhile."""
        try:
            yield
        finally:
            for patcher in self.patchers:
                if any(isinstance(module, comfy.text_encoders.t5.T5) for module in patcher.model.modules()):
                    leave_device(patcher)

    def load_model(self, tokens=None):
        comfy.model_management.load_models_gpu(list(self.patchers))
        return self.patcher

    def add_patches(self, patches, strength_patch=1.0, strength_model=1.0):
        return sorted(
            {key for patcher in self.patchers for key in patcher.add_patches(patches, strength_patch, strength_model)}
        )

    def get_key_patches(self):
        return self._of_both(lambda patcher: patcher.get_key_patches())

    def state_dict_for_saving(self):
        return self._of_both(lambda patcher: patcher.model_state_dict_for_saving())

    def _of_both(self, read) -> dict:
        return {
            key: value
            for part in (self.clip, self.t5)
            for key, value in read(part.patcher).items()
            if key.startswith(f"{part.name}.")
        }


def combined(t5: comfy.sd.CLIP, clip: comfy.sd.CLIP) -> CombinedCLIP:
    """The T5 of one CLIP and the CLIP-L of another, or of the same. Raises ValueError where they are not there."""
    held = {"t5": parts(t5), "clip": parts(clip)}
    wanted = {"t5": ("T5", Part.is_t5), "clip": ("CLIP-L", Part.is_clip_l)}
    found = {socket: next(filter(fits, held[socket]), None) for socket, (_, fits) in wanted.items()}
    for socket, other in (("t5", "clip"), ("clip", "t5")):
        if found[socket] is None:
            kind, fits = wanted[socket]
            names = " and ".join(part.name for part in held[socket]) or "no encoder that ComfyUI's own loaders make"
            advice = (
                f"The input {other} holds one: the two seem to be exchanged."
                if any(map(fits, held[other]))
                else "Load one with Load CLIP: t5xxl_fp16.safetensors (type sd3) for t5, clip_l.safetensors for clip."
            )
            raise ValueError(
                f"The input {socket} of eDiff-I Combine Encoders needs a CLIP with a {kind}, but it holds {names}. {advice}"
            )
    check_projection(found["clip"])
    both = (part._replace(patcher=part.patcher.clone()) for part in (found["t5"], found["clip"]))
    return CombinedCLIP(*both).set_like(clip)


def load_text_encoders(folder: str | Path, model_options: dict | None = None) -> CombinedCLIP:
    """The T5 and the CLIP text encoder of a folder."""
    clips = (load_text_encoder(name, folder, model_options) for name in ("t5xxl", "clip_l"))
    return CombinedCLIP(*(parts(clip)[0] for clip in clips))


def parts(clip: comfy.sd.CLIP) -> list[Part]:
    """The encoders of a CLIP whose tokenizers are there too."""
    if is_ours(clip):
        return [clip.clip, clip.t5]
    if getattr(clip, "patcher", None) is None:  # such as the CLIP of a checkpoint that holds none
        return []
    found = []
    for name, module in clip.patcher.model.named_children():
        _, tokenizer = part_of(clip.tokenizer, name)
        if isinstance(module, SDClipModel) and isinstance(tokenizer, SDTokenizer):
            found.append(Part(name, clip.patcher, tokenizer, clip.layer_idx))
    if any(one.is_clip_l() for one in found):  # then CLIP Set Last Layer means CLIP
        found = [one._replace(layer=None) if one.is_t5() else one for one in found]
    return found


def check_projection(clip: Part) -> None:
    """Raise ValueError for a CLIP-L whose file held no projection of the pooled text.

    ComfyUI leaves the weight as the memory was then, mostly zero; memory that was used before is not noticed.
    """
    weight = clip.encoder.transformer.text_projection.weight
    if type(weight.data) is Tensor and weight.device.type != "meta" and not weight.float().any():
        raise ValueError(
            "The CLIP-L at the input clip of eDiff-I Combine Encoders has no text projection, which the pooled text needs. "
            "The CLIPs inside checkpoints of Stable Diffusion 1.5 have none. Load clip_l.safetensors with Load CLIP."
        )


def leave_device(patcher) -> None:
    """Free the compute device of a patcher's weights.

    The next prompt has to bring them back: 10 GB over PCIe are a second or two for T5-XXL. ComfyUI would let them stay until
    another model needs the room, and then pay for moving them while an image is sampled. Small ones take no time. So this
    asks no size, but --highvram and --gpu-only say that models shall stay, and then they do.
    """
    management = comfy.model_management
    stays = management.vram_state == management.VRAMState.HIGH_VRAM or patcher.load_device == patcher.offload_device
    if not stays:
        others = [
            loaded
            for loaded in management.current_loaded_models
            if loaded.model is None or not loaded.model.is_clone(patcher)
        ]
        management.free_memory(1e30, patcher.load_device, keep_loaded=others)


def is_token(token, wanted: int) -> bool:
    return isinstance(token, int) and token == wanted


def joined(clip: Tensor, t5: Tensor, tokens) -> Tensor:
    """Hidden states up to the ends of the prompt in the paper's layout, as long as the tokens that they were made from."""
    return packed(lengthened(clip, CLIP_LENGTH), lengthened(t5, whole(len(tokens["t5xxl"][0]), T5_LENGTH)))


def remembered(tokens) -> dict:
    """What a CONDITIONING keeps of its prompt."""
    words = getattr(tokens, "words", None)
    return {} if words is None else {WORDS: words}


def positions(clip: SDClipModel) -> int:
    return clip.transformer.text_model.embeddings.position_embedding.num_embeddings


def width(encoder: SDClipModel) -> int:
    return encoder.transformer.get_input_embeddings().embedding_dim


def projection_width(clip: SDClipModel) -> int:
    return clip.transformer.text_projection.out_features
