"""The painting of eDiff-I Paint With Words, by mouse, touch, pen and keys, on the real canvas: both renderers, two frontends."""

import json
import subprocess
import sys
import time
import uuid
import zipfile
from contextlib import ExitStack
from pathlib import Path

import pytest
from browsing import comfyui_or_skip

from devtools.comfyui import Server
from devtools.environment import cache_folder
from devtools.frontend import READY, Frontend
from ediffi_core.painting import parse

ROOT = Path(__file__).parents[2]
TEXT = "a photo of a red circle and a (blue square:1.2) on green grass"
RED, BLUE, GRASS = (4, 5), (8, 9), (11, 12)  # words of it
EVERYWHERE = [(which, renderer) for which in ("pinned", "newest") for renderer in ("classic", "nodes 2.0")]
FRONTEND = "comfyui-frontend-package"
VALUE = {
    "v": 1, "w": 16, "h": 16, "mode": "exclusive",
    "phrases": [{"id": "a1", "text": "red circle", "nth": None, "color": "#e69f00", "strength": 1, "on": True, "rle": "gAGAAQ=="}],
}  # fmt: skip

COMFYUI = comfyui_or_skip()


class Painter:
    """One Paint With Words node on a canvas, and a hand."""

    def __init__(self, frontend: Frontend, server: Server):
        self.frontend = frontend
        self.server = server
        self.nodes_2 = frontend.settings["Comfy.VueNodes.Enabled"]
        self.page = frontend.page
        self.complaints: list[str] = []
        self.page.on("console", self._hear)

    def _hear(self, message) -> None:
        if message.type in ("error", "warning") and "painter" in f"{message.text} {message.location.get('url', '')}":
            self.complaints.append(message.text)

    def js(self, code: str, argument=None):
        return self.page.evaluate(code, argument)

    def start(self, text: str = TEXT, width: int = 512, height: int = 384, painting: str = "") -> None:
        """An empty graph with one fresh node."""
        node = {
            "id": 1,
            "type": "EDiffI_PaintWithWords",
            "pos": [300, 80],
            "widgets_values": [text, width, height, painting],
        }
        self.open({"nodes": [node], "last_node_id": 1})

    def open(self, workflow: dict) -> None:
        empty = {
            "id": str(uuid.uuid4()),
            "nodes": [],
            "links": [],
            "last_node_id": 0,
            "last_link_id": 0,
            "version": 0.4,
        }
        place = {"extra": {"ds": {"scale": 1, "offset": [0, 0]}}}
        self.js("workflow => app.loadGraphData(workflow)", empty | place | workflow)
        self.settle()
        self.page.mouse.move(5, 300)

    def settle(self) -> None:
        """Wait until the picture lies still, and shows the prompt."""
        self.js(
            """async () => {
                const frame = () => new Promise(requestAnimationFrame);
                const place = () => JSON.stringify(document.querySelector(".ediffi-frame")?.getBoundingClientRect());
                for (let still = 0, before; still < 4; still = place() === before ? still + 1 : 0) {
                    before = place();
                    await frame();
                    if (!document.querySelector(".ediffi-frame")?.clientWidth) before = null;
                }
            }"""
        )

    def box(self, selector: str) -> dict:
        return self.js("selector => document.querySelector(selector).getBoundingClientRect().toJSON()", selector)

    def at(self, u: float, v: float) -> tuple[float, float]:
        """A place on the screen, for one in the picture, both from 0 to 1."""
        box = self.box(".ediffi-frame")
        return box["x"] + u * box["width"], box["y"] + v * box["height"]

    def word(self, index: int) -> tuple[float, float]:
        box = self.box(f'[data-word="{index}"]')
        return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2

    def drag(self, *places: tuple[float, float], button: str = "left") -> None:
        self.page.mouse.move(*places[0])
        self.page.mouse.down(button=button)
        for place in places[1:]:
            self.page.mouse.move(*place, steps=4)
        self.page.mouse.up(button=button)

    def choose(self, words: tuple[int, int]) -> None:
        self.drag(*map(self.word, words))
        self.settle()

    def stroke(self, *places: tuple[float, float], button: str = "left") -> None:
        self.drag(*[self.at(u, v) for u, v in places], button=button)

    def key(self, *keys: str) -> None:
        for key in keys:
            self.page.keyboard.press(key)

    def menu(self, opener: str, entry: str) -> None:
        self.page.locator(f'.ediffi-painter button[aria-label^="{opener}"]').last.click()
        self.page.locator(".ediffi-menu button", has_text=entry).click()

    @property
    def value(self) -> str:
        """What the canvas would send."""
        nodes = self.frontend.prompt().values()
        (node,) = [node for node in nodes if node["class_type"] == "EDiffI_PaintWithWords"]
        return node["inputs"]["painting"]

    @property
    def areas(self) -> dict[str, float]:
        """Part of the picture by phrase."""
        return {phrase.text: phrase.mask.float().mean().item() for phrase in parse(self.value).phrases}

    @property
    def status(self) -> str:
        return self.page.locator(".ediffi-status").inner_text()

    @property
    def view(self) -> list:
        """Where the graph and the node are."""
        return self.js(
            "() => [[...app.canvas.ds.offset], app.canvas.ds.scale, app.canvas.graph.nodes.map(n => [...n.pos])]"
        )

    def undo_workflow(self) -> None:
        self.js("() => app.extensionManager.workflow.activeWorkflow.changeTracker.undo()")
        self.settle()


