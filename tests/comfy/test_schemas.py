"""The nodes as ComfyUI describes them. Ids, sockets and the order of inputs are a promise to saved workflows."""

import json

from .conftest import ROOT
from .golden.regenerate import GOLDEN, description

CATEGORIES = {"text", "style", "experts", "regions", "sampling", "cascade", "analysis"}


def test_schemas_are_the_promised_ones(pack):
    """On a difference: adding a node, an option or an input at the end is fine, run golden/regenerate.py. Anything else breaks
    saved workflows."""
    expected = json.loads(GOLDEN.read_text())
    for node_id, node in pack.nodes.items():
        assert description(node) == expected.get(node_id), node_id
    assert set(pack.nodes) == set(expected)


def test_every_node_explains_itself(pack):
    for node_id, node in pack.nodes.items():
        schema = node.GET_SCHEMA()
        assert schema.display_name.startswith("eDiff-I "), node_id
        assert schema.category.removeprefix("eDiff-I/") in CATEGORIES, node_id
        assert schema.description.endswith("."), node_id
        assert schema.search_aliases, node_id
        for given in schema.inputs:
            nested = [
                inner for option in getattr(given, "options", None) or () for inner in getattr(option, "inputs", ())
            ]
            for one in (given, *nested):
                assert one.tooltip, f"{node_id} {one.id}"
        page = (ROOT / "web" / "docs" / f"{node_id}.md").read_text()
        assert page.startswith(f"# {schema.display_name}\n"), node_id
        assert "## See also" in page, node_id


def test_a_file_that_cannot_be_loaded_hides_no_other_nodes(pack, monkeypatch):
    import asyncio

    package = pack.module("text").__package__
    import sys

    extension = sys.modules[package]
    monkeypatch.setattr(extension, "FILES", ("text", "no_such_file", "sampling"))
    nodes = asyncio.run(extension.EDiffIExtension().get_node_list())
    ids = {node.GET_SCHEMA().node_id for node in nodes}
    assert "EDiffI_TextEncode" in ids
    assert "EDiffI_KSampler" in ids


def test_the_core_in_the_pack_needs_no_comfyui(pack):
    for file in (ROOT / "ediffi_core").glob("*.py"):
        assert "import comfy" not in file.read_text(), file.name


def test_only_the_bridge_knows_comfyuis_insides(pack):
    """Node files see comfy_api and folder_paths; everything else of ComfyUI lies behind comfy_bridge."""
    for file in (ROOT / "nodes").glob("*.py"):
        if file.name.startswith(("bridge_", "comfy_bridge")):
            continue
        lines = [line.strip() for line in file.read_text().splitlines()]
        imports = [line for line in lines if line.startswith(("import comfy", "from comfy", "import nodes"))]
        assert all(line.startswith("from comfy_api.latest import") for line in imports), file.name
