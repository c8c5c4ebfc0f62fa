"""One run through several experts is one run: with every sampler and scheduler, and for every family of models."""

import itertools
from types import SimpleNamespace

import pytest
import torch

FAMILIES = ["sd15", "sd15_inpaint", "sd21_v", "sdxl", "sdxl_refiner", "wan", "flux", "ediff_i"]
PREDICTIONS = ["eps", "v", "edm", "flow"]
STEPS, DENOISE = (4, 8, 20, 30), (1.0, 0.7, 0.3)
NOTHING = [[torch.zeros(1, 1, 1), {}]]  # a CONDITIONING for networks that read none

pytestmark = pytest.mark.filterwarnings("ignore:To copy construct", "ignore:Should have")  # ComfyUI's, torchsde's


@pytest.fixture(scope="module")
def families(pack):
    import families as module

    assert list(module.families(pack)) == FAMILIES
    assert list(module.PREDICTIONS) == PREDICTIONS
    return module


@pytest.fixture(scope="module")
def samplers(pack):
    import comfy.samplers

    return comfy.samplers.SAMPLER_NAMES


@pytest.fixture(scope="module")
def schedulers(pack):
    import comfy.samplers

    return comfy.samplers.SCHEDULER_NAMES


@pytest.fixture
def previews(pack):
    """Previews as in the settings "latent2rgb", during a test."""
    import latent_preview

    latent_preview.set_preview_method("latent2rgb")
    yield latent_preview.prepare_callback
    latent_preview.set_preview_method()


def seen(previews, model, steps):
    """(callback, list of all that it is told); it draws previews."""
    told, preview = [], previews(model, steps)

    def callback(step, x0, x, total):
        told.append((step, total, x0.tolist(), x.tolist()))
        preview(step, x0, x, total)

    return callback, told


def same(one, other):
    return torch.equal(one, other) and bool(one.isfinite().all())


def in_turns(samplers, schedulers, settings):
    """Every sampler with every scheduler, each time with another one of `settings`."""
    settings = list(settings)
    for (i, sampler), (j, scheduler) in itertools.product(enumerate(samplers), enumerate(schedulers)):
        yield sampler, scheduler, settings[(i + 5 * j) % len(settings)]


