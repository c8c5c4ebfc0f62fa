"""Routing: several MODELs called like one, the expert chosen by the sigma of each call, inside one sampler run.

The first MODEL, the primary, gives ComfyUI its schedule, latent format and progress. Two wrappers on a clone of it do the
rest: one spans the run, lets it begin with the expert that the schedule begins with, and cleans up; the other stands
around every prediction, hands it to the expert that owns its sigma, and goes on. An expert is prepared when its first
call comes, and loaded again on every switch, so that only what is needed is on the device and two experts may share one
set of weights. What other nodes and the sampler added to the primary since the routing was made goes along to every
expert.
"""

import contextlib
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
from .bridge_conditioning import of_expert
from .bridge_prefetch import Prefetch

Patcher = comfy.model_patcher.ModelPatcher
Kind = comfy.patcher_extension.WrappersMP
KEY = "ediffi_routing"  # of the wrappers, and of the attachment that holds the Routing
# options of a run that belong to one model alone; a compiled module would replace the expert's own network
MULTIGPU = {"multigpu_clones", "multigpu_thread_pool"}
PRIVATE = MULTIGPU | {"ignore_multigpu", "registered_hooks", "to_load_options"}
COMPILED = "torch.compile"
PRIVATE_WRAPPERS = {KEY, COMPILED}
SPANNING = (Kind.OUTER_SAMPLE, Kind.SAMPLER_SAMPLE)  # wrappers of a whole run
OUTER_SAMPLE = ("noise", "latent_image", "sampler", "sigmas", "denoise_mask", "callback", "disable_pbar", "seed")


def route(
    experts: Sequence[tuple[NoiseInterval, Patcher]],
    names: Sequence[str] | None = None,
    cfgs: Sequence[float | None] | None = None,
) -> Patcher:
    """One MODEL from experts listed from high noise to low noise. One expert is that expert.

    names: how pictures and messages call them; cfgs: the guidance of each, None for the sampler's.
    Raises ValueError for intervals with a gap or an overlap, and for MODELs that cannot share a sampler run.
    """
    intervals = [interval for interval, _ in experts]
    router = ExpertRouter(intervals)
    check_compatible(experts)
    primary = experts[0][1].clone()
    if len(experts) == 1:
        return primary
    routing = Routing(router, [patcher for _, patcher in experts], names, cfgs)
    for wrappers in (primary.wrappers, primary.model_options["transformer_options"].get("wrappers", {})):
        wrappers.pop(Kind.PREDICT_NOISE, None)  # the expert's own stand around its own calls only
    primary.add_wrapper_with_key(Kind.OUTER_SAMPLE, KEY, routing.outer_sample)
    primary.add_wrapper_with_key(Kind.PREDICT_NOISE, KEY, routing.predict_noise)
    primary.set_attachments(KEY, routing)
    return primary


def routing_of(model: Patcher) -> "Routing | None":
    """The experts behind a MODEL made by `route`, or None for any other."""
    return model.get_attachment(KEY)


def check_compatible(experts: Sequence[tuple[NoiseInterval, Patcher]]) -> None:
    """Raise ValueError unless the MODELs share sampling, sigma_data, sigma range and latent format."""
    for interval, patcher in experts:
        if routing_of(patcher) is not None:
            raise ValueError(
                f"The expert for sigma in {interval} is an ensemble itself. Connect its experts to one ensemble, side by side."
            )
        spanning = [key for kind in SPANNING for key in _own_wrappers(patcher, kind)]
        if spanning:
            raise ValueError(
                f"The expert for sigma in {interval} carries a patch that spans a whole sampler run ({', '.join(spanning)}), "
                f"and an expert has only its part of one. Apply that patch to the MODEL that the ensemble gives."
            )
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
    description = {
        "model sampling": " + ".join(kinds) or type(sampling).__name__,
        "sigma_data": float(getattr(sampling, "sigma_data", 1.0)),
        "sigma_min": float(sampling.sigma_min),
        "sigma_max": float(sampling.sigma_max),
        "latent format": type(patcher.get_model_object("latent_format")).__name__,
    }
    if hasattr(sampling, "shift"):  # of a flow model: moves its lowest level, and says nothing about the network
        del description["sigma_min"]
    return description


def _own_wrappers(patcher: Patcher, kind: str) -> list[str]:
    found = [patcher.wrappers, patcher.model_options["transformer_options"].get("wrappers", {})]
    return [str(key) for wrappers in found for key, functions in wrappers.get(kind, {}).items() if functions]


