"""What is on the canvas of each example workflow: nodes in columns from left to right, as data runs."""

from dataclasses import dataclass, field

STRIP = 90  # what a node grows by when it shows who denoised which step


@dataclass(frozen=True)
class File:
    """A file that the pack does not bring, and where it comes from."""

    name: str
    folder: str  # under models/
    source: str  # a repository of Hugging Face, or the page of another site
    url: str
    licence: str


@dataclass(frozen=True)
class Node:
    type: str
    widgets: dict = field(default_factory=dict)  # in the order in which they are set: a choice before what it brings
    inputs: dict = field(default_factory=dict)  # input -> what feeds it, with its output if not the first: "vae.VAE"
    title: str | None = None
    size: tuple[int, int] = (320, 0)  # at least
    files: tuple[File, ...] = ()
    thumbnail: bool = False  # its pictures stand beside the saved ones; where nothing is run, how it looks


Columns = tuple[dict[str, Node], ...]


def files_of(columns: Columns) -> list[File]:
    return list(dict.fromkeys(file for column in columns for node in column.values() for file in node.files))


def hugging_face(name: str, folder: str, repository: str, licence: str, inside: str = "") -> File:
    source = f"https://huggingface.co/{repository}"
    return File(name, folder, source, f"{source}/resolve/main/{inside}{name}", licence)


WAN = "Comfy-Org/Wan_2.2_ComfyUI_Repackaged"
WAN_FILES = {
    (kind, half): hugging_face(
        f"wan2.2_{kind}_{half}_noise_14B_fp8_scaled.safetensors",
        "diffusion_models",
        WAN,
        "Apache 2.0",
        "split_files/diffusion_models/",
    )
    for kind in ("t2v", "i2v")
    for half in ("high", "low")
}
UMT5 = hugging_face(
    "umt5_xxl_fp8_e4m3fn_scaled.safetensors",
    "text_encoders",
    "Comfy-Org/Wan_2.1_ComfyUI_repackaged",
    "Apache 2.0",
    "split_files/text_encoders/",
)
WAN_VAE = hugging_face("wan_2.1_vae.safetensors", "vae", WAN, "Apache 2.0", "split_files/vae/")
SDXL_BASE, SDXL_REFINER = (
    hugging_face(
        f"sd_xl_{part}_1.0.safetensors",
        "checkpoints",
        f"stabilityai/stable-diffusion-xl-{part}-1.0",
        "CreativeML Open RAIL++-M",
    )
    for part in ("base", "refiner")
)
SD15 = hugging_face(
    "v1-5-pruned-emaonly-fp16.safetensors",
    "checkpoints",
    "Comfy-Org/stable-diffusion-v1-5-archive",
    "CreativeML Open RAIL-M",
)
DREAMSHAPER = File(
    "dreamshaper_8.safetensors",
    "checkpoints",
    "https://civitai.com/models/4384?modelVersionId=128713",
    "https://civitai.com/api/download/models/128713",
    "CreativeML Open RAIL-M",
)


def note(title: str, text: str, files: tuple[File, ...] = (), size: tuple[int, int] = (440, 320)) -> Node:
    if files:
        text += "\n\n**Files**, under ComfyUI's `models` folder:\n"
        text += "".join(
            f"\n- `{one.folder}/{one.name}` from [{site(one)}]({one.source}), {one.licence}" for one in files
        )
    return Node("MarkdownNote", {"text": text}, title=title, size=size)


def site(file: File) -> str:
    if "huggingface.co/" in file.source:
        return file.source.removeprefix("https://huggingface.co/")
    return file.source.removeprefix("https://").split("/")[0]


def checkpoint(file: File, title: str | None = None) -> Node:
    return Node("CheckpointLoaderSimple", {"ckpt_name": file.name}, title=title, files=(file,))


def unet(file: File, title: str) -> Node:
    return Node(
        "UNETLoader", {"unet_name": file.name, "weight_dtype": "default"}, title=title, size=(440, 0), files=(file,)
    )


def text(title: str, words: str, clip: str) -> Node:
    return Node("CLIPTextEncode", {"text": words}, {"clip": clip}, title, (400, 160))


