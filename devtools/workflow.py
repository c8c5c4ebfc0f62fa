"""Workflow files: from what the canvas saves to what the server's /prompt accepts.

A saved workflow lists nodes with their widget values by position, and links by number; a prompt maps each node's id to its
inputs by name. Which inputs are widgets, and in which order, only the server's /object_info knows.
"""

from collections.abc import Iterator

MUTED, BYPASSED = 2, 4  # a node's `mode`
ONLY_ON_CANVAS = {"Note", "MarkdownNote", "Reroute", "PrimitiveNode"}
WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", "COLOR"}  # socket types that are drawn as widgets
DYNAMIC_COMBO = "COMFY_DYNAMICCOMBO_V3"  # a choice that brings inputs of its own, named `choice.input`
AFTER_GENERATE = {"fixed", "increment", "decrement", "randomize"}  # saved behind a seed; no input


def to_api(workflow: dict, object_info: dict) -> dict:
    """The prompt of a saved workflow: {id: {"class_type", "inputs", "_meta"}}."""
    subgraphs = {graph["id"] for graph in (workflow.get("definitions") or {}).get("subgraphs", [])}
    graph = Graph(workflow)
    prompt = {}
    for node in graph.nodes.values():
        kind = node["type"]
        if kind in ONLY_ON_CANVAS or node.get("mode") in (MUTED, BYPASSED):
            continue
        if kind in subgraphs:
            raise ValueError(f"Node {node['id']} is a subgraph, which dev.py cannot open. Unpack it on the canvas.")
        if kind not in object_info:
            raise ValueError(f'The server knows no node "{kind}" (node {node["id"]}). Did its pack fail to load?')
        schema = object_info[kind]
        inputs = {name: protected(value) for name, value in widget_values(node, schema)}
        for socket in node.get("inputs") or []:
            if socket.get("link") is not None:
                source = graph.source(socket["link"])
                if source is not None:
                    inputs[socket["name"]] = source
        title = node.get("title") or schema.get("display_name") or kind
        prompt[str(node["id"])] = {"class_type": kind, "inputs": inputs, "_meta": {"title": title}}
    return prompt


def protected(value):
    """A list would be read as a link, so the server takes it in a wrapper."""
    return {"__value__": value} if isinstance(value, list) else value


class Graph:
    """The nodes and links of a saved workflow, with a way from a link back to what feeds it."""

    def __init__(self, workflow: dict):
        self.nodes = {node["id"]: node for node in workflow["nodes"]}
        self.origins = {}
        for link in workflow["links"]:
            if isinstance(link, dict):
                self.origins[link["id"]] = (link["origin_id"], link["origin_slot"])
            else:
                self.origins[link[0]] = (link[1], link[2])

    def source(self, link):
        """[id, slot] of the node that makes the value, a primitive's own value, or None where nothing feeds the link."""
        while link is not None:
            origin, slot = self.origins[link]
            node = self.nodes[origin]
            if node.get("mode") == MUTED:
                return None
            if node["type"] == "PrimitiveNode":
                return protected(node["widgets_values"][0])
            if node["type"] == "Reroute":
                link = node["inputs"][0].get("link")
            elif node.get("mode") == BYPASSED:
                link = passed_through(node, slot)
            else:
                return [str(origin), slot]
        return None


def passed_through(node: dict, slot: int):
    """The link a bypassed node hands on from its output: the input at the same place if the types agree, else the first
    linked one of that type."""
    kind = node["outputs"][slot]["type"]
    sockets = node.get("inputs") or []
    for socket in [*sockets[slot : slot + 1], *sockets]:
        if socket.get("link") is not None and socket["type"] in (kind, "*"):
            return socket["link"]
    return None


def widget_values(node: dict, schema: dict) -> Iterator[tuple[str, object]]:
    """(input's name, value) of every widget. A value that was not saved is the schema's default."""
    saved = node.get("widgets_values_named") or node.get("widgets_values") or []
    drawn = {socket["widget"]["name"] for socket in node.get("inputs") or [] if socket.get("widget")}
    take = by_name(saved) if isinstance(saved, dict) else by_position(saved)
    yield from walk(schema["input"], schema.get("input_order"), drawn, take)


