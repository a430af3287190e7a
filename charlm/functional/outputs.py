"""The types of results that have several fields."""

from __future__ import annotations

from types import GeneratorType
from typing import Any, NamedTuple, TypeVar

from torch import Tensor

T = TypeVar("T", bound=type)


def _public(cls: T) -> T:
    """Gives a NamedTuple its public module, and lets it be called with one generator of all its fields.

    A pickle stores the module. Tensor.__torch_function__ passes a generator to the type of a result to rebuild it with
    tensors of a subclass; a NamedTuple would take the generator for its first field.
    """
    cls.__module__ = "charlm.functional"
    new = cls.__new__

    def __new__(cls: Any, *fields: Any, **named: Any) -> Any:
        if len(fields) == 1 and isinstance(fields[0], GeneratorType):
            fields = tuple(fields[0])
        return new(cls, *fields, **named)

    cls.__new__ = __new__
    return cls


@_public
class CrossEntropyOutput(NamedTuple):
    """The result of `cross_entropy` and `linear_cross_entropy` when any `return_*` option is set.

    Attributes:
        loss: the loss in nats: (), or one value per target with reduction "none". Differentiable.
        lse: the log-sum-exp of the logits in nats, one value per target; float32, or float64 for
            logits (or probability targets) in float64.
        entropy: the entropy of the predicted distribution in nats, one value per target; the dtype of `lse`.
        predicted_tokens: the class with the largest logit, one per target; int64.
        token_accuracy: the share of correct predictions, (); with reduction "none" 1 or 0 per target. float32.

    Note:
        A field that was not requested is None. `loss`, `lse` and `entropy` are differentiable.
    """

    loss: Tensor
    lse: Tensor | None = None
    entropy: Tensor | None = None
    predicted_tokens: Tensor | None = None
    token_accuracy: Tensor | None = None


@_public
class EmbeddingLinearOutput(NamedTuple):
    """The result of `embedding_linear` with `return_plan=True`.

    Attributes:
        output: (..., H). Differentiable.
        plan: the plan of the forward pass, "folded" or "gathered".
        backward_plan: the plan of the backward pass, "folded" or "gathered".
    """

    output: Tensor
    plan: str
    backward_plan: str
