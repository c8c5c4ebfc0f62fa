"""The cascade's nodes: a super-resolution stage as a whole, and its parts with any sampler; tiles; what is refused."""

from types import SimpleNamespace

import pytest
import torch

from .conftest import random_conditioning
from .reference import core_conditioning

WIDGETS = dict(
    seed=5, steps=3, cfg=1.0, sampler_name="heun", augmentation_sigma=0.0, tile=0, overlap=0, denoise=1.0,
    sigma_min=0.002, sigma_max=80.0, rho=7.0,
)  # fmt: skip


@pytest.fixture(scope="module")
def sr256(pack, ensembles):
    """A MODEL of two experts."""
    return pack.bridge.load_ensemble(ensembles.sr256)


@pytest.fixture(scope="module")
def sr1024(pack, ensembles):
    """A MODEL whose network is local: an output pixel looks at few pixels around it."""
    return pack.bridge.load_ensemble(ensembles.sr1024)


def picture(width=8, height=8, batch=1, seed=1):
    """An IMAGE in which nothing repeats."""
    return torch.rand(batch, height, width, 3, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def enlarge(pack, sr256):
    """eDiff-I Super Resolution's IMAGE."""

    def enlarge(image, model=sr256, **changed):
        return pack.nodes["EDiffI_SuperResolution"].execute(model=model, image=image, **WIDGETS | changed).args[0]

    return enlarge


@pytest.fixture
def parts(pack, positive, negative):
    """(positive, negative, LATENT) of eDiff-I Low-Res Image."""

    def parts(image, augmentation_sigma=0.0, seed=5, positive=positive, negative=negative):
        return pack.nodes["EDiffI_LowResImage"].execute(positive, negative, image, augmentation_sigma, seed).args

    return parts


@pytest.fixture
def stock(pack, sr256, parts):
    """A run of ComfyUI's own KSampler on the parts: (B, 3, H, W)."""

    def stock(image=None, model=sr256, conditioning=None, sampler="euler", steps=3, cfg=2.0, **given):
        positive, negative, latent = conditioning or parts(picture() if image is None else image, **given)
        return pack.stock["KSampler"]().sample(model, 5, steps, cfg, sampler, "karras", positive, negative, latent)[0][
            "samples"
        ]

    return stock


@pytest.fixture
def calls(pack, monkeypatch):
    """The shapes that the network is called with, in order."""
    import comfy.model_base

    shapes, apply = [], comfy.model_base.BaseModel.apply_model

    def counted(self, x, *args, **kwargs):
        shapes.append(tuple(x.shape))
        return apply(self, x, *args, **kwargs)

    monkeypatch.setattr(comfy.model_base.BaseModel, "apply_model", counted)
    return shapes


def region(pack, box=(0.0, 0.0, 0.5, 1.0), side=16, strength=1.0, columns=(1, 2, 78)):
    """A painted phrase in a part of the picture: top, left, bottom, right."""
    mask = torch.zeros(1, side, side)
    top, left, bottom, right = (round(edge * side) for edge in box)
    mask[:, top:bottom, left:right] = 1
    return pack.core("paint_with_words").Region("fox", mask, columns, strength)


def painted(pack, conditioning, *regions):
    return pack.module("bridge_painting").painted_with(conditioning, regions, 0)


def styled(pack, conditioning, strength=1.0):
    embeds = torch.randn(1, 10, generator=torch.Generator().manual_seed(2))
    output = SimpleNamespace(image_embeds=embeds)
    return pack.nodes["EDiffI_StyleImage"].execute(conditioning, output, strength).args[0]


def lora(model, name="down.1.cross_attention.q", strength=0.5):
    """A MODEL with a LoRA on one layer, loaded as ComfyUI does."""
    import comfy.sd

    width = model.model.diffusion_model.get_parameter(f"{name}.weight").shape[0]
    generator = torch.Generator().manual_seed(3)
    weights = {
        f"diffusion_model.{name}.lora_up.weight": torch.randn(width, 4, generator=generator),
        f"diffusion_model.{name}.lora_down.weight": torch.randn(4, width, generator=generator),
    }
    return comfy.sd.load_lora_for_models(model, None, weights, strength, 0)[0]


# ------------------------------------------------------------------------------------------------ the result


@pytest.mark.parametrize(("width", "height", "batch"), [(64, 64, 1), (64, 96, 1), (66, 62, 1), (9, 5, 3), (1, 1, 2)])
def test_an_image_grows_four_times(sr1024, enlarge, width, height, batch):
    enlarged = enlarge(picture(width, height, batch), sr1024, steps=1, augmentation_sigma=0.1)
    assert enlarged.shape == (batch, 4 * height, 4 * width, 3)
    assert enlarged.isfinite().all()
    assert enlarged.min() >= 0
    assert enlarged.max() <= 1


def test_it_is_the_parts_and_a_sampler(pack, sr256, enlarge, parts, positive, negative):
    """Bit for bit: Low-Res Image, eDiff-I KSampler, VAE Decode."""
    image = picture(9, 7, 2)
    given = parts(image, 0.2)
    churn = dict(s_churn=0.0, s_tmin=0.05, s_tmax=50.0, s_noise=1.003)
    shared = dict(seed=5, steps=3, cfg=3.0, sampler_name="heun", denoise=1.0, sigma_min=0.01, sigma_max=70.0, rho=5.0)
    latent = pack.nodes["EDiffI_KSampler"].execute(
        model=sr256, scheduler="edm", positive=given[0], negative=given[1], latent_image=given[2], **shared, **churn
    )
    (expected,) = pack.stock["VAEDecode"]().decode(pack.bridge.pixel_vae(), latent.args[0])
    enlarged = enlarge(image, positive=positive, negative=negative, augmentation_sigma=0.2, **shared)
    assert torch.equal(enlarged, expected)


@pytest.mark.parametrize("case", ["plain", "guided", "augmented", "denoise", "tiles"])
def test_it_is_the_cores_upscale(pack, ensembles, enlarge, positive, case):
    core, pipeline = pack.core("checkpoint").load_ensemble(ensembles.sr256), pack.core("pipeline")
    config, image = core.experts[0].network.config, picture(12, 10, 2)
    ours = dict(
        guided=dict(cfg=3.0), augmented=dict(augmentation_sigma=0.3), denoise=dict(denoise=0.4),
        tiles=dict(tile=32, overlap=12, cfg=2.0),
    ).get(case, {})  # fmt: skip
    theirs = {key: value for key, value in ours.items() if key != "cfg"}
    if case == "tiles":
        theirs["multiple"] = config.multiple
    rows = pack.core("conditioning").joined([core_conditioning(pack, positive, config)] * 2)
    # from low noise, which float32 holds more exactly than the core's float64 needs at high noise
    settings = pipeline.Settings(steps=3, guidance_scale=ours.get("cfg", 1.0), sigma_max=2.0)
    images = image.movedim(-1, 1) * 2 - 1
    *_, last = pipeline.upscale(images, rows, core, 5, settings, **theirs)
    expected = last.images().movedim(1, -1)
    enlarged = enlarge(image, positive=positive, sigma_max=2.0, **ours)
    torch.testing.assert_close(enlarged, expected, rtol=0, atol=1e-5)


def test_an_image_is_the_same_in_any_batch(enlarge):
    images = picture(8, 8, 3)
    batch = enlarge(images, augmentation_sigma=0.3, sampler_name="euler_ancestral")
    for i in range(3):
        alone = enlarge(images[i : i + 1], augmentation_sigma=0.3, sampler_name="euler_ancestral", seed=5 + i)
        torch.testing.assert_close(batch[i : i + 1], alone, rtol=0, atol=1e-5)


def test_the_same_seed_gives_the_same_image(enlarge):
    first, again, other = (enlarge(picture(), augmentation_sigma=0.3, seed=seed) for seed in (5, 5, 6))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other, atol=1e-2)


