"""eDiff-I KSampler: EDM's schedule and churn, and images that depend on their seed and not on their batch."""

import pytest
import torch

from .reference import core_denoise

# those that add noise draw it in three ways: white noise, Brownian paths, and churn
STOCHASTIC = ["euler_ancestral", "dpmpp_2m_sde", "dpmpp_sde", "er_sde", "seeds_2", "lcm", "ddpm"]


@pytest.fixture
def sample(pack, model, positive, negative):
    """eDiff-I KSampler's images, (B, 3, 16, 16)."""

    def sample(sampler_name="euler", *, model=model, seed=5, batch=1, latent=None, **changed):
        latent = latent or pack.nodes["EDiffI_EmptyImage"].execute(16, 16, batch).args[0]
        widgets = dict(
            steps=5, cfg=3.0, scheduler="edm", denoise=1.0, sigma_min=0.002, sigma_max=80.0, rho=7.0,
            s_churn=0.0, s_tmin=0.05, s_tmax=50.0, s_noise=1.003,
        ) | changed  # fmt: skip
        output = pack.nodes["EDiffI_KSampler"].execute(
            model=model, seed=seed, sampler_name=sampler_name, positive=positive, negative=negative,
            latent_image=latent, **widgets,
        )  # fmt: skip
        return output.args[0]["samples"]

    return sample


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_2m", *STOCHASTIC])
def test_an_image_is_the_same_in_any_batch(sample, sampler):
    batch = sample(sampler, batch=3)
    for i in range(3):
        torch.testing.assert_close(batch[i : i + 1], sample(sampler, seed=5 + i), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpm_2"])
def test_an_image_is_the_same_in_any_batch_with_churn(sample, sampler):
    batch = sample(sampler, batch=2, s_churn=10.0)
    torch.testing.assert_close(batch[1:], sample(sampler, seed=6, s_churn=10.0), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(batch, sample(sampler, batch=2), atol=1e-2)


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpm_2", "uni_pc", *STOCHASTIC])
@pytest.mark.parametrize("denoise", [1.0, 0.5])
def test_with_comfyuis_schedulers_it_is_comfyuis_ksampler(pack, model, positive, negative, sample, sampler, denoise):
    stock = pack.stock["KSampler"]().sample(
        model, 5, 5, 3.0, sampler, "normal", positive, negative, {"samples": torch.zeros(1, 3, 16, 16)}, denoise
    )
    assert torch.equal(sample(sampler, scheduler="normal", denoise=denoise), stock[0]["samples"])


def test_the_edm_schedule_is_the_cores(pack, model):
    sigmas = pack.bridge.schedule(model, "edm", "heun", 6, 1.0, 0.01, 50.0, 5.0)
    expected = pack.core("schedule").karras_sigmas(6, 0.01, 50.0, 5.0).float()
    assert torch.equal(sigmas, expected)
    half = pack.bridge.schedule(model, "edm", "heun", 6, 0.5, 0.01, 50.0, 5.0)
    assert torch.equal(half, pack.core("schedule").karras_sigmas(12, 0.01, 50.0, 5.0).float()[-7:])
    assert len(pack.bridge.schedule(model, "edm", "dpm_2", 6, 1.0, 0.002, 80.0, 7.0)) == 7
    assert len(pack.bridge.schedule(model, "edm", "euler", 6, 0.0, 0.002, 80.0, 7.0)) == 0


def test_the_edm_schedule_is_comfyuis_karras_schedule(pack, model):
    import comfy.samplers

    ours = pack.bridge.schedule(model, "edm", "euler", 9, 1.0, 0.002, 80.0, 7.0)
    karras = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "karras", 9)
    torch.testing.assert_close(ours, karras, rtol=1e-4, atol=0)


def test_churned_heun_is_edms_algorithm_2(pack, ensembles, positive, negative, sample):
    ours = sample("heun", s_churn=4.0, s_tmin=0.01, s_tmax=60.0, s_noise=1.01)

    module = pack.module("bridge_sampling")
    noise = module.RowNoise([5], (1, 3, 16, 16), "cpu")
    denoise = core_denoise(pack, ensembles.different, positive, negative, 3.0)
    sigmas = pack.core("schedule").karras_sigmas(5).float()
    steps = pack.core("samplers").stochastic(
        denoise, module.unit_noise(5, (1, 3, 16, 16)) * sigmas[0], sigmas, 4.0, 0.01, 60.0, 1.01,
        noise=lambda x: noise(None, None),
    )  # fmt: skip
    for step in steps:
        expected = step.x
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=2e-5)


def test_churn_reports_every_step_once(pack, model, positive, negative, monkeypatch):
    module = pack.module("bridge_sampling")
    steps = []
    monkeypatch.setattr(module.latent_preview, "prepare_callback", lambda *_: lambda i, *_: steps.append(i))
    sampler = pack.bridge.sampler_named("heun", 4.0, 0.01, 60.0, 1.0)
    sigmas = pack.bridge.schedule(model, "edm", "heun", 5, 1.0, 0.002, 80.0, 7.0)
    pack.bridge.sample(model, 1, 2.0, sampler, sigmas, positive, negative, {"samples": torch.zeros(1, 3, 16, 16)})
    assert steps == [0, 1, 2, 3, 4]


def test_other_samplers_ignore_churn(sample):
    assert torch.equal(sample("dpmpp_2m", s_churn=10.0), sample("dpmpp_2m"))


