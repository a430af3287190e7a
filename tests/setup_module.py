"""setup.py as a module: its functions, without a build."""

from __future__ import annotations

import importlib.util
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

_spec = importlib.util.spec_from_file_location("charlm_setup", ROOT / "setup.py")
build = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(build)
