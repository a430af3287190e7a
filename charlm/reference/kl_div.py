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
    """torch's own `F.kl_div`.

    Arguments and errors are those of `charlm.functional.kl_div`, without `p_kind` and `q_kind`.

    Example:
        >>> kl_div(torch.zeros(2), torch.zeros(2), reduction="sum")
        tensor(0.)
    """
    if reduction == "mean" and size_average is None and reduce is None:
        if not torch.compiler.is_compiling():
            warnings.warn(
                "reduction: 'mean' divides the total loss by both the batch size and the support size. 'batchmean' "
                "divides by the batch size alone, which gives the KL divergence.",
                stacklevel=2,
            )
        # torch's Python function would warn too, and name a line of torch.
        return torch.kl_div(input, target, _reduction.get_enum("mean"), log_target=log_target)
    return _torch_kl_div(input, target, size_average, reduce, reduction, log_target)
