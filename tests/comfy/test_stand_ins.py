"""Stand-ins for well-known model files go through ComfyUI's own loaders, and what comes out is of the real classes and shapes."""

import asyncio

import pytest
import safetensors.torch
import stand_ins
import torch

WAN_HIGH, WAN_IMAGE = (f"wan2.2_{kind}_high_noise_14B_fp8_scaled.safetensors" for kind in ("t2v", "i2v"))
# file -> class of the network, class of the text encoders, width of a token, of the pooled text, channels of a latent
CHECKPOINTS = {
    "v1-5-pruned-emaonly-fp16.safetensors": ("BaseModel", "SD1ClipModel", 768, 768, 4),
    "dreamshaper_8.safetensors": ("BaseModel", "SD1ClipModel", 768, 768, 4),
    "sd_xl_base_1.0.safetensors": ("SDXL", "SDXLClipModel", 2048, 1280, 4),
    "sd_xl_refiner_1.0.safetensors": ("SDXLRefiner", "SDXLRefinerClipModel", 1280, 1280, 4),
    "flux1-dev-fp8.safetensors": ("Flux", "FluxClipModel_", 4096, 768, 16),
}


@pytest.fixture(scope="module")
def nodes(comfy_folder, pack):
    """ComfyUI's nodes by id, after it has loaded the stand-ins as a test server would."""
    from nodes import load_custom_node

    for path in (
        stand_ins.HERE,
        comfy_folder / "comfy_extras/nodes_wan.py",
        comfy_folder / "comfy_extras/nodes_clip_sdxl.py",
        comfy_folder / "comfy_extras/nodes_sdupscale.py",
    ):
        assert asyncio.run(load_custom_node(str(path)))
    with torch.inference_mode():
        yield lambda name, *values, **inputs: call(pack.stock[name], *values, **inputs)


def call(node, *values, **inputs):
    """The first output, as when ComfyUI runs the node."""
    if hasattr(node, "execute"):
        return node.execute(*values, **inputs).args[0]
    return getattr(node(), node.FUNCTION)(*values, **inputs)[0]


def denoised(nodes, model, positive, negative, samples, cfg=5.0):
    latent = nodes("KSampler", model, 1, 2, cfg, "euler", "normal", positive, negative, {"samples": samples})
    assert latent["samples"].shape == samples.shape
    assert latent["samples"].isfinite().all()
    return latent


def test_the_files_are_small_and_are_written_once(nodes, pack):
    files = [path for path in pack.models.rglob("*.safetensors") if path.relative_to(pack.models).parts[0] != "ediffi"]
    assert {*CHECKPOINTS, WAN_HIGH, WAN_IMAGE} <= {path.name for path in files}
    assert sum(path.stat().st_size for path in files) < 200e6
    before = {path: path.stat().st_mtime_ns for path in files}
    stand_ins.write(pack.models)
    assert {path: path.stat().st_mtime_ns for path in files} == before


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_checkpoint_is_of_the_real_classes_and_runs(nodes, pack, name):
    network, text, width, pooled, channels = CHECKPOINTS[name]
    model, clip, vae = pack.stock["CheckpointLoaderSimple"]().load_checkpoint(name)
    assert type(model.model).__name__ == network
    assert type(clip.cond_stage_model).__name__ == text
    assert type(vae.first_stage_model).__name__ == "AutoencoderKL"
    positive, negative = (nodes("CLIPTextEncode", clip, words) for words in ("a red fox", "blurred"))
    assert positive[0][0].shape == (1, 256 if network == "Flux" else 77, width)
    assert positive[0][1]["pooled_output"].shape == (1, pooled)
    assert not positive[0][0].equal(negative[0][0])

    latent = nodes("VAEEncode", vae, torch.rand(1, 128, 192, 3))
    assert latent["samples"].shape == (1, channels, 16, 24)
    latent = denoised(nodes, model, positive, negative, latent["samples"], cfg=1.0 if network == "Flux" else 5.0)
    image = nodes("VAEDecode", samples=latent, vae=vae)
    assert image.shape == (1, 128, 192, 3)
    assert image.isfinite().all()
    assert image.std() > 0


def test_the_x4_upscaler_enlarges_four_times(nodes, pack):
    model, clip, vae = pack.stock["CheckpointLoaderSimple"]().load_checkpoint("x4-upscaler-ema.safetensors")
    assert type(model.model).__name__ == "SD_X4Upscaler"
    assert type(clip.cond_stage_model).__name__ == "SD2ClipModel"
    positive, negative = (nodes("CLIPTextEncode", clip, words) for words in ("a red fox", "blurred"))
    assert positive[0][0].shape == (1, 77, 1024)
    picture = torch.rand(1, 24, 32, 3)
    positive, negative, latent = (
        pack.stock["SD_4XUpscale_Conditioning"].execute(picture, positive, negative, 4.0, 0.1).args
    )
    image = nodes("VAEDecode", samples=denoised(nodes, model, positive, negative, latent["samples"]), vae=vae)
    assert image.shape == (1, 96, 128, 3)
    assert image.isfinite().all()