def test_without_augmentation_its_seed_means_nothing(stock):
    assert torch.equal(stock(seed=1), stock(seed=2))
    assert not torch.allclose(stock(augmentation_sigma=0.3, seed=1), stock(augmentation_sigma=0.3, seed=2), atol=1e-3)


def test_the_network_is_told_how_much_noise_was_added(sr256, parts):
    """Not only shown: the same noised image and another number is another result."""
    x = torch.zeros(1, 3, 32, 32)
    positive, _, _ = parts(picture(), 0.5)
    tokens, values = positive[0]
    entries = sr256.model.extra_conds(cross_attn=tokens, noise=x, device="cpu", **values)
    told = {name: entry.process_cond(1, area=None).cond for name, entry in entries.items()}
    assert told["augmentation_sigma"].tolist() == [0.5]
    one = sr256.model.apply_model(x, torch.ones(1), **told)
    two = sr256.model.apply_model(x, torch.ones(1), **told | {"augmentation_sigma": torch.tensor([0.1])})
    assert not torch.allclose(one, two, atol=1e-4)


def test_no_prompt_is_an_empty_prompt(enlarge, negative, calls):
    without = enlarge(picture(), cfg=4.0)
    assert all(shape[0] == 1 for shape in calls), "Guidance from nothing to nothing costs a second row."
    two_rows = enlarge(picture(), positive=negative, negative=negative, cfg=4.0)
    torch.testing.assert_close(without, two_rows, rtol=0, atol=1e-4)