def loaders() -> dict[str, Node]:
    """Of the demo family."""
    return {
        "ensemble": Node("EDiffI_LoadEnsemble", {"ensemble": "shapeworld-base"}),
        "encoders": Node("EDiffI_LoadEncoders", {"encoders": "shapeworld"}),
    }


def encode(words: str, title: str, height: int = 160) -> Node:
    return Node("EDiffI_TextEncode", {"text": words}, {"clip": "encoders"}, title, (400, height))


def empty_image(width: int = 320) -> Node:
    return Node("EDiffI_EmptyImage", {"width": 64, "height": 64, "batch_size": 1}, size=(width, 0))


def ensemble(experts: list[str], **widgets) -> Node:
    inputs = {f"experts.expert_{number}": name for number, name in enumerate(experts, 1)}
    size = (360, 200 + STRIP)
    return Node("EDiffI_ExpertEnsemble", {"experts": str(len(experts)), **widgets}, inputs, size=size)


def sampler(seed: int, steps: int, cfg: float, sampler_name: str, scheduler: str, **inputs: str) -> Node:
    widgets = dict(seed=seed, steps=steps, cfg=cfg, sampler_name=sampler_name, scheduler=scheduler)
    widgets["control_after_generate"] = "fixed"
    connected = {"model": "model", "positive": "positive", "negative": "negative", "latent_image": "empty"} | inputs
    return Node("EDiffI_KSampler", widgets, connected, size=(340, 430 + STRIP))


def decode(vae: str, samples: str = "sampler") -> Node:
    return Node("VAEDecode", {}, {"samples": samples, "vae": vae}, size=(240, 0))


def save(images: str = "decode", prefix: str = "eDiff-I", title: str | None = None) -> Node:
    return Node("SaveImage", {"filename_prefix": prefix}, {"images": images}, title, (420, 460))


TEXT_TO_IMAGE = (
    {
        "note": note(
            "eDiff-I: text to image",
            "## A prompt becomes a picture\n\n"
            "Three expert denoisers share the noise levels: one paints the layout from pure noise, one the shapes, "
            "one the last details. They are loaded as one MODEL.\n\n"
            "This small family comes with the pack and runs on any CPU. It knows one to three shapes: **circle, square, triangle, "
            "star, cross, heart** in **red, orange, yellow, green, cyan, blue, purple, pink**, small or "
            "large, at nine places, on a white, gray, black or beige background, flat, striped, dotted, hatched, "
            "outlined or grainy.\n\nPress Run, then try other words.",
            size=(400, 300),
        )
    },
    loaders(),
    {
        "positive": encode(
            "a large red heart on the left and a small yellow star on the right on a black background", "Prompt", 200
        ),
        "negative": encode("", "Negative: empty is no text at all", 200),
        "empty": empty_image(400),
    },
    {"sampler": sampler(10, 12, 3.0, "heun", "edm", model="ensemble")},
    {"decode": decode("ensemble.vae"), "save": save()},
)

PROMPT_PER_EXPERT = (
    {
        "note": note(
            "A prompt for each expert",
            "## What does each expert decide?\n\n"
            "The experiment of the eDiff-I paper's figure 4: the prompt is exchanged on the way from noise to picture. All "
            "three pictures start from the same noise.\n\n"
            "1. every expert hears the first prompt\n"
            "2. only the expert of the **lowest** noise hears the second one: next to nothing changes, because the picture "
            "is settled by then\n"
            "3. only the expert of the **highest** noise hears the first one: what it settled stays in part: the background "
            "is not black; the rest follows the second prompt\n\n"
            "**eDiff-I Expert Conditioning** gives each expert its own: expert_1 works at the highest noise. It needs no "
            "files: the demo family comes with the pack.",
        )
    },
    loaders() | {"empty": empty_image()},
    {
        "first": encode("a large red circle in the center on a white background", "First prompt"),
        "second": encode("a large blue square in the center on a black background", "Second prompt"),
        "negative": encode("", "Negative", 140),
    },
    {
        name: Node(
            "EDiffI_ExpertConditioning",
            {},
            {f"conditionings.expert_{number}": prompt for number, prompt in enumerate(prompts, 1)},
            title,
            (340, 0),
        )
        for name, title, prompts in (
            ("late", "2. The second prompt comes late", ("first", "first", "second")),
            ("early", "3. The second prompt comes early", ("first", "second", "second")),
        )
    },
    {
        f"sampler_{name}": sampler(10, 12, 3.0, "heun", "edm", model="ensemble", positive=positive)
        for name, positive in (("plain", "first"), ("late", "late"), ("early", "early"))
    },
    {f"decode_{name}": decode("ensemble.vae", f"sampler_{name}") for name in ("plain", "late", "early")},
    {
        f"save_{name}": Node(
            "SaveImage", {"filename_prefix": f"eDiff-I {name}"}, {"images": f"decode_{name}"}, title, (260, 300)
        )
        for name, title in (("plain", "1. First prompt"), ("late", "2. Late"), ("early", "3. Early"))
    },
)

