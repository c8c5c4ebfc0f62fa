from dataclasses import replace

import pytest
import torch
from tiny import random_conditioning, tiny_network

from ediffi_core.attention import attend
from ediffi_core.conditioning import EMBEDDINGS, joined, null_conditioning
from ediffi_core.paint_with_words import PaintSettings, Region, Regions, painted

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
    assert not getattr(dropped, "image_strength" if name == "image" else f"{name}_mask")[0].any()


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


STRENGTHS = (0.0, 0.25, 0.5, 1.0, 2.0)


def styled(conditioning, *strengths):
    return replace(conditioning, image_strength=torch.tensor(strengths))


def test_a_style_of_strength_0_is_an_absent_one(conditioning):
    network = tiny_network()
    absent = conditioning.drop(image=torch.tensor([True, True]))
    assert torch.equal(network(X, C_NOISE, styled(conditioning, 0.0, 0.0)), network(X, C_NOISE, absent))


def test_strength_leads_from_an_absent_style_through_the_given_one_and_beyond(conditioning):
    network = tiny_network()
    absent, given, *others = (
        network.embedding(C_NOISE, styled(conditioning, s, s), torch.float32) for s in (0.0, 1.0, 0.25, 0.5, 2.0)
    )
    for strength, embedding in zip((0.25, 0.5, 2.0), others, strict=True):
        torch.testing.assert_close(embedding, absent + strength * (given - absent), rtol=1e-5, atol=1e-5)
    assert (given - absent).abs().max() > 0.1


def test_the_attention_that_a_style_gets_is_multiplied_by_its_strength(conditioning):
    """Of each weight before the weights are made to sum to 1, in every cross-attention."""
    network, seen = tiny_network(), {}

    def noting(strength):
        def noted(q, k, v, bias):
            if bias is not None:
                scores = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).double()
                seen.setdefault(strength, []).append((scores + bias).softmax(-1)[..., -2])
            return attend(q, k, v, bias)

        return noted

    # the first block sees the same queries whatever the strength, if the global embedding is held
    embedding = network.embedding(C_NOISE, conditioning, torch.float32)
    network.embedding = lambda *_: embedding
    for strength in STRENGTHS:
        network(X, C_NOISE, styled(conditioning, strength, strength), noting(strength))
    one = seen[1.0][0]
    for strength in STRENGTHS:
        torch.testing.assert_close(seen[strength][0], strength * one / (1 - one + strength * one), rtol=1e-5, atol=1e-7)
    assert not seen[0.0][0].any()


def test_a_stronger_style_is_farther_from_none(conditioning):
    network = tiny_network()
    embeddings = [network.embedding(C_NOISE, styled(conditioning, s, s), torch.float32) for s in STRENGTHS]
    distances = [(embedding - embeddings[0]).norm() for embedding in embeddings]
    assert distances == sorted(set(distances))


def test_styles_of_different_strength_share_a_batch():
    network, conditioning = tiny_network(), random_conditioning(batch=5)
    conditioning = styled(conditioning, *STRENGTHS)
    x, c_noise = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(1)), torch.linspace(-1, 1, 5)
    batch = network(x, c_noise, conditioning)
    for row in range(5):
        one = slice(row, row + 1)
        alone = network(x[one], c_noise[one], conditioning.rows(one))
        torch.testing.assert_close(batch[one], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("strength", [0.25, 3.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_style_of_any_strength_in_half_precision(conditioning, dtype, strength):
    full = tiny_network()(X, C_NOISE, styled(conditioning, strength, strength))
    half = tiny_network().to(dtype)(X.to(dtype), C_NOISE, styled(conditioning, strength, strength))
    torch.testing.assert_close(half.float(), full, rtol=0.1, atol=0.1)


def test_a_style_and_painted_words_work_together(conditioning):
    """The bias of painting is added to the style's: the attention of a painted row is what both say."""
    regions = Regions((Region("phrase", torch.ones(1, 8, 8), (1, 80)),))
    calls = []

    def denoise(x, sigma, conditioning, attend=attend):
        def noted(q, k, v, bias):
            calls.append(bias)
            return attend(q, k, v, bias)

        return tiny_network()(x, sigma, conditioning, noted)

    sigma = torch.full((2,), 5.0)
    obeying = painted(denoise, [regions], PaintSettings(weight=1.0))
    both = obeying(X, sigma, styled(conditioning, 0.5, 0.5))
    assert torch.allclose(calls[-1][..., -2], torch.tensor(0.5).log())
    for other in (obeying(X, sigma, styled(conditioning, 0.0, 0.0)), denoise(X, sigma, styled(conditioning, 0.5, 0.5))):
        assert (both[0] - other[0]).abs().max() > 1e-4


def test_the_low_res_image_goes_with_its_request_and_is_never_dropped(conditioning):
    assert conditioning.low_res is None
    assert conditioning.rows([1]).low_res is None
    low_res, sigma = torch.rand(2, 3, 8, 8), torch.tensor([0.0, 0.1])
    seen = conditioning.with_low_res(low_res, sigma)
    assert torch.equal(seen.rows([1]).low_res, low_res[1:])
    assert torch.equal(null_conditioning(seen).low_res, low_res)
    both = joined([seen, null_conditioning(seen)])
    assert torch.equal(both.augmentation_sigma, torch.tensor([0.0, 0.1, 0.0, 0.1]))
    assert len(both.low_res) == 4
    assert seen.to(dtype=torch.float64).low_res.dtype == torch.float64
