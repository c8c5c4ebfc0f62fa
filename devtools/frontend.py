"""ComfyUI's canvas in a headless Chromium, for tests and for making the example workflows. Needs playwright."""

import json
import math
import shutil
import time
import urllib.request

from .comfyui import LOOPBACK

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking", "--disable-sync"]
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
READY = "() => Boolean(window.app?.graph && window.LiteGraph?.registered_node_types?.EDiffI_KSampler)"


def browser_path() -> str | None:
    return next((path for path in map(shutil.which, BROWSERS) if path), None)


class Frontend:
    """One page on a running server. Used as a context manager."""

    def __init__(self, address: str, nodes_2: bool = False, size: tuple[int, int] = (1600, 900)):
        self.address = address
        self.settings = {
            "Comfy.VueNodes.Enabled": nodes_2,
            "Comfy.TutorialCompleted": True,
            "Comfy.Locale": "en",
            "Comfy.Workflow.ShowMissingNodesWarning": True,
            "Comfy.Minimap.Visible": False,
            "LiteGraph.Canvas.MinFontSizeForLOD": 0,
        }
        self.size = size
        self.faults: list[str] = []  # uncaught errors of the page

    def __enter__(self) -> "Frontend":
        from playwright.sync_api import sync_playwright

        self._settle_settings()
        self._playwright = sync_playwright().start()
        self._browser = self._playwright.chromium.launch(executable_path=browser_path(), args=FLAGS)
        self.page = self._browser.new_page(viewport={"width": self.size[0], "height": self.size[1]})
        self.page.on("pageerror", lambda error: self.faults.append(str(error)))
        self.page.goto(self.address)
        self.page.wait_for_function(READY, timeout=120_000)
        self._wait_until_still()
        return self

    def __exit__(self, *_) -> None:
        self._browser.close()
        self._playwright.stop()

    def load(self, workflow: dict) -> None:
        """Open a saved workflow, as File > Open does."""
        self.page.evaluate("(workflow) => window.app.loadGraphData(workflow)", workflow)
        self._wait_until_still()

    def prompt(self) -> dict:
        """What the canvas would send to the server."""
        return self.page.evaluate("async () => (await window.app.graphToPrompt()).output")

    def workflow(self) -> dict:
        """What the canvas would save."""
        return self.page.evaluate("() => window.app.graph.serialize()")

    def missing_nodes(self) -> list[str]:
        return self.page.evaluate(
            "() => window.app.graph.nodes.filter(n => n.has_errors || !window.LiteGraph.registered_node_types[n.type])"
            ".map(n => n.type)"
        )

    def fit(self, largest: float = 1.0) -> None:
        """Show the whole graph."""
        self._bounds = self.page.evaluate(
            """(largest) => {
                const bounds = [Infinity, Infinity, -Infinity, -Infinity];
                for (const one of [...window.app.graph.nodes, ...window.app.graph.groups]) {
                    const [x, y, w, h] = one.boundingRect ?? one._bounding;
                    bounds[0] = Math.min(bounds[0], x); bounds[1] = Math.min(bounds[1], y);
                    bounds[2] = Math.max(bounds[2], x + w); bounds[3] = Math.max(bounds[3], y + h);
                }
                const canvas = window.app.canvas, [left, top, margin] = [70, 110, 40];
                const width = window.innerWidth - left - margin, height = window.innerHeight - top - 60;
                const scale = Math.min(width / (bounds[2] - bounds[0]), height / (bounds[3] - bounds[1]), largest);
                canvas.ds.scale = scale;
                canvas.ds.offset = [left / scale - bounds[0] + 10, top / scale - bounds[1] + 20];
                canvas.setDirty(true, true);
                return [bounds[0], bounds[1], bounds[2] - bounds[0], bounds[3] - bounds[1]];
            }""",
            largest,
        )
        self.page.wait_for_timeout(1500)

    def picture(self, scale: float = 0.7, margin: int = 16) -> bytes:
        """The graph alone as a PNG, every word legible, whatever the window's size."""
        self.fit()
        left, top, width, height = self._bounds
        window = {"width": math.ceil(width * scale) + 400, "height": math.ceil(height * scale) + 400}
        self.page.set_viewport_size(window)
        self.fit(scale)
        place = self.page.evaluate("() => [...window.app.canvas.ds.offset]")
        area = {"x": scale * (left + place[0]) - margin, "y": scale * (top + place[1]) - margin}
        area |= {"width": scale * width + 2 * margin, "height": scale * height + 2 * margin}
        picture = self.page.screenshot(clip=area)
        self.page.set_viewport_size({"width": self.size[0], "height": self.size[1]})
        return picture

    def run(self, seconds: float = 300) -> dict:
        """Press Run and wait; returns the outputs by node. Raises RuntimeError with what the canvas would show."""
        before = set(self._get("/history"))
        self.page.evaluate("() => window.app.queuePrompt(0)")
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            new = {key: entry for key, entry in self._get("/history").items() if key not in before}
            for entry in new.values():
                if entry["status"]["status_str"] != "success":
                    raise RuntimeError(str(entry["status"]["messages"]))
                return entry["outputs"]
            self.page.wait_for_timeout(300)
        raise RuntimeError(f"The prompt was not finished within {seconds:g} s.")

    def _settle_settings(self) -> None:
        body = json.dumps(self.settings).encode()
        headers = {"Content-Type": "application/json"}
        LOOPBACK.open(urllib.request.Request(self.address + "/api/settings", body, headers), timeout=30).close()

    def _get(self, path: str) -> dict:
        with LOOPBACK.open(self.address + path, timeout=30) as answer:
            return json.load(answer)

    def _wait_until_still(self) -> None:
        """Start-up and loading go on for a while after the page answers; wait until the graph stays as it is."""
        last, still = None, 0
        while still < 4:
            self.page.wait_for_timeout(500)
            now = self.page.evaluate("() => JSON.stringify(window.app.graph.nodes.map(n => [n.id, n.type, ...n.pos]))")
            still = still + 1 if now == last else 0
            last = now
