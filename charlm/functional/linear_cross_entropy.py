"""Softmax cross-entropy of logits that a linear layer computes, without the whole logits."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.nn.functional import linear as _torch_linear
from torch.overrides import handle_torch_function, has_torch_function_variadic

from charlm import _checks

from .cross_entropy import AllIgnored, CrossEntropyOptions, cross_entropy
from .kernels import _C, by_sharding_rule, have_kernels
from .outputs import CrossEntropyOutput

if TYPE_CHECKING:
    from torch.nn import LinearCrossEntropyOptions


@overload
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
    all_ignored: AllIgnored = "nan",
    loss_dtype: torch.dtype | None = None,
    shift: bool | int = False,
    memory_budget: int | None = None,
    return_lse: Literal[False] = False,
    return_entropy: Literal[False] = False,
    return_predicted_tokens: Literal[False] = False,
    return_token_accuracy: Literal[False] = False,
) -> Tensor: ...
@overload
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
    all_ignored: AllIgnored = "nan",
    loss_dtype: torch.dtype | None = None,
    shift: bool | int = False,
    memory_budget: int | None = None,
    return_lse: bool = False,
    return_entropy: bool = False,
    return_predicted_tokens: bool = False,
    return_token_accuracy: bool = False,
) -> CrossEntropyOutput | Any: ...
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
    all_ignored: AllIgnored = "nan",
    loss_dtype: torch.dtype | None = None,
    shift: bool | int = False,
    memory_budget: int | None = None,
    return_lse: bool = False,
    return_entropy: bool = False,
    return_predicted_tokens: bool = False,
    return_token_accuracy: bool = False,
) -> Tensor | CrossEntropyOutput:
    """`cross_entropy(input @ linear_weight.T + linear_bias, target)` in nats: `F.linear_cross_entropy`.

    Args:
        input: (D) or (N, D); float32, float64, bfloat16 or float16; any strides.
        linear_weight: (C, D), or (C, d1, ..., D) for logits (N, C, d1, ...); the dtype of `input`.
        target: class indices, () or (N) or (N, d1, ...), any integer dtype, each in [0, C) or `ignore_index`; or class
            probabilities, the shape of the logits, a floating dtype.
        linear_bias: (C) or (C, d1, ...), the dtype of `input`.
        ignore_index: as in `cross_entropy`; None is -100. With class probabilities it must be None.
        options: torch's `LinearCrossEntropyOptions`. `batch_chunk_size` or `chunking_method` sets the number of rows of
            a block; the other fields have no effect, since sums are always in float32 or better and backward may always
            be called again.
        shift: for a causal language model: the input at position t is scored with the target at position t + shift.
            True is 1; False or 0 is no shift. With it `input` is (T, D) or (..., T, D), `target` holds class indices of
            shape (T) or (..., T), and "none" gives (..., T - shift).
        memory_budget: bytes beyond the results, for the logits that exist at once and, on CUDA, for sums in float32.
            None is 1 GiB on CUDA and 64 MB on the CPU. On CUDA a larger one is faster (see the Note). Without effect
            where `options` sets the rows of a block.
        weight, reduction, label_smoothing, lse_square_scale, softcap, logit_scale, token_weight, all_ignored,
            loss_dtype, return_lse, return_entropy, return_predicted_tokens, return_token_accuracy: as in
            `cross_entropy`. The metrics cost a product of their own.

    Returns:
        The result of `cross_entropy`. The loss has the dtype of `input`; float32 under autocast, where the product is
        in autocast's dtype. It is differentiable with respect to `input`, `linear_weight` and `linear_bias`, to
        probability targets, and with them to `weight`.

    Raises:
        IndexError: a class index outside [0, C) that is not `ignore_index`, before anything is computed; the text names
            it, its position and C. On CUDA see `charlm.synchronize`.
        TypeError: a `memory_budget` that is no int.
        ValueError: batch sizes that differ; an unknown `reduction` or `all_ignored`; `softcap` or `memory_budget`
            <= 0; a `loss_dtype` that is neither the dtype of `input` nor float32 for half types; a `shift` outside
            [0, T); `options` whose two ways to set the rows of a block differ.
        RuntimeError: other shapes or dtypes that do not fit, with `shift` also a `target` of another shape; an
            `ignore_index` with class probabilities; a `token_weight`, or a `weight` with class indices, that requires
            grad.
        NotImplementedError: an input that is not of a floating dtype.

    Example:
        >>> linear_cross_entropy(torch.zeros(2, 3), torch.ones(4, 3), torch.tensor([1, 3]))
        tensor(1.3863)

    Note:
        On the CPU the logits (N, C) are computed in blocks of rows. A block has about 64 MB (one row, if that is
        larger), is turned into its losses and its own gradient in place, and is used for the gradients of `input`,
        `linear_weight` and `linear_bias` before the next block is computed. Beyond the gradients a call needs less than
        100 MB for any N, and for half types one float32 copy of the gradient of `linear_weight`. Where the device
        multiplies half types and N <= 2 D, a block has all rows, whose logits are smaller than that copy, which then is
        not made. A `memory_budget` bounds the logits of a block.

        On CUDA the fastest plan within `memory_budget` is chosen. If it holds the logits, they exist as a whole, and
        their gradient takes their place: three products. Otherwise there are blocks of rows, for half types with that
        float32 copy; or tiles of classes for all rows, whose logits are computed twice, first for the softmax, then for
        the gradient, with a float32 copy of the gradient of `input` for half types. Tiles need a fourth product, except
        for those whose logits fit into the budget or, until it is written, into the gradient of `linear_weight`. Class
        probabilities and `label_smoothing` have blocks of rows only. A budget too small for one row and these copies is
        exceeded. A `linear_weight` whose C is no multiple of 16 bytes is copied with some rows of zeros, by which the
        products of half types are five times as fast; with tiles only the last tile is copied.

        With "mean" or "sum" and arguments that require grad, forward computes the gradients for a unit grad_output in
        three products of (N, C, D), and backward multiplies them by grad_output. A second backward, "none" and float16
        recompute the logits in backward, in a fourth product, and so does a returned lse or entropy. To skip the
        gradients of a loss that is only read, call under `torch.no_grad()`. On the CPU rows whose target is ignored are
        not computed, unless lse or entropy is returned.

        The products are torch's, or our own where one side is short and where torch's BLAS does not use the CPU's
        AVX-512. Our products give the same bits for any number of threads. For float16 and bfloat16 on a CPU without
        instructions for their products, the logits and all products are in float32, of operands converted a part at a
        time; elsewhere the logits of a block have the dtype of `input`, as torch's have.

        The whole logits are computed, as by `cross_entropy(F.linear(...))`, for K-dimensional weights (C, d1, ..., D);
        for targets or class weights that require grad; for probabilities of another dtype than `input` or under
        autocast; and in torch.func's transforms, forward-mode AD and double backward.
    """
    tensors = (input, linear_weight, target, linear_bias, weight, token_weight)
    keywords: dict[str, Any] = {
        "reduction": reduction,
        "ignore_index": ignore_index,
        "label_smoothing": label_smoothing,
        "options": options,
        "lse_square_scale": lse_square_scale,
        "softcap": softcap,
        "logit_scale": logit_scale,
        "all_ignored": all_ignored,
        "loss_dtype": loss_dtype,
        "shift": shift,
        "memory_budget": memory_budget,
        "return_lse": return_lse,
        "return_entropy": return_entropy,
        "return_predicted_tokens": return_predicted_tokens,
        "return_token_accuracy": return_token_accuracy,
    }
    if has_torch_function_variadic(*tensors):
        return handle_torch_function(
            linear_cross_entropy,
            tensors,
            input,
            linear_weight,
            target,
            linear_bias=linear_bias,
            weight=weight,
            token_weight=token_weight,
            **keywords,
        )
    has_kernels = have_kernels("linear_cross_entropy", _TENSORS, tensors)
    budget = 0 if memory_budget is None else _checks.memory_budget(memory_budget)
    shift = int(shift) if isinstance(shift, bool) else _checks.integer("linear_cross_entropy", "shift", shift)
    keywords["shift"] = shift
    if not has_kernels:
        result = by_sharding_rule("linear_cross_entropy", tensors, **keywords)
        if result is not NotImplemented:
            return result
    if shift:
        return _shifted(*tensors, **keywords)
    _checks.linear_shapes(input, linear_weight, linear_bias)
    if ignore_index is None:
        ignore_index = -100
    elif target.shape == _logits_shape(input, linear_weight):
        raise RuntimeError("ignore_index cannot be specified when target contains probabilities")
    if not has_kernels or _needs_whole_logits(input, linear_weight, target, weight, token_weight):
        del keywords["options"], keywords["shift"], keywords["memory_budget"]
        keywords["ignore_index"] = ignore_index
        logits = _make_logits(input, linear_weight, linear_bias)
        return cross_entropy(logits, target, weight, token_weight=token_weight, **keywords)
    given = (reduction, ignore_index, label_smoothing, lse_square_scale, softcap, logit_scale, all_ignored, loss_dtype)
    block_rows = _block_rows(options, input, linear_weight)
    returns = return_lse or return_entropy or return_predicted_tokens or return_token_accuracy
    if not returns and not is_compiling():
        return _C.linear_cross_entropy(*tensors, block_rows, *given, budget)
    checked = CrossEntropyOptions.checked("linear_cross_entropy", *given).schema_arguments()
    arguments = (False, block_rows, 0, *checked, budget)  # 0: the op chooses the dtype of the products
    if not returns:
        return torch.ops.charlm.linear_cross_entropy.default(*tensors, *arguments)
    if not (return_lse or return_entropy):  # apart from the loss, whose forward then computes the gradients too
        loss = torch.ops.charlm.linear_cross_entropy.default(*tensors, *arguments)
        detached = (None if tensor is None else tensor.detach() for tensor in tensors)
        metrics = torch.ops.charlm.linear_cross_entropy_metrics.default(*detached, *arguments)
    else:
        loss, *metrics = torch.ops.charlm.linear_cross_entropy_with_metrics.default(*tensors, *arguments)
    lse, entropy, predicted_tokens, token_accuracy = metrics
    return CrossEntropyOutput(
        loss,
        lse if return_lse else None,
        entropy if return_entropy else None,
        predicted_tokens if return_predicted_tokens else None,
        token_accuracy if return_token_accuracy else None,
    )


def _shifted(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    token_weight: Tensor | None,
    *,
    shift: int,
    **keywords: Any,
) -> Tensor | CrossEntropyOutput:
    """The loss of the input at position t and the target at position t + shift of each sequence."""
    sequences = input.shape[:-1]  # (..., T)
    if input.dim() < 2 or target.shape != sequences:
        raise RuntimeError(
            "with shift, input must have shape (..., T, D) and target must hold class indices of shape (..., T), "
            f"got {tuple(input.shape)} and {tuple(target.shape)}"
        )
    if not 0 < shift < sequences[-1]:
        raise ValueError(f"shift must be in [0, T) for sequences of length T = {sequences[-1]}, got {shift}")
    if token_weight is not None and token_weight.shape != target.shape:
        raise RuntimeError(f"token_weight must have the shape of target, {tuple(sequences)}")
    shape = (*sequences[:-1], sequences[-1] - shift)
    rows, targets = input[..., :-shift, :].flatten(0, -2), target[..., shift:].flatten()
    weights = None if token_weight is None else token_weight[..., shift:].flatten()
    tensors = {"linear_bias": linear_bias, "weight": weight, "token_weight": weights}
    try:
        result = linear_cross_entropy(rows, linear_weight, targets, **tensors, **keywords)
    except IndexError as error:
        raise IndexError(_with_position_in_target(str(error), shape, shift)) from None
    if isinstance(result, Tensor):
        return result.reshape(shape) if keywords["reduction"] == "none" else result
    return CrossEntropyOutput(*(t if t is None or t.dim() == 0 else t.reshape(shape) for t in result))


def _with_position_in_target(error: str, shape: tuple[int, ...], shift: int) -> str:
    """The text of an IndexError with the position in the caller's target in place of that among the shifted rows."""

    def position(match: re.Match[str]) -> str:
        *outer, last = (int(i) for i in torch.unravel_index(torch.tensor(int(match[1])), shape))
        return f"position {(*outer, last + shift)}"

    return re.sub(r"position \((\d+),\)", position, error)