def test_the_prompt_guides(enlarge, positive, negative):
    plain, guided = (enlarge(picture(), positive=positive, cfg=cfg) for cfg in (1.0, 6.0))
    assert not torch.allclose(plain, guided, atol=1e-2)
    torch.testing.assert_close(guided, enlarge(picture(), positive=positive, negative=negative, cfg=6.0))
    assert not torch.allclose(plain, enlarge(picture()), atol=1e-3)


def test_denoise_keeps_the_image(pack, enlarge):
    image = picture(8, 8)
    low_res = pack.core("super_resolution").upsampled(image.movedim(-1, 1) * 2 - 1, (32, 32))
    plain = ((low_res + 1) / 2).clamp(0, 1).movedim(1, -1)
    torch.testing.assert_close(enlarge(image, denoise=0.0), plain)
    far = [(enlarge(image, denoise=share, steps=4) - plain).abs().mean() for share in (0.1, 0.5, 1.0)]
    assert far[0] < far[1] < far[2]


def test_its_defaults_are_the_cores(pack):
    inputs = {one.id: one for one in pack.nodes["EDiffI_SuperResolution"].GET_SCHEMA().inputs}
    settings, pipeline = pack.core("pipeline").SR_DEFAULTS, pack.core("pipeline")
    expected = (settings.steps, settings.guidance_scale, settings.sampler, pipeline.OVERLAP)
    assert tuple(inputs[name].default for name in ("steps", "cfg", "sampler_name", "overlap")) == expected
    assert (inputs["sigma_min"].default, inputs["sigma_max"].default) == (settings.sigma_min, settings.sigma_max)
    assert inputs["rho"].default == settings.rho


# ------------------------------------------------------------------------------------------------ with other nodes


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "dpmpp_2m_sde", "uni_pc"])
def test_comfyuis_ksampler_runs_the_parts(stock, sampler):
    sampled = stock(picture(9, 7), sampler=sampler, steps=5, augmentation_sigma=0.1)
    assert sampled.shape == (1, 3, 28, 36)
    assert sampled.isfinite().all()


def test_each_expert_works_at_its_noise_levels(pack, ensembles, sr256, stock):
    """Two experts, routed, are the two networks called one after the other."""
    experts = pack.core("checkpoint").read_ensemble(ensembles.sr256)
    alone = [stock(model=pack.bridge.load_expert(path), steps=6) for path in experts.paths]
    routed = stock(steps=6)
    assert all(not torch.allclose(routed, one, atol=1e-3) for one in alone)
    joined = pack.nodes["EDiffI_ExpertEnsemble"].execute(
        "sigma",
        {
            "experts": "2", "boundary_1": 0.3, "cfg_1": -1.0, "cfg_2": -1.0,
            **{f"expert_{i}": pack.bridge.load_expert(path) for i, path in enumerate(experts.paths, 1)},
        },
    ).args[0]  # fmt: skip
    assert torch.equal(stock(model=joined, steps=6), routed)