EDM = (
    {
        "note": note(
            "EDM's sampler and schedule",
            "## The sampler in its parts\n\n"
            "**eDiff-I KSampler** in pieces, for **SamplerCustom**: **KarrasScheduler** gives the noise levels of EDM, from "
            "80 to 0.002 with rho 7; **eDiff-I EDM Sampler** goes down them with a little fresh noise before each step "
            "(s_churn). **eDiff-I Ensemble Timeline** draws which expert denoises which step.\n\n"
            "Both pictures are pulled hard, with cfg 15, which drives pixels far beyond black and white. "
            "The second goes through **eDiff-I Dynamic Thresholding**, which brings them back at every step. Its "
            "**maximum** of 1 only cuts them; above that the picture is scaled as well, and with this family turns gray.\n\n"
            "It needs no files: the demo family comes with the pack.",
            size=(400, 360),
        )
    },
    loaders() | {"empty": empty_image()},
    {
        "positive": encode("a large red circle in the center on a white background", "Prompt"),
        "negative": encode("", "Negative: empty is no text at all"),
    },
    {
        "sigmas": Node(
            "KarrasScheduler",
            {"steps": 12, "sigma_max": 80.0, "sigma_min": 0.002, "rho": 7.0},
            title="EDM's noise levels",
        ),
        "edm": Node("EDiffI_EDMSampler", {"solver": "heun", "s_churn": 2.0}),
        "thresholded": Node(
            "EDiffI_DynamicThresholding", {"percentile": 0.995, "maximum": 1.0}, {"model": "ensemble"}, size=(340, 0)
        ),
        "timeline": Node("EDiffI_EnsembleTimeline", {}, {"model": "ensemble", "sigmas": "sigmas"}),
    },
    {
        f"sampler_{name}": Node(
            "SamplerCustom",
            {"add_noise": True, "noise_seed": 8, "control_after_generate": "fixed", "cfg": 15.0},
            {
                "model": model,
                "positive": "positive",
                "negative": "negative",
                "sampler": "edm",
                "sigmas": "sigmas",
                "latent_image": "empty",
            },
            title,
            (340, 0),
        )
        for name, model, title in (
            ("plain", "ensemble", "cfg 15"),
            ("thresholded", "thresholded", "cfg 15, thresholded"),
        )
    }
    | {"shown": Node("PreviewImage", {}, {"images": "timeline"}, "Who denoises which step", (520, 260))},
    {f"decode_{name}": decode("ensemble.vae", f"sampler_{name}") for name in ("plain", "thresholded")},
    {
        f"save_{name}": Node(
            "SaveImage", {"filename_prefix": f"eDiff-I {name}"}, {"images": f"decode_{name}"}, title, (300, 340)
        )
        for name, title in (("plain", "cfg 15"), ("thresholded", "cfg 15, thresholded"))
    },
)

