"""Softmax cross-entropy of logits and class indices or class probabilities."""

from __future__ import annotations

import math
import sys
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn import _reduction
from torch.nn.functional import cross_entropy as _torch_cross_entropy

from .entropy import computed
from .indices import raise_if_out_of_range, widened

# (loss, lse, entropy, predicted_tokens, token_accuracy): the fields of `charlm.functional.CrossEntropyOutput`
LossAndMetrics: TypeAlias = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    lse_square_scale: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    token_weight: Tensor | None = None,
    all_ignored: str = "nan",
    loss_dtype: torch.dtype | None = None,
    inplace: str | None = None,
    return_lse: bool = False,
    return_entropy: bool = False,
    return_predicted_tokens: bool = False,
    return_token_accuracy: bool = False,
) -> Tensor | LossAndMetrics:
    """Softmax cross-entropy in nats, between logits and class indices or class probabilities.

    The arguments, the formulas and the errors are those of `charlm.functional.cross_entropy`.

    Args:
        inplace: None, "backward" or "forward". The value is checked and has no other effect.

    Returns:
        The loss. If any `return_*` option is set, the tuple (loss, lse, entropy, predicted_tokens, token_accuracy),
        with None for what was not requested.

    Example:
        >>> cross_entropy(torch.zeros(2, 4), torch.tensor([1, 3]))
        tensor(1.3863)
    """
    if size_average is not None or reduce is not None:
        reduction = _reduction.legacy_get_string(size_average, reduce)
    _reduction.get_enum(reduction)  # ValueError for an unknown name
    _check_options(reduction, softcap, all_ignored, inplace)
    if math.isnan(label_smoothing):  # which torch treats as 0
        raise RuntimeError(f"label_smoothing must be between 0.0 and 1.0. Got: {label_smoothing}")

    index = widened(target, "targets", ignore_index)
    wants_output = return_lse or return_entropy or return_predicted_tokens or return_token_accuracy
    plain_loss = (
        lse_square_scale == 0
        and softcap is None
        and logit_scale == 1
        and token_weight is None
        and all_ignored == "nan"
        and loss_dtype is None
        and not (weight is not None and weight.dtype != input.dtype and target.shape != input.shape)
        # torch's mean over a sharded batch is the mean of the shards' means, although their numbers of targets differ.
        and not (reduction == "mean" and (_is_dtensor(input) or _is_dtensor(target)))
    )
    try:
        if plain_loss:
            loss = _torch_cross_entropy(
                input,
                index,
                weight,
                ignore_index=ignore_index,
                reduction=reduction,
                label_smoothing=label_smoothing,
            )
            if not wants_output:
                return loss
            z = computed(input)
        else:
            z = _transformed(input, softcap, logit_scale)
            loss = _weighted_loss(
                input,
                z,
                index,
                weight,
                ignore_index,
                reduction,
                label_smoothing,
                lse_square_scale,
                token_weight,
                all_ignored,
                loss_dtype,
            )
    except IndexError:
        if input.dim() > 0:
            n_classes = input.size(_class_dim(input))
            raise_if_out_of_range(target, index, n_classes, "target", "classes", ignore_index)
        raise
    if not wants_output:
        return loss
    class_dim = _class_dim(z)
    shape = _loss_shape(input, index)
    predicted = z.argmax(class_dim).reshape(shape) if return_predicted_tokens or return_token_accuracy else None
    return (
        loss,
        z.logsumexp(class_dim).reshape(shape) if return_lse else None,
        _entropy(z, class_dim).reshape(shape) if return_entropy else None,
        predicted if return_predicted_tokens else None,
        _token_accuracy(input, predicted, index, ignore_index, reduction, all_ignored)
        if return_token_accuracy
        else None,
    )


