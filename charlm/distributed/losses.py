"""The sharding rules of the two losses, whose mean is over the targets of all processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from charlm import functional
from charlm.functional.outputs import CrossEntropyOutput

from .layout import CLASSES, Labels, Layout, find_layout
from .vocab_parallel import vocab_parallel_cross_entropy, vocab_parallel_linear_cross_entropy

Loss: TypeAlias = Tensor | CrossEntropyOutput


def cross_entropy(
    input: Tensor, target: Tensor, weight: Tensor | None, token_weight: Tensor | None, **options: Any
) -> Loss:
    """Logits sharded by any dimensions. `inplace` has no effect."""
    if input.dim() < 1:
        return NotImplemented
    shape = input.shape[:1] + input.shape[2:] if input.dim() > 1 else torch.Size()
    rows = tuple(range(len(shape)))
    logits = (*rows[:1], CLASSES, *rows[1:])
    call = _Call(rows, shape, input.shape, logits, input.shape[1 if rows else 0], is_index=target.shape != input.shape)
    layout = call.layout((input, logits), target, weight, token_weight)
    if layout is None:
        return NotImplemented
    x = layout.local(input, logits)
    group, layout = layout.without_classes()
    y, w, t = call.local(layout, target, weight, token_weight)
    options["inplace"] = None  # it is a permission, and the history of a DTensor could not end at the loss

    def loss(**changed: Any) -> Loss:
        keywords = {**options, **changed, "weight": w, "token_weight": t}
        if group is None:
            return functional.cross_entropy(x, y, **keywords)
        return vocab_parallel_cross_entropy(x, y, call.n_classes, group, **keywords)

    # Backward recomputes the gradient of a sum, unless grad_output is a power of two. That of "none" is not computed
    # before.
    dtype = call.dtype(input, target, weight)
    return call.reduced(layout, loss, "none", dtype, options, lambda: call.divisor(y, w, t, options["ignore_index"]))


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    token_weight: Tensor | None,
    **options: Any,
) -> Loss:
    """Input sharded by its rows, or with `shift` by its sequences; the linear layer by its classes."""
    if input.dim() < 1 or linear_weight.dim() < 2 or options["reduction"] not in ("none", "sum", "mean"):
        return NotImplemented
    shift, leading = options["shift"], input.shape[:-1]
    if shift and not (len(leading) > 0 and 0 < shift < leading[-1]):
        return NotImplemented
    if linear_bias is not None and linear_bias.shape != linear_weight.shape[:-1]:
        return NotImplemented
    n_classes, inner = linear_weight.shape[0], linear_weight.shape[1:-1]
    n_rows = len(leading) - 1 if shift else len(leading)
    classes = None if shift or inner else CLASSES
    logits_shape = torch.Size((*leading, n_classes, *inner))
    is_index = shift > 0 or target.shape != logits_shape
    rows = _first(n_rows, len(leading + inner))
    of_logits: Labels = (*_first(n_rows, len(leading)), classes, *[None for _ in inner])
    of_input, of_weight = _first(n_rows, input.dim()), (classes, *[None for _ in linear_weight.shape[1:]])
    call = _Call(rows, leading + inner, logits_shape, of_logits, n_classes, is_index)
    layers = ((linear_weight, of_weight), (linear_bias, of_weight[:-1]))
    layout = call.layout((input, of_input), target, weight, token_weight, *layers)
    if layout is None:
        return NotImplemented
    linear, bias = (None if x is None else layout.local(x, labels) for x, labels in layers)
    group, layout = layout.without_classes()
    x = layout.local(input, of_input)
    y, w, t = call.local(layout, target, weight, token_weight)
    ignore_index = -100 if options["ignore_index"] is None else options["ignore_index"]

    def loss(**changed: Any) -> Loss:
        keywords = {**options, **changed, "linear_bias": bias, "weight": w, "token_weight": t}
        if group is None:
            return functional.linear_cross_entropy(x, linear, y, **keywords)
        del keywords["options"], keywords["shift"]
        keywords["ignore_index"] = ignore_index
        return vocab_parallel_linear_cross_entropy(x, linear, y, n_classes, group, **keywords)

    def divisor() -> tuple[Tensor, Tensor]:
        return call.divisor(y[..., shift:], w, None if t is None else t[..., shift:], ignore_index)

    if shift:
        call = call._replace(shape=torch.Size((*leading[:-1], leading[-1] - shift)))
    # Backward multiplies the gradients of a sum by grad_output, and computes the logits of "none" once more.
    return call.reduced(layout, loss, "sum", call.dtype(input, target, weight), options, divisor)


def _first(n: int, dim: int) -> Labels:
    """The labels of a tensor of `dim` dimensions of which the first n may be sharded."""
    return (*range(n), *[None] * (dim - n))


class _Call(NamedTuple):
    """A call of a loss.

    Attributes:
        rows, shape: labels and shape of what has one value for each target.
        logits_shape, logits: shape and labels of the logits.
        n_classes: C.
        is_index: whether the targets are class indices, not probabilities.
    """

    rows: Labels
    shape: torch.Size
    logits_shape: torch.Size
    logits: Labels
    n_classes: int
    is_index: bool

    def layout(
        self,
        first: tuple[Tensor, Labels],
        target: Tensor,
        weight: Tensor | None,
        token_weight: Tensor | None,
        *others: tuple[Tensor | None, Labels],
    ) -> Layout | None:
        """The layout of the tensors; None also for shapes that do not fit, which torch's path reports."""
        shapes = [self.shape] if len(self.shape) > 0 else [self.shape, torch.Size((1,))]
        fit = target.shape in shapes if self.is_index else target.shape == self.logits_shape
        fit = fit and (token_weight is None or token_weight.shape in shapes)
        fit = fit and (weight is None or weight.shape == (self.n_classes,)) and self.n_classes > 0
        if not fit:
            return None
        tensors = [first, *others, (weight, (None,))]
        tensors += [(x, self._labels(x)) for x in (target, token_weight) if x is not None]
        layout = find_layout(tensors, [label for label in (*self.rows, CLASSES) if label is not None])
        if layout is None or CLASSES not in layout.labels:
            return layout
        return layout if self.is_index and len(self.logits) > 1 and layout.has_one_group(CLASSES) else None

    def local(
        self, layout: Layout, target: Tensor, weight: Tensor | None, token_weight: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        return (
            layout.local(target, self._labels(target)),
            None if weight is None else layout.local(weight, (None,)),
            None if token_weight is None else layout.local(token_weight, self._labels(token_weight)),
        )

    def _labels(self, tensor: Tensor) -> Labels:
        """Of a target or a token weight; a single one may be of shape (1), where the losses have shape ()."""
        if not self.is_index and tensor.dim() == len(self.logits):
            return self.logits
        return self.rows if tensor.dim() == len(self.rows) else (None,)

    def dtype(self, input: Tensor, target: Tensor, weight: Tensor | None) -> torch.dtype:
        """Of the loss."""
        dtype = input.dtype
        if not self.is_index:
            dtype = torch.promote_types(dtype, target.dtype)
            dtype = dtype if weight is None else torch.promote_types(dtype, weight.dtype)
        autocast = torch.is_autocast_enabled(input.device.type)
        return torch.promote_types(dtype, torch.float32) if autocast else dtype

    def divisor(
        self, target: Tensor, weight: Tensor | None, token_weight: Tensor | None, ignore_index: int
    ) -> tuple[Tensor, Tensor]:
        """The number of the local targets that are not ignored, and the sum of their weights."""
        if not self.is_index:
            count = torch.tensor(target.numel() // self.n_classes, device=target.device)
            return count, count if token_weight is None else token_weight.double().sum()
        index = target.to(torch.int64)
        valid = index != ignore_index
        count = valid.sum()
        if weight is None and token_weight is None:
            return count, count
        # An index outside [0, C) is reported by the loss.
        share = torch.ones((), dtype=torch.float64, device=target.device)
        if weight is not None:
            share = weight.double()[index.clamp(0, self.n_classes - 1)]
        if token_weight is not None:
            share = share * token_weight.double().reshape(target.shape)
        return count, torch.where(valid, share, 0).sum()

    def reduced(
        self,
        layout: Layout,
        loss: Callable[..., Loss],
        local_reduction: str,
        dtype: torch.dtype,
        options: dict[str, Any],
        divisor: Callable[[], tuple[Tensor, Tensor]],
    ) -> Loss:
        """The loss of all processes and the metrics.

        Args:
            layout: of the call.
            loss: computes the local loss, with options that are changed.
            local_reduction: the reduction by which the sum of the local losses is computed.
            dtype: of the loss.
            options: of the call.
            divisor: computes the local number of targets and the sum of their weights.
        """
        reduction, wants_accuracy = options["reduction"], options["return_token_accuracy"]
        if layout.is_replicated or reduction == "none" or (reduction == "sum" and not wants_accuracy):
            return self._wrapped(layout, loss(), reduction)
        wide = torch.promote_types(dtype, torch.float32)
        loss_dtype = options["loss_dtype"] or dtype
        if loss_dtype not in (dtype, wide):
            wide = loss_dtype  # which is refused
        try:
            output = loss(reduction=local_reduction, loss_dtype=wide, all_ignored="zero")
        except IndexError:  # the other processes wait in the all-reduce: NaN targets tell them
            layout.all_reduce(torch.full((3 + wants_accuracy,), torch.nan, dtype=wide, device="cpu"))
            raise
        fields = CrossEntropyOutput(output) if isinstance(output, Tensor) else output
        with torch.no_grad():
            count, total_weight = (number.to(wide) for number in divisor())
        numbers = [fields.loss.sum(), total_weight, count]
        if fields.token_accuracy is not None:
            right = fields.token_accuracy.to(wide)
            numbers.append(right.sum() if local_reduction == "none" else right * count)
        total, total_weight, count, *right = layout.all_reduce(torch.stack(numbers)).unbind()
        if count.is_cpu and not torch.compiler.is_compiling() and count.isnan():
            raise IndexError(f"a target of another process is out of range for {self.n_classes} classes")
        if options["all_ignored"] == "zero":  # 0 / 1 instead of 0 / 0, whose gradient is zero too
            total_weight = torch.where(count == 0, 1, total_weight)
            count = count.clamp(min=1)
        total = (total if reduction == "sum" else total / total_weight).to(loss_dtype)
        if isinstance(output, Tensor):
            return layout.replicated(total)
        accuracy = (right[0] / count).detach().float() if right else None
        return self._wrapped(layout, output._replace(loss=total, token_accuracy=accuracy), reduction, is_total=True)

    def _wrapped(self, layout: Layout, output: Loss, reduction: str, is_total: bool = False) -> Loss:
        """DTensors of the local results. `is_total`: the loss and the accuracy are those of all processes."""

        def of_loss(value: Tensor) -> Tensor:
            if reduction == "none":
                return of_row(value)
            return layout.replicated(value) if is_total else layout.wrap(value, (), ())

        def of_row(value: Tensor) -> Tensor:
            return layout.wrap(value, self.rows, self.shape)

        if isinstance(output, Tensor):
            return of_loss(output)
        wraps = (of_loss, of_row, of_row, of_row, of_loss)
        return CrossEntropyOutput(
            *(None if value is None else wrap(value) for wrap, value in zip(wraps, output, strict=True))
        )
