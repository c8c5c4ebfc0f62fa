"""Styles on every kind of MODEL: what they do, where, at no cost beside, and that no MODEL is silent about one."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from .conftest import random_conditioning
from .random_encoders import write_encoders
from .reference import core_conditioning

IMAGE = (1, 3, 16, 16)


@pytest.fixture(scope="module")
def families(pack):
    import comfy.supported_models as supported
    import families as module

    unclip = {**module.SD_UNET, "model_channels": 64, "context_dim": 14, "adm_in_channels": 2 * 768, "num_classes": "sequential"}  # fmt: skip
    build = module.supported_model(supported.SD21UnclipL, unclip)
    return module.families(pack) | {"unclip": module.Family("unclip", build, "out.2", (4, 8, 8), 14, 10)}


def output(seed, width=10, rows=1):
    """A CLIP_VISION_OUTPUT of random embeddings and states."""
    generator = torch.Generator().manual_seed(100 + seed)
    embeddings, states = torch.randn(rows, width, generator=generator), torch.randn(rows, 5, 6, generator=generator)
    return SimpleNamespace(image_embeds=embeddings, last_hidden_state=states)


@pytest.fixture
def style(pack):
    def style(conditioning, picture, strength=1.0, *window, **more):
        return pack.nodes["EDiffI_StyleImage"].execute(conditioning, picture, strength, *window, **more).args[0]

    return style


@pytest.fixture
def predict(pack):
    """One prediction, as samplers ask for it: (conditional, unconditional), and the rows of each call of the network."""
    import comfy.sample
    import comfy.samplers

    def predict(model, positive, negative, shape=IMAGE, sigma=0.7, cfg=2.0):
        seen, rows = [], []

        def catch(args):
            seen.append((args["conds_out"][0].clone(), args["conds_out"][-1].clone()))
            return args["conds_out"]

        def count(function, arguments):
            rows.append(len(arguments["input"]))
            return function(arguments["input"], arguments["timestep"], **arguments["c"])

        model = model.clone()
        model.set_model_sampler_pre_cfg_function(catch)
        model.set_model_unet_function_wrapper(count)
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        sampler, sigmas = comfy.samplers.sampler_object("euler"), torch.tensor([sigma, 0.0])
        with torch.inference_mode():
            settings = (model, noise, cfg, sampler, sigmas, positive, negative, torch.zeros(shape))
            comfy.sample.sample_custom(*settings, disable_pbar=True, seed=5)
        return SimpleNamespace(cond=seen[0][0], uncond=seen[0][1], rows=rows)

    return predict


@pytest.fixture
def run(pack):
    """A whole run of ComfyUI's KSampler: the image, and how often the network was called."""

    def run(model, positive, negative, shape=IMAGE, steps=6, cfg=3.0):
        calls = []

        def count(function, arguments):
            calls.append(len(arguments["input"]))
            return function(arguments["input"], arguments["timestep"], **arguments["c"])

        model = model.clone()
        model.set_model_unet_function_wrapper(count)
        latent = {"samples": torch.zeros(shape)}
        with torch.inference_mode():
            (result,) = pack.stock["KSampler"]().sample(
                model, 1, steps, cfg, "euler", "karras", positive, negative, latent
            )
        return result["samples"], calls

    return run


