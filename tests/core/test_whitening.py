import dataclasses
import shutil

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tiny import TINY, tiny_network, tiny_node, tiny_pairs, tiny_recipe

from ediffi_core.training.pairs import Pairs
from ediffi_core.training.trainer import Trainer
from ediffi_core.training.whitening import whiten, whitener, whiteners
from ediffi_core.unet import EmbeddingProjection


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def lopsided(rows, width, seed=1):
    """Embeddings in which some directions are a hundred times as loud as others, far from zero."""
    basis = torch.linalg.qr(torch.randn(width, width, generator=generator(seed)))[0]
    loudness = torch.logspace(0, -2, width)
    return (torch.randn(rows, width, generator=generator(seed + 1)) * loudness) @ basis + 0.3 * basis[0]


def whitened(projection, embeddings, seed=0):
    whiten(projection, whitener(embeddings), generator(seed))
    return projection


@pytest.mark.parametrize("width", [32, 12, 8])
def test_a_whitened_projection_hears_faint_directions_as_well_as_loud_ones(width):
    embeddings = lopsided(4000, 12)
    torch.manual_seed(0)
    plain, white = EmbeddingProjection(12, width), whitened(EmbeddingProjection(12, width), embeddings)
    last = min(width, 11) - 1  # LayerNorm takes one direction

    def spread(projection):
        values = torch.linalg.svdvals(projection(embeddings).detach().double())
        return values[0] / values[last]

    assert spread(plain) > 5 * spread(white)
    assert spread(white) < 3
    assert abs(white(embeddings).square().mean().item() - 1) < 0.15


def test_what_is_mere_rounding_is_not_raised():
    embeddings = lopsided(500, 12)
    embeddings[:, 5] = 1e-6 * torch.randn(500, generator=generator(3)) + embeddings[:, 4]
    normed = F.layer_norm(embeddings, (12,))
    loudest = torch.linalg.svdvals(normed)[0] / 500**0.5
    assert torch.linalg.svdvals(whitener(embeddings))[0] < 1.01 * 50 * 12**0.5 / loudest  # 1 / sqrt(FAINTEST) = 50


def test_an_absent_embedding_stays_zero():
    projection = whitened(EmbeddingProjection(12, 16), lopsided(200, 12))
    assert not projection(torch.zeros(2, 12)).any()


def test_an_absent_encoder_does_no_harm():
    """Pictures of people's own may lack an embedding altogether."""
    assert whitener(torch.zeros(50, 12)).isfinite().all()


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


def test_each_projection_of_a_network_has_a_whitener():
    network = tiny_network(t5_mean=True)
    found = whiteners(network, pairs(), generator())
    assert found.keys() == {getattr(network, name) for name in ("clip", "t5", "pooled", "image", "style", "t5_mean")}
    for projection, matrix in found.items():
        assert matrix.shape == 2 * (projection.linear.weight.shape[1],)
        assert torch.allclose(matrix, matrix.T, atol=1e-5)


def trainer(folder, **changes):
    node = tiny_node(steps=4, **changes)
    network = dataclasses.replace(TINY, t5_mean=True)
    recipe = tiny_recipe(tiny_node(steps=4), node)
    return Trainer(dataclasses.replace(recipe, network=network), node, tiny_pairs(), folder)


def test_only_a_new_network_begins_whitened(tmp_path):
    plain, white = trainer(tmp_path / "plain"), trainer(tmp_path / "white", whiten=True)
    changed = {
        name
        for name, tensor in white.network.state_dict().items()
        if not torch.equal(tensor, plain.network.state_dict()[name])
    }
    heard = ("clip", "t5", "pooled", "image", "style", "t5_mean")
    assert changed == {f"{name}.linear.{of}" for name in heard for of in ("weight", "bias")}
    again = trainer(tmp_path / "again", whiten=True)
    assert all(
        torch.equal(tensor, again.network.state_dict()[name]) for name, tensor in white.network.state_dict().items()
    )

    list(plain.train())
    plain.save()
    shutil.copytree(tmp_path / "plain", tmp_path / "child")
    child = trainer(tmp_path / "child", name="child", parent="shared", whiten=True)
    saved = load_file(tmp_path / "child" / "shared.safetensors")
    assert all(torch.equal(tensor, saved[name].float()) for name, tensor in child.network.state_dict().items())
    before = child.network.t5_mean.linear.weight.clone()
    list(child.train())
    assert not torch.equal(child.network.t5_mean.linear.weight, before)


def test_a_whitened_run_that_was_stopped_continues_to_the_same_weights(tmp_path):
    whole, first = (trainer(tmp_path / name, whiten=True) for name in ("whole", "parts"))
    list(whole.train())
    list(first.train(until=2))
    first.save()
    second = trainer(tmp_path / "parts", whiten=True)
    list(second.train())
    for name, tensor in second.network.state_dict().items():
        assert torch.equal(tensor, whole.network.state_dict()[name]), name
