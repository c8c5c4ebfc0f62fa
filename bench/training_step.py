"""One training step of the base stage's network against those of its peers, in alternating pairs.

    python bench/training_step.py [--pairs 7] [--batch 4] [--threads 1] [--peers FOLDER] [--json FILE]

Peers: diffusers' UNet2DConditionModel and imagen-pytorch's Unet, of the same resolution, levels, attention and text, and with
as many weights as ours as multiples of their base width allow. A step is a forward pass, a squared error, backward and
AdamW, in float32, of the same optimizer for all. Ratios are medians over pairs of (peer, ours) steps, one directly after
the other, of the process's own time on a CPU, which other programs disturb least. --peers: where `pip install --target
FOLDER --no-deps imagen-pytorch ...` put a peer that is not installed; a peer that is missing is left out and named.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))

from ediffi_core.conditioning import Conditioning  # noqa: E402
from ediffi_core.unet import PRESETS, UNet, UNetConfig  # noqa: E402

SIDE, TOKENS, WIDTH = 64, 190, 128  # pixels; CLIP's 77 and T5's 113 tokens; of the text embeddings
MULT, ATTENTION = (1, 2, 3, 4), (False, True, True, True)
OURS = {
    "ADM layout (paper)": UNetConfig(
        channels=64, channel_mult=MULT, blocks=(1, 1, 1, 1), attention=ATTENTION, head_channels=32, context_width=WIDTH,
        clip_width=WIDTH, pooled_width=WIDTH, t5_width=WIDTH, image_width=WIDTH,
    ),
    "demo-base (patch 4)": replace(PRESETS["demo-base"], waves=5, direct=True),
}  # fmt: skip


def weights(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def of_width(build: Callable[[int], nn.Module], wanted: int, multiple: int) -> nn.Module:
    """The network of the width, a multiple, whose number of weights is nearest."""
    with torch.device("meta"):
        sizes = {width: weights(build(width)) for width in range(multiple, 257, multiple)}
    return build(min(sizes, key=lambda width: abs(sizes[width] - wanted)))


class Step:
    """A network with its optimizer and a batch; called, it does one training step and returns its seconds."""

    def __init__(self, network: nn.Module, forward: Callable[[nn.Module, Tensor, Tensor], Tensor], batch: int) -> None:
        self.network, self.forward = network.train(), forward
        self.optimizer = torch.optim.AdamW(network.parameters(), 1e-4, fused=True)
        self.images, self.noise = torch.rand(batch, 3, SIDE, SIDE), torch.rand(batch)

    def __call__(self) -> float:
        began = time.process_time()
        loss = (self.forward(self.network, self.images, self.noise) - self.images).square().mean()
        self.network.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return time.process_time() - began


def ours(config: UNetConfig, batch: int) -> Step:
    clip, t5 = torch.randn(batch, 77, WIDTH), torch.randn(batch, 113, WIDTH)
    everything = (torch.ones(batch, tokens, dtype=torch.bool) for tokens in (77, 113))
    clip_mask, t5_mask = everything
    pooled, image = torch.randn(batch, WIDTH), torch.randn(batch, WIDTH)
    conditioning = Conditioning(clip, clip_mask, pooled, t5, t5_mask, image, torch.ones(batch))
    return Step(UNet(config).initialise(), lambda net, x, noise: net(x, noise, conditioning), batch)


def diffusers(wanted: int, batch: int) -> Step:
    from diffusers import UNet2DConditionModel

    def build(width: int) -> nn.Module:
        kinds = ["CrossAttn" if attends else "" for attends in ATTENTION]
        return UNet2DConditionModel(
            sample_size=SIDE, in_channels=3, out_channels=3, layers_per_block=1, cross_attention_dim=WIDTH,
            block_out_channels=tuple(width * mult for mult in MULT), norm_num_groups=4,
            attention_head_dim=tuple(max(1, width * mult // 32) for mult in MULT),  # diffusers means the number of heads
            down_block_types=tuple(f"{kind}DownBlock2D" for kind in kinds),
            up_block_types=tuple(f"{kind}UpBlock2D" for kind in reversed(kinds)),
        )  # fmt: skip

    text = torch.randn(batch, TOKENS, WIDTH)
    return Step(of_width(build, wanted, 4), lambda net, x, noise: net(x, noise, text).sample, batch)


def imagen(wanted: int, batch: int) -> Step:
    from unittest.mock import patch

    from transformers import T5Config

    with patch.object(
        T5Config, "from_pretrained", lambda name: T5Config()
    ):  # asked of the hub for a default not used here
        from imagen_pytorch.imagen_pytorch import Unet

    def build(width: int) -> nn.Module:
        return Unet(
            dim=width, dim_mults=MULT, num_resnet_blocks=1, layer_attns=ATTENTION, layer_cross_attns=ATTENTION,
            text_embed_dim=WIDTH, cond_dim=WIDTH, attn_dim_head=32, attn_heads=4, max_text_len=TOKENS,
        )  # fmt: skip

    text, mask = torch.randn(batch, TOKENS, WIDTH), torch.ones(batch, TOKENS, dtype=torch.bool)
    return Step(
        of_width(build, wanted, 4), lambda net, x, noise: net(x, noise, text_embeds=text, text_mask=mask), batch
    )


PEERS = {"diffusers UNet2DConditionModel": diffusers, "imagen-pytorch Unet": imagen}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--peers", type=Path)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    if options.peers:
        sys.path.append(str(options.peers))
    rows = []
    for name, config in OURS.items():
        mine = ours(config, options.batch)
        for peer, make in PEERS.items():
            try:
                theirs = make(weights(mine.network), options.batch)
            except ImportError as error:
                print(f"{peer}: left out, {error}")
                continue
            mine(), theirs()
            pairs = [(theirs(), mine()) for _ in range(options.pairs)]
            ratios = sorted(other / own for other, own in pairs)
            row = {
                "ours": name,
                "weights": weights(mine.network),
                "seconds": statistics.median(own for _, own in pairs),
                "peer": peer,
                "peer weights": weights(theirs.network),
                "peer seconds": statistics.median(other for other, _ in pairs),
                "peer over ours": statistics.median(ratios),
                "spread": [ratios[0], ratios[-1]],
            }
            rows.append(row)
            print(
                f"{name}, {row['weights']:,} weights, {row['seconds']:.3f} s; {peer}, {row['peer weights']:,}, "
                f"{row['peer seconds']:.3f} s; ratio {row['peer over ours']:.2f} [{ratios[0]:.2f}, {ratios[-1]:.2f}]",
                flush=True,
            )
    if options.json:
        settings = {"pairs": options.pairs, "batch": options.batch, "threads": options.threads}
        options.json.write_text(json.dumps({"settings": settings, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
