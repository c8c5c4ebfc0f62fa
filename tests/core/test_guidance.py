import dataclasses

import pytest
import torch

from ediffi_core.guidance import dropped, guided, guided_apart, thresholded
from ediffi_core.paint_with_words import PaintSettings, Region, Regions, painted
from ediffi_core.preconditioning import Denoiser

X, SIGMA = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([1.0, 1.0])


def counted(network):
    """A denoiser, and the list of the rows of its calls."""
    calls = []

    def denoise(x, sigma, conditioning):
        calls.append(len(x))
        return Denoiser(network)(x, sigma, conditioning)

    return denoise, calls


def test_scale_1_is_the_conditional_denoiser_and_calls_it_once(tiny, conditioning):
    denoise, calls = counted(tiny)
    assert torch.equal(guided(denoise, 1)(X, SIGMA, conditioning), Denoiser(tiny)(X, SIGMA, conditioning))
    assert calls == [2]


def test_guidance_extrapolates_from_the_dropped_conditioning(tiny, conditioning):
    denoise = Denoiser(tiny)
    cond, uncond = denoise(X, SIGMA, conditioning), denoise(X, SIGMA, conditioning.only())
    torch.testing.assert_close(
        guided(denoise, 3.5)(X, SIGMA, conditioning), uncond + 3.5 * (cond - uncond), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize(
    ("what", "kept"), [("all", ()), ("text", ("image",)), ("image", ("clip", "t5"))], ids=["all", "text", "image"]
)
def test_what_is_dropped_is_dropped_as_in_training(conditioning, what, kept):
    seen = conditioning.with_low_res(torch.rand(len(conditioning), 3, 8, 8), torch.zeros(len(conditioning)))
    expected = seen.only(*kept)
    for field in dataclasses.fields(seen):
        assert torch.equal(getattr(dropped(seen, what), field.name), getattr(expected, field.name)), field.name


def test_an_unknown_choice_of_what_to_drop_is_refused_with_the_known_ones(conditioning):
    with pytest.raises(ValueError, match=r"'style' cannot be dropped. Choose one of all, text, image"):
        dropped(conditioning, "style")


def test_guided_away_from_the_dropped_text_only_the_text_is_guided(tiny, conditioning):
    denoise = Denoiser(tiny)
    both, style = denoise(X, SIGMA, conditioning), denoise(X, SIGMA, conditioning.only("image"))
    made = guided(denoise, 3.5, dropped(conditioning, "text"))(X, SIGMA, conditioning)
    torch.testing.assert_close(made, style + 3.5 * (both - style), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("text_scale", "style_scale", "rows"),
    [
        pytest.param(5.0, 2.0, 3, id="all three branches"),
        pytest.param(1.0, 3.0, 3, id="text 1 cancels nothing"),
        pytest.param(4.0, 0.0, 3, id="style pulled against"),
        pytest.param(5.0, 1.0, 2, id="style 1: no null"),
        pytest.param(0.0, 3.0, 2, id="text 0: never both"),
        pytest.param(3.0, 3.0, 2, id="equal: never style alone"),
        pytest.param(1.0, 1.0, 1, id="conditional"),
        pytest.param(0.0, 1.0, 1, id="style alone"),
    ],
)
def test_text_and_style_guided_apart_are_the_formula_in_as_few_rows_as_it_has_terms(
    tiny, conditioning, text_scale, style_scale, rows
):
    denoise, calls = counted(tiny)
    made = guided_apart(denoise, text_scale, style_scale)(X, SIGMA, conditioning)
    assert calls == [rows * len(X)]

    null, style, both = (
        Denoiser(tiny)(X, SIGMA, one) for one in (conditioning.only(), conditioning.only("image"), conditioning)
    )
    expected = null + style_scale * (style - null) + text_scale * (both - style)
    torch.testing.assert_close(made, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("scale", [0.0, 1.0, 3.5])
def test_equal_scales_of_text_and_style_are_plain_guidance(tiny, conditioning, scale):
    apart, together = guided_apart(Denoiser(tiny), scale, scale), guided(Denoiser(tiny), scale)
    assert torch.equal(apart(X, SIGMA, conditioning), together(X, SIGMA, conditioning))


def test_without_a_style_only_the_text_is_guided_in_two_rows(tiny, conditioning):
    plain = dropped(conditioning, "image")
    denoise, calls = counted(tiny)
    made = guided_apart(denoise, 5.0, 2.0)(X, SIGMA, plain)
    assert calls == [2 * len(X)]
    assert torch.equal(made, guided(Denoiser(tiny), 5.0)(X, SIGMA, plain))


def test_a_batch_of_which_one_has_a_style_is_guided_as_one_by_one(tiny, conditioning):
    mixed = conditioning.drop(image=torch.tensor([True, False]))
    denoise = guided_apart(Denoiser(tiny), 5.0, 2.0)
    alone = [denoise(X[i : i + 1], SIGMA[:1], mixed.rows(slice(i, i + 1))) for i in range(2)]
    torch.testing.assert_close(denoise(X, SIGMA, mixed), torch.cat(alone), atol=1e-5, rtol=1e-5)


def test_painted_regions_belong_to_the_branch_that_knows_the_text(tiny, conditioning):
    mask = torch.zeros(1, 8, 8)
    mask[:, :, :4] = 1
    regions = [Regions((Region("left", mask, (1, 78)),))] * 2
    denoise = painted(Denoiser(tiny), regions, PaintSettings(weight=2.0))
    made = guided_apart(denoise, 5.0, 2.0)(X, SIGMA, conditioning)

    null, style = (Denoiser(tiny)(X, SIGMA, one) for one in (conditioning.only(), conditioning.only("image")))
    both = denoise(X, SIGMA, conditioning)
    assert not torch.allclose(both, Denoiser(tiny)(X, SIGMA, conditioning), atol=1e-3)
    torch.testing.assert_close(made, null + 2 * (style - null) + 5 * (both - style), atol=1e-5, rtol=1e-5)


def test_dynamic_thresholding_divides_by_the_percentile_of_each_image():
    x = torch.linspace(-4, 4, 1001).repeat(2, 3, 1, 1)
    x[1] /= 8
    y = thresholded(x, 0.9, 100.0)
    s = x[0].abs().flatten().double().quantile(0.9).item()
    torch.testing.assert_close(y[0], x[0].clamp(-s, s) / s, rtol=1e-2, atol=1e-2)
    assert y[0].max() == 1
    assert torch.equal(y[1], x[1]), "An image inside the range is left alone."
    assert torch.equal(thresholded(x[1:], 0.9, 100.0), y[1:])


def test_a_maximum_of_one_is_static_thresholding():
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 3
    assert torch.equal(thresholded(x, 0.995, 1.0), x.clamp(-1, 1))
    assert thresholded(x, 0.5, 1.5).abs().max() <= 1