def test_one_image_serves_a_batch(stock, parts):
    """With augmentation, too, row i has the noise of seed + i."""
    positive, negative, _ = parts(picture(), 0.3)
    rows = stock(conditioning=(positive, negative, {"samples": torch.zeros(2, 3, 32, 32)}), cfg=1.0)
    assert not torch.allclose(rows[0], rows[1], atol=1e-3)
    torch.testing.assert_close(rows[:1], stock(augmentation_sigma=0.3, cfg=1.0), rtol=0, atol=1e-4)


def test_another_number_of_images_is_refused(stock, parts):
    positive, negative, _ = parts(picture(batch=3))
    with pytest.raises(ValueError, match=r"holds 3 low-res images, but 2 are sampled.*sample the LATENT that it gives"):
        stock(conditioning=(positive, negative, {"samples": torch.zeros(2, 3, 32, 32)}))


def test_a_lora_reaches_both_experts(sr256, enlarge, positive):
    image, patched = picture(), lora(sr256)
    for levels in (dict(sigma_min=1.0), dict(sigma_max=0.2)):  # of the one expert, and of the other
        plain, changed = (enlarge(image, one, positive=positive, **levels) for one in (sr256, patched))
        assert not torch.allclose(changed, plain, atol=1e-4)


def test_a_style_counts(pack, enlarge, positive):
    plain = enlarge(picture(), positive=positive)
    assert torch.equal(enlarge(picture(), positive=styled(pack, positive, 0.0)), plain)
    assert not torch.allclose(enlarge(picture(), positive=styled(pack, positive)), plain, atol=1e-3)


def test_parts_of_the_picture_have_prompts_of_their_own(pack, stock, parts, positive, negative):
    """Areas and masks see their part of the low-res image."""
    (left,) = pack.stock["ConditioningSetArea"]().append(positive, 128, 256, 0, 0, 1.0)  # in eighths of pixels here
    mask = torch.zeros(1, 8, 8)
    mask[..., 4:] = 1
    (right,) = pack.stock["ConditioningSetMask"]().append(random_conditioning(pack, 2), mask, "default", 1.0)
    (both,) = pack.stock["ConditioningCombine"]().combine(left, right)
    sampled = stock(conditioning=parts(picture(), 0.2, positive=both))
    assert sampled.isfinite().all()
    assert not torch.allclose(sampled, stock(augmentation_sigma=0.2), atol=1e-3)


def test_ranges_of_time_work(pack, stock, parts, positive):
    (early,) = pack.stock["ConditioningSetTimestepRange"]().set_range(positive, 0.0, 0.5)
    (late,) = pack.stock["ConditioningSetTimestepRange"]().set_range(random_conditioning(pack, 2), 0.5, 1.0)
    (both,) = pack.stock["ConditioningCombine"]().combine(early, late)
    assert not torch.allclose(stock(conditioning=parts(picture(), positive=both)), stock(), atol=1e-3)


def test_zeroing_behind_keeps_the_image(pack, stock, parts, positive):
    (zeroed,) = pack.stock["ConditioningZeroOut"]().zero_out(positive)
    conditioning, _, latent = parts(picture())
    (behind,) = pack.stock["ConditioningZeroOut"]().zero_out(conditioning)
    before = parts(picture(), negative=zeroed)
    assert torch.equal(stock(conditioning=(conditioning, behind, latent)), stock(conditioning=before))


def test_inputs_are_never_changed(pack, sr256, enlarge, parts, positive, negative):
    image = picture(batch=2)
    before, tokens, keys = image.clone(), positive[0][0].clone(), set(positive[0][1])
    options = repr(sr256.model_options)
    enlarge(image, positive=positive, negative=negative, cfg=2.0, augmentation_sigma=0.2, tile=16, overlap=4)
    parts(image)
    assert torch.equal(image, before)
    assert torch.equal(positive[0][0], tokens)
    assert set(positive[0][1]) == keys
    assert repr(sr256.model_options) == options


