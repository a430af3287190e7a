"""What a sample is, and how its tensors are laid out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
PROBABILITIES = "probabilities"

# Seen to reach 10 ulps of the largest element over all samples of sums as long as a row (an entropy is a difference).
FLOAT64_ULPS = 16.0


@dataclass(frozen=True)
class SampleInput:
    """One call of an op.

    name:           what is special about it, for a test's id and a table's row.
    arguments:      every argument by its name.
    differentiable: the names of those that get a gradient.
    float64_ulps:   the floor of float64's tolerance, whose oracle is no more exact than what it judges.
    """

    name: str
    arguments: dict[str, Any]
    differentiable: tuple[str, ...]
    float64_ulps: float = FLOAT64_ULPS


def laid_out(logits: Tensor, layout: str) -> Tensor:
    """The same values with other strides, as a view of a larger or a differently ordered tensor."""
    if layout == "contiguous":
        return logits
    if layout in ("transposed", "classes_last"):
        return (
            logits.transpose(1, -1 if layout == "classes_last" else 0)
            .contiguous()
            .transpose(1, -1 if layout == "classes_last" else 0)
        )
    n_rows, n_classes = logits.shape
    view = {
        "sliced_columns": logits.new_empty(n_rows, n_classes + 5)[:, 2:-3],
        "every_other_column": logits.new_empty(n_rows, 2 * n_classes)[:, ::2],
        "every_other_row": logits.new_empty(2 * n_rows, n_classes)[::2],
    }[layout]
    return view.copy_(logits)
