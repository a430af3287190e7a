"""Drop-in modules: torch's own classes whose `forward` calls `charlm.functional`.

Each module but `EmbeddingLinear` subclasses torch's class of the same name, so `isinstance`, `state_dict`, weight tying
and adapters keep working. Options that torch's class lacks are class attributes first: a module whose class is
exchanged in place has them too.

Every other name is that of `torch.nn`, and so is every submodule but `functional`, so that `import charlm.nn as nn` can
take its place. (Type checkers find the submodules as `nn.utils`, not by `import charlm.nn.utils`.)
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
    """`torch.nn.Embedding` by `charlm.functional.embedding`: same arguments, parameters and results.

    Shape:
        input: any shape (*), any integer dtype.
        output: (*, embedding_dim), the dtype of `weight`.

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
    """The first layer over embedded tokens, by `charlm.functional.embedding_linear`.

    Args:
        num_embeddings: size of the vocabulary, V.
        embedding_dim: width of an embedding, D.
        context_size: tokens in a context, T.
        out_features: width of the output, H.
        bias: whether `linear` has a bias.
        padding_idx: as in `torch.nn.Embedding`: its row starts as zeros and has no gradient.
        activation: "none", "tanh", "relu" or "gelu".
        plan: "auto", "folded" or "gathered".
        device, dtype: of the parameters.

    Attributes:
        embedding: an `Embedding`, (V, D).
        linear: a `torch.nn.Linear`, (H, T * D).

    Shape:
        input: (..., T), any integer dtype.
        output: (..., H).

    Raises:
        ValueError: an unknown `activation` or `plan`.
        RuntimeError: in `forward`, a submodule to which `fully_shard` or `replicate` was applied by itself.

    Example:
        >>> EmbeddingLinear(27, 10, 3, 200, activation="tanh")(torch.zeros(32, 3, dtype=torch.uint8)).shape
        torch.Size([32, 200])

    Note:
        The submodules are initialised as torch does and may be replaced by existing ones. `forward` reads their weights
        and does not call them: hooks on them do not run, and `fully_shard` must be applied to the whole module.
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
    """`torch.nn.CrossEntropyLoss` by `charlm.functional.cross_entropy`, with its keyword-only options.

    Args:
        weight, size_average, ignore_index, reduce, reduction, label_smoothing: as in torch's class.
        lse_square_scale, softcap, logit_scale, all_ignored, loss_dtype, inplace, return_lse,
            return_entropy, return_predicted_tokens, return_token_accuracy: as in `charlm.functional.cross_entropy`.

    Shape:
        input: logits, (C), (N, C) or (N, C, d1, ...).
        target: class indices, (), (N) or (N, d1, ...); or class probabilities, the shape of `input`.
        token_weight: optional, the shape of `input` without C.
        output: a loss in nats, (), or one value per target with reduction "none"; a `CrossEntropyOutput` if any
            `return_*` option is set.

    Example:
        >>> CrossEntropyLoss(lse_square_scale=1e-4)(torch.zeros(2, 4), torch.tensor([1, 3]))
        tensor(1.3865)
    """

    lse_square_scale: float = 0.0
    softcap: float | None = None
    logit_scale: float = 1.0
    all_ignored: AllIgnored = "nan"
    loss_dtype: torch.dtype | None = None
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
        loss_dtype: torch.dtype | None = None,
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
        self.loss_dtype = loss_dtype
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
            loss_dtype=self.loss_dtype,
            inplace=self.inplace,
            return_lse=self.return_lse,
            return_entropy=self.return_entropy,
            return_predicted_tokens=self.return_predicted_tokens,
            return_token_accuracy=self.return_token_accuracy,
        )


class KLDivLoss(torch.nn.KLDivLoss):
    """`torch.nn.KLDivLoss` by `charlm.functional.kl_div`: same arguments, same results.

    Shape:
        input: log-probabilities, any shape (*).
        target: probabilities, or with `log_target` their logarithms; broadcast with `input`.
        output: a loss in nats, (), or the broadcast shape with reduction "none".

    Example:
        >>> KLDivLoss(reduction="batchmean")(torch.zeros(1, 2), torch.tensor([[0.0, 1.0]]))
        tensor(0.)
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return functional.kl_div(input, target, reduction=self.reduction, log_target=self.log_target)


