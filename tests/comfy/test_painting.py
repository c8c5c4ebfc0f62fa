"""Painted regions in every family of network: the formula, where it applies, and everything that must stay as it was."""

import math

import pytest
import torch

JOINT = ["flux", "sd3", "chroma", "qwen"]  # one attention over text and image
FLOWS = ["wan", *JOINT]
FAMILIES = ["sd15", "sd21_v", "sdxl", "sdxl_refiner", "ediff_i", *FLOWS]
CHECKED = ["sd15", "sdxl", "flux"]  # where regional packs were measured, and a joint attention
WEIGHT = 2.0


@pytest.fixture(scope="session")
def families(pack):
    import comfy.supported_models as supported
    import families as module

    sd3 = dict(
        patch_size=2, depth=1, num_blocks=2, input_size=None, adm_in_channels=10, num_patches=64, pos_embed_max_size=8,
        context_embedder_config={"target": "torch.nn.Linear", "params": {"in_features": 14, "out_features": 64}},
    )  # fmt: skip
    chroma = dict(
        in_channels=64, out_channels=64, context_in_dim=14, hidden_size=48, mlp_ratio=2.0, num_heads=2, depth=1,
        depth_single_blocks=1, axes_dim=[8, 8, 8], theta=10000, patch_size=2, qkv_bias=True, in_dim=64, out_dim=48,
        hidden_dim=32, n_layers=1, txt_ids_dims=[], vec_in_dim=None,
    )  # fmt: skip
    qwen = dict(
        in_channels=64, out_channels=16, num_layers=2, attention_head_dim=24, num_attention_heads=2,
        joint_attention_dim=14, axes_dims_rope=(8, 8, 8),
    )  # fmt: skip

    def build_sd3():
        built = module.supported_model(supported.SD3, sd3)()
        built.diffusion_model.pos_embed.normal_(generator=torch.Generator().manual_seed(0))  # a buffer of any content
        return built

    more = [
        module.Family("sd3", build_sd3, "final_layer.linear", (16, 8, 8), 14, 10),
        module.Family(
            "chroma", module.supported_model(supported.Chroma, chroma), "final_layer.linear", (16, 8, 8), 14, 10
        ),
        module.Family("qwen", module.supported_model(supported.QwenImage, qwen), "proj_out", (16, 1, 8, 8), 14, 10),
    ]
    return module.families(pack) | {family.name: family for family in more}


@pytest.fixture
def painting(pack):
    return pack.module("bridge_painting")


@pytest.fixture
def method(pack):
    return pack.core("paint_with_words")


@pytest.fixture
def obeying(painting, method):
    def obeying(model, weight=WEIGHT, **settings):
        return painting.obeying(model, method.PaintSettings(weight=weight, **settings))

    return obeying


@pytest.fixture
def paint(painting, method):
    """CONDITIONING with regions: (columns, mask (M, h, w), strength)."""

    def paint(conditioning, *regions, index=0):
        made = [method.Region(f"phrase {i}", mask, tuple(columns), strength) for i, (columns, mask, strength) in enumerate(regions)]  # fmt: skip
        return painting.painted_with(conditioning, made, index)

    return paint


