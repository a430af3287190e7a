"""Cross-entropy of logits whose classes are divided among the ranks of a process group.

Each rank holds the logits of its own classes, or the rows of the linear layer that computes them, and reads them once.
For its classes r it finds three numbers a row, which all ranks exchange::

    m_r = max_c z_c        s_r = sum_c exp(z_c - m_r)        d_r = log s_r + m_r - z_y, on the rank of the target y

    m = max_r m_r          s = sum_r s_r exp(m_r - m)        lse = m + log s         -log p_y = d_r + lse - lse_r

In backward a rank computes the gradient of its own logits, exp(z_c - m) / s and what belongs to its targets, in one
more pass, without communication. (Shoeybi et al. 2019, Megatron-LM, section 3, exchange the maximum, the target logit
and the sum in three all-reduces; their label smoothing leaves out the classes of other ranks.)

Bytes that a rank sends and receives, for N rows of D features on W ranks: forward, 12 (W - 1) N in one all-gather, 4
more a row and rank with label smoothing or entropy, and 8 with predicted tokens or token accuracy; twice as much for
float64. Backward, nothing for logits; for a linear layer one all-reduce of the gradient of `input`,
N D elements.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.compiler import is_compiling
from torch.nn import functional as torch_functional

from charlm.functional import CrossEntropyOutput
from charlm.functional.cross_entropy import CrossEntropyOptions

from .class_part import Gathered, Part, shares_of

_INTEGERS = {torch.float32: torch.int32, torch.float64: torch.int64}
IGNORED = -100  # target of a row that has no target among the classes of this rank

# --------------------------------------------------------------------------------------------------- rows and options


class Wanted(NamedTuple):
    """What is computed of each row beside its loss, and which metrics are returned."""

    smooth: bool
    lse: bool
    entropy: bool
    predicted_tokens: bool
    token_accuracy: bool

    @property
    def all_rows(self) -> bool:
        """Whether rows of ignored targets are computed too."""
        return self.lse or self.entropy

    @property
    def predicted(self) -> bool:
        return self.predicted_tokens or self.token_accuracy


class Numbers(NamedTuple):
    """Of each row, in the dtype of the arithmetic; None where it is not wanted.

    Attributes:
        nll: -log p of the target, 0 where it is ignored.
        lse: the log-sum-exp of the logits.
        smooth: the mean over classes of w_c (-log p_c).
        entropy: of the softmax.
        predicted: the class of the largest logit, int64.
    """

    nll: Tensor
    lse: Tensor
    smooth: Tensor | None
    entropy: Tensor | None
    predicted: Tensor | None


class Rows(NamedTuple):
    """The targets and weights of a call.

    Attributes:
        part: The classes of this rank.
        target: The loss's shape, int64.
        valid: Whether a target is not ignored.
        owner: The rank that holds the class of a target; 0 for an ignored one.
        own: The target as a class of this rank; IGNORED where it is another's or ignored.
        weight: (num_classes) in the dtype of the arithmetic, or None.
    """

    part: Part
    target: Tensor
    valid: Tensor
    owner: Tensor
    own: Tensor
    weight: Tensor | None

    @classmethod
    def of(
        cls,
        part: Part,
        target: Tensor,
        shape: torch.Size,
        weight: Tensor | None,
        options: CrossEntropyOptions,
        dtype: torch.dtype,
    ) -> Rows:
        if target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
            raise RuntimeError(f"expected target to hold class indices of an integer dtype, got {target.dtype}")
        if target.shape != shape:
            raise RuntimeError(f"expected target of shape {tuple(shape)}, got {tuple(target.shape)}")
        if not dtype.is_floating_point:
            raise NotImplementedError(f"expected logits of a floating dtype, got {dtype}")
        for name in ("logit_scale", "lse_square_scale"):  # here, since a rank without classes calls no kernel
            factor, largest = getattr(options, name), torch.finfo(torch.promote_types(dtype, torch.float32)).max
            if math.isfinite(factor) and abs(factor) > largest:
                raise ValueError(f"{name} must be finite in the dtype of the arithmetic, got {factor}")
        if not 0 <= options.label_smoothing <= 1:
            raise RuntimeError(f"label_smoothing must be between 0.0 and 1.0. Got: {options.label_smoothing}")
        compute = torch.promote_types(dtype, torch.float32)
        if options.loss_dtype not in (None, dtype, compute):
            raise ValueError(
                f"loss_dtype must be the dtype of the logits, {dtype}, or that of the arithmetic, {compute}, "
                f"got {options.loss_dtype}"
            )
        if weight is not None:
            if weight.shape != (part.num_classes,) or weight.dtype not in (dtype, compute):
                raise RuntimeError(
                    f"weight must hold a {dtype} for each of all {part.num_classes} classes, got shape "
                    f"{tuple(weight.shape)} and {weight.dtype}"
                )
            if weight.requires_grad and torch.is_grad_enabled():
                raise RuntimeError("the derivative for 'weight' is not implemented: it must not require grad")
            weight = weight.detach().to(compute, copy=True)  # backward reads it too
        index = target.to(torch.int64)
        if target.dtype == torch.uint64:  # 2**64 - 100 must not become -100
            index = torch.where(index < 0, torch.iinfo(torch.int64).max, index)
        valid = index != options.ignore_index
        bad = valid & ((index < 0) | (index >= part.num_classes))
        if not is_compiling() and index.is_cpu and bad.any():
            position = tuple(bad.nonzero()[0].tolist())
            raise IndexError(
                f"target {target[position].item()} at position {position} is out of range for {part.num_classes} "
                "classes"
            )
        owner = torch.where(valid, index // part.per_rank, 0).clamp(0, part.n_ranks - 1)
        own = torch.where(valid & (owner == part.rank), index - part.start, IGNORED)
        # A GPU finds a bad target in the kernel, which reports it: it stays out of range there, on every rank.
        own = torch.where(bad, torch.where(index == IGNORED, IGNORED - 1, index), own)
        return cls(part, index, valid, owner, own, weight)

    def check_inplace(self, logits: Tensor, inplace: str | None) -> None:
        if inplace is None or not (logits.requires_grad and torch.is_grad_enabled()):
            return
        base = logits if logits._base is None else logits._base
        if base.is_leaf and base.requires_grad:
            raise RuntimeError(
                "inplace: these logits are a leaf that requires grad, or a view of one. Use inplace=None"
            )
        if logits.retains_grad:
            raise RuntimeError("inplace: these logits retain their gradient, whose memory is theirs. Use inplace=None")
        if not is_compiling() and torch._debug_has_internal_overlap(logits) != 0:
            raise RuntimeError(
                "inplace: these logits may overlap themselves in memory. Use inplace=None, or clone() them"
            )

    def weights_of(self, rank: int) -> Tensor | float:
        """The sum of the class weights of a rank, divided by the number of all classes."""
        size, start = self.part.size_of(rank), rank * self.part.per_rank
        total = size if self.weight is None else self.weight[start : start + size].sum()
        return total / self.part.num_classes

    def result(
        self,
        numbers: Numbers,
        options: CrossEntropyOptions,
        dtype: torch.dtype,
        token_weight: Tensor | None,
        wanted: Wanted,
    ) -> Tensor | CrossEntropyOutput:
        """The loss and the metrics from the numbers of each row, by the formula of `cross_entropy`."""
        nll, lse, smooth, entropy, predicted = numbers
        zero = nll.new_zeros(())
        share = torch.where(self.valid, zero + 1, zero)
        if self.weight is not None:
            safe = torch.where(self.valid, self.target, 0).clamp(0, self.part.num_classes - 1)
            share = torch.where(self.valid, self.weight[safe], zero)
        loss = nll * (1 - options.label_smoothing) * share
        if smooth is not None:
            loss = loss + smooth * options.label_smoothing
        if options.lse_square_scale != 0:
            z = torch.where(self.valid, lse, zero)  # an ignored row has no gradient, even of an infinite lse
            loss = loss + z * (z * (share * options.lse_square_scale))  # 2 z, in the gradient, may be infinite
        loss = torch.where(self.valid, loss, zero)
        if token_weight is not None:
            if token_weight.shape != loss.shape or not token_weight.is_floating_point():
                raise RuntimeError(
                    f"token_weight must hold one weight for each target, shape {tuple(loss.shape)}, got "
                    f"{tuple(token_weight.shape)} and {token_weight.dtype}"
                )
            if token_weight.requires_grad and torch.is_grad_enabled():
                raise RuntimeError("the derivative for 'token_weight' is not implemented: it must not require grad")
            token_weight = torch.where(self.valid, token_weight.detach().to(loss.dtype), zero)
            loss, share = loss * token_weight, share * token_weight
        if options.reduction == 2:
            loss = loss.sum()
        elif options.reduction == 1:
            divisor = share.sum()
            if options.all_ignored == "zero":
                divisor = torch.where(self.valid.any(), divisor, 1)
            loss = loss.sum() / divisor
        loss = loss.to(dtype)
        if not (wanted.all_rows or wanted.predicted):
            return loss
        accuracy = None
        if wanted.token_accuracy:
            accuracy = ((predicted == self.target) & self.valid).float()
            if options.reduction != 0:
                count = self.valid.sum()
                accuracy = accuracy.sum() / (count.clamp(min=1) if options.all_ignored == "zero" else count)
        return CrossEntropyOutput(
            loss,
            lse if wanted.lse else None,
            entropy,
            predicted if wanted.predicted_tokens else None,
            accuracy,
        )


# ------------------------------------------------------------------------------------------- this rank, and all ranks


def _of_no_class(n: int, wanted: Wanted, compute: torch.dtype, device: torch.device) -> Tensor:
    """`_of_this_rank` for a rank without classes."""
    numbers = torch.zeros(3 + wanted.smooth + wanted.entropy + 2 * wanted.predicted, n, dtype=compute, device=device)
    numbers[0], numbers[1] = -math.inf, 1
    if wanted.predicted:
        numbers[-1] = -math.inf
    return numbers


def _of_this_rank(logits: Tensor, rows: Rows, options: CrossEntropyOptions, wanted: Wanted) -> Tensor:
    """(K, n): of each row m_r, s_r and d_r, then, as wanted, the smoothed loss, the entropy, and the predicted class
    (its bits, as an integer) with its logit.

    d_r counts on the rank of the target only.
    """
    compute = torch.promote_types(logits.dtype, torch.float32)
    size = logits.shape[1]
    if size == 0:
        return _of_no_class(rows.own.numel(), wanted, compute, logits.device)
    op, tail = torch.ops.charlm, (0.0, options.softcap, options.logit_scale, False, compute)
    # A target of another rank counts as class 0 here, so that its row has a log-sum-exp.
    target = torch.where((rows.own == IGNORED) & (rows.valid | wanted.all_rows), 0, rows.own)
    loss, state = op.cross_entropy.default(logits, target, None, None, 0, IGNORED, 0.0, *tail)
    maximum, total = state
    dead = maximum == -math.inf  # or all NaN, as the sum is then
    maximum = torch.where(total.isnan() & (maximum < math.inf), total, maximum)
    numbers = [maximum, total, loss.flatten().masked_fill(dead, math.inf)]
    if wanted.smooth:
        # With a smoothing of 1 the loss is the mean over classes, whatever the target; but 0 * inf is NaN.
        weight = _part_of(rows)
        smooth = op.cross_entropy.default(logits, target, weight, None, 0, IGNORED, 1.0, *tail)[0].flatten()
        infinite = smooth.new_tensor(math.inf) if weight is None else math.inf * weight[target.flatten().clamp(min=0)]
        impossible = _logits_of(logits, target.clamp(min=0), options, compute) == -math.inf
        numbers.append(torch.where(impossible, infinite, smooth * (size / rows.part.num_classes)))
    if wanted.entropy or wanted.predicted:
        first = torch.zeros_like(rows.own)
        _, entropy, predicted, _ = op.cross_entropy_metrics.default(logits, first, 0, IGNORED, 0.0, *tail)
        numbers += [entropy.flatten()] if wanted.entropy else []
        if wanted.predicted:  # with its logit: m_r need not be the maximum
            numbers += [_as_float(predicted, compute), _logits_of(logits, predicted, options, compute)]
    return torch.stack(numbers)


def _logits_of(logits: Tensor, index: Tensor, options: CrossEntropyOptions, compute: torch.dtype) -> Tensor:
    """(n): scaled and capped, the logits of one class of each row."""
    z = logits.gather(1, index.unsqueeze(1)).to(compute).flatten() * options.logit_scale
    return options.softcap * torch.tanh(z / options.softcap) if options.softcap > 0 else z


def _as_float(index: Tensor, dtype: torch.dtype) -> Tensor:
    """(n): the bits of indices, since float32 rounds those beyond 2**24."""
    return index.flatten().to(_INTEGERS[dtype]).view(dtype)


def _part_of(rows: Rows) -> Tensor | None:
    """The class weights of this rank."""
    return None if rows.weight is None else rows.weight[rows.part.start : rows.part.start + rows.part.size]


def _of_all_ranks(numbers: Tensor, rows: Rows, wanted: Wanted) -> tuple[Numbers, Tensor]:
    """Exchanges the numbers of each rank; also returns the state of each row, (2, n): m and s."""
    part, shape = rows.part, rows.own.shape
    gathered = Gathered.apply(numbers, part)
    wide = gathered.double()
    maxima, sums, distances = wide[:, 0], wide[:, 1], wide[:, 2]
    finite, shares = shares_of(maxima, sums)
    maximum, total = maxima.amax(0), shares.sum(0)
    to_total = (finite - maxima) + (total / sums).log()  # (W, n) lse - lse_r; inf where a rank's logits are all -inf
    owner = rows.owner.flatten()[None]
    nll = (distances.gather(0, owner) + to_total.gather(0, owner)).squeeze(0)
    nll = torch.where(rows.valid.flatten(), nll, 0).view(shape)
    lse = torch.where(maximum == math.inf, maximum, finite + total.log()).view(shape)
    smooth = entropy = predicted = None
    at = 3
    if wanted.smooth:
        of_ranks = [wide[r, at] + rows.weights_of(r) * to_total[r] for r in range(part.n_ranks) if part.size_of(r)]
        smooth = torch.stack(of_ranks).sum(0).view(shape)
        at += 1
    if wanted.entropy:
        share = (-to_total).exp()
        terms = torch.where(share > 0, wide[:, at] + to_total, 0)  # before the product: 0 * inf is NaN
        entropy = (share * terms).sum(0).view(shape)
        at += 1
    if wanted.predicted:
        best = gathered[:, at + 1].argmax(0, keepdim=True)
        index = gathered[:, at].gather(0, best).view(_INTEGERS[gathered.dtype]).long()
        predicted = (index + best * part.per_rank).view(shape)
    nll, lse, smooth, entropy = (x if x is None else x.to(gathered.dtype) for x in (nll, lse, smooth, entropy))
    return Numbers(nll, lse, smooth, entropy, predicted), torch.stack([finite, total]).to(gathered.dtype)


def in_autocast(tensor: Any, dtype: torch.dtype) -> Any:
    """A tensor as autocast gives it to an op: float64 and None stay."""
    return tensor if tensor is None or tensor.dtype == torch.float64 else tensor.to(dtype)


def _gradient(
    logits: Tensor,
    state: Tensor,
    entropy: Tensor | None,
    grads: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None],
    rows: Rows,
    options: CrossEntropyOptions,
    inplace: bool,
) -> Tensor:
    """The gradient of this rank's logits, from those of nll, lse, smooth and entropy."""
    compute = state.dtype
    op, tail = torch.ops.charlm, (0.0, options.softcap, options.logit_scale, False, compute)
    zero = state.new_zeros(())
    of_nll, of_lse, of_smooth, of_entropy = (None if grad is None else grad.to(compute) for grad in grads)
    of_nll = zero.expand(rows.own.shape) if of_nll is None else torch.where(rows.valid, of_nll, zero)
    if logits.shape[1] == 0:
        return torch.zeros_like(logits)
    of_lse = zero.expand(rows.own.shape) if of_lse is None else of_lse
    of_lse = of_lse + torch.where(rows.own == IGNORED, of_nll, zero)  # where this rank has no target, p_c times it
    if of_smooth is not None:
        others = sum(rows.weights_of(r) for r in range(rows.part.n_ranks) if r != rows.part.rank)
        of_lse = of_lse + of_smooth * others
    of_rows = (state, of_lse, of_entropy, None if of_entropy is None else entropy)
    of_nll = of_nll.contiguous()
    if inplace:
        op._cross_entropy_backward_.default(logits, of_nll, rows.own, None, None, *of_rows, 0, IGNORED, 0.0, *tail)
        torch.autograd.graph.increment_version(logits)  # what saved the logits must not read them again
        return logits
    if of_smooth is not None and logits.dtype != compute:  # the sum of two gradients is rounded once
        logits = logits.to(compute)
    backward = op._cross_entropy_backward.default
    grad = backward(of_nll, logits, rows.own, None, None, *of_rows, [True, False], 0, IGNORED, 0.0, *tail)[0]
    if of_smooth is None:
        return grad
    first, unused = torch.where(rows.valid, 0, IGNORED), (None, None, None, [True, False])
    of_smooth = (of_smooth * (logits.shape[1] / rows.part.num_classes)).contiguous()
    grad += backward(of_smooth, logits, first, _part_of(rows), None, state, *unused, 0, IGNORED, 1.0, *tail)[0]
    return grad


