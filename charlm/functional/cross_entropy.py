"""Softmax cross-entropy of logits and class indices or class probabilities."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, TypeAlias, overload

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.nn import _reduction
from torch.overrides import handle_torch_function, has_torch_function_variadic

from charlm import _checks, reference

from .kernels import _C, by_sharding_rule, have_kernels
from .outputs import CrossEntropyOutput

AllIgnored: TypeAlias = Literal["nan", "zero"]
Inplace: TypeAlias = Literal["backward", "forward"]


# `| Any` in the overloads with `return_*`: a flag that is only known to be a bool may be False.
@overload
def cross_entropy(
    input: Tensor,
    target: Tensor,
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
    token_weight: Tensor | None = None,
    all_ignored: AllIgnored = "nan",
    loss_dtype: torch.dtype | None = None,
    inplace: Inplace | None = None,
    return_lse: Literal[False] = False,
    return_entropy: Literal[False] = False,
    return_predicted_tokens: Literal[False] = False,
    return_token_accuracy: Literal[False] = False,
) -> Tensor: ...
@overload
def cross_entropy(
    input: Tensor,
    target: Tensor,
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
    token_weight: Tensor | None = None,
    all_ignored: AllIgnored = "nan",
    loss_dtype: torch.dtype | None = None,
    inplace: Inplace | None = None,
    return_lse: bool = False,
    return_entropy: bool = False,
    return_predicted_tokens: bool = False,
    return_token_accuracy: bool = False,
) -> CrossEntropyOutput | Any: ...
def cross_entropy(
    input: Tensor,
    target: Tensor,
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
    token_weight: Tensor | None = None,
    all_ignored: AllIgnored = "nan",
    loss_dtype: torch.dtype | None = None,
    inplace: Inplace | None = None,
    return_lse: bool = False,
    return_entropy: bool = False,
    return_predicted_tokens: bool = False,
    return_token_accuracy: bool = False,
) -> Tensor | CrossEntropyOutput:
    """Softmax cross-entropy in nats, between logits and class indices or class probabilities: `F.cross_entropy`.

    Args:
        input: logits, (C), (N, C) or (N, C, d1, ...); float32, float64, bfloat16 or float16; any strides.
        target: class indices, () or (1), (N) or (N, d1, ...), any integer dtype, each in [0, C) or `ignore_index`. Or
            class probabilities, the shape of `input`, a floating dtype.
        weight: (C), a weight for each class. For class indices it has the dtype of `input`, or float32 for half logits.
        size_average, reduce: deprecated by torch; they override `reduction`.
        ignore_index: targets of this class index have the loss 0 and no gradient. Indices are widened to int64 before
            the comparison: the uint8 index 156 is not -100.
        reduction: "mean", "sum" or "none".
        label_smoothing: e in the formula, in [0, 1].
        lse_square_scale: the factor of the z-loss.
        softcap: the bound of the logits, > 0; inf is no bound.
        logit_scale: the factor of the logits, an inverse temperature. For a learnable temperature write
            `cross_entropy(input * scale, target)`: an option has no gradient.
        token_weight: a weight for each target; the shape of `target`, or of `input` without the class dimension.
        all_ignored: the mean over no target at all, "nan" as in torch, or "zero".
        loss_dtype: the dtype of the loss, by default that of `input`. torch.float32 gives half logits a loss that is
            not rounded to their dtype, in which a sum over many targets has few digits.
        inplace: permission to overwrite the logits with their gradient, which saves a tensor of their size. None: the
            logits are not changed. "backward": backward overwrites them. "forward": the call itself overwrites them,
            for "mean" and "sum"; float16 logits wait for backward, since the scale of the loss must be known first.
            The logits of a DTensor are not overwritten.
        return_lse, return_entropy, return_predicted_tokens, return_token_accuracy: also return this metric, in a
            `CrossEntropyOutput`.

    Returns:
        The loss, () or one value per target with "none"; a `CrossEntropyOutput` if any `return_*` option is set. The
        loss has `loss_dtype`, or the dtype of `input`, promoted with `target` and `weight` for probabilities; float32
        under autocast. It is differentiable with respect to `input` and to probability targets, and with probability
        targets to `weight`.

    Raises:
        IndexError: a class index outside [0, C) that is not `ignore_index`; the text names it, its position and C. On
            CUDA see `charlm.synchronize`.
        ValueError: batch sizes that differ; an unknown `reduction`, `all_ignored` or `inplace`; `softcap` <= 0;
            `inplace="forward"` with reduction "none", or with `return_lse` or `return_entropy` of logits that require
            grad; a `loss_dtype` that is neither the dtype of `input` nor float32 for half logits; a `logit_scale` or
            `lse_square_scale` that the dtype of the arithmetic cannot hold.
        TypeError: an argument of the wrong type; a tensor given for an option that is not 0-d, that requires grad or
            that torch.func transforms.
        RuntimeError: other shapes or dtypes that do not fit; a `token_weight`, or a `weight` with class indices, that
            requires grad; in-place use that would give a wrong gradient (see the note on `inplace`).
        NotImplementedError: logits that are not of a floating dtype.

    Formula:
        With logits x of C classes, n over targets and c over classes::

            z      = softcap * tanh(logit_scale * x / softcap)       or, without softcap, logit_scale * x
            lse_n  = log sum_c exp z_nc
            logp   = z - lse

        For class indices y_n, with token weight t_n, class weight w_c (each 1 if not given) and e = label_smoothing::

            loss_n = t_n * [ (1 - e) * w_y * -logp_ny + e/C * sum_c w_c * -logp_nc + lse_square_scale * w_y * lse_n**2 ]
            loss_n = 0                                                            where y_n == ignore_index
            mean   = sum_n loss_n / sum_{n not ignored} t_n * w_y

        For class probabilities p_nc, with p' = (1 - e) * p + e/C::

            loss_n = t_n * [ sum_c w_c * p'_nc * -logp_nc + lse_square_scale * lse_n**2 ]
            mean   = sum_n loss_n / sum_n t_n

        The returned entropy is lse_n - sum_c softmax(z)_nc * z_nc. The token accuracy is the share of the targets not
        ignored whose arg max is right; the target of probabilities is their own arg max.

        Sources: label smoothing, Szegedy et al. 2016; the z-loss, Chowdhery et al. 2022 (PaLM, sec. 5); softcap, Gemma
        Team 2024 (Gemma 2, sec. 2).

    Example:
        >>> cross_entropy(torch.zeros(2, 4), torch.tensor([1, 3]))
        tensor(1.3863)

    Note:
        The returned lse and entropy are differentiable with respect to `input`: `loss + z * output.lse.square().mean()`
        trains the z-loss. Backward then computes one gradient for the loss, lse and entropy together. With them forward
        computes no gradient, and `inplace="backward"` does not overwrite the logits.

        With "mean" or "sum" and logits that require grad, one pass over the logits computes the loss and its gradient
        for a unit grad_output. Backward rescales it if grad_output is another power of two, which does not round; for
        any other value it recomputes the gradient from the logits and two numbers per target. "none" and float16 always
        compute the gradient in backward, so that a GradScaler's factor is applied before the rounding to float16. To
        skip the gradient of a loss that is only read, call under `torch.no_grad()`.

        Logits that are changed in place between the loss and its backward raise a RuntimeError. Changes through `.data`
        are not seen by autograd and give a wrong gradient.

        Where a probability of 0 meets a logit of -inf the loss is NaN, as torch's is (0 * inf). `kl_divergence(target,
        input, p_kind="probs")` counts such a class as 0; it differs from the loss by the entropy of `target`, a
        constant.

        `inplace` is refused with a RuntimeError, before anything is written, for a leaf that requires grad; for logits
        that may overlap themselves in memory (`expand`, `unfold`, `as_strided`); for a `target`, `weight` or
        `token_weight` that may share their memory; and for logits that retain their gradient. After the call the
        history of the logits ends at the loss: hooks registered on them later, `retain_grad`, and `torch.autograd.grad`
        with respect to them have no effect. A RuntimeError is raised by a second differentiable use of the logits, or
        of a tensor that they are a view of; by a second backward or a double backward; and by an operation before the
        logits whose backward needs their old value (exp, tanh). Without grad nothing is written. Under autocast the
        float32 copy of half logits is overwritten. torch.compile breaks the graph at an in-place call; with
        fullgraph=True, and in torch.export, it raises.
    """
    if has_torch_function_variadic(input, target, weight, token_weight):
        return handle_torch_function(
            cross_entropy,
            (input, target, weight, token_weight),
            input,
            target,
            weight=weight,
            size_average=size_average,
            ignore_index=ignore_index,
            reduce=reduce,
            reduction=reduction,
            label_smoothing=label_smoothing,
            lse_square_scale=lse_square_scale,
            softcap=softcap,
            logit_scale=logit_scale,
            token_weight=token_weight,
            all_ignored=all_ignored,
            loss_dtype=loss_dtype,
            inplace=inplace,
            return_lse=return_lse,
            return_entropy=return_entropy,
            return_predicted_tokens=return_predicted_tokens,
            return_token_accuracy=return_token_accuracy,
        )
    if size_average is not None or reduce is not None:
        reduction = _reduction.legacy_get_string(size_average, reduce)
    returns = return_lse or return_entropy or return_predicted_tokens or return_token_accuracy
    if _C is not None and not returns and not (inplace is None and is_compiling()):
        # torch.compile cannot trace this call, so it breaks the graph before the logits are overwritten.
        loss = _C.cross_entropy(
            input,
            target,
            weight,
            token_weight,
            reduction,
            ignore_index,
            label_smoothing,
            lse_square_scale,
            softcap,
            logit_scale,
            all_ignored,
            loss_dtype,
            inplace,
        )
        if loss is not NotImplemented:
            return loss
    tensors = (input, target, weight, token_weight)
    has_kernels = have_kernels("cross_entropy", ("input", "target", "weight?", "token_weight?"), tensors)
    options = CrossEntropyOptions.checked(
        "cross_entropy",
        reduction,
        ignore_index,
        label_smoothing,
        lse_square_scale,
        softcap,
        logit_scale,
        all_ignored,
        loss_dtype,
    )
    _checks.choice("inplace", inplace, (None, "backward", "forward"))
    if inplace == "forward" and options.reduction == 0:
        raise ValueError('inplace="forward" needs reduction "mean" or "sum": with "none" the gradient is not yet known')
    has_gradients = torch.is_grad_enabled() and (return_lse or return_entropy)
    if inplace == "forward" and has_gradients and input.requires_grad:
        raise ValueError(
            'inplace="forward" overwrites the logits, which the gradients of lse and entropy need. Use inplace=None, '
            "or return lse and entropy under torch.no_grad()"
        )
    if not has_kernels:
        keywords = options.keywords() | {
            "inplace": inplace,
            "return_lse": return_lse,
            "return_entropy": return_entropy,
            "return_predicted_tokens": return_predicted_tokens,
            "return_token_accuracy": return_token_accuracy,
        }
        result = by_sharding_rule("cross_entropy", tensors, **keywords)
        if result is not NotImplemented:
            return result
        result = reference.cross_entropy(input, target, weight, token_weight=token_weight, **keywords)
        return CrossEntropyOutput(*result) if returns else result
    arguments = options.schema_arguments()
    if not returns:
        return torch.ops.charlm.cross_entropy.default(*tensors, *arguments)[0]
    if return_lse or return_entropy:
        loss, _, *metrics = torch.ops.charlm.cross_entropy_with_metrics.default(*tensors, *arguments)
    else:
        # Computed before the loss, which may overwrite the logits.
        metrics = torch.ops.charlm.cross_entropy_metrics.default(input.detach(), target.detach(), *arguments)
        # Without lse and entropy the loss is computed as without return_*, in place where that is requested.
        loss = cross_entropy(input, target, weight, token_weight=token_weight, inplace=inplace, **options.keywords())
    lse, entropy, predicted_tokens, token_accuracy = metrics
    return CrossEntropyOutput(
        loss,
        lse if return_lse else None,
        entropy if return_entropy else None,
        predicted_tokens if return_predicted_tokens else None,
        token_accuracy if return_token_accuracy else None,
    )


class CrossEntropyOptions(NamedTuple):
    """The scalar options of a call, checked: a tensor that was given for one is a number here."""

    reduction: int
    ignore_index: int
    label_smoothing: float
    lse_square_scale: float
    softcap: float  # 0.0 is no cap
    logit_scale: float
    all_ignored: str
    loss_dtype: torch.dtype | None

    @classmethod
    def checked(
        cls,
        function: str,
        reduction: str,
        ignore_index: int,
        label_smoothing: float,
        lse_square_scale: float,
        softcap: float | None,
        logit_scale: float,
        all_ignored: str,
        loss_dtype: torch.dtype | None,
    ) -> CrossEntropyOptions:
        _checks.choice("all_ignored", all_ignored, ("nan", "zero"))
        return cls(
            _checks.reduction_number(reduction),
            _checks.integer(function, "ignore_index", ignore_index),
            _checks.number(function, "label_smoothing", label_smoothing),
            _checks.number(function, "lse_square_scale", lse_square_scale),
            _checks.softcap_number(function, softcap),
            _checks.number(function, "logit_scale", logit_scale),
            all_ignored,
            _checks.dtype("loss_dtype", loss_dtype),
        )

    def schema_arguments(self) -> tuple[int, int, float, float, float, float, bool, torch.dtype | None]:
        """The last arguments of every cross_entropy schema."""
        return (*self[:-2], self.all_ignored == "zero", self.loss_dtype)

    def keywords(self) -> dict[str, Any]:
        """The keywords of `cross_entropy`."""
        reduction = ("none", "mean", "sum")[self.reduction]
        return self._asdict() | {"reduction": reduction, "softcap": self.softcap or None}