class Routing:
    """The experts of a routed MODEL, shared by all its clones; the state of each sampler run is a `Run`."""

    def __init__(
        self,
        router: ExpertRouter,
        experts: Sequence[Patcher],
        names: Sequence[str] | None = None,
        cfgs: Sequence[float | None] | None = None,
    ) -> None:
        self.router = router
        self.names = tuple(names or [f"expert {number}" for number in range(1, len(router) + 1)])
        self.cfgs = tuple(cfgs or [None] * len(router))  # None: as the sampler says
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
        compiled = [
            wrapper
            for wrapper in primary.get_wrappers(Kind.APPLY_MODEL, COMPILED)
            if wrapper not in before.get_wrappers(Kind.APPLY_MODEL, COMPILED)
        ]
        if not (weights or objects or compiled):
            return self.experts[index]

        objects_state = tuple(sorted((name, id(value)) for name, value in objects.items()))
        state = (primary.patches_uuid, objects_state, tuple(compiled))
        known, patcher = self._patched.get(index, (None, None))
        if known != state:
            patcher = self.experts[index].clone()
            for key, patches in weights.items():
                _check_applies(key, patches, primary, patcher, self.router.intervals[index])
                patcher.patches[key] = [*patcher.patches.get(key, []), *patches]
            patcher.patches_uuid = uuid.uuid4()
            for name, value in objects.items():
                patcher.add_object_patch(name, value)
            if compiled:
                from comfy_api.torch_helpers import set_torch_compile_wrapper

                set_torch_compile_wrapper(patcher, **primary.model_options["torch_compile_kwargs"])
            self._patched[index] = (state, patcher)
        return patcher

    def outer_sample(self, executor, *args, **kwargs):
        """Around a whole sampler run."""
        guider = executor.class_obj
        call = dict(zip(OUTER_SAMPLE, args, strict=False)) | kwargs
        run = self._runs[guider] = Run(self, guider, call)
        try:
            run.begin()
            return executor(*args, **kwargs)
        finally:
            del self._runs[guider]
            run.close()

    def predict_noise(self, executor, x, timestep, model_options=None, seed=None):
        """Around every prediction: the expert that owns sigma takes the primary's place in the guider."""
        guider, options = executor.class_obj, {} if model_options is None else model_options
        run = self._runs.get(guider)
        if run is None:
            return executor(x, timestep, options, seed)
        index = self.expert_of(float(timestep.flatten()[0]))
        options = run.switch(index, options)
        device = run.device  # experts may live on different ones
        own = comfy.patcher_extension.get_all_wrappers(Kind.PREDICT_NOISE, run.own_options)
        call = comfy.patcher_extension.WrapperExecutor.new_class_executor(executor, guider, own)
        with run.guidance(self.cfgs[index]):
            result = call.execute(x.to(device), timestep.to(device), options, seed)
        run.prefetch()
        return result.to(x.device)


