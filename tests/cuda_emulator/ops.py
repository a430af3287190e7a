"""Builds the kernels of csrc/cuda as a library for the CPU, in which the emulator runs them.

The library's table of kernels replaces the CPU's, so that the tests of the ops test csrc/cuda: tests/conftest.py
installs it in the process that `pytest_command` starts.
"""

from __future__ import annotations

import ctypes
import shutil
import sys
from pathlib import Path

import torch
from torch.utils.cpp_extension import include_paths, library_paths

import charlm

from .build import EMULATOR, build, command, environment

CSRC = EMULATOR.parents[1] / "csrc"

# Files of csrc/cuda, what occurs once in each, and what replaces it.
FLOAT_ONLY = (("cuda.cuh", "f<float>(), f<double>(), f<BFloat16>(), f<Float16>()", "f<float>()"),)
FEW_BLOCKS = (
    ("cuda.cuh", "kMaxBlocks = 8192", "kMaxBlocks = 32"),
    ("cross_entropy_small.cuh", "kSmallMultiprocessors = 132", "kSmallMultiprocessors = 1"),
    ("cross_entropy_streams.cuh", "kRescaleBlocks = 128", "kRescaleBlocks = 2"),
)


def copy_csrc(folder: Path, *, float_only: bool = False, few_blocks: bool = False) -> Path:
    """Copies csrc.

    With `float_only` its kernels are compiled for float alone, which takes half the time. With `few_blocks` the
    launches of many kernels have so few blocks that each block takes several rows of a small tensor.
    """
    csrc = shutil.copytree(CSRC, folder / "csrc")
    for file, shipped, replacement in FLOAT_ONLY * float_only + FEW_BLOCKS * few_blocks:
        path = csrc / "cuda" / file
        text = path.read_text(encoding="utf-8")
        assert text.count(shipped) == 1
        path.write_text(text.replace(shipped, replacement), encoding="utf-8")
    return csrc


def build_ops(flavour: str, csrc: Path = CSRC) -> Path:
    """Builds the library. Objects are cached under a hash of their sources, so that copies of csrc share them."""
    flags = [
        "-Wno-unknown-pragmas",
        *(f"-isystem{path}" for path in include_paths()),
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
    ]
    return build(
        sorted((csrc / "cuda").glob("*.cu")),
        flavour,
        flags=flags,
        include_dirs=[csrc],
        uninstrumented=[EMULATOR / "runtime.cpp"],
        link_flags=[*(f"-L{path}" for path in library_paths()), "-lc10", "-ltorch_cpu", "-ltorch"],
    )


def run_cpu_ops_on_emulator(library: str) -> None:
    """Makes the ops of this process run the library's kernels on CPU tensors."""
    emulated_gpu = ctypes.CDLL(library).charlm_emulated_gpu
    emulated_gpu.restype = ctypes.c_void_p
    charlm._C.run_cpu_ops_on_gpu(emulated_gpu())


def pytest_command(flavour: str, *arguments: str) -> list[str]:
    """The command that runs pytest in a separate process."""
    return command(flavour, sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments)


def pytest_environment(
    flavour: str, library: Path, schedule: str, seed: int = 0, capability: int = 90
) -> dict[str, str]:
    """The environment of that process: its ops are those of `library`, and raise IndexError at once, as on the CPU."""
    return environment(
        flavour,
        CHARLM_CUDA_EMULATED=str(library),
        CHARLM_CUDA_CHECK="1",
        CHARLM_CUDA_EMULATOR_SCHEDULE=schedule,
        CHARLM_CUDA_EMULATOR_SEED=str(seed),
        CHARLM_CUDA_EMULATOR_CAPABILITY=str(capability),
        CHARLM_TEST_DEVICE="cpu",
        # Torch's products, whose errors ours are measured by and which take memory, are those of any processor.
        MKL_CBWR="COMPATIBLE",
        ONEDNN_MAX_CPU_ISA="AVX2",
    )
