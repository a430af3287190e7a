"""Entropy and KL divergence of rows whose classes are divided among the ranks of a process group.

Each rank calls the kernel of one process on its own classes r, which computes the state of each row: for the entropy
the maximum m_r, the sum s_r and the mean distance d_r (csrc/ops/entropy.h). All ranks exchange the states in one
all-gather and compute the state of all classes, from which the kernel computes the gradient of a rank's own classes
without communication. With m = max_r m_r and a_r = s_r exp(m_r - m)::

    s = sum_r a_r        d = sum_r a_r (d_r + m - m_r) / s        H = log s + d

The divergence of logits p from q (csrc/ops/kl_divergence.h) has the mean difference D = u^p - u^q of each rank, less
its centre k_r, in place of d_r. u is relative to the maxima of a rank: to become relative to those of all ranks, D
changes by (m^p_r - m^p) - (m^q_r - m^q).

Bytes that a rank sends and receives for N rows on W ranks: 12 (W - 1) N for the entropy, 24 (W - 1) N for the
divergence, twice as much for float64; backward, nothing.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from .class_part import Gathered, Part, shares_of

LOGITS = 0  # the number of this kind of distribution, as in charlm._checks.KINDS


class Entropy(Function):
    """(...) in the dtype of the arithmetic, of this rank's logits (..., V_r)."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, part: Part) -> Tensor:
        state = torch.ops.charlm.entropy.default(logits)[1]
        if logits.shape[-1] == 0:
            state[0] = -math.inf
        maxima, sums, distances = Gathered.apply(state, part).double().unbind(1)
        maximum, shares = shares_of(maxima, sums)
        total = shares.sum(0)
        distance = _mean(shares, distances + (maximum - maxima), total)
        ctx.save_for_backward(logits, torch.stack([maximum, total, distance]).to(state.dtype))
        return (total.log() + distance).to(state.dtype).view(logits.shape[:-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        logits, state = ctx.saved_tensors
        if logits.numel() == 0:
            return torch.zeros_like(logits), None
        return torch.ops.charlm._entropy_backward.default(grad.contiguous(), logits, state), None


class KlDivergence(Function):
    """(...) in the dtype of the arithmetic, of this rank's logits p and its q of the kind q_kind, (..., V_r)."""

    @staticmethod
    def forward(ctx: Any, p: Tensor, q: Tensor, q_kind: int, part: Part) -> Tensor:
        state = torch.ops.charlm.kl_div.default(p, q, LOGITS, q_kind)[1]
        p_max, p_sum, q_max, q_sum, _, centre, offset = state
        if p.shape[-1] == 0:
            p_max, q_max = p_max - math.inf, q_max - math.inf
        numbers = torch.stack([p_max, p_sum, q_max, q_sum, centre, offset])
        p_maxima, p_sums, q_maxima, q_sums, centres, offsets = Gathered.apply(numbers, part).double().unbind(1)
        p_max, p_shares = shares_of(p_maxima, p_sums)
        p_sum = p_shares.sum(0)
        if q_kind == LOGITS:
            q_max, q_shares = shares_of(q_maxima, q_sums)
            q_sum = q_shares.sum(0)
        else:
            q_maxima, q_max, q_sum = torch.zeros_like(q_maxima), torch.zeros_like(p_max), torch.ones_like(p_sum)
        p_shift, q_shift = p_maxima - p_max, q_maxima - q_max
        centres = centres + (p_shift - q_shift)
        centre = centres.gather(0, p_maxima.argmax(0, keepdim=True)).squeeze(0)
        centre = torch.where(centre.isfinite(), centre, 0)
        mean = _mean(p_shares, centres - centre - offsets, p_sum)
        # A class with p_c > 0 = q_c, also where the share of its rank has been rounded to 0. As in the kernel, where
        # -huge replaces -inf, a difference of more than half of it is infinite.
        huge = torch.finfo(state.dtype).max / 4
        far = (p_shift - q_shift.clamp(min=-huge) > huge / 2) | ((offsets == -math.inf) & (p_shift > -huge / 2))
        unknown = (p_sum + q_sum).isnan() | ((p_shares > 0) & offsets.isnan()).any(0)
        mean = torch.where(far.any(0), math.inf, mean).masked_fill(unknown, math.nan)
        result = mean + (centre + (q_sum.log() - p_sum.log()))
        result = torch.where(result < 0, 0, result)  # from rounding
        result = torch.where((p_sum == 0) | (q_sum == 0), math.nan, result)  # a row of -inf
        of_all = torch.stack([p_max, p_sum, q_max, q_sum, torch.ones_like(p_sum), centre, -mean])
        ctx.save_for_backward(p, q, of_all.to(state.dtype))
        ctx.q_kind = q_kind
        return result.to(state.dtype).view(p.shape[:-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        p, q, state = ctx.saved_tensors
        if p.numel() == 0:
            return torch.zeros_like(p), torch.zeros_like(q), None, None
        needed = list(ctx.needs_input_grad[:2])
        op = torch.ops.charlm._kl_div_backward.default
        of_p, of_q = op(grad.contiguous(), p, q, state, LOGITS, ctx.q_kind, needed)
        return of_p if needed[0] else None, of_q if needed[1] else None, None, None


def _mean(shares: Tensor, values: Tensor, total: Tensor) -> Tensor:
    """(n): of the values of the ranks (W, n); those of a share of 0 may be infinite or NaN."""
    return torch.where(shares > 0, shares * values, 0).sum(0) / total
