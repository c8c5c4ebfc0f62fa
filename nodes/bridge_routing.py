"""Routing: several MODELs called like one, the expert chosen by the sigma of each call, inside one sampler run.

The first MODEL, the primary, gives ComfyUI its schedule, latent format and progress. Two wrappers on a clone of it do the
rest: one spans the run and cleans up, the other stands around every prediction, hands it to the expert that owns its
sigma, and goes on. An expert is prepared when its first call comes, and loaded again on every switch, so that only what
is needed is on the device and two experts may share one set of weights. What other nodes and the sampler added to the
primary since the routing was made goes along to every expert.
"""

import logging
import math
import uuid
import weakref
from collections.abc import Sequence

import comfy.hooks
import comfy.model_management
import comfy.model_patcher
import comfy.patcher_extension
import comfy.sampler_helpers
import comfy.samplers
import comfy.utils
import torch

from ..ediffi_core.intervals import NoiseInterval
from ..ediffi_core.router import ExpertRouter

Patcher = comfy.model_patcher.ModelPatcher
KEY = "ediffi_routing"  # of the wrappers, and of the attachment that holds the Routing
# options of a run that belong to one model alone; a compiled module would replace the expert's own network
PRIVATE = {"multigpu_clones", "multigpu_thread_pool", "ignore_multigpu", "registered_hooks", "to_load_options"}
PRIVATE_WRAPPERS = {KEY, "torch.compile"}
OUTER_SAMPLE = ("noise", "latent_image", "sampler", "sigmas", "denoise_mask", "callback", "disable_pbar", "seed")


def route(experts: Sequence[tuple[NoiseInterval, Patcher]]) -> Patcher:
    """One MODEL from experts listed from high noise to low noise. One expert is that expert.

    Raises ValueError for intervals with a gap or an overlap, and for MODELs that cannot share a sampler run.
    """
    intervals = [interval for interval, _ in experts]
    router = ExpertRouter(intervals)
    check_compatible(experts)
    primary = experts[0][1].clone()
    if len(experts) == 1:
        return primary
    routing = Routing(router, [patcher for _, patcher in experts])
    wrappers = comfy.patcher_extension.WrappersMP
    primary.add_wrapper_with_key(wrappers.OUTER_SAMPLE, KEY, routing.outer_sample)
    primary.add_wrapper_with_key(wrappers.PREDICT_NOISE, KEY, routing.predict_noise)
    primary.set_attachments(KEY, routing)
    return primary


def routing_of(model: Patcher) -> "Routing | None":
    """The experts behind a MODEL made by `route`, or None for any other."""
    return model.get_attachment(KEY)


def check_compatible(experts: Sequence[tuple[NoiseInterval, Patcher]]) -> None:
    """Raise ValueError unless the MODELs share sampling, sigma_data, sigma range and latent format."""
    descriptions = [_description(patcher) for _, patcher in experts]
    for (interval, _), description in zip(experts, descriptions, strict=True):
        for trait, value in description.items():
            expected = descriptions[0][trait]
            if value != expected and not (isinstance(value, float) and math.isclose(value, expected, rel_tol=1e-4)):
                raise ValueError(
                    f"The expert for sigma in {interval} cannot share a sampler run with the one for "
                    f"{experts[0][0]}: its {trait} is {value}, not {expected}. Use MODELs of one family."
                )


def _description(patcher: Patcher) -> dict[str, object]:
    sampling = patcher.get_model_object("model_sampling")
    # ComfyUI builds the class for each model anew, from a schedule and a prediction
    kinds = [kind.__name__ for kind in type(sampling).__mro__ if kind.__module__ == "comfy.model_sampling"]
    return {
        "model sampling": " + ".join(kinds) or type(sampling).__name__,
        "sigma_data": float(getattr(sampling, "sigma_data", 1.0)),
        "sigma_min": float(sampling.sigma_min),
        "sigma_max": float(sampling.sigma_max),
        "latent format": type(patcher.get_model_object("latent_format")).__name__,
    }


