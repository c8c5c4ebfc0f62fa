"""Experts: load an ensemble, make one of any MODELs, give each expert its own conditioning, see who denoises what."""

import torch
from comfy_api.latest import io

from ..ediffi_core.intervals import NoiseDistribution, paper_split
from . import comfy_bridge as bridge

MOST = 6  # experts of one ensemble
OWN = "own boundaries"
# boundaries that the makers of a model document: name -> (unit, boundaries from high to low noise, of flow models?)
PRESETS = {
    # eDiff-I, Sec. 4.1 and 5.1: E^9_511 and E^3_0, the parts of its base stage; E^1_1 and E^1_0, of the next
    "eDiff-I base": ("sigma", tuple(round(interval.low, 6) for interval in paper_split()[:2]), False),
    "eDiff-I super-resolution 256": ("sigma", (round(NoiseDistribution().interval(1, 1).low, 6),), False),
    # the refiner was trained on the lowest 200 of 1000 noise levels (Podell et al. 2023, Sec. 2.5)
    "SDXL base + refiner": ("timestep", (200.0,), False),
    # `boundary` of the configurations that Wan 2.2 was released with
    "Wan 2.2 text to video": ("sigma", (0.875,), True),
    "Wan 2.2 image to video": ("sigma", (0.9,), True),
}


class LoadEnsemble(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="EDiffI_LoadEnsemble",
            display_name="eDiff-I Load Ensemble",
            category="eDiff-I/experts",
            description="Loads an ensemble of expert denoisers as one MODEL: at each noise level its expert works.",
            search_aliases=["ediffi", "ediff-i", "expert denoisers", "ensemble of experts", "load ediffi model"],
            inputs=[
                io.Combo.Input(
                    "ensemble",
                    options=list(bridge.entries("ediffi")),
                    tooltip="A folder in models/ediffi that holds ensemble.json, or one that comes with the pack.",
                ),
            ],
            outputs=[
                io.Model.Output("model", tooltip="All experts, for any sampler node, LoRA or patch."),
                io.Vae.Output("vae", tooltip="Pixel space: turns the sampled LATENT into an IMAGE without loss."),
            ],
        )

    @classmethod
    def execute(cls, ensemble: str) -> io.NodeOutput:
        return io.NodeOutput(bridge.load_ensemble(bridge.entry("ediffi", ensemble)), bridge.pixel_vae())


class ExpertEnsemble(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="EDiffI_ExpertEnsemble",
            has_intermediate_output=True,  # what it shows is sent again when the run is cached
            display_name="eDiff-I Expert Ensemble",
            category="eDiff-I/experts",
            description="Joins MODELs to one that any sampler runs like a single model: the noise level of each call decides "
            "which expert denoises.",
            search_aliases=[
                "expert ensemble",
                "wan 2.2 high low noise",
                "sdxl refiner",
                "mixture of experts",
                "moe",
                "switch model",
            ],
            inputs=[
                io.Combo.Input(
                    "unit",
                    options=list(bridge.UNITS),
                    tooltip="Of the boundaries below. sigma: the noise level itself. percent: how much of the sampling is done, "
                    "0 to 1. timestep: of the training schedule, often 0 to 1000. They are shown as sigma after a run.",
                ),
                io.DynamicCombo.Input(
                    "experts",
                    options=[io.DynamicCombo.Option(str(count), cls.inputs_of(count)) for count in range(2, MOST + 1)],
                    tooltip="How many. They are connected from high to low noise, in the order in which sampling meets them.",
                ),
                io.Combo.Input(
                    "preset",
                    options=[OWN, *PRESETS],
                    optional=True,
                    tooltip="The boundaries that the makers of a model document; they replace unit and boundaries above.",
                ),
            ],
            outputs=[io.Model.Output("model", tooltip="All experts, for any sampler node, LoRA or patch.")],
        )

    @staticmethod
    def inputs_of(count: int) -> list[io.Input]:
        boundaries = default_boundaries(count)
        inputs = []
        for number in range(1, count + 1):
            place = "highest noise" if number == 1 else "lowest noise" if number == count else "next lower noise"
            inputs.append(io.Model.Input(f"expert_{number}", tooltip=f"The MODEL for the {place}, with its own LoRAs."))
            if number < count:
                inputs.append(
                    io.Float.Input(
                        f"boundary_{number}",
                        default=boundaries[number - 1],
                        min=0.0,
                        max=100000.0,
                        step=0.001,
                        round=False,
                        tooltip=f"Where expert_{number} hands over to expert_{number + 1}, in the unit above. A call exactly "
                        f"there still goes to expert_{number}.",
                    )
                )
        for number in range(1, count + 1):
            inputs.append(
                io.Float.Input(
                    f"cfg_{number}",
                    default=-1.0,
                    min=-1.0,
                    max=100.0,
                    step=0.1,
                    round=0.01,
                    tooltip=f"The guidance while expert_{number} denoises. -1 takes the cfg of the sampler.",
                )
            )
        return inputs

    @classmethod
    def execute(cls, unit: str, experts: dict, preset: str = OWN) -> io.NodeOutput:
        count = int(experts["experts"])
        models = [experts[f"expert_{number}"] for number in range(1, count + 1)]
        cfgs = [experts.get(f"cfg_{number}", -1.0) for number in range(1, count + 1)]
        boundaries = [experts[f"boundary_{number}"] for number in range(1, count)]
        if preset != OWN:
            unit, boundaries, flow = PRESETS[preset]
            if len(boundaries) + 1 != count:
                raise ValueError(
                    f"The preset {preset!r} is for {len(boundaries) + 1} experts, but {count} are connected. Set experts to "
                    f"{len(boundaries) + 1}, or the preset to {OWN!r}."
                )
            if bridge.is_flow(models[0]) != flow:
                kind = "a flow model" if flow else "a diffusion model"
                raise ValueError(f"The preset {preset!r} is for {kind}, which expert_1 is not. Choose {OWN!r}.")
        model = bridge.join(models, unit, boundaries, [None if cfg < 0 else cfg for cfg in cfgs])
        return io.NodeOutput(model, ui=bridge.shown(bridge.timeline(model)))