def half(side="left", size=(32, 32)):
    mask = torch.zeros(1, *size)
    if side == "left":
        mask[..., : size[1] // 2] = 1
    else:
        mask[..., size[1] // 2 :] = 1
    return mask


REGIONS = (((1, 2), half(), 1.0), ((4,), half("right"), 0.7), ((2, 3), torch.full((1, 5, 5), 0.5), 1.0))


@pytest.fixture
def predict(pack):
    """One prediction of the network, as samplers ask for it: (conditional, unconditional); noise by the image's row."""
    import comfy.sample
    import comfy.samplers

    def predict(model, positive, negative, image, sigma=0.7, cfg=2.0, rows=None):
        seen = []

        def catch(args):
            seen.append((args["conds_out"][0].clone(), args["conds_out"][-1].clone()))
            return args["conds_out"]

        model = model.clone()
        model.set_model_sampler_pre_cfg_function(catch)
        rows = rows or range(len(image))
        noise = [torch.randn(image[:1].shape, generator=torch.Generator().manual_seed(row)) for row in rows]
        sampler, sigmas = comfy.samplers.sampler_object("euler"), torch.tensor([sigma, 0.0])
        with torch.inference_mode():
            settings = (model, torch.cat(noise), cfg, sampler, sigmas, positive, negative, image)
            comfy.sample.sample_custom(*settings, disable_pbar=True, seed=5)
        return seen[0]

    return predict


def scores_of(call):
    """(B, H, N, L) float64: Q K^T of a recorded call."""
    q, k, heads = call["q"].double(), call["k"].double(), call["heads"]
    if not call["skip_reshape"]:
        q, k = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k))
    return q @ k.transpose(-1, -2), q.shape[-1]


class Watching:
    """An override of attention that was there before ours: sees every call of the backend, and its mask."""

    def __init__(self):
        self.calls = []

    def __call__(self, function, q, k, v, heads, mask=None, **arguments):
        self.calls.append(dict(q=q, k=k, mask=mask, heads=heads, skip_reshape=arguments.get("skip_reshape", False)))
        return function(q, k, v, heads, mask=mask, **arguments)

    @property
    def biased(self):
        return [call for call in self.calls if call["mask"] is not None]


def watched(model):
    watching, clone = Watching(), model.clone()
    clone.model_options["transformer_options"]["optimized_attention_override"] = watching
    return clone, watching


