"""Training that hears all of an embedding.

The numbers of an encoder's output go together: of the mean of the demo T5's 128, one direction carries 2,000 times the
variance of the typical one. A linear map that is trained on it follows the loud directions and never comes to the faint
ones, which say what is where. Here the map is trained as if all directions were equally loud, as far as they are not mere
rounding, and a new network's begins so. docs/demo.md has what this changes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..unet import ConditionedNetwork, EmbeddingProjection
from .pairs import Pairs

ROWS = 2048  # pairs that are looked at
FAINTEST = 4e-4  # of the loudest direction's variance; what is fainter is raised no further


def whiteners(
    network: ConditionedNetwork, pairs: Pairs, generator: torch.Generator
) -> dict[EmbeddingProjection, Tensor]:
    """Of each projection of the network, the `whitener` (E, E) of what it sees in up to ROWS random pairs."""
    rows = torch.randint(len(pairs), (min(ROWS, len(pairs)),), generator=generator)
    _, conditioning = pairs.batch(rows)
    t5 = conditioning.t5_mask.float()[:, :, None]
    seen = {
        network.clip: conditioning.clip_tokens[conditioning.clip_mask],
        network.t5: conditioning.t5_tokens[conditioning.t5_mask],
        network.pooled: conditioning.clip_pooled,
        network.image: conditioning.image,
        network.style: conditioning.image,
    }
    if network.t5_mean is not None:
        seen[network.t5_mean] = (conditioning.t5_tokens * t5).sum(1) / t5.sum(1)
    return {projection: whitener(embeddings) for projection, embeddings in seen.items()}


def whitener(embeddings: Tensor) -> Tensor:
    """(E, E) symmetric: of `embeddings` (N, E) behind LayerNorm it makes such whose mean square is 1, alike in all directions
    that are not faint.

    About zero, not about their mean: so an embedding that is dropped, which is zero, stays zero and lies no farther from the
    others than they lie from each other.
    """
    normed = F.layer_norm(embeddings.float(), embeddings.shape[1:]).double()
    if not normed.any():  # own pictures may come without this embedding
        return torch.eye(normed.shape[1])
    variances, directions = torch.linalg.eigh(normed.T @ normed / len(normed))  # small to large
    variances = variances.clamp(min=FAINTEST * variances[-1])
    matrix = (directions * variances.rsqrt()) @ directions.T
    return (matrix / (normed @ matrix).square().mean().sqrt()).float()


@torch.no_grad()
def whiten(projection: EmbeddingProjection, matrix: Tensor, generator: torch.Generator) -> None:
    """First weights: the whitener, then a random rotation into the network's width, to a mean square of about 1."""
    width_out, width_in = projection.linear.weight.shape
    side = max(width_in, width_out)
    turn = torch.linalg.qr(torch.randn(side, side, generator=generator, dtype=torch.float64))[0][:width_out, :width_in]
    projection.linear.weight.copy_(turn.float() @ matrix * (side / width_in) ** 0.5)
    projection.linear.bias.zero_()