def test_rows_taken_out_of_a_batch_keep_their_images(pack, sample):
    empty = pack.nodes["EDiffI_EmptyImage"].execute(16, 16, 4).args[0]
    (picked,) = pack.stock["LatentFromBatch"]().frombatch(empty, 2, 2)
    torch.testing.assert_close(sample(latent=picked), sample(batch=4)[2:], rtol=1e-4, atol=1e-4)


def test_a_batch_index_of_another_length_is_refused(sample):
    with pytest.raises(ValueError, match="holds 2 images, but its batch_index names 1"):
        sample(latent={"samples": torch.zeros(2, 3, 16, 16), "batch_index": [0]})


def test_the_largest_seed_wraps_around(sample):
    batch = sample(seed=2**64 - 1, batch=2)
    torch.testing.assert_close(batch[1:], sample(seed=0), rtol=1e-4, atol=1e-4)


def test_no_denoising_returns_the_image(sample):
    image = torch.rand(1, 3, 16, 16)
    assert torch.equal(sample(latent={"samples": image}, denoise=0.0), image)


def test_a_mask_keeps_what_is_outside(sample):
    image = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(3)) * 2 - 1
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., :8] = 1
    sampled = sample(latent={"samples": image, "noise_mask": mask}, denoise=0.7)
    torch.testing.assert_close(sampled[..., 8:], image[..., 8:])
    assert not torch.allclose(sampled[..., :8], image[..., :8])


def test_a_schedule_above_the_models_noise_is_refused(pack, positive, negative):
    model = foreign_model()
    with pytest.raises(ValueError, match=r"sigma_max 80 lies above the highest noise of this MODEL, 14.6.*another"):
        pack.bridge.schedule(model, "edm", "euler", 5, 1.0, 0.002, 80.0, 7.0)


def foreign_model():
    """A MODEL of another kind: predicts noise, as Stable Diffusion does, in 4 channels."""
    import comfy.latent_formats
    import comfy.model_base
    import comfy.model_patcher
    import comfy.supported_models_base

    class Network(torch.nn.Module):
        dtype = torch.float32

        def __init__(self, **_):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.tensor(0.7))

        def forward(self, x, timesteps, context=None, **_):
            return self.scale * x + context.mean() * 0.01

    class Config(comfy.supported_models_base.BASE):
        latent_format = comfy.latent_formats.SD15
        unet_extra_config = {}  # noqa: RUF012
        memory_usage_factor = 0.1

    model = comfy.model_base.BaseModel(Config({}), comfy.model_base.ModelType.EPS, unet_model=Network)
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(model, cpu, cpu)


def test_models_of_other_kinds_run_as_in_comfyuis_ksampler(pack, positive, negative):
    model = foreign_model()
    latent = pack.stock["EmptyLatentImage"]().generate(64, 64, 1)[0]
    widgets = dict(
        steps=5, cfg=3.0, scheduler="karras", denoise=1.0, sigma_min=0.002, sigma_max=80.0, rho=7.0,
        s_churn=0.0, s_tmin=0.05, s_tmax=50.0, s_noise=1.003,
    )  # fmt: skip
    ours = pack.nodes["EDiffI_KSampler"].execute(
        model=model, seed=5, sampler_name="euler_ancestral", positive=positive, negative=negative,
        latent_image=latent, **widgets,
    ).args[0]  # fmt: skip
    stock = pack.stock["KSampler"]().sample(model, 5, 5, 3.0, "euler_ancestral", "karras", positive, negative, latent)
    assert torch.equal(ours["samples"], stock[0]["samples"])
    assert set(ours) == set(stock[0])


def test_models_of_other_kinds_can_be_experts(pack, positive, negative):
    """The routing knows nothing of eDiff-I: equal experts of any kind are that expert."""
    intervals = pack.core("intervals")
    split = intervals.NoiseInterval(2.0, float("inf")), intervals.NoiseInterval(0.0, 2.0)
    routed = pack.bridge.route([(interval, foreign_model()) for interval in split])
    latent = {"samples": torch.zeros(1, 4, 8, 8)}

    def sample(model):
        return pack.stock["KSampler"]().sample(model, 5, 8, 3.0, "dpmpp_2m", "karras", positive, negative, latent)

    assert torch.equal(sample(routed)[0]["samples"], sample(foreign_model())[0]["samples"])


def test_an_empty_image_is_a_latent_in_pixels(pack):
    latent = pack.nodes["EDiffI_EmptyImage"].execute(24, 16, 2).args[0]
    assert latent["samples"].shape == (2, 3, 16, 24)
    assert not latent["samples"].any()


def test_thresholding_keeps_a_strongly_guided_image_in_range(pack, model, sample):
    node = pack.nodes["EDiffI_DynamicThresholding"]
    wild = sample(cfg=30.0)
    assert wild.abs().max() > 1.5
    for maximum in (1.0, 100.0):
        assert sample(model=node.execute(model, 0.9, maximum).args[0], cfg=30.0).abs().max() <= 1.0
    batch = sample(model=node.execute(model, 0.9, 100.0).args[0], cfg=30.0, batch=2)
    alone = sample(model=node.execute(model, 0.9, 100.0).args[0], cfg=30.0, seed=6)
    torch.testing.assert_close(batch[1:], alone, rtol=1e-4, atol=1e-4)
    assert torch.equal(sample(cfg=30.0), wild), "The MODEL that was given has changed."


def test_thresholding_refuses_latent_models(pack):
    import families

    model = families.families(pack)["sd15"].model(1)
    with pytest.raises(ValueError, match=r"needs a MODEL in pixel space.*this one samples 4 latent channels"):
        pack.nodes["EDiffI_DynamicThresholding"].execute(model, 0.9, 1.0)
