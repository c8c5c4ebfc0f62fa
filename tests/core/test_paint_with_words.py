"""The formula of paint-with-words, against float64 and by what it promises."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ediffi_core.paint_with_words import PaintSettings, Region, Regions, bias, flow_sigma, level, resized


def tensors(seed=0, batch=2, heads=3, queries=20, tokens=7, width=8):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, heads, n, width, generator=generator) for n in (queries, tokens, tokens)]


def formula(q, k, v, painted, weight, sigma):
    """Sec. 4.3 in float64, one sample at a time."""
    outputs = []
    for i in range(len(q)):
        scores = q[i].double() @ k[i].double().transpose(-1, -2)
        w = weight * math.log(1 + sigma) * max(scores.max().item(), 0)
        outputs.append(((scores + w * painted.double()) / math.sqrt(q.shape[-1])).softmax(-1) @ v[i].double())
    return torch.stack(outputs)


def test_it_is_the_papers_formula():
    q, k, v = tensors()
    region = Region("red fox", torch.rand(1, 9, 11, generator=torch.Generator().manual_seed(1)), (2, 3), 0.7)
    painted = Regions((region,)).map((4, 5), 7)
    settings = PaintSettings(weight=0.8)
    added = bias(q, k, painted, settings.at(3.0))
    ours = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=added)
    torch.testing.assert_close(ours.double(), formula(q, k, v, painted[0], 0.8, 3.0), rtol=0, atol=1e-6)


@pytest.mark.parametrize("scale", ["max", "std"])
def test_the_level_is_of_each_sample_and_of_visible_tokens(scale, monkeypatch):
    q, k, _ = tensors(batch=3)
    hidden = torch.zeros(3, 7, dtype=torch.bool)
    hidden[1, 4:] = True
    levels = level(q, k, scale, hidden)
    for i in range(3):
        scores = (q[i].double() @ k[i].double().transpose(-1, -2))[..., ~hidden[i]]
        expected = scores.max() if scale == "max" else scores.std(correction=0)
        assert levels[i].item() == pytest.approx(expected.item(), rel=1e-5)
        assert level(q[i : i + 1], k[i : i + 1], scale, hidden[i : i + 1]) == pytest.approx(levels[i].item(), rel=1e-6)
    monkeypatch.setattr("ediffi_core.paint_with_words.BLOCK", 1)
    assert torch.allclose(level(q, k, scale, hidden), levels)


def test_scores_that_are_all_negative_add_nothing():
    q, k, _ = tensors()
    assert torch.equal(level(q.abs(), -k.abs()), torch.zeros(2))


def test_overlapping_phrases_add_up_and_share_tokens():
    mask = torch.zeros(1, 4, 4)
    mask[:, :, :2] = 1
    maps = Regions((Region("fox", mask, (1,), 0.5), Region("red fox", mask, (0, 1), 1.0))).map((4, 4), 3)
    assert maps[0, 0].tolist() == [1.0, 1.5, 0.0]
    assert maps[0, 3].tolist() == [0.0, 0.0, 0.0]


def test_a_mask_is_resized_once_for_each_grid(monkeypatch):
    calls = []
    regions = Regions((Region("fox", torch.ones(1, 8, 8), (0,)),))
    monkeypatch.setattr(
        "ediffi_core.paint_with_words.resized", lambda mask, grid: (calls.append(grid), torch.ones(1, *grid))[1]
    )
    for grid in [(4, 4), (2, 2), (4, 4), (2, 2)]:
        regions.masks(grid)
    assert calls == [(4, 4), (2, 2)]


@given(
    st.integers(0, 488), st.integers(0, 488), st.booleans(),
    st.sampled_from([(64, 64), (32, 32), (16, 16), (8, 8), (17, 13), (5, 9)]),
)  # fmt: skip
def test_a_stroke_never_vanishes(x, y, upright, grid):
    """24 pixels wide on a picture of 512."""
    mask = torch.zeros(1, 512, 512)
    mask[:, y : y + (400 if upright else 24), x : x + (24 if upright else 400)] = 1
    on_grid = resized(mask, grid)
    assert on_grid.max() > 0.04
    assert (on_grid > 0).sum() >= 1
    assert on_grid.max() <= 1


def test_areas_are_kept():
    mask = torch.rand(1, 64, 96, generator=torch.Generator().manual_seed(0))
    assert resized(mask, (8, 12)).mean().item() == pytest.approx(mask.mean().item(), rel=1e-5)
    assert torch.equal(resized(mask, (64, 96)), mask)
    small = torch.tensor([[[0.0, 1.0]]])
    assert torch.equal(resized(small, (2, 4))[0], torch.tensor([[0.0, 0, 1, 1], [0.0, 0, 1, 1]]))


def test_a_crop_is_the_part_of_the_map():
    mask = torch.rand(1, 32, 32, generator=torch.Generator().manual_seed(0))
    regions = Regions((Region("fox", mask, (0,)),))
    whole = regions.masks((8, 8))[0, :, 0].view(8, 8)
    part = regions.masks((4, 2), box=(0.5, 0.25, 1.0, 0.5))[0, :, 0].view(4, 2)
    torch.testing.assert_close(part, whole[4:, 2:4])


def test_a_picture_that_is_padded_keeps_its_regions_in_place():
    """A grid of 3 x 2 tokens of 4 pixels on a picture of 9 x 7: the padding below and right is as the edges are."""
    mask = torch.rand(1, 9, 7, generator=torch.Generator().manual_seed(1))
    by_hand = torch.cat([mask, mask[:, -1:].expand(1, 3, 7)], dim=1)
    by_hand = torch.cat([by_hand, by_hand[..., -1:]], dim=2)
    expected = by_hand.view(3, 4, 2, 4).mean((1, 3)).flatten()
    regions = Regions((Region("fox", mask, (0,)),))
    torch.testing.assert_close(regions.masks((3, 2), padded=((9, 7), (12, 8)))[0, :, 0], expected)


def test_the_weight_dies_out_with_the_noise_and_keeps_its_window():
    settings = PaintSettings(weight=0.5, start_sigma=20.0, end_sigma=0.1)
    assert settings.at(10.0) == pytest.approx(0.5 * math.log(11))
    assert settings.at(10.0) > settings.at(1.0) > settings.at(0.1) > 0
    assert settings.at(20.1) == settings.at(0.09) == 0.0
    assert PaintSettings().at(1e-4) == 0.0
    assert flow_sigma(0.5) == 1.0
    assert math.isfinite(flow_sigma(1.0))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PaintSettings(scale="mean"), "one of max, std, got 'mean'"),
        (lambda: Region("fox", torch.ones(4, 4), (1,)), r"mask of 'fox' must be \(images, height, width\)"),
        (lambda: Region("fox", torch.ones(1, 4, 4), (1,), -1.0), "strength of 'fox' must be 0 or more"),
        (lambda: Region("fox", torch.ones(1, 4, 4), (1,), math.nan), "strength of 'fox' must be 0 or more"),
    ],
)
def test_bad_values_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
