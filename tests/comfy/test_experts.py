"""The nodes that join MODELs to an ensemble: boundaries in three units, and what each expert has for itself."""

import pytest
import torch

from .conftest import random_conditioning
from .reference import core_conditioning, core_denoise


@pytest.fixture(scope="session")
def experts(pack, ensembles):
    """Three MODELs of different tiny networks, from high to low noise."""
    description = pack.core("checkpoint").read_ensemble(ensembles.different)
    return [pack.bridge.load_expert(path) for path in description.paths]


@pytest.fixture
def join(pack, experts):
    """eDiff-I Expert Ensemble on the three networks (or `models`)."""

    def join(boundaries=(2.0, 0.3), unit="sigma", models=experts, preset="own boundaries", cfgs=()):
        inputs = {"experts": str(len(models))}
        inputs |= {f"expert_{i}": model for i, model in enumerate(models, 1)}
        inputs |= {f"boundary_{i}": value for i, value in enumerate(boundaries, 1)}
        inputs |= {f"cfg_{i}": value for i, value in enumerate(cfgs, 1)}
        return pack.nodes["EDiffI_ExpertEnsemble"].execute(unit, inputs, preset).args[0]

    return join


@pytest.fixture
def run(pack, positive, negative):
    """A run of ComfyUI's own KSampler: (1, 3, 16, 16)."""

    def run(model, sampler="heun", cfg=4.0, denoise=1.0, positive=positive, negative=negative, steps=7):
        latent = {"samples": torch.zeros(1, 3, 16, 16)}
        settings = (5, steps, cfg, sampler, "karras", positive, negative, latent, denoise)
        return pack.stock["KSampler"]().sample(model, *settings)[0]["samples"]

    return run


def intervals_of(pack, model):
    return [(i.low, i.high) for i in pack.bridge.routing_of(model).router.intervals]


def core_image(pack, denoise):
    """What the core's Heun makes of the noise and schedule of `run`."""
    import comfy.k_diffusion.sampling

    sigmas = comfy.k_diffusion.sampling.get_sigmas_karras(7, 0.002, 80.0)
    noise = pack.module("bridge_sampling").unit_noise(5, (1, 3, 16, 16))
    for step in pack.core("samplers").heun(denoise, noise * sigmas[0], sigmas):
        image = step.x
    return image


def test_joined_experts_are_the_loaded_ensemble(pack, model, join, run):
    assert torch.equal(run(join()), run(model))
    assert intervals_of(pack, join()) == [(2.0, float("inf")), (0.3, 2.0), (0.0, 0.3)]


def test_percent_is_how_much_of_the_sampling_is_done(pack, join, experts):
    sampling = experts[0].get_model_object("model_sampling")
    edges = [sampling.percent_to_sigma(value) for value in (0.25, 0.75)]
    assert [low for low, _ in intervals_of(pack, join((0.25, 0.75), "percent"))[:2]] == edges


def test_a_timestep_is_what_the_network_is_told(pack, join):
    """Of EDM's networks it is ln(sigma) / 4."""
    edges = [low for low, _ in intervals_of(pack, join((0.2, -0.3), "timestep"))[:2]]
    assert edges == pytest.approx([torch.tensor(0.8).exp().item(), torch.tensor(-1.2).exp().item()])


def test_the_timestep_of_a_discrete_model_is_one_of_its_noise_levels(pack):
    import comfy.model_sampling

    sampling = type("Discrete", (comfy.model_sampling.ModelSamplingDiscrete, comfy.model_sampling.EPS), {})()
    in_sigma = pack.module("bridge_timeline").in_sigma
    assert in_sigma(sampling, "timestep", 200.0) == pytest.approx(sampling.sigmas[200].item())
    assert in_sigma(sampling, "timestep", 200.0) == pytest.approx(0.5717, abs=1e-4)  # known of SDXL's schedule