_TENSORS = ("input", "linear_weight", "target", "linear_bias?", "weight?", "token_weight?")


def _logits_shape(input: Tensor, linear_weight: Tensor) -> tuple[int, ...]:
    """(C), (N, C) or (N, C, d1, ...)."""
    return (*input.shape[:-1], *linear_weight.shape[:-1])


def _make_logits(input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None) -> Tensor:
    """The whole logits, by torch's own `linear` as it is when charlm is imported: `patch_torch` does not change it."""
    n_outputs = math.prod(linear_weight.shape[:-1])
    bias = None if linear_bias is None else linear_bias.reshape(n_outputs)
    logits = _torch_linear(input, linear_weight.reshape(n_outputs, linear_weight.shape[-1]), bias)
    return logits.reshape(_logits_shape(input, linear_weight))


def _needs_whole_logits(
    input: Tensor, linear_weight: Tensor, target: Tensor, weight: Tensor | None, token_weight: Tensor | None
) -> bool:
    if linear_weight.dim() > 2:
        return True
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (target, weight, token_weight)):
        return True
    if target.shape != _logits_shape(input, linear_weight):
        return False
    same_dtype = target.dtype == input.dtype and (weight is None or weight.dtype == input.dtype)
    return not same_dtype or torch.is_autocast_enabled(input.device.type)


def _block_rows(options: LinearCrossEntropyOptions | None, input: Tensor, linear_weight: Tensor) -> int:
    """The rows of a block that `options` set, or 0: the op chooses them."""
    if options is None or (options.batch_chunk_size is None and options.chunking_method == "auto"):
        return 0
    n_rows = input.shape[0] if input.dim() == 2 else 1
    adjusted = options._adjust(n_rows, input.shape[-1], linear_weight.shape[0], input.dtype, input.device)
    return adjusted.batch_chunk_size
