"""What is on the canvas of the example workflows of encoders and styles, in the terms of graphs.py."""

from .graphs import Columns, Node, checkpoint, decode, empty_image, encode, hugging_face, loaders, note, sampler, save
from .painting_graphs import DEMO as PAINTED
from .painting_graphs import FLUX, legend, obey, stock_sampler

REDUX = hugging_face(
    "flux1-redux-dev.safetensors", "style_models", "black-forest-labs/FLUX.1-Redux-dev", "FLUX.1 [dev] Non-Commercial"
)
SIGCLIP = hugging_face(
    "sigclip_vision_patch14_384.safetensors", "clip_vision", "Comfy-Org/sigclip_vision_384", "Apache 2.0"
)
T5_XXL = hugging_face("t5xxl_fp16.safetensors", "text_encoders", "comfyanonymous/flux_text_encoders", "Apache 2.0")
CLIP_L = hugging_face("clip_l.safetensors", "text_encoders", "comfyanonymous/flux_text_encoders", "MIT")

ENCODERS_PROMPT = "a large red circle on the left and a small blue square on the right, on a white background"
PROMPT = "a large red circle in the center on a white background"
PAINT = next(column["paint"] for column in PAINTED if "paint" in column)
SEED = 10


def color(title: str, value: int, width: int, height: int) -> Node:
    return Node("EmptyImage", {"width": width, "height": height, "color": value}, title=title, size=(240, 0))


def below(title: str, upper: str, lower: str) -> Node:
    return Node("ImageStitch", {"direction": "down"}, {"image1": upper, "image2": lower}, title, (240, 0))


def reference() -> Columns:
    """A striped square on gray, as the demo family's world draws it, by stock nodes."""
    return (
        {
            "light": color("Light stripe", 0x1FA02F, 176, 22),
            "dark": color("Dark stripe", 0x11581A, 176, 22),
            "gray": color("Background", 0x909090, 512, 512),
        },
        {
            "pair": below("Two stripes", "light", "dark"),
            "four": below("Four", "pair", "pair"),
            "eight": below("Eight", "four", "four"),
            "picture": Node(
                "ImageCompositeMasked",
                {"x": 168, "y": 168},
                {"destination": "gray", "source": "eight"},
                size=(240, 0),
            ),
        },
    )


def shown_reference() -> Node:
    return Node("PreviewImage", {}, {"images": "picture"}, "The reference", (300, 320), thumbnail=True)


def encoded(clip_vision: str = "encoders.clip_vision") -> Node:
    return Node("EDiffI_EncodeStyle", {"fit": "whole"}, {"clip_vision": clip_vision, "image": "picture"}, size=(300, 0))


def style(title: str | None, conditioning: str, **widgets: float) -> Node:
    inputs = {"conditioning": conditioning, "clip_vision_output": "encoded"}
    return Node("EDiffI_StyleImage", widgets, inputs, title, (320, 0))


def side_by_side(names_and_titles: dict[str, str]) -> Columns:
    """A decoded and a saved picture for each sampler of these names."""
    return (
        {f"decode_{name}": decode("ensemble.vae", f"sampler_{name}") for name in names_and_titles},
        {
            f"save_{name}": Node(
                "SaveImage", {"filename_prefix": f"eDiff-I {name}"}, {"images": f"decode_{name}"}, title, (260, 300)
            )
            for name, title in names_and_titles.items()
        },
    )


ENCODERS = (
    {
        "note": note(
            "What each encoder reads",
            "## T5, CLIP, and both\n\n"
            "The experiment of the eDiff-I paper's figure 18: one prompt, one seed, and either encoder switched off on "
            "**eDiff-I Text Encode**. The ensemble was trained with both and with each one missing, so any of them works.\n\n"
            "In the paper T5 alone gets the composition, CLIP alone the main thing, and both together do best. Open the line "
            "below a prompt to see the tokens that its encoders read.\n\n"
            "It needs no files: the demo family comes with the pack.",
            size=(400, 340),
        )
    },
    loaders() | {"empty": empty_image(), "negative": encode("", "Negative: empty is no text at all")},
    {
        name: Node(
            "EDiffI_TextEncode",
            {"text": ENCODERS_PROMPT, "use_t5": t5, "use_clip": clip},
            {"clip": "encoders"},
            title,
            (400, 240),
        )
        for name, title, t5, clip in (
            ("t5", "T5 alone", True, False),
            ("clip", "CLIP alone", False, True),
            ("both", "Both", True, True),
        )
    },
    {
        f"sampler_{name}": sampler(SEED, 12, 3.0, "heun", "edm", model="ensemble", positive=name)
        for name in ("t5", "clip", "both")
    },
    *side_by_side({"t5": "T5 alone", "clip": "CLIP alone", "both": "Both"}),
)

