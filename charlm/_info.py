"""`charlm.build_info`: what charlm was built with, what it runs with, and which kernels it uses."""

from __future__ import annotations

import platform
from typing import TypedDict

import torch

from charlm import _ext
from charlm._version import __version__


class BuildInfo(TypedDict):
    """The result of `build_info`. What only a compiled module knows is None or empty if there is none.

    Attributes:
        charlm: the version of the Python code.
        charlm_built: the version of the compiled module.
        backend: "extension" or "reference" (CHARLM_BACKEND).
        torch, python: the versions that are running.
        torch_built_with, python_built_with: the versions at build time.
        compiler: the first line of the C++ compiler's `--version`.
        instruction_sets_compiled: slowest first.
        instruction_sets_supported: those of them that this machine runs.
        instruction_set_in_use: CHARLM_CPU_ISA, or the fastest supported.
        cuda_architectures: those that CUDA kernels were compiled for.
        why_no_cuda: the reason if there are no CUDA kernels, else None.
        threads: `torch.get_num_threads()`, which the CPU kernels use.
    """

    charlm: str
    charlm_built: str | None
    backend: str
    torch: str
    torch_built_with: str | None
    python: str
    python_built_with: str | None
    compiler: str | None
    instruction_sets_compiled: list[str]
    instruction_sets_supported: list[str]
    instruction_set_in_use: str | None
    cuda_architectures: list[str]
    why_no_cuda: str | None
    threads: int


def build_info() -> BuildInfo:
    """The versions charlm was built with and runs with, instruction sets, CUDA and threads.

    Returns:
        A `BuildInfo`, a plain dict. With CHARLM_BACKEND=reference no instruction set is in use.

    Example:
        >>> charlm.build_info()["instruction_set_in_use"]
        'avx2'
    """
    built = _ext.read_build_config(_ext.CONFIG_PATH) or {}
    module = _ext._C
    return BuildInfo(
        charlm=__version__,
        charlm_built=built.get("charlm"),
        backend=_ext.BACKEND,
        torch=torch.__version__,
        torch_built_with=built.get("torch"),
        python=platform.python_version(),
        python_built_with=built.get("python"),
        compiler=built.get("compiler"),
        instruction_sets_compiled=built.get("instruction_sets", []),
        instruction_sets_supported=module.supported_isas() if module else [],
        instruction_set_in_use=module.cpu_isa() if module else None,
        cuda_architectures=built.get("cuda_architectures", []),
        why_no_cuda=built.get("why_no_cuda", "charlm's kernels are not built here"),
        threads=torch.get_num_threads(),
    )
