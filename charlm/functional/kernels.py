"""The decision whether a call uses the kernels, the sharding rule of its op, or the reference."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch.compiler import is_compiling

from charlm import _checks, _ext

_C = _ext._C
_CUDA = _C is not None and _C.has_cuda_kernels()


def have_kernels(function: str, names: tuple[str, ...], tensors: tuple[Any, ...]) -> bool:
    """Whether the kernels support all tensors; if not, the call uses the reference.

    Raises:
        TypeError: a value that is not a Tensor. A name that ends in "?" may be None.
    """
    if _C is not None and not is_compiling():
        return _C.have_kernels(function, names, tensors)
    _checks.tensors(function, names, tensors)
    return _C is not None and all(tensor is None or _is_supported(tensor) for tensor in tensors)


def by_sharding_rule(function: str, tensors: tuple[Any, ...], **options: Any) -> Any:
    """The result of a call with a DTensor among its tensors, by the rule in `charlm.distributed.sharding`.

    Returns:
        NotImplemented without a DTensor, and for placements that the rule does not know.
    """
    module = sys.modules.get("torch.distributed.tensor")  # no DTensor exists before it is imported
    if module is None or not any(isinstance(tensor, module.DTensor) for tensor in tensors):
        return NotImplemented
    from charlm.distributed import sharding

    return getattr(sharding, function)(*tensors, **options)


def _is_supported(tensor: torch.Tensor) -> bool:
    on_device = tensor.is_cpu or tensor.is_meta or (_CUDA and tensor.is_cuda)
    return on_device and _checks.is_kernel_tensor(tensor)
