"""The words as each encoder saw them, under Text Encode on the real canvas."""

import sys
from pathlib import Path

import pytest
from browsing import comfyui_or_skip

from devtools.comfyui import Server
from devtools.frontend import Frontend

ROOT = Path(__file__).parents[2]
NODE = "EDiffI_TextEncode"

COMFYUI = comfyui_or_skip()

SEEN = """number => {  // what the picture of a node of the graph on the canvas shows; null where there is none
    const node = app.canvas.graph.getNodeById(number);
    const picture = node?.widgets?.find(widget => widget.type === "EDIFFI_TOKENS")?.element;
    if (!picture?.isConnected) return null;
    const scale = app.canvas.ds.scale;
    const [button, body] = picture.children;
    const texts = query => [...picture.querySelectorAll(query)].map(one => one.textContent);
    return {
        summary: button.textContent,
        open: button.getAttribute("aria-expanded") === "true" && !body.hidden,
        warning: picture.classList.contains("ediffi-tokens-warning"),
        boxes: [...picture.querySelectorAll(".ediffi-tokens-box")].map(box => box.firstChild?.data ?? ""),
        weights: texts(".ediffi-tokens-weight"),
        cut: texts(".ediffi-tokens-box[data-cut]"),
        notes: texts(".ediffi-tokens-note"),
        names: texts(".ediffi-tokens-name"),
        elements: picture.querySelectorAll("img, script, b").length,
        height: picture.getBoundingClientRect().height / scale,
        overflow: body.scrollHeight > body.clientHeight + 1,
        size: [...node.size],
    };
}"""
MAKE = """([encoders, text]) => {
    app.canvas.setGraph(app.rootGraph);
    app.graph.clear();
    app.graph.id = crypto.randomUUID(); // as each workflow that is opened has one
    app.canvas.ds.offset = [0, 0];
    app.canvas.ds.scale = 1;
    const made = ["EDiffI_LoadEncoders", "EDiffI_TextEncode", "PreviewAny"].map((kind, index) => {
        const node = LiteGraph.createNode(kind);
        node.pos = [100 + 430 * index, 120];
        app.graph.add(node);
        return node;
    });
    made[0].widgets[0].value = encoders;
    made[0].connect(0, made[1], 0);
    made[1].connect(0, made[2], 0);
    made[1].widgets.find(widget => widget.name === "text").value = text;
    return made[1].id;
}"""
SUMMARY = ".ediffi-tokens-summary"


class Canvas:
    """A graph with Text Encode in it."""

    def __init__(self, frontend: Frontend):
        self.frontend = frontend
        self.page = frontend.page

    def start(self, text: str = "a red circle") -> int:
        number, last, still = self.page.evaluate(MAKE, ["shapeworld", text]), None, 0
        while still < 3:  # Nodes 2.0 goes on giving new nodes their sizes for a while
            self.settle()
            still, last = (still + 1 if last == self.saved() else 0), self.saved()
        return number

    def write(self, number: int, text: str) -> None:
        self.page.evaluate(
            """([number, text]) => {
                app.graph.getNodeById(number).widgets.find(widget => widget.name === "text").value = text;
            }""",
            [number, text],
        )

    def tell(self, place, *encoders: dict) -> None:
        detail = {"node": str(place), "output": {"ediffi_tokens": [{"encoders": encoders}]}, "prompt_id": "p"}
        self.page.evaluate("detail => app.api.dispatchCustomEvent('executed', detail)", detail)

    def seen(self, number: int, wanted: bool = True) -> dict | None:
        if wanted:
            self.page.wait_for_function(f"number => Boolean(({SEEN})(number))", arg=number, timeout=10_000)
            self.settle()
        return self.page.evaluate(SEEN, number)

    def click(self) -> None:
        self.page.locator(SUMMARY).click()
        self.settle()

    def settle(self) -> None:
        self.page.wait_for_timeout(400)

    def saved(self) -> str:
        """What the canvas would save; a click brings a node to the front, which moves it in the list."""
        return self.page.evaluate(
            """() => {
                const saved = app.rootGraph.serialize();
                saved.nodes.sort((a, b) => a.id - b.id);
                return JSON.stringify(saved);
            }"""
        )


def encoder(name="CLIP", pieces=(("a", 1, 1), ("fox", 1, 1)), cut=(), **changes) -> dict:
    notes = [f"{name} does not read the last {len(cut)} tokens."] if cut else []
    shown = {"name": name, "off": False, "count": len(pieces), "most": 75, "chunks": [pieces], "cut": cut}
    return shown | {"cut_count": len(cut), "notes": notes} | changes


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    base = tmp_path_factory.mktemp("comfyui")
    with Server(COMFYUI, Path(sys.executable), ROOT, base, accelerated=False) as running:
        yield running


@pytest.fixture(scope="module", params=[False, True], ids=["classic", "nodes 2.0"])
def frontend(server, request):
    with Frontend(server.address, nodes_2=request.param) as page:
        yield page
        assert page.faults == []


@pytest.fixture
def canvas(frontend):
    return Canvas(frontend)


def test_a_real_run_shows_the_words_and_leaves_the_workflow_as_it_was(canvas, frontend):
    number = canvas.start("a (red:1.5) circle")
    before, asked = canvas.saved(), frontend.prompt()
    assert canvas.seen(number, wanted=False) is None
    frontend.run()
    closed = canvas.seen(number)
    assert closed["summary"] == "CLIP 3 of 75 · T5 3 of 112"
    assert not closed["open"]
    assert not closed["warning"]
    assert 17 <= closed["height"] <= 26  # Nodes 2.0 gives it spare height
    assert canvas.saved() == before
    assert frontend.prompt() == asked

    canvas.click()
    opened = canvas.seen(number)
    assert opened["open"]
    assert opened["boxes"] == ["a", "red", "circle"] * 2
    assert opened["weights"] == ["\u00d71.5"] * 2
    assert opened["names"] == ["CLIP 3 of 75", "T5 3 of 112"]
    assert opened["height"] > closed["height"] + 50
    assert not opened["overflow"]
    assert canvas.saved() == before
    canvas.click()
    again = canvas.seen(number)
    assert not again["open"]
    assert again["size"] == closed["size"]