def newest_frontend() -> Path:
    """The files of the newest frontend on PyPI, asked for once a day at most. Skips where there is no network."""
    folder = cache_folder() / "newest-frontend"
    folder.mkdir(parents=True, exist_ok=True)
    asked = folder / "asked"
    if not asked.exists() or time.time() - asked.stat().st_mtime > 86_400:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, FRONTEND]
        subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=300)
        asked.touch()
    wheels = sorted(folder.glob("*.whl"), key=lambda path: path.stat().st_mtime)
    if not wheels:
        pytest.skip(f"the newest {FRONTEND} cannot be downloaded")
    unpacked = wheels[-1].with_suffix("")
    if not unpacked.exists():
        with zipfile.ZipFile(wheels[-1]) as wheel:
            wheel.extractall(unpacked.with_suffix(".half"))
        unpacked.with_suffix(".half").rename(unpacked)
    return unpacked / "comfyui_frontend_package" / "static"


@pytest.fixture(scope="module")
def server_of(tmp_path_factory):
    """A server with the "pinned" frontend, of ComfyUI's requirements, or the "newest". One at a time."""
    with ExitStack() as running:
        servers = {}

        def server_of(which: str) -> Server:
            if which not in servers:
                flags = ["--front-end-root", str(newest_frontend())] if which == "newest" else []
                running.close()
                servers.clear()
                base = tmp_path_factory.mktemp(which)
                server = Server(COMFYUI, Path(sys.executable), ROOT, base, accelerated=False, flags=flags)
                servers[which] = running.enter_context(server)
            return servers[which]

        yield server_of


@pytest.fixture(scope="module", params=EVERYWHERE, ids=" ".join)
def page(server_of, request):
    which, renderer = request.param
    server = server_of(which)
    with Frontend(server.address, nodes_2=renderer == "nodes 2.0", size=(1500, 1000)) as frontend:
        yield Painter(frontend, server)


def on(*pages: tuple[str, str]):
    return pytest.mark.parametrize("page", pages, indirect=True, ids=" ".join)


pinned = on(*EVERYWHERE[:2])
once = on(EVERYWHERE[0])  # what depends neither on the renderer nor on the frontend


@pytest.fixture
def painter(page):
    page.start()
    yield page
    assert page.complaints == []
    assert page.frontend.faults == []


