"""One expert as a MODEL, the pixel VAE, and what users read when a file or an input is wrong."""

import json
import shutil

import pytest
import torch

from .conftest import random_conditioning, random_network, write_ensemble
from .reference import core_conditioning


@pytest.fixture(scope="module")
def expert(pack, ensembles):
    return pack.bridge.load_expert(ensembles.single / "expert0.safetensors")


def conds(model, conditioning, shape):
    """The kwargs of the network for one entry of a CONDITIONING."""
    tokens, values = conditioning[0]
    entries = model.extra_conds(cross_attn=tokens, noise=torch.zeros(shape), device="cpu", **values)
    return {name: entry.process_cond(shape[0]).cond for name, entry in entries.items()}


@pytest.mark.parametrize("sigma", [0.002, 0.3, 5.0, 80.0])
def test_the_model_denoises_as_the_core_does(pack, ensembles, expert, positive, sigma):
    network, header = pack.core("checkpoint").load_network(ensembles.single / "expert0.safetensors")
    denoiser = pack.core("preconditioning").Denoiser(network, header.sigma_data)
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * (sigma**2 + 0.25) ** 0.5
    sigmas = torch.full((2,), sigma)
    rows = pack.core("conditioning").joined([core_conditioning(pack, positive, header.config)] * 2)
    with torch.no_grad():
        ours = expert.model.apply_model(x, sigmas, **conds(expert.model, positive, x.shape))
        expected = denoiser(x, sigmas, rows)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def test_a_style_image_reaches_the_network(pack, ensembles, expert, positive):
    from types import SimpleNamespace

    network, header = pack.core("checkpoint").load_network(ensembles.single / "expert0.safetensors")
    denoiser = pack.core("preconditioning").Denoiser(network)
    embedding = torch.randn(1, 10, generator=torch.Generator().manual_seed(2))
    output = SimpleNamespace(image_embeds=embedding)
    (styled,) = pack.stock["unCLIPConditioning"]().apply_adm(positive, output, 0.7, 0.0)

    plain = core_conditioning(pack, positive, header.config)
    from dataclasses import replace

    expected_conditioning = replace(plain, image=embedding, image_strength=torch.tensor([0.7]))
    x, sigma = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(1)), torch.ones(1)
    with torch.no_grad():
        ours = expert.model.apply_model(x, sigma, **conds(expert.model, styled, x.shape))
        expected, unstyled = denoiser(x, sigma, expected_conditioning), denoiser(x, sigma, plain)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(ours, unstyled)

    wide = SimpleNamespace(image_embeds=torch.zeros(1, 768))
    (foreign,) = pack.stock["unCLIPConditioning"]().apply_adm(positive, wide, 1.0, 0.0)
    with pytest.raises(ValueError, match=r"encoded to 768 numbers, this ensemble reads 10.*eDiff-I Load Encoders"):
        conds(expert.model, foreign, x.shape)


def test_sampling_is_edms(expert):
    sampling = expert.get_model_object("model_sampling")
    assert sampling.sigma_data == 0.5
    assert float(sampling.sigma_min) == pytest.approx(0.002)
    assert float(sampling.sigma_max) == pytest.approx(80.0, rel=1e-5)
    noise = torch.ones(1, 3, 8, 8)
    scaled = sampling.noise_scaling(torch.tensor(80.0), noise, torch.zeros(1), max_denoise=True)
    assert torch.equal(scaled, torch.full_like(noise, 80.0))


def test_every_weight_can_be_offloaded_and_patched(expert):
    """Weights outside ComfyUI's layers are overlooked by its partial loading."""
    for name, module in expert.model.diffusion_model.named_modules():
        if list(module.parameters(recurse=False)):
            assert hasattr(module, "comfy_cast_weights"), name


def test_half_precision_computes(pack, ensembles, positive):
    expert = pack.bridge.load_expert(ensembles.single / "expert0.safetensors", {"dtype": torch.bfloat16})
    assert expert.model.get_dtype() == torch.bfloat16
    full = pack.bridge.load_expert(ensembles.single / "expert0.safetensors")
    x, sigma = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(1)), torch.ones(1)
    given = conds(full.model, positive, x.shape)
    with torch.no_grad():
        difference = expert.model.apply_model(x, sigma, **given) - full.model.apply_model(x, sigma, **given)
    assert difference.abs().mean() < 0.02


def test_comfyui_can_ask_for_a_fresh_copy(expert):
    """What hooks under dynamic VRAM, other devices, torch.compile and training need."""
    copy = expert.clone(force_deepcopy=True)
    assert copy.model is not expert.model
    state, expected = copy.model.state_dict(), expert.model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())


