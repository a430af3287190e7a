"""The entropy of softmax distributions."""

from __future__ import annotations

import torch
from torch import Tensor


def entropy(logits: Tensor) -> Tensor:
    """`-sum_c p_c log p_c` in nats, with p = softmax(logits).

    Arguments and errors are those of `charlm.functional.entropy`.

    Returns:
        (...), the dtype of `logits`; float32 under autocast.

    Example:
        >>> entropy(torch.zeros(2, 4))
        tensor([1.3863, 1.3863])
    """
    if logits.dim() < 1:
        raise RuntimeError("logits must have a dimension of classes, shape (..., V), got a 0-d tensor")
    if not logits.is_floating_point():
        raise NotImplementedError(f'"entropy" not implemented for {logits.dtype}')
    log_p = computed(logits).log_softmax(-1)
    # A class of z = -inf adds nothing and has no gradient.
    result = -(log_p.exp() * log_p.masked_fill(log_p == -torch.inf, 0)).sum(-1)
    return result.to(result_dtype(logits))


def computed(x: Tensor) -> Tensor:
    """x in the dtype of the arithmetic: float32 for float16 and bfloat16, else its own."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def result_dtype(x: Tensor) -> torch.dtype:
    """The dtype of x; under autocast float32 for a half type."""
    return computed(x).dtype if torch.is_autocast_enabled(x.device.type) else x.dtype
