"""Experts: load an ensemble."""

from comfy_api.latest import io

from . import comfy_bridge as bridge


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


NODES = [LoadEnsemble]
