"""The first linear layer over embedded tokens."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import gelu, linear

from .embedding import embedding

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda sums: sums,
    "tanh": torch.tanh,
    "relu": torch.relu,
    "gelu": gelu,
}
PLANS = ("auto", "folded", "gathered")


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
) -> Tensor | tuple[Tensor, str, str]:
    """`activation(linear(embedding(input, embedding_weight).flatten(-2), linear_weight, linear_bias))`.

    The arguments and the errors are those of `charlm.functional.embedding_linear`.

    Args:
        plan: checked, and of no other effect: the reference always gathers.

    Returns:
        (..., H); with `return_plan` the tuple (output, "gathered", "gathered").

    Example:
        >>> embedding_linear(torch.tensor([[1, 0]]), torch.eye(2), torch.arange(4.0).reshape(1, 4))
        tensor([[3.]])
    """
    _check_options(activation, plan)
    _check_shapes(input, embedding_weight, linear_weight, linear_bias)
    rows = embedding(input, embedding_weight, padding_idx)  # (..., T, D)
    output = ACTIVATIONS[activation](linear(rows.flatten(-2), linear_weight, linear_bias))
    return (output, "gathered", "gathered") if return_plan else output


def _check_options(activation: str, plan: str) -> None:
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    if plan not in PLANS:
        raise ValueError(f"plan must be one of {', '.join(PLANS)}, got {plan!r}")


def _check_shapes(input: Tensor, embedding_weight: Tensor, linear_weight: Tensor, linear_bias: Tensor | None) -> None:
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
