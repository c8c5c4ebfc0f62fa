"""Prompts: load the encoders, encode text."""

import folder_paths
from comfy_api.latest import io

from . import comfy_bridge as bridge


class LoadEncoders(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="EDiffI_LoadEncoders",
            display_name="eDiff-I Load Encoders",
            category="eDiff-I/text",
            description="Loads the T5 and CLIP that an ensemble was trained with.",
            search_aliases=["ediffi text encoder", "load t5 and clip", "ediffi clip loader"],
            inputs=[
                io.Combo.Input(
                    "encoders",
                    options=list(bridge.entries("ediffi_encoders")),
                    tooltip="A folder in models/ediffi_encoders, or one that comes with the pack. Take the encoders that "
                    "the ensemble was trained with.",
                ),
            ],
            outputs=[
                io.Clip.Output("clip", tooltip="T5 and CLIP text, for eDiff-I Text Encode and CLIP Text Encode."),
                io.ClipVision.Output("clip_vision", tooltip="CLIP image, for CLIP Vision Encode."),
            ],
        )

    @classmethod
    def execute(cls, encoders: str) -> io.NodeOutput:
        embeddings = folder_paths.get_folder_paths("embeddings")
        return io.NodeOutput(*bridge.load_encoders(bridge.entry("ediffi_encoders", encoders), embeddings))


class CombineEncoders(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="EDiffI_CombineEncoders",
            display_name="eDiff-I Combine Encoders",
            category="eDiff-I/text",
            description="Makes eDiff-I's CLIP of a T5 and a CLIP-L that other loaders loaded, such as those of Flux and SD3.",
            search_aliases=["t5xxl and clip_l", "dual clip", "ediffi text encoder", "merge t5 and clip"],
            inputs=[
                io.Clip.Input(
                    "t5",
                    tooltip="A CLIP with a T5: Load CLIP with t5xxl_fp16.safetensors or a smaller version of it, or "
                    "DualCLIPLoader with both files, which then goes to both inputs.",
                ),
                io.Clip.Input("clip", tooltip="A CLIP with a CLIP-L: Load CLIP with clip_l.safetensors."),
            ],
            outputs=[
                io.Clip.Output("clip", tooltip="T5 and CLIP text, for eDiff-I Text Encode and CLIP Text Encode."),
            ],
        )

    @classmethod
    def execute(cls, t5, clip) -> io.NodeOutput:
        return io.NodeOutput(bridge.combine_encoders(t5, clip))


class TextEncode(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="EDiffI_TextEncode",
            has_intermediate_output=True,  # what it shows is sent again when the run is cached
            display_name="eDiff-I Text Encode",
            category="eDiff-I/text",
            description="Encodes a prompt with T5 and CLIP. The result remembers its words, for painting with them.",
            search_aliases=["ediffi prompt", "clip text encode", "t5 encode"],
            inputs=[
                io.Clip.Input("clip", tooltip="The encoders of eDiff-I or of any other model."),
                io.String.Input(
                    "text",
                    multiline=True,
                    dynamic_prompts=True,
                    tooltip="The prompt. Leave it empty for the negative of the paper's guidance: no text at all. "
                    "(word:1.3) gives a word more weight.",
                ),
                io.Boolean.Input(
                    "use_t5",
                    default=True,
                    tooltip="Let T5 read the prompt. It is the better at composition: how many things, where, with what. Off: "
                    "as if it was not there; T5s of other models, such as SD3 and Flux, read an empty prompt instead.",
                ),
                io.Boolean.Input(
                    "use_clip",
                    default=True,
                    tooltip="Let CLIP read the prompt. It is the better at what the main thing looks like. Off: as if it was "
                    "not there; CLIPs of other models read an empty prompt instead.",
                ),
                io.Int.Input(
                    "t5_length",
                    default=0,
                    min=0,
                    max=4096,
                    optional=True,
                    advanced=True,
                    tooltip="Tokens that T5 reads at most, its end token included. 0 is the model's own: 113 for eDiff-I. More "
                    "reads on in a long prompt, farther than the ensemble was trained; less cuts it sooner. T5s of other models "
                    "read all of a prompt: there it is the length that short prompts are padded to.",
                ),
            ],
            outputs=[io.Conditioning.Output("conditioning", tooltip="The prompt, which remembers its words.")],
        )

    @classmethod
    def execute(cls, clip, text: str, use_t5: bool, use_clip: bool, t5_length: int = 0) -> io.NodeOutput:
        conditioning, found = bridge.encode_text(clip, text, use_t5, use_clip, t5_length)
        return io.NodeOutput(conditioning, ui=bridge.shown_tokens(found))


class DropEmbeddings(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="EDiffI_DropEmbeddings",
            display_name="eDiff-I Drop Embeddings",
            category="eDiff-I/text",
            description="A CONDITIONING without its text or without its style, so that guidance pulls on one of them alone.",
            search_aliases=["unconditional", "null conditioning", "text and style guidance", "dual cfg", "drop style"],
            inputs=[
                io.Conditioning.Input("conditioning", tooltip="A prompt, with or without a style."),
                io.Combo.Input(
                    "drop",
                    options=list(bridge.DROPS),
                    default="text",
                    tooltip="As the negative of any sampler: text leaves only the text to be guided, image only the style, "
                    "all is the paper's. Of other models' CONDITIONINGs only the style can be dropped.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(
                    "conditioning", tooltip="For a negative, or for cond2 and negative of Dual CFG Guider."
                )
            ],
        )

    @classmethod
    def execute(cls, conditioning, drop: str) -> io.NodeOutput:
        return io.NodeOutput(bridge.dropped(conditioning, drop))


NODES = [LoadEncoders, CombineEncoders, TextEncode, DropEmbeddings]
