"""The entropy of softmax distributions."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.overrides import handle_torch_function, has_torch_function_unary

from charlm import reference

from .kernels import _C, by_sharding_rule, have_kernels


def entropy(logits: Tensor) -> Tensor:
    """The entropy of softmax(logits) in nats, of each row: how uncertain a prediction is.

    Args:
        logits: (..., V); float32, float64, bfloat16 or float16; any strides. A logit of -inf is a class of probability
            0: it adds nothing and its gradient is 0.

    Returns:
        (...), the dtype of `logits`; float32 under autocast. In [0, log V]; NaN for a row that holds NaN or +inf, or
        nothing but -inf. Differentiable to any order.

    Raises:
        RuntimeError: 0-d logits.
        NotImplementedError: logits that are not of a floating dtype.

    Formula:
        With p = softmax(z), m = max_c z_c and S = sum_c exp(z_c - m) (Shannon 1948)::

            H         = -sum_c p_c log p_c = log S + sum_c p_c (m - z_c)
            dH / dz_c = -p_c (log p_c + H)

        Both terms of the second form are at least 0, so no digits cancel for logits far from zero.

    Example:
        >>> entropy(torch.tensor([[0.0, 0.0], [0.0, -torch.inf]]))
        tensor([0.6931, 0.0000])

    Note:
        One pass over the logits computes the entropy, and a second one the gradient, from the logits and three numbers
        per row.
    """
    if has_torch_function_unary(logits):
        return handle_torch_function(entropy, (logits,), logits)
    if _C is not None and not is_compiling():
        result = _C.entropy(logits)
        if result is not NotImplemented:
            return result
    if not have_kernels("entropy", ("logits",), (logits,)):
        result = by_sharding_rule("entropy", (logits,))
        return reference.entropy(logits) if result is NotImplemented else result
    return torch.ops.charlm.entropy.default(logits)[0]