@pytest.mark.parametrize("shift", [1.0, 8.0])
def test_the_timestep_of_a_flow_model_does_not_depend_on_its_shift(pack, shift):
    import comfy.model_sampling

    bases = (comfy.model_sampling.ModelSamplingDiscreteFlow, comfy.model_sampling.CONST)
    sampling = type("Flow", bases, {})()
    sampling.set_parameters(shift=shift, multiplier=1000)
    sigma = pack.module("bridge_timeline").in_sigma(sampling, "timestep", 875.0)
    assert sigma == pytest.approx(0.875)
    assert sampling.timestep(torch.tensor(sigma)).item() == pytest.approx(875.0)


def test_the_papers_preset_is_the_papers_split(pack, join):
    split = pack.core("intervals").paper_split()
    joined = intervals_of(pack, join((1.0, 0.5), preset="eDiff-I base"))
    assert [low for low, _ in joined] == pytest.approx([interval.low for interval in split], rel=1e-5)
    assert [low for low, _ in joined[:2]] == pytest.approx([9.6096, 0.075742], rel=1e-4)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(boundaries=(0.3, 2.0)), r"boundary_2 is sigma 2, which does not lie below boundary_1 at sigma 0.3"),
        (dict(boundaries=(2.0, 2.0)), r"boundary_2 is sigma 2, which does not lie below boundary_1"),
        (dict(boundaries=(0.75, 0.25), unit="percent"), r"boundary_2 is sigma 5.65\d* \(percent 0.25\).*exchange"),
        (
            dict(boundaries=(200.0, 0.3)),
            r"boundary_1 is sigma 200, but the noise of these MODELs runs from sigma 80 down",
        ),
        (dict(boundaries=(1.0, 0.0)), r"boundary_2 is sigma 0, but the noise"),
        (dict(boundaries=(0.0, 0.5), unit="percent"), r"boundary_1 is sigma 1e\+09 \(percent 0\), but the noise"),
        (dict(preset="SDXL base + refiner"), r"'SDXL base \+ refiner' is for 2 experts, but 3 are connected"),
    ],
)
def test_boundaries_that_make_no_sense_are_named(join, wrong, message):
    with pytest.raises(ValueError, match=message):
        join(**wrong)


def test_a_preset_for_another_kind_of_model_is_refused(join, experts):
    with pytest.raises(ValueError, match=r"'Wan 2\.2 text to video' is for a flow model, which expert_1 is not"):
        join((1.0,), models=experts[:2], preset="Wan 2.2 text to video")


def test_an_ensemble_is_no_expert(join, experts, model):
    with pytest.raises(ValueError, match=r"expert for sigma in \[0, 1\) is an ensemble itself.*side by side"):
        join((1.0,), models=[experts[0], model])


def test_a_patch_of_whole_runs_is_refused_on_an_expert(join, experts):
    import comfy.patcher_extension

    patched = experts[1].clone()
    kind = comfy.patcher_extension.WrappersMP.OUTER_SAMPLE
    patched.add_wrapper_with_key(kind, "easycache", lambda executor, *args, **kwargs: executor(*args, **kwargs))
    with pytest.raises(
        ValueError, match=r"expert for sigma in \[0, 1\) carries.*\(easycache\).*MODEL that the ensemble gives"
    ):
        join((1.0,), models=[experts[0], patched])