def by_name(saved: dict):
    return lambda name, spec: saved.get(name, default_value(spec))


def by_position(saved: list):
    """Hands out saved values in order, passing over those that belong to no input."""
    values = list(saved)

    def take(name: str, spec):
        if not values:
            return default_value(spec)
        value = values.pop(0)
        options = options_of(spec)
        after_seed = options.get("control_after_generate") or (spec[0] == "INT" and name in ("seed", "noise_seed"))
        if values and (
            (after_seed and values[0] in AFTER_GENERATE)
            or (options.get("image_upload") and values[0] == "image")  # the button below the file's name
        ):
            values.pop(0)
        return value

    return take


def walk(declared: dict, order: dict | None, drawn: set[str], take, prefix: str = "") -> Iterator[tuple[str, object]]:
    for section in ("required", "optional"):
        specs = declared.get(section) or {}
        for name in (order or {}).get(section) or specs:
            spec, full_name = specs[name], prefix + name
            if not is_widget(spec) and full_name not in drawn:
                continue
            value = take(full_name, spec)
            if value is None and section == "optional":
                continue
            yield full_name, value
            if spec[0] == DYNAMIC_COMBO:
                chosen = next((option for option in spec[1]["options"] if option["key"] == value), None)
                if chosen is None:
                    raise ValueError(f'"{value}" is no choice of {full_name} on this server.')
                yield from walk(chosen["inputs"], None, drawn, take, full_name + ".")


def is_widget(spec) -> bool:
    options = options_of(spec)
    if options.get("forceInput"):
        return False
    kind = spec[0]
    return isinstance(kind, list) or kind in WIDGETS or kind == DYNAMIC_COMBO or bool(options.get("socketless"))


def default_value(spec):
    options = options_of(spec)
    if "default" in options:
        return options["default"]
    choices = (spec[0] if isinstance(spec[0], list) else options.get("options")) or [None]  # no file of that kind
    return choices[0]["key"] if spec[0] == DYNAMIC_COMBO else choices[0]


def options_of(spec) -> dict:
    return spec[1] if len(spec) > 1 else {}


def set_text(prompt: dict, text: str) -> None:
    """Puts the words into every text that some input named `positive` leads back to."""
    found = {number for node in prompt.values() for number in texts_behind(prompt, node["inputs"].get("positive"))}
    if not found:
        raise ValueError("No text of the workflow leads to an input named `positive`, so --prompt has no place in it.")
    for number in found:
        prompt[number]["inputs"]["text"] = text


def texts_behind(prompt: dict, value) -> Iterator[str]:
    """Ids of the nearest nodes with a `text` upstream of an input's value."""
    if not isinstance(value, list):
        return
    node = prompt[value[0]]
    if isinstance(node["inputs"].get("text"), str):
        yield value[0]
    else:
        for upstream in node["inputs"].values():
            yield from texts_behind(prompt, upstream)


def set_seed(prompt: dict, seed: int) -> None:
    places = [
        (node["inputs"], name)
        for node in prompt.values()
        for name in ("seed", "noise_seed")
        if isinstance(node["inputs"].get(name), int)
    ]
    if not places:
        raise ValueError("The workflow has no seed, so --seed has no place in it.")
    for inputs, name in places:
        inputs[name] = seed


def text_and_seed(workflow: dict) -> tuple[str | None, int | None]:
    """The words and the seed of a saved workflow without a server to ask: the first text of the node that feeds an input named
    `positive`, and the first whole number of the node that has this input."""
    graph = Graph(workflow)
    for node in graph.nodes.values():
        for socket in node.get("inputs") or []:
            if socket["name"] == "positive" and socket.get("link") is not None:
                source = graph.nodes[graph.origins[socket["link"]][0]]
                text = next((value for value in source.get("widgets_values") or [] if isinstance(value, str)), None)
                seed = next((value for value in node.get("widgets_values") or [] if type(value) is int), None)
                return text, seed
    return None, None
