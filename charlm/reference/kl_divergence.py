"""The Kullback-Leibler divergence of two distributions over classes."""

from __future__ import annotations

import torch
from torch import Tensor

from .entropy import computed, result_dtype

KINDS = ("logits", "log_probs", "probs")


def kl_divergence(p: Tensor, q: Tensor, *, p_kind: str = "logits", q_kind: str = "logits") -> Tensor:
    """KL(P || Q) = `sum_c p_c (log p_c - log q_c)`, in nats.

    Args, gradients and errors as `charlm.functional.kl_divergence`.

    Example:
        >>> kl_divergence(torch.tensor([0.5, 0.5]), torch.tensor([0.5, 0.5]), p_kind="probs", q_kind="probs")
        tensor(0.)
    """
    check_kinds(p_kind, q_kind)
    result = _divergence(p, q, p_kind, q_kind)
    if p_kind == "probs" or q_kind == "probs":
        refuse_negative(result, ("p", p, p_kind), ("q", q, q_kind))
    return result


def _divergence(p: Tensor, q: Tensor, p_kind: str, q_kind: str) -> Tensor:
    p, q, dtype = broadcast(p, q)
    x = computed(p)
    log_p, log_q = _log(x, p_kind), _log(computed(q), q_kind)
    p = x if p_kind == "probs" else log_p.exp()
    absent = log_p == -torch.inf  # p_c = 0: adds nothing
    infinite = ~absent & (log_q == -torch.inf)
    # What has no finite derivative has none: such a class, and of logits, which all have a share in it, the whole row.
    constant = infinite.any(-1, keepdim=True) if p_kind == "logits" else infinite
    p, log_p = torch.where(constant, p.detach(), p), torch.where(constant, log_p.detach(), log_p)
    # A class that P lacks adds nothing, but for a NaN of q. exp may have made 0 of a p_c > 0: infinity times it is NaN.
    nothing = (absent & ~log_q.isnan()) | (infinite & (p == 0))
    total = (p * (log_p.masked_fill(nothing, 0) - log_q.masked_fill(nothing, 0))).sum(-1)
    total = total + torch.zeros_like(total).masked_fill(infinite.any(-1), torch.inf)
    # Rounding alone makes it negative; its derivative is not to be lost.
    return torch.where(total < 0, total - total.detach(), total).to(dtype)


def _log(x: Tensor, kind: str) -> Tensor:
    """log p; that of a probability of 0 is -inf without a gradient."""
    if kind == "logits":
        return x.log_softmax(-1)
    if kind == "log_probs":
        return x
    is_zero = x == 0
    return x.masked_fill(is_zero, 1).log().masked_fill(is_zero, -torch.inf)


def refuse_negative(result: Tensor, *sides: tuple[str, Tensor, str]) -> None:
    """ValueError for a negative probability, which makes the result NaN: only then are the probabilities looked at.

    On the CPU alone, where reading the result waits for nothing, and not while a call is traced or transformed.
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


def check_kinds(p_kind: str, q_kind: str) -> None:
    for name, kind in (("p_kind", p_kind), ("q_kind", q_kind)):
        if kind not in KINDS:
            raise ValueError(f'{name} must be "logits", "log_probs" or "probs", got {kind!r}')


def broadcast(p: Tensor, q: Tensor) -> tuple[Tensor, Tensor, torch.dtype]:
    """p and q in one dtype and shape (..., V), as torch promotes and broadcasts, and the dtype of their divergence.

    Half types that are expanded become float32: the gradient of the smaller one is a sum, rounded once. RuntimeError,
    NotImplementedError for what does not fit.
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
    """torch's, with a RuntimeError that says of what the leading dimensions do not fit."""
    try:
        return torch.broadcast_shapes(a, b)
    except RuntimeError as error:
        raise RuntimeError(f"the leading dimensions of {what} cannot be broadcast") from error