def test_guidance_of_each_expert(pack, ensembles, join, run, positive, negative):
    scales = {0: 1.5, 1: 4.0, 2: 6.0}
    guided = {i: core_denoise(pack, ensembles.different, positive, negative, cfg) for i, cfg in scales.items()}

    def denoise(x, sigma):
        level = sigma[0].item()
        return guided[0 if level >= 2.0 else 1 if level >= 0.3 else 2](x, sigma)

    image = run(join(cfgs=(1.5, -1.0, 6.0)), cfg=4.0)
    torch.testing.assert_close(image, core_image(pack, denoise), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(image, run(join()), atol=1e-3)


def test_a_guider_without_one_cfg_is_refused(pack, join, positive):
    from comfy_extras import nodes_custom_sampler as custom

    guider = custom.BasicGuider.execute(join(cfgs=(2.0, 2.0, 2.0)), positive).args[0]
    noise, sampler = custom.RandomNoise.execute(5).args[0], custom.KSamplerSelect.execute("euler").args[0]
    sigmas = custom.KarrasScheduler.execute(4, 80.0, 0.002, 7.0).args[0]
    with pytest.raises(
        ValueError, match=r"cfg of its own, 2, but the guider of this run.*set the cfg of the experts back"
    ):
        custom.SamplerCustomAdvanced.execute(noise, guider, sampler, sigmas, {"samples": torch.zeros(1, 3, 16, 16)})


@pytest.fixture(scope="session")
def prompts(pack):
    return [random_conditioning(pack, seed, clip=seed, t5=seed) for seed in (3, 4, 5)]


def per_expert(pack, conditionings):
    named = {f"expert_{i}": conditioning for i, conditioning in enumerate(conditionings, 1)}
    return pack.nodes["EDiffI_ExpertConditioning"].execute(named).args[0]


def test_each_expert_hears_its_own_prompt(pack, ensembles, model, run, prompts, negative):
    """Equal to the core told another prompt at each noise level; and the given conditionings stay as they are."""
    config = pack.core("checkpoint").load_ensemble(ensembles.different).experts[0].network.config
    hears = [core_denoise(pack, ensembles.different, prompt, negative, 4.0) for prompt in prompts]
    assert core_conditioning(pack, prompts[0], config).clip_tokens.shape[1] == 77

    def denoise(x, sigma):
        level = sigma[0].item()
        return hears[0 if level >= 2.0 else 1 if level >= 0.3 else 2](x, sigma)

    before = [dict(prompt[0][1]) for prompt in prompts]
    image = run(model, positive=per_expert(pack, prompts))
    torch.testing.assert_close(image, core_image(pack, denoise), rtol=1e-4, atol=1e-5)
    assert [prompt[0][1] for prompt in prompts] == before


def test_the_same_prompt_for_each_expert_is_one_prompt(pack, model, run, prompts):
    assert torch.equal(run(model, positive=per_expert(pack, prompts[:1] * 3)), run(model, positive=prompts[0]))


def test_prompts_for_experts_need_an_ensemble(pack, experts, run, prompts):
    with pytest.raises(
        ValueError, match="one prompt for each expert of an ensemble, but the MODEL that samples is no ensemble"
    ):
        run(experts[0], positive=per_expert(pack, prompts))


def test_prompts_for_another_number_of_experts_are_refused(pack, model, run, prompts):
    with pytest.raises(
        ValueError, match=r"prompts for 2 experts, but this ensemble has 3: sigma in \[2, inf\), \[0.3, 2\)"
    ):
        run(model, positive=per_expert(pack, prompts[:2]))


def test_a_gap_between_prompts_is_named(pack, prompts):
    with pytest.raises(ValueError, match="expert_2 is not connected, but a later expert is"):
        pack.nodes["EDiffI_ExpertConditioning"].execute({"expert_1": prompts[0], "expert_3": prompts[1]})


@pytest.fixture
def loads(monkeypatch):
    """The networks that ComfyUI was asked to bring to the device."""
    import comfy.model_management as management

    asked, load = [], management.load_models_gpu

    def recording(models, *args, **kwargs):
        asked.extend(patcher.model for patcher in models)
        return load(models, *args, **kwargs)

    monkeypatch.setattr(management, "load_models_gpu", recording)
    return asked


def test_experts_that_own_no_step_are_never_loaded(join, run, experts, loads):
    run(join((2.0, 0.3)), denoise=0.5, steps=4)
    high, middle, low = (patcher.model for patcher in experts)
    assert high not in loads
    assert loads == [middle, low]


def test_a_partial_run_equals_the_network_that_chooses_inside(pack, ensembles, join, run):
    from .reference import oracle

    for sampler in ("heun", "dpmpp_2m", "dpmpp_2m_sde", "euler_cfg_pp"):
        assert torch.equal(
            run(join(), sampler, denoise=0.3), run(oracle(pack, ensembles.different), sampler, denoise=0.3)
        )


def test_wrappers_of_an_expert_stand_around_its_own_calls(join, experts, run):
    import comfy.patcher_extension

    kind, seen = comfy.patcher_extension.WrappersMP.PREDICT_NOISE, {0: [], 1: []}

    def watched(model, index):
        def wrapper(executor, x, timestep, *args, **kwargs):
            seen[index].append(timestep.item())
            return executor(x, timestep, *args, **kwargs)

        clone = model.clone()
        clone.add_wrapper_with_key(kind, "watch", wrapper)
        return clone

    watching = join(models=[watched(experts[0], 0), watched(experts[1], 1), experts[2]])
    assert torch.equal(run(watching), run(join()))
    assert min(seen[0]) >= 2.0
    assert 0.3 <= min(seen[1]) <= max(seen[1]) < 2.0
    assert len(seen[0]) > 1 < len(seen[1])


def test_compiling_the_ensemble_compiles_every_expert(join, run, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda model, **_: (compiled.append(model), model)[1])
    from comfy_extras.nodes_torch_compile import TorchCompileModel

    model = join()
    expected = run(model)
    patched = TorchCompileModel.execute(model, "inductor").args[0]
    assert torch.equal(run(patched), expected)
    assert len(set(compiled)) == 3


@pytest.mark.parametrize(("room", "ahead"), [(3.5, True), (1.5, False)], ids=["room for all", "room for one"])
def test_the_next_expert_is_loaded_ahead_where_there_is_room(
    pack, ensembles, run, loads, second_device, monkeypatch, room, ahead
):
    import threading

    model = pack.bridge.load_ensemble(ensembles.different)
    routing = pack.bridge.routing_of(model)
    for patcher in (model, *routing.experts):
        patcher.load_device = torch.device("cpu", 0)
    second_device[0] = model.model_size() * room
    started = []
    start = threading.Thread.start
    monkeypatch.setattr(threading.Thread, "start", lambda self: (started.append(self.name), start(self))[1])
    run(model)
    assert started.count("eDiff-I prefetch") == (2 if ahead else 0)
    assert loads.count(routing.experts[1].model) == (2 if ahead else 1)  # a switch asks, and finds it there


def test_what_cannot_be_loaded_ahead_is_loaded_at_the_switch(
    pack, ensembles, model, run, second_device, monkeypatch, caplog
):
    expected = run(model)
    fresh = pack.bridge.load_ensemble(ensembles.different)
    for patcher in (fresh, *pack.bridge.routing_of(fresh).experts):
        patcher.load_device = torch.device("cpu", 0)
    prefetch = pack.module("bridge_prefetch")

    class Failing:
        def __getattr__(self, name):
            if name == "load_models_gpu":
                raise RuntimeError("out of memory")
            import comfy.model_management

            return getattr(comfy.model_management, name)

    monkeypatch.setattr(prefetch, "management", Failing())
    torch.testing.assert_close(run(fresh), expected, rtol=0, atol=1e-5)
    assert "could not be loaded ahead" in caplog.text


def edm(pack, model, positive, negative, solver="heun", seed=5, noise=None, **settings):
    """eDiff-I EDM Sampler in ComfyUI's SamplerCustomAdvanced, on given unit noise (B, 3, 16, 16)."""
    from comfy_extras import nodes_custom_sampler as custom

    settings = dict(s_churn=4.0, s_tmin=0.01, s_tmax=60.0, s_noise=1.01) | settings
    sampler = pack.nodes["EDiffI_EDMSampler"].execute(solver, **settings).args[0]
    sigmas = pack.core("schedule").karras_sigmas(5).float()
    guider = custom.CFGGuider.execute(model, positive, negative, 3.0).args[0]
    given = type("Noise", (), {"seed": seed, "generate_noise": lambda self, latent: noise})()
    latent = {"samples": torch.zeros_like(noise)}
    return custom.SamplerCustomAdvanced.execute(given, guider, sampler, sigmas, latent).args[0]["samples"]


def test_the_edm_sampler_is_edms_algorithm_2(pack, ensembles, model, positive, negative):
    module = pack.module("bridge_sampling")
    noise, added = module.unit_noise(5, (1, 3, 16, 16)), module.RowNoise([5], (1, 3, 16, 16), "cpu")
    denoise = core_denoise(pack, ensembles.different, positive, negative, 3.0)
    sigmas = pack.core("schedule").karras_sigmas(5).float()
    steps = pack.core("samplers").stochastic(
        denoise, noise * sigmas[0], sigmas, 4.0, 0.01, 60.0, 1.01, noise=lambda x: added(None, None)
    )
    *_, last = steps
    torch.testing.assert_close(edm(pack, model, positive, negative, noise=noise), last.x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("solver", ["heun", "euler", "dpm_2"])
def test_the_edm_sampler_gives_each_image_its_own_noise(pack, model, positive, negative, solver):
    noise = torch.cat([pack.module("bridge_sampling").unit_noise(seed, (1, 3, 16, 16)) for seed in (5, 6)])
    batch = edm(pack, model, positive, negative, solver, noise=noise)
    alone = edm(pack, model, positive, negative, solver, seed=6, noise=noise[1:])
    torch.testing.assert_close(batch[1:], alone, rtol=1e-4, atol=1e-4)


def test_without_churn_it_is_algorithm_1(pack, model, positive, negative):
    noise = pack.module("bridge_sampling").unit_noise(5, (1, 3, 16, 16))
    plain = edm(pack, model, positive, negative, noise=noise, s_churn=0.0)
    outside = edm(pack, model, positive, negative, noise=noise, s_tmin=1000.0, s_tmax=2000.0)
    assert torch.equal(plain, outside)
    assert not torch.allclose(plain, edm(pack, model, positive, negative, noise=noise), atol=1e-2)


def test_the_canvas_is_told_who_denoises_what(pack, model, positive, negative):
    latent = pack.nodes["EDiffI_EmptyImage"].execute(16, 16, 1).args[0]
    output = pack.nodes["EDiffI_KSampler"].execute(
        model, 5, 6, 3.0, "heun", "edm", positive, negative, latent, 1.0, 0.002, 80.0, 7.0, 0.0, 0.05, 50.0, 1.003
    )
    (timeline,) = output.ui["ediffi_timeline"]
    sigmas = pack.core("schedule").karras_sigmas(6).float()
    assert timeline["sigmas"] == pytest.approx(sigmas.tolist())
    assert timeline["plan"] == [0 if s >= 2 else 1 if s >= 0.3 else 2 for s in sigmas.tolist()[:-1]]
    assert [(e["low"], e["high"]) for e in timeline["experts"]] == [(2.0, None), (0.3, 2.0), (0.0, 0.3)]
    assert timeline["range"] == pytest.approx([0.002, 80.0], rel=1e-4)


def test_the_timeline_is_a_picture(pack, model, experts):
    sigmas = pack.core("schedule").karras_sigmas(6).float()
    node = pack.nodes["EDiffI_EnsembleTimeline"]
    image = node.execute(model, sigmas, 640, 320).args[0]
    assert image.shape == (1, 320, 640, 3)
    assert 0 <= image.min() < image.max() <= 1
    assert not torch.equal(image, node.execute(experts[0], sigmas, 640, 320).args[0])