# torch has had this class since 2.13.
_LinearCrossEntropyLoss = getattr(torch.nn, "LinearCrossEntropyLoss", torch.nn.Module)


class LinearCrossEntropyLoss(_LinearCrossEntropyLoss):
    """`torch.nn.LinearCrossEntropyLoss` by `charlm.functional.linear_cross_entropy`, with its keyword-only options.

    Args:
        in_features: width of the input, D.
        num_classes: C.
        out_features: the sizes d1, ... of K-dimensional outputs.
        bias: whether `linear` has a bias.
        device, dtype: of the parameters.
        weight: (C), a weight for each class.
        reduction, ignore_index, label_smoothing, options, lse_square_scale, softcap, logit_scale, all_ignored,
            loss_dtype, shift, memory_budget, return_lse, return_entropy, return_predicted_tokens,
            return_token_accuracy: as in `charlm.functional.linear_cross_entropy`.

    Attributes:
        linear: a `torch.nn.Linear` of C * d1 * ... outputs, which holds the parameters.

    Shape:
        input: (D) or (N, D); (..., T, D) with `shift`.
        target: class indices, (), (N) or (N, d1, ...); or class probabilities, (C) or (N, C, d1, ...).
        token_weight: optional, a weight for each target.
        output: as of `CrossEntropyLoss`.

    Raises:
        RuntimeError: a `weight` that is not (C); `label_smoothing` outside [0, 1]; in `forward`, a `linear` to which
            `fully_shard` or `replicate` was applied by itself.

    Example:
        >>> LinearCrossEntropyLoss(3, 4, bias=True)(torch.randn(2, 3), torch.tensor([1, 3])).shape
        torch.Size([])

    Note:
        As in torch's class, `forward` reads the weights of `linear` and does not call it: hooks on it do not run, and
        `fully_shard` must be applied to the whole module. Before torch 2.13, which introduced that class, it subclasses
        `torch.nn.Module`.
    """

    lse_square_scale: float = 0.0
    softcap: float | None = None
    logit_scale: float = 1.0
    all_ignored: AllIgnored = "nan"
    loss_dtype: torch.dtype | None = None
    shift: bool | int = False
    memory_budget: int | None = None
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
        loss_dtype: torch.dtype | None = None,
        shift: bool | int = False,
        memory_budget: int | None = None,
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
        self.loss_dtype = loss_dtype
        self.shift = shift
        self.memory_budget = memory_budget
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
    """RuntimeError if `fully_shard` or `replicate` was applied to a submodule whose weights `module` reads.

    Both act in hooks that run when a module is called, and `module` does not call its submodules.
    """
    for name, submodule in submodules.items():
        class_ = type(submodule)
        if class_ is Embedding or class_ is torch.nn.Linear:  # the common case, decided fast
            continue
        if any(base.__module__.startswith("torch.distributed.") for base in class_.__mro__):
            owner = type(module).__name__
            raise RuntimeError(
                f"{owner} reads the weights of its `{name}` without calling it, and {class_.__name__} gathers weights "
                f"and reduces gradients only when it is called: apply fully_shard or replicate to the {owner} as a "
                f"whole, and not to its `{name}`"
            )


if TYPE_CHECKING:
    try:  # the order of imports is that of charlm/functional/__init__.py
        pass
    except ImportError:
        from torch.nn import *  # noqa: F403
else:
    __getattr__, __dir__, __all__ = beside_torch(__name__, _OURS, torch.nn)
    sys.meta_path.insert(0, TorchSubmodules(__name__, "torch.nn", own=["functional"]))
