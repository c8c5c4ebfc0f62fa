"""The shape of the core: modules import only earlier ones, and never a host program."""

import ast
import subprocess
import sys
from pathlib import Path

import ediffi_core

CORE = Path(ediffi_core.__file__).parent
FLOW = [
    "conditioning",
    "phrases",
    "encoders",
    "style",
    "schedule",
    "intervals",
    "router",
    "timeline",
    "painting",
    "attention",
    "paint_with_words",
    "attention_maps",
    "preconditioning",
    "unet",
    "efficient_unet",
    "ensemble",
    "guidance",
    "samplers",
    "super_resolution",
    "checkpoint",
    "pipeline",
    "cli",
]
HOST = {"comfy", "comfy_api", "comfy_extras", "folder_paths", "nodes", "execution", "server"}


def test_every_module_has_its_place_in_the_flow():
    assert {path.stem for path in CORE.glob("*.py")} - {"__init__"} == set(FLOW)


def test_modules_import_only_earlier_ones():
    for position, name in enumerate(FLOW[:-1]):
        tree = ast.parse((CORE / f"{name}.py").read_text())
        imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level}
        assert imported <= set(FLOW[:position]), f"{name} imports {imported - set(FLOW[:position])}"


def test_no_module_of_the_core_imports_comfyui():
    for path in CORE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            assert not {name.split(".")[0] for name in names} & HOST, path


def test_importing_the_pipeline_needs_neither_comfyui_nor_the_encoders_libraries():
    code = (
        "import sys, ediffi_core.pipeline, ediffi_core.checkpoint;"
        f"print({sorted(HOST | {'transformers', 'open_clip', 'PIL'})!r} and "
        f"[name for name in {sorted(HOST | {'transformers', 'open_clip', 'PIL'})!r} if name in sys.modules])"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=CORE.parent)
    assert printed.stdout.strip() == "[]"