def test_painting_stays_in_the_painting_and_reaches_the_prompt(painter):
    before = painter.view
    painter.choose(RED)
    painter.stroke((0.2, 0.3), (0.35, 0.4))
    painter.choose(BLUE)
    painter.key("r")
    painter.stroke((0.5, 0.25), (0.75, 0.75))
    painter.choose(GRASS)
    painter.key("g")
    painter.stroke((0.9, 0.9))
    assert painter.view == before  # neither the node nor the graph has moved
    painting = parse(painter.value)
    assert (painting.width, painting.height) == (512, 384)
    red, blue, grass = painting.phrases
    assert (red.text, blue.text, grass.text) == ("red circle", "blue square", "green grass")
    assert red.mask[134, 140]
    assert not red.mask[134, 300]
    assert blue.mask.float().mean() == pytest.approx(0.125, abs=0.01)
    assert (red.mask.int() + blue.mask.int() + grass.mask.int() == 1).all()
    assert len(painter.value) < 4000
    assert "0 % unpainted" in painter.status


def test_ctrl_z_in_the_painting_undoes_strokes_and_nothing_else(painter):
    painter.choose(RED)
    painter.stroke((0.2, 0.3), (0.4, 0.3))
    one = painter.value
    painter.stroke((0.2, 0.7), (0.4, 0.7))
    two = painter.value
    node = painter.js("() => { window.node = app.graph.nodes[0]; return node.id; }")
    painter.key("Control+z")
    assert painter.value == one
    painter.key("Control+Shift+z")
    assert painter.value == two
    painter.key("Control+z", "Control+z", "Control+y")
    assert painter.value == one
    assert painter.js("() => app.graph.nodes[0] === window.node"), f"the workflow's undo has made node {node} anew"


def test_after_an_undo_of_the_workflow_the_hand_paints_on_the_living_node(painter):
    painter.choose(RED)
    painter.stroke((0.2, 0.3), (0.4, 0.3))
    painter.page.wait_for_timeout(50)
    one = painter.value
    painter.key("e")
    painter.stroke((0.3, 0.2), (0.3, 0.5))
    painter.page.wait_for_timeout(50)
    erased = painter.value
    painter.undo_workflow()
    assert painter.value == one
    assert painter.page.locator(".ediffi-painter").count() == 1
    assert painter.page.locator('[aria-label^="Eraser"][aria-pressed="true"]').count() == 1  # the tool is remembered
    painter.stroke((0.3, 0.2), (0.3, 0.5))
    assert painter.value == erased


def test_the_painting_keeps_its_place_when_the_properties_panel_opens(painter):
    width = pytest.approx(painter.box(".ediffi-painter")["width"], abs=2)
    painter.js("() => app.canvas.selectNode(app.graph.nodes[0])")
    toggle = painter.page.get_by_role("button", name="Toggle properties panel").first
    toggle.click()
    painter.page.get_by_text("Parameters").first.wait_for()
    painter.page.wait_for_timeout(500)
    opened = painter.box(".ediffi-painter")["width"]
    listed = painter.page.get_by_text("painting", exact=True).count()
    toggle.click()
    painter.page.wait_for_timeout(300)
    assert (opened, listed, painter.box(".ediffi-painter")["width"]) == (width, 0, width)


@pinned
def test_other_sizes_stretch_the_painting_and_leave_its_value_alone(painter):
    painter.choose(RED)
    painter.stroke((0.2, 0.3), (0.4, 0.3))
    value = painter.value
    painter.js("() => { app.graph.nodes[0].widgets.find(w => w.name === 'width').value = 1024; }")
    painter.page.wait_for_timeout(700)
    painter.settle()
    box = painter.box(".ediffi-frame")
    assert box["width"] / box["height"] == pytest.approx(1024 / 384, abs=0.05)
    assert painter.value == value
    painter.key("e")  # strokes go where the hand is
    painter.stroke((0.1, 0.3), (0.5, 0.3))
    assert painter.areas["red circle"] < 0.01


