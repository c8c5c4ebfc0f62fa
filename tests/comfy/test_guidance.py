"""Text and style guided apart: a CONDITIONING with embeddings dropped, in ComfyUI's guiders, beside the core's formula."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from .reference import core_conditioning

SEED, STEPS = 5, 4


@pytest.fixture
def drop(pack):
    return lambda conditioning, what: pack.nodes["EDiffI_DropEmbeddings"].execute(conditioning, what).args[0]


@pytest.fixture
def picture():
    return SimpleNamespace(image_embeds=torch.randn(1, 10, generator=torch.Generator().manual_seed(7)))


@pytest.fixture(params=["eDiff-I Style Image", "unCLIPConditioning"])
def styled(pack, positive, picture, request):
    if request.param == "unCLIPConditioning":
        return pack.stock["unCLIPConditioning"]().apply_adm(positive, picture, 1.0, 0.0)[0]
    return pack.nodes["EDiffI_StyleImage"].execute(positive, picture, 1.0).args[0]


@pytest.fixture
def counting(model):
    """The ensemble, and the rows of each call of its network."""
    rows, clone = [], model.clone()

    def count(apply, given):
        rows.append(len(given["input"]))
        return apply(given["input"], given["timestep"], **given["c"])

    clone.set_model_unet_function_wrapper(count)
    return clone, rows


@pytest.fixture
def run(pack):
    """SamplerCustomAdvanced: Euler over EDM's sigmas with any guider, (1, 3, 16, 16)."""

    def run(guider):
        from comfy_extras import nodes_custom_sampler as stock

        sigmas = pack.core("schedule").karras_sigmas(STEPS).float()
        sampler = stock.KSamplerSelect.execute("euler").args[0]
        noise = stock.RandomNoise.execute(SEED).args[0]
        latent = {"samples": torch.zeros(1, 3, 16, 16), "downscale_ratio_spacial": 1}
        return stock.SamplerCustomAdvanced.execute(noise, guider, sampler, sigmas, latent).args[0]["samples"]

    return run


def dual(model, text_and_style, style, null, text_scale, style_scale):
    from comfy_extras.nodes_custom_sampler import DualCFGGuider

    return DualCFGGuider.execute(model, text_and_style, style, null, text_scale, style_scale, "regular").args[0]


def plain(model, positive, negative, cfg):
    from comfy_extras.nodes_custom_sampler import CFGGuider

    return CFGGuider.execute(model, positive, negative, cfg).args[0]


def core_run(pack, folder, conditioning, picture, guide):
    """The same run without ComfyUI; guide(ensemble, conditioning) is the guided denoiser."""
    ensemble = pack.core("checkpoint").load_ensemble(folder)
    cond = core_conditioning(pack, conditioning, ensemble.experts[0].network.config)
    cond = dataclasses.replace(cond, image=picture.image_embeds, image_strength=torch.ones(1))
    denoise = guide(ensemble, cond)
    sigmas = pack.core("schedule").karras_sigmas(STEPS).float()
    noise = pack.module("bridge_sampling").unit_noise(SEED, (1, 3, 16, 16))
    with torch.no_grad():
        *_, last = pack.core("samplers").euler(lambda x, sigma: denoise(x, sigma, cond), noise * sigmas[0], sigmas)
    return last.x


@pytest.mark.parametrize(
    ("text_scale", "style_scale", "rows"),
    [
        pytest.param(4.0, 2.0, 3, id="three branches"),
        pytest.param(1.0, 3.0, 3, id="text 1"),
        pytest.param(4.0, 1.0, 2, id="style 1 needs no null"),
        pytest.param(1.0, 1.0, 1, id="both 1 is the conditional model"),
    ],
)
def test_dual_cfg_guider_with_dropped_text_is_the_cores_guidance_apart(
    pack, ensembles, counting, positive, styled, picture, drop, run, text_scale, style_scale, rows
):
    model, calls = counting
    guider = dual(model, styled, drop(styled, "text"), drop(styled, "all"), text_scale, style_scale)
    ours = run(guider)
    assert calls == [rows] * STEPS

    guidance = pack.core("guidance")
    expected = core_run(
        pack, ensembles.different, positive, picture,
        lambda ensemble, _: guidance.guided_apart(ensemble, text_scale, style_scale),
    )  # fmt: skip
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("what", ["all", "text", "image"])
def test_as_a_negative_it_is_the_cores_null(pack, ensembles, counting, positive, styled, picture, drop, run, what):
    model, calls = counting
    ours = run(plain(model, styled, drop(styled, what), 3.0))
    assert calls == [2] * STEPS

    guidance = pack.core("guidance")
    expected = core_run(
        pack, ensembles.different, positive, picture,
        lambda ensemble, cond: guidance.guided(ensemble, 3.0, guidance.dropped(cond, what)),
    )  # fmt: skip
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def test_without_its_style_a_conditioning_is_what_it_was_before(positive, styled, drop):
    ((tokens, values),), ((expected_tokens, expected),) = drop(styled, "image"), positive
    assert tokens is expected_tokens
    assert {key: value for key, value in values.items() if key != "model_conds"} == expected
    assert not values.get("model_conds")


def test_nothing_that_was_given_is_changed(styled, drop):
    tokens, values = styled[0][0].clone(), dict(styled[0][1])
    for what in ("all", "text", "image"):
        drop(styled, what)
    assert torch.equal(styled[0][0], tokens)
    assert styled[0][1] == values


