"""The ensemble is called like one model: its experts switch inside one sampler run, and nothing else changes."""

import gc
import weakref

import pytest
import torch

from .conftest import random_conditioning
from .reference import core_denoise, oracle

SAMPLERS = ["euler", "heun", "dpmpp_2m", "dpmpp_2m_sde", "deis", "uni_pc", "res_multistep"]
SAMPLERS += ["euler_ancestral", "euler_cfg_pp"]
MORE_SAMPLERS = ["dpm_2", "heunpp2", "lms", "er_sde", "gradient_estimation_cfg_pp"]


@pytest.fixture
def run(pack, positive, negative):
    """A run of ComfyUI's own KSampler: (1, 3, 16, 16)."""

    def run(model, sampler="euler", scheduler="karras", steps=7, cfg=4.0, denoise=1.0, latent=None, positive=positive):
        latent = latent or {"samples": torch.zeros(1, 3, 16, 16)}
        sampled = pack.stock["KSampler"]().sample(
            model, 5, steps, cfg, sampler, scheduler, positive, negative, latent, denoise
        )
        return sampled[0]["samples"]

    return run


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_an_ensemble_of_equal_experts_is_that_expert(pack, ensembles, run, sampler):
    equal, single = (pack.bridge.load_ensemble(folder) for folder in (ensembles.equal, ensembles.single))
    assert torch.equal(run(equal, sampler), run(single, sampler))


@pytest.mark.parametrize("sampler", SAMPLERS + MORE_SAMPLERS)
def test_an_ensemble_is_the_network_that_chooses_inside(pack, ensembles, model, run, sampler):
    reference = oracle(pack, ensembles.different)
    assert torch.equal(run(model, sampler), run(reference, sampler))
    assert set(reference.model.diffusion_model.calls) == {0, 1, 2}


@pytest.mark.parametrize("sampler", ["euler", "heun"])
def test_an_ensemble_samples_what_the_core_samples(pack, ensembles, model, positive, negative, sampler):
    node = pack.nodes["EDiffI_KSampler"]
    latent = pack.nodes["EDiffI_EmptyImage"].execute(16, 16, 1).args[0]
    sampled = node.execute(
        model, 5, 8, 3.0, sampler, "edm", positive, negative, latent, 1.0, 0.002, 80.0, 7.0, 0.0, 0.05, 50.0, 1.003
    ).args[0]["samples"]

    denoise = core_denoise(pack, ensembles.different, positive, negative, 3.0)
    sigmas = pack.core("schedule").karras_sigmas(8).float()
    noise = pack.module("bridge_sampling").unit_noise(5, (1, 3, 16, 16))
    for step in pack.core("samplers").SAMPLERS[sampler](denoise, noise * sigmas[0], sigmas):
        expected = step.x
    torch.testing.assert_close(sampled, expected, rtol=1e-4, atol=1e-5)


def test_the_stock_custom_sampler_runs_it(pack, ensembles, model, positive, negative):
    from comfy_extras import nodes_custom_sampler as custom

    def sample(model):
        guider = custom.CFGGuider.execute(model, positive, negative, 4.0).args[0]
        noise = custom.RandomNoise.execute(5).args[0]
        sigmas = custom.KarrasScheduler.execute(7, 80.0, 0.002, 7.0).args[0]
        sampler = custom.KSamplerSelect.execute("dpmpp_2m").args[0]
        latent = {"samples": torch.zeros(1, 3, 16, 16)}
        return custom.SamplerCustomAdvanced.execute(noise, guider, sampler, sigmas, latent).args

    for ours, reference in zip(sample(model), sample(oracle(pack, ensembles.different)), strict=True):
        assert torch.equal(ours["samples"], reference["samples"])


def test_it_paints_over_an_image_inside_a_mask(pack, ensembles, model, run):
    generator = torch.Generator().manual_seed(1)
    image = torch.rand(1, 3, 16, 16, generator=generator) * 2 - 1
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., 8:] = 1
    latent = {"samples": image, "noise_mask": mask}
    ours = run(model, latent=latent, denoise=0.6)
    assert torch.equal(ours, run(oracle(pack, ensembles.different), latent=latent, denoise=0.6))
    torch.testing.assert_close(ours[..., :8], image[..., :8])


def test_a_level_on_an_edge_goes_to_the_noisier_expert_in_float32_too(pack, model):
    intervals, router = pack.core("intervals"), pack.core("router")
    edges = [0.1, 1 / 3, 3.7]
    parts = list(zip([*edges[::-1], 0.0], [float("inf"), *edges[::-1]], strict=True))
    routing = pack.module("bridge_routing").Routing(
        router.ExpertRouter([intervals.NoiseInterval(low, high) for low, high in parts]), [model] * 4
    )
    sigmas = torch.tensor([100.0, *edges[::-1], 1e-5])
    assert [routing.expert_of(float(sigma)) for sigma in sigmas] == [0, 0, 1, 2, 3]
    assert routing.expert_of(float(torch.nextafter(sigmas[1], sigmas[2]))) == 1


