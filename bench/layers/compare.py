"""The rule of charlm/testing for a list of results and gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from charlm import testing


def assert_as_close_as_torch(
    results: Mapping[str, Tensor], evaluate: Callable[[torch.dtype], Mapping[str, Tensor]], dtype: torch.dtype
) -> None:
    """`evaluate` computes the same by torch in a dtype: in `dtype` for the baseline, in float64 for the truth."""
    baseline, exact = evaluate(dtype), evaluate(torch.float64)
    for name, result in results.items():
        testing.assert_close_to_reference(result, baseline[name], exact[name], name)
