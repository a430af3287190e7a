"""torch's own kl_div, element by element."""

from __future__ import annotations

from torch import Tensor
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
    return _torch_kl_div(input, target, size_average, reduce, reduction, log_target)
