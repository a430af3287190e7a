"""Drop-in modules: torch's own classes with our kernels in `forward`.

Each one subclasses torch's, so `isinstance`, `state_dict`, weight tying and adapters keep working; the options that
torch's class lacks are class attributes first, so that a module whose class is exchanged in place has them too.

Every other name is that of `torch.nn`, and so is every submodule but `functional`, so that `import charlm.nn as nn` can
take its place. (A type checker does not see the submodules by `import charlm.nn.utils`; `nn.utils` it does.)
"""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.nn import LinearCrossEntropyOptions

from charlm import _checks
from charlm._torch_names import TorchSubmodules, beside_torch
from charlm.functional.cross_entropy import AllIgnored, Inplace
from charlm.functional.embedding_linear import Activation, Plan
from charlm.functional.outputs import CrossEntropyOutput

from . import functional as functional

_OURS = ["CrossEntropyLoss", "Embedding", "EmbeddingLinear", "KLDivLoss", "LinearCrossEntropyLoss", "functional"]


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


class EmbeddingLinear(torch.nn.Module):
    """`torch.nn.Embedding`, the concatenation of a context's rows, `torch.nn.Linear` and an activation, in one step:
    `charlm.functional.embedding_linear`.

    The parameters are those of two submodules, `embedding` and `linear`, initialised as torch does; modules that exist
    already can take their places. Their weights are read and they are not called: hooks on them do not run, and
    `fully_shard` belongs on the whole.

    Args:
        num_embeddings: size of the vocabulary, V.
        embedding_dim: width of an embedding, D.
        context_size: tokens in a context, T.
        out_features: width of the output, H.
        bias: whether `linear` has one.
        padding_idx: as `torch.nn.Embedding`: its row starts as zeros and gets no gradient.
        activation: "none", "tanh", "relu" or "gelu".
        plan: "auto", "folded" or "gathered".
        device, dtype: of the parameters.

    Shape:
        input: (..., context_size), any integer dtype
        output: (..., out_features)

    Example:
        >>> EmbeddingLinear(27, 10, 3, 200, activation="tanh")(torch.zeros(32, 3, dtype=torch.uint8)).shape
        torch.Size([32, 200])
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        context_size: int,
        out_features: int,
        bias: bool = True,
        padding_idx: int | None = None,
        *,
        activation: Activation = "none",
        plan: Plan = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _checks.activation_and_plan(activation, plan)
        self.activation = activation
        self.plan = plan
        self.embedding = Embedding(num_embeddings, embedding_dim, padding_idx, device=device, dtype=dtype)
        self.linear = torch.nn.Linear(context_size * embedding_dim, out_features, bias, device=device, dtype=dtype)

    def forward(self, input: Tensor) -> Tensor:
        embedding, linear = self.embedding, self.linear
        _refuse_wrapped(self, embedding=embedding, linear=linear)
        return functional.embedding_linear(
            input,
            embedding.weight,
            linear.weight,
            linear.bias,
            padding_idx=embedding.padding_idx,
            activation=self.activation,
            plan=self.plan,
        )

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}, plan={self.plan!r}"


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
    all_ignored: AllIgnored = "nan"
    inplace: Inplace | None = None
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
        *,
        lse_square_scale: float = 0.0,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        all_ignored: AllIgnored = "nan",
        inplace: Inplace | None = None,
        return_lse: bool = False,
        return_entropy: bool = False,
        return_predicted_tokens: bool = False,
        return_token_accuracy: bool = False,
    ) -> None:
        super().__init__(weight, size_average, ignore_index, reduce, reduction, label_smoothing)
        self.lse_square_scale = lse_square_scale
        self.softcap = softcap
        self.logit_scale = logit_scale
        self.all_ignored = all_ignored
        self.inplace = inplace
        self.return_lse = return_lse
        self.return_entropy = return_entropy
        self.return_predicted_tokens = return_predicted_tokens
        self.return_token_accuracy = return_token_accuracy

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


class KLDivLoss(torch.nn.KLDivLoss):
    """`torch.nn.KLDivLoss` through `charlm.functional.kl_div`: same arguments, same results.

    Shape:
        input: any shape (*), log-probabilities
        target: broadcast with `input`; probabilities, or with `log_target` their logarithms
        output: a loss in nats, () or, with reduction "none", the broadcast shape

    Example:
        >>> KLDivLoss(reduction="batchmean")(torch.zeros(1, 2), torch.tensor([[0.0, 1.0]]))
        tensor(0.)
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return functional.kl_div(input, target, reduction=self.reduction, log_target=self.log_target)


# torch has had one since 2.13.
_LinearCrossEntropyLoss = getattr(torch.nn, "LinearCrossEntropyLoss", torch.nn.Module)