def close(a, b):
    return torch.allclose(a, b, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------ encoding


@pytest.fixture(scope="module")
def encoders(pack, tmp_path_factory):
    folder = write_encoders(tmp_path_factory.mktemp("encoders") / "small")
    return SimpleNamespace(folder=folder, clip_vision=pack.bridge.load_encoders(folder)[1])


@pytest.fixture
def encode(pack, encoders):
    def encode(image, fit="whole"):
        with torch.inference_mode():
            return pack.nodes["EDiffI_EncodeStyle"].execute(encoders.clip_vision, image, fit).args[0]

    return encode


def photo(height, width, batch=1, channels=3):
    return torch.rand(batch, height, width, channels, generator=torch.Generator().manual_seed(height + width))


@pytest.mark.parametrize("fit", ["whole", "crop"])
@pytest.mark.parametrize("side", [1, 16, 32, 100])
def test_a_square_picture_is_encoded_as_by_comfyui(pack, encoders, encode, fit, side):
    expected = pack.stock["CLIPVisionEncode"]().encode(encoders.clip_vision, photo(side, side), "none")[0]
    assert torch.equal(encode(photo(side, side), fit).image_embeds, expected.image_embeds)


@pytest.mark.parametrize("fit", ["whole", "crop"])
@pytest.mark.parametrize("size", [(40, 90), (90, 40), (8000, 3), (33, 32)])
def test_any_picture_is_encoded_as_without_comfyui(pack, encoders, encode, fit, size):
    pytest.importorskip("open_clip")
    core = pack.core("encoders").load_encoders(encoders.folder)
    reference = pack.core("style").square(photo(*size).movedim(-1, 1), core.image_size, fit)
    ours = encode(photo(*size), fit).image_embeds
    torch.testing.assert_close(ours.float(), core.encode_image(reference * 2 - 1), rtol=1e-3, atol=1e-3)


def test_the_fits_differ_where_a_picture_is_no_square(encode):
    assert not close(encode(photo(40, 90), "whole").image_embeds, encode(photo(40, 90), "crop").image_embeds)


def test_a_batch_is_one_style_their_mean(pack, encode, positive):
    pictures = photo(40, 90, batch=3)
    batch = encode(pictures)
    each = torch.cat([encode(one[None]).image_embeds for one in pictures])
    torch.testing.assert_close(batch.image_embeds, each, rtol=1e-4, atol=1e-5)
    embedding, strength = pack.module("bridge_style").style_of([{"clip_vision_output": batch, "strength": 0.5}], 10)
    torch.testing.assert_close(embedding, each.float().mean(0, keepdim=True), rtol=1e-4, atol=1e-5)
    assert strength == 0.5


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_pictures_in_gray_and_with_alpha(encode, channels):
    embedding = encode(photo(40, 90, channels=channels)).image_embeds
    assert embedding.isfinite().all()
    color = photo(40, 90, channels=channels)
    if channels == 1:
        assert torch.equal(embedding, encode(color.expand(-1, -1, -1, 3)).image_embeds)
    else:
        color[..., -1:] = 0
        gray = encode(torch.full((1, 32, 32, 3), 0.5)).image_embeds
        torch.testing.assert_close(encode(color).image_embeds, gray, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("image", "message"),
    [(torch.zeros(0, 8, 8, 3), "There is no reference"), (torch.full((1, 8, 8, 3), math.nan), "not numbers")],
)
def test_a_picture_that_is_none_is_named(encode, image, message):
    with pytest.raises(ValueError, match=message):
        encode(image)


# ------------------------------------------------------------------------------------------------ our ensembles


def test_strength_0_is_no_node_at_all(style, positive):
    assert style(positive, output(1), 0.0) is positive
    assert style(positive, output(1), 0.0, 5.0, 1.0, style_model=object()) is positive


@pytest.mark.parametrize("strength", [0.25, 1.0, 2.5])
def test_an_ensemble_takes_a_style_as_the_core_does(
    pack, ensembles, model, style, predict, positive, negative, strength
):
    ensemble = pack.core("checkpoint").load_ensemble(ensembles.different)
    config = ensemble.experts[0].network.config
    plain = core_conditioning(pack, positive, config)
    expected = replace(plain, image=output(1).image_embeds, image_strength=torch.tensor([strength]))
    ours = predict(model, style(positive, output(1), strength), negative)
    x = 0.7 * torch.randn(IMAGE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        denoised, unstyled = (ensemble(x, torch.tensor([0.7]), one) for one in (expected, plain))
    torch.testing.assert_close(ours.cond, denoised, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(ours.cond, unstyled, atol=1e-3)


def test_the_negative_has_no_style_and_the_network_no_more_calls(model, style, predict, run, positive, negative):
    plain, ours = predict(model, positive, negative), predict(model, style(positive, output(1)), negative)
    assert torch.equal(ours.uncond, plain.uncond)
    assert not torch.allclose(ours.cond, plain.cond, atol=1e-3)
    assert ours.rows == plain.rows == [2]
    (image, calls), (styled, styled_calls) = (
        run(model, positive, negative),
        run(model, style(positive, output(1)), negative),
    )
    assert calls == styled_calls == [2] * 6
    assert not torch.allclose(image, styled, atol=1e-3)


def test_styles_of_all_strengths_share_a_call(model, style, predict, positive, negative):
    prompts = [style(positive, output(1), 0.5), style(positive, output(2), 2.0), positive]
    together = predict(model, [entry for prompt in prompts for entry in prompt], negative)
    assert together.rows == [4]
    alone = [predict(model, prompt, negative).cond for prompt in prompts]
    torch.testing.assert_close(together.cond, sum(alone) / 3, rtol=1e-4, atol=1e-5)


def test_several_styles_are_their_average_and_as_strong_as_the_strongest(model, style, predict, positive, negative):
    a, b = output(1), output(2)
    chained = predict(model, style(style(positive, a, 1.5), b, 0.5), negative)
    mean = SimpleNamespace(image_embeds=0.75 * a.image_embeds + 0.25 * b.image_embeds)
    torch.testing.assert_close(
        chained.cond, predict(model, style(positive, mean, 1.5), negative).cond, rtol=1e-4, atol=1e-5
    )
    twice, once = style(style(positive, a, 0.7), a, 0.7), style(positive, a, 0.7)
    assert torch.equal(predict(model, twice, negative).cond, predict(model, once, negative).cond)


def test_comfyuis_own_node_means_the_same(pack, model, style, predict, positive, negative):
    def stock(conditioning, picture, strength):
        return pack.stock["unCLIPConditioning"]().apply_adm(conditioning, picture, strength, 0.0)[0]

    ours = predict(model, style(positive, output(1), 0.7), negative)
    assert torch.equal(predict(model, stock(positive, output(1), 0.7), negative).cond, ours.cond)
    chained = predict(model, style(style(positive, output(1), 0.7), output(2), 1.2), negative).cond
    mixed = (
        stock(style(positive, output(1), 0.7), output(2), 1.2),
        style(stock(positive, output(1), 0.7), output(2), 1.2),
    )
    for one in mixed:
        assert torch.equal(predict(model, one, negative).cond, chained)
    with pytest.raises(ValueError, match=r"strength of a style must be 0 or more, got -1"):
        predict(model, stock(positive, output(1), -1.0), negative)


def test_the_wrong_clip_vision_is_named(model, style, predict, positive, negative):
    with pytest.raises(
        ValueError, match=r"encoded to 768 numbers, this ensemble reads 10.*CLIP_VISION of eDiff-I Load Enc"
    ):
        predict(model, style(positive, output(1, width=768)), negative)
    nothing = SimpleNamespace(image_embeds=None)
    with pytest.raises(ValueError, match="encoded to 0 numbers"):
        predict(model, style(positive, nothing), negative)
    broken = SimpleNamespace(image_embeds=torch.full((1, 10), math.nan))
    with pytest.raises(ValueError, match="holds values that are not numbers"):
        predict(model, style(positive, broken), negative)


def test_nothing_that_was_given_is_changed(style, positive):
    tokens, values = positive[0]
    before, keys = tokens.clone(), dict(values)
    once = style(positive, output(1))
    kept = dict(once[0][1])
    style(once, output(2), 0.5, 3.0, 1.0)
    assert torch.equal(tokens, before)
    assert values == keys
    assert once[0][1] == kept
    assert len(once[0][1]["unclip_conditioning"]) == 1


def test_a_style_for_one_expert(pack, model, style, run, predict, positive, negative):
    styled = style(positive, output(1))
    plain, everywhere = run(model, positive, negative)[0], run(model, styled, negative)[0]
    for expert, sigma in enumerate((5.0, 1.0, 0.1)):
        told = {f"expert_{i + 1}": styled if i == expert else positive for i in range(3)}
        ours = pack.nodes["EDiffI_ExpertConditioning"].execute(told).args[0]
        image, calls = run(model, ours, negative)
        assert calls == [2] * 6
        assert not torch.allclose(image, plain, atol=1e-4)
        assert not torch.allclose(image, everywhere, atol=1e-4)
        for other in (5.0, 1.0, 0.1):
            expected = styled if other == sigma else positive
            assert torch.equal(predict(model, ours, negative, sigma=other).cond, predict(model, expected, negative, sigma=other).cond)  # fmt: skip


# ------------------------------------------------------------------------------------------------ windows


def test_a_window_is_exactly_off_outside_and_exactly_on_inside(model, style, predict, run, positive, negative):
    windowed, styled = style(positive, output(1), 1.0, 2.5, 0.5), style(positive, output(1))
    assert len(windowed) == 3
    below, above = (
        torch.nextafter(torch.tensor(edge), torch.tensor(to)).item() for edge, to in ((0.5, 0.0), (2.5, 9.0))
    )
    for sigma, expected in [(80.0, positive), (above, positive), (2.5, styled), (1.0, styled), (0.5, styled), (below, positive)]:  # fmt: skip
        ours, theirs = (predict(model, one, negative, sigma=sigma) for one in (windowed, expected))
        assert torch.equal(ours.cond, theirs.cond), sigma
        assert torch.equal(ours.uncond, theirs.uncond), sigma
        assert ours.rows == [2], sigma
    image, calls = run(model, windowed, negative)
    assert calls == [2] * 6
    assert not torch.allclose(image, run(model, positive, negative)[0], atol=1e-4)
    assert not torch.allclose(image, run(model, styled, negative)[0], atol=1e-4)


@pytest.mark.parametrize("edge", [0.1, 1 / 3, 0.7, 14.6146])
def test_no_sigma_belongs_to_two(model, style, predict, positive, negative, edge):
    """Numbers that float32 rounds: the sampler's sigma is the rounded one."""
    rounded = torch.tensor(edge)
    for sigma in (rounded, *(torch.nextafter(rounded, torch.tensor(to)) for to in (0.0, 90.0))):
        for window in ((100000.0, edge), (edge, 0.0), (edge, edge)):
            windowed = style(positive, output(1), 1.0, *window)
            assert predict(model, windowed, negative, sigma=sigma.item()).rows == [2]


def test_a_window_of_everything_splits_nothing(style, positive):
    assert len(style(positive, output(1), 1.0, 100000.0, 0.0)) == 1
    assert len(style(positive, output(1), 1.0, 100000.0, 0.5)) == 2
    assert len(style(positive, output(1), 1.0, 2.0, 0.0)) == 2


def test_windows_of_several_styles_overlap(model, style, predict, positive, negative):
    a, b = output(1), output(2)
    both = style(style(positive, a, 1.0, 3.0, 0.5), b, 1.0, 1.0, 0.1)
    expected = {
        9.0: positive, 2.0: style(positive, a), 0.8: style(style(positive, a), b), 0.3: style(positive, b), 0.05: positive,
    }  # fmt: skip
    for sigma, one in expected.items():
        ours = predict(model, both, negative, sigma=sigma)
        assert ours.rows == [2]
        assert torch.equal(ours.cond, predict(model, one, negative, sigma=sigma).cond)


def test_a_window_in_a_batch_with_a_mask_and_with_experts_of_their_own(pack, model, style, predict, positive, negative):
    mask = torch.zeros(1, 16, 16)
    mask[..., :8] = 1
    masked = [[tokens, values | {"mask": mask, "mask_strength": 1.0}] for tokens, values in positive]
    experts = pack.bridge.for_experts([positive, random_conditioning(pack, 3), positive])
    for prompt in (masked + random_conditioning(pack, 3), experts):
        windowed, styled = style(prompt, output(1), 1.0, 2.5, 0.5), style(prompt, output(1))
        for sigma, expected in ((9.0, prompt), (1.0, styled), (0.1, prompt)):
            ours, theirs = (predict(model, one, negative, (2, *IMAGE[1:]), sigma) for one in (windowed, expected))
            assert torch.equal(ours.cond, theirs.cond)
            assert torch.equal(ours.uncond, theirs.uncond)
            assert ours.rows == theirs.rows


def test_a_window_with_an_area(pack, model, style, predict, positive, negative):
    """ComfyUI gives the negative the area too, but in the range of its first entry alone; so only the prompt's side is exact."""
    area = [[tokens, values | {"area": (16, 8, 0, 8), "strength": 1.0}] for tokens, values in positive]
    windowed, styled = style(area, output(1), 1.0, 2.5, 0.5), style(area, output(1))
    for sigma, expected in ((9.0, area), (1.0, styled), (0.1, area)):
        ours, theirs = (predict(model, one, negative, sigma=sigma) for one in (windowed, expected))
        torch.testing.assert_close(ours.cond[..., 8:], theirs.cond[..., 8:], rtol=1e-4, atol=1e-5)


def test_a_range_in_percent_and_a_window_exclude_each_other(pack, style, positive):
    (ranged,) = pack.stock["ConditioningSetTimestepRange"]().set_range(positive, 0.2, 0.8)
    with pytest.raises(ValueError, match=r"a range in percent.*join both by Conditioning \(Combine\)"):
        style(ranged, output(1), 1.0, 5.0, 1.0)
    assert style(ranged, output(1))[0][1]["start_percent"] == 0.2


def test_what_that_message_advises_works(pack, model, style, predict, positive, negative):
    def ranged(conditioning, start, end):
        return pack.stock["ConditioningSetTimestepRange"]().set_range(conditioning, start, end)[0]

    advised = ranged(style(positive, output(1)), 0.3, 0.6) + ranged(positive, 0.0, 0.3) + ranged(positive, 0.6, 1.0)
    sigmas = [float(model.get_model_object("model_sampling").percent_to_sigma(p)) for p in (0.1, 0.45, 0.9)]
    for sigma, expected in zip(sigmas, (positive, style(positive, output(1)), positive), strict=True):
        assert torch.equal(predict(model, advised, negative, sigma=sigma).cond, predict(model, expected, negative, sigma=sigma).cond)  # fmt: skip


def test_a_window_upside_down_is_named(style, positive):
    with pytest.raises(ValueError, match="start_sigma 1 lies below end_sigma 5"):
        style(positive, output(1), 1.0, 1.0, 5.0)


# ------------------------------------------------------------------------------------------------ other MODELs


def styled_family(family, style, width=10, strength=1.0):
    return style(family.conditioning(1), output(1, width), strength)


@pytest.mark.parametrize("name", ["sd15", "sd21_v", "wan", "flux"])
def test_a_model_that_knows_no_styles_says_so(families, style, predict, name):
    family = families[name]
    with pytest.raises(
        ValueError, match=r"holds a style, but the MODEL does not look at it.*Take eDiff-I Style Image out"
    ):
        predict(family.model(1), styled_family(family, style), family.conditioning(2), (1, *family.latent))


def test_an_ensemble_of_such_models_says_so(pack, families, style, run):
    import families as module

    family = families["sd15"]
    experts = [family.model(seed) for seed in (1, 2)]
    model = module.routed(pack, experts, module.edges(experts[0], 2))
    with pytest.raises(ValueError, match="holds a style, but the MODEL does not look at it"):
        run(model, styled_family(family, style), family.conditioning(2), (1, *family.latent))


@pytest.fixture
def stock_unclip(pack):
    def stock_unclip(conditioning, picture, strength):
        return pack.stock["unCLIPConditioning"]().apply_adm(conditioning, picture, strength, 0.0)[0]

    return stock_unclip


@pytest.mark.parametrize("strength", [0.3, 1.0, 2.0])
def test_an_unclip_model_takes_it_as_comfyuis_own_node(families, style, stock_unclip, predict, strength):
    family = families["unclip"]
    shape, model, negative = (1, *family.latent), family.model(1), family.conditioning(2)
    expected = predict(model, stock_unclip(family.conditioning(1), output(1, 768), strength), negative, shape)
    ours = predict(model, styled_family(family, style, 768, strength), negative, shape)
    assert torch.equal(ours.cond, expected.cond)
    assert torch.equal(ours.uncond, expected.uncond)
    assert ours.rows == expected.rows == [2]
    assert not torch.equal(ours.cond, predict(model, family.conditioning(1), negative, shape).cond)

    both = style(styled_family(family, style, 768, strength), output(2, 768), 0.5)
    mixed = stock_unclip(styled_family(family, style, 768, strength), output(2, 768), 0.5)
    plain = stock_unclip(stock_unclip(family.conditioning(1), output(1, 768), strength), output(2, 768), 0.5)
    expected = predict(model, plain, negative, shape)
    for one in (both, mixed):
        ours = predict(model, one, negative, shape)
        assert torch.equal(ours.cond, expected.cond)
        assert ours.rows == [2]


def test_stable_cascade_takes_it_as_comfyuis_own_node(families, style, stock_unclip):
    import comfy.model_base

    prompt = families["sd15"].conditioning(1)
    ours, theirs = style(prompt, output(1, 768), 0.5), stock_unclip(prompt, output(1, 768), 0.5)
    asked = [
        comfy.model_base.StableCascade_C.extra_conds(None, cross_attn=one[0][0], **one[0][1]) for one in (ours, theirs)
    ]
    assert torch.equal(asked[0]["clip_img"].cond, asked[1]["clip_img"].cond)
    assert not ours[0][1]["model_conds"].copy()
    with pytest.raises(ValueError, match="the MODEL does not look at it"):
        ours[0][1]["model_conds"].copy()["image_strength"].process_cond(1)


def test_sdxl_takes_it_in_place_of_the_pooled_text(families, style, stock_unclip, predict):
    """ComfyUI's mechanism too, with embeddings of CLIP-G."""
    family = families["sdxl"]
    shape, model, negative = (1, *family.latent), family.model(1), family.conditioning(2)
    expected = predict(model, stock_unclip(family.conditioning(1), output(1, 1280), 1.0), negative, shape)
    ours = predict(model, styled_family(family, style, 1280), negative, shape)
    assert torch.equal(ours.cond, expected.cond)
    assert ours.rows == expected.rows


def test_a_style_that_one_model_has_read_is_still_refused_by_another(families, style, predict):
    unclip, other = families["unclip"], families["sd15"]
    first = styled_family(unclip, style, 768)
    second = style(first, output(2, 768), 0.5)
    negative, shape = unclip.conditioning(2), (1, 4, 8, 8)
    for _ in range(2):
        for one in (first, second, first):
            assert predict(unclip.model(1), one, negative, shape).rows == [2]
        for one in (first, second):
            with pytest.raises(ValueError, match="the MODEL does not look at it"):
                predict(other.model(1), one, negative, shape)


def test_comfyui_going_through_the_values_is_no_reading(families, style, predict):
    """As its tracker of models does after every node, and Z-Image for any prompt."""
    import comfy.model_patcher

    family = families["sd15"]
    styled = styled_family(family, style)
    comfy.model_patcher.PromptModelTracker().add([styled])
    assert styled[0][1]["unclip_conditioning"][0].get("clip_vision_output") is not None
    with pytest.raises(ValueError, match="the MODEL does not look at it"):
        predict(family.model(1), styled, family.conditioning(2), (1, *family.latent))


def test_values_that_were_copied_by_hand_cost_a_call_and_nothing_else(families, style, predict):
    family = families["unclip"]
    shape, model, negative = (1, *family.latent), family.model(1), family.conditioning(2)
    styled = styled_family(family, style, 768)
    by_hand = [[tokens, values | {"model_conds": dict(values["model_conds"].items())}] for tokens, values in styled]
    ours, expected = predict(model, by_hand, negative, shape), predict(model, styled, negative, shape)
    torch.testing.assert_close(ours.cond, expected.cond, rtol=1e-4, atol=1e-5)
    assert ours.rows == [1, 1]


def test_a_style_that_was_dropped_again_is_refused_by_no_model(pack, families, style, predict):
    family = families["sd15"]
    dropped = pack.bridge.dropped(styled_family(family, style), "image")
    ours = predict(family.model(1), dropped, family.conditioning(2), (1, *family.latent))
    assert torch.equal(ours.cond, predict(family.model(1), family.conditioning(1), family.conditioning(2), (1, *family.latent)).cond)  # fmt: skip


# ------------------------------------------------------------------------------------------------ Redux


@pytest.fixture(scope="module")
def redux(pack):
    import comfy.ldm.flux.redux
    import comfy.sd

    torch.manual_seed(0)
    encoder = comfy.ldm.flux.redux.ReduxImageEncoder(redux_dim=6, txt_in_features=14)
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return comfy.sd.StyleModel(encoder.requires_grad_(False))


@pytest.fixture
def stock_redux(pack, redux):
    def stock_redux(conditioning, picture, strength, kind="attn_bias"):
        return pack.stock["StyleModelApply"]().apply_stylemodel(conditioning, redux, picture, strength, kind)[0]

    return stock_redux


@pytest.fixture
def flux(families, predict):
    family = families["flux"]
    model, negative = family.model(1), family.conditioning(2)
    return lambda conditioning, **more: predict(model, conditioning, negative, (1, *family.latent), **more)


@pytest.mark.parametrize("rows", [1, 2])
def test_redux_at_strength_1_is_comfyuis_own_node(families, style, redux, stock_redux, flux, rows):
    prompt, picture = families["flux"].conditioning(1), output(1, rows=rows)
    ours, theirs = style(prompt, picture, style_model=redux), stock_redux(prompt, picture, 1.0, "multiply")
    assert torch.equal(ours[0][0], theirs[0][0])
    assert ours[0][0].shape[1] == prompt[0][0].shape[1] + 5 * rows
    assert "attention_mask" not in ours[0][1]
    assert torch.equal(flux(ours).cond, flux(theirs).cond)


@pytest.mark.parametrize("strengths", [(0.3,), (2.0,), (0.5, 1.0), (1.0, 0.5), (0.5, 2.5)])
def test_redux_of_a_strength_is_comfyuis_bias(families, style, redux, stock_redux, flux, strengths):
    ours = theirs = prompt = families["flux"].conditioning(1)
    for seed, strength in enumerate(strengths):
        ours = style(ours, output(seed), strength, style_model=redux)
        theirs = stock_redux(theirs, output(seed), strength)
    assert torch.equal(ours[0][1]["attention_mask"], theirs[0][1]["attention_mask"])
    ours, theirs, plain = flux(ours), flux(theirs), flux(prompt)
    assert torch.equal(ours.cond, theirs.cond)
    assert ours.rows == theirs.rows
    assert not torch.allclose(ours.cond, plain.cond, atol=1e-3)


def test_redux_behind_comfyuis_own_node(families, style, redux, stock_redux, flux):
    prompt = families["flux"].conditioning(1)
    mixed = style(stock_redux(prompt, output(1), 0.5), output(2), 1.0, style_model=redux)
    expected = stock_redux(stock_redux(prompt, output(1), 0.5), output(2), 1.0)
    assert torch.equal(flux(mixed).cond, flux(expected).cond)


def test_the_strength_of_redux_is_how_much_attention_it_gets(families, style, redux, flux):
    """Weights of attention in the first block, of all that is not Redux's own tokens."""
    family = families["flux"]
    prompt, first, new = family.conditioning(1), {}, slice(family.tokens, family.tokens + 5)
    others = [i for i in range(family.tokens + 5 + 16) if not new.start <= i < new.stop]

    def weights(strength):
        seen = []

        def watch(function, q, k, v, heads, mask=None, **arguments):
            scores = (q.double() @ k.double().transpose(-1, -2)) / math.sqrt(q.shape[-1])
            seen.append(
                (scores if mask is None else scores + mask.double()[:, None]).softmax(-1)[..., others, new].sum(-1)
            )
            return function(q, k, v, heads, mask=mask, **arguments)

        model = family.model(1)
        model.model_options["transformer_options"]["optimized_attention_override"] = watch
        styled = style(prompt, output(1), strength, style_model=redux)
        predicted(model, styled)
        return seen[0][-1]

    import comfy.sample
    import comfy.samplers

    def predicted(model, styled):
        noise = torch.randn(1, *family.latent, generator=torch.Generator().manual_seed(0))
        sampler, sigmas = comfy.samplers.sampler_object("euler"), torch.tensor([0.7, 0.0])
        settings = (model, noise, 1.0, sampler, sigmas, styled, family.conditioning(2), torch.zeros_like(noise))
        with torch.inference_mode():
            comfy.sample.sample_custom(*settings, disable_pbar=True, seed=5)

    one = weights(1.0)
    for strength in (0.25, 0.5, 2.0):
        first[strength] = weights(strength)
        torch.testing.assert_close(first[strength], strength * one / (1 - one + strength * one), rtol=1e-3, atol=1e-5)
    assert (first[0.25] < first[0.5]).all()
    assert (first[0.5] < one).all()
    assert (one < first[2.0]).all()


def test_redux_in_a_window(families, style, redux, flux):
    prompt = families["flux"].conditioning(1)
    styled, windowed = (style(prompt, output(1), 0.5, *window, style_model=redux) for window in ((), (0.8, 0.3)))
    for sigma, expected in ((0.95, prompt), (0.8, styled), (0.5, styled), (0.3, styled), (0.1, prompt)):
        assert torch.equal(flux(windowed, sigma=sigma).cond, flux(expected, sigma=sigma).cond), sigma


def test_a_model_without_masks_refuses_a_strength_of_tokens(families, style, redux, predict):
    family = families["sd15"]
    shape, negative = (1, *family.latent), family.conditioning(2)
    with pytest.raises(ValueError, match=r"strength 0.5, but the MODEL cannot weaken.*only Flux"):
        predict(family.model(1), style(family.conditioning(1), output(1), 0.5, style_model=redux), negative, shape)
    other = SimpleNamespace(model=torch.nn.Identity(), get_cond=lambda picture: torch.zeros(1, 3, 14))
    with pytest.raises(ValueError, match=r"strength 0.5, but the MODEL cannot weaken"):
        style(family.conditioning(1), output(1), 0.5, style_model=other)
    assert style(family.conditioning(1), output(1), 1.0, style_model=other)[0][0].shape[1] == family.tokens + 3


def test_a_style_model_that_does_not_fit_is_named(families, style, redux, positive):
    with pytest.raises(ValueError, match=r"cannot read this CLIP_VISION_OUTPUT.*sigclip_vision_patch14_384"):
        style(
            families["flux"].conditioning(1), SimpleNamespace(last_hidden_state=torch.zeros(1, 5, 7)), style_model=redux
        )
    with pytest.raises(ValueError, match="cannot read this CLIP_VISION_OUTPUT"):
        style(families["flux"].conditioning(1), SimpleNamespace(last_hidden_state=None), style_model=redux)
    wide = [[torch.zeros(1, 7, 20), {}]]
    with pytest.raises(ValueError, match="makes tokens of 14 numbers, those of the prompt have 20"):
        style(wide, output(1), style_model=redux)


def test_masks_that_other_nodes_left_are_kept(pack, families, style, redux):
    """A mask of the prompt's tokens, and a joint mask of yes and no."""
    prompt = families["flux"].conditioning(1)
    tokens, values = prompt[0]
    listed = [[tokens, values | {"attention_mask": torch.tensor([[1, 1, 1, 1, 0, 0, 0]])}]]
    assert style(listed, output(1), style_model=redux)[0][1]["attention_mask"].tolist() == [
        [1, 1, 1, 1, 0, 0, 0] + [1] * 5
    ]
    joint = torch.ones(1, 8, 8, dtype=torch.bool)
    joint[:, 7, 3] = False
    masked = [[tokens, values | {"attention_mask": joint, "attention_mask_img_shape": (1, 1)}]]
    mask = style(masked, output(1), 0.5, style_model=redux)[0][1]["attention_mask"][0]
    assert mask.shape == (13, 13)
    assert mask[12, 3] == -math.inf
    assert mask[12, 7:12].tolist() == pytest.approx([math.log(0.5)] * 5, abs=1e-3)
    assert not mask[7:12].any()
    assert mask.isinf().sum() == 1


# ------------------------------------------------------------------------------------------------ together


class Foreign:
    """Another pack's patch of attention: counts, and changes what passes."""

    def __init__(self):
        self.calls = 0

    def __call__(self, function, q, k, v, heads, **arguments):
        self.calls += 1
        return function(q, k, v, heads, **arguments) * 1.01


LEFT = torch.cat([torch.ones(1, 32, 16), torch.zeros(1, 32, 16)], dim=2)


def half(conditioning, pack):
    region = pack.core("paint_with_words").Region("phrase", LEFT, (1, 2))
    return pack.module("bridge_painting").painted_with(conditioning, [region], 0)


def overridden(model, patch):
    model.model_options["transformer_options"]["optimized_attention_override"] = patch
    return model


@pytest.mark.parametrize("order", ["style first", "paint first"])
def test_style_painting_and_a_foreign_patch_on_an_ensemble(pack, model, style, predict, positive, negative, order):
    def told(with_style, with_paint):
        steps = [lambda c: style(c, output(1), 0.7) if with_style else c, lambda c: half(c, pack) if with_paint else c]
        conditioning = positive
        for step in steps if order == "style first" else reversed(steps):
            conditioning = step(conditioning)
        return conditioning

    patch = Foreign()
    ours = predict(overridden(model.clone(), patch), told(True, True), negative)
    others = {
        "style": predict(overridden(model.clone(), Foreign()), told(False, True), negative),
        "painting": predict(overridden(model.clone(), Foreign()), told(True, False), negative),
        "patch": predict(model, told(True, True), negative),
    }
    for name, other in others.items():
        assert not torch.allclose(ours.cond, other.cond, atol=1e-5), name
        assert other.rows == ours.rows == [2]
    blocks = pack.core("unet").PRESETS["tiny"]
    attending = sum(2 * (n + n + 1) for n, there in zip(blocks.blocks, blocks.attention, strict=True) if there) + 2
    crossing = attending // 2
    assert patch.calls == attending + crossing  # of each call of cross-attention, the painted row goes a second time
    assert torch.equal(ours.uncond, others["style"].uncond)
    assert torch.equal(ours.uncond, others["painting"].uncond)


def test_style_painting_and_a_foreign_patch_on_flux(pack, families, style, redux, predict):
    family = families["flux"]
    words = pack.bridge.Words("a red fox", tuple((i, i + 1) for i in range(family.tokens)))
    prompt = [[tokens, values | {pack.bridge.WORDS: words}] for tokens, values in family.conditioning(1)]
    model = pack.module("bridge_painting").obeying(
        family.model(1), pack.core("paint_with_words").PaintSettings(weight=2.0)
    )
    shape, negative = (1, *family.latent), family.conditioning(2)

    def told(with_style, with_paint):
        conditioning = style(prompt, output(1), 0.5, style_model=redux) if with_style else prompt
        return pack.bridge.bind(conditioning, [("red", None, LEFT, 1.0)]) if with_paint else conditioning

    kept = told(True, False)[0][1][pack.bridge.WORDS]
    assert kept.spans == words.spans + ((0, 0),) * 5
    assert kept.text == "a red fox"
    patch = Foreign()
    ours = predict(overridden(model.clone(), patch), told(True, True), negative, shape)
    for name, other in {
        "style": predict(overridden(model.clone(), Foreign()), told(False, True), negative, shape),
        "painting": predict(overridden(model.clone(), Foreign()), told(True, False), negative, shape),
        "patch": predict(model, told(True, True), negative, shape),
    }.items():
        assert not torch.allclose(ours.cond, other.cond, atol=1e-5), name
    # the prompt: two blocks of which text and Redux, and the image, are asked apart; the negative: two blocks
    assert patch.calls == 4 + 2
    styled_after = style(told(False, True), output(1), 0.5, style_model=redux)
    after = predict(overridden(model.clone(), Foreign()), styled_after, negative, shape)
    assert torch.equal(after.cond, ours.cond)


# ------------------------------------------------------------------------------------------------ the demo family


def test_the_demo_familys_style_grows_with_its_strength(pack, predict):
    """One call of each expert: the farther from none, the stronger."""
    folder = pack.module("bridge_folders").DEMO / "ensembles" / "shapeworld-base"
    if not (folder / "ensemble.json").exists():
        pytest.skip("The demo family is not there.")
    model = pack.nodes["EDiffI_LoadEnsemble"].execute("shapeworld-base").args[0]
    clip, clip_vision = pack.nodes["EDiffI_LoadEncoders"].execute("shapeworld").args
    prompt, negative = (pack.bridge.encode_text(clip, text)[0] for text in ("a large red circle", ""))
    stripes = (torch.arange(64) // 4 % 2).float().view(1, 64, 1, 1).expand(1, 64, 96, 3)
    picture = pack.nodes["EDiffI_EncodeStyle"].execute(clip_vision, stripes, "whole").args[0]
    for sigma in (20.0, 1.0, 0.2):
        predictions = []
        for strength in (0.0, 0.25, 0.5, 1.0, 2.0):
            styled = pack.nodes["EDiffI_StyleImage"].execute(prompt, picture, strength).args[0]
            predictions.append(predict(model, styled, negative, (1, 3, 64, 64), sigma).cond)
        distances = [(one - predictions[0]).norm().item() for one in predictions]
        assert distances == sorted(set(distances)), (sigma, distances)