TWO_MODELS = (
    {
        "note": note(
            "Two models, one run",
            "## One model composes, another finishes\n\n"
            "Two checkpoints of one family share one sampler run: **expert_1** denoises the first 40 percent, where layout is "
            "decided, **expert_2** the rest, where surfaces are. Move **boundary_1** and watch what each of them decides; the "
            "timeline shows who denoises which step.\n\n"
            "Because it is one run, samplers that remember earlier steps, such as dpmpp_2m, go on across the boundary. Any "
            "two checkpoints of SD1.5 will do.",
            (SD15, DREAMSHAPER),
        )
    },
    {
        "composes": checkpoint(SD15, "Composes"),
        "finishes": checkpoint(DREAMSHAPER, "Finishes"),
        "empty": Node("EmptyLatentImage", {"width": 512, "height": 512, "batch_size": 1}),
    },
    {
        "model": ensemble(["composes", "finishes"], unit="percent", **{"experts.boundary_1": 0.4}),
        "positive": text(
            "Prompt", "a lighthouse on a cliff at dusk, waves below, warm light in the window", "finishes.CLIP"
        ),
        "negative": text("Negative", "blurry, low quality", "finishes.CLIP"),
    },
    {
        "sampler": sampler(1, 25, 7.0, "dpmpp_2m", "karras"),
        "sigmas": Node("BasicScheduler", {"scheduler": "karras", "steps": 25, "denoise": 1.0}, {"model": "model"}),
        "timeline": Node("EDiffI_EnsembleTimeline", {}, {"model": "model", "sigmas": "sigmas"}),
    },
    {
        "decode": decode("finishes.VAE"),
        "save": save(),
        "shown": Node("PreviewImage", {}, {"images": "timeline"}, "Who denoises which step", (420, 240)),
    },
)

SDXL = (
    {
        "note": note(
            "SDXL: base and refiner as one ensemble",
            "## Base and refiner in one run\n\n"
            "The refiner of SDXL was trained on the lowest 200 of the 1000 noise levels. The preset gives it exactly those; "
            "there is one sampler and one schedule, no latent handed over with noise left in it, and no step to count.\n\n"
            "The refiner reads only one of the base's two text encoders and wants an aesthetic score, so each prompt is "
            "encoded twice and **eDiff-I Expert Conditioning** tells each expert its own. The text is written once, at the "
            "left.",
            (SDXL_BASE, SDXL_REFINER),
        ),
        "words": Node(
            "PrimitiveStringMultiline",
            {"value": "a red fox asleep in the roots of an old oak, first snow, morning light"},
            title="Prompt",
            size=(440, 140),
        ),
        "unwanted": Node("PrimitiveStringMultiline", {"value": "text, watermark"}, title="Negative", size=(440, 120)),
    },
    {
        "base": checkpoint(SDXL_BASE, "Base"),
        "refiner": checkpoint(SDXL_REFINER, "Refiner"),
        "empty": Node("EmptyLatentImage", {"width": 1024, "height": 1024, "batch_size": 1}),
    },
    {
        "model": ensemble(
            ["base", "refiner"], unit="timestep", **{"experts.boundary_1": 200.0}, preset="SDXL base + refiner"
        ),
        "base_positive": Node("CLIPTextEncode", {}, {"clip": "base.CLIP", "text": "words"}, "Prompt, for the base"),
        "refiner_positive": Node(
            "CLIPTextEncodeSDXLRefiner",
            {"ascore": 6.0, "width": 1024, "height": 1024},
            {"clip": "refiner.CLIP", "text": "words"},
            "Prompt, for the refiner",
        ),
        "base_negative": Node(
            "CLIPTextEncode", {}, {"clip": "base.CLIP", "text": "unwanted"}, "Negative, for the base"
        ),
        "refiner_negative": Node(
            "CLIPTextEncodeSDXLRefiner",
            {"ascore": 2.5, "width": 1024, "height": 1024},
            {"clip": "refiner.CLIP", "text": "unwanted"},
            "Negative, for the refiner",
        ),
    },
    {
        sign: Node(
            "EDiffI_ExpertConditioning",
            {},
            {"conditionings.expert_1": f"base_{sign}", "conditionings.expert_2": f"refiner_{sign}"},
            sign.capitalize(),
        )
        for sign in ("positive", "negative")
    },
    {"sampler": sampler(1, 25, 7.0, "dpmpp_2m", "karras")},
    {"decode": decode("base.VAE"), "save": save()},
)

