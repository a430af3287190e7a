"""What `make gpu` finds on this machine, as JSON on stdout: a process of its own, which keeps no memory of the GPU.

Where torch cannot be imported, sees no GPU or finds no toolkit, the entry is null: bench/gpu.py says what that means.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from scripts import cuda_toolkit

PACKAGES = ("triton", "liger-kernel", "pytest", "numpy", "ninja", "pybind11", "setuptools")


def environment() -> dict[str, Any]:
    toolkit = cuda_toolkit.find_toolkit(os.environ)
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "executable": sys.executable,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "packages": {name: _version(name) for name in PACKAGES},
        "nvcc": cuda_toolkit.nvcc_release(toolkit),
        "compute_sanitizer": _compute_sanitizer(toolkit),
        "driver": _driver(),
        **dict.fromkeys(("torch", "torch_cuda", "gpu")),
    }
    try:
        import torch
    except ImportError as error:
        return {**found, "why_no_torch": str(error)}
    return {
        **found,
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "gpu": _gpu(torch),
    }


def _gpu(torch: Any) -> dict[str, Any] | None:
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "count": torch.cuda.device_count(),
        "capability": f"{properties.major}.{properties.minor}",
        "memory": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "l2_cache": properties.L2_cache_size,
    }


def _compute_sanitizer(toolkit: Path | None) -> str | None:
    """On PATH, or where a toolkit keeps it."""
    folders = [os.environ.get("PATH", "")]
    if toolkit is not None:
        folders += [str(toolkit / folder) for folder in ("bin", "compute-sanitizer")]
    return shutil.which("compute-sanitizer", path=os.pathsep.join(folders))


def _driver() -> str | None:
    command = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    try:
        printed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return printed.partition("\n")[0].strip()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    print(json.dumps(environment()))
