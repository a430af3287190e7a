"""torch's pointwise Kullback-Leibler loss."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.nn import _reduction
from torch.nn.functional import kl_div as _torch_kl_div
from torch.overrides import handle_torch_function, has_torch_function_variadic

from charlm import _checks

from .kernels import _C, by_sharding_rule, have_kernels


def kl_div(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    log_target: bool = False,
    *,
    p_kind: None = None,
    q_kind: None = None,
) -> Tensor:
    """torch's pointwise Kullback-Leibler loss in nats, of log-probabilities and probabilities: `F.kl_div`.

    Args:
        input: log-probabilities, x in the formula, any shape; float32, float64, bfloat16 or float16; any strides.
        target: probabilities, t in the formula, or with `log_target` their logarithms. `input` and `target` are
            broadcast and promoted.
        size_average, reduce: deprecated by torch; they override `reduction`.
        reduction: "none": each element's value. "sum": their sum. "batchmean": the sum divided by `input.size(0)`,
            which is the KL divergence. "mean": the sum divided by the number of elements, with torch's warning.
        log_target: whether `target` holds logarithms.
        p_kind, q_kind: options of `kl_divergence`; refused here.

    Returns:
        (), or with "none" the broadcast shape; the promoted dtype. Differentiable to any order with respect to both.
        NaN where torch's is: a negative target, a target of 0 at an input of -inf, and the gradient of a target of 0.

    Raises:
        ValueError: an unknown `reduction`.
        TypeError: an argument of the wrong type; `p_kind` or `q_kind`.
        RuntimeError: shapes that cannot be broadcast.

    Warns:
        UserWarning, once: `input` holds a value > 0 beyond rounding, so it does not hold log-probabilities (checked on
            the CPU only).

    Formula:
        Each element gives, with 0 log 0 = 0::

            t * (log t - x)             or, with log_target,        exp(t) * (t - x)

    Example:
        >>> kl_div(torch.tensor([0.5, 0.5]).log(), torch.tensor([1.0, 0.0]), reduction="sum")
        tensor(0.6931)

    Note:
        The order of the arguments is torch's: `input` is log Q and `target` is P of KL(P || Q). `kl_divergence(p, q)`
        takes P first, and logits, log-probabilities or probabilities for each.
    """
    if p_kind is not None or q_kind is not None:
        raise TypeError(
            "kl_div() is torch.nn.functional.kl_div(input, target) and takes neither p_kind nor q_kind: the divergence "
            "of two distributions of given kinds is kl_divergence(p, q, p_kind=..., q_kind=...)"
        )
    if has_torch_function_variadic(input, target):
        return handle_torch_function(
            kl_div,
            (input, target),
            input,
            target,
            size_average=size_average,
            reduce=reduce,
            reduction=reduction,
            log_target=log_target,
        )
    has_kernels = have_kernels("kl_div", ("input", "target"), (input, target))
    _checks.boolean("kl_div", "log_target", log_target)
    is_legacy = size_average is not None or reduce is not None
    if reduction == "mean" and not is_legacy and not is_compiling():
        warnings.warn(
            "reduction: 'mean' divides the total loss by both the batch size and the support size. 'batchmean' divides "
            "by the batch size alone, which gives the KL divergence.",
            stacklevel=2,
        )
    if not (has_kernels or is_legacy):
        result = by_sharding_rule("kl_div", (input, target), reduction=reduction, log_target=log_target)
        if result is not NotImplemented:
            return result
    batch_size = input.size(0) if input.dim() > 0 else 1
    if (
        not (has_kernels and input.is_floating_point() and target.is_floating_point())
        or (is_legacy and reduction == "batchmean")  # torch applies both divisors
        or isinstance(batch_size, Tensor)  # in torch.jit.trace, which cannot record a number that depends on a size
    ):
        return _by_torch(input, target, size_average, reduce, reduction, log_target)
    if is_legacy:
        reduction = _reduction.legacy_get_string(size_average, reduce)
    if reduction != "batchmean":
        _reduction.get_enum(reduction)  # ValueError for an unknown name
    if input.dtype != target.dtype:
        dtype = torch.result_type(input, target)
        input, target = input.to(dtype), target.to(dtype)
    if input.shape != target.shape:
        input, target = torch.broadcast_tensors(input, target)
    divisor = {"none": 1, "sum": 1, "batchmean": batch_size}.get(reduction, input.numel())
    arguments = (input, target, log_target, reduction != "none", divisor)
    if is_compiling() or isinstance(divisor, torch.SymInt):
        return torch.ops.charlm.pointwise_kl_div.default(*arguments)
    return _C.pointwise_kl_div(*arguments)


def _by_torch(
    input: Tensor,
    target: Tensor,
    size_average: bool | None,
    reduce: bool | None,
    reduction: str,
    log_target: bool,
) -> Tensor:
    """torch's own function, without its warning of "mean": `kl_div` has given it."""
    if reduction == "mean" and size_average is None and reduce is None:
        return torch.kl_div(input, target, _reduction.get_enum("mean"), log_target=log_target)
    return _torch_kl_div(input, target, size_average, reduce, reduction, log_target)
