"""Makes example_workflows/: each graph of graphs.py is built on the real canvas and saved as the canvas saves it.

    python -m devtools.examples [name ...]        (in the environment that dev.py makes; needs Chromium and ComfyUI)

What the pack's own weights can run is run, and its pictures are the preview. The others name files that are not here; stand-ins
of random weights fill the lists, and the preview shows the graph.
"""

import io
import json
import os
import sys
import tempfile
from pathlib import Path

from .comfyui import Server, find_comfyui
from .frontend import Frontend
from .graphs import EXAMPLES, Columns, files_of

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "example_workflows"
IMAGES = ROOT / "docs" / "images"
STAND_INS = ROOT / "tests" / "support"

BUILD = """(columns) => {
    const GAP = 60, TITLE = 40, graph = window.app.graph, made = {};
    window.app.clean();
    graph.clear();
    let left = 40;
    for (const column of columns) {
        let top = 40, widest = 0;
        for (const [name, { type, title, size, widgets, inputs, models }] of Object.entries(column)) {
            const node = window.LiteGraph.createNode(type);
            if (!node) throw new Error(`no node ${type}`);
            graph.add(node);
            made[name] = node;
            if (title) node.title = title;
            for (const [widget, value] of Object.entries(widgets)) {
                const found = node.widgets.find((one) => one.name === widget) ?? (widget === "text" && node.widgets[0]);
                if (!found) throw new Error(`${type} has no widget ${widget}`);
                found.value = value;
            }
            for (const [input, source] of Object.entries(inputs)) {
                const [origin, output] = source.split("."), socket = node.findInputSlot(input);
                const slot = output ? made[origin].findOutputSlot(output) : 0;
                if (socket < 0 || slot < 0) throw new Error(`no ${slot < 0 ? source : input} for ${name}`);
                made[origin].connect(slot, node, socket);
            }
            if (models.length) node.properties.models = models;
            const least = node.computeSize();
            node.pos = [left, top];
            node.setSize([Math.max(size[0], least[0]), Math.max(size[1], least[1])]);
            top += node.size[1] + TITLE + GAP / 2;
            widest = Math.max(widest, node.size[0]);
        }
        left += widest + GAP;
    }
}"""


def main(names: list[str]) -> None:
    comfyui = find_comfyui(ROOT, Path.home(), os.environ)
    if comfyui is None:
        sys.exit("No ComfyUI was found. Set COMFYUI_DIR to yours.")
    with tempfile.TemporaryDirectory() as base:
        place_stand_ins(Path(base))
        with (
            Server(comfyui, Path(sys.executable), ROOT, Path(base), False) as server,
            Frontend(server.address) as frontend,
        ):
            for name in names or EXAMPLES:
                columns = EXAMPLES[name]
                frontend.page.evaluate(BUILD, described(columns))
                frontend.fit()
                workflow = frontend.workflow()
                (FOLDER / f"{name}.json").write_text(json.dumps(workflow, indent=1) + "\n", encoding="utf-8")
                if files_of(columns):
                    pictures = [frontend.picture()]
                else:
                    server.request("/free", {"free_memory": True})  # a node whose result is kept shows nothing
                    outputs = frontend.run()
                    images = [image for node in sorted(outputs, key=int) for image in outputs[node].get("images", [])]
                    pictures = [server.picture(image) for image in images]
                preview(pictures, FOLDER / f"{name}.jpg")
                frontend.fit()
                (IMAGES / f"{name}.png").write_bytes(frontend.picture())
                print(f"{name}: {sum(map(len, columns))} nodes", flush=True)
        if frontend.faults:
            sys.exit("\n".join(frontend.faults))


def place_stand_ins(base: Path) -> None:
    """What the examples need and the pack does not bring, in a server's folder: weights, and the picture that ComfyUI brings."""
    from PIL import Image

    sys.path.insert(0, str(STAND_INS))
    import stand_ins

    stand_ins.install(base / "custom_nodes")
    (base / "input").mkdir()
    Image.open(FOLDER / "01 Text to image.jpg").save(base / "input" / "example.png")


def described(columns: Columns) -> list[dict]:
    """The columns as JSON."""
    return [
        {
            name: {
                "type": node.type,
                "title": node.title,
                "size": node.size,
                "widgets": node.widgets,
                "inputs": node.inputs,
                "models": [{"name": file.name, "url": file.url, "directory": file.folder} for file in node.files],
            }
            for name, node in column.items()
        }
        for column in columns
    ]


def preview(pictures: list[bytes], path: Path, side: int = 384) -> None:
    """The thumbnail that the template browser shows: the pictures beside each other, enlarged without smoothing if small."""
    from PIL import Image

    images = [Image.open(io.BytesIO(picture)).convert("RGB") for picture in pictures]
    row = Image.new("RGB", (sum(image.width for image in images), max(image.height for image in images)))
    for place, image in enumerate(images):
        row.paste(image, (sum(before.width for before in images[:place]), 0))
    scale = side // max(images[0].size)
    if scale > 0:
        row = row.resize((row.width * scale, row.height * scale), Image.Resampling.NEAREST)
    else:
        row.thumbnail((2 * side, 2 * side), Image.Resampling.LANCZOS)
    row.save(path, quality=92)


if __name__ == "__main__":
    main(sys.argv[1:])
