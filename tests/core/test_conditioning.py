import pytest
import torch
from tiny import random_conditioning, tiny_network

from ediffi_core.conditioning import EMBEDDINGS, joined, null_conditioning

X, C_NOISE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([0.3, -0.5])
FIRST_ONLY = torch.tensor([True, False])


@pytest.mark.parametrize(
    ("name", "zeroed"),
    [("clip", ["clip_tokens", "clip_pooled"]), ("t5", ["t5_tokens"]), ("image", ["image"])],
)
def test_dropping_zeroes_one_embedding_of_the_chosen_rows(conditioning, name, zeroed):
    dropped = conditioning.drop(**{name: FIRST_ONLY})
    for field in ("clip_tokens", "clip_pooled", "t5_tokens", "image"):
        before, after = getattr(conditioning, field), getattr(dropped, field)
        assert torch.equal(after[1], before[1])
        assert (after[0] == 0).all() if field in zeroed else torch.equal(after[0], before[0])
    assert not getattr(dropped, f"{name}_mask")[0].any()


def test_dropping_does_not_change_its_input(conditioning):
    before = conditioning.clip_tokens.clone()
    conditioning.drop(clip=FIRST_ONLY)
    assert torch.equal(conditioning.clip_tokens, before)


def test_null_conditioning_forgets_the_prompt(conditioning):
    network = tiny_network()
    other = null_conditioning(random_conditioning(seed=9))
    assert torch.equal(network(X, C_NOISE, null_conditioning(conditioning)), network(X, C_NOISE, other))


@pytest.mark.parametrize("name", EMBEDDINGS)
def test_each_embedding_alone_reaches_the_network(conditioning, name):
    network = tiny_network()
    alone, nothing = network(X, C_NOISE, conditioning.only(name)), network(X, C_NOISE, conditioning.only())
    assert (alone - nothing).abs().max() > 1e-3


def test_an_unknown_embedding_is_named(conditioning):
    with pytest.raises(ValueError, match=r"Unknown embedding 't6'. The embeddings are clip, t5, image"):
        conditioning.only("t6")


def test_joined_requests_come_apart_again(conditioning):
    both = joined([conditioning, null_conditioning(conditioning)])
    assert len(both) == 4
    assert torch.equal(both.rows(slice(0, 2)).t5_tokens, conditioning.t5_tokens)
