"""What this charlm was built with, what it is running with, and which kernels it uses."""

from __future__ import annotations

import platform
from typing import TypedDict

import torch

from charlm import _ext
from charlm._version import __version__


class BuildInfo(TypedDict):
    """The answer of `build_info`. What only a built module knows is None or empty where there is none."""

    charlm: str  # the version of the Python side, and with it of the source folder
    charlm_built: str | None  # the version of the compiled module
    backend: str  # "extension" or "reference" (CHARLM_BACKEND)
    torch: str
    torch_built_with: str | None
    python: str
    python_built_with: str | None
    compiler: str | None
    instruction_sets_compiled: list[str]  # slowest first
    instruction_sets_supported: list[str]  # those of them that this machine runs
    instruction_set_in_use: str | None  # CHARLM_CPU_ISA, or the fastest supported
    cuda_architectures: list[str]
    why_no_cuda: str | None  # None where there are CUDA kernels
    threads: int  # torch.get_num_threads(): what the CPU kernels use


def build_info() -> BuildInfo:
    """Versions built with and running with, instruction sets, CUDA and threads, as a plain dict.

    Works under CHARLM_BACKEND=reference too, where no instruction set is in use.

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