def test_the_renderer_may_change_and_the_painting_goes_on(painter):
    painter.choose(RED)
    painter.stroke((0.2, 0.3), (0.4, 0.3))
    before = painter.value
    set_renderer = "on => app.extensionManager.setting.set('Comfy.VueNodes.Enabled', on)"
    nodes_2 = painter.frontend.settings["Comfy.VueNodes.Enabled"]
    painter.js(set_renderer, not nodes_2)
    painter.page.wait_for_timeout(800)
    painter.settle()
    assert painter.value == before
    painter.stroke((0.6, 0.7), (0.8, 0.7))
    after = painter.value
    assert after != before
    painter.js(set_renderer, nodes_2)
    painter.page.wait_for_timeout(800)
    painter.settle()
    assert painter.value == after


def test_a_painting_goes_through_saving_pasting_subgraphs_and_api_files(painter):
    painter.choose(RED)
    painter.stroke((0.2, 0.3), (0.4, 0.3))
    value, prompt, saved = painter.value, painter.frontend.prompt(), painter.frontend.workflow()

    painter.js(
        "() => { app.canvas.selectNode(app.graph.nodes[0]); app.canvas.copyToClipboard(); app.canvas.pasteFromClipboard(); }"
    )
    painter.settle()
    pasted = [node["inputs"]["painting"] for node in painter.frontend.prompt().values()]
    assert pasted == [value, value]

    painter.frontend.load(saved)
    assert painter.value == value
    painter.js("prompt => app.loadApiJson(prompt, 'painting')", prompt)
    painter.settle()
    assert painter.value == value

    painter.js("() => { app.canvas.graph.convertToSubgraph(new Set([app.graph.nodes[0]])); }")
    assert painter.value == value
    painter.js("() => app.canvas.openSubgraph(app.graph.nodes[0].subgraph, app.graph.nodes[0])")
    painter.settle()
    painter.js(
        "() => { app.canvas.ds.offset = [100 - app.canvas.graph.nodes[0].pos[0], 60 - app.canvas.graph.nodes[0].pos[1]]; app.canvas.ds.scale = 1; app.canvas.setDirty(true, true); }"
    )
    painter.page.wait_for_timeout(300)
    painter.settle()
    painter.stroke((0.6, 0.7), (0.8, 0.7))
    assert painter.value != value
    painter.js("() => app.canvas.setGraph(app.rootGraph ?? app.graph)")


@pinned
def test_the_large_editor_paints_undoes_and_goes_back_into_the_node(painter):
    painter.choose(RED)
    painter.page.locator('[aria-label="Larger editor"]').click()
    painter.settle()
    assert painter.box(".ediffi-frame")["width"] > 700
    painter.stroke((0.2, 0.3), (0.4, 0.3))
    one = painter.value
    painter.stroke((0.6, 0.7), (0.8, 0.7))
    painter.key("Control+z")
    assert painter.value == one
    painter.page.mouse.move(*painter.at(0.3, 0.3))
    painter.page.keyboard.down("Control")
    painter.page.mouse.wheel(0, -100)
    painter.page.keyboard.up("Control")
    assert painter.js("() => document.querySelector('.ediffi-frame').style.transform").endswith("scale(1.25)")
    painter.key("e")
    painter.stroke((0.15, 0.3), (0.45, 0.3))  # in a zoomed picture, the hand is still where it seems
    assert painter.areas["red circle"] == pytest.approx(0, abs=0.002)
    painter.key("Escape")
    painter.settle()
    assert painter.page.locator("dialog.ediffi-dialog").count() == 0
    assert painter.page.locator(".ediffi-painter").count() == 1
    assert painter.box(".ediffi-painter")["width"] < 600