class Routing:
    """The experts of a routed MODEL, shared by all its clones; the state of each sampler run is a `Run`."""

    def __init__(self, router: ExpertRouter, experts: Sequence[Patcher]) -> None:
        self.router = router
        self.experts = tuple(experts)  # as they were joined; the first is also what the primary was before other nodes
        # sigmas arrive in float32; an edge must be the same number
        self._rounded = ExpertRouter([NoiseInterval(_float32(i.low), _float32(i.high)) for i in router.intervals])
        self._runs: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
        self._patched: dict[int, tuple[object, Patcher]] = {}

    def expert_of(self, sigma: float) -> int:
        """Index of the expert that owns `sigma` as the sampler gives it, in float32."""
        return self._rounded.expert(sigma)

    def patched(self, index: int, primary: Patcher) -> Patcher:
        """Expert `index` with the weight and object patches that the primary received since `route`."""
        before = self.experts[0]
        weights = {key: patches[len(before.patches.get(key, ())) :] for key, patches in primary.patches.items()}
        weights = {key: patches for key, patches in weights.items() if patches}
        # patches inside the network are bound to the primary's own modules
        objects = {
            name: value
            for name, value in primary.object_patches.items()
            if before.object_patches.get(name) is not value and not name.startswith("diffusion_model")
        }
        if not weights and not objects:
            return self.experts[index]

        state = (primary.patches_uuid, tuple(sorted((name, id(value)) for name, value in objects.items())))
        known, patcher = self._patched.get(index, (None, None))
        if known != state:
            patcher = self.experts[index].clone()
            for key, patches in weights.items():
                _check_applies(key, patches, primary, patcher, self.router.intervals[index])
                patcher.patches[key] = [*patcher.patches.get(key, []), *patches]
            patcher.patches_uuid = uuid.uuid4()
            for name, value in objects.items():
                patcher.add_object_patch(name, value)
            self._patched[index] = (state, patcher)
        return patcher

    def outer_sample(self, executor, *args, **kwargs):
        """Around a whole sampler run."""
        guider = executor.class_obj
        call = dict(zip(OUTER_SAMPLE, args, strict=False)) | kwargs
        run = self._runs[guider] = Run(self, guider, call)
        try:
            return executor(*args, **kwargs)
        finally:
            del self._runs[guider]
            run.close()

    def predict_noise(self, executor, x, timestep, model_options=None, *args, **kwargs):
        """Around every prediction: the expert that owns sigma takes the primary's place in the guider."""
        options = {} if model_options is None else model_options
        run = self._runs.get(executor.class_obj)
        if run is None:
            return executor(x, timestep, options, *args, **kwargs)
        options = run.switch(self.expert_of(float(timestep.flatten()[0])), options)
        device = run.device  # experts may live on different ones
        return executor(x.to(device), timestep.to(device), options, *args, **kwargs).to(x.device)


class Run:
    """One sampler run: which experts are prepared, and which one the guider uses now."""

    def __init__(self, routing: Routing, guider, call: dict) -> None:
        self.routing = routing
        self.guider = guider
        self.call = call
        self.active = 0
        self.primary_conds = guider.conds
        self.prepared: dict[int, Prepared] = {}
        self.baseline = _with_wrappers(routing.experts[0])

    def switch(self, index: int, options: dict) -> dict:
        """Make expert `index` the guider's model; returns the options to call it with."""
        guider = self.guider
        if not self.prepared:  # the first call: the guider has prepared the primary itself
            self.prepared[0] = Prepared(guider.model_patcher, guider.inner_model, guider.conds, guider.model_options)
        if index != self.active:
            comfy.model_management.throw_exception_if_processing_interrupted()
            if index in self.prepared:
                self.prepared[index].load(self.call["noise"].shape)
            else:
                self.prepared[index] = self._prepare(index)
            self.active = index
            logging.debug("eDiff-I: expert %s now denoises, sigma in %s", index, self.routing.router.intervals[index])
        expert = self.prepared[index]
        guider.inner_model, guider.conds = expert.inner_model, expert.conds
        if index == 0:
            return options
        return overlaid(expert.options, self.baseline, options)

    @property
    def device(self):
        return self.prepared[self.active].patcher.load_device

    def _prepare(self, index: int) -> "Prepared":
        """What CFGGuider does for its own model before the first step, for another one."""
        guider, call = self.guider, self.call
        conds = {name: [cond.copy() for cond in conds] for name, conds in guider.original_conds.items()}
        comfy.samplers.preprocess_conds_hooks(conds)
        patcher = self.routing.patched(index, guider.model_patcher)
        if patcher.is_dynamic() and not guider.model_patcher.is_dynamic():
            patcher = patcher.get_non_dynamic_delegate()  # the guider did so too: conditionings with hooks ask for it

        options = comfy.model_patcher.create_model_options_clone(patcher.model_options)
        prepared = Prepared(patcher, patcher.model, conds, options)
        self.prepared[index] = prepared  # known to `close` from here on
        if comfy.samplers.get_total_hook_groups_in_conds(conds) <= 1:
            patcher.hook_mode = comfy.hooks.EnumHookMode.MinVram
        comfy.sampler_helpers.prepare_model_patcher(patcher, conds, options)
        comfy.samplers.filter_registered_hooks_on_conds(conds, options)

        noise, latent, device = call["noise"], call["latent_image"], patcher.load_device
        prepared.load(noise.shape)
        comfy.samplers.cast_to_load_options(options, device=device, dtype=patcher.model_dtype())
        patcher.pre_run()
        prepared.inner_model.latent_shapes = call.get("latent_shapes")

        noise = noise.to(device=device, dtype=torch.float32)
        latent = latent.to(device=device, dtype=torch.float32)
        if torch.count_nonzero(latent) > 0:
            latent = prepared.inner_model.process_latent_in(latent)
        prepared.conds = comfy.samplers.process_conds(
            prepared.inner_model, noise, conds, device, latent, call.get("denoise_mask"), call.get("seed"),
            latent_shapes=call.get("latent_shapes"),
        )  # fmt: skip
        return prepared

    def close(self) -> None:
        """After the run, finished or not. The guider cleans its own model up."""
        comfy.sampler_helpers.cleanup_models(self.primary_conds, [])
        for index, expert in self.prepared.items():
            if index > 0:
                expert.close()
        self.prepared.clear()


