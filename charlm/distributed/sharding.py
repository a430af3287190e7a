"""The rule of each op for DTensors: the kernels on the local shards, and the collectives that the result needs.

`charlm.functional` calls the function of an op's name for a call with a DTensor among its tensors. It returns the
result, or NotImplemented for placements that it does not know: the call then takes `charlm.reference`, whose ops are
torch's, with torch's rules. The first tensor must be a DTensor. A plain tensor beside it is replicated: it is the
whole, the same on every process.

The placements of results and gradients are torch's: a result of each row is sharded as its rows are; a sum is
`Partial`; the gradient of a replicated weight is `Partial` where the rows are sharded. One differs: a mean over sharded
rows is replicated, and is divided by the number of all targets that count. It takes one all-reduce, of a few numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from charlm import functional
from charlm._checks import KINDS, nonnegative_probabilities
from charlm.functional.broadcasting import result_dtype
from charlm.functional.kernels import have_kernels
from charlm.functional.kl_divergence import broadcast_distributions
from charlm.functional.outputs import EmbeddingLinearOutput

from .class_part import Part
from .class_sharded import Entropy, KlDivergence
from .layout import CLASSES, Labels, Layout, find_layout
from .losses import cross_entropy, linear_cross_entropy  # noqa: F401  the rules of these two ops
from .vocab_parallel_autograd import in_autocast


def entropy(logits: Tensor) -> Tensor:
    """Sharded by any dimensions."""
    rows = _rows(logits.dim() - 1)
    labels = (*rows, CLASSES)
    layout = find_layout([(logits, labels)], (*rows, CLASSES)) if logits.dim() > 0 else None
    if layout is None or not _can_divide_classes(layout):
        return NotImplemented
    local = layout.local(logits, labels)
    group, layout = layout.without_classes()
    if group is None:
        return layout.wrap(functional.entropy(local), rows, logits.shape[:-1])
    if not (local.is_floating_point() and have_kernels("entropy", ("logits",), (local,))):
        return NotImplemented
    x, dtype = _for_kernels(local), result_dtype(local)
    with torch.autocast(x.device.type, enabled=False):
        result = Entropy.apply(x, Part.of("entropy", logits.shape[-1], group)).to(dtype)
    return layout.wrap(result, rows, logits.shape[:-1])


def kl_divergence(p: Tensor, q: Tensor, *, p_kind: str, q_kind: str) -> Tensor:
    """Sharded by any dimensions, by the classes for logits p only; the leading dimensions are broadcast."""
    shape = _broadcast_shape(p.shape[:-1], q.shape[:-1])
    if shape is None or p.dim() < 1 or q.dim() < 1:
        return NotImplemented
    rows = _rows(len(shape))
    p_labels, q_labels = ((*_broadcast_labels(x.shape[:-1], shape), CLASSES) for x in (p, q))
    layout = find_layout([(p, p_labels), (q, q_labels)], (*rows, CLASSES))
    if layout is None or not _can_divide_classes(layout):
        return NotImplemented
    n_classes, same = p.shape[-1], p.shape[-1] == q.shape[-1]
    if CLASSES in layout.labels and not (p_kind == "logits" and same and n_classes > 0):
        return NotImplemented
    p, q = layout.local(p, p_labels), layout.local(q, q_labels)
    group, layout = layout.without_classes()
    if group is None:
        return layout.wrap(functional.kl_divergence(p, q, p_kind=p_kind, q_kind=q_kind), rows, shape)
    floating = p.is_floating_point() and q.is_floating_point()
    if not (floating and have_kernels("kl_divergence", ("p", "q"), (p, q))):
        return NotImplemented
    p, q, dtype = broadcast_distributions(p, q)
    p, q = _for_kernels(p), _for_kernels(q)
    with torch.autocast(p.device.type, enabled=False):
        result = KlDivergence.apply(p, q, KINDS.index(q_kind), Part.of("kl_divergence", n_classes, group)).to(dtype)
    if q_kind == "probs":
        nonnegative_probabilities(result, ("q", q, q_kind))  # of this process, at a position in its part
    return layout.wrap(result, rows, shape)


def _can_divide_classes(layout: Layout) -> bool:
    return CLASSES not in layout.labels or layout.has_one_group(CLASSES)


def _for_kernels(x: Tensor) -> Tensor:
    return in_autocast(x, torch.float32) if torch.is_autocast_enabled(x.device.type) else x


def kl_div(input: Tensor, target: Tensor, *, reduction: str, log_target: bool) -> Tensor:
    """Sharded by any dimensions: every element has its own value."""
    shape = _broadcast_shape(input.shape, target.shape)
    if shape is None or reduction not in ("none", "sum", "mean", "batchmean"):
        return NotImplemented
    elements = _rows(len(shape))
    labels = [_broadcast_labels(x.shape, shape) for x in (input, target)]
    layout = find_layout(list(zip((input, target), labels, strict=True)), elements)
    if layout is None:
        return NotImplemented
    x, t = (layout.local(x, labels) for x, labels in zip((input, target), labels, strict=True))
    if reduction == "none":
        return layout.wrap(functional.kl_div(x, t, reduction="none", log_target=log_target), elements, shape)
    if reduction == "sum":
        return layout.wrap(functional.kl_div(x, t, reduction="sum", log_target=log_target), (), ())
    batch_size = input.shape[0] if input.dim() > 0 else 1
    divisor = batch_size if reduction == "batchmean" else shape.numel()
    local_size = x.shape[0] if x.dim() > 0 else 1
    if local_size == 0 or divisor == 0:  # a mean over nothing is NaN
        local = functional.kl_div(x, t, reduction="sum", log_target=log_target) * (1.0 if divisor else torch.nan)
    else:  # the kernel divides before it rounds: a sum might be too large for float16
        local = functional.kl_div(x, t, reduction="batchmean", log_target=log_target) * (local_size / divisor)
    return layout.replicated(layout.all_reduce(local))


def embedding(
    input: Tensor,
    weight: Tensor,
    *,
    padding_idx: int | None,
    scale_grad_by_freq: bool,
    sparse: bool,
) -> Tensor:
    """Indices sharded by any dimension; the table by columns, or by rows: each process looks up those that it has."""
    places = _rows(input.dim())
    labels = ("vocabulary", "width")
    layout = find_layout([(input, places), (weight, labels)], (*places, *labels)) if weight.dim() == 2 else None
    if layout is None or sparse:
        return NotImplemented
    by_rows = "vocabulary" in layout.labels
    if scale_grad_by_freq and any(label not in (None, "width") for label in layout.labels):
        return NotImplemented  # an index is counted over all processes
    index, table = layout.local(input, places), layout.local(weight, labels)
    if by_rows:
        local = _lookup_in_shard(layout, index, table, padding_idx, weight.shape[0])
    else:
        local = functional.embedding(index, table, padding_idx, scale_grad_by_freq=scale_grad_by_freq)
    return layout.wrap(local, (*places, "width"), (*input.shape, weight.shape[1]))


def _lookup_in_shard(layout: Layout, index: Tensor, table: Tensor, padding_idx: int | None, n_rows: int) -> Tensor:
    """The rows of `index` that this process has, and zeros for the others: the sum over processes is all rows."""
    start, size = layout.shard("vocabulary", n_rows)
    wide = index.to(torch.int64)
    here = wide - start
    elsewhere = (here < 0) | (here >= size)
    if size == 0:  # the sum connects the zeros to the table, whose gradient every process must have
        return table.new_zeros(*index.shape, table.shape[1]) + table.sum()
    # Indices outside the whole table stay outside of the shard, for the kernel to report.
    here = here.masked_fill(elsewhere & (wide >= 0) & (wide < n_rows), 0)
    padding = None if padding_idx is None or not start <= padding_idx < start + size else padding_idx - start
    try:
        rows = functional.embedding(here, table, padding)
    except IndexError:
        position = tuple(((wide < 0) | (wide >= n_rows)).nonzero()[0].tolist())
        text = f"index {index[position].item()} at position {position} is out of range for {n_rows} embeddings"
        raise IndexError(text) from None
    return rows.masked_fill(elsewhere.unsqueeze(-1), 0)


def embedding_linear(
    input: Tensor,
    embedding_weight: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    *,
    padding_idx: int | None,
    activation: str,
    plan: str,
    return_plan: bool,
) -> Tensor | EmbeddingLinearOutput:
    """Contexts sharded by any dimension but the tokens of one; the linear layer by its outputs (ColwiseParallel)."""
    if input.dim() < 1 or embedding_weight.dim() != 2 or linear_weight.dim() != 2:
        return NotImplemented
    contexts = _rows(input.dim() - 1)
    labels: list[Labels] = [(*contexts, None), (None, None), ("features", None), ("features",)]
    tensors = (input, embedding_weight, linear_weight, linear_bias)
    layout = find_layout(list(zip(tensors, labels, strict=True)), (*contexts, "features"))
    if layout is None:
        return NotImplemented
    local = [None if x is None else layout.local(x, names) for x, names in zip(tensors, labels, strict=True)]
    result = functional.embedding_linear(
        *local, padding_idx=padding_idx, activation=activation, plan=plan, return_plan=return_plan
    )
    output = result.output if return_plan else result
    output = layout.wrap(output, (*contexts, "features"), (*input.shape[:-1], linear_weight.shape[0]))
    return result._replace(output=output) if return_plan else output


def _rows(n: int) -> tuple[int, ...]:
    """The labels of the n leading dimensions of a tensor."""
    return tuple(range(n))


def _broadcast_shape(a: torch.Size, b: torch.Size) -> torch.Size | None:
    try:
        return torch.broadcast_shapes(a, b)
    except RuntimeError:
        return None


def _broadcast_labels(given: torch.Size, shape: torch.Size) -> Labels:
    """The labels of a tensor that is broadcast to `shape`: None for a dimension that is repeated."""
    first = len(shape) - len(given)
    return tuple(first + i if size == shape[first + i] else None for i, size in enumerate(given))
