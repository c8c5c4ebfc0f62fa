"""Regions: paint where a phrase of the prompt should appear, bind phrases to masks, and make any MODEL obey."""

from comfy_api.latest import io, ui

from . import comfy_bridge as bridge

OCCURRENCE = "Which occurrence of the phrase in the prompt, counted from 1. 0 takes every one."
STRENGTH = "How strongly this phrase is drawn to its region. Small things want more than 1, backgrounds less."


class PaintWithWords(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="EDiffI_PaintWithWords",
            has_intermediate_output=True,  # what it shows is sent again when the run is cached
            display_name="eDiff-I Paint With Words",
            category="eDiff-I/regions",
            description="Paint where phrases of the prompt should appear. One prompt, any number of regions, no training.",
            search_aliases=[
                "paint with words",
                "regional prompt",
                "region",
                "area prompt",
                "segmentation",
                "composition",
            ],
            inputs=[
                io.Clip.Input("clip", tooltip="The text encoder of the MODEL that will sample."),
                io.String.Input(
                    "text",
                    multiline=True,
                    dynamic_prompts=True,
                    tooltip="The prompt. Its words appear above the canvas: choose some of them and paint where they belong.",
                ),
                io.Int.Input(
                    "width",
                    default=512,
                    min=16,
                    max=16384,
                    step=8,
                    tooltip="Of the picture, in pixels: the shape of the canvas. A painting is never resampled when it changes.",
                ),
                io.Int.Input("height", default=512, min=16, max=16384, step=8, tooltip="Of the picture, in pixels."),
                io.String.Input(
                    "painting",
                    default="",
                    optional=True,
                    socketless=True,
                    extra_dict={"widgetType": "EDIFFI_PAINTING"},
                    tooltip="The painting. It is saved in the workflow, and so in every picture made with it.",
                ),
                io.Image.Input("image", optional=True, tooltip="A picture to paint over. It is shown and not used."),
            ],
            outputs=[
                io.Conditioning.Output(
                    "conditioning",
                    tooltip="The prompt with its regions. MODELs other than eDiff-I need Apply Paint With Words.",
                ),
                io.Mask.Output("masks", tooltip="One for each painted phrase, in the order of the table."),
                io.Image.Output("legend", tooltip="The regions in their colours, with their phrases."),
            ],
        )

    @classmethod
    def execute(cls, clip, text: str, width: int, height: int, painting: str = "", image=None) -> io.NodeOutput:
        conditioning, masks, legend, report = bridge.paint(clip, text, width, height, painting)
        report["reference"] = None if image is None else ui.PreviewImage(image[:1], cls=cls).as_dict()["images"][0]
        return io.NodeOutput(conditioning, masks, legend, ui={"ediffi_painting": [report]})


class BindPhrase(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="EDiffI_BindPhrase",
            display_name="eDiff-I Bind Phrase",
            category="eDiff-I/regions",
            description="Binds a phrase of the prompt to a mask of any other node. Several in a row bind several.",
            search_aliases=["phrase mask", "regional prompt", "mask to words", "attention mask"],
            inputs=[
                io.Conditioning.Input(
                    "conditioning",
                    tooltip="A prompt that remembers its words: from eDiff-I Text Encode or Paint With Words.",
                ),
                io.Mask.Input(
                    "mask",
                    tooltip="Where the phrase should appear, of any size; soft edges count. One, or one for each image.",
                ),
                io.String.Input("phrase", tooltip="Words of the prompt, as they stand there. Capitals do not matter."),
                io.Float.Input("strength", default=1.0, min=0.0, max=100.0, step=0.05, round=False, tooltip=STRENGTH),
                io.Int.Input("occurrence", default=0, min=0, max=100, tooltip=OCCURRENCE),
            ],
            outputs=[io.Conditioning.Output("conditioning", tooltip="The prompt with one more region.")],
        )

    @classmethod
    def execute(cls, conditioning, mask, phrase: str, strength: float, occurrence: int) -> io.NodeOutput:
        return io.NodeOutput(bridge.bind(conditioning, [(phrase, occurrence or None, mask, strength)]))


class BindColorMap(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="EDiffI_BindColorMap",
            display_name="eDiff-I Bind Color Map",
            category="eDiff-I/regions",
            description="Binds phrases of the prompt to the colors of a picture, drawn in any program.",
            search_aliases=["color map", "segmentation map", "color to mask", "regional prompt"],
            inputs=[
                io.Conditioning.Input(
                    "conditioning",
                    tooltip="A prompt that remembers its words: from eDiff-I Text Encode or Paint With Words.",
                ),
                io.Image.Input("image", tooltip="The color map, of any size. Its first picture is used."),
                io.String.Input(
                    "colors",
                    multiline=True,
                    default="#ff0000 = red circle\n#0000ff = blue square",
                    tooltip="One line for each color: #rrggbb = phrase.",
                ),
                io.Float.Input(
                    "tolerance",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Each pixel belongs to the nearest color of the list. Farther than this from all, to none; 1 "
                    "leaves no pixel out, as soft edges and JPEG want it.",
                ),
            ],
            outputs=[io.Conditioning.Output("conditioning", tooltip="The prompt with a region for each color.")],
        )

    @classmethod
    def execute(cls, conditioning, image, colors: str, tolerance: float) -> io.NodeOutput:
        return io.NodeOutput(bridge.bind_colors(conditioning, image[0], colors, tolerance))


class ApplyPaintWithWords(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="EDiffI_ApplyPaintWithWords",
            display_name="eDiff-I Apply Paint With Words",
            category="eDiff-I/regions",
            description="Makes a MODEL obey the painted regions of its conditioning, by the attention between picture and "
            "words. eDiff-I ensembles do so by themselves; here their weight is set.",
            search_aliases=["paint with words", "regional attention", "attention couple", "cross attention bias"],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="eDiff-I, SD1.5, SD2, SDXL, Wan, Flux, Chroma, SD3, Qwen-Image, or an ensemble of them.",
                ),
                io.Float.Input(
                    "weight",
                    default=0.4,
                    min=0.0,
                    max=100.0,
                    step=0.05,
                    round=False,
                    tooltip="The w' of the paper. 0 is off; raise it until things lie where they were painted.",
                ),
                io.Combo.Input(
                    "scale",
                    options=list(bridge.SCALES),
                    tooltip="What the weight is measured by in each layer: the largest score, as in the paper, or their "
                    "standard deviation. The same weight does not mean the same with both.",
                ),
                io.Float.Input(
                    "start_sigma",
                    default=100000.0,
                    min=0.0,
                    max=100000.0,
                    step=0.01,
                    round=False,
                    advanced=True,
                    tooltip="From this noise level on. For flow models it is t / (1 - t).",
                ),
                io.Float.Input(
                    "end_sigma",
                    default=0.0,
                    min=0.0,
                    max=100000.0,
                    step=0.01,
                    round=False,
                    advanced=True,
                    tooltip="Down to this noise level. The weight fades with the noise by itself.",
                ),
            ],
            outputs=[io.Model.Output("model", tooltip="For any sampler.")],
        )

    @classmethod
    def execute(cls, model, weight, scale, start_sigma, end_sigma) -> io.NodeOutput:
        return io.NodeOutput(bridge.obey_paint(model, weight, scale, start_sigma, end_sigma))


NODES = [PaintWithWords, BindPhrase, BindColorMap, ApplyPaintWithWords]
