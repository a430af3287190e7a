"""What the tests of linear_cross_entropy share."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

EMULATED = "CHARLM_CUDA_EMULATED" in os.environ
leaves_rows_out = pytest.mark.skipif(EMULATED, reason="to leave ignored rows out a GPU would have to be waited for")
needs_torchs = pytest.mark.skipif(
    not hasattr(F, "linear_cross_entropy"), reason="this torch has no linear_cross_entropy"
)


def op_with(block_rows: int = 0, gemm: int = 0) -> Callable[..., Tensor]:
    """The op with blocks and products that `functional` leaves to it."""

    def op(
        input: Tensor,
        linear_weight: Tensor,
        target: Tensor,
        *,
        linear_bias: Tensor | None = None,
        weight: Tensor | None = None,
        token_weight: Tensor | None = None,
        reduction: str = "mean",
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        lse_square_scale: float = 0.0,
        softcap: float = 0.0,
        logit_scale: float = 1.0,
        all_ignored: str = "nan",
    ) -> Tensor:
        tensors = (input, linear_weight, target, linear_bias, weight, token_weight)
        scalars = (ignore_index, label_smoothing, lse_square_scale, softcap, logit_scale, all_ignored == "zero")
        number = ("none", "mean", "sum").index(reduction)
        return torch.ops.charlm.linear_cross_entropy.default(*tensors, False, block_rows, gemm, number, *scalars)

    return op


def arguments(
    n_rows: int = 33, n_features: int = 19, n_classes: int = 27, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """Input, weight and target."""
    x, weight = torch.randn(n_rows, n_features), torch.randn(n_classes, n_features) / 3
    return (
        x.to(dtype).requires_grad_(),
        weight.to(dtype).requires_grad_(),
        torch.randint(n_classes, (n_rows,)),
    )


def ops_of(call: Callable[[], Any]) -> list[str]:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    return [event.name for event in profile.events()]