class LinearCrossEntropyLoss(_LinearCrossEntropyLoss):
    """`torch.nn.LinearCrossEntropyLoss` through `charlm.functional.linear_cross_entropy`, with its keyword-only extras.

    The parameters are those of `self.linear`, a `torch.nn.Linear` of num_classes * prod(out_features) outputs. As in
    torch's class its weights are read and it is not called: hooks on it do not run, and `fully_shard` belongs on the
    whole.

    Shape:
        input: (in_features) or (N, in_features)
        target: (), (N) or (N, *out_features) class indices, or (num_classes) or (N, num_classes, *out_features) class
            probabilities
        output: a loss in nats, () or, with reduction "none", one per target; a `CrossEntropyOutput` if any
            `return_*` is set

    Example:
        >>> LinearCrossEntropyLoss(3, 4, bias=True)(torch.randn(2, 3), torch.tensor([1, 3])).shape
        torch.Size([])
    """

    lse_square_scale: float = 0.0
    softcap: float | None = None
    logit_scale: float = 1.0
    all_ignored: AllIgnored = "nan"
    return_lse: bool = False
    return_entropy: bool = False
    return_predicted_tokens: bool = False
    return_token_accuracy: bool = False

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        out_features: tuple[int, ...] = (),
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        reduction: str = "mean",
        weight: Tensor | None = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        options: LinearCrossEntropyOptions | None = None,
        lse_square_scale: float = 0.0,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        all_ignored: AllIgnored = "nan",
        return_lse: bool = False,
        return_entropy: bool = False,
        return_predicted_tokens: bool = False,
        return_token_accuracy: bool = False,
    ) -> None:
        if weight is not None and weight.shape != (num_classes,):
            raise RuntimeError(f"expected weight shape to be {(num_classes,)}, got {tuple(weight.shape)}")
        if label_smoothing < 0 or label_smoothing > 1.0:
            raise RuntimeError(f"expected label_smoothing to be in range [0, 1], got {label_smoothing}")
        torch.nn.Module.__init__(self)
        self.reduction = reduction
        self.register_buffer("weight", weight)
        self.num_classes = num_classes
        self.out_features = out_features
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self.linear = torch.nn.Linear(in_features, math.prod(out_features, start=num_classes), bias, device, dtype)
        self.options = options
        self.lse_square_scale = lse_square_scale
        self.softcap = softcap
        self.logit_scale = logit_scale
        self.all_ignored = all_ignored
        self.return_lse = return_lse
        self.return_entropy = return_entropy
        self.return_predicted_tokens = return_predicted_tokens
        self.return_token_accuracy = return_token_accuracy

    def extra_repr(self) -> str:
        extras = (
            f"{name}={getattr(self, name)!r}"
            for name in LinearCrossEntropyLoss.__annotations__
            if getattr(self, name) != getattr(LinearCrossEntropyLoss, name)
        )
        return ", ".join(part for part in (super().extra_repr(), *extras) if part)

    def forward(self, input: Tensor, target: Tensor, token_weight: Tensor | None = None) -> Tensor | CrossEntropyOutput:
        linear = self.linear
        _refuse_wrapped(self, linear=linear)
        shape, bias = (self.num_classes, *self.out_features), linear.bias
        return functional.linear_cross_entropy(
            input,
            linear.weight.reshape(*shape, linear.in_features),
            target,
            linear_bias=None if bias is None else bias.reshape(shape),
            weight=self.weight,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            options=self.options,
            token_weight=token_weight,
            **{name: getattr(self, name) for name in LinearCrossEntropyLoss.__annotations__},
        )


def _refuse_wrapped(module: torch.nn.Module, **submodules: torch.nn.Module) -> None:
    """RuntimeError if fully_shard or replicate was applied to a submodule whose weights `module` reads.

    They work in hooks that run when a module is called, and `module` never calls that one.
    """
    for name, submodule in submodules.items():
        class_ = type(submodule)
        if class_ is Embedding or class_ is torch.nn.Linear:  # nearly always, and quick
            continue
        if any(base.__module__.startswith("torch.distributed.") for base in class_.__mro__):
            owner = type(module).__name__
            raise RuntimeError(
                f"{owner} reads the weights of its `{name}` without calling it, and {class_.__name__} gathers weights "
                f"and reduces gradients only when it is called: apply fully_shard or replicate to the {owner} as a "
                f"whole, and not to its `{name}`"
            )


if TYPE_CHECKING:
    try:  # As in charlm/functional/__init__.py.
        pass
    except ImportError:
        from torch.nn import *  # noqa: F403
else:
    __getattr__, __dir__, __all__ = beside_torch(__name__, _OURS, torch.nn)
    sys.meta_path.insert(0, TorchSubmodules(__name__, "torch.nn", own=["functional"]))