def test_a_stage_leaves_the_device_for_the_next(pack, ensembles, enlarge, positive, negative, second_device):
    """With room for little more than one network, each stage is on the device while it works."""
    stages = [pack.bridge.load_ensemble(folder) for folder in (ensembles.different, ensembles.sr256, ensembles.sr1024)]
    networks = []
    for stage in stages:
        networks += getattr(pack.bridge.routing_of(stage), "experts", [stage])
        for patcher in (stage, *networks):
            patcher.load_device = torch.device("cpu", 0)
    base, sr256, sr1024 = stages

    def loaded():
        return sum(patcher.loaded_size() for patcher in networks)

    second_device[0] = room = 1.2 * max(base.model_size(), sr256.model_size())
    latent = {"samples": torch.zeros(1, 3, 8, 8)}
    pack.stock["KSampler"]().sample(base, 5, 3, 2.0, "euler", "karras", positive, negative, latent)
    assert 0 < loaded() <= room
    image = enlarge(picture(), sr256, tile=16, overlap=4)
    assert base.loaded_size() == 0
    assert loaded() <= room
    second_device[0] = room = 1.2 * sr1024.model_size()
    enlarge(image, sr1024, steps=1, tile=64, overlap=16)
    assert sr1024.loaded_size() > 0
    assert loaded() <= room


# ------------------------------------------------------------------------------------------------ tiles


def test_an_image_that_fits_in_a_tile_is_not_divided(enlarge):
    assert torch.equal(enlarge(picture(), tile=32, overlap=8), enlarge(picture()))


def test_tiles_of_a_local_network_are_the_whole(sr1024, enlarge, positive):
    reach = sr1024.model.diffusion_model.config.receptive_field()
    image = picture(44, 40)
    choices = dict(model=sr1024, positive=positive, cfg=2.0, steps=1, sigma_max=2.0)
    whole = enlarge(image, **choices)
    tiled = enlarge(image, **choices, tile=128, overlap=4 * reach)
    torch.testing.assert_close(tiled, whole, rtol=0, atol=1e-5)
    assert not torch.allclose(enlarge(image, **choices, tile=64, overlap=0), whole, atol=1e-4)


def test_each_call_is_made_for_each_tile(enlarge, calls):
    enlarge(picture(16, 12), tile=32, overlap=8, steps=2, sampler_name="euler")
    assert calls == [(1, 3, 32, 32)] * 2 * 6  # 64 pixels of width in three tiles, 48 of height in two


def test_tiles_work_with_every_expert_and_with_guidance(enlarge, calls, positive):
    tiled = enlarge(
        picture(16, 12, 2), tile=32, overlap=8, steps=4, sampler_name="dpmpp_2m", cfg=3.0, positive=positive
    )
    assert tiled.isfinite().all()
    assert {shape[2:] for shape in calls} == {(32, 32)}


def test_regions_are_cut_to_each_tile(pack, sr1024, enlarge, positive, monkeypatch):
    """Where the strength does not depend on the maximum over a call, tiles are the whole with regions and a style, too."""
    painting = pack.module("bridge_painting")
    monkeypatch.setitem(painting.bias.__globals__, "level", lambda q, *_: torch.full((len(q),), 3.0))
    reach = sr1024.model.diffusion_model.config.receptive_field()
    told = styled(pack, painted(pack, positive, region(pack), region(pack, (0.25, 0.5, 1, 1), 10, 2.0, (3, 80))))
    choices = dict(model=sr1024, cfg=2.0, steps=1, sigma_max=2.0)
    image = picture(45, 41)
    whole = enlarge(image, **choices, positive=told)
    tiled = enlarge(image, **choices, positive=told, tile=128, overlap=4 * reach)
    torch.testing.assert_close(tiled, whole, rtol=0, atol=1e-5)
    assert not torch.allclose(whole, enlarge(image, **choices, positive=styled(pack, positive)), atol=1e-3)