@pinned
def test_a_touch_and_a_pen_paint(painter):
    painter.choose(RED)
    before = painter.view
    devtools = painter.page.context.new_cdp_session(painter.page)
    places = [painter.at(u, 0.3) for u in (0.2, 0.3, 0.4)]
    kinds = ["touchStart", "touchMove", "touchMove"]
    for kind, (x, y) in zip(kinds, places, strict=True):
        devtools.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": [{"x": x, "y": y}]})
    devtools.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
    touched = painter.areas["red circle"]
    assert touched > 0.02
    for kind, (x, y) in zip(
        ["mousePressed", "mouseMoved", "mouseReleased"], [painter.at(u, 0.7) for u in (0.2, 0.4, 0.4)], strict=True
    ):
        devtools.send(
            "Input.dispatchMouseEvent",
            {"type": kind, "x": x, "y": y, "button": "left", "buttons": 1, "clickCount": 1, "pointerType": "pen"},
        )
    assert painter.areas["red circle"] == pytest.approx(2 * touched, rel=0.1)
    assert painter.view == before


@pinned
def test_at_a_small_zoom_the_hand_paints_where_it_is(painter):
    painter.choose(RED)
    painter.key("r")
    painter.js(
        "() => { app.canvas.ds.scale = 0.5; app.canvas.ds.offset = [200, 200]; app.canvas.setDirty(true, true); }"
    )
    painter.page.wait_for_timeout(300)
    painter.settle()
    painter.stroke((0.25, 0.25), (0.75, 0.75))
    mask = parse(painter.value).phrases[0].mask
    assert mask.float().mean().item() == pytest.approx(0.25, abs=0.02)
    assert mask[192, 256]


@pinned
def test_the_wheel_and_the_middle_button_are_the_graphs(painter):
    painter.page.mouse.move(*painter.at(0.5, 0.5))
    painter.page.mouse.wheel(0, -100)
    painter.page.wait_for_function("() => app.canvas.ds.scale > 1")
    offset = painter.view[0]
    painter.settle()
    painter.stroke((0.5, 0.5), (0.6, 0.6), button="middle")
    painter.page.wait_for_function("before => app.canvas.ds.offset[0] !== before[0]", arg=offset)


@pinned
def test_all_of_it_by_keys(painter):
    painter.page.locator(".ediffi-words").focus()
    painter.key(*["ArrowRight"] * 4, "Shift+ArrowRight", "Enter")
    painter.page.locator(".ediffi-sink").focus()
    painter.key("]", " ", *["ArrowRight"] * 5, " ")
    assert painter.areas["red circle"] > 0.02
    painter.key("e", " ", *["ArrowLeft"] * 5, " ")
    assert painter.areas["red circle"] == 0


@pinned
def test_the_picture_of_the_first_run_holds_the_painting_and_the_table_its_report(painter):
    encoders = painter.server.get("/object_info/EDiffI_LoadEncoders")["EDiffI_LoadEncoders"]["input"]["required"][
        "encoders"
    ]
    names = encoders[0] if isinstance(encoders[0], list) else encoders[1]["options"]
    nodes = [
        {"id": 1, "type": "EDiffI_PaintWithWords", "pos": [300, 80], "widgets_values": [TEXT, 512, 384, ""],
         "inputs": [{"name": "clip", "type": "CLIP", "link": 1}], "outputs": [{}, {}, {"name": "legend", "type": "IMAGE", "links": [2]}]},
        {"id": 2, "type": "EDiffI_LoadEncoders", "pos": [0, 80], "widgets_values": names[:1], "outputs": [{"name": "clip", "type": "CLIP", "links": [1]}]},
        {"id": 3, "type": "SaveImage", "pos": [900, 80], "widgets_values": ["painted"], "inputs": [{"name": "images", "type": "IMAGE", "link": 2}]},
    ]  # fmt: skip
    painter.open(
        {
            "nodes": nodes,
            "links": [[1, 2, 0, 1, 0, "CLIP"], [2, 1, 2, 3, 0, "IMAGE"]],
            "last_node_id": 3,
            "last_link_id": 2,
        }
    )
    painter.choose(RED)
    painter.stroke((0.2, 0.3), (0.4, 0.3))
    painter.choose(BLUE)
    outputs = painter.frontend.run()
    painter.page.wait_for_selector(".ediffi-found:not(:empty)")
    found, faults = (painter.page.locator(part).all_inner_texts() for part in (".ediffi-found", ".ediffi-faults"))
    (report,) = outputs["1"]["ediffi_painting"]
    tokens = [phrase["tokens"] for phrase in report["phrases"]]
    assert report["text"] == TEXT.replace("(blue square:1.2)", "blue square")
    assert (found, faults) == ([f"{count} tokens" for count in tokens], ["Nothing painted: no effect"])
    (image,) = outputs["3"]["images"]
    (saved,) = [json.loads(text) for key, text in texts(painter.server.picture(image)) if key == "workflow"]
    (node,) = [node for node in saved["nodes"] if node["id"] == 1]
    assert node["widgets_values"][3] == painter.value


