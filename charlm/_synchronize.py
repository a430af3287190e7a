"""`charlm.synchronize`, which raises the error of an index that a CUDA kernel found out of range."""

from __future__ import annotations

import torch

from . import _ext


def synchronize(device: torch.device | str | int | None = None) -> None:
    """Waits for the work on a CUDA device, then raises the IndexError of an index that was out of range.

    Args:
        device: a CUDA device; None is the current one. For "cpu", where each call raises its own errors, nothing
            happens.

    Raises:
        IndexError: an index out of range; the text names it, its position and the limit.
        AssertionError: a torch without CUDA (torch's own error).

    Note:
        A CUDA kernel runs after the call that launched it has returned. For an index out of range it reads nothing,
        gives 0 as the result and the gradient, and records the index and its position. This function raises the
        IndexError, or the next op of charlm on the device once the kernel has run, whichever comes first. The device
        stays usable. With CHARLM_CUDA_CHECK=1 in the environment each op waits for its kernels and raises the error
        itself.
    """
    on = torch.device("cuda" if device is None else f"cuda:{device}" if isinstance(device, int) else device)
    if on.type == "cuda" and not (_ext._C is not None and _ext._C.has_cuda_kernels()):
        torch.cuda.synchronize(on)
    elif _ext._C is not None:
        torch.ops.charlm._synchronize(torch.empty(0, device=on))