def test_each_expert_is_prepared_once_and_loaded_at_each_crossing(pack, model, run, monkeypatch):
    routing_module = pack.module("bridge_routing")
    loads, prepared = [], []
    load, prepare = routing_module.Prepared.load, routing_module.Run._prepare
    monkeypatch.setattr(routing_module.Prepared, "load", lambda self, shape: (loads.append(1), load(self, shape))[1])
    monkeypatch.setattr(
        routing_module.Run, "_prepare", lambda self, index: (prepared.append(index), prepare(self, index))[1]
    )
    run(model, "dpmpp_2m", steps=20)
    assert prepared == [1, 2]
    assert len(loads) == 2


def lora(model, seed, strength=0.5):
    """(MODEL with a LoRA, what it changes): through ComfyUI's own loading of LoRAs."""
    import comfy.sd

    name, generator = "middle.0.cross_attention.q", torch.Generator().manual_seed(seed)
    width = model.model.diffusion_model.get_parameter(f"{name}.weight").shape[0]
    weights = {
        f"diffusion_model.{name}.lora_up.weight": torch.randn(width, 4, generator=generator),
        f"diffusion_model.{name}.lora_down.weight": torch.randn(4, width, generator=generator),
    }
    patched, _ = comfy.sd.load_lora_for_models(model, None, weights, strength, 0)
    assert patched.patches
    return patched


def test_a_lora_behind_the_ensemble_reaches_every_expert(pack, ensembles, model, run):
    experts = pack.core("checkpoint").read_ensemble(ensembles.different)
    before = pack.bridge.route(
        [(i, lora(pack.bridge.load_expert(p), 3)) for i, p in zip(experts.intervals, experts.paths, strict=True)]
    )
    plain = run(model, "heun")
    after = run(lora(model, 3), "heun")
    assert torch.equal(after, run(before, "heun"))
    assert not torch.allclose(after, plain)
    assert torch.equal(run(model, "heun"), plain), "The LoRA stayed on the ensemble it was not meant for."


def test_two_experts_may_share_one_set_of_weights(pack, ensembles, run):
    intervals = pack.core("intervals")
    base = pack.bridge.load_expert(ensembles.single / "expert0.safetensors")
    split = intervals.NoiseInterval(1.0, float("inf")), intervals.NoiseInterval(0.0, 1.0)
    shared = pack.bridge.route([(split[0], lora(base, 1)), (split[1], lora(base, 2))])
    fresh = [pack.bridge.load_expert(ensembles.single / "expert0.safetensors") for _ in range(2)]
    separate = pack.bridge.route([(split[0], lora(fresh[0], 1)), (split[1], lora(fresh[1], 2))])
    assert torch.equal(run(shared, "heunpp2"), run(separate, "heunpp2"))


def test_what_other_nodes_add_behind_the_ensemble_reaches_every_expert(pack, ensembles, model, run):
    seen = []

    def after_cfg(args):
        seen.append(float(args["sigma"][0]))
        return args["denoised"] * 0.9

    def patched(model):
        clone = model.clone()
        clone.set_model_sampler_post_cfg_function(after_cfg)
        return clone

    assert torch.equal(run(patched(model)), run(patched(oracle(pack, ensembles.different))))
    assert max(seen) > 2 > 0.3 > min(seen)


def test_an_attention_override_sees_every_expert(model, run):
    calls = []

    def override(function, *args, **kwargs):
        calls.append(kwargs["mask"] is not None)
        return function(*args, **kwargs)

    clone = model.clone()
    clone.model_options["transformer_options"]["optimized_attention_override"] = override
    assert torch.equal(run(clone), run(model))
    assert calls.count(True) == calls.count(False) == 7 * 4  # steps x attention blocks of the tiny network


