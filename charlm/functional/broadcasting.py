"""Shapes and dtypes of the ops whose classes are the last dimension."""

from __future__ import annotations

import torch
from torch import Tensor


def upcast(x: Tensor) -> Tensor:
    """`x` in the dtype of the arithmetic: float32 for float16 and bfloat16, its own dtype otherwise."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def result_dtype(x: Tensor) -> torch.dtype:
    """The dtype of a result computed from `x`: that of `x`; under autocast float32 for half types."""
    return upcast(x).dtype if torch.is_autocast_enabled(x.device.type) else x.dtype


def broadcast_shapes(a: torch.Size, b: torch.Size, what: str) -> torch.Size:
    """`torch.broadcast_shapes` with a RuntimeError that names `what` cannot be broadcast."""
    try:
        return torch.broadcast_shapes(a, b)
    except RuntimeError as error:
        raise RuntimeError(f"the leading dimensions of {what} cannot be broadcast") from error