WAN_NEGATIVE = "blurry, overexposed, static, worst quality, subtitles, still picture, deformed hands, walking backwards"


def wan(kind: str, task: str, boundary: float, shift: float, cfgs: tuple[float, float], prompt: str) -> Columns:
    """Wan 2.2 as it was released: its boundary, shift, guidance, 40 steps of UniPC; with one sampler instead of two."""
    guidance = f"{cfgs[0]:g}" if cfgs[0] == cfgs[1] else f"{cfgs[0]:g} for high noise, {cfgs[1]:g} for low"
    words = (
        f"## {task.capitalize()}\n\n"
        "Wan 2.2 comes as two networks: one trained for high noise, one for low. Here they are one MODEL, and one sampler "
        f"runs it. The preset holds the boundary that Wan was released with (sigma {boundary:g}), so there are no steps to "
        "split and no second sampler. LoRAs of each half go between its loader and the ensemble.\n\n"
        f"Set as released: 40 steps of UniPC, shift {shift:g}, cfg {guidance}."
    )
    files = (WAN_FILES[kind, "high"], WAN_FILES[kind, "low"], UMT5, WAN_VAE)
    film = {"width": 832, "height": 480, "length": 81, "batch_size": 1}
    from_image = kind == "i2v"
    latent = (
        {
            "image": Node("LoadImage", {"image": "example.png"}, title="First picture", size=(360, 360)),
            "film": Node(
                "WanImageToVideo",
                film,
                {"positive": "positive", "negative": "negative", "vae": "vae", "start_image": "image"},
            ),
        }
        if from_image
        else {"empty": Node("EmptyHunyuanLatentVideo", film)}
    )
    wired = {"model": "shifted"}
    if from_image:
        wired |= {"positive": "film.positive", "negative": "film.negative", "latent_image": "film.latent"}
    return (
        {"note": note("Wan 2.2: two halves as one MODEL", words, files, (440, 460))},
        {
            "high": unet(WAN_FILES[kind, "high"], "High noise"),
            "low": unet(WAN_FILES[kind, "low"], "Low noise"),
            "clip": Node(
                "CLIPLoader", {"clip_name": UMT5.name, "type": "wan", "device": "default"}, size=(440, 0), files=(UMT5,)
            ),
            "vae": Node("VAELoader", {"vae_name": WAN_VAE.name}, size=(440, 0), files=(WAN_VAE,)),
        },
        {
            "model": ensemble(
                ["high", "low"],
                unit="sigma",
                **{"experts.boundary_1": boundary, "experts.cfg_1": cfgs[0], "experts.cfg_2": cfgs[1]},
                preset=f"Wan 2.2 {task}",
            ),
            "shifted": Node("ModelSamplingSD3", {"shift": shift}, {"model": "model"}, "Shift, for both"),
            **({} if from_image else latent),
        },
        {
            "positive": text("Prompt", prompt, "clip"),
            "negative": text("Negative", WAN_NEGATIVE, "clip"),
            **(latent if from_image else {}),
        },
        {"sampler": sampler(1, 40, cfgs[0], "uni_pc", "simple", **wired)},
        {
            "decode": decode("vae"),
            "video": Node("CreateVideo", {"fps": 16.0}, {"images": "decode"}),
            "save": Node("SaveVideo", {"filename_prefix": "video/eDiff-I"}, {"video": "video"}, size=(480, 360)),
        },
    )


EXAMPLES = {
    "01 Text to image": TEXT_TO_IMAGE,
    "Experts - prompt per expert": PROMPT_PER_EXPERT,
    "Experts - two SD1.5 models": TWO_MODELS,
    "Experts - SDXL base and refiner": SDXL,
    "Experts - Wan 2.2 text to video": wan(
        "t2v",
        "text to video",
        0.875,
        12.0,
        (4.0, 3.0),
        "A red fox trots along a snowy ridge at sunrise and stops to look into the valley, fog below, slow camera pan",
    ),
    "Experts - Wan 2.2 image to video": wan(
        "i2v", "image to video", 0.9, 5.0, (3.5, 3.5), "The camera slowly moves closer, soft wind, clouds drift by"
    ),
    "Sampling - EDM and timeline": EDM,
}
