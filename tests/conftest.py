"""Lets tests import this checkout's core and devtools by name, wherever pytest runs, without installing anything.

The pack's folder itself must not be on sys.path: `nodes/` in it would stand for ComfyUI's module of that name.
"""

import importlib.machinery
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


class FromThisCheckout:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name in ("dev", "devtools", "ediffi_core"):
            return importlib.machinery.PathFinder.find_spec(name, [str(ROOT)])
        return None


sys.meta_path.insert(0, FromThisCheckout)
