"""`SampleInput`, and the memory layouts of its tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
PROBABILITIES = "probabilities"

# Measured: up to 10 ulps of the largest element over all samples whose sums are as long as a row.
FLOAT64_ULPS = 16.0


@dataclass(frozen=True)
class SampleInput:
    """The arguments of one call of an op.

    Attributes:
        name: what is special about the sample; the id of a test and the row of a table.
        arguments: every argument by its name.
        differentiable: the names of the arguments that get a gradient.
        float64_ulps: the tolerance for float64 results, in ulps.
    """

    name: str
    arguments: dict[str, Any]
    differentiable: tuple[str, ...]
    float64_ulps: float = FLOAT64_ULPS


def laid_out(logits: Tensor, layout: str) -> Tensor:
    """The same values with other strides, as a view of a larger or transposed tensor."""
    if layout == "contiguous":
        return logits
    if layout in ("transposed", "classes_last"):
        other = -1 if layout == "classes_last" else 0
        return logits.transpose(1, other).contiguous().transpose(1, other)
    n_rows, n_classes = logits.shape
    # What lies between the rows is a number that no row has. It is not NaN: with AMX, torch's product of bfloat16 rows
    # of an odd number of elements reads one element behind each row, times 0.
    between = 1000.0
    view = {
        "sliced_columns": logits.new_full((n_rows, n_classes + 5), between)[:, 2:-3],
        "every_other_column": logits.new_full((n_rows, 2 * n_classes), between)[:, ::2],
        "every_other_row": logits.new_full((2 * n_rows, n_classes), between)[::2],
    }[layout]
    return view.copy_(logits)
