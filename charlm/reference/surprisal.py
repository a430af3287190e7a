"""The surprisal of each token."""

from __future__ import annotations

import torch
from torch import Tensor

from .cross_entropy import cross_entropy
from .entropy import computed, result_dtype
from .kl_divergence import broadcast_shapes


def surprisal(logits: Tensor, target: Tensor, *, ignore_index: int = -100) -> Tensor:
    """`-log softmax(logits)[..., target]` in nats.

    Arguments and errors are those of `charlm.functional.surprisal`.

    Returns:
        (...), the broadcast shape; the dtype of `logits`; float32 under autocast.

    Example:
        >>> surprisal(torch.zeros(2, 4), torch.tensor([1, 3]))
        tensor([1.3863, 1.3863])
    """
    classes_second, target, dtype = _for_cross_entropy(logits, target)
    return cross_entropy(classes_second, target, ignore_index=ignore_index, reduction="none").to(dtype)


def _for_cross_entropy(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor, torch.dtype]:
    """Views of the logits with the classes in dimension 1 and of the target in their shape; the dtype of the result.

    Half logits that are expanded become float32: their gradient is a sum, which is rounded once.
    """
    if logits.dim() < 1:
        raise RuntimeError("logits must have a dimension of classes, shape (..., V), got a 0-d tensor")
    if target.is_floating_point() or target.is_complex():
        raise RuntimeError(f"expected target of an integer dtype, got {target.dtype}")
    dtype = result_dtype(logits)
    leading = logits.shape[:-1]
    if target.shape != leading:
        what = f"logits of shape {list(logits.shape)} and a target of shape {list(target.shape)}"
        shape = broadcast_shapes(leading, target.shape, what)
        if leading != shape:
            logits = computed(logits).expand(*shape, logits.shape[-1])
        target = target.expand(shape)
    return logits if logits.dim() <= 2 else logits.movedim(-1, 1), target, dtype