@pytest.fixture(params=PREDICTIONS)
def marked(pack, families, request):
    """Three experts of one kind of prediction that note their calls, as an ensemble and as one network."""
    calls = []
    experts = [families.marked(request.param, mark, calls) for mark in range(3)]
    edges = families.edges(experts[0], 3)

    def run(model, image, *args, **kwargs):
        """(image, [(mark, sigma) of each call])"""
        calls.clear()
        return families.sample(model, NOTHING, NOTHING, image, *args, **kwargs), calls.copy()

    def wrong(calls):
        # some samplers come to sigmas that are no number
        return [call for call in calls if call[1] == call[1] and call[0] != families.owner(call[1], edges)]

    return SimpleNamespace(
        prediction=request.param,
        sampling=experts[0].get_model_object("model_sampling"),
        edges=edges,
        ensemble=families.routed(pack, experts, edges),
        one_network=families.oracle(experts, edges),
        run=run,
        wrong=wrong,
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_equal_experts_are_that_expert_with_every_sampler(pack, families, samplers, schedulers, previews, name):
    family = families.families(pack)[name]
    one = family.model(1)
    ensembles = [
        families.routed(pack, [family.model(1) for _ in range(count)], families.edges(one, count)) for count in (2, 3)
    ]
    settings = itertools.cycle(itertools.product(ensembles, (1.0, 4.0), (1, 2), DENOISE))
    settings = itertools.islice(settings, 7 * FAMILIES.index(name), None)  # so that the families differ
    positive, negative = family.conditioning(2), family.conditioning(3)

    different = []
    for sampler, scheduler, setting in zip(samplers, itertools.cycle(schedulers), settings, strict=False):
        ensemble, cfg, batch, denoise = setting
        image = family.image(batch, seed=None if denoise == 1 else 4)
        runs = []
        for model in (one, ensemble):
            callback, told = seen(previews, model, 4)
            sampled = families.sample(
                model, positive, negative, image, sampler, scheduler, 4, cfg, denoise, callback=callback
            )
            runs.append((sampled, told))
        (expected, expected_told), (sampled, told) = runs
        if not (same(sampled, expected) and told == expected_told):
            different.append((sampler, scheduler, *setting[1:]))
    assert not different


def test_equal_experts_are_that_expert_with_every_sampler_and_scheduler(pack, families, samplers, schedulers):
    one = families.marked("eps", 1, [])
    ensembles = [
        families.routed(pack, [families.marked("eps", 1, []) for _ in range(count)], families.edges(one, count))
        for count in (2, 3)
    ]
    settings = itertools.product(ensembles, (4, 8), (1.0, 4.0), DENOISE)
    different = []
    for sampler, scheduler, (ensemble, steps, cfg, denoise) in in_turns(samplers, schedulers, settings):
        image = torch.zeros(1, 4, 2, 2) if denoise == 1 else torch.linspace(-2, 2, 16).view(1, 4, 2, 2)
        arguments = (NOTHING, NOTHING, image, sampler, scheduler, steps, cfg, denoise)
        if not same(families.sample(ensemble, *arguments), families.sample(one, *arguments)):
            different.append((sampler, scheduler, steps, cfg, denoise))
    assert not different


def test_every_call_goes_to_the_expert_that_owns_its_sigma(marked, samplers, schedulers):
    """Every sampler with every scheduler; bench/routing.py runs each of them with all steps and denoise."""
    image = torch.linspace(-1, 1, 4).view(1, 4, 1, 1)
    wrong, runs, total, used = [], 0, 0, set()
    for sampler, scheduler, (steps, denoise) in in_turns(samplers, schedulers, itertools.product(STEPS, DENOISE)):
        _, calls = marked.run(marked.ensemble, image, sampler, scheduler, steps, denoise=denoise)
        wrong += [(sampler, scheduler, steps, denoise, *call) for call in marked.wrong(calls)]
        runs, total, used = runs + 1, total + len(calls), used | {mark for mark, _ in calls}
    print(f"{marked.prediction}: {runs} runs, {total} calls, {len(wrong)} by the wrong expert")
    assert not wrong
    assert used == {0, 1, 2}
    assert runs == len(samplers) * len(schedulers)
    assert total > 10 * runs


def test_an_ensemble_is_the_network_that_chooses_inside(marked, samplers):
    different = []
    for sampler in samplers:
        (ours, calls), (expected, expected_calls) = (
            marked.run(model, torch.zeros(1, 4, 2, 2), sampler) for model in (marked.ensemble, marked.one_network)
        )
        if not same(ours, expected) or calls != expected_calls:
            different.append(sampler)
    assert not different


@pytest.mark.parametrize("name", FAMILIES)
def test_experts_of_a_family_are_the_network_that_chooses_inside(pack, families, name):
    family = families.families(pack)[name]
    experts = [family.model(seed) for seed in (1, 2, 3)]
    edges = families.edges(experts[0], 3)
    ensemble, reference = families.routed(pack, experts, edges), families.oracle(experts, edges)
    positive, negative = family.conditioning(2), family.conditioning(3)
    mask = torch.zeros(family.latent[1:])
    mask[..., mask.shape[-1] // 2 :] = 1
    for sampler, denoise in (("dpmpp_2m_sde", 1.0), ("uni_pc", 0.5), ("heunpp2", 1.0), ("euler_cfg_pp", 1.0)):
        arguments = (positive, negative, family.image(2, seed=4), sampler, "normal", 6, 4.0, denoise)
        called = reference.model.diffusion_model.calls
        called.clear()
        images = [families.sample(model, *arguments, noise_mask=mask) for model in (ensemble, reference)]
        assert same(*images), sampler
        assert {mark for mark, _ in called} == ({0, 1, 2} if denoise == 1 else {1, 2})


def test_sigmas_may_climb_back(marked, samplers):
    """Not every sampler makes sense of such sigmas: what counts is that it comes to the same, whatever that is."""
    (high, low), top = marked.edges, float(marked.sampling.sigma_max)
    middle, above = (low + high) / 2, (top + high) / 2
    # over both edges, several times in both directions, and once on each; some samplers need all to be different
    sigmas = torch.tensor([top, middle, low / 2, 0.9 * middle, above, high, low, 0.9 * above, low / 3, low / 4, 0.0])

    total, finite, wrong, different = 0, 0, [], []
    for sampler in samplers:
        (ours, calls), (expected, _) = (
            marked.run(model, torch.zeros(1, 4, 2, 2), sampler, sigmas=sigmas)
            for model in (marked.ensemble, marked.one_network)
        )
        wrong += [(sampler, *call) for call in marked.wrong(calls)]
        if not torch.equal(ours.nan_to_num(), expected.nan_to_num()):
            different.append(sampler)
        total, finite = total + len(calls), finite + bool(expected.isfinite().all())
    print(f"{marked.prediction}: {finite} of {len(samplers)} images finite, {total} calls, {len(wrong)} wrong")
    assert not wrong
    assert not different
    assert finite > len(samplers) / 2


def restarting(model, x, sigmas, extra_args=None, callback=None, disable=None):
    """Euler almost to the end, then noise that leads back to an earlier level, and Euler to the end (Xu et al., 2023)."""
    import comfy.k_diffusion.sampling as k_sampling

    back = len(sigmas) // 3
    x = k_sampling.sample_euler(model, x, sigmas[:-2], extra_args, callback, disable)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(3))
    x = x + (sigmas[back] ** 2 - sigmas[-3] ** 2).sqrt() * noise
    return k_sampling.sample_euler(model, x, sigmas[back:], extra_args, callback, disable)


def test_a_sampler_may_add_noise_on_its_way(pack, marked):
    import comfy.samplers

    churn = {"s_churn": 30.0, "s_noise": 1.003}
    samplers = [comfy.samplers.ksampler(name, churn) for name in ("euler", "heun", "dpm_2")]
    samplers += [pack.bridge.sampler_named(name, 30.0, 0.0, 999.0, 1.003) for name in ("euler", "heun", "dpm_2")]
    samplers += [comfy.samplers.KSAMPLER(restarting)]
    sigmas = comfy.samplers.calculate_sigmas(marked.sampling, "simple", 12)
    climbs = 0
    for sampler in samplers:
        (ours, calls), (expected, _) = (
            marked.run(model, torch.zeros(1, 4, 2, 2), sampler, sigmas=sigmas)
            for model in (marked.ensemble, marked.one_network)
        )
        assert marked.wrong(calls) == []
        assert same(ours, expected)
        climbs += sum(after < before for (before, _), (after, _) in itertools.pairwise(calls))
    assert climbs > 0


def patched(model, seed):
    """A MODEL as other nodes leave it behind: LoRA, another shift, a function after CFG, a wrapper, an attachment."""
    import comfy.patcher_extension
    from comfy_extras.nodes_model_advanced import ModelSamplingSD3

    (model,) = ModelSamplingSD3().patch(model, shift=5.0)
    name = "diffusion_model.head.head.weight"
    change = torch.randn(model.model.state_dict()[name].shape, generator=torch.Generator().manual_seed(seed))
    assert model.add_patches({name: ("diff", (change,))}, 0.1)
    model.set_model_sampler_post_cfg_function(lambda args: 0.99 * args["denoised"])
    kind = comfy.patcher_extension.WrappersMP.APPLY_MODEL
    model.add_wrapper_with_key(kind, "test", lambda executor, *args, **kwargs: executor(*args, **kwargs))
    model.set_attachments("test", [seed])
    return model


@pytest.mark.parametrize(
    "ending",
    ["finishes", "is interrupted", "fails in the sampler", "fails in a network", "has no memory for an expert"],
)
def test_the_models_are_what_they_were_before_a_run(pack, families, monkeypatch, ending):
    import comfy.model_management as management

    wan = families.families(pack)["wan"]
    experts = [patched(wan.model(seed), seed) for seed in (1, 2, 3)]
    edges = families.edges(experts[0], 3)
    ensemble = families.routed(pack, experts, edges)
    behind = patched(ensemble.clone(), 4)
    models = [*experts, ensemble, behind]

    def run(model, callback=None):
        image = wan.image(1, seed=6)
        return families.sample(
            model, wan.conditioning(2), wan.conditioning(3), image, "dpmpp_2m_sde", cfg=3.0, callback=callback
        )

    before = [families.snapshot(model) for model in models]
    expected = run(behind), run(ensemble)
    assert not torch.equal(*expected), "The patches behind the ensemble changed nothing, so the test shows little."
    management.unload_all_models()

    error = RuntimeError("as planned")
    if ending == "is interrupted":
        error = management.InterruptProcessingException()

    def callback(step, *_):
        if step == 5 and ending in ("is interrupted", "fails in the sampler"):
            raise error

    def fail(*_, **__):
        raise error

    for model in (ensemble, behind):
        with monkeypatch.context() as patch:
            if ending == "fails in a network":
                patch.setattr(experts[1].model.diffusion_model, "forward", fail)
            if ending == "has no memory for an expert":
                patch.setattr(type(experts[2]), "load", refusing(experts[2].model, type(experts[2]).load, error))
            if ending == "finishes":
                run(model, callback)
            else:
                with pytest.raises(type(error)) as raised:
                    run(model, callback)
                assert raised.value is error
        management.unload_all_models()
        for was, now in zip(before, (families.snapshot(model) for model in models), strict=True):
            assert now == was
    assert torch.equal(run(behind), expected[0])
    assert torch.equal(run(ensemble), expected[1])


def refusing(network, load, error):
    """ModelPatcher.load, but for one model."""

    def refuse(patcher, *args, **kwargs):
        if patcher.model is network:
            raise error
        return load(patcher, *args, **kwargs)

    return refuse


@pytest.fixture
def small_device(pack, monkeypatch):
    """ComfyUI's loading and eviction at work on the CPU: a device with a name of its own; `.bytes` is its memory."""
    import comfy.model_base
    import comfy.model_management as management

    device = SimpleNamespace(bytes=1e12, name=torch.device("cpu", 0))
    cpu = torch.device("cpu")

    def free_memory(_=None, torch_free_too=False):
        left = max(1, device.bytes - sum(loaded.model_loaded_memory() for loaded in management.current_loaded_models))
        return (left, left) if torch_free_too else left

    management.unload_all_models()
    monkeypatch.setattr(management, "get_torch_device", lambda: device.name)
    monkeypatch.setattr(management, "unet_offload_device", lambda: cpu)
    monkeypatch.setattr(management, "get_free_memory", free_memory)
    monkeypatch.setattr(management, "minimum_inference_memory", lambda: 0)
    monkeypatch.setattr(management, "extra_reserved_memory", lambda: 0)
    monkeypatch.setattr(management, "is_device_cpu", lambda device: device == cpu)
    monkeypatch.setattr(management, "vram_state", management.VRAMState.NORMAL_VRAM)
    monkeypatch.setattr(comfy.model_base.BaseModel, "memory_required", lambda *_, **__: 0)
    yield device
    management.unload_all_models()


@pytest.mark.parametrize("room", [1, 2, 3], ids="room for {}".format)
@pytest.mark.parametrize("sampler", ["dpmpp_2m", "heunpp2"])
def test_an_expert_is_loaded_when_a_call_crosses_into_its_interval(
    pack, families, small_device, monkeypatch, room, sampler
):
    wan = families.families(pack)["wan"]
    experts = [wan.model(seed) for seed in (1, 2, 3)]
    edges = families.edges(experts[0], 3)
    ensemble = families.routed(pack, experts, edges)
    size = ensemble.model_size()
    small_device.bytes = (room + 0.3) * size
    loads, calls, resident = [], [], []

    def noted(index, forward):
        def call(*args, **kwargs):
            calls.append(index)
            resident.append(sum(expert.loaded_size() for expert in experts) / size)
            return forward(*args, **kwargs)

        return call

    for index, expert in enumerate(experts):
        network = expert.model.diffusion_model
        monkeypatch.setattr(network, "forward", noted(index, network.forward))
    load = type(ensemble).load
    monkeypatch.setattr(
        type(ensemble),
        "load",
        lambda patcher, *args, **kwargs: (loads.append(patcher), load(patcher, *args, **kwargs))[1],
    )
    families.sample(ensemble, wan.conditioning(2), wan.conditioning(3), wan.image(), sampler, "normal", 12, 4.0)
    crossings = sum(one != other for one, other in itertools.pairwise(calls))
    assert set(calls) == {0, 1, 2}
    assert max(resident) < room + 0.1
    if room == 1:
        assert len(loads) == 1 + crossings
    elif room == 2:  # whom ComfyUI moves out for the third is its own affair
        assert len(experts) <= len(loads) <= 1 + crossings
    else:
        assert len(loads) == len(experts)


def test_a_run_makes_no_copy_of_the_weights(pack, families):
    wan = families.families(pack)["wan"]
    experts = [wan.model(seed) for seed in (1, 2, 3)]
    ensemble = families.routed(pack, experts, families.edges(experts[0], 3))
    weight = experts[0].model.diffusion_model.get_parameter("text_embedding.0.weight")
    before, during = families.copies(weight), []
    families.sample(
        ensemble, wan.conditioning(2), wan.conditioning(3), wan.image(), "heunpp2", steps=3, cfg=4.0,
        callback=lambda *_: during.append(families.copies(weight)),
    )  # fmt: skip
    assert len(during) == 3
    assert max(during) == before >= len(experts)
