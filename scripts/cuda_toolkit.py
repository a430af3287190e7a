"""Finds a CUDA toolkit and the architectures that its nvcc supports, without torch. For setup.py, bench, scripts."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path

# From A100 to consumer Blackwell; later GPUs use the PTX of the newest.
ARCHITECTURES = ("8.0", "8.6", "8.9", "9.0", "10.0", "12.0")
USUAL_HOME = Path("/usr/local/cuda")


def named_home(env: Mapping[str, str]) -> str | None:
    """The folder that the environment names: CUDA_HOME or CUDA_PATH."""
    return env.get("CUDA_HOME") or env.get("CUDA_PATH") or None


def find_toolkit(env: Mapping[str, str]) -> Path | None:
    """The folder of a toolkit: that of CUDA_HOME or CUDA_PATH, else that of nvcc on PATH, else USUAL_HOME."""
    named = named_home(env)
    nvcc = shutil.which(os.path.join(named, "bin", "nvcc") if named else "nvcc", path=env.get("PATH"))
    folders = _folders_of(nvcc) if nvcc else []
    if named is None:
        folders.append(USUAL_HOME)
    return next((folder for folder in folders if _is_toolkit(folder)), None)


def nvcc_release(toolkit: Path | None) -> str | None:
    """The release of the toolkit's nvcc, such as "13.0"; None without a toolkit."""
    found = re.search(r"release (\d+\.\d+)", _output(toolkit / "bin" / "nvcc", "--version")) if toolkit else None
    return found.group(1) if found else None


def known_architectures(toolkit: Path) -> set[str]:
    """The compute capabilities that the toolkit's nvcc compiles for: {"8.0", "8.6", ...}."""
    listed = re.findall(r"^compute_(\d+)(\d)$", _output(toolkit / "bin" / "nvcc", "--list-gpu-arch"), re.MULTILINE)
    return {f"{major}.{minor}" for major, minor in listed}


def default_architectures(known: Iterable[str]) -> list[str]:
    """The ARCHITECTURES that nvcc supports; the newest with its PTX."""
    chosen = [architecture for architecture in ARCHITECTURES if architecture in set(known)]
    return [*chosen[:-1], f"{chosen[-1]}+PTX"]


def _is_toolkit(folder: Path) -> bool:
    return (folder / "bin" / "nvcc").is_file() and (folder / "include" / "cuda_runtime.h").is_file()


def _folders_of(nvcc: str) -> list[Path]:
    """Candidate folders of an nvcc's toolkit: its parent, and the one that --dryrun prints if it is a wrapper."""
    says = re.findall(r"^#\$ TOP=(.+)$", _output(nvcc, "--dryrun", "-x", "cu", os.devnull), re.MULTILINE)
    return [Path(nvcc).parent.parent, *(Path(top.strip()).resolve() for top in says)]


def _output(command: str | Path, *arguments: str) -> str:
    result = subprocess.run([command, *arguments], capture_output=True, text=True, check=False)
    return result.stdout + result.stderr
