"""Makes example_workflows/: each graph is built on the real canvas, saved as the canvas saves it, and run for its preview.

python -m devtools.examples        (in the environment that dev.py makes; needs Chromium and ComfyUI)
"""

import json
import os
import sys
import tempfile
from pathlib import Path

from .comfyui import Server, find_comfyui
from .frontend import Frontend

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "example_workflows"

# name of the workflow -> nodes: name -> (type, position, size, title, widget values, inputs: name -> (node, output index))
TEXT_TO_IMAGE = {
    "note": (
        "MarkdownNote",
        (40, 40),
        (400, 300),
        "eDiff-I: text to image",
        {
            "text": "## A prompt becomes a picture\n\n"
            "Three expert denoisers share the noise levels: one paints the layout from pure noise, one the shapes, "
            "one the last details. They are loaded as one MODEL.\n\n"
            "This small family comes with the pack and runs on any CPU. It is still learning Shapeworld; colours and backgrounds hold, shapes and places not yet: **circle, square, "
            "triangle, star, cross, heart** in **red, orange, yellow, green, cyan, blue, purple, pink**, small or "
            "large, at nine places, on a white, gray, black or beige background, flat, striped, dotted, hatched, "
            "outlined or grainy.\n\nPress Run, then try other words."
        },
        {},
    ),
    "ensemble": (
        "EDiffI_LoadEnsemble",
        (480, 40),
        (320, 100),
        None,
        {"ensemble": "shapeworld-base"},
        {},
    ),
    "encoders": ("EDiffI_LoadEncoders", (480, 220), (320, 100), None, {"encoders": "shapeworld"}, {}),
    "positive": (
        "EDiffI_TextEncode",
        (860, 40),
        (400, 200),
        "Prompt",
        {"text": "a large red circle on a white background"},
        {"clip": ("encoders", 0)},
    ),
    "negative": (
        "EDiffI_TextEncode",
        (860, 300),
        (400, 200),
        "Negative: empty is no text at all",
        {"text": ""},
        {"clip": ("encoders", 0)},
    ),
    "empty": ("EDiffI_EmptyImage", (860, 560), (400, 130), None, {"width": 64, "height": 64, "batch_size": 1}, {}),
    "sampler": (
        "EDiffI_KSampler",
        (1320, 40),
        (340, 560),
        None,
        {
            "seed": 10,
            "control_after_generate": "fixed",
            "steps": 12,
            "cfg": 5.0,
            "sampler_name": "heun",
            "scheduler": "edm",
        },
        {
            "model": ("ensemble", 0),
            "positive": ("positive", 0),
            "negative": ("negative", 0),
            "latent_image": ("empty", 0),
        },
    ),
    "decode": ("VAEDecode", (1720, 40), (220, 60), None, {}, {"samples": ("sampler", 0), "vae": ("ensemble", 1)}),
    "save": ("SaveImage", (1720, 180), (420, 460), None, {"filename_prefix": "eDiff-I"}, {"images": ("decode", 0)}),
}

EXAMPLES = {"01 Text to image": TEXT_TO_IMAGE}

BUILD = """(nodes) => {
    const graph = window.app.graph;
    graph.clear();
    const made = {};
    for (const [name, [type, pos, size, title, values, links]] of Object.entries(nodes)) {
        const node = window.LiteGraph.createNode(type);
        if (!node) throw new Error(`no node ${type}`);
        graph.add(node);
        node.pos = pos;
        node.setSize(size);
        if (title) node.title = title;
        for (const [widget, value] of Object.entries(values)) {
            const found = node.widgets.find((one) => one.name === widget) ?? (widget === "text" && node.widgets[0]);
            if (!found) throw new Error(`${type} has no widget ${widget}`);
            found.value = value;
        }
        made[name] = node;
    }
    for (const [name, [, , , , , links]] of Object.entries(nodes))
        for (const [input, [origin, slot]] of Object.entries(links))
            made[origin].connect(slot, made[name], made[name].findInputSlot(input));
}"""


def main() -> None:
    comfyui = find_comfyui(ROOT, Path.home(), os.environ)
    if comfyui is None:
        sys.exit("No ComfyUI was found. Set COMFYUI_DIR to yours.")
    with (
        tempfile.TemporaryDirectory() as base,
        Server(comfyui, Path(sys.executable), ROOT, Path(base), False) as server,
    ):
        with Frontend(server.address) as frontend:
            for name, nodes in EXAMPLES.items():
                frontend.page.evaluate(BUILD, nodes)
                frontend.fit()
                workflow = frontend.workflow()
                (FOLDER / f"{name}.json").write_text(json.dumps(workflow, indent=1) + "\n", encoding="utf-8")
                outputs = frontend.run()
                images = [image for output in outputs.values() for image in output.get("images", [])]
                preview(server.picture(images[0]), FOLDER / f"{name}.jpg")
                frontend.fit()
                frontend.page.screenshot(path=ROOT / "docs" / "images" / f"{name}.png")
                print(f"{name}: {len(nodes)} nodes, {len(images)} pictures", flush=True)
        if frontend.faults:
            sys.exit("\n".join(frontend.faults))


def preview(png: bytes, path: Path, side: int = 384) -> None:
    """The thumbnail that the template browser shows."""
    import io

    from PIL import Image

    image = Image.open(io.BytesIO(png)).convert("RGB")
    scale = max(1, side // max(image.size))
    image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST).save(path, quality=92)


if __name__ == "__main__":
    main()
