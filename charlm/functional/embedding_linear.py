"""The first linear layer over embedded tokens, without its matmul."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias, overload

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from charlm import _checks, reference

from .kernels import _C, have_kernels
from .outputs import EmbeddingLinearOutput

Activation: TypeAlias = Literal["none", "tanh", "relu", "gelu"]
Plan: TypeAlias = Literal["auto", "folded", "gathered"]

_ACTIVATION_NUMBERS = {name: number for number, name in enumerate(_checks.ACTIVATIONS)}
_PLAN_NUMBERS = {name: number for number, name in enumerate(_checks.PLANS)}


@overload
def embedding_linear(
    input: Tensor,
    embedding_weight: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None = None,
    *,
    padding_idx: int | None = None,
    activation: Activation = "none",
    plan: Plan = "auto",
    return_plan: Literal[False] = False,
) -> Tensor: ...
@overload
def embedding_linear(
    input: Tensor,
    embedding_weight: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None = None,
    *,
    padding_idx: int | None = None,
    activation: Activation = "none",
    plan: Plan = "auto",
    return_plan: bool = False,
) -> EmbeddingLinearOutput | Any: ...
def embedding_linear(
    input: Tensor,
    embedding_weight: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None = None,
    *,
    padding_idx: int | None = None,
    activation: Activation = "none",
    plan: Plan = "auto",
    return_plan: bool = False,
) -> Tensor | EmbeddingLinearOutput:
    """`activation(linear(embedding(input, embedding_weight).flatten(-2), linear_weight, linear_bias))`.

    With C the embedding, x the T tokens of a context and W_t the D columns of W that meet the t-th of them::

        output = activation(b + sum_t C[x_t] @ W_t^T)

    Since one-hot(x) @ C only picks a row of C, C[x] @ W_t^T only picks a row of the table C @ W_t^T: it is made once,
    of V rows in place of N, and its rows are summed. In the backward the gradients of the sums are added to the rows
    of the table's gradient, and two small GEMMs make those of C and W of it. Nothing of the size (N, T, D) exists.
    Where the contexts are too few for the table to be worth it, rows of C are gathered and multiplied as usual; the
    sizes decide, for the forward and for the backward. Either way arithmetic is in float32 (float64 for float64) and
    each result is rounded once. The same bits for any number of threads, but for GEMMs of torch.

    Args:
        input: tokens, (..., T), any integer dtype (uint8 included), each in [0, V).
        embedding_weight: C, (V, D), float32, float64, bfloat16 or float16, any strides.
        linear_weight: W, (H, T * D), as of `torch.nn.Linear`; the dtype of `embedding_weight`.
        linear_bias: b, (H).
        padding_idx: a row of `embedding_weight` whose gradient is zero, in [-V, V). It is looked up like any other.
        activation: "none", "tanh", "relu" or "gelu" (with the exact erf).
        plan: "folded", "gathered", or "auto": the faster of them, by a model of their cost.
        return_plan: return an `EmbeddingLinearOutput`, which names the plans chosen.

    Returns:
        (..., H), the dtype of the weights; under autocast, autocast's. Differentiable to any order with respect to
        the weights and the bias.

    Raises:
        IndexError: a token outside [0, V); the text names it, its position and V.
        RuntimeError: shapes, dtypes or devices that do not fit, the shapes in the text; tokens that are not integers;
            plan "folded" on the CPU for a table of 2^31 numbers or more.
        ValueError: an unknown `activation` or `plan`.
        AssertionError: `padding_idx` outside [-V, V).
        NotImplementedError: weights that are not of a floating dtype.

    On CUDA "auto" is folded where there are at least 4 contexts for each token of the vocabulary and the table has at
    most 4 MiB: a prediction, measured on no GPU. There "gathered" is charlm's `embedding` and torch's GEMM in the dtype
    of the weights, "folded" takes a table of any size, and an index out of range is raised by `charlm.synchronize()` or
    by the next op.

    Example:
        >>> C, W = torch.eye(2), torch.arange(4.0).reshape(1, 4)
        >>> embedding_linear(torch.tensor([[1, 0], [0, 0]]), C, W, activation="relu")
        tensor([[3.],
                [2.]])
    """
    tensors = (input, embedding_weight, linear_weight, linear_bias)
    if has_torch_function_variadic(*tensors):
        return handle_torch_function(
            embedding_linear,
            tensors,
            *tensors,
            padding_idx=padding_idx,
            activation=activation,
            plan=plan,
            return_plan=return_plan,
        )
    _checks.activation_and_plan(activation, plan)
    numbers = (_ACTIVATION_NUMBERS[activation], _PLAN_NUMBERS[plan])
    output = NotImplemented
    if _C is not None and not torch.compiler.is_compiling():
        output = _C.embedding_linear(*tensors, padding_idx, *numbers)
    if output is NotImplemented:
        has_kernels = have_kernels("embedding_linear", _TENSORS, tensors)
        row = -1
        if embedding_weight.dim() > 0:
            row = _checks.padding_row("embedding_linear", padding_idx, embedding_weight.size(0))
        if not has_kernels:
            padding_idx = None if padding_idx is None else row
            result = reference.embedding_linear(
                *tensors, padding_idx=padding_idx, activation=activation, plan=plan, return_plan=return_plan
            )
            return EmbeddingLinearOutput(*result) if return_plan else result
        output = torch.ops.charlm.embedding_linear.default(*tensors, row, *numbers)[0]
    if not return_plan:
        return output
    if plan != "auto":
        return EmbeddingLinearOutput(output, plan, plan)
    plans = _C.embedding_linear_plans(input, embedding_weight, linear_weight)
    return EmbeddingLinearOutput(output, _checks.PLANS[plans[0]], _checks.PLANS[plans[1]])


_TENSORS = ("input", "embedding_weight", "linear_weight", "linear_bias?")
