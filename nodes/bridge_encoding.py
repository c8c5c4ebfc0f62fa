"""Tokens that were encoded before are not encoded again, whichever node of whichever workflow asks.

ComfyUI caches what nodes put out; two nodes with one prompt still encode it twice. Here a result is remembered by all that
decides it: the tokens themselves, so changed embedding files and tokenizer options need no care, and the state of the CLIP.
What cannot be told from these (hooks, injected LoRAs, pictures among the tokens, calls that another pack has replaced) is
encoded each time. Results live as long as their encoders, and are few.
"""

import weakref
from collections import OrderedDict
from collections.abc import Iterator
from hashlib import sha256
from numbers import Real

import comfy.model_patcher
import comfy.sd
import torch
from torch import Tensor

from .bridge_combine import CombinedCLIP

MOST_RESULTS = 64  # of one model
MOST_BYTES = 256 * 2**20  # of their tensors; 190 tokens of T5-XXL are 3 MiB in fp32
PLAIN = {"manual_cast_dtype"}  # object patches that every CLIP has; setting one gives its weights another version
CALLS = {"encode_from_tokens", "encode_from_tokens_scheduled", "encode_token_weights", "encode", "forward"}


class Results:
    """The latest results of one model, the last used last."""

    def __init__(self) -> None:
        self.by_key: OrderedDict[tuple, list] = OrderedDict()

    def find(self, key: tuple) -> list | None:
        if key not in self.by_key:
            return None
        self.by_key.move_to_end(key)
        return self.by_key[key]

    def keep(self, key: tuple, result: list) -> None:
        self.by_key[key] = result
        while self.by_key and (len(self.by_key) > MOST_RESULTS or self.bytes() > MOST_BYTES):
            self.by_key.popitem(last=False)

    def bytes(self) -> int:
        return sum(tensor.nbytes for result in self.by_key.values() for tensor in tensors(result))


remembered: weakref.WeakKeyDictionary[torch.nn.Module, Results] = weakref.WeakKeyDictionary()


def encoded(clip, tokens: dict) -> list:
    """CONDITIONING of ComfyUI's tokens. Lists and dicts are the caller's own; tensors are shared and must not be changed."""
    key = key_of(clip, tokens)
    if key is None:
        return clip.encode_from_tokens_scheduled(tokens)
    results = remembered.setdefault(clip.patcher.model, Results())
    result = results.find(key)
    if result is None:
        result = clip.encode_from_tokens_scheduled(tokens)
        results.keep(key, result)
    return [[cond, dict(values)] for cond, values in result]


def key_of(clip, tokens: dict) -> tuple | None:
    """All that decides what a CLIP makes of tokens; None where that cannot be told."""
    patchers = patchers_of(clip)
    if not patchers or not is_plain(clip, patchers):
        return None
    try:
        spelled = [(key, [[spelling(*entry) for entry in row] for row in rows]) for key, rows in tokens.items()]
    except (AttributeError, TypeError):  # more than numbers, vectors and weights
        return None
    states = [(str(patcher.load_device), patcher.patches_uuid, layer) for patcher, layer in patchers]
    return *states, sha256(repr(spelled).encode()).digest()


def patchers_of(clip) -> list[tuple[comfy.model_patcher.ModelPatcher, int | None]]:
    """Those of a CLIP's encoders, each with its CLIP Set Last Layer; none for a CLIP of a class that other packs made."""
    if type(clip) is CombinedCLIP:
        return [(clip.patcher, clip.layer_idx), (clip.t5.patcher, clip.t5.layer)]
    return [(clip.patcher, clip.layer_idx)] if type(clip) is comfy.sd.CLIP else []


def is_plain(clip: comfy.sd.CLIP, patchers: list) -> bool:
    """Does nothing but weights and tokens decide what the CLIP makes?"""
    if clip.apply_hooks_to_conds:
        return False
    for patcher, _ in patchers:
        wrappers = [calls for by_key in patcher.wrappers.values() for calls in by_key.values()]
        if patcher.forced_hooks or patcher.injections or patcher.additional_models or any(wrappers):
            return False
        if set(patcher.object_patches) - PLAIN:
            return False
    modules = [module for patcher, _ in patchers for module in patcher.model.modules()]
    if any(module._forward_hooks or module._forward_pre_hooks for module in modules):
        return False
    return not any(CALLS & vars(owner).keys() for owner in (clip, *modules))


def spelling(token, weight: float) -> tuple:
    """A token as something to compare. Raises TypeError for what is none."""
    if isinstance(token, Tensor):
        token = (tuple(token.shape), sha256(token.detach().cpu().float().contiguous().numpy().tobytes()).hexdigest())
    elif not isinstance(token, Real):
        raise TypeError(type(token))
    return token, weight


def tensors(value) -> Iterator[Tensor]:
    """All tensors in lists and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for part in value.values() if isinstance(value, dict) else value:
            yield from tensors(part)
