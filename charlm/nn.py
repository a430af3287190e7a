"""Drop-in modules: torch's own classes with our kernels in `forward`.

Each one subclasses torch's, so `isinstance`, `state_dict`, weight tying and adapters keep working; the options that
torch's class lacks are class attributes first, so that a module whose class is exchanged in place has them too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import functional
from .reference import CrossEntropyOutput


class Embedding(torch.nn.Embedding):
    """`torch.nn.Embedding` through `charlm.functional.embedding`: same arguments, same parameters, same results.

    Shape:
        input: any shape (*), any integer dtype, uint8 included
        output: (*, embedding_dim), the dtype of `weight`

    Example:
        >>> Embedding(27, 10)(torch.tensor([[1, 2, 3]], dtype=torch.uint8)).shape
        torch.Size([1, 3, 10])
    """

    def forward(self, input: Tensor) -> Tensor:
        return functional.embedding(
            input,
            self.weight,
            self.padding_idx,
            self.max_norm,
            self.norm_type,
            self.scale_grad_by_freq,
            self.sparse,
        )


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """`torch.nn.CrossEntropyLoss` through `charlm.functional.cross_entropy`, with its keyword-only extras.

    Shape:
        input: (C), (N, C) or (N, C, d1, ...), logits
        target: (), (N) or (N, d1, ...) class indices, or the shape of `input` for class probabilities
        output: a loss in nats, () or, with reduction "none", one per target; a `CrossEntropyOutput` if any
            `return_*` is set

    Example:
        >>> CrossEntropyLoss(lse_square_scale=1e-4)(torch.zeros(2, 4), torch.tensor([1, 3]))
        tensor(1.3865)
    """

    lse_square_scale: float = 0.0
    softcap: float | None = None
    logit_scale: float = 1.0
    all_ignored: str = "nan"
    inplace: str | None = None
    return_lse: bool = False
    return_entropy: bool = False
    return_predicted_tokens: bool = False
    return_token_accuracy: bool = False

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        **extras: Any,
    ) -> None:
        super().__init__(weight, size_average, ignore_index, reduce, reduction, label_smoothing)
        for name, value in extras.items():
            if name not in CrossEntropyLoss.__annotations__:
                raise TypeError(f"CrossEntropyLoss.__init__() got an unexpected keyword argument {name!r}")
            setattr(self, name, value)

    def extra_repr(self) -> str:
        return ", ".join(
            f"{name}={getattr(self, name)!r}"
            for name in CrossEntropyLoss.__annotations__
            if getattr(self, name) != getattr(CrossEntropyLoss, name)
        )

    def forward(self, input: Tensor, target: Tensor, token_weight: Tensor | None = None) -> Tensor | CrossEntropyOutput:
        return functional.cross_entropy(
            input,
            target,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            lse_square_scale=self.lse_square_scale,
            softcap=self.softcap,
            logit_scale=self.logit_scale,
            token_weight=token_weight,
            all_ignored=self.all_ignored,
            inplace=self.inplace,
            return_lse=self.return_lse,
            return_entropy=self.return_entropy,
            return_predicted_tokens=self.return_predicted_tokens,
            return_token_accuracy=self.return_token_accuracy,
        )
