"""The pack as the Manager installs it: what a release holds, unzipped into a ComfyUI that has nothing else."""

import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from devtools.workflow import to_api

from .conftest import ROOT

NAME = "comfyui-ediffi"  # of the folder that the Manager makes
SECONDS = 0.5  # that importing the pack may take


def released() -> list[str]:
    """Paths that `comfy node pack` puts into the archive: what git tracks, but for .comfyignore."""
    lines = (ROOT / ".comfyignore").read_text(encoding="utf-8").splitlines()
    ignored = [line for line in lines if line and not line.startswith("#")]
    assert not any(set("*?[!\\") & set(line) for line in ignored), "only plain paths are understood here"
    command = ["git", "-C", str(ROOT), "ls-files", "-z"]
    try:
        tracked = subprocess.run(command, capture_output=True, check=True, text=True).stdout.split("\0")[:-1]
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("This is no git checkout, so nobody knows what a release holds.")
    return [
        path
        for path in tracked
        if not any(path == one or (one.endswith("/") and path.startswith(one)) for one in ignored)
        and (ROOT / path).exists()
    ]


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    file = tmp_path_factory.mktemp("release") / "node.zip"
    with zipfile.ZipFile(file, "w") as made:
        for path in released():
            made.write(ROOT / path, path)
    return file


class Installed:
    """A base folder of ComfyUI with the archive in custom_nodes, and an empty pack beside it to compare with."""

    def __init__(self, archive, base):
        self.base, self.pack = base, base / "custom_nodes" / NAME
        with zipfile.ZipFile(archive) as held:
            held.extractall(self.pack)
        empty = base / "custom_nodes" / "empty"
        empty.mkdir()
        (empty / "__init__.py").write_text("NODE_CLASS_MAPPINGS = {}\n")

    def server(self, comfy_folder):
        from .server import Server

        class AsItIs(Server):
            """Starts on what is in custom_nodes."""

            def place(self):
                pass

        return AsItIs(comfy_folder, Path(sys.executable), self.pack, self.base, accelerated=False)


@pytest.fixture(scope="module")
def installed(archive, tmp_path_factory):
    return Installed(archive, tmp_path_factory.mktemp("installed"))


def import_seconds(log: str) -> dict[str, float]:
    """Of each pack, as ComfyUI's log lists them."""
    lines = re.findall(r"([\d.]+) seconds(?: \((.*?)\))?: .*[\\/]custom_nodes[\\/]([^\\/\n]+?)\s*$", log, re.MULTILINE)
    assert not any(failed for _, failed, _ in lines), lines
    return {name: float(seconds) for seconds, _, name in lines}


def test_a_release_holds_what_it_needs_and_nothing_of_the_workshop():
    paths = released()
    tops = {path.split("/")[0] for path in paths}
    assert {
        "__init__.py",
        "nodes",
        "ediffi_core",
        "web",
        "example_workflows",
        "locales",
        "demo",
        "pyproject.toml",
    } <= tops
    assert not {"tests", "devtools", "bench", ".github"} & tops
    assert not {"requirements.txt", "install.py"} & tops  # the Manager would run pip
    assert "\ndependencies = []\n" in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert all((ROOT / path).stat().st_size <= 16 * 2**20 for path in paths)
    assert sum((ROOT / path).stat().st_size for path in paths if path.startswith("demo/")) <= 64 * 2**20


def test_an_installed_release_loads_runs_and_leaves_nothing(comfy_folder, pack, installed):
    pytest.importorskip("aiohttp")
    before = {path.relative_to(installed.base) for path in installed.pack.rglob("*")}
    workflow = json.loads((ROOT / "example_workflows" / "01 Text to image.json").read_text(encoding="utf-8"))
    with installed.server(comfy_folder) as server:
        log = server.log.read_text(errors="replace")
        seconds = import_seconds(log)
        about_us = [line for line in log.splitlines() if "ediffi" in line.lower() and "seconds" not in line]
        assert not [line for line in about_us if re.search(r"warn|error|fail|traceback", line, re.IGNORECASE)], about_us
        assert "Traceback" not in log
        assert seconds[NAME] <= seconds["empty"] + SECONDS, seconds

        nodes = server.get("/object_info")
        assert {name for name in nodes if name.startswith("EDiffI_")} == set(pack.nodes)
        templates = server.get("/workflow_templates")[NAME]
        assert sorted(templates) == sorted(path.stem for path in (ROOT / "example_workflows").glob("*.json"))
        for name in pack.nodes:
            assert server.request(f"/extensions/{NAME}/docs/{name}.md").startswith(b"# "), name

        result = server.run(to_api(workflow, nodes))
        assert result.status == "success", result.error

    after = {path.relative_to(installed.base) for path in installed.pack.rglob("*") if "__pycache__" not in path.parts}
    assert after == before  # nothing is written into the pack

    shutil.rmtree(installed.pack)
    with installed.server(comfy_folder) as server:
        assert not [name for name in server.get("/object_info") if name.startswith("EDiffI_")]
    left = [path for path in installed.base.rglob("*") if "ediffi" in path.name.lower()]
    assert all("output" in path.relative_to(installed.base).parts for path in left), (
        left
    )  # a person's own pictures stay