def expected_map(latent, tokens, keys):
    """A, written down again: (image tokens, keys); every grid here divides the masks' 32 pixels."""
    frames = latent[1] if len(latent) == 4 else 1
    side = math.isqrt(tokens // frames)
    assert frames * side * side == tokens
    a = torch.zeros(tokens, keys, dtype=torch.float64)
    for columns, mask, strength in REGIONS:
        small = mask[0].double() if mask.shape[-1] == 32 else torch.full((32, 32), 0.5, dtype=torch.float64)
        small = small.view(side, 32 // side, side, 32 // side).mean((1, 3)).flatten().repeat(frames)
        for column in columns:
            a[:, column] += strength * small
    return a


@pytest.mark.parametrize("scale", ["max", "std"])
@pytest.mark.parametrize("name", FAMILIES)
def test_attention_is_the_formula_in_every_block(families, obeying, paint, predict, name, scale):
    """Probabilities against float64, written down again from the paper for each family's layout of tokens."""
    family = families[name]
    model, watching = watched(family.model(1))
    model = obeying(model, scale=scale)
    sigma = float(model.get_model_object("model_sampling").percent_to_sigma(0.3))
    predict(model, paint(family.conditioning(1), *REGIONS), family.conditioning(2), family.image(), sigma)
    noise = sigma / (1 - sigma) if name in FLOWS else sigma

    calls = watching.biased
    if name == "ediff_i":
        calls = calls[::2]  # its cross-attention always has a mask; the painted row goes first
    assert len(calls) == {"flux": 2, "chroma": 2, "sd3": 2, "qwen": 2, "ediff_i": 4}.get(name, 1)
    for call in calls:
        scores, width = scores_of(call)
        assert len(scores) == 1, "Only the painted row is biased."
        scores = scores[0]
        absent = call["mask"][0, :, :1] < -1e4  # (1, 1, keys)
        level = scores[..., : family.tokens].masked_fill(absent[..., : family.tokens], math.nan)
        level = level[~level.isnan()]
        level = level.max().clamp(min=0) if scale == "max" else level.std(correction=0)
        a = expected_map(family.latent, *scores.shape[-2:])
        expected = (scores + WEIGHT * math.log(1 + noise) * level * a) / math.sqrt(width)
        expected = expected.masked_fill(absent, -math.inf).softmax(-1)
        ours = (scores / math.sqrt(width) + call["mask"][0].double()).softmax(-1)
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)
        assert not torch.allclose(ours, (scores / math.sqrt(width)).masked_fill(absent, -math.inf).softmax(-1))


@pytest.mark.parametrize("name", FAMILIES)
def test_rows_without_regions_are_bit_identical(families, obeying, paint, predict, name):
    family, sigma = families[name], 0.7
    model, painted = family.model(1), paint(family.conditioning(1), *REGIONS)
    plain = predict(model, family.conditioning(1), family.conditioning(2), family.image(2), sigma)
    ours = predict(obeying(model), painted, family.conditioning(2), family.image(2), sigma)
    assert torch.equal(ours[1], plain[1])
    assert not torch.allclose(ours[0], plain[0], atol=1e-6)
    nothing = predict(obeying(model), family.conditioning(1), family.conditioning(2), family.image(2), sigma)
    assert all(torch.equal(a, b) for a, b in zip(nothing, plain, strict=True))


@pytest.mark.parametrize("name", CHECKED)
@pytest.mark.parametrize(
    "nothing",
    [
        dict(weight=0.0),
        dict(regions=[((1, 2), torch.zeros(1, 8, 8), 1.0)]),
        dict(regions=[((1, 2), half(), 0.0)]),
        dict(start_sigma=0.5),
        dict(end_sigma=3.0),
    ],
    ids=["weight 0", "empty mask", "strength 0", "window below", "window above"],
)
def test_nothing_painted_changes_nothing(families, obeying, paint, predict, nothing, name):
    family = families[name]
    nothing = dict(nothing)
    regions = nothing.pop("regions", REGIONS)
    plain = predict(family.model(1), family.conditioning(1), family.conditioning(2), family.image(), 0.7)
    model = obeying(family.model(1), **nothing)
    ours = predict(model, paint(family.conditioning(1), *regions), family.conditioning(2), family.image(), 0.7)
    assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_batch_is_its_members(families, obeying, paint, predict, name):
    """With a mask for each picture."""
    family = families[name]
    model, image = obeying(family.model(1)), family.image(2, seed=3)
    masks = [half(), half("right")]
    both = paint(family.conditioning(1), ((1, 2), torch.cat(masks), 1.0))
    batch = predict(model, both, family.conditioning(2), image)[0]
    for i, mask in enumerate(masks):
        one = paint(family.conditioning(1), ((1, 2), mask, 1.0))
        single = predict(model, one, family.conditioning(2), image[i : i + 1], rows=[i])[0]
        torch.testing.assert_close(batch[i : i + 1], single, rtol=1e-4, atol=1e-5)


def test_masks_of_another_number_than_the_images_are_refused(families, obeying, paint, predict):
    family = families["sd15"]
    positive = paint(family.conditioning(1), ((1, 2), torch.ones(3, 8, 8), 1.0))
    with pytest.raises(ValueError, match="mask of 'phrase 0' holds 3 pictures, but 2 are sampled"):
        predict(obeying(family.model(1)), positive, family.conditioning(2), family.image(2))


def test_a_model_that_does_not_look_is_named(families, paint, predict):
    family = families["sd15"]
    with pytest.raises(ValueError, match=r"painted regions \('phrase 0'.*Put eDiff-I Apply Paint With Words in front"):
        predict(family.model(1), paint(family.conditioning(1), *REGIONS), family.conditioning(2), family.image())


def test_a_network_that_cannot_be_reached_is_named(families, obeying):
    model = families["sd15"].model(1)
    model.model.diffusion_model = torch.nn.Linear(1, 1)
    with pytest.raises(ValueError, match=r"cannot reach the attention of this MODEL \(Linear\)"):
        obeying(model)


class Rows:
    """Counts the rows that the network sees."""

    def __init__(self, model):
        self.calls = []
        self.model = model.clone()
        self.model.set_model_unet_function_wrapper(self)

    def __call__(self, function, arguments):
        self.calls.append(len(arguments["input"]))
        return function(arguments["input"], arguments["timestep"], **arguments["c"])


@pytest.mark.parametrize("name", CHECKED)
@pytest.mark.parametrize("count", [1, 4, 16])
def test_the_network_sees_two_rows_however_many_regions(families, obeying, paint, predict, count, name):
    family = families[name]
    regions = [
        ((1 + i % 6,), torch.rand(1, 16, 16, generator=torch.Generator().manual_seed(i)), 1.0) for i in range(count)
    ]
    rows = Rows(obeying(family.model(1)))
    predict(rows.model, paint(family.conditioning(1), *regions), family.conditioning(2), family.image())
    assert rows.calls == [2]


def longer(conditioning, times):
    return [[torch.cat([tokens] * times, dim=1), dict(values)] for tokens, values in conditioning]


def finite(*predictions):
    return all(torch.isfinite(one).all() for one in predictions)


# What regional packs crash on, ignore or blacken (the 20 checks this pack is measured by, here and above)


@pytest.mark.parametrize("name", ["sd15", "sdxl", "flux"])
@pytest.mark.parametrize("size", [(8, 8), (16, 24), (17, 17), (20, 20), (9, 14)])
def test_any_size_of_picture_and_mask(families, obeying, paint, predict, name, size):
    family = families[name]
    image = torch.zeros(1, family.latent[0], *size)
    positive = paint(family.conditioning(1), ((1, 2), half(size=(37, 53)), 1.0), ((3,), half("right", (8, 8)), 1.0))
    plain = predict(family.model(1), family.conditioning(1), family.conditioning(2), image)
    ours = predict(obeying(family.model(1)), positive, family.conditioning(2), image)
    assert ours[0].shape == image.shape
    assert finite(*ours)
    assert not torch.allclose(ours[0], plain[0], atol=1e-6)
    assert torch.equal(ours[1], plain[1])


@pytest.mark.parametrize("name", FAMILIES)
def test_without_guidance(families, obeying, paint, predict, name):
    family = families[name]
    painted = paint(family.conditioning(1), *REGIONS)
    ours = predict(obeying(family.model(1)), painted, family.conditioning(2), family.image(), cfg=1.0)
    guided = predict(obeying(family.model(1)), painted, family.conditioning(2), family.image(), cfg=2.0)
    torch.testing.assert_close(ours[0], guided[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_rows_one_by_one_where_memory_is_short(families, obeying, paint, predict, name, monkeypatch):
    import comfy.model_base

    family = families[name]
    painted = paint(family.conditioning(1), *REGIONS)
    together = predict(obeying(family.model(1)), painted, family.conditioning(2), family.image())
    monkeypatch.setattr(comfy.model_base.BaseModel, "memory_required", lambda *_, **__: 1e18)
    apart = Rows(obeying(family.model(1)))
    ours = predict(apart.model, painted, family.conditioning(2), family.image())
    assert apart.calls == [1, 1]
    for one, other in zip(ours, together, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CHECKED)
def test_regions_that_cover_nothing_somewhere_leave_it_to_the_prompt(families, obeying, paint, predict, name):
    """No region paints the right half: the network predicts there, as it does elsewhere."""
    family = families[name]
    positive = paint(family.conditioning(1), ((1, 2), half(), 1.0))
    ours = predict(obeying(family.model(1)), positive, family.conditioning(2), family.image())[0]
    assert finite(ours)
    assert ours[..., 4:].abs().mean() > 0.1 * ours[..., :4].abs().mean()


@pytest.mark.parametrize(("prompt", "negative"), [(2, 1), (1, 2), (3, 1), (2, 3)])
def test_prompts_of_other_lengths(families, obeying, paint, predict, prompt, negative):
    """Repeating a prompt changes nothing; regions on its first part then meet a longer negative in one batch."""
    family = families["sd15"]
    painted = paint(longer(family.conditioning(1), prompt), *REGIONS)
    rows = Rows(obeying(family.model(1)))
    ours = predict(rows.model, painted, longer(family.conditioning(2), negative), family.image())
    assert rows.calls == [2]
    alone = predict(obeying(family.model(1)), painted, family.conditioning(2), family.image(), cfg=1.0)
    torch.testing.assert_close(ours[0], alone[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CHECKED)
def test_combined_prompts_keep_their_own_regions(families, obeying, paint, predict, name):
    family = families[name]
    first, second = paint(family.conditioning(1), *REGIONS), family.conditioning(3)
    model = obeying(family.model(1))
    parts = [predict(model, one, family.conditioning(2), family.image())[0] for one in (first, second)]
    together = predict(model, first + second, family.conditioning(2), family.image())[0]
    torch.testing.assert_close(together, (parts[0] + parts[1]) / 2, rtol=1e-4, atol=1e-5)
    index = paint(first + second, ((5,), half(), 1.0), index=1)
    assert not torch.allclose(predict(model, index, family.conditioning(2), family.image())[0], together, atol=1e-6)


@pytest.mark.parametrize("name", CHECKED)
def test_two_negatives_and_regions_on_the_negative(families, obeying, paint, predict, name):
    family = families[name]
    model, negative = obeying(family.model(1)), family.conditioning(2) + family.conditioning(4)
    plain = predict(family.model(1), family.conditioning(1), negative, family.image())
    ours = predict(model, paint(family.conditioning(1), *REGIONS), negative, family.image())
    assert torch.equal(ours[1], plain[1])
    painted = predict(model, family.conditioning(1), paint(negative, *REGIONS), family.image())
    assert torch.equal(painted[0], plain[0])
    assert not torch.allclose(painted[1], plain[1], atol=1e-6)


def test_an_area_takes_its_part_of_the_mask(families, obeying, paint, predict):
    """A prompt for the right half of the canvas alone, with a mask of the whole canvas."""
    family = families["sd15"]
    values = {"area": (8, 8, 0, 8), "strength": 1.0}
    conditioning = [[tokens, {**rest, **values}] for tokens, rest in family.conditioning(1)]
    image = torch.zeros(1, 4, 8, 16)
    mask = torch.zeros(1, 32, 64)
    mask[..., 32:48] = 1  # the left half of the area
    ours, watching = watched(family.model(1))
    predict(obeying(ours), paint(conditioning, ((1, 2), mask, 1.0)), family.conditioning(2), image)
    (call,) = watching.biased
    bias = call["mask"][0, 0, :, 1].view(8, 8)
    assert (bias[:, :4] > 0).all()
    assert (bias[:, 4:] == 0).all()


@pytest.mark.parametrize("name", CHECKED)
def test_a_masked_prompt_and_regions(families, obeying, paint, predict, name):
    family = families[name]
    masked = [
        [tokens, {**rest, "mask": half(size=(8, 8)), "mask_strength": 1.0}] for tokens, rest in family.conditioning(1)
    ]
    both = paint(masked, *REGIONS) + family.conditioning(3)
    assert finite(*predict(obeying(family.model(1)), both, family.conditioning(2), family.image()))


@pytest.mark.parametrize("name", CHECKED)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_of_half_precision(families, obeying, paint, predict, dtype, name):
    family = families[name]
    model = family.model(1)
    full = predict(obeying(model), paint(family.conditioning(1), *REGIONS), family.conditioning(2), family.image())
    model = family.model(1)
    model.model.diffusion_model.to(dtype)
    model.model.diffusion_model.dtype = dtype
    half = predict(obeying(model), paint(family.conditioning(1), *REGIONS), family.conditioning(2), family.image())
    assert finite(*half)
    torch.testing.assert_close(half[0], full[0], rtol=0.1, atol=0.2)


def test_weights_of_8_bits(families, obeying, paint, predict):
    """Stored in float8, cast for each layer, as ComfyUI runs them."""
    import comfy.supported_models as supported
    import families as module

    family = families["sd15"]
    full = family.model(1)
    config = supported.SD15({**supported.SD15.unet_config, **module.SD_UNET, "model_channels": 32, "context_dim": 14, "dtype": torch.float8_e4m3fn})  # fmt: skip
    config.set_inference_dtype(torch.float8_e4m3fn, torch.float32)
    small = config.get_model({})
    weights = {name: weight.to(torch.float8_e4m3fn) for name, weight in full.model.diffusion_model.state_dict().items()}
    small.diffusion_model.load_state_dict(weights, assign=True)
    assert {weight.dtype for weight in small.diffusion_model.parameters()} == {torch.float8_e4m3fn}
    small = module.patcher(small)
    painted, plain = paint(family.conditioning(1), *REGIONS), family.conditioning(1)
    ours = predict(obeying(small), painted, family.conditioning(2), family.image())
    unpainted = predict(small, plain, family.conditioning(2), family.image())
    assert finite(*ours)
    assert torch.equal(ours[1], unpainted[1])
    torch.testing.assert_close(ours[0], predict(obeying(full), painted, family.conditioning(2), family.image())[0], rtol=0.2, atol=0.3)  # fmt: skip


def attn2_of(model, patch):
    clone = model.clone()
    for block in (("middle", 0), ("middle", 1)):
        clone.set_model_attn2_replace(patch, *block)
    return clone


@pytest.mark.parametrize("order", ["before", "after"])
def test_attention_that_another_pack_replaced_is_painted_too(families, obeying, paint, predict, order):
    """As image-prompt adapters do it: the text's attention, and something of their own added."""
    import comfy.ldm.modules.attention as attention

    calls = []

    def adapter(q, k, v, extra_options):
        calls.append(len(q))
        return attention.optimized_attention(q, k, v, extra_options["n_heads"]) + 0.25 * q

    family = families["sd15"]
    painted = paint(family.conditioning(1), *REGIONS)
    if order == "before":
        model = obeying(attn2_of(family.model(1), adapter))
    else:
        model = attn2_of(obeying(family.model(1)), adapter)
    ours = predict(model, painted, family.conditioning(2), family.image())
    plain = predict(attn2_of(family.model(1), adapter), family.conditioning(1), family.conditioning(2), family.image())
    assert calls == [2, 2]
    assert torch.equal(ours[1], plain[1])
    assert not torch.allclose(ours[0], plain[0], atol=1e-6)

    without, watching = watched(family.model(1))
    predict(obeying(without), painted, family.conditioning(2), family.image())
    (call,) = watching.biased
    torch.testing.assert_close(call["mask"].shape, torch.Size([1, 1, 64, family.tokens]))


def test_a_patch_of_the_text_is_heard_and_extra_tokens_stay_unpainted(families, obeying, paint, predict):
    family = families["sd15"]

    def more_tokens(n, context, value, extra_options):
        return n, torch.cat([context, context[:, :3]], 1), torch.cat([value, value[:, :3]], 1)

    model, watching = watched(family.model(1))
    model.set_model_attn2_patch(more_tokens)
    predict(obeying(model), paint(family.conditioning(1), *REGIONS), family.conditioning(2), family.image())
    (call,) = watching.biased
    assert call["mask"].shape[-1] == family.tokens + 3
    assert (call["mask"][..., family.tokens :] == 0).all()
    assert call["mask"].abs().max() > 0


def test_it_works_through_an_ensemble_of_any_models(families, pack, obeying, paint):
    """Behind the ensemble for all experts at once, or on each of them: the same picture."""
    import families as module

    family = families["sd15"]
    experts = [family.model(seed) for seed in (1, 2)]
    edges = module.edges(experts[0], 2)
    painted, negative = paint(family.conditioning(1), *REGIONS), family.conditioning(2)
    behind = module.sample(obeying(module.routed(pack, experts, edges)), painted, negative, family.image(), cfg=3.0)
    before = module.sample(
        module.routed(pack, [obeying(e) for e in experts], edges), painted, negative, family.image(), cfg=3.0
    )
    plain = module.sample(
        module.routed(pack, experts, edges), family.conditioning(1), negative, family.image(), cfg=3.0
    )
    assert torch.equal(behind, before)
    assert not torch.allclose(behind, plain, atol=1e-4)


def test_our_own_networks_need_no_node(pack, model, positive, negative, paint, predict):
    image = torch.zeros(1, 3, 16, 16)
    painted = paint(positive, ((1, 2, 80), half(), 1.0))
    plain = predict(model, positive, negative, image, 1.0)
    ours = predict(model, painted, negative, image, 1.0)
    assert torch.equal(ours[1], plain[1])
    assert not torch.allclose(ours[0], plain[0], atol=1e-6)


def test_nothing_that_was_given_is_changed(families, obeying, paint, predict):
    family = families["sd15"]
    conditioning, model = family.conditioning(1), family.model(1)
    before = dict(conditioning[0][1])
    paint(conditioning, *REGIONS)
    obeying(model)
    assert conditioning[0][1] == before
    assert not any(model.wrappers.get(kind) for kind in model.wrappers)
    assert "ediffi_paint" not in model.model_options["transformer_options"]


@pytest.fixture
def record(pack, painting):
    maps = pack.core("attention_maps").AttentionMaps

    def record(model, columns, length, levels=3):
        made = maps(tuple(f"phrase {i}" for i in range(len(columns))))
        return painting.recording(model, made, [tuple(c) for c in columns], length, levels), made

    return record


@pytest.mark.parametrize("name", FAMILIES)
def test_attention_maps_are_the_attention(families, record, predict, name):
    """Against the probabilities of the calls that the backend saw; looking changes nothing."""
    family = families[name]
    model, watching = watched(family.model(1))
    looking, maps = record(model, [(1, 2), (4,)], family.tokens)
    ours = predict(looking, family.conditioning(1), family.conditioning(2), family.image())
    calls = list(watching.calls)
    plain = predict(family.model(1), family.conditioning(1), family.conditioning(2), family.image())
    assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))

    keys = family.tokens + 16
    expected = []
    for call in calls:
        scores, width = scores_of(call)
        joint = name in JOINT and scores.shape[-1] == keys
        cross = call["mask"] is not None if name == "ediff_i" else scores.shape[-1] == family.tokens
        if joint or cross:
            mask = 0 if call["mask"] is None else call["mask"].double()
            chances = (scores / math.sqrt(width) + mask).softmax(-1)
            image = chances[-1, :, family.tokens :] if joint else chances[-1]  # positive comes last in a batch
            expected.append(torch.stack([image[..., [1, 2]].sum(-1).mean(), image[..., [4]].sum(-1).mean()]))
    (sigma,) = maps.recorded
    assert sigma == pytest.approx(0.7)
    torch.testing.assert_close(
        maps.at(sigma).mean((1, 2)).double(), torch.stack(expected).mean(0), rtol=1e-3, atol=1e-5
    )


def test_attention_maps_see_what_painting_does(families, obeying, paint, record, predict):
    family = families["sd15"]
    painted = paint(family.conditioning(1), ((1, 2), half(), 1.0))
    seen = {}
    for weight in (0.0, WEIGHT):
        model, maps = record(obeying(family.model(1), weight), [(1, 2)], family.tokens)
        predict(model, painted, family.conditioning(2), family.image())
        seen[weight] = maps.at(maps.recorded[0])[0]
    assert seen[WEIGHT][:, :30].mean() > seen[0.0][:, :30].mean() + 0.05
    torch.testing.assert_close(seen[WEIGHT][:, 37:], seen[0.0][:, 37:], rtol=0, atol=1e-4)


def test_attention_maps_are_of_the_last_run_and_its_chosen_steps(families, record, pack):
    import families as module

    family = families["sd15"]
    model, maps = record(family.model(1), [(1,)], family.tokens, levels=3)
    for steps in (4, 9):
        module.sample(model, family.conditioning(1), family.conditioning(2), family.image(), steps=steps, cfg=3.0)
        assert len(maps.recorded) == 3
    picture = pack.core("attention_maps").draw(maps, torch.rand(32, 32, 3))
    assert picture.ndim == 3
    assert 0 <= picture.min() < picture.max() <= 1