def test_what_is_cut_is_shown_without_a_click_and_a_cached_run_shows_it_again(canvas, frontend):
    number = canvas.start("a red circle and a blue square " * 20 + "zebra")
    before = canvas.saved()
    for _ in range(2):  # the second is cached
        frontend.run()
        shown = canvas.seen(number)
        assert shown["open"]
        assert shown["warning"]
        assert shown["summary"].startswith("CLIP 75 of 75, ")
        assert "".join(shown["cut"]).endswith("zebra")
        assert [note.split(" from ")[0].split(" the ")[0] for note in shown["notes"]] == [
            "CLIP does not read",
            "T5 does not read",
        ]
        assert shown["overflow"]
        assert 197 <= shown["height"] <= 206
        assert canvas.saved() == before
    canvas.click()
    frontend.run()
    assert not canvas.seen(number)["open"], "closed by the user"
    canvas.write(number, "a red circle")
    frontend.run()
    shown = canvas.seen(number)
    assert not shown["warning"]
    assert not shown["open"]
    assert shown["cut"] == []


def test_prompts_are_text_and_nothing_else(canvas):
    number = canvas.start()
    evil = "<img src=x onerror=alert(1)>"
    cut = [("<script>alert(1)</script>", 1, 1)]
    canvas.tell(number, encoder(f"<b>{evil}", [(evil, 1.2, 1)], cut, notes=[f"<b>{evil}"]))
    shown = canvas.seen(number)
    assert shown["boxes"] == [evil, cut[0][0]]
    assert shown["notes"] == [f"<b>{evil}"]
    assert shown["elements"] == 0


def test_each_node_has_its_own_picture_and_a_copy_has_none(canvas):
    number = canvas.start()
    canvas.tell(number, encoder("CLIP"), encoder("T5", off=True))
    assert canvas.seen(number)["summary"] == "CLIP 2 of 75 · T5 off"
    before = canvas.saved()
    copy = canvas.page.evaluate(
        "number => { const copy = app.graph.getNodeById(number).clone(); app.graph.add(copy); return copy.id; }", number
    )
    canvas.settle()
    assert canvas.seen(copy, wanted=False) is None
    sizes = "([a, b]) => [a, b].map(number => app.graph.getNodeById(number).size[1])"
    grown, plain = canvas.page.evaluate(sizes, [number, copy])
    assert grown > plain
    canvas.page.evaluate("number => app.graph.remove(app.graph.getNodeById(number))", copy)
    canvas.tell(number)
    assert canvas.seen(number)["summary"] == "The tokens of this CLIP cannot be followed."
    assert before.count('"id"') == canvas.saved().count('"id"')


def test_the_picture_survives_resize_collapse_and_undo(canvas):
    number = canvas.start()
    canvas.page.evaluate("() => app.extensionManager.workflow.activeWorkflow.changeTracker.captureCanvasState()")
    canvas.tell(number, encoder(pieces=[("fox", 1, 1)] * 75), encoder("T5", cut=[("hill", 1, 1)]))
    wide = canvas.seen(number)
    assert wide["open"]
    canvas.page.evaluate(
        """number => {
            const node = app.graph.getNodeById(number);
            node.setSize([node.size[0] + 300, node.size[1]]);
            app.canvas.setDirty(true, true);
        }""",
        number,
    )
    assert canvas.seen(number)["height"] < wide["height"], "fewer lines"
    for _ in range(2):
        canvas.page.evaluate("number => app.graph.getNodeById(number).collapse()", number)
        canvas.settle()
    assert canvas.seen(number)["cut"] == ["hill"]
    canvas.page.evaluate(
        """async number => {
            const { changeTracker } = app.extensionManager.workflow.activeWorkflow;
            changeTracker.captureCanvasState();
            app.graph.getNodeById(number).title = "changed";
            changeTracker.captureCanvasState();
            await changeTracker.undo();
        }""",
        number,
    )
    canvas.settle()
    assert canvas.page.evaluate("number => app.graph.getNodeById(number).title", number) != "changed"
    assert canvas.seen(number)["cut"] == ["hill"]
    assert canvas.page.locator(".ediffi-tokens").count() == 1
    canvas.click()
    assert not canvas.seen(number)["open"]
    canvas.click()
    assert canvas.seen(number)["cut"] == ["hill"]


def test_a_node_in_a_subgraph_shows_its_words_there(canvas):
    number = canvas.start()
    host, inner = canvas.page.evaluate(
        """number => {
            const { subgraph, node } = app.graph.convertToSubgraph(new Set([app.graph.getNodeById(number)]));
            return [node.id, subgraph.nodes[0].id];
        }""",
        number,
    )
    canvas.tell(f"{host}:{inner}", encoder())
    assert canvas.seen(host, wanted=False) is None
    canvas.page.evaluate(
        "number => app.canvas.openSubgraph(app.graph.getNodeById(number).subgraph, app.graph.getNodeById(number))", host
    )
    canvas.settle()
    assert canvas.seen(inner)["summary"] == "CLIP 2 of 75"
    canvas.page.evaluate("() => app.canvas.setGraph(app.rootGraph)")
