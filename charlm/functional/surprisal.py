"""The surprisal of each token."""

from __future__ import annotations

from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from charlm import _checks
from charlm.reference.surprisal import for_cross_entropy

from .cross_entropy import cross_entropy


def surprisal(logits: Tensor, target: Tensor, *, ignore_index: int = -100) -> Tensor:
    """The surprisal, in nats, of each token: `-log softmax(logits)[..., target]`.

    It is `cross_entropy` with reduction "none" and the classes last, as models make them: its mean over the tokens is
    the cross-entropy, its expectation under the prediction itself the entropy. The kernels are those of
    `cross_entropy`, and so is all that is said there of their arithmetic.

    Args:
        logits: (..., V), float32, float64, bfloat16 or float16, any strides.
        target: class indices, (...), any integer dtype, each in [0, V) or `ignore_index`; broadcast with the leading
            dimensions of `logits`, as torch's are.
        ignore_index: tokens of this class have the surprisal 0 and no gradient.

    Returns:
        (...), the broadcast shape, the dtype of `logits`; float32 under autocast. Differentiable to any order with
        respect to `logits`.

    Raises:
        IndexError: a target outside [0, V) that is not `ignore_index`; the text names it, its position in the
            (broadcast) target and V. On CUDA see `charlm.synchronize`.
        RuntimeError: shapes that do not fit, 0-d logits among them; targets that are not integers.
        NotImplementedError: logits that are not of a floating dtype.

    Example:
        >>> surprisal(torch.zeros(2, 4), torch.tensor([1, 3]))
        tensor([1.3863, 1.3863])
    """
    if has_torch_function_variadic(logits, target):
        return handle_torch_function(surprisal, (logits, target), logits, target, ignore_index=ignore_index)
    if not (isinstance(logits, Tensor) and isinstance(target, Tensor)):
        _checks.tensors("surprisal", ("logits", "target"), (logits, target))
    if type(ignore_index) is not int:
        ignore_index = _checks.integer("surprisal", "ignore_index", ignore_index)
    classes_second, target, dtype = for_cross_entropy(logits, target)
    return cross_entropy(classes_second, target, ignore_index=ignore_index, reduction="none").to(dtype)