class OfLogits(Function):
    """`Numbers` of logits whose classes are divided among ranks."""

    @staticmethod
    def forward(ctx: Any, logits: Any, rows: Any, options: Any, wanted: Any, inplace: Any) -> Any:
        numbers, state = _of_all_ranks(_of_this_rank(logits, rows, options, wanted), rows, wanted)
        ctx.save_for_backward(logits, state, numbers.entropy)
        ctx.call = rows, options
        ctx.inplace = inplace and not wanted.smooth and not is_compiling()
        ctx.set_materialize_grads(False)
        if numbers.predicted is not None:
            ctx.mark_non_differentiable(numbers.predicted)
        return tuple(numbers)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        logits, state, entropy = ctx.saved_tensors
        grad = _gradient(logits.detach(), state, entropy, grads[:4], *ctx.call, ctx.inplace)
        return grad.to(logits.dtype), None, None, None, None


class OfLinear(Function):
    """`Numbers` of the logits of a linear layer, in blocks of rows."""

    @staticmethod
    def forward(ctx: Any, input: Any, weight: Any, bias: Any, rows: Any, options: Any, wanted: Any, block: Any) -> Any:
        numbers, kept = [], None
        for at in range(0, max(1, len(input)), block):
            logits = torch_functional.linear(input[at : at + block], weight, bias)
            numbers.append(_of_this_rank(logits, _block(rows, at, block), options, wanted))
            kept = logits if block >= len(input) and any(ctx.needs_input_grad) else None
            del logits  # before the next block
        result, state = _of_all_ranks(torch.cat(numbers, 1), rows, wanted)
        ctx.save_for_backward(input, weight, bias, state, result.entropy, kept)
        ctx.call = rows, options, block
        ctx.is_first = True
        ctx.set_materialize_grads(False)
        if result.predicted is not None:
            ctx.mark_non_differentiable(result.predicted)
        return tuple(result)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        input, weight, bias, state, entropy, kept = ctx.saved_tensors
        rows, options, block = ctx.call
        # Their memory becomes the gradient, as no version counter tells: a second backward computes them anew.
        kept = kept.data if kept is not None and ctx.is_first else None
        ctx.is_first = False
        of_input, of_weight, of_bias = ctx.needs_input_grad[:3]
        sums = torch.promote_types(input.dtype, torch.float32) if block < len(input) else input.dtype
        grad_input = torch.empty_like(input, memory_format=torch.contiguous_format) if of_input else None
        grad_weight = torch.zeros_like(weight, dtype=sums) if of_weight else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float64) if of_bias else None
        with torch.autocast(input.device.type, enabled=False):  # a backward may be under it
            for at in range(0, max(1, len(input)), block):
                x, cut = input[at : at + block], slice(at, at + block)
                grad = _gradient(
                    torch_functional.linear(x, weight, bias) if kept is None else kept,
                    state[:, cut].contiguous(),
                    None if entropy is None else entropy[cut],
                    tuple(None if grad is None else grad[cut] for grad in grads[:4]),
                    _block(rows, at, block),
                    options,
                    grads[2] is None,
                ).to(input.dtype)
                if grad_input is not None:
                    torch.mm(grad, weight, out=grad_input[cut])
                if grad_weight is not None:
                    grad_weight += grad.T @ x
                if grad_bias is not None:
                    grad_bias += grad.sum(0, dtype=torch.float64)
                del grad  # before the next block
        if grad_input is not None:
            dist.all_reduce(grad_input, group=rows.part.group)
        grad_weight = None if grad_weight is None else grad_weight.to(weight.dtype)
        grad_bias = None if grad_bias is None else grad_bias.to(weight.dtype)
        return grad_input, grad_weight, grad_bias, None, None, None, None


