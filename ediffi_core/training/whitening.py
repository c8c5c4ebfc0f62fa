"""First weights that let a network hear all of an embedding.

The numbers of an encoder's output go together: of the mean of the demo T5's 128, one direction carries 2,000 times the
variance of the typical one. A random linear map passes that on, and training follows the loud directions first. Here the map
begins by undoing it: after it, all directions of the pairs' embeddings are equally loud, as far as they are not mere
rounding. docs/demo.md has what this changes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..unet import ConditionedNetwork, EmbeddingProjection
from .pairs import Pairs

ROWS = 2048  # pairs that are looked at
FAINTEST = 4e-4  # of the loudest direction's variance; what is fainter is raised no further


@torch.no_grad()
def whiten(network: ConditionedNetwork, pairs: Pairs, generator: torch.Generator) -> None:
    """Set the first weights of the network's projections by up to ROWS random pairs."""
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
    for projection, embeddings in seen.items():
        whiten_projection(projection, embeddings, generator)


@torch.no_grad()
def whiten_projection(projection: EmbeddingProjection, embeddings: Tensor, generator: torch.Generator) -> None:
    """After it, the projections of `embeddings` (N, E) have a mean square of 1, alike in all directions that are not faint.

    About zero, not about their mean, and without a bias: so an embedding that is dropped, which is zero, stays zero and lies
    no farther from the others than they lie from each other.
    """
    width_out, width_in = projection.linear.weight.shape
    normed = F.layer_norm(embeddings.float(), (width_in,)).double()
    variances, directions = torch.linalg.eigh(normed.T @ normed / len(normed))  # small to large
    variances = variances.clamp(min=FAINTEST * variances[-1])
    side = max(width_in, width_out)
    turn = torch.linalg.qr(torch.randn(side, side, generator=generator, dtype=torch.float64))[0][:width_out, :width_in]
    weight = turn @ (directions * variances.rsqrt()) @ directions.T
    weight = weight / (normed @ weight.T).square().mean().sqrt()
    projection.linear.weight.copy_(weight)
    projection.linear.bias.zero_()