def texts(png: bytes) -> list[tuple[str, str]]:
    """The text chunks of a PNG."""
    found, place = [], 8
    while place < len(png):
        length = int.from_bytes(png[place : place + 4], "big")
        if png[place + 4 : place + 8] == b"tEXt":
            key, _, text = png[place + 8 : place + 8 + length].decode("latin-1").partition("\0")
            found.append((key, text))
        place += 12 + length
    return found


@pytest.fixture(scope="session")
def saved() -> list[dict]:
    """Workflows of the frontends so far."""
    return []


def test_what_one_frontend_has_saved_another_opens(painter, saved):
    painter.choose(RED)
    painter.stroke((0.2, 0.3), (0.4, 0.3))
    saved.append(painter.frontend.workflow())
    value = painter.value
    for workflow in saved:
        painter.open(workflow)
        assert painter.value == value
        assert painter.page.locator(".ediffi-row").count() == 1


@once
def test_a_page_that_is_loaded_again_shows_the_painting(painter):
    painter.choose(RED)
    painter.stroke((0.2, 0.3), (0.4, 0.3))
    value = painter.value
    painter.page.wait_for_timeout(1500)  # the frontend saves its draft with a delay
    painter.page.reload()
    painter.page.wait_for_function(READY)
    painter.page.wait_for_selector(".ediffi-row")
    painter.settle()
    assert painter.value == value


@once
def test_every_tool_does_what_it_says(painter):
    painter.choose(RED)
    painter.key("r")
    painter.stroke((0.25, 0.25), (0.75, 0.75))
    assert painter.areas["red circle"] == pytest.approx(0.25, abs=0.01)
    painter.stroke((0.25, 0.25), (0.5, 0.75), button="right")
    assert painter.areas["red circle"] == pytest.approx(0.125, abs=0.01)
    painter.key("l")
    painter.stroke((0.0, 0.0), (0.5, 0.0), (0.0, 1.0))
    assert painter.areas["red circle"] == pytest.approx(0.375, abs=0.02)
    painter.choose(BLUE)
    painter.menu("More: ", "Fill the rest")
    assert sum(painter.areas.values()) == pytest.approx(1)
    painter.menu("More: ", "Invert")
    assert painter.areas == pytest.approx({"red circle": 0, "blue square": 0.375}, abs=0.02)
    painter.menu("More for this phrase: blue", 'Copy its area to "red circle"')
    assert painter.areas == pytest.approx({"red circle": 0.375, "blue square": 0.375}, abs=0.02)
    assert json.loads(painter.value)["mode"] == "overlap"
    painter.page.locator('[aria-label^="Clear"]').click()
    assert painter.areas["blue square"] == 0
    painter.key("b")
    painter.stroke((0.8, 0.1))
    painter.page.keyboard.down("Shift")
    painter.stroke((0.8, 0.9))
    painter.page.keyboard.up("Shift")
    assert parse(painter.value).phrases[1].mask[192, 409]  # on the straight line between the two
    painter.page.mouse.move(*painter.at(0.5, 0.5))
    painter.page.keyboard.down("Alt")
    painter.page.mouse.wheel(0, -300)
    painter.page.keyboard.up("Alt")
    painter.page.wait_for_function("() => document.querySelector('[aria-label^=\"Brush size\"]').value > 48")


