"""A machine with a GPU as bench/gpu.py describes it: what the tests of `make gpu` have instead of one."""

from __future__ import annotations

from typing import Any

ENVIRONMENT: dict[str, Any] = {
    "python": "3.12.3",
    "executable": "/usr/bin/python3",
    "cores": 16,
    "packages": {"numpy": "2.5.2", "liger-kernel": None},
    "torch": "2.11.0+cu130",
    "torch_cuda": "13.0",
    "gpu": {
        "name": "NVIDIA H100 80GB HBM3",
        "count": 1,
        "capability": "9.0",
        "memory": 80 * 2**30,
        "multiprocessors": 132,
        "l2_cache": 50 * 2**20,
    },
    "driver": "580.159.04",
    "nvcc": "13.0",
    "compute_sanitizer": None,
}
