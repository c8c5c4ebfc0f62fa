"""What is on the canvas of the example workflows of regions, in the terms of graphs.py. Their paintings are strokes, which
examples.py paints with the painter's own brush."""

from .graphs import (
    SD15,
    SDXL_BASE,
    Columns,
    File,
    Node,
    checkpoint,
    decode,
    empty_image,
    encode,
    hugging_face,
    loaders,
    note,
    sampler,
    save,
    text,
)

FLUX = hugging_face("flux1-dev-fp8.safetensors", "checkpoints", "Comfy-Org/flux1-dev", "FLUX.1 [dev] Non-Commercial")

Strokes = list[list[tuple[int, int]]]  # each the points of a line, (x, y) in cells


def painting(width: int, height: int, areas: dict[str, tuple[int, Strokes]]) -> dict:
    """What a hand paints on a grid of so many cells: for each phrase the radius of the brush, and strokes."""
    phrases = [{"phrase": phrase, "brush": brush, "strokes": strokes} for phrase, (brush, strokes) in areas.items()]
    return {"size": [width, height], "phrases": phrases}


def paint(words: str, clip: str, size: tuple[int, int], painted: dict, thumbnail: bool = False) -> Node:
    widgets = {"text": words, "width": size[0], "height": size[1], "painting": painted}
    return Node("EDiffI_PaintWithWords", widgets, {"clip": clip}, size=(520, 900), thumbnail=thumbnail)


def legend(thumbnail: bool = False) -> Node:
    return Node("PreviewImage", {}, {"images": "paint.legend"}, "What was painted", (320, 340), thumbnail=thumbnail)


def obey(model: str, weight: float) -> Node:
    return Node("EDiffI_ApplyPaintWithWords", {"weight": weight, "scale": "max"}, {"model": model}, size=(340, 0))


def stock_sampler(seed: int, steps: int, cfg: float, sampler_name: str, scheduler: str, **inputs: str) -> Node:
    widgets = dict(seed=seed, steps=steps, cfg=cfg, sampler_name=sampler_name, scheduler=scheduler, denoise=1.0)
    widgets["control_after_generate"] = "fixed"
    connected = {"model": "obeys", "positive": "paint", "negative": "negative", "latent_image": "empty"} | inputs
    return Node("KSampler", widgets, connected, size=(320, 280))


DEMO = (
    {
        "note": note(
            "Paint with words",
            "## Paint where the words belong\n\n"
            "One prompt; the phrases **red circle** and **blue square** are painted where they should be. Click words "
            "above the canvas to choose another phrase, paint, press Run.\n\n"
            "**Apply Paint With Words** sets how strongly the picture obeys: 0.8 suits this small family. **Attention "
            "Maps** notes, from high noise to low, where the picture looks at each painted phrase.\n\n"
            "Everything here comes with the pack.",
            size=(400, 330),
        )
    },
    loaders() | {"negative": encode("", "Negative: empty is no text at all"), "empty": empty_image()},
    {
        "paint": paint(
            "a large red circle and a large blue square on a white background",
            "encoders",
            (512, 512),
            painting(
                512,
                512,
                {
                    "red circle": (
                        58,
                        [
                            [(120, 215), (185, 205), (210, 270), (165, 325), (105, 300), (110, 225)],
                            [(150, 260), (165, 280)],
                        ],
                    ),
                    "blue square": (
                        52,
                        [
                            [(330, 195), (415, 185), (425, 250), (420, 320), (340, 325), (325, 255), (330, 200)],
                            [(370, 250), (380, 270)],
                        ],
                    ),
                },
            ),
        )
    },
    {
        "obeys": obey("ensemble", 0.8),
        "looks": Node(
            "EDiffI_AttentionMaps",
            {"phrases": "", "levels": 6},
            {"model": "obeys", "conditioning": "paint"},
            size=(340, 180),
        ),
        "legend": legend(thumbnail=True),
    },
    {"sampler": sampler(22, 12, 3.0, "heun", "edm", model="looks", positive="paint")},
    {"decode": decode("ensemble.vae"), "save": save()},
    {
        "maps": Node(
            "EDiffI_DrawAttentionMaps",
            {"cell": 160},
            {"maps": "looks.maps", "latent": "sampler", "image": "decode"},
            size=(320, 0),
        ),
        "shown": Node("PreviewImage", {}, {"images": "maps"}, "Where it looked, high noise to low", (680, 320)),
    },
)

