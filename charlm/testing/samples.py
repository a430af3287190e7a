"""What a sample is, and how its tensors are laid out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
PROBABILITIES = "probabilities"


@dataclass(frozen=True)
class SampleInput:
    """One call of an op.

    name:           what is special about it, for a test's id and a table's row.
    arguments:      every argument by its name.
    differentiable: the names of those that get a gradient.
    """

    name: str
    arguments: dict[str, Any]
    differentiable: tuple[str, ...]


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