def _weighted_loss(
    input: Tensor,
    z: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    lse_square_scale: float,
    token_weight: Tensor | None,
    all_ignored: str,
    loss_dtype: torch.dtype | None,
) -> Tensor:
    """The loss with extras: torch's own, of each target and on the transformed logits z, then the mean."""
    is_index = target.shape != input.shape
    autocast = torch.is_autocast_enabled(input.device.type)
    result_dtype = input.dtype if is_index else torch.promote_types(input.dtype, target.dtype)
    if weight is not None:
        if is_index and weight.dtype not in (input.dtype, z.dtype) and not autocast:
            raise RuntimeError(f"expected scalar type {input.dtype} for weight but found {weight.dtype}")
        if not is_index:
            result_dtype = torch.promote_types(result_dtype, weight.dtype)
        weight = weight.to(torch.promote_types(z.dtype, weight.dtype))
    if autocast:
        result_dtype = torch.promote_types(result_dtype, torch.float32)
    if loss_dtype is not None:
        arithmetic = torch.promote_types(result_dtype, torch.float32)
        if loss_dtype not in (result_dtype, arithmetic):
            raise ValueError(
                f"loss_dtype must be the dtype of the logits, {result_dtype}, or that of the arithmetic, {arithmetic}, "
                f"got {loss_dtype}"
            )
        result_dtype = loss_dtype
    if not is_index:
        target = target.to(torch.promote_types(z.dtype, target.dtype))

    loss = _torch_cross_entropy(
        z, target, weight, ignore_index=ignore_index, reduction="none", label_smoothing=label_smoothing
    )  # (), (N) or (N, d1, ...)
    valid = (target != ignore_index).reshape(loss.shape) if is_index else None
    share = _shares(input, target, weight, ignore_index).to(loss.dtype)
    if lse_square_scale != 0:
        _check_factor("lse_square_scale", lse_square_scale, z.dtype)
        square = lse_square_scale * z.logsumexp(_class_dim(z)).square().reshape(loss.shape)
        loss = loss + (torch.where(valid, square * share, 0) if is_index else square)
    if token_weight is not None:
        if not token_weight.is_floating_point():
            raise RuntimeError(f"token_weight must be of a floating dtype, got {token_weight.dtype}")
        if token_weight.numel() != loss.numel() or token_weight.shape not in (loss.shape, target.shape):
            raise RuntimeError(
                f"token_weight must hold one weight for each target, shape {tuple(loss.shape)}, "
                f"got {tuple(token_weight.shape)}"
            )
        if torch.is_grad_enabled() and token_weight.requires_grad:
            raise RuntimeError("the derivative for 'token_weight' is not implemented")
        token_weight = token_weight.to(share.dtype).reshape(loss.shape)
        share = share * token_weight
        loss = loss * token_weight

    if reduction == "none":
        return loss.to(result_dtype)
    total = loss.sum()
    if reduction == "sum":
        return total.to(result_dtype)
    total_share = share.sum()
    # 0 / 1 instead of 0 / 0: the gradient is zero too, and no value is read from the device.
    if all_ignored == "zero" and is_index:
        total_share = torch.where(valid.any(), total_share, 1)
    elif all_ignored == "zero" and loss.numel() == 0:
        total_share = torch.ones_like(total_share)
    return (total / total_share).to(result_dtype)


def _shares(input: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int) -> Tensor:
    """The weight of each target in a mean, of the losses' shape. Class weights count for class indices only."""
    shape = _loss_shape(input, target)
    if target.shape == input.shape:
        return torch.ones_like(computed(input.detach()).sum(_class_dim(input)))
    index = target.reshape(shape)
    valid = index != ignore_index
    if weight is None:
        return valid.to(computed(input).dtype)
    return torch.where(valid, weight[torch.where(valid, index, 0)], 0)


def _is_dtensor(tensor: Tensor) -> bool:
    """Whether a tensor is sharded over processes; imports nothing where nothing has imported DTensor."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def _transformed(input: Tensor, softcap: float | None, logit_scale: float) -> Tensor:
    z = computed(input)
    info = torch.finfo(z.dtype)
    if logit_scale != 1:
        _check_factor("logit_scale", logit_scale, z.dtype)
        z = z * logit_scale
    if softcap is not None and softcap <= info.max:  # a larger one has no effect
        softcap = max(softcap, info.tiny)  # a smaller one would be 0 in this dtype
        z = softcap * torch.tanh(z / softcap)
    return z


def _check_factor(name: str, factor: float, dtype: torch.dtype) -> None:
    """ValueError for a finite factor that is infinite in the dtype of the arithmetic: it would make NaN of a 0."""
    if math.isfinite(factor) and abs(factor) > torch.finfo(dtype).max:
        raise ValueError(f"{name} must be finite in {dtype}, the dtype of the arithmetic, got {factor}")


def _entropy(z: Tensor, class_dim: int) -> Tensor:
    p = z.softmax(class_dim)
    # A class of probability 0 adds nothing, and nothing to the gradient, also if z = -inf.
    return z.logsumexp(class_dim) - (p * z.masked_fill(p == 0, 0)).sum(class_dim)


def _token_accuracy(
    input: Tensor,
    predicted: Tensor,
    target: Tensor,
    ignore_index: int,
    reduction: str,
    all_ignored: str,
) -> Tensor:
    if target.shape == input.shape:
        target = target.argmax(_class_dim(input))
        valid = torch.ones_like(predicted, dtype=torch.bool)
    else:
        valid = (target != ignore_index).reshape(predicted.shape)
    right = ((predicted == target.reshape(predicted.shape)) & valid).float()
    if reduction == "none":
        return right
    count = valid.sum()
    return right.sum() / (count.clamp(min=1) if all_ignored == "zero" else count)


def _class_dim(input: Tensor) -> int:
    return 0 if input.dim() == 1 else 1


def _loss_shape(input: Tensor, target: Tensor) -> torch.Size:
    """Shape of the losses before they are reduced: a 1-d input has one, whatever the shape of its target."""
    if input.dim() == 1:
        return torch.Size()
    return input.shape[:1] + input.shape[2:]


def _check_options(reduction: str, softcap: float | None, all_ignored: str, inplace: str | None) -> None:
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be > 0, got {softcap}")
    if all_ignored not in ("nan", "zero"):
        raise ValueError(f'all_ignored must be "nan" or "zero", got {all_ignored!r}')
    if inplace not in (None, "backward", "forward"):
        raise ValueError(f'inplace must be None, "backward" or "forward", got {inplace!r}')
    if inplace == "forward" and reduction == "none":
        raise ValueError('inplace="forward" needs reduction "mean" or "sum": with "none" the gradient is not yet known')
