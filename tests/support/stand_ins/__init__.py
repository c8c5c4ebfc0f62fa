"""Stand-ins: tiny files of random weights under the names of well-known models, and what makes ComfyUI's loaders take them.

An example workflow that names `sd_xl_base_1.0.safetensors` is opened and run as it is, on a processor and in seconds: same
loader nodes, same classes of models, tokenizers and conditionings, same shapes at every socket; fewer channels inside.

The folder is a pack of ComfyUI without nodes. A server that finds it in its custom_nodes writes the files before it
answers, so `install` is all that a server needs. In a test's own process, load it as ComfyUI does (`load_custom_node`).
"""

import os
import shutil
from pathlib import Path

HERE = Path(__file__).resolve().parent


def install(custom_nodes: Path) -> None:
    """Put the pack among a test server's custom nodes, before the server starts."""
    custom_nodes.mkdir(parents=True, exist_ok=True)
    place = custom_nodes / "stand_ins"
    if os.name == "nt":
        shutil.copytree(HERE, place, dirs_exist_ok=True)
    elif not place.exists():
        place.symlink_to(HERE, target_is_directory=True)


def write(models_folder: Path) -> None:
    """Write the files that are not there yet. Needs ComfyUI in this process, with its device chosen."""
    from . import files

    files.write(models_folder)


async def comfy_entrypoint():
    """Called by ComfyUI alone, when it loads the folder as custom nodes."""
    import folder_paths
    from comfy_api.latest import ComfyExtension

    from . import loaders

    class StandIns(ComfyExtension):
        async def get_node_list(self):
            return []

    loaders.accept_stand_ins()
    write(Path(folder_paths.models_dir))
    return StandIns()