OF_YOUR_OWN = (
    {
        "note": note(
            "Encoders of your own",
            "## T5-XXL and CLIP-L for eDiff-I\n\n"
            "The encoders of the eDiff-I paper, from the files that Flux and SD3 use. **Combine Encoders** makes one CLIP of "
            "both, with the paper's 77 and 113 tokens, for an ensemble that was trained with them. There is none to download: "
            "NVIDIA released no weights, and the demo family has small encoders of its own.\n\n"
            "So nothing is sampled here. Open the line below the prompt to see the tokens that each encoder reads; painted "
            "phrases find theirs.",
            (T5_XXL, CLIP_L),
            (440, 460),
        )
    },
    {
        "t5": Node("CLIPLoader", {"clip_name": T5_XXL.name, "type": "sd3"}, title="T5", size=(360, 0), files=(T5_XXL,)),
        "clip": Node(
            "CLIPLoader",
            {"clip_name": CLIP_L.name, "type": "stable_diffusion"},
            title="CLIP-L",
            size=(360, 0),
            files=(CLIP_L,),
        ),
    },
    {"encoders": Node("EDiffI_CombineEncoders", {}, {"t5": "t5", "clip": "clip"}, size=(300, 0), thumbnail=True)},
    {
        "prompt": Node("EDiffI_TextEncode", {"text": ENCODERS_PROMPT}, {"clip": "encoders"}, "Prompt", (400, 240)),
        "paint": PAINT,
    },
    {
        "read": Node("PreviewAny", {}, {"source": "prompt"}, "What an ensemble would be told", (300, 240)),
        "legend": legend(),
    },
)

FROM_A_REFERENCE = (
    {
        "note": note(
            "Style from a reference",
            "## The look of a picture\n\n"
            "**Encode Style** shows the reference to CLIP, whole or cropped; **Style Image** adds its look to the prompt. What "
            "is in the picture, and where, is still the prompt's. All three pictures start from the same noise.\n\n"
            "1. without a style\n"
            "2. with it; lower **strength** for less of it, 0 is none\n"
            "3. with it from sigma 5 down: above that, where the layout is decided, there is only the prompt\n\n"
            "The reference is drawn by stock nodes, striped as in the world of the demo family; a **Load Image** does as "
            "well. Everything here comes with the pack.",
            size=(400, 400),
        )
    },
    *reference(),
    loaders() | {"shown": shown_reference()},
    {
        "encoded": encoded(),
        "prompt": encode(PROMPT, "Prompt"),
        "negative": encode("", "Negative: empty, and without the style", 140),
        "empty": empty_image(400),
    },
    {
        "whole": style("2. With the style", "prompt", strength=1.0),
        "late": style("3. From sigma 5 down", "prompt", strength=1.0, start_sigma=5.0),
    },
    {  # seed 12, as SEED paints hatched objects with this reference and without
        f"sampler_{name}": sampler(12, 12, 3.0, "heun", "edm", model="ensemble", positive=positive)
        for name, positive in (("none", "prompt"), ("whole", "whole"), ("late", "late"))
    },
    *side_by_side({"none": "1. Without a style", "whole": "2. With the style", "late": "3. From sigma 5 down"}),
)

PAINTED_WITH_STYLE = (
    {
        "note": note(
            "Style and paint with words",
            "## One picture says how, a painting says where\n\n"
            "**Style Image** takes the prompt of **Paint With Words** with its regions. Both act in the same run: the words "
            "look at their places, the network knows the reference.\n\n"
            "The prompt, the painting and the seed are those of **Paint with words**, so the two workflows show what the "
            "style adds. Everything here comes with the pack.",
            size=(400, 320),
        )
    },
    *reference(),
    loaders() | {"shown": shown_reference()},
    {"paint": PAINT},
    {
        "encoded": encoded(),
        "styled": style(None, "paint", strength=1.0),
        "obeys": obey("ensemble", 0.8),
        "negative": encode("", "Negative: empty is no text at all", 140),
        "empty": empty_image(),
        "legend": legend(thumbnail=True),
    },
    {"sampler": sampler(22, 12, 3.0, "heun", "edm", model="obeys", positive="styled")},
    {"decode": decode("ensemble.vae"), "save": save()},
)

APART = {"weak": 1.0, "even": 3.0, "strong": 6.0}  # how strongly the style is guided