def test_hooks_on_conditionings_reach_every_expert(pack, ensembles, model, run, positive):
    """A LoRA hook for the whole run is the LoRA."""
    import comfy.hooks

    weights = lora(model, 4, 1.0).patches
    hook = comfy.hooks.WeightHook(strength_model=1.0)
    hook.weights, hook.need_weight_init = {key: patches[0][1] for key, patches in weights.items()}, False
    hooks = comfy.hooks.HookGroup()
    hooks.add(hook)
    hooked = comfy.hooks.set_hooks_for_conditioning(positive, hooks)
    # the negative carries no hook, so only the prompt's half of each step is changed
    ours = run(model, cfg=1.0, positive=hooked)
    torch.testing.assert_close(ours, run(lora(model, 4, 1.0), cfg=1.0), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(ours, run(model, cfg=1.0))


def test_the_options_of_an_expert_keep_what_is_its_own(pack):
    overlaid = pack.module("bridge_routing").overlaid
    old, new, own = object(), object(), object()
    baseline = {"sampler_post_cfg_function": [old], "transformer_options": {"patches": {"a": [old]}}}
    given = {
        "sampler_post_cfg_function": [old, new],
        "transformer_options": {"patches": {"a": [old]}, "sample_sigmas": new},
        "disable_cfg1_optimization": True,
        "multigpu_clones": {},
    }
    expert = {"sampler_post_cfg_function": [own], "transformer_options": {"patches": {"a": [own]}}}
    assert overlaid(expert, baseline, given) == {
        "sampler_post_cfg_function": [own, new],
        "transformer_options": {"patches": {"a": [own]}, "sample_sigmas": new},
        "disable_cfg1_optimization": True,
    }
    assert expert == {"sampler_post_cfg_function": [own], "transformer_options": {"patches": {"a": [own]}}}


def test_an_interrupted_run_leaves_nothing_behind(pack, ensembles, positive, negative):
    import comfy.model_management
    import comfy.sample

    class Interrupt(BaseException):
        pass

    model = pack.bridge.load_ensemble(ensembles.different)
    routing = pack.bridge.routing_of(model)
    networks = [weakref.ref(patcher.model.diffusion_model) for patcher in routing.experts]

    def callback(step, *_):
        if step == 6:
            raise Interrupt

    def sample(model, callback=None):
        noise, empty = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(5)), torch.zeros(1, 3, 16, 16)
        settings = (8, 4.0, "euler", "karras", positive, negative)
        return comfy.sample.sample(model, noise, *settings, empty, callback=callback, seed=5)

    expected = sample(model)
    with pytest.raises(Interrupt):
        sample(model, callback)
    assert len(routing._runs) == 0
    assert all(patcher.model.current_patcher is None for patcher in routing.experts)
    assert torch.equal(sample(model), expected)

    del model, routing
    comfy.model_management.unload_all_models()
    gc.collect()
    assert [network() for network in networks] == [None, None, None]


@pytest.mark.parametrize("room", [1.5, 0.5], ids=["room for one expert", "room for half an expert"])
def test_little_memory_gives_the_same_image(pack, ensembles, run, second_device, room):
    """ComfyUI's loading and eviction at work."""
    import comfy.model_management as management

    def sample():
        management.unload_all_models()
        model = pack.bridge.load_ensemble(ensembles.different)
        experts = pack.bridge.routing_of(model).experts
        for patcher in (model, *experts):
            patcher.load_device = torch.device("cpu", 0)
        sampled = run(model, "heunpp2")
        loaded = [patcher.loaded_size() for patcher in experts]
        management.unload_all_models()
        return sampled, loaded, model.model_size()

    plenty, loaded, size = sample()
    assert loaded == [size] * 3
    second_device[0] = size * room
    little, loaded, _ = sample()
    assert sum(loaded) < 2 * size, "Nothing was evicted, so the test shows nothing."
    # the last bits depend on where weights lie in memory
    torch.testing.assert_close(little, plenty, rtol=0, atol=1e-5)


def test_models_that_cannot_share_a_run_are_named(pack, ensembles):
    intervals = pack.core("intervals")
    first = pack.bridge.load_expert(ensembles.single / "expert0.safetensors")
    second = pack.bridge.load_expert(ensembles.single / "expert0.safetensors")
    second.model.model_sampling.set_parameters(0.002, 40.0, 0.5)
    split = intervals.NoiseInterval(1.0, float("inf")), intervals.NoiseInterval(0.0, 1.0)
    with pytest.raises(ValueError, match=r"expert for sigma in \[0, 1\).*sigma_max is 40.0, not 80.0.*one family"):
        pack.bridge.route([(split[0], first), (split[1], second)])
    with pytest.raises(ValueError, match="leave a gap between sigma 1 and 2"):
        pack.bridge.route([(intervals.NoiseInterval(2.0, 9.0), first), (split[1], first)])


def test_an_ensemble_cannot_be_merged(pack, model, ensembles, run):
    other = pack.bridge.load_ensemble(ensembles.equal)
    merged = model.clone()
    patches = other.get_key_patches("diffusion_model.")
    merged.add_patches(patches, 0.5, 0.5)
    with pytest.raises(ValueError, match="cannot be merged with another MODEL"):
        run(merged)


def test_a_lora_that_fits_only_the_primary_is_refused(pack, model, run):
    patched = model.clone()
    patched.patches["diffusion_model.no_such_layer.weight"] = [(1.0, ("diff", (torch.zeros(1),)), 1.0, None, None)]
    with pytest.raises(ValueError, match=r"weight diffusion_model.no_such_layer.weight.*before they are joined"):
        run(patched)


def test_batches_of_prompts_and_negatives_of_other_lengths_run(pack, model, run, positive):
    """Prompts of different length do not touch each other."""
    two = positive + random_conditioning(pack, 9)
    longer = [[torch.cat([positive[0][0], positive[0][0]], 1), positive[0][1]]]
    assert torch.isfinite(run(model, positive=two)).all()
    assert torch.isfinite(run(model, positive=longer)).all()
