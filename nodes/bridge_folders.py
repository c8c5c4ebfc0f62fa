"""Where ensembles and encoders lie: ComfyUI's model folders and the demo family that comes with the pack.

An entry is a folder that holds a marker file. Workflows name entries, never paths: a name is looked up among the
entries that exist, so nothing in a workflow can lead out of these folders.
"""

from pathlib import Path

import folder_paths

DEMO = Path(__file__).resolve().parent.parent / "demo"

# key of folder_paths -> (folder in demo/, file that marks an entry)
KINDS = {"ediffi": ("ensembles", "ensemble.json"), "ediffi_encoders": ("encoders", "t5/config.json")}


def register_folders() -> None:
    """Announce `models/ediffi` and `models/ediffi_encoders`, keeping what the user's extra_model_paths.yaml says."""
    for key in KINDS:
        own = str(Path(folder_paths.models_dir) / key)
        paths, extensions = folder_paths.folder_names_and_paths.get(key, ([], set()))
        # without extensions ComfyUI's model listing would show every file
        listed = [*paths, own] if own not in paths else list(paths)
        folder_paths.folder_names_and_paths[key] = (listed, set(extensions) | {".safetensors"})


def entries(key: str) -> dict[str, Path]:
    """Name -> folder. The user's own folders come first and hide a demo entry of the same name."""
    demo, marker = KINDS[key]
    found: dict[str, Path] = {}
    for root in [*map(Path, folder_paths.get_folder_paths(key)), DEMO / demo]:
        if root.is_dir():
            for folder in sorted(root.iterdir()):
                if (folder / marker).is_file():
                    found.setdefault(folder.name, folder)
    return found


def entry(key: str, name: str) -> Path:
    """The folder of an entry. Raises ValueError, listing what exists, for any other name."""
    found = entries(key)
    if name not in found:
        kind, marker = KINDS[key]
        known = ", ".join(repr(known) for known in found) or "none"
        raise ValueError(
            f"There is no {kind[:-1] if kind == 'ensembles' else 'folder of encoders'} named {name!r}. "
            f"Those that exist: {known}. Choose one of them, or put a folder with {marker} into models/{key}/."
        )
    return found[name]