GUIDED_APART = (
    {
        "note": note(
            "Text and style guided apart",
            "## Two numbers of guidance\n\n"
            "cfg pulls a picture away from what the network paints without text and style, on both alike. ComfyUI's **Dual "
            "CFG Guider** pulls on each by itself: **cfg_conds** on the text, **cfg_cond2_negative** on the style.\n\n"
            "It compares three conditionings: prompt and style, the style alone, and nothing. **Drop Embeddings** makes the "
            "last two from the first. All pictures have text 3; the style has 1, which saves a third of the work, then 3, "
            "which is plain cfg 3, then 6.\n\n"
            "It needs no files: the demo family comes with the pack.",
            size=(400, 400),
        )
    },
    *reference(),
    loaders() | {"shown": shown_reference(), "empty": empty_image()},
    {
        "encoded": encoded(),
        "prompt": encode(PROMPT, "Prompt"),
        "styled": style("Prompt and style", "prompt", strength=1.0),
    },
    {
        name: Node("EDiffI_DropEmbeddings", {"drop": drop}, {"conditioning": "styled"}, title, (300, 0))
        for name, drop, title in (("style", "text", "The style alone"), ("nothing", "all", "Nothing"))
    }
    | {
        "noise": Node("RandomNoise", {"noise_seed": SEED, "control_after_generate": "fixed"}, size=(300, 0)),
        "heun": Node("KSamplerSelect", {"sampler_name": "heun"}, size=(300, 0)),
        "sigmas": Node(
            "KarrasScheduler",
            {"steps": 12, "sigma_max": 80.0, "sigma_min": 0.002, "rho": 7.0},
            title="EDM's noise levels",
            size=(300, 0),
        ),
    },
    {
        f"guider_{name}": Node(
            "DualCFGGuider",
            {"cfg_conds": 3.0, "cfg_cond2_negative": scale, "style": "regular"},
            {"model": "ensemble", "cond1": "styled", "cond2": "style", "negative": "nothing"},
            f"Text 3, style {scale:g}",
            (300, 0),
        )
        for name, scale in APART.items()
    },
    {
        f"sampler_{name}": Node(
            "SamplerCustomAdvanced",
            {},
            {
                "noise": "noise",
                "guider": f"guider_{name}",
                "sampler": "heun",
                "sigmas": "sigmas",
                "latent_image": "empty",
            },
            f"Text 3, style {scale:g}",
            (280, 0),
        )
        for name, scale in APART.items()
    },
    *side_by_side({name: f"Text 3, style {scale:g}" for name, scale in APART.items()}),
)

ON_FLUX = (
    {
        "note": note(
            "Style with Flux Redux",
            "## A reference for Flux\n\n"
            "Redux turns a picture into 729 tokens beside those of the prompt, and at full strength hardly leaves the prompt a "
            "say. **Style Image** weighs its tokens by **strength**, and lets them in from a noise level on: here from sigma "
            "0.9 down, so that the prompt lays out the picture first. Sigmas of Flux go from 1 to 0.\n\n"
            "**Encode Style** shows CLIP the whole picture; set **fit** to *crop* for its middle.",
            (FLUX, REDUX, SIGCLIP),
            (440, 420),
        )
    },
    {
        "model": checkpoint(FLUX),
        "redux": Node("StyleModelLoader", {"style_model_name": REDUX.name}, size=(400, 0), files=(REDUX,)),
        "vision": Node("CLIPVisionLoader", {"clip_name": SIGCLIP.name}, size=(400, 0), files=(SIGCLIP,)),
        "picture": Node("LoadImage", {"image": "example.png"}, title="The reference", size=(360, 360)),
    },
    {
        "prompt": Node(
            "CLIPTextEncode",
            {"text": "a raccoon in a purple robe reads a glowing book at a round table"},
            {"clip": "model.CLIP"},
            "Prompt",
            (400, 160),
        ),
        "encoded": encoded("vision"),
        "empty": Node("EmptySD3LatentImage", {"width": 1024, "height": 1024, "batch_size": 1}),
    },
    {
        "styled": Node(
            "EDiffI_StyleImage",
            {"strength": 0.5, "start_sigma": 0.9},
            {"conditioning": "prompt", "clip_vision_output": "encoded", "style_model": "redux"},
            size=(340, 0),
            thumbnail=True,
        ),
        "guided": Node("FluxGuidance", {"guidance": 3.5}, {"conditioning": "styled"}),
        "negative": Node("ConditioningZeroOut", {}, {"conditioning": "prompt"}, "Negative: unused at cfg 1"),
    },
    {"sampler": stock_sampler(1, 20, 1.0, "euler", "simple", model="model", positive="guided")},
    {"decode": decode("model.VAE"), "save": save()},
)

EXAMPLES = {
    "Encoders - T5 and CLIP": ENCODERS,
    "Encoders - T5-XXL and CLIP-L": OF_YOUR_OWN,
    "Style - from a reference": FROM_A_REFERENCE,
    "Style - paint with words": PAINTED_WITH_STYLE,
    "Style - text and style guided apart": GUIDED_APART,
    "Style - Flux Redux": ON_FLUX,
}