def test_the_vae_keeps_pixels_exactly(pack):
    vae = pack.bridge.pixel_vae()
    assert vae.vae_dtype == torch.float32
    image = torch.rand(1, 16, 24, 3, generator=torch.Generator().manual_seed(1))
    latent = vae.encode(image)
    assert latent.shape == (1, 3, 16, 24)
    torch.testing.assert_close(vae.decode(latent), image, rtol=0, atol=1e-6)
    torch.testing.assert_close(vae.decode(torch.full((1, 3, 8, 8), 7.0)), torch.ones(1, 8, 8, 3))


def test_previews_show_the_image_itself(model):
    import latent_preview
    from comfy.cli_args import LatentPreviewMethod

    latent_preview.set_preview_method("auto")
    try:
        previewer = latent_preview.get_previewer(model.load_device, model.model.latent_format)
        _, image, _ = previewer.decode_latent_to_preview_image("JPEG", torch.full((1, 3, 16, 16), 1.0))
        assert image.size == (16, 16)
        assert image.getpixel((3, 3)) == (255, 255, 255)
    finally:
        latent_preview.set_preview_method(LatentPreviewMethod.NoPreviews.value)


def sample(pack, model, positive, negative, shape, name="euler"):
    latent = {"samples": torch.zeros(shape)}
    return pack.stock["KSampler"]().sample(model, 1, 3, 2.0, name, "karras", positive, negative, latent)


def test_inputs_are_never_changed(pack, model, positive, negative):
    latent = torch.zeros(2, 3, 16, 16)
    given = [positive[0][0], positive[0][1]["pooled_output"], negative[0][0], latent]
    before = [tensor.clone() for tensor in given]
    keys = [set(positive[0][1]), set(negative[0][1])]
    options, patches = repr(model.model_options), dict(model.patches)
    pack.stock["KSampler"]().sample(model, 1, 4, 2.0, "euler_cfg_pp", "karras", positive, negative, {"samples": latent})
    assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True))
    assert [set(positive[0][1]), set(negative[0][1])] == keys
    assert repr(model.model_options) == options
    assert model.patches == patches


def test_stock_empty_latents_become_images(pack, model, positive, negative):
    latent = pack.stock["EmptyLatentImage"]().generate(16, 24, 1)[0]
    sampled = pack.stock["KSampler"]().sample(model, 1, 2, 1.0, "euler", "karras", positive, negative, latent)
    assert sampled[0]["samples"].shape == (1, 3, 24, 16)


def test_a_size_the_network_cannot_halve_is_refused(pack, model, positive, negative):
    with pytest.raises(ValueError, match=r"sides are multiples of 2 pixels, got 17x16. Change width and height"):
        sample(pack, model, positive, negative, (1, 3, 16, 17))


def test_a_latent_of_another_kind_is_refused(pack, model, positive, negative):
    latent = {"samples": torch.ones(1, 4, 16, 16)}
    with pytest.raises(ValueError, match=r"LATENTs of 3 channels, got shape \[1, 4, 16, 16\].*eDiff-I Empty Image"):
        pack.stock["KSampler"]().sample(model, 1, 3, 2.0, "euler", "karras", positive, negative, latent)