@once
def test_the_table_changes_orders_and_removes_phrases(painter):
    for words in (RED, BLUE, GRASS):
        painter.choose(words)
        painter.stroke((0.1 * words[0], 0.5))
    row = painter.page.locator(".ediffi-row")
    row.nth(0).locator('[aria-label^="Strength"]').fill("2.5")
    row.nth(0).locator('[aria-label^="Strength"]').press("Enter")
    row.nth(1).locator('[aria-label^="Used"]').click()
    painter.menu("More for this phrase: green", "Move up")
    stored = json.loads(painter.value)["phrases"]
    assert [(one["text"], one["strength"], one["on"]) for one in stored] == [
        ("red circle", 2.5, True), ("green grass", 1, True), ("blue square", 1, False),
    ]  # fmt: skip
    assert [phrase.text for phrase in parse(painter.value).phrases] == ["red circle", "green grass"]
    painter.choose(BLUE)
    before = painter.value
    painter.stroke((0.5, 0.2))
    assert painter.value == before
    assert '"blue square" is switched off' in painter.status
    painter.menu("More for this phrase: blue", "Remove")
    assert row.count() == 2
    painter.page.locator(".ediffi-sink").focus()
    painter.key("Control+z")
    assert painter.value == before


@once
def test_phrases_follow_the_words_of_the_prompt(painter):
    painter.start("a cat and a cat on a mat")
    painter.choose((1, 1))
    painter.stroke((0.2, 0.3), (0.4, 0.3))
    painter.page.locator('[aria-label^="Which occurrence"]').select_option("1.")
    painter.choose((4, 4))  # the other cat
    stored = json.loads(painter.value)["phrases"]
    assert [(one["text"], one["nth"]) for one in stored] == [("cat", 1), ("cat", 2)]
    painter.choose((1, 1))
    assert len(json.loads(painter.value)["phrases"]) == 2

    painter.js("() => { app.graph.nodes[0].widgets.find(w => w.name === 'text').value = 'a dog on a mat'; }")
    painter.page.wait_for_selector(".ediffi-row.ediffi-missing")
    rle = stored[0]["rle"]
    painter.menu("More for this phrase: cat", "Choose other words")
    painter.choose((1, 1))
    assert [(one["text"], one["nth"]) for one in json.loads(painter.value)["phrases"]] == [("cat", 1), ("dog", None)]
    assert json.loads(painter.value)["phrases"][0]["rle"] == rle  # what is missing keeps its area


@once
def test_the_text_selected_in_the_prompt_box_becomes_a_phrase(painter):
    painter.js(
        "() => { const box = [...document.querySelectorAll('textarea')].find(box => box.value.includes('square'));"
        "box.focus(); box.setSelectionRange(box.value.indexOf('(blue'), box.value.indexOf(' on green')); }"
    )
    painter.menu("More: ", "Paint the text selected")
    assert list(painter.areas) == ["blue square"]


@once
def test_a_prompt_through_a_link_shows_its_words(painter):
    node = {"id": 1, "type": "EDiffI_PaintWithWords", "pos": [300, 80], "widgets_values": ["old", 512, 384, ""],
            "inputs": [{"name": "text", "type": "STRING", "link": 1, "widget": {"name": "text"}}]}  # fmt: skip
    source = {"id": 2, "type": "PrimitiveStringMultiline", "pos": [0, 80], "widgets_values": ["a green apple"],
              "outputs": [{"name": "STRING", "type": "STRING", "links": [1]}]}  # fmt: skip
    painter.open({"nodes": [node, source], "links": [[1, 2, 0, 1, 0, "STRING"]], "last_node_id": 2, "last_link_id": 1})
    painter.page.wait_for_function("() => document.querySelector('.ediffi-words').textContent === 'a green apple'")


@once
def test_words_are_never_run_as_html(painter):
    painter.start("<img src=x onerror=window.harm=1> <b>cat</b>")
    painter.choose((0, 3))
    painter.page.wait_for_timeout(200)
    assert painter.page.locator(".ediffi-painter :is(img, b)").count() == 0
    assert painter.js("() => window.harm") is None