class Run:
    """One sampler run: which experts are prepared, and which one the guider uses now."""

    def __init__(self, routing: Routing, guider, call: dict) -> None:
        self.routing = routing
        self.guider = guider
        self.call = call
        self.primary, self.primary_conds = guider.model_patcher, guider.conds
        self.plan = [routing.expert_of(float(sigma)) for sigma in call["sigmas"][:-1]] or [0]
        self.first = self.plan[0]
        self.active: int | None = None  # before the first prediction
        self.prepared: dict[int, Prepared] = {}
        self.baseline = _with_wrappers(routing.experts[0])
        self.prefetched: Prefetch | None = None

    def begin(self) -> None:
        """Let the guider prepare the expert of the first step, instead of a primary that may have no step at all."""
        expert = self.prepared[self.first] = self._expert(self.first)
        self.guider.model_patcher, self.guider.conds = expert.patcher, expert.conds
        if self.first != 0:  # the guider does it for its own options
            device, dtype = expert.patcher.load_device, expert.patcher.model_dtype()
            comfy.samplers.cast_to_load_options(expert.options, device=device, dtype=dtype)

    def switch(self, index: int, options: dict) -> dict:
        """Make expert `index` the guider's model; returns the options to call it with."""
        guider = self.guider
        if self.active is None:  # the guider has prepared the first expert
            first = self.prepared[self.first]
            first.inner_model, first.conds = guider.inner_model, guider.conds
            first.inner_model.current_patcher = first.patcher
            self.active = self.first
        if index != self.active:
            comfy.model_management.throw_exception_if_processing_interrupted()
            if self.prefetched is not None:
                self.prefetched.wait()
                self.prefetched = None
            if index in self.prepared:
                self.prepared[index].load(self.call["noise"].shape)
            else:
                self._prepare(index)
            self.active = index
            logging.debug("eDiff-I: expert %s now denoises, sigma in %s", index, self.routing.router.intervals[index])
        expert = self.prepared[index]
        guider.inner_model, guider.conds = expert.inner_model, expert.conds
        if index == 0:
            return options if self.first == 0 else {k: v for k, v in options.items() if k not in MULTIGPU}
        return overlaid(expert.options, self.baseline, options)

    @property
    def device(self):
        return self.prepared[self.active].patcher.load_device

    @property
    def own_options(self) -> dict:
        """The transformer options that the active expert brought itself."""
        options = self.baseline if self.active == 0 else self.prepared[self.active].options
        return options["transformer_options"]

    @contextlib.contextmanager
    def guidance(self, cfg: float | None):
        """The guider's cfg, replaced for a prediction."""
        guider = self.guider
        if cfg is None:
            yield
            return
        if type(guider).predict_noise is not comfy.samplers.CFGGuider.predict_noise or "negative" not in guider.conds:
            raise ValueError(
                f"The expert for sigma in {self.routing.router.intervals[self.active]} has a cfg of its own, {cfg:g}, but the "
                f"guider of this run ({type(guider).__name__}) does not guide by one cfg between positive and negative. "
                f"Use CFGGuider or a KSampler, or set the cfg of the experts back to -1."
            )
        saved, guider.cfg = guider.cfg, cfg
        try:
            yield
        finally:
            guider.cfg = saved

    def prefetch(self) -> None:
        """While an expert works, start to load the one that the schedule needs after it, if there is room for both."""
        if self.prefetched is not None or self.active not in self.plan:
            return
        after = self.plan[len(self.plan) - self.plan[::-1].index(self.active) :]
        if not after or after[0] in self.prepared:
            return
        active, patcher = self.prepared[self.active], self.routing.patched(after[0], self.primary)
        required, _ = comfy.sampler_helpers.estimate_memory(active.patcher, self.call["noise"].shape, active.conds)
        self.prefetched = Prefetch(patcher, active.patcher, required)

    def _expert(self, index: int) -> "Prepared":
        """Expert `index` with options and conditioning of its own, before anything is loaded."""
        guider = self.guider
        if index == 0:  # the guider has registered its hooks
            return Prepared(self.primary, self.primary.model, self._conds(self.primary_conds, 0), guider.model_options)
        conds = self._conds(guider.original_conds, index)
        comfy.samplers.preprocess_conds_hooks(conds)
        patcher = self.routing.patched(index, self.primary)
        if patcher.is_dynamic() and not self.primary.is_dynamic():
            patcher = patcher.get_non_dynamic_delegate()  # the guider did so too: conditionings with hooks ask for it

        options = comfy.model_patcher.create_model_options_clone(patcher.model_options)
        expert = Prepared(patcher, patcher.model, conds, options)
        if comfy.samplers.get_total_hook_groups_in_conds(conds) <= 1:
            patcher.hook_mode = comfy.hooks.EnumHookMode.MinVram
        comfy.sampler_helpers.prepare_model_patcher(patcher, conds, options)
        comfy.samplers.filter_registered_hooks_on_conds(conds, options)
        return expert

    def _conds(self, conds: dict, index: int) -> dict:
        intervals = self.routing.router.intervals
        return {name: [cond.copy() for cond in of_expert(entries, index, intervals)] for name, entries in conds.items()}

    def _prepare(self, index: int) -> None:
        """What CFGGuider does for its own model before the first step, for another one."""
        call = self.call
        expert = self.prepared[index] = self._expert(index)  # known to `close` from here on
        noise, latent, device = call["noise"], call["latent_image"], expert.patcher.load_device
        expert.load(noise.shape)
        comfy.samplers.cast_to_load_options(expert.options, device=device, dtype=expert.patcher.model_dtype())
        expert.patcher.pre_run()
        expert.inner_model.latent_shapes = call.get("latent_shapes")

        noise = noise.to(device=device, dtype=torch.float32)
        latent = latent.to(device=device, dtype=torch.float32)
        if torch.count_nonzero(latent) > 0:
            latent = expert.inner_model.process_latent_in(latent)
        expert.conds = comfy.samplers.process_conds(
            expert.inner_model, noise, expert.conds, device, latent, call.get("denoise_mask"), call.get("seed"),
            latent_shapes=call.get("latent_shapes"),
        )  # fmt: skip

    def close(self) -> None:
        """After the run, finished or not. The guider cleans up what it prepared: the first expert and the primary."""
        if self.prefetched is not None:
            self.prefetched.wait()
        self.guider.model_patcher = self.primary
        for index, expert in self.prepared.items():
            expert.close(cleaned=index == self.first, is_primary=index == 0)
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

    def close(self, cleaned: bool, is_primary: bool) -> None:
        """cleaned: the guider has called the patcher's cleanup. The guider also restores the primary's options and hooks."""
        if not cleaned:
            self.patcher.cleanup()
        comfy.sampler_helpers.cleanup_models(self.conds, self.additional)
        if not is_primary:
            comfy.samplers.cast_to_load_options(self.options, device=self.patcher.offload_device)
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
