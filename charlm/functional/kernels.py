"""Whether a call can go to the kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from charlm import _ext

_C = _ext._C
_CUDA = _C is not None and _C.has_cuda_kernels()


def have_kernels(*tensors: Tensor | None) -> bool:
    """False sends the call to the reference. What is no tensor gets its TypeError from the compiled module."""
    for tensor in tensors:
        if isinstance(tensor, Tensor) and not (
            (tensor.is_cpu or tensor.is_meta or (_CUDA and tensor.is_cuda)) and tensor.layout is torch.strided
        ):
            return False
    return _C is not None
