"""The nodes, one file for each category. A file that cannot be loaded hides its own nodes and no others."""

import importlib
import logging

from comfy_api.latest import ComfyExtension

# in the order of a workflow
FILES = ("text", "style", "regions", "experts", "sampling", "cascade", "analysis")


class EDiffIExtension(ComfyExtension):
    async def on_load(self):
        from .comfy_bridge import register_folders

        register_folders()

    async def get_node_list(self):
        nodes = []
        for name in FILES:
            try:
                nodes += importlib.import_module(f".{name}", __package__).NODES
            except Exception:  # whatever an import may raise in another version of ComfyUI
                logging.getLogger("ediffi").exception("The eDiff-I nodes of nodes/%s.py could not be loaded.", name)
        return nodes


async def comfy_entrypoint() -> EDiffIExtension:
    return EDiffIExtension()