COLOR_MAP = (
    {
        "note": note(
            "Regions from a color map",
            "## Colors stand for phrases\n\n"
            "A picture says what goes where: each line of **Bind Color Map** gives a color its phrase. Here stock nodes "
            "lay two colored patches on white; a **Load Image** with a drawing of yours does as well, and may have any "
            "size.\n\n"
            "White is in no line and, at tolerance 0.1, near none of them, so it is left to the prompt. Raise the "
            "tolerance for drawings with soft edges.\n\n"
            "Prompt and seed are those of **Paint with words**, the sides are exchanged: so are the things. It needs no files.",
            size=(400, 320),
        )
    },
    {
        "white": Node("EmptyImage", {"width": 128, "height": 128, "color": 0xFFFFFF}, title="White"),
        "red": Node("EmptyImage", {"width": 48, "height": 52, "color": 0xFF0000}, title="Red patch"),
        "blue": Node("EmptyImage", {"width": 48, "height": 52, "color": 0x0000FF}, title="Blue patch"),
    },
    {
        "one": Node("ImageCompositeMasked", {"x": 70, "y": 34}, {"destination": "white", "source": "red"}),
        "map": Node("ImageCompositeMasked", {"x": 10, "y": 44}, {"destination": "one", "source": "blue"}),
        "shown": Node("PreviewImage", {}, {"images": "map"}, "The color map", (320, 340), thumbnail=True),
    },
    loaders() | {"empty": empty_image()},
    {
        "prompt": encode("a large red circle and a large blue square on a white background", "Prompt"),
        "negative": encode("", "Negative: empty is no text at all"),
        "paint": Node(
            "EDiffI_BindColorMap",
            {"colors": "#ff0000 = red circle\n#0000ff = blue square", "tolerance": 0.1},
            {"conditioning": "prompt", "image": "map"},
            size=(400, 180),
        ),
    },
    {
        "obeys": obey("ensemble", 0.8),
        "sampler": sampler(22, 12, 3.0, "heun", "edm", model="obeys", positive="paint"),
    },
    {"decode": decode("ensemble.vae"), "save": save()},
)

MASKS = (
    {
        "note": note(
            "Regions from masks",
            "## Any mask, any phrase\n\n"
            "**Bind Phrase** ties a phrase of the prompt to a mask; several in a row tie several. Masks come from any "
            "node: a segmentation, a mask painted on a loaded picture, or shapes as here. Soft edges count.\n\n"
            "eDiff-I's own ensembles obey without another node. **strength** 2 draws each phrase twice as much as usual, "
            "which this small family wants. Other MODELs need **Apply Paint With Words** before their sampler.\n\n"
            "It needs no files: the demo family comes with the pack.",
            size=(400, 340),
        )
    },
    {
        "nothing": Node("SolidMask", {"value": 0.0, "width": 128, "height": 128}, title="Nothing"),
        "square": Node("SolidMask", {"value": 1.0, "width": 60, "height": 60}, title="A square"),
        "soft": Node(
            "FeatherMask", {"left": 12, "top": 12, "right": 12, "bottom": 12}, {"mask": "square"}, "With soft edges"
        ),
    },
    {
        name: Node(
            "MaskComposite",
            {"x": x, "y": y, "operation": "add"},
            {"destination": "nothing", "source": "soft"},
            title,
        )
        for name, title, x, y in (("upper", "Upper left", 8, 12), ("lower", "Lower right", 60, 58))
    }
    | {
        f"shown_{name}": Node("MaskPreview", {}, {"mask": name}, title, (320, 300), thumbnail=True)
        for name, title in (("upper", "Upper left"), ("lower", "Lower right"))
    },
    loaders() | {"negative": encode("", "Negative: empty is no text at all"), "empty": empty_image()},
    {
        "prompt": encode("a large red circle and a large blue square on a white background", "Prompt"),
        "first": Node(
            "EDiffI_BindPhrase",
            {"phrase": "red circle", "strength": 2.0},
            {"conditioning": "prompt", "mask": "upper"},
            size=(400, 0),
        ),
        "second": Node(
            "EDiffI_BindPhrase",
            {"phrase": "blue square", "strength": 2.0},
            {"conditioning": "first", "mask": "lower"},
            size=(400, 0),
        ),
    },
    {"sampler": sampler(8, 12, 3.0, "heun", "edm", model="ensemble", positive="second")},
    {"decode": decode("ensemble.vae"), "save": save()},
)


def on(
    file: File, words: str, size: tuple[int, int], painted: dict, about: str, sampled: Node, **more: Node
) -> Columns:
    """Painting with one of ComfyUI's own models. more: what its sampler needs besides."""
    return (
        {"note": note("Paint with words", about, (file,), (400, 340))},
        {
            "model": checkpoint(file),
            "empty": Node(
                "EmptySD3LatentImage" if file is FLUX else "EmptyLatentImage",
                {"width": size[0], "height": size[1], "batch_size": 1},
            ),
        },
        {"paint": paint(words, "model.CLIP", size, painted, thumbnail=True)},
        {"obeys": obey("model", 0.4), "legend": legend()} | more,
        {"sampler": sampled},
        {"decode": decode("model.VAE"), "save": save()},
    )


