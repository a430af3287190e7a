"""The surprisal of each token."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from charlm import _checks

from .broadcasting import broadcast_shapes, result_dtype, upcast
from .cross_entropy import cross_entropy


def surprisal(logits: Tensor, target: Tensor, *, ignore_index: int = -100) -> Tensor:
    """The surprisal in nats of each token: `-log softmax(logits)[..., target]`.

    Args:
        logits: (..., V); float32, float64, bfloat16 or float16; any strides.
        target: class indices, (...), any integer dtype, each in [0, V) or `ignore_index`; broadcast with the leading
            dimensions of `logits`, as torch's are.
        ignore_index: targets of this class index have the surprisal 0 and no gradient.

    Returns:
        (...), the broadcast shape, the dtype of `logits`; float32 under autocast. Differentiable to any order with
        respect to `logits`.

    Raises:
        IndexError: a target outside [0, V) that is not `ignore_index`; the text names it, its position in the broadcast
            target, and V. On CUDA see `charlm.synchronize`.
        RuntimeError: shapes that do not fit, 0-d logits among them; targets that are not integers.
        NotImplementedError: logits that are not of a floating dtype.

    Example:
        >>> surprisal(torch.zeros(2, 4), torch.tensor([1, 3]))
        tensor([1.3863, 1.3863])

    Note:
        This is `cross_entropy` with reduction "none" and the classes in the last dimension. Its mean over tokens is the
        cross-entropy; its expectation under the prediction is the entropy.
    """
    if has_torch_function_variadic(logits, target):
        return handle_torch_function(surprisal, (logits, target), logits, target, ignore_index=ignore_index)
    if not (isinstance(logits, Tensor) and isinstance(target, Tensor)):
        _checks.tensors("surprisal", ("logits", "target"), (logits, target))
    if type(ignore_index) is not int:
        ignore_index = _checks.integer("surprisal", "ignore_index", ignore_index)
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
            logits = upcast(logits).expand(*shape, logits.shape[-1])
        target = target.expand(shape)
    return logits if logits.dim() <= 2 else logits.movedim(-1, 1), target, dtype
