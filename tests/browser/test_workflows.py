"""Every example workflow, opened on the real canvas by both renderers of the frontend, compared, and run in one of them."""

import json
import sys
from pathlib import Path

import pytest
from browsing import comfyui_or_skip

from devtools.comfyui import Server
from devtools.examples import SHOWS, place_stand_ins
from devtools.frontend import Frontend
from devtools.workflow import to_api

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / "example_workflows").glob("*.json"))

COMFYUI = comfyui_or_skip()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    base = tmp_path_factory.mktemp("comfyui")
    place_stand_ins(base)
    with Server(COMFYUI, Path(sys.executable), ROOT, base, accelerated=False) as running:
        yield running


@pytest.fixture(scope="module", params=[False, True], ids=["classic", "nodes 2.0"])
def frontend(server, request):
    with Frontend(server.address, nodes_2=request.param) as page:
        yield page


def test_there_are_example_workflows():
    assert WORKFLOWS


# What a processor does in seconds, and experts still change.
SMALL = {"width": 128, "height": 128, "length": 5, "steps": 4}
SHRINK = """(small) => {
    for (const node of window.app.graph.nodes)
        for (const widget of node.widgets ?? [])
            if (widget.name in small && widget.value > small[widget.name])
                widget.value = Math.max(small[widget.name], widget.options?.min ?? 0);
}"""


@pytest.mark.parametrize(("number", "path"), list(enumerate(WORKFLOWS)), ids=[path.stem for path in WORKFLOWS])
def test_a_workflow_opens_without_red_nodes_means_what_dev_py_sends_and_runs(frontend, server, number, path):
    workflow = json.loads(path.read_text(encoding="utf-8"))
    frontend.load(workflow)
    assert frontend.missing_nodes() == []
    assert frontend.faults == []

    def inputs(prompt):
        return {key: (node["class_type"], node["inputs"]) for key, node in prompt.items()}

    assert inputs(frontend.prompt()) == inputs(to_api(workflow, server.get("/object_info")))
    # Each runs in one renderer, by turns: what runs is what the canvas sends, and that is the same from both.
    if frontend.settings["Comfy.VueNodes.Enabled"] != number % 2:
        return

    frontend.page.evaluate(SHRINK, SMALL)
    outputs = frontend.run()
    shows = [str(node["id"]) for node in workflow["nodes"] if node["type"] in SHOWS]
    made = [server.picture(one) for node in shows for one in outputs[node]["images"]]
    assert made
    assert all(file.startswith(b"\x89PNG") or file[4:8] == b"ftyp" for file in made)  # pictures or MP4 films


PICTURED = sorted(path.stem for path in (ROOT / "web" / "docs").glob("*.md") if "](images/" in path.read_text("utf-8"))


@pytest.mark.parametrize("node", PICTURED)
def test_a_help_page_shows_its_pictures(frontend, node):
    frontend.page.evaluate(
        """(type) => {
            window.app.graph.clear();
            const node = window.LiteGraph.createNode(type);
            window.app.graph.add(node);
            node.pos = [300, 300];
            window.app.canvas.selectNode(node);
        }""",
        node,
    )
    frontend.page.get_by_test_id("info-button").click()
    loaded = """() => {
        const images = [...document.querySelectorAll("img")].filter((one) => one.src.includes("/docs/images/"));
        return images.length > 0 && images.every((one) => one.complete && one.naturalWidth > 0);
    }"""
    frontend.page.wait_for_function(loaded, timeout=20_000)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_is_among_the_templates_with_its_picture(server, path):
    templates = server.get("/api/workflow_templates")
    assert any(path.stem in names for names in templates.values())
    assert path.with_suffix(".jpg").read_bytes().startswith(b"\xff\xd8")
