"""Makes example_workflows/: each graph of graphs.py is built on the real canvas and saved as the canvas saves it.

    python -m devtools.examples [name ...]        (in the environment that dev.py makes; needs Chromium and ComfyUI)

What the pack's own weights can run is run, and its pictures are the preview. The others name files that are not here; stand-ins
of random weights fill the lists, and the preview shows the graph, or the node that the example is about.

Each kind of node is pictured for its help page in the first example that it is in, those that can be run before the others.
"""

import io
import json
import os
import sys
import tempfile
import uuid
from pathlib import Path

from PIL import Image

from . import cascade_graphs, graphs, painting_graphs, style_graphs
from .comfyui import PACK_NAME, Server, find_comfyui
from .frontend import Frontend
from .graphs import Columns, files_of

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "example_workflows"
IMAGES = ROOT / "docs" / "images"
HELP_IMAGES = ROOT / "web" / "docs" / "images"
STAND_INS = ROOT / "tests" / "support"
EXAMPLES = graphs.EXAMPLES | painting_graphs.EXAMPLES | style_graphs.EXAMPLES | cascade_graphs.EXAMPLES
PAINTER = f"/extensions/{PACK_NAME}/painter_core.js"
SHOWS = ("SaveImage", "SaveVideo", "PreviewImage", "MaskPreview")
SIDE = 384  # of a picture in a thumbnail
SITTER = 900  # pixels a side that a node's picture has at most

# Makes the graph and returns the ids of its nodes by their names.
BUILD = """async ([columns, painter, id]) => {
    const { Painting } = await import(painter);
    const painted = ({ size, phrases }) => {
        const painting = new Painting(...size);
        for (const { phrase, brush, strokes } of phrases) {
            const pen = painting.pen(painting.add(phrase));
            for (const stroke of strokes)
                stroke.forEach((to, i) => painting.line(pen, stroke[Math.max(0, i - 1)], to, brush, brush));
        }
        return painting.toString();
    };
    const GAP = 60, TITLE = 40, graph = window.app.graph, made = {};
    window.app.clean();
    graph.clear();
    graph.id = id; // the frontend keeps values of widgets under it, and would give them to the next workflow's nodes
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
                found.value = widget === "painting" ? painted(value) : value;
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
    return Object.fromEntries(Object.entries(made).map(([name, node]) => [name, node.id]));
}"""
PLACE = """(id) => {
    const boxes = window.app.graph.nodes.map((node) => node.boundingRect);
    const [x, y, width, height] = window.app.graph.getNodeById(id).boundingRect;
    return [x - Math.min(...boxes.map((box) => box[0])), y - Math.min(...boxes.map((box) => box[1])), width, height];
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
                if missing := not_bundled(columns):
                    print(f"{name}: left out, as the pack does not bring the ensemble {', '.join(missing)} yet")
                    continue
                ids = frontend.page.evaluate(BUILD, [described(columns), PAINTER, workflow_id(name)])
                frontend.fit()
                workflow = frontend.workflow()
                (FOLDER / f"{name}.json").write_text(json.dumps(workflow, indent=1) + "\n", encoding="utf-8")
                if files_of(columns):
                    thumbnail = look(frontend, [ids[name] for name in marked(columns)])
                else:
                    server.request("/free", {"free_memory": True})  # a node whose result is kept shows nothing
                    outputs = frontend.run()
                    silent = [
                        node["type"]
                        for node in workflow["nodes"]
                        if node["type"] in SHOWS and str(node["id"]) not in outputs
                    ]
                    if silent:  # the server refuses a part of a graph and runs the rest
                        sys.exit(f"{name} shows no picture in {', '.join(silent)}.\n{server.end_of_log()}")
                    shown = [ids[name] for name in [*marked(columns), *saving(columns)]]
                    images = [image for node in shown for image in outputs[str(node)]["images"]]
                    thumbnail = row([server.picture(image) for image in images])
                thumbnail.save(FOLDER / f"{name}.jpg", quality=92)
                frontend.fit()
                (IMAGES / f"{name}.png").write_bytes(frontend.picture())
                for key, kind in sitters().get(name, {}).items():
                    portrait = look(frontend, [ids[key]], SITTER)
                    portrait.quantize(128).save(HELP_IMAGES / f"{kind}.png", optimize=True)
                print(f"{name}: {sum(map(len, columns))} nodes", flush=True)
        if frontend.faults:
            sys.exit("\n".join(frontend.faults))


def not_bundled(columns: Columns) -> list[str]:
    """Ensembles that an example loads and the pack does not bring."""
    nodes = (node for column in columns for node in column.values() if node.type == "EDiffI_LoadEnsemble")
    wanted = {node.widgets.get("ensemble", "shapeworld-base") for node in nodes}
    return sorted(name for name in wanted if not (ROOT / "demo" / "ensembles" / name).is_dir())


def place_stand_ins(base: Path) -> None:
    """What the examples need and the pack does not bring, in a server's folder: weights, and the picture that ComfyUI brings."""
    sys.path.insert(0, str(STAND_INS))
    import stand_ins

    stand_ins.install(base / "custom_nodes")
    (base / "input").mkdir()
    Image.open(FOLDER / "01 Text to image.jpg").save(base / "input" / "example.png")


def workflow_id(name: str) -> str:
    return str(uuid.uuid5(uuid.NAMESPACE_URL, f"{PACK_NAME}/example_workflows/{name}"))


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


def marked(columns: Columns) -> list[str]:
    return [name for column in columns for name, node in column.items() if node.thumbnail]


def saving(columns: Columns) -> list[str]:
    return [name for column in columns for name, node in column.items() if node.type == "SaveImage"]


def row(pictures: list[bytes]) -> Image.Image:
    """The pictures beside each other at one height, enlarged without smoothing if small."""
    images = [Image.open(io.BytesIO(picture)).convert("RGB") for picture in pictures]
    images = [
        image.resize(
            (round(SIDE * image.width / image.height), SIDE),
            Image.Resampling.NEAREST if image.height < SIDE else Image.Resampling.LANCZOS,
        )
        for image in images
    ]
    made = Image.new("RGB", (sum(image.width for image in images), SIDE))
    for place, image in enumerate(images):
        made.paste(image, (sum(before.width for before in images[:place]), 0))
    return made


def sitters() -> dict[str, dict[str, str]]:
    """Of each example, which of its nodes stand for their kind on its help page: name of the node -> its kind."""
    chosen: dict[str, tuple[str, str]] = {}
    for name in sorted(EXAMPLES, key=lambda name: bool(files_of(EXAMPLES[name]))):
        for key, node in (item for column in EXAMPLES[name] for item in column.items()):
            if node.type.startswith("EDiffI_"):
                chosen.setdefault(node.type, (name, key))
    return {
        example: {key: kind for kind, (name, key) in chosen.items() if name == example}
        for example, _ in chosen.values()
    }


def look(frontend: Frontend, nodes: list[int], side: int = 2 * SIDE) -> Image.Image:
    """The canvas, or a part of it that holds these nodes, made smaller if it has more than `side` pixels a side."""
    margin = 16
    image = Image.open(io.BytesIO(frontend.picture(1.0 if nodes else 0.7, margin))).convert("RGB")
    if nodes:
        places = [frontend.page.evaluate(PLACE, node) for node in nodes]
        left, top = (min(place[axis] for place in places) for axis in (0, 1))
        right, bottom = (max(place[axis] + place[axis + 2] for place in places) for axis in (0, 1))
        image = image.crop((left, top, right + 2 * margin, bottom + 2 * margin))
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    return image


if __name__ == "__main__":
    main(sys.argv[1:])
