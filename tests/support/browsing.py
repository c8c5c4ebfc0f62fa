"""The ComfyUI that tests on the real canvas run, or the reason why they are skipped."""

import os
from pathlib import Path

import pytest

from devtools.comfyui import find_comfyui
from devtools.environment import SetupError
from devtools.frontend import browser_path


def comfyui_or_skip() -> Path:
    """This machine's ComfyUI; skips the whole module where it, the browser or playwright is missing."""
    pytest.importorskip("playwright", reason="playwright is not installed")
    if browser_path() is None:
        pytest.skip("there is no Chromium on this machine", allow_module_level=True)
    try:
        found = find_comfyui(Path(__file__).parents[2], Path.home(), os.environ)
    except SetupError as error:
        pytest.skip(str(error), allow_module_level=True)
    if found is None:
        pytest.skip("there is no ComfyUI on this machine; set COMFYUI_DIR to yours", allow_module_level=True)
    return found
