"""Tiny networks and conditioning with random weights, for tests that need the real thing in small."""

import dataclasses

import torch

from ediffi_core.conditioning import Conditioning
from ediffi_core.efficient_unet import PRESETS as SR_PRESETS
from ediffi_core.efficient_unet import EfficientUNet
from ediffi_core.training.pairs import Pairs
from ediffi_core.training.recipe import Data, Node, Optimizer, Recipe
from ediffi_core.unet import PRESETS, NetworkConfig, UNet

TINY = PRESETS["tiny"]
TINY_SR256, TINY_SR1024 = SR_PRESETS["tiny-sr256"], SR_PRESETS["tiny-sr1024"]


def tiny_network(seed: int = 0, **changes) -> UNet:
    """Random weights everywhere, the layers that training starts at zero too."""
    torch.manual_seed(seed)
    return UNet(dataclasses.replace(TINY, **changes)).eval().requires_grad_(False)


def tiny_super_resolution(seed: int = 0, stage: str = "sr256", **changes) -> EfficientUNet:
    """The same for a super-resolution stage, "sr256" or "sr1024"."""
    torch.manual_seed(seed)
    config = dataclasses.replace(SR_PRESETS[f"tiny-{stage}"], **changes)
    return EfficientUNet(config).eval().requires_grad_(False)


def random_conditioning(
    batch: int = 2, seed: int = 0, config: NetworkConfig = TINY, clip_length: int = 77, t5_length: int = 113
) -> Conditioning:
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(shape, generator=generator)

    clip_used = torch.randint(2, 9, (batch, 1), generator=generator)
    t5_used = torch.randint(2, 9, (batch, 1), generator=generator)
    clip_mask, t5_mask = torch.arange(clip_length) < clip_used, torch.arange(t5_length) < t5_used
    return Conditioning(
        clip_tokens=randn(batch, clip_length, config.clip_width) * clip_mask[..., None],
        clip_mask=clip_mask,
        clip_pooled=randn(batch, config.pooled_width),
        t5_tokens=randn(batch, t5_length, config.t5_width) * t5_mask[..., None],
        t5_mask=t5_mask,
        image=randn(batch, config.image_width),
        image_strength=torch.ones(batch),
    )


def random_super_resolution(
    batch: int = 2, height: int = 16, width: int = 16, augmentation_sigma: float = 0.0, **choices
) -> Conditioning:
    """Conditioning with a low-res image, for images of this size."""
    generator = torch.Generator().manual_seed(choices.get("seed", 0) + 1)
    low_res = torch.rand((batch, 3, height, width), generator=generator) * 2 - 1
    conditioning = random_conditioning(batch, **choices)
    return conditioning.with_low_res(low_res, torch.full((batch,), augmentation_sigma))


def tiny_node(**changes) -> Node:
    return Node(**{"name": "shared", "steps": 6, "batch": 4, **changes})


def tiny_recipe(*nodes: Node, **changes) -> Recipe:
    optimizer = Optimizer(learning_rate=1e-3, warmup=2, final=0.1, ema=0.9)
    return Recipe("tiny", TINY, Data("none", 32), nodes or (tiny_node(),), optimizer=optimizer, **changes)


def tiny_pairs() -> Pairs:
    """32 small pictures of one colour each, with captions of random length."""
    generator = torch.Generator().manual_seed(0)
    lengths = {name: torch.randint(1, 6, (32,), generator=generator) for name in ("clip", "t5")}
    starts = {name: torch.cat([torch.zeros(1, dtype=torch.long), one.cumsum(0)]) for name, one in lengths.items()}
    widths = {"clip": TINY.clip_width, "t5": TINY.t5_width}
    return Pairs(
        pictures=torch.randint(0, 256, (32, 1, 1, 3), dtype=torch.uint8, generator=generator).expand(-1, 8, 8, -1),
        tokens={name: torch.randn(int(starts[name][-1]), widths[name], generator=generator).half() for name in lengths},
        starts=starts,
        clip_pooled=torch.randn(32, TINY.pooled_width, generator=generator).half(),
        image=torch.randn(32, TINY.image_width, generator=generator).half(),
        styles=torch.arange(32).remainder(3).to(torch.uint8),
    )
