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
        "inputs": [line for given in schema.inputs for line in lines(given)],
        "outputs": [output.io_type for output in schema.outputs],
    }


def lines(given, prefix=""):
    """One for an input, and one for each that it may bring along."""
    default = getattr(given, "default", None)
    line = [prefix + given.id, given.io_type, *([] if default is None else [f"= {default}"])]
    yield " ".join([*line, *(["optional"] if given.optional else [])])
    for option in getattr(given, "options", None) or ():
        for inner in getattr(option, "inputs", ()):
            yield from lines(inner, f"{prefix}{given.id}.{option.key}.")
    if hasattr(given, "template"):
        yield from lines(given.template.input, f"{prefix}{given.id}.{'|'.join(given.template.names)}.")


def test_write_schemas(pack):
    schemas = {node_id: description(node) for node_id, node in sorted(pack.nodes.items())}
    GOLDEN.write_text(json.dumps(schemas, indent=1) + "\n")
