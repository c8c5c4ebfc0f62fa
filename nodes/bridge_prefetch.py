"""Bringing the next expert to its device on another thread, while the expert before it still works.

Only where that is safe and of use: the MODEL is not streamed by ComfyUI itself (dynamic VRAM), has a device to be brought
to, shares no weights with the working one, and both fit beside the working memory, so that nothing is moved out for it.
The thread does what ComfyUI would do at the switch; the copy shares the device's default stream with the working expert,
so it hides reading from disk, patching and converting, and not the transfer itself.
"""

import logging
import threading

import comfy.model_management as management
import comfy.model_patcher
import torch

Patcher = comfy.model_patcher.ModelPatcher


class Prefetch:
    """A loading under way, or the decision against one."""

    def __init__(self, patcher: Patcher, working: Patcher, memory_required: float) -> None:
        """memory_required: bytes that a call of the working expert needs besides its weights."""
        self.thread = None
        if is_useful(patcher, working) and has_room(patcher, memory_required):
            self.thread = threading.Thread(target=_load, args=(patcher, memory_required), name="eDiff-I prefetch")
            self.thread.start()

    def wait(self) -> None:
        """Until nothing is loaded any more. The switch loads what a failed prefetch did not."""
        if self.thread is not None:
            self.thread.join()


def is_useful(patcher: Patcher, working: Patcher) -> bool:
    return (
        not patcher.is_dynamic()
        and patcher.load_device != patcher.offload_device
        and patcher.model is not working.model
        and patcher.loaded_size() < patcher.model_size()
    )


def has_room(patcher: Patcher, memory_required: float) -> bool:
    """Would ComfyUI load it without moving anything else out? As `load_models_gpu` counts."""
    working_memory = max(management.minimum_inference_memory(), memory_required + management.extra_reserved_memory())
    missing = patcher.model_size() - patcher.loaded_size()
    return management.get_free_memory(patcher.load_device) > 1.1 * missing + working_memory


def _load(patcher: Patcher, memory_required: float) -> None:
    try:
        with torch.inference_mode():  # of each thread its own; sampling runs in it
            management.load_models_gpu([patcher], memory_required=memory_required)
    except Exception:
        logging.getLogger("ediffi").warning("An expert could not be loaded ahead of its first step.", exc_info=True)