def test_everything_else_of_an_entry_stays(pack, positive, drop):
    two = [[tokens, values | {"start_percent": 0.5, "strength": 0.7}] for tokens, values in positive * 2]
    for tokens, values in drop(pack.bridge.for_experts([two, two]), "all"):
        assert not tokens.any()
        assert not values["pooled_output"].any()
        assert (values["start_percent"], values["strength"]) == (0.5, 0.7)
        assert "ediffi_expert" in values
        assert "ediffi_expert" in values["model_conds"]


def test_painted_regions_go_with_the_text(pack, model, positive, drop, run):
    method, painting = pack.core("paint_with_words"), pack.module("bridge_painting")
    region = method.Region("left", torch.ones(1, 4, 4), (1, 78))
    painted = painting.painted_with(positive, [region], 0)
    ((_, kept),) = drop(painted, "image")
    assert painting.REGIONS in kept
    ((_, values),) = drop(painted, "text")
    assert painting.REGIONS not in values
    assert painting.REGIONS not in values["model_conds"]
    assert torch.equal(
        run(plain(model, painted, drop(painted, "all"), 3.0)), run(plain(model, painted, drop(positive, "all"), 3.0))
    )


def test_a_phrase_cannot_be_bound_to_dropped_text(pack, positive, drop):
    words = pack.bridge.Words("a red fox", tuple([(0, 1), (2, 5), (6, 9)] + [(0, 0)] * 187))
    dropped = drop([[positive[0][0], positive[0][1] | {pack.bridge.WORDS: words}]], "text")
    with pytest.raises(ValueError, match="eDiff-I Drop Embeddings has dropped its text"):
        pack.nodes["EDiffI_BindPhrase"].execute(dropped, torch.ones(1, 8, 8), "red fox", 1.0, 0)


@pytest.mark.parametrize("what", ["text", "all"])
@pytest.mark.parametrize(
    "foreign",
    [(torch.ones(1, 77, 768), {"pooled_output": torch.ones(1, 768)}), (torch.ones(1, 190, 14), {})],
    ids=["77 tokens", "no pooled output"],
)
def test_the_text_of_another_model_cannot_be_dropped(drop, what, foreign):
    with pytest.raises(ValueError, match=r"encode an empty prompt with its CLIP"):
        drop([list(foreign)], what)


def test_the_style_of_an_unclip_model_can_be_dropped(pack, picture, drop):
    foreign = [[torch.ones(1, 77, 768), {"pooled_output": torch.ones(1, 768)}]]
    styled = pack.stock["unCLIPConditioning"]().apply_adm(foreign, picture, 1.0, 0.0)[0]
    ((tokens, values),) = drop(styled, "image")
    assert tokens is foreign[0][0]
    assert values == foreign[0][1]


def test_a_style_of_redux_cannot_be_dropped_and_says_what_to_use(pack, drop):
    style_model = SimpleNamespace(model=None, get_cond=lambda output: torch.ones(1, 3, 768))
    prompt = [[torch.ones(1, 77, 768), {"pooled_output": torch.ones(1, 768)}]]
    node = pack.nodes["EDiffI_StyleImage"]
    assert drop(node.execute(prompt, None, 0.0, style_model=style_model).args[0], "image")
    with pytest.raises(ValueError, match="Use the CONDITIONING that goes into eDiff-I Style Image"):
        drop(node.execute(prompt, None, 1.0, style_model=style_model).args[0], "image")


def test_a_style_in_a_window_keeps_it(pack, counting, positive, picture, drop, run):
    model, calls = counting
    styled = pack.nodes["EDiffI_StyleImage"].execute(positive, picture, 1.0, 10.0, 0.5).args[0]
    late = run(dual(model, styled, drop(styled, "text"), drop(styled, "all"), 4.0, 2.0))
    assert calls == [3] * STEPS, "At each noise level one entry of each conditioning is at work."
    assert not torch.equal(late, run(dual(model, positive, drop(positive, "text"), drop(positive, "all"), 4.0, 2.0)))


@pytest.mark.parametrize("style", ["regular", "nested"])
def test_thresholding_holds_for_guiders_of_their_own_formula(pack, model, styled, drop, run, style):
    from comfy_extras.nodes_custom_sampler import DualCFGGuider

    def sampled(model):
        branches = styled, drop(styled, "text"), drop(styled, "all")
        return run(DualCFGGuider.execute(model, *branches, 30.0, 20.0, style).args[0])

    assert sampled(model).abs().max() > 1.5
    thresholded = pack.nodes["EDiffI_DynamicThresholding"].execute(model, 0.9, 100.0).args[0]
    assert sampled(thresholded).abs().max() <= 1.0


@pytest.mark.parametrize(("calmed", "in_range"), [(0, False), (1, True)], ids=["high noise", "low noise"])
def test_thresholding_of_one_expert_is_that_experts_alone(pack, ensembles, positive, drop, run, calmed, in_range):
    """The last prediction is the picture, and the expert of low noise makes it."""
    intervals, expert = pack.core("intervals"), pack.bridge.load_expert(ensembles.single / "expert0.safetensors")
    experts = [expert, expert]
    experts[calmed] = pack.nodes["EDiffI_DynamicThresholding"].execute(expert, 0.9, 100.0).args[0]
    split = intervals.NoiseInterval(1.0, float("inf")), intervals.NoiseInterval(0.0, 1.0)
    made = run(plain(pack.bridge.route(list(zip(split, experts, strict=True))), positive, drop(positive, "all"), 30.0))
    assert (made.abs().max() <= 1.0) == in_range
