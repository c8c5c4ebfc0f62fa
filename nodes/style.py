"""Style: pictures whose look is wanted."""

from comfy_api.latest import io

from . import comfy_bridge as bridge


class EncodeStyle(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="EDiffI_EncodeStyle",
            display_name="eDiff-I Encode Style",
            category="eDiff-I/style",
            description="Encodes pictures whose look is wanted, whole or cropped. CLIP sees squares, and CLIP Vision Encode "
            "would squash or crop anything else.",
            search_aliases=["clip vision encode", "reference image", "image prompt", "style reference"],
            inputs=[
                io.ClipVision.Input(
                    "clip_vision",
                    tooltip="The CLIP image encoder that the MODEL was trained with: of eDiff-I Load Encoders, or of Load CLIP "
                    "Vision for unCLIP models and Redux.",
                ),
                io.Image.Input(
                    "image",
                    tooltip="The picture, of any size and shape. Several in a batch are one style, the mean of their looks.",
                ),
                io.Combo.Input(
                    "fit",
                    options=list(bridge.FITS),
                    tooltip="whole: all of the picture, with sides in the color of its edges where it is no square. crop: the "
                    "square in its middle.",
                ),
            ],
            outputs=[
                io.ClipVisionOutput.Output(
                    "clip_vision_output", tooltip="For eDiff-I Style Image, or any node that takes it."
                )
            ],
        )

    @classmethod
    def execute(cls, clip_vision, image, fit: str) -> io.NodeOutput:
        return io.NodeOutput(bridge.encode_style(clip_vision, image, fit))


class StyleImage(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="EDiffI_StyleImage",
            display_name="eDiff-I Style Image",
            category="eDiff-I/style",
            description="Adds the look of a picture to a prompt, for eDiff-I, unCLIP models, and Flux with Redux. Several in a "
            "row mix several pictures.",
            search_aliases=["style transfer", "unclip conditioning", "apply style model", "redux", "ip adapter"],
            inputs=[
                io.Conditioning.Input(
                    "conditioning",
                    tooltip="The prompt. Leave this node out of the negative: guidance then leads towards the style too.",
                ),
                io.ClipVisionOutput.Input(
                    "clip_vision_output", tooltip="Of eDiff-I Encode Style or CLIP Vision Encode."
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=3.0,
                    step=0.05,
                    round=False,
                    tooltip="0 is no style, 1 as the MODEL was trained; more is more than it has learned. Where several are "
                    "mixed, each counts by its strength.",
                ),
                io.Float.Input(
                    "start_sigma",
                    default=bridge.HIGHEST,
                    min=0.0,
                    max=bridge.HIGHEST,
                    step=0.01,
                    round=False,
                    optional=True,
                    advanced=True,
                    tooltip="The style begins at this noise level of the MODEL, which for Flux and other flow models lies "
                    "between 1 and 0. Without the first levels, the style leaves the layout to the prompt.",
                ),
                io.Float.Input(
                    "end_sigma",
                    default=0.0,
                    min=0.0,
                    max=bridge.HIGHEST,
                    step=0.01,
                    round=False,
                    optional=True,
                    advanced=True,
                    tooltip="The style ends at this noise level.",
                ),
                io.StyleModel.Input(
                    "style_model",
                    optional=True,
                    tooltip="Redux, for Flux. eDiff-I and unCLIP models need none.",
                ),
            ],
            outputs=[io.Conditioning.Output("conditioning", tooltip="The prompt with its style, for positive.")],
        )

    @classmethod
    def execute(
        cls, conditioning, clip_vision_output, strength: float, start_sigma: float = bridge.HIGHEST, end_sigma: float = 0.0,
        style_model=None,
    ) -> io.NodeOutput:  # fmt: skip
        styled = bridge.with_style(conditioning, clip_vision_output, strength, start_sigma, end_sigma, style_model)
        return io.NodeOutput(styled)


NODES = [EncodeStyle, StyleImage]
