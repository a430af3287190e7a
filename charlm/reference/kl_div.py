"""torch's own kl_div, element by element."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor
from torch.nn import _reduction
from torch.nn.functional import kl_div as _torch_kl_div


def kl_div(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    log_target: bool = False,
) -> Tensor:
    """`torch.nn.functional.kl_div`.

    Example:
        >>> kl_div(torch.zeros(2), torch.zeros(2), reduction="sum")
        tensor(0.)
    """
    warn_of_mean(size_average, reduce, reduction)
    return without_warning_of_mean(input, target, size_average, reduce, reduction, log_target)


def warn_of_mean(size_average: bool | None, reduce: bool | None, reduction: str) -> None:
    """torch's warning of "mean", at the line that calls our caller."""
    if reduction == "mean" and size_average is None and reduce is None and not torch.compiler.is_compiling():
        warnings.warn(
            "reduction: 'mean' divides the total loss by both the batch size and the support size. 'batchmean' divides "
            "by the batch size alone, which gives the KL divergence.",
            stacklevel=3,
        )


def without_warning_of_mean(
    input: Tensor,
    target: Tensor,
    size_average: bool | None,
    reduce: bool | None,
    reduction: str,
    log_target: bool,
) -> Tensor:
    if reduction == "mean" and size_average is None and reduce is None:
        return torch.kl_div(input, target, _reduction.get_enum("mean"), log_target=log_target)
    return _torch_kl_div(input, target, size_average, reduce, reduction, log_target)