ON_SD15 = on(
    SD15,
    "an oil painting of a red barn in a wheat field beside a large oak tree, dark storm clouds above",
    (512, 512),
    painting(
        512,
        512,
        {
            "dark storm clouds": (
                50,
                [[(0, 40), (180, 50), (330, 40), (512, 45)], [(0, 100), (120, 112), (250, 98), (400, 116), (512, 104)]],
            ),
            "wheat field": (44, [[(0, 402), (200, 388), (350, 396), (512, 386)], [(0, 470), (512, 470)]]),
            "large oak tree": (
                46,
                [[(95, 250), (120, 200), (175, 205), (185, 260), (130, 285), (90, 255)], [(138, 290), (135, 370)]],
            ),
            "red barn": (40, [[(315, 270), (420, 262), (430, 340), (320, 348), (318, 280)], [(340, 310), (410, 305)]]),
        },
    ),
    "## Painting with Stable Diffusion 1.5\n\n"
    "Any MODEL of the 1.5 family obeys, with its LoRAs and ControlNets: **Paint With Words** encodes the prompt and keeps "
    "the regions, **Apply Paint With Words** makes the MODEL follow them, the sampler is ComfyUI's own.\n\n"
    "If things stay where the model would have put them, raise **weight**; if they turn into flat patches, lower it.",
    stock_sampler(1, 25, 7.0, "dpmpp_2m", "karras"),
    negative=text("Negative", "blurry, low quality, frame", "model.CLIP"),
)

ON_SDXL = on(
    SDXL_BASE,
    "a photograph of a quiet fjord at dawn, a white lighthouse on a rock, a small red sailing boat, misty mountains behind",
    (1216, 832),
    painting(
        512,
        350,
        {
            "misty mountains": (
                34,
                [
                    [
                        (0, 112),
                        (60, 84),
                        (110, 70),
                        (170, 108),
                        (250, 62),
                        (330, 100),
                        (400, 82),
                        (460, 66),
                        (512, 104),
                    ],
                    [(0, 120), (512, 120)],
                    [(0, 140), (512, 140)],
                ],
            ),
            "white lighthouse": (22, [[(400, 85), (404, 150), (408, 205)], [(396, 110), (412, 200)]]),
            "rock": (26, [[(355, 255), (410, 245), (470, 262)]]),
            "small red sailing boat": (24, [[(135, 190), (120, 245), (165, 248), (138, 195)]]),
        },
    ),
    "## Painting with SDXL\n\n"
    "SDXL reads a prompt with two encoders; each phrase is found in both. The canvas has the shape of the picture, "
    "here 1216 x 832, and the painting is stretched if the size changes.\n\n"
    "A small thing such as the boat holds better with a **strength** above 1, in its line of the table. What nobody "
    "painted is left to the prompt.",
    sampler(1, 25, 7.0, "dpmpp_2m", "karras", model="obeys", positive="paint"),
    negative=text("Negative", "text, watermark", "model.CLIP"),
)

ON_FLUX = on(
    FLUX,
    "a raccoon in a purple robe reads a glowing book at a round table, an orange cat sleeps on the windowsill behind",
    (1024, 1024),
    painting(
        512,
        512,
        {
            "raccoon in a purple robe": (
                52,
                [
                    [(150, 190), (205, 185), (195, 250), (140, 255), (120, 330), (215, 335), (230, 270)],
                    [(165, 300), (190, 345)],
                ],
            ),
            "round table": (36, [[(60, 440), (200, 425), (350, 428), (460, 445)], [(120, 475), (400, 475)]]),
            "glowing book": (30, [[(255, 365), (310, 350), (365, 362)], [(270, 385), (350, 382)]]),
            "orange cat": (32, [[(350, 175), (400, 160), (450, 178)], [(365, 195), (440, 195)]]),
        },
    ),
    "## Painting with Flux\n\n"
    "Flux has no cross-attention: picture and prompt attend to each other in one sequence, and only the part in which the "
    "picture looks at words is raised. It is guided by **Flux Guidance**, so the cfg stays 1 and the negative is unused.\n\n"
    "Flux reads with CLIP-L and T5; the regions go to T5's words, which it looks at.",
    stock_sampler(1, 20, 1.0, "euler", "simple", positive="guided"),
    guided=Node("FluxGuidance", {"guidance": 3.5}, {"conditioning": "paint"}),
    negative=Node("ConditioningZeroOut", {}, {"conditioning": "paint"}, "Negative: unused at cfg 1"),
)

EXAMPLES = {
    "Paint with words": DEMO,
    "Regions from a color map": COLOR_MAP,
    "Regions from masks": MASKS,
    "Paint with words - SD1.5": ON_SD15,
    "Paint with words - SDXL": ON_SDXL,
    "Paint with words - Flux": ON_FLUX,
}
