"""Loads the compiled module charlm._C; with CHARLM_BACKEND=reference, no module.

There is no silent fallback. A module that is missing, that was built with another torch, or that cannot run the
requested instruction set is an ImportError that says what to do.

Environment:
    CHARLM_BACKEND   "extension" (default), or "reference": every op in plain torch, no module is loaded
    CHARLM_CPU_ISA   the instruction set to use, one of _C.supported_isas(); default: the fastest of them
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

CONFIG_PATH = Path(__file__).with_name("_build_config.json")
BACKENDS = ("extension", "reference")


def read_build_config(path: Path) -> dict[str, Any] | None:
    """What setup.py wrote beside the module that it built; None if nothing was built."""
    return json.loads(path.read_text(encoding="utf-8")) if os.path.isfile(path) else None


def chosen_backend() -> str:
    """CHARLM_BACKEND, checked; "extension" when it is unset or empty."""
    name = os.environ.get("CHARLM_BACKEND") or "extension"
    if name not in BACKENDS:
        raise ImportError(f"CHARLM_BACKEND={name!r} is unknown: it is one of {', '.join(BACKENDS)}")
    return name


def built_elsewhere() -> Path | None:
    """The folder of another charlm on sys.path that is built with the running torch; None if there is none."""
    for folder in (Path(entry, "charlm").resolve() for entry in sys.path):
        config = read_build_config(folder / CONFIG_PATH.name)
        if config is not None and config["torch"] == torch.__version__ and folder != CONFIG_PATH.parent.resolve():
            return folder
    return None


def how_to_get_kernels() -> str:
    """How to get kernels that load: those of a charlm that this folder hides, or new ones in this folder."""
    parent, built = CONFIG_PATH.parent.parent, built_elsewhere()
    if (parent / "setup.py").exists():  # without -e, pip installs a charlm that the source folder hides
        build = f"build them in {parent}: pip install --no-build-isolation -e ."
    else:
        build = "build them in charlm's source folder: pip install --no-build-isolation ."
    if built is None:
        return f"To use kernels, {build} To run without them, in plain torch: CHARLM_BACKEND=reference"
    return (
        f"There are kernels in {built}, but Python imports {CONFIG_PATH.parent}, because {parent} comes before "
        f"{built.parent} on sys.path. Run Python from another folder, or {build}"
    )


def load_extension() -> ModuleType:
    """charlm._C for the running torch, set to the instruction set that CHARLM_CPU_ISA names."""
    config = read_build_config(CONFIG_PATH)
    if config is None:
        raise ImportError(f"charlm's kernels are not built in {CONFIG_PATH.parent}. {how_to_get_kernels()}")
    if config["torch"] != torch.__version__:
        raise ImportError(
            f"charlm was built with torch {config['torch']}, but torch {torch.__version__} is running. "
            f"{how_to_get_kernels()}"
        )
    try:
        module = importlib.import_module("charlm._C")
    except ImportError as error:
        raise ImportError(f"charlm's kernels cannot be loaded ({error}). {how_to_get_kernels()}") from error
    isa = os.environ.get("CHARLM_CPU_ISA")
    if isa:
        supported = module.supported_isas()
        if isa not in supported:
            raise ImportError(
                f"CHARLM_CPU_ISA={isa!r}: this machine can run {', '.join(supported)} "
                f"(compiled: {', '.join(module.compiled_isas())})"
            )
        module.set_cpu_isa(isa)
    return module


BACKEND = chosen_backend()
_C = load_extension() if BACKEND == "extension" else None