def conditions(model, conditioning, kind, shape):
    """What the network is given of a CONDITIONING."""
    import comfy.sampler_helpers
    import comfy.samplers

    noise = torch.zeros(shape)
    (cond,) = comfy.sampler_helpers.convert_cond(conditioning)
    (cond,) = comfy.samplers.encode_model_conds(model.model.extra_conds, [cond], noise, "cpu", kind)
    return {name: value.cond for name, value in cond["model_conds"].items()}


def test_sdxl_hears_sizes_and_its_refiner_an_aesthetic_score(nodes, pack):
    for name, width in (("sd_xl_base_1.0.safetensors", 2816), ("sd_xl_refiner_1.0.safetensors", 2560)):
        model, clip, _ = pack.stock["CheckpointLoaderSimple"]().load_checkpoint(name)
        text = nodes("CLIPTextEncode", clip, "a red fox")
        positive, negative = (conditions(model, text, kind, (1, 4, 16, 16))["y"] for kind in ("positive", "negative"))
        assert positive.shape == negative.shape == (1, width)
        assert positive.equal(negative) == (width == 2816)
    scored = nodes("CLIPTextEncodeSDXLRefiner", clip=clip, ascore=2.5, width=128, height=128, text="a red fox")
    assert conditions(model, scored, "positive", (1, 4, 16, 16))["y"].equal(negative)


@pytest.fixture(scope="module")
def wan(nodes):
    """(positive, negative, vae) of Wan."""
    clip = nodes("CLIPLoader", "umt5_xxl_fp8_e4m3fn_scaled.safetensors", "wan")
    texts = [nodes("CLIPTextEncode", clip, words) for words in ("a red fox runs", "模糊")]
    assert texts[0][0][0].shape == (1, 512, 4096)
    assert not texts[0][0][0].equal(texts[1][0][0])
    return *texts, nodes("VAELoader", "wan_2.1_vae.safetensors")


@pytest.mark.parametrize("half", ["high", "low"])
def test_wan_makes_a_film_from_text(nodes, wan, half):
    positive, negative, vae = wan
    model = nodes("UNETLoader", WAN_HIGH.replace("high", half), "default")
    assert type(model.model).__name__ == "WAN21"
    latent = denoised(nodes, model, positive, negative, torch.zeros(1, 16, 2, 8, 12))
    film = nodes("VAEDecode", samples=latent, vae=vae)
    assert film.shape == (5, 64, 96, 3)
    assert film.isfinite().all()


@pytest.mark.parametrize("half", ["high", "low"])
def test_wan_makes_a_film_from_a_picture(nodes, pack, wan, half):
    positive, negative, vae = wan
    model = nodes("UNETLoader", WAN_IMAGE.replace("high", half), "default")
    picture = torch.rand(1, 64, 96, 3)
    positive, negative, latent = (
        pack.stock["WanImageToVideo"].execute(positive, negative, vae, 96, 64, 5, 1, start_image=picture).args
    )
    samples = latent["samples"]
    assert conditions(model, positive, "positive", samples.shape)["c_concat"].shape == (1, 20, 2, 8, 12)
    denoised(nodes, model, positive, negative, samples)


def test_the_two_halves_of_wan_differ(nodes):
    high, low = (nodes("UNETLoader", WAN_HIGH.replace("high", half), "default") for half in ("high", "low"))
    assert not high.model.diffusion_model.head.head.weight.equal(low.model.diffusion_model.head.head.weight)


def test_text_encoders_of_their_own_files(nodes):
    clip = nodes("DualCLIPLoader", "clip_l.safetensors", "t5xxl_fp16.safetensors", "flux")
    assert type(clip.cond_stage_model).__name__ == "FluxClipModel_"
    for file, kind, width in (
        ("clip_l.safetensors", "stable_diffusion", 768),
        ("t5xxl_fp16.safetensors", "pixart", 4096),
    ):
        assert nodes("CLIPTextEncode", nodes("CLIPLoader", file, kind), "a red fox")[0][0].shape[-1] == width


def test_a_small_file_that_is_no_stand_in_is_not_accepted(nodes, pack):
    weights = safetensors.torch.load_file(pack.models / "checkpoints/dreamshaper_8.safetensors")
    safetensors.torch.save_file(weights, pack.models / "checkpoints/small.safetensors")
    with pytest.raises(RuntimeError, match="Could not detect model type"):
        nodes("CheckpointLoaderSimple", "small.safetensors")


def test_redux_makes_the_real_number_of_tokens(nodes):
    vision = nodes("CLIPVisionLoader", "sigclip_vision_patch14_384.safetensors")
    output = nodes("CLIPVisionEncode", vision, torch.rand(1, 40, 60, 3), "center")
    tokens = nodes("StyleModelLoader", "flux1-redux-dev.safetensors").get_cond(output)
    assert tokens.shape == (1, 729, 4096)
    assert tokens.isfinite().all()
    assert tokens.std() > 0.01
