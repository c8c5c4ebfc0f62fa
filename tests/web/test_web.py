"""The pure logic of the canvas in Node, and that Python reads the paintings it writes."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from ediffi_core.painting import parse

HERE = Path(__file__).parent
CORE = HERE.parents[1] / "web" / "painter_core.js"
NODE = shutil.which("node")

pytestmark = pytest.mark.skipif(NODE is None, reason="node is not installed")

SCRIBBLE = """
import { Painting } from "%s";
let seed = 7;
const random = below => Math.floor(((seed = (Math.imul(seed, 1664525) + 1013904223) >>> 0) / 2 ** 32) * below);
const paintings = Array.from({ length: 40 }, () => {
    const painting = new Painting(16 + random(50), 16 + random(50));
    painting.overlap = random(2) === 0;
    for (let i = 0; i < 1 + random(6); i++) {
        const pen = painting.pen(painting.add("word " + i));
        for (let j = 0; j < 40; j++) painting.dab(pen, random(70), random(70), 1 + random(6), 1 + random(6));
    }
    const cells = painting.phrases.map(({ bit }) => [...painting.grid].map(cell => (cell >>> bit) & 1).join(""));
    return { value: String(painting), width: painting.width, cells };
});
console.log(JSON.stringify(paintings));
"""


def node(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([NODE, *arguments], capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("path", sorted(HERE.glob("*.test.mjs")), ids=lambda path: path.name)
def test_the_tests_in_node_pass(path):
    answer = node("--test", str(path))
    assert answer.returncode == 0, answer.stdout + answer.stderr


def test_python_reads_what_the_canvas_writes():
    answer = node("--input-type=module", "--eval", SCRIBBLE % CORE.as_uri())
    assert answer.returncode == 0, answer.stderr
    for written in json.loads(answer.stdout):
        painting = parse(written["value"])
        assert painting.width == written["width"]
        read = ["".join("01"[cell] for cell in phrase.mask.flatten().tolist()) for phrase in painting.phrases]
        assert read == written["cells"]