def _block(rows: Rows, at: int, size: int) -> Rows:
    cut = slice(at, at + size)
    return rows._replace(target=rows.target[cut], valid=rows.valid[cut], owner=rows.owner[cut], own=rows.own[cut])


# -------------------------------------------------------------------------------------------------- without kernels


def of_logits_by_formula(
    logits: Tensor, rows: Rows, options: CrossEntropyOptions, wanted: Wanted, inplace: bool = False
) -> Numbers:
    """`OfLogits` in torch's own ops."""
    size, n = logits.shape[1], rows.own.numel()
    z = logits.to(torch.promote_types(logits.dtype, torch.float32)).movedim(1, -1).reshape(n, size)
    z = z * options.logit_scale
    if options.softcap > 0:
        z = options.softcap * torch.tanh(z / options.softcap)
    if not wanted.all_rows:
        z = torch.where(rows.valid.view(n, 1), z, 0)
    if size == 0:
        numbers = _of_no_class(n, wanted, z.dtype, z.device) + z.sum()  # part of the graph of autograd
        return _of_all_ranks(numbers, rows, wanted)[0]
    maximum, best = z.detach().max(1)
    dead = maximum == -math.inf
    shifted = z - maximum.masked_fill(dead, 0)[:, None]
    total = shifted.exp().sum(1).masked_fill(dead, 1)
    log_p = shifted - total.log()[:, None]
    distance = -log_p.gather(1, rows.own.clamp(min=0).view(n, 1)).squeeze(1)
    numbers = [maximum, total, torch.where(rows.own.flatten() == IGNORED, 0, distance)]
    if wanted.smooth:
        weight = _part_of(rows)
        numbers.append(-(log_p * ((1 if weight is None else weight) / rows.part.num_classes)).sum(1))
    if wanted.entropy:
        numbers.append(-(log_p.exp() * log_p.masked_fill(log_p == -math.inf, 0)).sum(1))
    if wanted.predicted:
        numbers += [_as_float(best, z.dtype), maximum]
    return _of_all_ranks(torch.stack(numbers), rows, wanted)[0]
