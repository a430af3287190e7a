"""The Kullback-Leibler divergence of two distributions over classes."""

from __future__ import annotations

import torch
from torch import Tensor

from .entropy import computed, result_dtype

KINDS = ("logits", "log_probs", "probs")


def kl_divergence(p: Tensor, q: Tensor, *, p_kind: str = "logits", q_kind: str = "logits") -> Tensor:
    """`sum_c p_c (log p_c - log q_c)` in nats.

    Arguments, gradients and errors are those of `charlm.functional.kl_divergence`.

    Returns:
        (...), the promoted dtype; float32 under autocast.

    Example:
        >>> kl_divergence(torch.tensor([0.5, 0.5]), torch.tensor([0.5, 0.5]), p_kind="probs", q_kind="probs")
        tensor(0.)
    """
    for name, kind in (("p_kind", p_kind), ("q_kind", q_kind)):
        if kind not in KINDS:
            raise ValueError(f'{name} must be "logits", "log_probs" or "probs", got {kind!r}')
    result = _divergence(p, q, p_kind, q_kind)
    if p_kind == "probs" or q_kind == "probs":
        _refuse_negative(result, ("p", p, p_kind), ("q", q, q_kind))
    return result


def _divergence(p: Tensor, q: Tensor, p_kind: str, q_kind: str) -> Tensor:
    p, q, dtype = _broadcast(p, q)
    x = computed(p)
    log_p, log_q = _log(x, p_kind), _log(computed(q), q_kind)
    p = x if p_kind == "probs" else log_p.exp()
    absent = log_p == -torch.inf  # p_c = 0
    infinite = ~absent & (log_q == -torch.inf)
    # Derivatives that are not finite become 0: of such a class; for logits, on which all classes depend, of the row.
    constant = infinite.any(-1, keepdim=True) if p_kind == "logits" else infinite
    p, log_p = torch.where(constant, p.detach(), p), torch.where(constant, log_p.detach(), log_p)
    # A class of p_c = 0 adds nothing, unless q is NaN. exp may have rounded a p_c > 0 to 0, and 0 * inf is NaN.
    nothing = (absent & ~log_q.isnan()) | (infinite & (p == 0))
    difference = log_p.masked_fill(nothing, 0) - log_q.masked_fill(nothing, 0)
    total = (p * difference).sum(-1)
    # float64 judges all others. As sum_c p_c = 1, differences can be taken from their mean, where the terms of the
    # derivative do not cancel: without it they lose up to 18 ulps.
    if p_kind == "logits" and x.dtype == torch.float64:
        mean = torch.where(total.isfinite(), total, 0).detach()
        total = (p * (difference - mean.unsqueeze(-1))).sum(-1) + mean
    total = total + torch.zeros_like(total).masked_fill(infinite.any(-1), torch.inf)
    # Only rounding makes it negative. Subtracting the detached value makes it 0 and keeps the derivative.
    return torch.where(total < 0, total - total.detach(), total).to(dtype)


def _log(x: Tensor, kind: str) -> Tensor:
    """log p; -inf without a gradient for a probability of 0."""
    if kind == "logits":
        return x.log_softmax(-1)
    if kind == "log_probs":
        return x
    is_zero = x == 0
    return x.masked_fill(is_zero, 1).log().masked_fill(is_zero, -torch.inf)


def _refuse_negative(result: Tensor, *sides: tuple[str, Tensor, str]) -> None:
    """ValueError for a negative probability. It makes `result` NaN, so the probabilities are read only then.

    Only on the CPU, where reading does not wait for a device, and not while a call is traced or transformed.
    """
    if torch.compiler.is_compiling() or type(result) is not Tensor or not result.is_cpu:
        return
    if torch._C._functorch.is_functorch_wrapped_tensor(result) or not result.isnan().any():
        return
    for name, values, kind in sides:
        negative = (values < 0).nonzero() if kind == "probs" else ()
        if len(negative) > 0:
            position = tuple(negative[0].tolist())
            value = values[position].item()
            raise ValueError(f"{name} must hold probabilities, but is {value} at position {position}")


def _broadcast(p: Tensor, q: Tensor) -> tuple[Tensor, Tensor, torch.dtype]:
    """p and q in one dtype and shape (..., V), as torch promotes and broadcasts, and the dtype of their divergence.

    Half types that are expanded become float32: the gradient of the smaller tensor is a sum, which is rounded once.
    """
    for x in (p, q):
        if not x.is_floating_point():
            raise NotImplementedError(f'"kl_divergence" not implemented for {x.dtype}')
    if p.dim() < 1 or q.dim() < 1 or p.shape[-1] != q.shape[-1]:
        raise RuntimeError(
            f"p and q must be of shape (..., V) with the same number of classes V, got {list(p.shape)} "
            f"and {list(q.shape)}"
        )
    dtype = torch.promote_types(p.dtype, q.dtype)
    p, q = p.to(dtype), q.to(dtype)
    dtype = result_dtype(p)
    if p.shape == q.shape:
        return p, q, dtype
    leading = broadcast_shapes(p.shape[:-1], q.shape[:-1], f"p and q of shapes {list(p.shape)} and {list(q.shape)}")
    p, q = (computed(x).expand(*leading, x.shape[-1]) for x in (p, q))
    return p, q, dtype


def broadcast_shapes(a: torch.Size, b: torch.Size, what: str) -> torch.Size:
    """`torch.broadcast_shapes` with a RuntimeError that names `what` cannot be broadcast."""
    try:
        return torch.broadcast_shapes(a, b)
    except RuntimeError as error:
        raise RuntimeError(f"the leading dimensions of {what} cannot be broadcast") from error
