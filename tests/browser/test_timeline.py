"""The strip that shows which expert denoises which step, on the real canvas: a real run, and what else happens to nodes."""

import json
import math
import sys
from pathlib import Path

import pytest
from browsing import comfyui_or_skip

from devtools.comfyui import Server
from devtools.frontend import Frontend
from ediffi_core.intervals import NoiseInterval
from ediffi_core.router import ExpertRouter
from ediffi_core.schedule import karras_sigmas
from ediffi_core.timeline import COLORS, Band, Timeline

ROOT = Path(__file__).parents[2]
WORKFLOW = json.loads((ROOT / "example_workflows" / "01 Text to image.json").read_text(encoding="utf-8"))
SAMPLER, STEPS = 7, 6  # its node in the workflow, and fewer steps than there, for speed
ENSEMBLE = json.loads((ROOT / "demo" / "ensembles" / "shapeworld-base" / "ensemble.json").read_text(encoding="utf-8"))
SAMPLER_KIND, ENSEMBLE_KIND = "EDiffI_KSampler", "EDiffI_ExpertEnsemble"

COMFYUI = comfyui_or_skip()

SEEN = """number => {  // what the strip of a node of the graph on the canvas shows; null where there is none
    const node = app.canvas.graph.getNodeById(number);
    const strip = node?.widgets?.find(widget => widget.type === "EDIFFI_TIMELINE")?.element;
    if (!strip?.isConnected) return null;
    const cells = [...strip.querySelectorAll(".ediffi-timeline-cell")];
    return {
        experts: cells.map(cell => Number(cell.dataset.expert)),
        states: cells.map(cell => cell.dataset.state?.[0]).join(""),
        colors: cells.map(cell => getComputedStyle(cell).backgroundColor),
        titles: cells.map(cell => cell.title),
        legend: [...strip.querySelectorAll(".ediffi-timeline-line")].map(line => line.innerText.replace(/\\s+/g, " ").trim()),
        width: strip.getBoundingClientRect().width / app.canvas.ds.scale,
        cellsWidth: cells.reduce((sum, cell) => sum + cell.getBoundingClientRect().width, 0) / app.canvas.ds.scale,
    };
}"""
WATCH = """() => {
    window.statesSeen = [];
    window.watcher?.disconnect();
    window.watcher = new MutationObserver(() => {
        const cells = [...document.querySelectorAll(".ediffi-timeline-cell")];
        const states = cells.map(cell => cell.dataset.state?.[0]).join("");
        if (states && window.statesSeen.at(-1) !== states) window.statesSeen.push(states);
    });
    window.watcher.observe(document.body, { subtree: true, childList: true });
}"""


class Strip:
    """The canvas, and the server's voice."""

    def __init__(self, frontend: Frontend):
        self.frontend = frontend
        self.page = frontend.page

    def start(self, *kinds: str) -> list[int]:
        """A graph with fresh nodes; their numbers."""
        return self.page.evaluate(
            """kinds => {
                app.canvas.setGraph(app.rootGraph);
                app.graph.clear();
                app.graph.id = crypto.randomUUID(); // as each workflow that is opened has one
                app.canvas.ds.offset = [0, 0];
                app.canvas.ds.scale = 1;
                return kinds.map((kind, index) => {
                    const node = LiteGraph.createNode(kind);
                    node.pos = [200 + 450 * index, 120];
                    app.graph.add(node);
                    return node.id;
                });
            }""",
            list(kinds),
        )

    def say(self, kind: str, **detail) -> None:
        self.page.evaluate("([kind, detail]) => app.api.dispatchCustomEvent(kind, detail)", [kind, detail])

    def announce(self, node, timeline: Timeline) -> None:
        self.say("ediffi.timeline", node=str(node), timeline=timeline.as_dict())

    def progress(self, node, value: int, most: int) -> None:
        state = {"value": value, "max": most, "state": "running", "node_id": str(node), "prompt_id": "p"}
        self.say("progress_state", prompt_id="p", nodes={str(node): state})

    def seen(self, node, wanted: bool = True) -> dict | None:
        if wanted:
            self.page.wait_for_function(f"number => Boolean(({SEEN})(number))", arg=node, timeout=10_000)
        return self.page.evaluate(SEEN, node)

    def settle(self) -> None:
        self.page.wait_for_timeout(400)

    def saved(self) -> str:
        return self.page.evaluate("() => JSON.stringify(app.rootGraph.serialize())")


def timeline_of(steps: int, edges=(9.61, 0.3), cfg: float | None = None) -> Timeline:
    tops, bottoms = [math.inf, *edges], [*edges, 0.0]
    intervals = [NoiseInterval(low, high) for low, high in zip(bottoms, tops, strict=True)]
    names = ["high", "middle", "low", "fourth", "fifth", "sixth"]
    bands = tuple(Band(name, interval, cfg) for name, interval in zip(names, intervals, strict=False))
    return Timeline(bands, tuple(karras_sigmas(steps).tolist()) if steps else (), (0.002, 80.0))


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
def strip(frontend):
    return Strip(frontend)