FOREIGN = {
    "77 tokens": (torch.ones(1, 77, 768), "holds 77 tokens, the network reads 190"),
    "too wide": (torch.ones(1, 190, 4096), "4096 wide, the network reads 14"),
    "no tokens": (None, "holds no tokens"),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_a_conditioning_of_other_encoders_is_refused(pack, model, negative, case):
    tokens, message = FOREIGN[case]
    foreign = [[tokens, {"pooled_output": torch.ones(1, 10)}]]
    with pytest.raises(ValueError, match=f"not made by eDiff-I's encoders.*{message}.*eDiff-I Text Encode"):
        sample(pack, model, foreign, negative, (1, 3, 16, 16))


def test_a_conditioning_without_pooled_output_is_refused(pack, model, positive, negative):
    with pytest.raises(ValueError, match="no pooled output"):
        sample(pack, model, [[positive[0][0], {}]], negative, (1, 3, 16, 16))
    with pytest.raises(ValueError, match="pooled output is 768 wide, the network reads 10"):
        sample(pack, model, [[positive[0][0], {"pooled_output": torch.ones(1, 768)}]], negative, (1, 3, 16, 16))


def test_a_controlnet_is_refused(expert, positive):
    x = torch.zeros(1, 3, 16, 16)
    with pytest.raises(ValueError, match="no ControlNets for eDiff-I"):
        expert.model.apply_model(x, torch.ones(1), control={"input": []}, **conds(expert.model, positive, x.shape))


@pytest.fixture
def broken(pack, ensembles, tmp_path):
    """A copy of an ensemble to break."""
    return shutil.copytree(ensembles.different, tmp_path / "broken")


def test_a_truncated_file_is_named(pack, broken):
    file = broken / "expert1.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"expert1.safetensors is damaged or not a safetensors file"):
        pack.bridge.load_ensemble(broken)


def test_a_file_of_another_shape_is_named(pack, broken):
    checkpoint, unet = pack.core("checkpoint"), pack.core("unet")
    from dataclasses import replace

    header = checkpoint.read_header(broken / "expert1.safetensors")
    other = unet.UNet(replace(unet.PRESETS["tiny"], channels=32))
    checkpoint.save_network(broken / "expert1.safetensors", other.state_dict(), header)
    with pytest.raises(ValueError, match=r"expert1.safetensors: the weight \S+ has shape"):
        pack.bridge.load_ensemble(broken)


def test_weights_that_are_not_finite_are_named(pack, broken):
    checkpoint = pack.core("checkpoint")
    header = checkpoint.read_header(broken / "expert2.safetensors")
    state = random_network(pack, 3).state_dict()
    state["stem.weight"] = state["stem.weight"] * float("nan")
    checkpoint.save_network(broken / "expert2.safetensors", state, header)
    with pytest.raises(
        ValueError, match=r"expert2.safetensors: the weight stem.weight holds values that are not finite"
    ):
        pack.bridge.load_ensemble(broken)


def edit(folder, change):
    file = folder / "ensemble.json"
    description = json.loads(file.read_text())
    change(description["experts"])
    file.write_text(json.dumps(description))


def test_a_gap_between_experts_is_named(pack, broken):
    edit(broken, lambda experts: experts[1]["interval"].__setitem__(1, 1.5))
    with pytest.raises(ValueError, match=r"leave a gap between sigma 1.5 and 2"):
        pack.bridge.load_ensemble(broken)


def test_a_path_out_of_the_folder_is_refused(pack, broken):
    edit(broken, lambda experts: experts[0].__setitem__("file", "../different/expert0.safetensors"))
    with pytest.raises(ValueError, match="outside its folder"):
        pack.bridge.load_ensemble(broken)


def test_only_listed_names_are_loaded(pack, ensembles):
    node = pack.nodes["EDiffI_LoadEnsemble"]
    for name in ("../ediffi/different", "/etc", "nothing", ""):
        with pytest.raises(ValueError, match=r"There is no ensemble named .* exist: .*'different'.*models/ediffi/"):
            node.execute(name)
    model, vae = node.execute("different").args
    assert pack.bridge.routing_of(model) is not None
    assert vae.latent_channels == 3


def test_folders_from_extra_model_paths_are_kept(pack, ensembles, tmp_path, monkeypatch):
    import folder_paths

    extra = tmp_path / "elsewhere"
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "ediffi", ([str(extra)], set()))
    write_ensemble(pack, extra / "mine", (1,), ((0.0, None),))
    pack.bridge.register_folders()
    pack.bridge.register_folders()
    paths, extensions = folder_paths.folder_names_and_paths["ediffi"]
    assert paths == [str(extra), str(pack.models / "ediffi")]
    assert extensions == {".safetensors"}
    assert {"mine", "different"} <= set(pack.bridge.entries("ediffi"))
    assert folder_paths.get_filename_list("ediffi") == sorted(folder_paths.get_filename_list("ediffi"))


def test_stock_conditioning_nodes_mean_what_they_say(pack, expert, positive):
    """Averaging keeps both prompts' words, zeroing leaves nothing, concatenating puts them behind each other."""
    config = expert.model.diffusion_model.config
    short, long = positive, random_conditioning(pack, 2, clip=9, t5=11)

    (averaged,) = pack.stock["ConditioningAverage"]().addWeighted(short, long, 0.5)
    one = core_conditioning(pack, averaged, config)
    assert (one.clip_mask.sum(), one.t5_mask.sum()) == (9, 11)

    (zeroed,) = pack.stock["ConditioningZeroOut"]().zero_out(positive)
    null = core_conditioning(pack, zeroed, config)
    assert not null.clip_mask.any()
    assert not null.t5_mask.any()
    assert not null.clip_pooled.any()

    (joined,) = pack.stock["ConditioningConcat"]().concat(short, long)
    both = core_conditioning(pack, joined, config)
    assert both.clip_tokens.shape == (1, 154, 12)
    assert (both.clip_mask.sum(), both.t5_mask.sum()) == (5 + 9, 7 + 11)
