"""Optimizers: Muon for the matrices inside a network, AdamW for the rest, of which projections may be trained behind a change
of basis.

Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) turns the momentum of each weight matrix into the nearest matrix
whose singular values are all about 1, so every direction learns at one pace. On a small U-Net it needs half of AdamW's steps
for the same loss (docs/demo.md).
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

QUINTIC = (
    3.4445,
    -4.7750,
    2.0315,
)  # Newton-Schulz iteration that is fastest from small singular values (Jordan et al.)
ITERATIONS = 5
RMS = 0.2  # of an update by AdamW; scaled to it, Muon takes AdamW's learning rates (Liu et al. 2025, "Muon is scalable", Sec. 2.2)


def orthogonalised(matrices: Tensor) -> Tensor:
    """The orthogonal factor of each of (..., R, C), roughly: singular values between 0.7 and 1.2. bfloat16 suffices where it
    is fast."""
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = (matrices.mT if tall else matrices).to(torch.float32 if _emulates_bfloat16(matrices.device) else torch.bfloat16)
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    a, b, c = QUINTIC
    for _ in range(ITERATIONS):
        square = x @ x.mT
        polynomial = b * square + c * (square @ square)
        x = a * x + polynomial @ x
    return x.mT if tall else x


def _emulates_bfloat16(device: torch.device) -> bool:
    """Are products in bfloat16 slower there than in float32? On a CPU of AVX2 they took two thirds of a training step."""
    return device.type == "cpu" and "AVX512" not in torch.backends.cpu.get_cpu_capability()


class Muon(torch.optim.Optimizer):
    """Momentum with orthogonalised updates, for parameters of two or more dimensions: (out, in, ...) is (out, in * ...)."""

    def __init__(
        self, parameters: Iterable[Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.0
    ) -> None:
        super().__init__(parameters, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            alike = defaultdict(
                list
            )  # matrices of one shape are turned together: a GPU waits for calls, not for products
            for parameter in (one for one in group["params"] if one.grad is not None):
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
                ahead = parameter.grad.lerp(state["momentum"], group["momentum"]).flatten(1)  # Nesterov's
                alike[ahead.shape].append((parameter, ahead))
            for shape, members in alike.items():
                parameters, ahead = zip(*members, strict=True)
                updates = orthogonalised(torch.stack(ahead)) if len(ahead) > 1 else [orthogonalised(ahead[0])]
                for parameter, update in zip(parameters, updates, strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    change = update.reshape(parameter.shape).to(parameter.dtype)
                    parameter.add_(change, alpha=-group["lr"] * RMS * max(shape) ** 0.5)


class WhitenedAdamW(torch.optim.AdamW):
    """AdamW on V instead of the weight W = V P (out, in), where P (in, in), symmetric, whitens what the layer is given.

    What is faint in the input then learns as fast as what is loud. W is all that is kept.
    """

    def __init__(self, parameters: Sequence[Tensor], whiteners: Sequence[Tensor], **settings) -> None:
        super().__init__(parameters, **settings)
        self.whiteners = dict(zip(parameters, whiteners, strict=True))

    @torch.no_grad()
    def step(self, closure=None) -> None:
        kept = {}
        for group in self.param_groups:
            for parameter in (one for one in group["params"] if one.grad is not None):
                parameter.grad = parameter.grad @ self.whiteners[parameter]
                kept[parameter] = parameter * (1 - group["lr"] * group["weight_decay"])
        super().step(closure)
        for parameter, before in kept.items():
            parameter.copy_(before + (parameter - before) @ self.whiteners[parameter])


def matrices(network: nn.Module) -> set[str]:
    """Names of the weights that Muon trains: convolutions and attention inside the network.

    The first and the last layer, embeddings, and what turns them into modulation are AdamW's.
    """
    outer = ("stem.", "conv_out.")
    return {
        name
        for name, p in network.named_parameters()
        if (p.ndim == 4 or (p.ndim == 2 and "attention." in name)) and not name.startswith(outer)
    }
