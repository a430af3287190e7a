"""The first linear layer over embedded tokens, without its matmul."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias, overload

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.overrides import handle_torch_function, has_torch_function_variadic

from charlm import _checks, reference
from charlm._checks import ACTIVATIONS, PLANS, activation_and_plan

from .kernels import _C, by_sharding_rule, have_kernels
from .outputs import EmbeddingLinearOutput

Activation: TypeAlias = Literal["none", "tanh", "relu", "gelu"]
Plan: TypeAlias = Literal["auto", "folded", "gathered"]

_ACTIVATION_NUMBERS = {name: number for number, name in enumerate(ACTIVATIONS)}
_PLAN_NUMBERS = {name: number for number, name in enumerate(PLANS)}


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
    """The first layer over embedded tokens: `activation(linear(embedding(input, embedding_weight).flatten(-2), ...))`.

    Args:
        input: the T tokens of each context, (..., T), any integer dtype, each in [0, V).
        embedding_weight: C in the formula, (V, D); float32, float64, bfloat16 or float16; any strides.
        linear_weight: W in the formula, (H, T * D), as in `torch.nn.Linear`; the dtype of `embedding_weight`.
        linear_bias: b in the formula, (H).
        padding_idx: a row of `embedding_weight` whose gradient is zero, in [-V, V). It is looked up like any other row.
        activation: "none", "tanh", "relu" or "gelu" (with the exact erf).
        plan: "folded", "gathered", or "auto" for the faster of the two by a model of their cost (see the note).
        return_plan: return an `EmbeddingLinearOutput`, which names the plans chosen.

    Returns:
        (..., H), the dtype of the weights; under autocast, autocast's. Differentiable to any order with respect to the
        weights and the bias.

    Raises:
        IndexError: a token outside [0, V); the text names it, its position and V. On CUDA see `charlm.synchronize`.
        RuntimeError: shapes, dtypes or devices that do not fit; tokens that are not integers; plan "folded" on the CPU
            for a table of 2^31 numbers or more.
        ValueError: an unknown `activation` or `plan`.
        AssertionError: `padding_idx` outside [-V, V).
        NotImplementedError: weights that are not of a floating dtype.

    Formula:
        With tokens x and W_t the D columns of W for the t-th token of a context::

            output = activation(b + sum_t C[x_t] @ W_t^T)

        C[x_t] @ W_t^T is a row of the table C @ W_t^T, which does not depend on the contexts.

    Example:
        >>> C, W = torch.eye(2), torch.arange(4.0).reshape(1, 4)
        >>> embedding_linear(torch.tensor([[1, 0], [0, 0]]), C, W, activation="relu")
        tensor([[3.],
                [2.]])

    Note:
        "folded" computes the tables, V rows each, and sums their rows. Backward adds the gradients of the sums to the
        rows of the table's gradient, and two small products turn it into those of C and W. "gathered" gathers rows of C
        and multiplies them by W. No tensor of size (N, T, D) is created with "folded". "auto" decides by the sizes, for
        forward and backward separately.

        On CUDA "auto" is folded for a vocabulary of characters, whose table a block of the GPU computes in its own
        memory (for example 27 tokens at up to 25 places, or 65 at 8): then forward is one kernel and backward three.
        Else it is folded where there are at least 4 contexts for each token of the vocabulary and the table has at most
        4 MiB; this rule is a prediction and was not measured. There "gathered" is charlm's `embedding` and torch's
        product in the dtype of the weights, and "folded" takes a table of any size.
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
    activation_and_plan(activation, plan)
    numbers = (_ACTIVATION_NUMBERS[activation], _PLAN_NUMBERS[plan])
    output = NotImplemented
    if _C is not None and not is_compiling():
        output = _C.embedding_linear(*tensors, padding_idx, *numbers)
    if output is NotImplemented:
        has_kernels = have_kernels("embedding_linear", _TENSORS, tensors)
        row = -1
        if embedding_weight.dim() > 0:
            row = _checks.padding_row("embedding_linear", padding_idx, embedding_weight.size(0))
        if not has_kernels:
            padding_idx = None if padding_idx is None else row
            options = {
                "padding_idx": padding_idx,
                "activation": activation,
                "plan": plan,
                "return_plan": return_plan,
            }
            result = by_sharding_rule("embedding_linear", tensors, **options)
            if result is not NotImplemented:
                return result
            result = reference.embedding_linear(*tensors, **options)
            return EmbeddingLinearOutput(*result) if return_plan else result
        output = torch.ops.charlm.embedding_linear.default(*tensors, row, *numbers)[0]
    if not return_plan:
        return output
    if plan != "auto":
        return EmbeddingLinearOutput(output, plan, plan)
    plans = _C.embedding_linear_plans(input, embedding_weight, linear_weight)
    return EmbeddingLinearOutput(output, PLANS[plans[0]], PLANS[plans[1]])


_TENSORS = ("input", "embedding_weight", "linear_weight", "linear_bias?")
