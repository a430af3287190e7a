"""Cross-entropy of logits whose classes are divided among the ranks of a process group."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from charlm import _checks
from charlm.functional import CrossEntropyOutput
from charlm.functional.cross_entropy import AllIgnored, CrossEntropyOptions
from charlm.functional.kernels import have_kernels

from .class_part import Copied, Part
from .vocab_parallel_autograd import OfLinear, OfLogits, Rows, Wanted, in_autocast, of_logits_by_formula

BUDGET_ON_CPU, BUDGET_ON_GPU = 64 * 10**6, 2**30  # bytes, the defaults of linear_cross_entropy's memory_budget
MIN_BLOCK = 16  # rows: products of fewer are slow and round more


def vocab_parallel_cross_entropy(
    logits: Tensor,
    target: Tensor,
    num_classes: int,
    group: ProcessGroup | None = None,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    lse_square_scale: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    token_weight: Tensor | None = None,
    all_ignored: AllIgnored = "nan",
    loss_dtype: torch.dtype | None = None,
    inplace: str | None = None,
    return_lse: bool = False,
    return_entropy: bool = False,
    return_predicted_tokens: bool = False,
    return_token_accuracy: bool = False,
) -> Tensor | CrossEntropyOutput:
    """`charlm.functional.cross_entropy` of logits whose classes are divided among the ranks of `group`.

    All ranks of `group` call it with the same target, weights and options, and get the same result. They must use it in
    the same way: the gradient of the result is not communicated.

    Args:
        logits: the logits of this rank's classes, (N, C_r) or (N, C_r, d1, ...). As `torch.chunk` and DTensor's
            `Shard` divide C classes among W ranks, rank r has those from r * ceil(C / W) on: ceil(C / W) of them, and
            the last ranks fewer or none.
        target: (N) or (N, d1, ...) class indices of any integer dtype, in [0, num_classes) or `ignore_index`.
        num_classes: C, the number of classes of all ranks together.
        group: the ranks; None is the default group.
        weight: (num_classes), the weight of each class, on every rank.
        token_weight: the shape of `target`.
        inplace: permission to overwrite the logits with their gradient: None or "backward". With label smoothing, under
            torch.compile and without our kernels they are not overwritten.
        ignore_index, reduction, label_smoothing, lse_square_scale, softcap, logit_scale, all_ignored, loss_dtype,
            return_lse, return_entropy, return_predicted_tokens, return_token_accuracy: as in `cross_entropy`.

    Returns:
        The result of `cross_entropy` on the logits of all ranks. Differentiable once with respect to `logits`.

    Raises:
        IndexError: a target outside [0, num_classes) that is not `ignore_index`. On CUDA see `charlm.synchronize`.
        ValueError: logits of another number of classes than this rank has; an option that `cross_entropy` refuses, or
            `inplace="forward"`: before the exchange no gradient is known.
        RuntimeError: class probabilities as target; shapes or dtypes that do not fit; a `weight` or `token_weight` that
            requires grad; `inplace` with logits that are a leaf or may overlap themselves.
    """
    scalars = (reduction, ignore_index, label_smoothing, lse_square_scale, softcap, logit_scale, all_ignored)
    options = CrossEntropyOptions.checked("vocab_parallel_cross_entropy", *scalars, loss_dtype)
    _checks.choice("inplace", inplace, (None, "backward"))
    if logits.dim() < 2:
        raise RuntimeError(f"expected logits of shape (N, C_r) or (N, C_r, d1, ...), got {tuple(logits.shape)}")
    part = Part.of("vocab_parallel_cross_entropy", num_classes, group)
    part.check("logits", logits.shape[1])
    device = logits.device.type
    if torch.is_autocast_enabled(device):  # as cross_entropy's
        logits, weight = (in_autocast(tensor, torch.float32) for tensor in (logits, weight))
    rows = Rows.of(part, target, logits.shape[:1] + logits.shape[2:], weight, options, logits.dtype)
    returns = (return_lse, return_entropy, return_predicted_tokens, return_token_accuracy)
    wanted = Wanted(options.label_smoothing > 0, *returns)
    rows.check_inplace(logits, inplace)
    with torch.autocast(device, enabled=False):
        function = OfLogits.apply if have_kernels("cross_entropy", ("logits",), (logits,)) else of_logits_by_formula
        numbers = function(logits, rows, options, wanted, inplace is not None)
    return rows.result(numbers, options, loss_dtype or logits.dtype, token_weight, wanted)


def vocab_parallel_linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    num_classes: int,
    group: ProcessGroup | None = None,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    lse_square_scale: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    token_weight: Tensor | None = None,
    all_ignored: AllIgnored = "nan",
    loss_dtype: torch.dtype | None = None,
    memory_budget: int | None = None,
    return_lse: bool = False,
    return_entropy: bool = False,
    return_predicted_tokens: bool = False,
    return_token_accuracy: bool = False,
) -> Tensor | CrossEntropyOutput:
    """`charlm.functional.linear_cross_entropy` with the rows of `linear_weight` divided among the ranks of `group`.

    Args:
        input: (N, D), the same on every rank. The gradient that each rank gets is the whole one: an all-reduce sums the
            shares of the ranks. Where `input` is itself gathered from the ranks (sequence parallelism), gather it with
            an op whose backward takes this rank's rows, not with one that sums them again.
        linear_weight: (C_r, D), the rows of this rank's classes, divided as in `vocab_parallel_cross_entropy`.
        target: (N) class indices in [0, num_classes) or `ignore_index`.
        num_classes: C, the number of classes of all ranks together.
        group: the ranks; None is the default group.
        linear_bias: (C_r), this rank's part.
        memory_budget: bytes for the logits that exist at once; None is 1 GiB on CUDA and 64 MB on the CPU. If all
            logits of this rank fit, they are kept, and backward turns them into their gradient in their own memory;
            otherwise they are computed in blocks of at least 16 rows, and once more in backward. With label smoothing
            the gradient has memory of its own, for half types in float32.
        weight, ignore_index, reduction, label_smoothing, lse_square_scale, softcap, logit_scale, token_weight,
            all_ignored, loss_dtype, return_lse, return_entropy, return_predicted_tokens, return_token_accuracy: as in
            `vocab_parallel_cross_entropy`.

    Returns:
        The result of `linear_cross_entropy` with the weight of all ranks. Differentiable once with respect to `input`,
        `linear_weight` and `linear_bias`.

    Raises:
        IndexError, ValueError, RuntimeError: as `vocab_parallel_cross_entropy` and `linear_cross_entropy`.
    """
    function = "vocab_parallel_linear_cross_entropy"
    scalars = (reduction, ignore_index, label_smoothing, lse_square_scale, softcap, logit_scale, all_ignored)
    options = CrossEntropyOptions.checked(function, *scalars, loss_dtype)
    budget = 0 if memory_budget is None else _checks.memory_budget(memory_budget)
    _checks.linear_shapes(input, linear_weight, linear_bias)
    if input.dim() != 2 or linear_weight.dim() != 2:
        raise RuntimeError(
            f"expected input (N, D) and linear_weight (C_r, D), got {tuple(input.shape)} and "
            f"{tuple(linear_weight.shape)}"
        )
    part = Part.of(function, num_classes, group)
    part.check("linear_weight", linear_weight.shape[0])
    device = input.device.type
    result_dtype = input.dtype
    if torch.is_autocast_enabled(device):
        dtype, result_dtype = torch.get_autocast_dtype(device), torch.promote_types(input.dtype, torch.float32)
        input, linear_weight, linear_bias = (in_autocast(t, dtype) for t in (input, linear_weight, linear_bias))
        weight = in_autocast(weight, torch.float32)
    rows = Rows.of(part, target, input.shape[:1], weight, options, input.dtype)
    returns = (return_lse, return_entropy, return_predicted_tokens, return_token_accuracy)
    wanted = Wanted(options.label_smoothing > 0, *returns)
    with torch.autocast(device, enabled=False):
        tensors = (input, linear_weight, linear_bias)
        if have_kernels(function, ("input", "linear_weight", "linear_bias?"), tensors):
            row_bytes = max(1, linear_weight.shape[0] * input.element_size())
            block = max(MIN_BLOCK, (budget or (BUDGET_ON_GPU if input.is_cuda else BUDGET_ON_CPU)) // row_bytes)
            numbers = OfLinear.apply(*tensors, rows, options, wanted, block)
        else:
            logits = torch.nn.functional.linear(Copied.apply(input, part), linear_weight, linear_bias)
            numbers = of_logits_by_formula(logits, rows, options, wanted)
        return rows.result(numbers, options, loss_dtype or result_dtype, token_weight, wanted)
