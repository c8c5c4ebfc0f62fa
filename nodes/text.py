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


class TextEncode(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="EDiffI_TextEncode",
            display_name="eDiff-I Text Encode",
            category="eDiff-I/text",
            description="Encodes a prompt with T5 and CLIP. The result remembers its words, for painting with them.",
            search_aliases=["ediffi prompt", "clip text encode", "t5 encode"],
            inputs=[
                io.Clip.Input("clip", tooltip="The encoders. CLIPs of other loaders work as in CLIP Text Encode."),
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
                    tooltip="Let T5 read the prompt. It is the better at composition: how many things, where, with what.",
                ),
                io.Boolean.Input(
                    "use_clip",
                    default=True,
                    tooltip="Let CLIP read the prompt. It is the better at what the main thing looks like.",
                ),
            ],
            outputs=[io.Conditioning.Output("conditioning")],
        )

    @classmethod
    def execute(cls, clip, text: str, use_t5: bool, use_clip: bool) -> io.NodeOutput:
        conditioning, cut = bridge.encode_text(clip, text, use_t5, use_clip)
        return io.NodeOutput(conditioning, ui={"text": list(cut)} if cut else None)


NODES = [LoadEncoders, TextEncode]
