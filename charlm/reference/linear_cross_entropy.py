"""Softmax cross-entropy of logits that a linear layer computes."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import linear as _torch_linear

from .cross_entropy import LossAndMetrics, cross_entropy

if TYPE_CHECKING:
    from torch.nn import LinearCrossEntropyOptions


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: LinearCrossEntropyOptions | None = None,
    lse_square_scale: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    token_weight: Tensor | None = None,
    all_ignored: str = "nan",
    loss_dtype: torch.dtype | None = None,
    shift: bool | int = False,
    memory_budget: int | None = None,
    return_lse: bool = False,
    return_entropy: bool = False,
    return_predicted_tokens: bool = False,
    return_token_accuracy: bool = False,
) -> Tensor | LossAndMetrics:
    """`cross_entropy(input @ linear_weight.T + linear_bias, target)` in nats, from the whole logits.

    The arguments and the errors are those of `charlm.functional.linear_cross_entropy`.

    Args:
        options, memory_budget: of no effect.

    Returns:
        The result of `charlm.reference.cross_entropy`.

    Example:
        >>> linear_cross_entropy(torch.zeros(2, 3), torch.ones(4, 3), torch.tensor([1, 3]))
        tensor(1.3863)
    """
    if shift:
        if input.dim() != 2 or target.dim() != 1:
            raise NotImplementedError("the reference shifts one sequence, input (T, D) and target (T)")
        if not 0 < shift < len(input):
            raise ValueError(f"shift must be in [0, T) for sequences of length T = {len(input)}, got {shift}")
        input, target = input[: -int(shift)], target[int(shift) :]
        token_weight = None if token_weight is None else token_weight[int(shift) :]
    logits = _make_logits(input, linear_weight, linear_bias)
    if ignore_index is not None and target.shape == logits.shape:
        raise RuntimeError("ignore_index cannot be specified when target contains probabilities")
    return cross_entropy(
        logits,
        target,
        weight=weight,
        reduction=reduction,
        ignore_index=-100 if ignore_index is None else ignore_index,
        label_smoothing=label_smoothing,
        lse_square_scale=lse_square_scale,
        softcap=softcap,
        logit_scale=logit_scale,
        token_weight=token_weight,
        all_ignored=all_ignored,
        loss_dtype=loss_dtype,
        return_lse=return_lse,
        return_entropy=return_entropy,
        return_predicted_tokens=return_predicted_tokens,
        return_token_accuracy=return_token_accuracy,
    )


def _check_shapes(input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None) -> None:
    """torch's own checks of the linear layer's tensors, with its error texts."""
    if input.dim() < 1 or input.dim() > 2:
        raise RuntimeError(f"expected input with dimensionality 1 or 2, got {input.dim()}")
    if linear_weight.dim() < 2:
        raise RuntimeError(f"expected linear_weight with dimensionality at least 2, got {linear_weight.dim()}")
    if input.shape[-1] != linear_weight.shape[-1]:
        raise RuntimeError(
            "expected equal input and linear_weight last dimensions (in_features), "
            f"got {input.shape[-1]} and {linear_weight.shape[-1]}, respectively"
        )
    if linear_bias is not None and linear_bias.shape != linear_weight.shape[:-1]:
        raise RuntimeError(
            f"expected linear_bias shape {tuple(linear_weight.shape[:-1])}, got {tuple(linear_bias.shape)}"
        )
    if linear_weight.dim() > 2 and input.dim() == 1:
        raise RuntimeError(
            f"K-dimensional loss defined by linear_weight shape {tuple(linear_weight.shape)} requires batched input, "
            f"(N, {input.shape[-1]}), got unbatched input with shape {tuple(input.shape)}"
        )


def _make_logits(input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None) -> Tensor:
    """The whole logits, (C), (N, C) or (N, C, d1, ...)."""
    _check_shapes(input, linear_weight, linear_bias)
    n_outputs = math.prod(linear_weight.shape[:-1])
    bias = None if linear_bias is None else linear_bias.reshape(n_outputs)
    logits = _torch_linear(input, linear_weight.reshape(n_outputs, linear_weight.shape[-1]), bias)
    return logits.reshape(*input.shape[:-1], *linear_weight.shape[:-1])
