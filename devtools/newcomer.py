"""The first ten minutes of somebody who has just installed the pack: a fresh ComfyUI in a browser, used by mouse and keys.

    python -m devtools.newcomer [--pack FOLDER]        (in the environment that dev.py makes; needs Chromium and ComfyUI)

Every step is what a person does: it clicks what is on the screen, and fails where that is not there. Each leaves a screenshot,
docs/images/first-N.png, and its seconds in docs/evaluation/newcomer.json; docs/first-steps.md tells them.
"""

import argparse
import io
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image

from .comfyui import PACK_NAME, Server, find_comfyui
from .frontend import FLAGS, READY, browser_path

ROOT = Path(__file__).parents[1]
IMAGES = ROOT / "docs" / "images"
SIZE = {"width": 1920, "height": 1080}
SHOWN = (1280, 720)  # of the pictures that are kept
FIRST, PAINTING = "01 Text to image", "Paint with words"
OTHER_WORDS = "a small green triangle at the bottom and a large blue circle at the top, on a yellow background"
# Where a node is on the screen: left, top, width and height with its title, in pixels.
PLACE = """(type) => {
    const canvas = window.app.canvas, node = window.app.graph.nodes.find((one) => one.type === type);
    const [x, y, width, height] = node.boundingRect, [left, top] = canvas.convertOffsetToCanvas([x, y]);
    return [left, top, width * canvas.ds.scale, height * canvas.ds.scale];
}"""


class Newcomer:
    """A person in front of one page. `seconds` of each step, by what it is."""

    def __init__(self, page, server: Server):
        self.page = page
        self.server = server
        self.seconds: dict[str, float] = {}

    @contextmanager
    def step(self, what: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        self.seconds[what] = round(time.monotonic() - started, 1)
        self.page.wait_for_timeout(1500)  # what fades in
        shown = Image.open(io.BytesIO(self.page.screenshot())).convert("RGB").resize(SHOWN, Image.Resampling.LANCZOS)
        shown.quantize(128).save(IMAGES / f"first-{len(self.seconds)}.png", optimize=True)
        print(f"{len(self.seconds)}. {what}: {self.seconds[what]} s", flush=True)

    def click(self, name: str) -> None:
        self.page.get_by_role("button", name=name, exact=True).first.click()

    def templates(self) -> None:
        """The pack's, whether ComfyUI shows templates by itself, as on its first start, or not."""
        section = self.page.get_by_text(PACK_NAME, exact=True)
        if not section.count():
            self.page.get_by_label("Templates").first.click()
        section.click()
        self.page.get_by_text(FIRST).first.wait_for()

    def opened(self, template: str) -> None:
        self.page.get_by_text(template, exact=True).first.click()
        self.page.wait_for_function("(name) => document.title.includes(name)", arg=template, timeout=20_000)
        self.page.get_by_role("dialog").wait_for(state="hidden")
        self.page.wait_for_timeout(1000)

    def run(self) -> None:
        before = set(self.server.get("/history"))
        self.click("Run")
        while not (new := set(self.server.get("/history")) - before):
            self.page.wait_for_timeout(200)
        self.server.result(new.pop())  # raises where it failed

    def near(self, node: str, times: int) -> None:
        """Turn the wheel above a node's title, and drag the canvas until the node is in sight."""
        for _ in range(times):
            left, top, width, _height = self.page.evaluate(PLACE, node)
            self.page.mouse.move(left + width / 2, top + 8)
            self.page.mouse.wheel(0, -120)
            self.page.wait_for_timeout(150)
        left, top, width, _height = self.page.evaluate(PLACE, node)
        from_, to = (left + width / 2, top - 12), (SIZE["width"] / 2, 110)
        self.page.mouse.move(*from_)
        self.page.mouse.down(button="middle")
        self.page.mouse.move(*to, steps=8)
        self.page.mouse.up(button="middle")
        self.page.wait_for_timeout(300)

    def overview(self) -> None:
        self.page.mouse.click(SIZE["width"] / 2, SIZE["height"] - 60)  # empty canvas, so that no node is selected
        self.click("Fit View (.)")

    def index_of_prompt(self) -> int:
        """Among the texts in sight, the one that holds words and is no note."""
        texts = [one.input_value() for one in self.page.locator("textarea:visible").all()]
        return next(i for i, text in enumerate(texts) if text and not text.startswith("#"))

    def painted(self, word: str, *places: tuple[float, float]) -> None:
        """Choose a phrase by its word in the painter, and draw one stroke; places are shares of the painting."""
        self.page.locator(".ediffi-painter [data-word]", has_text=word).first.click()
        box = self.page.locator(".ediffi-frame").bounding_box()
        spots = [(box["x"] + u * box["width"], box["y"] + v * box["height"]) for u, v in places]
        self.page.mouse.move(*spots[0])
        self.page.mouse.down()
        for spot in spots[1:]:
            self.page.mouse.move(*spot, steps=6)
        self.page.mouse.up()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pack", type=Path, default=ROOT, help="the pack that was installed; this one by default")
    options = parser.parse_args(arguments)
    comfyui = find_comfyui(ROOT, Path.home(), os.environ)
    if comfyui is None:
        sys.exit("No ComfyUI was found. Set COMFYUI_DIR to yours.")
    from playwright.sync_api import sync_playwright

    started = time.monotonic()
    with (
        tempfile.TemporaryDirectory() as base,
        Server(comfyui, Path(sys.executable), options.pack, Path(base), False) as server,
        sync_playwright() as playwright,
    ):
        starting = round(time.monotonic() - started, 1)
        browser = playwright.chromium.launch(executable_path=browser_path(), args=FLAGS)
        page = browser.new_page(viewport=SIZE)
        faults: list[str] = []
        page.on("pageerror", lambda error: faults.append(str(error)))
        person = Newcomer(page, server)
        with person.step("opening ComfyUI and the pack's templates"):
            page.goto(server.address)
            page.wait_for_function(READY, timeout=120_000)
            page.wait_for_timeout(3000)
            person.templates()
        with person.step("opening the first one"):
            person.opened(FIRST)
        with person.step("running it"):
            person.run()
        with person.step("typing other words and running it again"):
            person.near("EDiffI_TextEncode", 3)
            page.locator("textarea:visible").nth(person.index_of_prompt()).fill(OTHER_WORDS)
            person.run()
        with person.step("asking what a node is for"):
            left, top, *_ = page.evaluate(PLACE, "EDiffI_KSampler")
            page.mouse.click(left + 60, top + 10)
            page.get_by_test_id("info-button").click()
            page.locator('img[src*="/docs/images/"]').first.wait_for()  # of the help page
        with person.step("opening the template to paint in"):
            page.get_by_label("Templates").first.click()
            person.templates()
            person.opened(PAINTING)
        with person.step("painting where the words belong"):
            person.near("EDiffI_PaintWithWords", 6)
            person.painted("circle", (0.5, 0.15), (0.8, 0.15), (0.8, 0.3), (0.5, 0.3))
        with person.step("running what is painted"):
            person.run()
            person.overview()
        browser.close()
        if faults:
            sys.exit("\n".join(faults))
        version = server.get("/system_stats")["system"]
    figures = {
        "comfyui": version["comfyui_version"],
        "starting ComfyUI": starting,
        "steps": [{"what": what, "seconds": seconds} for what, seconds in person.seconds.items()],
        "altogether": round(time.monotonic() - started, 1),
    }
    target = ROOT / "docs" / "evaluation" / "newcomer.json"
    target.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