class Prepared:
    """An expert ready to be called in a run."""

    def __init__(self, patcher: Patcher, inner_model, conds, options: dict) -> None:
        self.patcher = patcher
        self.inner_model = inner_model
        self.conds = conds
        self.options = options
        self.hook_mode = patcher.hook_mode  # to be restored
        self.additional: list = []

    def load(self, noise_shape) -> None:
        """Onto the device; cheap if it is there already."""
        self.inner_model, _, self.additional = comfy.sampler_helpers.prepare_sampling(
            self.patcher, noise_shape, self.conds, self.options
        )
        self.inner_model.current_patcher = self.patcher  # experts may share the weights

    def close(self) -> None:
        comfy.samplers.cast_to_load_options(self.options, device=self.patcher.offload_device)
        self.patcher.cleanup()
        comfy.sampler_helpers.cleanup_models(self.conds, self.additional)
        self.patcher.hook_mode = self.hook_mode
        self.patcher.restore_hook_patches()


def overlaid(own: dict, baseline: dict, given: dict) -> dict:
    """An expert's own options and, on top, whatever `given` holds that `baseline` does not.

    Lists grow by their new entries; other values are replaced where they changed. Nothing is changed in place.
    """
    result = comfy.model_patcher.create_model_options_clone(own)
    for key, value in given.items():
        if key in PRIVATE:
            continue
        before = baseline.get(key)
        if isinstance(value, dict):
            inner = {k: v for k, v in value.items() if k not in PRIVATE_WRAPPERS}
            mine = result.get(key)
            result[key] = overlaid(
                mine if isinstance(mine, dict) else {}, before if isinstance(before, dict) else {}, inner
            )
        elif isinstance(value, list):
            known = before if isinstance(before, list) else []
            added = [item for item in value if not any(item is old for old in known)]
            if added or key not in result:
                mine = result.get(key)
                result[key] = [*(mine if isinstance(mine, list) else []), *added]
        elif value is not before:
            result[key] = value
    return result


def _with_wrappers(patcher: Patcher) -> dict:
    """A patcher's options as a guider sees them, with the patcher's wrappers and callbacks."""
    options = comfy.model_patcher.create_model_options_clone(patcher.model_options)
    for name, added in (("wrappers", patcher.wrappers), ("callbacks", patcher.callbacks)):
        known = options["transformer_options"].get(name, {})
        options["transformer_options"][name] = comfy.patcher_extension.merge_nested_dicts(known, added)
    return options


def _check_applies(key, patches, primary: Patcher, expert: Patcher, interval: NoiseInterval) -> None:
    if any(isinstance(patch[1], list) for patch in patches):  # a merge carries the weights of a whole other model
        raise ValueError(
            "An ensemble cannot be merged with another MODEL, as each of its experts has weights of its own. Merge the "
            "experts one by one, before they are joined."
        )
    name = key if isinstance(key, str) else key[0]
    try:
        same = comfy.utils.get_attr(expert.model, name).shape == comfy.utils.get_attr(primary.model, name).shape
    except AttributeError:
        same = False
    if not same:
        raise ValueError(
            f"A LoRA behind the ensemble changes the weight {name}, which the expert for sigma in {interval} does "
            f"not have in the same shape. Apply it to the experts one by one, before they are joined."
        )


def _float32(value: float) -> float:
    return torch.tensor(value, dtype=torch.float32).item()
