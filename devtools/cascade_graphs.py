"""What is on the canvas of the example workflows of the cascade, in the terms of graphs.py."""

from dataclasses import replace

from .graphs import (
    SD15,
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
from .painting_graphs import stock_sampler

X4 = hugging_face(
    "x4-upscaler-ema.safetensors", "checkpoints", "stabilityai/stable-diffusion-x4-upscaler", "CreativeML Open RAIL++-M"
)
PROMPT = "a large red heart in the center on a white background, striped"


def stage(name: str, title: str) -> Node:
    """A super-resolution ensemble of the demo family."""
    return Node("EDiffI_LoadEnsemble", {"ensemble": f"shapeworld-{name}"}, title=title)


def enlarge(model: str, image: str, seed: int, title: str, positive: str | None = "positive", **widgets) -> Node:
    connected = {"model": model, "image": image} | ({"positive": positive} if positive else {})
    fixed = {
        "seed": seed,
        "control_after_generate": "fixed",
        "steps": 2,
        "sigma_max": 10.0,
    }  # as the ensembles recommend
    return Node("EDiffI_SuperResolution", fixed | widgets, connected, title, (340, 600))


def scaled(title: str, image: str, side: int) -> Node:
    widgets = {"upscale_method": "area", "width": side, "height": side, "crop": "center"}
    return Node("ImageScale", widgets, {"image": image}, title, (280, 0))


def base_stage() -> dict[str, Node]:
    return {
        "positive": encode(PROMPT, "Prompt", 200),
        "negative": encode("", "Negative: empty is no text at all", 200),
        "empty": empty_image(400),
    }


TEXT_TO_1024 = (
    {
        "note": note(
            "The cascade",
            "## A prompt becomes a picture of 1024 pixels\n\n"
            "Three stages, as in the eDiff-I paper. The base stage settles what is where, at 64 pixels. Each **Super "
            "Resolution** makes it four times as large: its ensemble sees the smaller picture and the same prompt, and paints "
            "the detail anew. The first of them has two experts.\n\n"
            "All stages work on pixels, so there is no VAE that could run out of memory. For pictures beyond memory, set "
            "**tile**.\n\n"
            "It needs no files: the demo family comes with the pack.",
            size=(400, 340),
        )
    },
    loaders() | {"sr256": stage("sr256", "64 to 256 pixels"), "sr1024": stage("sr1024", "256 to 1024 pixels")},
    base_stage(),
    {"sampler": sampler(10, 12, 3.0, "heun", "edm", model="ensemble")},
    {"decode": decode("ensemble.vae"), "to_256": enlarge("sr256", "decode", 20, "To 256 pixels")},
    {"to_1024": enlarge("sr1024", "to_256", 30, "To 1024 pixels")},
    {"save": save("to_1024")},
)

OTHER_PICTURES = (
    {
        "note": note(
            "Pictures of another model",
            "## Super Resolution behind any model\n\n"
            "**Super Resolution** takes an IMAGE from anywhere and gives one to anywhere. Here Stable Diffusion paints at 512 "
            "pixels. Its picture is scaled down to what each stage was trained for, 64 or 256 pixels, and enlarged four "
            "times from there.\n\n"
            "No prompt and no encoders are needed; with a prompt, use encoders that the ensemble was trained with. The demo "
            "ensembles have seen nothing but Shapeworld: plain shapes on plain backgrounds come out well, and photographs do "
            "not.",
            (SD15,),
        )
    },
    {
        "checkpoint": checkpoint(SD15),
        "sr256": stage("sr256", "64 to 256 pixels"),
        "sr1024": stage("sr1024", "256 to 1024 pixels"),
    },
    {
        "positive": text("Prompt", "a red circle on a white background, flat vector art", "checkpoint.CLIP"),
        "negative": text("Negative", "photo, gradient, texture", "checkpoint.CLIP"),
        "empty": Node("EmptyLatentImage", {"width": 512, "height": 512, "batch_size": 1}, size=(280, 0)),
    },
    {
        "sampler": stock_sampler(1, 20, 7.0, "dpmpp_2m", "karras", model="checkpoint", positive="positive"),
        "decode": decode("checkpoint.VAE"),
    },
    {"small": scaled("Down to 64", "decode", 64), "middle": scaled("Down to 256", "decode", 256)},
    {
        "to_256": enlarge("sr256", "small", 20, "64 to 256", None),
        "to_1024": enlarge("sr1024", "middle", 30, "256 to 1024", None),
    },
    {
        "save_256": save("to_256", "eDiff-I 256", "From 64 pixels"),
        "save_1024": save("to_1024", "eDiff-I 1024", "From 256 pixels"),
    },
)

X4_STAGE = (
    {
        "note": note(
            "Another model's last stage",
            "## The third stage by Stable Diffusion's x4 upscaler\n\n"
            "The result of **Super Resolution** is an IMAGE like any other, so any upscaler may follow it. Here the first two "
            "stages are eDiff-I's, and the third is the diffusion upscaler of Stable Diffusion 2, by ComfyUI's own nodes, "
            "with a prompt of its own. It works on latents of a quarter of the size, which its VAE decodes to 1024 pixels.",
            (X4,),
        )
    },
    loaders() | {"sr256": stage("sr256", "64 to 256 pixels"), "upscaler": checkpoint(X4, "Stable Diffusion x4 upscaler")},
    base_stage(),
    {"sampler": sampler(10, 12, 3.0, "heun", "edm", model="ensemble")},
    {"decode": decode("ensemble.vae"), "to_256": enlarge("sr256", "decode", 20, "To 256 pixels")},
    {
        "words": text("Prompt of the upscaler", f"{PROMPT}, flat vector art", "upscaler.CLIP"),
        "against": text("Negative of the upscaler", "blurry, noise", "upscaler.CLIP"),
        "upscale": Node(
            "SD_4XUpscale_Conditioning",
            {"scale_ratio": 4.0, "noise_augmentation": 0.1},
            {"images": "to_256", "positive": "words", "negative": "against"},
            size=(320, 0),
        ),
    },
    {
        "last_stage": stock_sampler(
            1, 20, 7.0, "euler", "normal",
            model="upscaler", positive="upscale", negative="upscale.negative", latent_image="upscale.latent",
        ),
        "decode_last": decode("upscaler.VAE", "last_stage"),
    },
    {"save": save("decode_last")},
)  # fmt: skip

STAGE = sampler(
    20, 2, 1.0, "euler", "edm",
    model="sr256", positive="low_res", negative="low_res.negative", latent_image="low_res.latent",
)  # fmt: skip

IN_PARTS = (
    {
        "note": note(
            "A stage in parts",
            "## What Super Resolution is made of\n\n"
            "**Low-Res Image** gives the prompts the picture that is to be enlarged, and an empty latent of four times its size. "
            "The ensemble of a later stage is a MODEL like any other, so every sampler, scheduler and guider runs it. Use the "
            "parts instead of **Super Resolution** to look at the steps, to mask, or for another size.\n\n"
            "The empty latent is where it starts from. To start from the picture itself, enlarge it, encode it with the VAE of "
            "the ensemble, and lower denoise.",
            size=(400, 340),
        )
    },
    loaders() | {"sr256": stage("sr256", "64 to 256 pixels")},
    base_stage(),
    {"sampler": sampler(10, 12, 3.0, "heun", "edm", model="ensemble")},
    {"decode": decode("ensemble.vae")},
    {
        "low_res": Node(
            "EDiffI_LowResImage",
            {"augmentation_sigma": 0.0, "seed": 0, "control_after_generate": "fixed"},
            {"positive": "positive", "negative": "negative", "image": "decode"},
            size=(340, 0),
        )
    },
    {
        # the low-res image says so much that little noise suffices
        "stage": replace(STAGE, widgets=STAGE.widgets | {"sigma_max": 10.0}),
        "decode_stage": decode("sr256.vae", "stage"),
    },
    {"save": save("decode_stage")},
)

EXAMPLES = {
    "Cascade - text to image 1024": TEXT_TO_1024,
    "Cascade - a stage in parts": IN_PARTS,
    "Cascade - another model's picture": OTHER_PICTURES,
    "Cascade - SD x4 upscaler as third stage": X4_STAGE,
}
