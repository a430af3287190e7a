"""JAX on the CPU, where it is installed; its arrays.

XLA's threads are as many as the cores and cannot be changed once it runs, so it takes part only where torch uses all
cores too.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor


class Unavailable(RuntimeError):
    """A contender that cannot take part here; the text says why."""


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def load() -> Any:
    """The module jax. Unavailable where it is missing, or would have another number of threads than torch."""
    if torch.get_num_threads() != cores():
        raise Unavailable(f"XLA uses {cores()} threads, not {torch.get_num_threads()}")
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    try:
        import jax
    except ImportError as error:
        raise Unavailable("jax is not installed") from error

    jax.config.update("jax_enable_x64", True)  # else float64 becomes float32
    return jax


def array(jax: Any, tensor: Tensor) -> Any:
    """A copy: contenders write over their own memory."""
    return jax.numpy.array(jax.numpy.from_dlpack(tensor.detach()), copy=True)
