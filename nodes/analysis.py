"""Analysis: where the picture looks while it is made."""

from comfy_api.latest import io

from . import comfy_bridge as bridge

MAPS = io.Custom("EDIFFI_ATTENTION_MAPS")


class AttentionMaps(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="EDiffI_AttentionMaps",
            display_name="eDiff-I Attention Maps",
            category="eDiff-I/analysis",
            description="Notes, while a MODEL samples, where the picture looks at phrases of the prompt. It changes nothing.",
            search_aliases=["attention maps", "cross attention", "attention heat map", "daam", "explain"],
            inputs=[
                io.Model.Input("model", tooltip="eDiff-I, SD1.5, SD2, SDXL, Wan, Flux, Chroma, SD3, Qwen-Image."),
                io.Conditioning.Input(
                    "conditioning",
                    tooltip="The prompt that the sampler gets, from eDiff-I Text Encode or Paint With Words.",
                ),
                io.String.Input(
                    "phrases",
                    multiline=True,
                    tooltip="Words of the prompt to look for, one phrase a line. Empty takes the painted ones.",
                ),
                io.Int.Input(
                    "levels", default=6, min=1, max=64, tooltip="How many steps to note, spread over the run."
                ),
            ],
            outputs=[
                io.Model.Output("model", tooltip="For the sampler."),
                MAPS.Output("maps", tooltip="Filled by the sampler: for Draw Attention Maps."),
            ],
        )

    @classmethod
    def execute(cls, model, conditioning, phrases: str, levels: int) -> io.NodeOutput:
        return io.NodeOutput(*bridge.attention_maps(model, conditioning, phrases, levels))


class DrawAttentionMaps(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="EDiffI_DrawAttentionMaps",
            display_name="eDiff-I Draw Attention Maps",
            category="eDiff-I/analysis",
            description="Draws what Attention Maps noted: a row for each phrase, a column for each noise level.",
            search_aliases=["attention maps", "heat map"],
            inputs=[
                MAPS.Input("maps", tooltip="From eDiff-I Attention Maps."),
                io.Latent.Input("latent", tooltip="From the sampler, so that this is drawn after it has run."),
                io.Image.Input("image", optional=True, tooltip="The finished picture, to lay the maps over."),
                io.Int.Input(
                    "cell", default=160, min=32, max=1024, step=8, tooltip="The longer side of each map, in pixels."
                ),
            ],
            outputs=[io.Image.Output("image", tooltip="The grid, for Preview Image or Save Image.")],
        )

    @classmethod
    def execute(cls, maps, latent, image=None, cell: int = 160) -> io.NodeOutput:
        return io.NodeOutput(bridge.draw_attention_maps(maps, None if image is None else image[0], cell)[None])


NODES = [AttentionMaps, DrawAttentionMaps]
