"""The CUDA ops as a library for the CPU: adapters and kernels of csrc/cuda, the kernels run by the emulator.

Loaded after `import charlm`, it replaces the CPU's kernels by emulated ones, so that the tests of the ops are tests of
csrc/cuda: tests/conftest.py does so for the process that `pytest_command` starts.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch.utils.cpp_extension import include_paths, library_paths

from .build import EMULATOR, build, command, environment

CSRC = EMULATOR.parents[1] / "csrc"


def build_ops(flavour: str, *, csrc: Path = CSRC, float_only: bool = False, kernels: tuple[str, ...] = ()) -> Path:
    """The library. `kernels`: those of these names are compiled from `csrc`, the others from where they stand."""
    flags = [
        "-Wno-unknown-pragmas",
        "-DCHARLM_CUDA_EMULATOR",
        *(["-DCHARLM_CUDA_FLOAT_ONLY"] if float_only else []),
        *(f"-isystem{path}" for path in include_paths()),
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
    ]
    sources = [
        (csrc if path.stem in kernels else CSRC) / path.relative_to(CSRC)
        for path in sorted((CSRC / "cuda" / "kernels").glob("*.cu"))
    ]
    return build(
        sources,
        flavour,
        flags=flags,
        uninstrumented=[*sorted((CSRC / "cuda").glob("*.cpp")), CSRC / "cross_entropy_checks.cpp"],
        link_flags=[*(f"-L{path}" for path in library_paths()), "-lc10", "-ltorch_cpu", "-ltorch"],
    )


def pytest_command(flavour: str, *arguments: str) -> list[str]:
    """pytest in a process of its own."""
    return command(flavour, sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments)


def pytest_environment(flavour: str, library: Path, schedule: str, seed: int = 0) -> dict[str, str]:
    """... in which the ops are those of `library`, and IndexErrors are raised at once, as the CPU raises them."""
    return environment(
        flavour,
        CHARLM_CUDA_EMULATED=str(library),
        CHARLM_CUDA_CHECK="1",
        CHARLM_CUDA_EMULATOR_SCHEDULE=schedule,
        CHARLM_CUDA_EMULATOR_SEED=str(seed),
        CHARLM_TEST_DEVICE="cpu",
    )