@pytest.mark.parametrize(("width", "height"), [(8, 8), (9, 7)])
def test_regions_act_where_they_are_painted(pack, sr1024, enlarge, positive, width, height):
    """On a local network, and on sizes that it pads: nothing changes far from the paint."""
    told = painted(pack, positive, region(pack, (0, 0, 0.5, 1)))
    image, reach = picture(4 * width, 4 * height), sr1024.model.diffusion_model.config.receptive_field()
    plain, changed = (
        enlarge(image, sr1024, positive=one, steps=1, sigma_max=5.0, sigma_min=5.0) for one in (positive, told)
    )
    difference = (plain - changed).abs().amax((0, 2, 3))  # of each row
    assert difference[: 8 * height].max() > 1e-4
    assert difference[8 * height + reach + 2 :].max() < 1e-5


def test_the_masks_of_tiles_are_parts_of_the_whole_ones(pack):
    """Where the network pads image and tiles to cells of 8 pixels: 36 x 28 pixels, and in it the tile that begins at (16, 8)."""
    painting, network = pack.module("bridge_painting"), SimpleNamespace(config=SimpleNamespace(multiple=8))
    regions = pack.core("paint_with_words").Regions((region(pack, (0.1, 0.2, 0.7, 0.9), 30),))
    chunk = painting.Painted(regions, 190)

    def masks(chunk, latent, grid):
        family = painting.OwnFamily(network, SimpleNamespace(latent=latent, length=190))
        return family.masks(chunk, painting.Place(grid, 1, slice(0), slice(0)), "cpu")[0, :, 0].view(grid)

    for cells in (1, 2):  # a side of 8 pixels
        whole = masks(chunk, (36, 28), (5 * cells, 4 * cells))
        tile = masks(chunk.in_tile((16, 8), (36, 28)), (20, 16), (3 * cells, 2 * cells))
        assert torch.equal(tile, whole[2 * cells :, cells : 3 * cells])


def test_an_overlap_beyond_the_tile_is_refused(enlarge):
    with pytest.raises(ValueError, match=r"Tiles of 16 pixels cannot overlap by 64. Choose an overlap"):
        enlarge(picture(), tile=16, overlap=64)


def test_attention_maps_of_tiles_are_refused(pack, sr256, enlarge, positive):
    told = painted(pack, positive, region(pack))
    Words = pack.bridge.Words
    remembered = [[told[0][0], told[0][1] | {pack.bridge.WORDS: Words("a fox", ((0, 0),) * 190)}]]
    noting, _ = pack.bridge.attention_maps(sr256, remembered, "", 2)
    enlarge(picture(), noting, positive=told)
    with pytest.raises(
        ValueError, match=r"Attention Maps cannot look at an image that is made in tiles. Set tile to 0"
    ):
        enlarge(picture(), noting, positive=told, tile=16, overlap=4)


def test_memory_is_asked_for_one_tile(sr256, enlarge, monkeypatch):
    """For every expert, and also where an expert is loaded ahead."""
    import comfy.sampler_helpers

    asked, estimate = [], comfy.sampler_helpers.estimate_memory

    def noted(*args):
        asked.append(estimate(*args)[0])
        return estimate(*args)

    monkeypatch.setattr(comfy.sampler_helpers, "estimate_memory", noted)
    enlarge(picture(24, 16), tile=32, overlap=8, steps=4)
    assert len(asked) > 2
    assert set(asked) == {sr256.model.memory_required([2, 3, 32, 32])}


def test_what_a_run_needs_is_said_before_it(enlarge, caplog):
    caplog.set_level("INFO", "ediffi")
    enlarge(picture(8, 8))
    enlarge(picture(24, 16), tile=32, overlap=8)
    whole, tiled = (record.message for record in caplog.records if "Super Resolution" in record.message)
    assert "8x8 to 32x32 as a whole: about 0.0" in whole
    assert "24x16 to 96x64 in tiles of 32x32: about 0.0" in tiled


def test_progress_goes_over_steps_and_tiles(enlarge, monkeypatch):
    import comfy.utils

    seen = []
    monkeypatch.setattr(
        comfy.utils.ProgressBar,
        "update_absolute",
        lambda self, value, total=None, preview=None: seen.append((value, total)),
    )
    enlarge(picture(16, 12), tile=32, overlap=8, steps=3)
    values = [value for value, _ in seen]
    assert values == sorted(values)
    assert values[-1] == 3
    assert {total for _, total in seen} == {3}
    assert len({value for value in values if 0 < value < 1}) == 5, "Five of six tiles are parts of the first step."


