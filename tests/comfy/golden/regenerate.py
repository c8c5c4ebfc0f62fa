"""Writes schemas.json: `python -m pytest tests/comfy/golden/regenerate.py`.

Regenerating is right after adding a node or an input behind the others. It is wrong when an id, a type, an order or a
default changed by accident: workflows that people saved name inputs by id and, in the browser, values by order.
"""

import json
from pathlib import Path

GOLDEN = Path(__file__).with_name("schemas.json")
FOLDERS = {"ensemble", "encoders"}  # combos that list what is on disk


def description(node) -> dict:
    """Ids, sockets, order and defaults of a node, without words that may be improved."""
    schema = node.GET_SCHEMA()
    return {
        "inputs": [
            " ".join(
                [
                    given.id,
                    given.io_type,
                    *([] if getattr(given, "default", None) is None else [f"= {given.default}"]),
                    *(["optional"] if given.optional else []),
                ]
            )
            for given in schema.inputs
        ],
        "outputs": [output.io_type for output in schema.outputs],
    }


def test_write_schemas(pack):
    schemas = {node_id: description(node) for node_id, node in sorted(pack.nodes.items())}
    GOLDEN.write_text(json.dumps(schemas, indent=1) + "\n")
