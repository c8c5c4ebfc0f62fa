"""Which expert denoises what: from MODELs and schedules to the picture in the core, and to the strip on the canvas."""

import math

import comfy.model_patcher
import comfy.model_sampling
import torch
from comfy_execution.utils import get_executing_context
from torch import Tensor

from ..ediffi_core.intervals import EVERYTHING, NoiseInterval
from ..ediffi_core.timeline import Band, Timeline, draw
from .bridge_routing import route, routing_of

__all__ = ["UNITS", "announce", "draw", "is_flow", "join", "shown", "timeline"]

Patcher = comfy.model_patcher.ModelPatcher
UNITS = ("sigma", "percent", "timestep")
EVENT = "ediffi.timeline"  # web/timeline.js listens to it
OUTPUT = "ediffi_timeline"  # and reads this among a node's outputs


def join(models: list[Patcher], unit: str, boundaries: list[float], cfgs: list[float | None]) -> Patcher:
    """One MODEL from `models` and the boundaries between neighbours, both from high to low noise.

    Raises ValueError for boundaries that do not fall, or lie outside the noise of the MODELs.
    """
    sampling = models[0].get_model_object("model_sampling")
    low, high = sigma_range(models[0])
    edges = []
    for number, value in enumerate(boundaries, 1):
        edge = in_sigma(sampling, unit, value)
        said = f"boundary_{number} is sigma {edge:g}" + (f" ({unit} {value:g})" if unit != "sigma" else "")
        if not low < edge < high:
            raise ValueError(
                f"{said}, but the noise of these MODELs runs from sigma {high:g} down to {low:g}, so one side of it would "
                f"have nothing to do. Move it, or look at the unit."
            )
        if edges and edge >= edges[-1]:
            raise ValueError(
                f"{said}, which does not lie below boundary_{number - 1} at sigma {edges[-1]:g}. Experts are connected from "
                f"high to low noise: exchange the two boundaries, and their experts."
            )
        edges.append(edge)
    tops, bottoms = [math.inf, *edges], [*edges, 0.0]
    intervals = [NoiseInterval(bottom, top) for bottom, top in zip(bottoms, tops, strict=True)]
    return route(list(zip(intervals, models, strict=True)), cfgs=cfgs)


def in_sigma(sampling, unit: str, value: float) -> float:
    """A boundary as sigma. sampling: the `model_sampling` of a MODEL. Raises ValueError for an unknown unit."""
    if unit == "sigma":
        return value
    if unit == "percent":
        return float(sampling.percent_to_sigma(value))
    if unit != "timestep":
        raise ValueError(f"The unit of a boundary is one of {', '.join(UNITS)}, got {unit!r}.")
    timestep = torch.tensor(value, dtype=torch.float32)
    if not isinstance(sampling, comfy.model_sampling.CONST):
        return float(sampling.sigma(timestep))
    # a flow model's `sigma` also shifts; what its network is told is the timestep of the sigma after that
    return value / float(sampling.timestep(torch.tensor(1.0)))


def is_flow(model: Patcher) -> bool:
    return isinstance(model.get_model_object("model_sampling"), comfy.model_sampling.CONST)


def sigma_range(model: Patcher) -> tuple[float, float]:
    """Lowest and highest noise level of a MODEL."""
    sampling = model.get_model_object("model_sampling")
    return float(sampling.sigma_min), float(sampling.sigma_max)


def timeline(model: Patcher, sigmas: Tensor | None = None) -> Timeline:
    """The experts of a MODEL and the steps of a schedule (S + 1,); a MODEL that is no ensemble is one expert."""
    routing = routing_of(model)
    if routing is None:
        bands = (Band("one model", EVERYTHING, None),)
    else:
        named = zip(routing.names, routing.router.intervals, routing.cfgs, strict=True)
        bands = tuple(Band(name, interval, cfg) for name, interval, cfg in named)
    levels = () if sigmas is None else tuple(sigmas.tolist())
    return Timeline(bands, levels, sigma_range(model))


def shown(timeline: Timeline) -> dict:
    """What a node returns as `ui` for the strip under its widgets."""
    return {OUTPUT: [timeline.as_dict()]}


def executing():
    """(server, id of the node that is executing), or None where no server runs: tests, or ComfyUI as a library."""
    context = get_executing_context()
    try:
        from server import PromptServer

        server = PromptServer.instance
    except (ImportError, AttributeError):
        return None
    return None if context is None or server is None else (server, context.node_id)


def announce(timeline: Timeline) -> None:
    """Tell the canvas, before a run begins, which expert will denoise which step of the node that is executing."""
    if now := executing():
        server, node = now
        data = {"node": node, "timeline": timeline.as_dict()}
        server.send_sync(EVENT, data, server.client_id)