def test_a_run_can_be_stopped_between_tiles(enlarge, calls, monkeypatch):
    import comfy.model_management as management

    stop = management.throw_exception_if_processing_interrupted

    def after_four():
        if len(calls) == 4:
            management.interrupt_current_processing(True)
        stop()

    monkeypatch.setattr(management, "throw_exception_if_processing_interrupted", after_four)
    with pytest.raises(management.InterruptProcessingException):
        enlarge(picture(16, 12), tile=32, overlap=8)
    assert len(calls) == 4
    monkeypatch.undo()
    assert enlarge(picture()).isfinite().all()


# ------------------------------------------------------------------------------------------------ what is refused


def test_transparency_is_left_out_and_gray_is_colour(enlarge):
    image = picture()
    with_alpha = torch.cat([image, torch.rand(1, 8, 8, 1)], dim=-1)
    assert torch.equal(enlarge(with_alpha), enlarge(image))
    gray = image[..., :1]
    assert torch.equal(enlarge(gray), enlarge(gray.expand(-1, -1, -1, 3)))


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (torch.zeros(0, 8, 8, 3), r"nothing to enlarge in pictures of shape \(0, 3, 8, 8\)"),
        (torch.full((1, 8, 8, 3), float("nan")), "holds pixels that are not finite"),
        (torch.zeros(1, 8, 8, 5), r"IMAGE to enlarge is \(images, height, width, 3\), got \[1, 8, 8, 5\]"),
        (torch.zeros(8, 8, 3), r"got \[8, 8, 3\]"),
    ],
)
def test_what_is_no_image_is_refused(enlarge, parts, image, message):
    with pytest.raises(ValueError, match=message):
        enlarge(image)
    with pytest.raises(ValueError, match=message):
        parts(image)


def test_only_super_resolution_ensembles_enlarge(model, enlarge):
    from .test_sampling import foreign_model

    for other, name in ((model, "ComfyUNet"), (foreign_model(), "Network")):
        with pytest.raises(ValueError, match=rf"This MODEL \({name}\) is no super-resolution.*eDiff-I Load Ensemble"):
            enlarge(picture(), other)


def test_a_low_res_image_is_refused_by_models_that_do_not_look(model, stock, parts):
    from .test_sampling import foreign_model

    message = r"holds a low-res image, but the MODEL.*leave out eDiff-I Low-Res Image"
    with pytest.raises(ValueError, match=message):
        stock(model=model)
    positive, negative, _ = parts(picture())
    with pytest.raises(ValueError, match=message):
        stock(model=foreign_model(), conditioning=(positive, negative, {"samples": torch.zeros(1, 4, 8, 8)}))


def test_a_conditioning_without_a_low_res_image_is_refused(pack, stock, parts, positive, negative):
    low_positive, low_negative, latent = parts(picture())
    (mixed,) = pack.stock["ConditioningCombine"]().combine(low_positive, positive)
    for given in ((positive, low_negative), (low_positive, negative), (mixed, low_negative)):
        with pytest.raises(
            ValueError, match=r"holds no low-res image. Put eDiff-I Low-Res Image in front of the sampler"
        ):
            stock(conditioning=(*given, latent))
    with pytest.raises(ValueError, match="holds no prompt at all"):
        parts(picture(), negative=[])


def test_a_prompt_of_other_encoders_is_refused(enlarge):
    foreign = [[torch.ones(1, 77, 768), {"pooled_output": torch.ones(1, 768)}]]
    with pytest.raises(ValueError, match=r"not made by eDiff-I's encoders.*holds 77 tokens"):
        enlarge(picture(), positive=foreign)


def test_noise_above_the_models_is_refused(enlarge):
    with pytest.raises(ValueError, match="sigma_max 90 lies above the highest noise of this MODEL, 80"):
        enlarge(picture(), sigma_max=90.0)
