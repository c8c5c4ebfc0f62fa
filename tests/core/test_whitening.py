import torch
import torch.nn.functional as F
from tiny import TINY, tiny_network

from ediffi_core.training.pairs import Pairs
from ediffi_core.training.whitening import whiten, whiten_projection
from ediffi_core.unet import EmbeddingProjection


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def lopsided(rows, width, seed=1):
    """Embeddings in which some directions are a hundred times as loud as others, far from zero."""
    basis = torch.linalg.qr(torch.randn(width, width, generator=generator(seed)))[0]
    loudness = torch.logspace(0, -2, width)
    return (torch.randn(rows, width, generator=generator(seed + 1)) * loudness) @ basis + 0.3 * basis[0]


def test_a_whitened_projection_hears_faint_directions_as_well_as_loud_ones():
    embeddings = lopsided(4000, 12)
    torch.manual_seed(0)
    plain, white = EmbeddingProjection(12, 32), EmbeddingProjection(12, 32)
    whiten_projection(white, embeddings, generator())

    def spread(projection):
        values = torch.linalg.svdvals(projection(embeddings).detach().double())[:12]
        return values[0] / values[10]  # LayerNorm takes one direction

    assert spread(plain) > 30
    assert spread(white) < 3
    assert abs(white(embeddings).square().mean().item() - 1) < 0.01


def test_what_is_mere_rounding_is_not_raised():
    embeddings = lopsided(500, 12)
    embeddings[:, 5] = 1e-6 * torch.randn(500, generator=generator(3)) + embeddings[:, 4]
    projection = EmbeddingProjection(12, 12)
    whiten_projection(projection, embeddings, generator())
    normed = F.layer_norm(embeddings, (12,))
    loudest = torch.linalg.svdvals(normed)[0] / 500**0.5
    assert torch.linalg.svdvals(projection.linear.weight)[0] < 1.01 * 50 * 12**0.5 / loudest  # 1 / sqrt(FAINTEST) = 50


def test_an_absent_embedding_stays_zero():
    projection = EmbeddingProjection(12, 16)
    whiten_projection(projection, lopsided(200, 12), generator())
    assert not projection(torch.zeros(2, 12)).any()


def pairs(count=40):
    tokens = {"clip": lopsided(3 * count, TINY.clip_width), "t5": lopsided(5 * count, TINY.t5_width)}
    return Pairs(
        pictures=torch.zeros(count, 8, 8, 3, dtype=torch.uint8),
        tokens=tokens,
        starts={"clip": torch.arange(count + 1) * 3, "t5": torch.arange(count + 1) * 5},
        clip_pooled=lopsided(count, TINY.pooled_width),
        image=lopsided(count, TINY.image_width),
        styles=torch.zeros(count, dtype=torch.uint8),
    )


def test_all_projections_of_a_network_are_whitened_and_nothing_else_is_touched():
    network = tiny_network(t5_mean=True)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    whiten(network, pairs(), generator())
    changed = {name for name, tensor in network.state_dict().items() if not torch.equal(tensor, before[name])}
    heard = ("clip", "t5", "pooled", "image", "style", "t5_mean")
    assert changed == {f"{name}.linear.{of}" for name in heard for of in ("weight", "bias")}


def test_whitening_is_the_same_for_the_same_seed():
    first, second, other = (tiny_network() for _ in range(3))
    for network, seed in ((first, 1), (second, 1), (other, 2)):
        whiten(network, pairs(), generator(seed))
    weights = [network.t5.linear.weight for network in (first, second, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