@once
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (json.dumps(VALUE | {"v": 2}), "newer version of this pack (format 2)"),
        (json.dumps(VALUE)[:-9], "cannot be shown"),
        (json.dumps(VALUE | {"w": 20}), 'The area of "red circle" is damaged'),
    ],
    ids=["of a newer pack", "cut off", "of another size"],
)
def test_what_cannot_be_shown_is_kept_as_it_is(painter, value, message):
    painter.start(painting=value)
    painter.page.wait_for_selector(f"text={message}")
    painter.stroke((0.2, 0.3), (0.4, 0.3))
    painter.drag(painter.word(4), painter.word(5))
    assert painter.value == value
    painter.menu("More: ", "Start over")
    assert painter.value == ""
    painter.key("Control+z")
    assert painter.value == value


@once
def test_values_that_have_moved_are_found_by_their_names(painter):
    node = {"id": 1, "type": "EDiffI_PaintWithWords", "pos": [300, 80], "widgets_values": [TEXT, 512, 384, 7],
            "widgets_values_named": {"painting": json.dumps(VALUE)}}  # fmt: skip
    painter.open({"nodes": [node], "last_node_id": 1})
    assert painter.value == json.dumps(VALUE)


GIVE_PICTURE = """async ([width, height, bright]) => {
    const canvas = Object.assign(document.createElement("canvas"), { width, height });
    const context = canvas.getContext("2d");
    context.fillRect(0, 0, width, height);
    context.fillStyle = "white";
    context.fillRect(0, 0, width * bright, height);
    const blob = await new Promise(resolve => canvas.toBlob(resolve));
    const dataTransfer = new DataTransfer();
    dataTransfer.items.add(new File([blob], "half.png", { type: "image/png" }));
    document.querySelector(".ediffi-frame").dispatchEvent(new DragEvent("drop", { dataTransfer, bubbles: true, cancelable: true }));
}"""


@once
def test_a_picture_that_is_dropped_becomes_an_area_or_the_reference(painter):
    painter.choose(RED)
    painter.js(GIVE_PICTURE, [300, 100, 0.5])
    painter.page.locator(".ediffi-menu button", has_text="Use as the area").click()
    painter.page.wait_for_function("() => document.querySelector('.ediffi-part').textContent === '50 %'")
    assert parse(painter.value).phrases[0].mask[:, :256].all()
    painter.js(GIVE_PICTURE, [300, 100, 0.5])
    painter.page.locator(".ediffi-menu button", has_text="Use as the reference").click()
    painter.page.wait_for_function("() => document.querySelector('.ediffi-frame').style.backgroundImage")
    reference = json.loads(painter.value)["reference"]
    assert painter.server.picture(
        {"filename": reference["name"], "subfolder": reference["subfolder"], "type": reference["type"]}
    )
    assert painter.js("() => app.graph.nodes.length") == 1  # the graph has not taken it for itself

    value = json.loads(painter.value)
    value["reference"]["name"] = "gone.png"
    painter.start(painting=json.dumps(value))
    painter.page.wait_for_selector("text=The reference picture is not on this server.")
    painter.stroke((0.7, 0.5))
    assert painter.areas["red circle"] > 0.5


@once
def test_areas_are_saved_as_pictures(painter, tmp_path):
    image = pytest.importorskip("PIL.Image")
    painter.choose(RED)
    painter.key("r")
    painter.stroke((0.0, 0.0), (0.5, 1.0))
    for entry, color in (("Save the area", (255, 255, 255)), ("Save a map", (0xE6, 0x9F, 0))):
        with painter.page.expect_download() as download:
            painter.menu("More: ", entry)
        download.value.save_as(tmp_path / "area.png")
        picture = image.open(tmp_path / "area.png").convert("RGB")
        assert picture.size == (512, 384)
        assert sorted(picture.getcolors()) == [(256 * 384, (0, 0, 0)), (256 * 384, color)]