def default_boundaries(count: int) -> list[float]:
    """The paper's split for three experts, else parts of its noise distribution of equal probability (eDiff-I, Sec. 4.1)."""
    if count == 3:
        edges = [interval.low for interval in paper_split()[:2]]
    else:
        edges = NoiseDistribution().quantile(torch.arange(count - 1, 0, -1) / count).tolist()
    return [round(edge, 4) for edge in edges]


class ExpertConditioning(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        names = [f"expert_{number}" for number in range(1, MOST + 1)]
        socket = io.Conditioning.Input("conditioning", tooltip="What this expert is told, from high to low noise.")
        return io.Schema(
            node_id="EDiffI_ExpertConditioning",
            display_name="eDiff-I Expert Conditioning",
            category="eDiff-I/experts",
            description="One CONDITIONING that tells each expert of an ensemble something of its own: another prompt, or "
            "another encoder's, as the refiner of SDXL needs.",
            search_aliases=["prompt per expert", "prompt switch", "refiner prompt", "conditioning per expert"],
            inputs=[
                io.Autogrow.Input(
                    "conditionings",
                    template=io.Autogrow.TemplateNames(socket, names=names, min=2),
                    tooltip="One for each expert of the ensemble, from high to low noise.",
                ),
            ],
            outputs=[io.Conditioning.Output("conditioning", tooltip="For positive or negative of any sampler.")],
        )

    @classmethod
    def execute(cls, conditionings: dict) -> io.NodeOutput:
        names = [f"expert_{number}" for number in range(1, len(conditionings) + 1)]
        for name in names:
            if name not in conditionings:
                raise ValueError(f"{name} is not connected, but a later expert is. Connect the experts without a gap.")
        return io.NodeOutput(bridge.for_experts([conditionings[name] for name in names]))


class EnsembleTimeline(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="EDiffI_EnsembleTimeline",
            display_name="eDiff-I Ensemble Timeline",
            category="eDiff-I/experts",
            description="Draws which expert denoises which step: noise levels from high to low, experts as bands, steps as "
            "marks.",
            search_aliases=["expert timeline", "sigma plot", "schedule plot", "which expert"],
            inputs=[
                io.Model.Input("model", tooltip="An ensemble. Any other MODEL is drawn as one band."),
                io.Sigmas.Input(
                    "sigmas", tooltip="The schedule, from BasicScheduler or another node that gives SIGMAS."
                ),
                io.Int.Input("width", default=1024, min=320, max=4096, step=8, tooltip="Of the picture, in pixels."),
                io.Int.Input("height", default=384, min=160, max=4096, step=8, tooltip="Of the picture, in pixels."),
            ],
            outputs=[io.Image.Output("image", tooltip="The picture, for Preview Image or Save Image.")],
        )

    @classmethod
    def execute(cls, model, sigmas, width: int = 1024, height: int = 384) -> io.NodeOutput:
        return io.NodeOutput(bridge.draw(bridge.timeline(model, sigmas), width, height)[None])


NODES = [LoadEnsemble, ExpertEnsemble, ExpertConditioning, EnsembleTimeline]
