"""The first linear layer over embedded tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import gelu, linear

from .embedding import embedding
from .outputs import made_from_generator

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda sums: sums,
    "tanh": torch.tanh,
    "relu": torch.relu,
    "gelu": gelu,
}
PLANS = ("auto", "folded", "gathered")


@made_from_generator
class EmbeddingLinearOutput(NamedTuple):
    """What `embedding_linear` returns with `return_plan`.

    output:        (..., H); differentiable.
    plan:          "folded" or "gathered": how `output` was made.
    backward_plan: the same of its gradients.
    """

    output: Tensor
    plan: str
    backward_plan: str


def embedding_linear(
    input: Tensor,
    embedding_weight: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None = None,
    *,
    padding_idx: int | None = None,
    activation: str = "none",
    plan: str = "auto",
    return_plan: bool = False,
) -> Tensor | EmbeddingLinearOutput:
    """`activation(linear(embedding(input, embedding_weight).flatten(-2), linear_weight, linear_bias))`.

    Args and errors as `charlm.functional.embedding_linear`. The reference has one plan, "gathered", whatever is asked
    for.

    Example:
        >>> embedding_linear(torch.tensor([[1, 0]]), torch.eye(2), torch.arange(4.0).reshape(1, 4))
        tensor([[3.]])
    """
    check_options(activation, plan)
    check_shapes(input, embedding_weight, linear_weight, linear_bias)
    rows = embedding(input, embedding_weight, padding_idx)  # (..., T, D)
    output = ACTIVATIONS[activation](linear(rows.flatten(-2), linear_weight, linear_bias))
    return EmbeddingLinearOutput(output, "gathered", "gathered") if return_plan else output


def check_options(activation: str, plan: str) -> None:
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    if plan not in PLANS:
        raise ValueError(f"plan must be one of {', '.join(PLANS)}, got {plan!r}")


def check_shapes(input: Tensor, embedding_weight: Tensor, linear_weight: Tensor, linear_bias: Tensor | None) -> None:
    """RuntimeError, with the shapes, for tensors that do not fit each other."""
    if input.dim() < 1:
        raise RuntimeError("input must have a dimension of places, shape (..., T), got a 0-d tensor")
    if embedding_weight.dim() != 2:
        raise RuntimeError(f"embedding_weight must be 2-D, (V, D), got shape {list(embedding_weight.shape)}")
    if linear_weight.dim() != 2:
        raise RuntimeError(f"linear_weight must be 2-D, (H, T * D), got shape {list(linear_weight.shape)}")
    places, dim = input.shape[-1], embedding_weight.shape[1]
    if linear_weight.shape[1] != places * dim:
        raise RuntimeError(
            f"linear_weight must have T * D = {places} * {dim} = {places * dim} columns for an input of shape "
            f"{list(input.shape)} and an embedding_weight of shape {list(embedding_weight.shape)}, "
            f"got shape {list(linear_weight.shape)}"
        )
    if linear_bias is not None and linear_bias.shape != linear_weight.shape[:1]:
        raise RuntimeError(
            f"linear_bias must have shape {list(linear_weight.shape[:1])} for a linear_weight of shape "
            f"{list(linear_weight.shape)}, got shape {list(linear_bias.shape)}"
        )