def test_a_real_run_fills_the_strip_and_leaves_the_workflow_as_it_was(strip, frontend):
    workflow = json.loads(json.dumps(WORKFLOW))
    sampler = next(node for node in workflow["nodes"] if node["id"] == SAMPLER)
    sampler["widgets_values"][2] = STEPS
    sampler["widgets_values"][0] = 10 + frontend.settings["Comfy.VueNodes.Enabled"]  # what is cached sends no steps
    frontend.load(workflow)
    before, asked = strip.saved(), frontend.prompt()
    assert strip.seen(SAMPLER, wanted=False) is None

    strip.page.evaluate(WATCH)
    frontend.run()
    strip.page.wait_for_function("steps => window.statesSeen.at(-1) === 'd'.repeat(steps)", arg=STEPS, timeout=10_000)
    shown = strip.seen(SAMPLER)
    intervals = [NoiseInterval(low, high or math.inf) for low, high in (one["interval"] for one in ENSEMBLE["experts"])]
    plan = ExpertRouter(intervals).plan(karras_sigmas(STEPS))
    assert shown["experts"] == plan
    assert shown["colors"] == ["rgb({}, {}, {})".format(*bytes.fromhex(COLORS[expert][1:])) for expert in plan]
    counts = [int(line.split(" · ")[1].split()[0]) for line in shown["legend"]]
    assert counts == [plan.count(expert) for expert in range(3)]
    order = ["d" * done + "c" + "w" * (STEPS - done - 1) for done in range(STEPS)] + ["d" * STEPS]
    seen = strip.page.evaluate("() => window.statesSeen")
    assert seen == [states for states in order if states in seen]  # in order; a fast step may be skipped
    assert len(seen) > STEPS // 2
    assert strip.saved() == before
    assert frontend.prompt() == asked


def test_a_run_that_is_interrupted_stays_partly_filled(strip):
    (node,) = strip.start(SAMPLER_KIND)
    strip.announce(node, timeline_of(10))
    assert strip.seen(node)["states"] == "c" + "w" * 9
    strip.progress(node, 3, 1000)  # of loading
    strip.progress(f"{node}1", 5, 10)
    assert strip.seen(node)["states"] == "c" + "w" * 9
    strip.progress(node, 3, 10)
    assert strip.seen(node)["states"] == "dddc" + "w" * 6
    strip.say("progress", node=str(node), value=4, max=10, prompt_id="p")
    assert strip.seen(node)["states"] == "ddddc" + "w" * 5
    strip.say("execution_interrupted", prompt_id="p", node_id=str(node))
    assert strip.seen(node)["states"] == "dddd" + "w" * 6
    strip.announce(node, timeline_of(4))
    assert strip.seen(node)["states"] == "cwww"


def test_each_sampler_has_its_own_strip_and_a_copy_has_none(strip):
    one, other = strip.start(SAMPLER_KIND, SAMPLER_KIND)
    before = strip.saved()
    strip.announce(one, timeline_of(5))
    strip.say(
        "executed", node=str(other), output={"ediffi_timeline": [timeline_of(7, cfg=5.5).as_dict()]}, prompt_id="p"
    )
    assert strip.seen(one)["states"] == "cwwww"
    assert strip.seen(other)["states"] == "d" * 7
    assert strip.seen(other)["legend"][0] == "high from 9.61 up · 3 steps · cfg 5.5"
    assert strip.seen(other)["titles"][0] == "Step 1 of 7, sigma 80, high"
    assert strip.saved() == before
    copy = strip.page.evaluate(
        "number => { const copy = app.graph.getNodeById(number).clone(); app.graph.add(copy); return copy.id; }", other
    )
    strip.settle()
    assert strip.seen(copy, wanted=False) is None
    assert strip.seen(other)["states"] == "d" * 7
    strip.say("execution_success", prompt_id="p")


def test_a_thousand_steps_share_cells_and_stay_in_the_strip(strip):
    (node,) = strip.start(SAMPLER_KIND)
    strip.announce(node, timeline_of(1000))
    strip.progress(node, 500, 1000)
    strip.settle()
    shown = strip.seen(node)
    assert 70 <= len(shown["experts"]) <= 83
    assert shown["experts"] == sorted(shown["experts"])
    assert shown["states"].strip("d").strip("w") == "c"
    assert len(shown["states"]) * 0.4 < shown["states"].index("c") < len(shown["states"]) * 0.6
    assert shown["titles"][0].startswith("Steps 1 to 13 of 1000, sigma 80 to ")
    assert 0.5 * shown["width"] < shown["cellsWidth"] <= shown["width"]
    strip.say("execution_error", prompt_id="p", node_id=str(node), node_type=SAMPLER_KIND, exception_message="")
    strip.page.keyboard.press("Escape")


@pytest.mark.parametrize("count", [2, 6])
def test_an_ensemble_shows_its_bands_and_boundaries(strip, count):
    (node,) = strip.start(ENSEMBLE_KIND)
    before = strip.saved()
    edges = (9.61, 3.0, 2.99, 0.5, 0.01)[: count - 1]
    strip.say("executed", node=str(node), output={"ediffi_timeline": [timeline_of(0, edges).as_dict()]}, prompt_id="p")
    strip.settle()
    shown = strip.seen(node)
    assert shown["experts"] == list(range(count))
    assert shown["legend"][0] == "high from 9.61 up"
    assert shown["legend"][-1].endswith(f"below {edges[-1]:g}")
    assert shown["cellsWidth"] <= shown["width"]
    assert strip.saved() == before


def test_the_strip_survives_resize_collapse_and_undo(strip):
    (node,) = strip.start(SAMPLER_KIND)
    strip.page.evaluate("() => app.extensionManager.workflow.activeWorkflow.changeTracker.captureCanvasState()")
    strip.announce(node, timeline_of(6))
    strip.progress(node, 2, 6)
    strip.say("execution_interrupted", prompt_id="p", node_id=str(node))
    narrow = strip.seen(node)["width"]
    strip.page.evaluate(
        """number => {
            const node = app.graph.getNodeById(number);
            node.setSize([node.size[0] + 200, node.size[1]]);
            app.canvas.setDirty(true, true);
        }""",
        node,
    )
    strip.settle()
    assert strip.seen(node)["width"] == pytest.approx(narrow + 200, abs=3)
    for _ in range(2):
        strip.page.evaluate("number => app.graph.getNodeById(number).collapse()", node)
        strip.settle()
    assert strip.seen(node)["states"] == "ddwwww"
    strip.page.evaluate(
        """async number => {
            const { changeTracker } = app.extensionManager.workflow.activeWorkflow;
            changeTracker.captureCanvasState();
            app.graph.getNodeById(number).title = "changed";
            changeTracker.captureCanvasState();
            await changeTracker.undo();
        }""",
        node,
    )
    strip.settle()
    assert strip.page.evaluate("number => app.graph.getNodeById(number).title", node) != "changed"
    assert strip.seen(node)["states"] == "ddwwww"
    assert strip.page.locator(".ediffi-timeline").count() == 1


def test_a_sampler_in_a_subgraph_has_its_strip_there(strip):
    node, other = strip.start(SAMPLER_KIND, SAMPLER_KIND)
    host, inner = strip.page.evaluate(
        """number => {
            const { subgraph, node } = app.graph.convertToSubgraph(new Set([app.graph.getNodeById(number)]));
            return [node.id, subgraph.nodes[0].id];
        }""",
        node,
    )
    strip.announce(f"{host}:{inner}", timeline_of(5))
    strip.progress(f"{host}:{inner}", 1, 5)
    assert strip.seen(host, wanted=False) is strip.seen(other, wanted=False) is None
    strip.page.evaluate(
        "number => app.canvas.openSubgraph(app.graph.getNodeById(number).subgraph, app.graph.getNodeById(number))", host
    )
    strip.settle()
    assert strip.seen(inner)["states"] == "dcwww"
    strip.progress(f"{host}:{inner}", 4, 5)
    assert strip.seen(inner)["states"] == "ddddc"
    strip.say("execution_success", prompt_id="p")
    strip.page.evaluate("() => app.canvas.setGraph(app.rootGraph)")


def test_the_strip_stays_with_its_workflow_when_tabs_are_switched(strip, frontend):
    frontend.page.evaluate("workflow => app.loadGraphData(workflow)", WORKFLOW)
    strip.say("execution_start", prompt_id="p")
    strip.announce(SAMPLER, timeline_of(8))
    assert strip.seen(SAMPLER)["states"] == "c" + "w" * 7
    tab = "() => app.extensionManager.workflow.activeWorkflow.path"
    first = frontend.page.evaluate(tab)
    another = "workflow => app.loadGraphData({ ...workflow, id: crypto.randomUUID() })"  # a saved file has its own
    frontend.page.evaluate(another, WORKFLOW)
    frontend.page.wait_for_function(f"first => ({tab})() !== first", arg=first)
    strip.progress(SAMPLER, 5, 8)
    strip.settle()
    assert strip.seen(SAMPLER, wanted=False) is None  # the node of the same number in another workflow
    tabs = frontend.page.locator(".workflow-tab")
    tabs.nth(tabs.count() - 2).click()
    frontend.page.wait_for_function(f"first => ({tab})() === first", arg=first)
    assert strip.seen(SAMPLER)["states"] == "d" * 5 + "c" + "ww"
    strip.say("execution_success", prompt_id="p")
    assert strip.seen(SAMPLER)["states"] == "d" * 5 + "www"
